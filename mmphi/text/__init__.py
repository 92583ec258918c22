"""Tokenizers, prompts, tokenized examples and packed batches."""
