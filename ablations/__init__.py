"""Studies that change one factor at a time."""
