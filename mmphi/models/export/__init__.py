"""Models in the classes of other libraries."""
