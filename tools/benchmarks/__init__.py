"""Shared by the benchmarks: models to merge, measured processes, tables."""
