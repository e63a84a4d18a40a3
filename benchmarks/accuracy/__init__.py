"""What each block adds to a trained network: ``sweep`` trains, ``python -m benchmarks.accuracy`` writes the report.

``insertion``: into a network that is trained already. ``key_attention``: what the key of a digit scene attends to.
``segments``: what the maps say about classes without training.
"""
