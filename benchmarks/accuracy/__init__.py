"""What each block adds to a trained network: ``sweep`` trains, ``python -m benchmarks.accuracy`` writes the report."""
