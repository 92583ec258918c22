"""Patches of third-party modules, for training and for decoding; each can be removed again."""
