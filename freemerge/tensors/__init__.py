"""Mathematics on tensors, without files: chunks, order statistics, spectra, low rank, rounding, name patterns."""

from freemerge.tensors.patterns import compile_patterns, select

__all__ = ["compile_patterns", "select"]
