"""Process trees: one job, one tree."""
