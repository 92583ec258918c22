"""The language model, the image tower, the projector between them, and the parts joined."""
