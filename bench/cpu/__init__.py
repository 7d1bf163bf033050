"""Decoding, prefill and loading on a CPU, beside the peers: what the three benchmarks share."""
