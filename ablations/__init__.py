"""Studies: levels of one factor compared over paired seeds, and searches for settings."""
