"""How well answers fit: captioning, grounding, exact attributes, yes/no questions, retrieval."""
