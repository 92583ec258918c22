"""Conversations with a trained model: read once, answered word by word, many at once."""
