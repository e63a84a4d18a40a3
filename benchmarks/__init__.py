"""EMAUnit beside the blocks one would use instead; README.md says how each number is taken."""
