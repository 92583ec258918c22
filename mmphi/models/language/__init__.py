"""Causal language models: loading, Phi by size, adapters, and the pretraining task."""
