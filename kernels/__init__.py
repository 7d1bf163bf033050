"""gpt2fast.kernels: the ops of GPT-2, dispatched by device.

They know tensors, not GPT-2's configuration, checkpoints or text. Importing this package touches
no device and no Triton.
"""

from gpt2fast.kernels.attention import (
    causal_attention,
    packed_kv,
    prepare_mask,
    weighted_attention,
)
from gpt2fast.kernels.attention_append import attention_append
from gpt2fast.kernels.backend import backend
from gpt2fast.kernels.embedding import embedding, embedding_layer_norm
from gpt2fast.kernels.gelu_mlp import gelu_mlp, linear
from gpt2fast.kernels.layer_norm import add_layer_norm, layer_norm
from gpt2fast.kernels.lm_head import lm_head_loss
from gpt2fast.kernels.lm_head_select import lm_head_argmax, lm_head_topk

__all__ = [
    "add_layer_norm",
    "attention_append",
    "backend",
    "causal_attention",
    "embedding",
    "embedding_layer_norm",
    "gelu_mlp",
    "layer_norm",
    "linear",
    "lm_head_argmax",
    "lm_head_loss",
    "lm_head_topk",
    "packed_kv",
    "prepare_mask",
    "weighted_attention",
]
