"""Checkpoints of every published form into every model, and back.

`pretrained` puts it together; `sources` and `hub` find a checkpoint's files, `weights` reads and
writes them, `names` knows what the published forms call their tensors.
"""

from gpt2fast.checkpoint.pretrained import from_pretrained, save_pretrained
from gpt2fast.checkpoint.weights import CheckpointError

__all__ = ["CheckpointError", "from_pretrained", "save_pretrained"]
