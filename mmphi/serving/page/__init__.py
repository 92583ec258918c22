"""The web page of ``mmphi demo``: its layout, its examples and its models."""
