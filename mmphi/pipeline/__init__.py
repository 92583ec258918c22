"""The pipeline: the stage interface, cache keys of results, and building missing stages. Independent of any stage."""
