"""Looking at EM attention: maps, stages, pictures and the explorer."""
