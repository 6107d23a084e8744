"""What the benchmarks share: the models that they merge, measured processes, tables."""
