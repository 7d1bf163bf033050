"""Kernels of the decode engine; each imports Triton, so they are imported at the first step."""
