"""Training on transformers' Trainer: packed batches, exact loss, exact resume."""
