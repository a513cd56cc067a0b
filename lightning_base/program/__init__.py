"""What runs the comparison, in the order of a run: entry, command, sweep, job, tree, rank."""
