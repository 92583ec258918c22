"""Evaluation: captioning, grounding, scene attributes, yes/no questions, speech, perplexity and retrieval."""
