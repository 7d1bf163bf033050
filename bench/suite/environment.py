"""Where and with what a record was made: that of all benchmarks, by the suite's own name."""

from gpt2fast.benchmark.environment import ROOT, commit, environment, gpu_state, now

__all__ = ["ROOT", "commit", "environment", "gpu_state", "now"]
