"""Export of models to the classes of other libraries."""
