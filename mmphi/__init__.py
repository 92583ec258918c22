"""mmphi makes a causal language model read images and audio, one tracked experiment at a time."""

__version__ = "0.1.0"
