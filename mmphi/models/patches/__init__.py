"""Patches of third-party modules for faster training and decoding, with the same results.

:mod:`~mmphi.models.patches.module_patches` applies and removes them.
"""
