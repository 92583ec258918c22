"""Vision encoders: loading, feature extraction, and the light CLIP."""
