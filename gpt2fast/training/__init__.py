"""Training GPT-2 from scratch or from a checkpoint: ``gpt2fast train``.

``add_arguments`` and ``run`` are what the command line needs; torch is loaded by ``run`` only.
"""

from gpt2fast.training.command import add_arguments, run

__all__ = ["add_arguments", "run"]
