"""Reading, generating and storing training data."""
