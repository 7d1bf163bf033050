"""The Triton kernels and their launchers. Imported at the first launch, never before."""
