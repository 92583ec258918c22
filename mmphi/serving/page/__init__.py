"""The page in a browser: what is asked there, by whom, and what it looks like."""
