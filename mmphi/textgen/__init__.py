"""Text that a language model writes: many processes at once, a bounded spool between them and whoever reads it."""
