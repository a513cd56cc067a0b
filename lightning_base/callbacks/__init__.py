"""What watches a run: expert load, throughput, manifest, progress, metrics.csv."""
