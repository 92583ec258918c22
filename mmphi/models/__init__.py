"""The language model, the vision encoder, the projector between them, and the parts joined."""
