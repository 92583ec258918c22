"""Reports, written from the tracking store alone: queries, statistics, text and figures."""
