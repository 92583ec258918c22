"""Work on a Ray cluster: connection and image embedding."""
