"""What each block adds to a trained network: ``sweep`` trains, ``python -m benchmarks.accuracy`` writes the report.

``segments``: what the maps say about classes without training.
"""
