"""Reports, written from the tracking store alone: queries, statistics, words, figures."""
