"""Text generation by a language model: parallel generators, with a bounded shard queue between them and a reader."""
