"""Decoding, prefill and loading on a CPU, beside other runtimes: contenders, method, tables.

``gpt2fast bench`` runs some of it anywhere; the benchmarks in ``bench/`` build on it.
"""
