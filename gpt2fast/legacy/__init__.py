"""GPT-2 as pytorch-pretrained-BERT had it: a thin face over the models of this package.

What differs from `gpt2fast.GPT2Model` and its siblings, for code written in 2019:

* the positional order of arguments, plain tuples, ``past`` and lists of presents;
* labels (``lm_labels``, ignored where -1) give the bare loss, or the list of both losses;
* special tokens get rows of their own behind the vocabulary's (``n_special``);
* `from_pretrained` leaves the model in training mode, in float32;
* modules and state dicts carry the old names (``lm_head.decoder``, ``multiple_choice_head.linear``,
  the mask as ``h.N.attn.bias``), and load every other published form.

Masked attention scores are minus infinity here and were -1e4 there: after the softmax both are
exactly 0. A missing checkpoint raises here and gave None there.
"""

from gpt2fast.legacy.base import GPT2Model
from gpt2fast.legacy.config import GPT2Config
from gpt2fast.legacy.heads import GPT2DoubleHeadsModel, GPT2LMHeadModel
from gpt2fast.tokenizer import LegacyGPT2Tokenizer as GPT2Tokenizer

__all__ = [
    "GPT2Config",
    "GPT2DoubleHeadsModel",
    "GPT2LMHeadModel",
    "GPT2Model",
    "GPT2Tokenizer",
]
