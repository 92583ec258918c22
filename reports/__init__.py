"""Reports written from the tracking store."""
