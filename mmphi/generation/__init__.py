"""Generation for many conversations at once: KV cache, sampling, detokenizer, stop conditions, messages."""
