"""Patches of third-party modules for faster training and decoding, with the same results."""
