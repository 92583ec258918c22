"""Causal language models: loading, Phi by size, adapters, and the tasks they are trained on."""
