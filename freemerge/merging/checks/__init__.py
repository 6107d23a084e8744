"""Requirements on the inputs of a merge."""
