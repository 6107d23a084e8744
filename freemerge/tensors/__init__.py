"""Maths on tensors, without files: chunks, order statistics, spectra, low rank, rounding, name patterns."""
