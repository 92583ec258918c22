"""Tokenizer, prompt, sequences, and the rows they are packed in."""
