"""What each block costs in multiply-accumulates, memory and time. ``python -m benchmarks.costs`` writes the report."""
