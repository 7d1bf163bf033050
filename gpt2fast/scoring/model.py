"""The model as scoring uses it: rows of tokens in, log-probabilities out, and no logits kept."""

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gpt2fast import kernels
from gpt2fast.base import as_config
from gpt2fast.kernels.lm_head import row_chunks
from gpt2fast.kernels.packing import dequantize
from gpt2fast.layers import is_plain
from gpt2fast.model import GPT2LMHeadModel
from gpt2fast.quantized_layers import QuantizedHead

_SAMPLED = 1024  # values of a weight, about, that tell it from another
# What a configuration says about the numbers that no weight does.
_FIELDS = (
    "n_head",
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "bos_token_id",
)
_TRANSFORMERS = ("transformers.models.gpt2.", "transformers.pytorch_utils", "torch.nn.modules.")


class ScoredModel:
    """A language model, seen as a body that gives hidden states and a head.

    Attributes:
        config: of the model: vocab_size, n_positions and bos_token_id are read.
        device: where rows go.
    """

    def __init__(self, model: nn.Module) -> None:
        """``model`` as `load` documents it.

        Raises:
            TypeError: it has no body and head of GPT-2's names.
            ValueError: it would drop out at random, or reads a prompt of its own before the text.
        """
        found = all(hasattr(model, name) for name in ("transformer", "lm_head"))
        if not found or not hasattr(getattr(model, "config", None), "n_positions"):
            raise TypeError(
                f"expected the name of a model or a GPT2LMHeadModel; got {type(model).__name__}"
            )
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError("an adapter that learns a prompt cannot be scored with")
        model = getattr(model, "_orig_mod", model)  # compiled: it would be again for every length
        self._model: Any = _on_our_kernels(model)
        self._whole = _has_own_forward(self._model)
        self.config: Any = self._model.config
        # Of offloaded parameters nothing is left: hooks fetch them, and move what they are given.
        places = (p.device for p in model.parameters() if not p.is_meta)
        self.device = next(places, torch.device("cpu"))

    def check_mode(self) -> None:
        """Raise a ValueError if dropout would make scores random."""
        drops = (module for module in self._model.modules() if isinstance(module, nn.Dropout))
        if any(module.training and module.p > 0 for module in drops):
            raise ValueError("the model is in training mode, with dropout: call model.eval()")

    def fingerprint(self) -> str:
        """A hash of every weight's name, shape, dtype and a sample of its values, and `_FIELDS`."""
        digest = hashlib.sha256()
        digest.update(repr([getattr(self.config, name, None) for name in _FIELDS]).encode())
        for name, tensor in self._model.state_dict().items():
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
            values = tensor.detach().flatten()
            step = max(1, len(values) // _SAMPLED)
            sample = values[::step].contiguous().view(torch.uint8)
            digest.update(sample.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def log_probs(self, rows: Sequence[Tensor], firsts: Sequence[int]) -> Tensor:
        """log p(token | those before it in its row), in nats.

        Does not wait for a GPU's last kernels.

        Args:
            rows: int64 ``[n]`` each, on the CPU, at least two tokens.
            firsts: for each row the first token that is wanted, at least 1.

        Returns:
            float32, on the model's device: of each row those of its tokens from the wanted one to
            the last, one row after the other.
        """
        # Rows are padded on the right, where causal attention never looks: no mask is needed.
        ids = pad_sequence([row[:-1] for row in rows], batch_first=True)
        width = ids.shape[1]
        counts = [len(row) - first for row, first in zip(rows, firsts, strict=True)]
        if not isinstance(self._model, GPT2LMHeadModel):
            ids = ids.to(self.device)  # ours checks them where they are, and then moves them
        part, name = self._model.transformer, "last_hidden_state"
        if self._whole:
            part, name = self._model, "logits"
        output = part(input_ids=ids, use_cache=False)
        hidden = (output[0] if isinstance(output, tuple) else getattr(output, name)).flatten(0, 1)
        if sum(counts) < len(hidden):
            starts = [i * width + first - 1 for i, first in enumerate(firsts)]
            spans = [torch.arange(s, s + n) for s, n in zip(starts, counts, strict=True)]
            hidden = hidden[torch.cat(spans).to(hidden.device)]
        targets = torch.cat([row[first:] for row, first in zip(rows, firsts, strict=True)])
        # Rounding can leave a loss just below 0; 0 - 0 is no negative zero.
        return 0 - self._losses(hidden, targets.to(hidden.device)).clamp_min(0)

    def _losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy ``[N]`` of hidden ``[N, C]``, or of logits ``[N, V]``, in float32."""
        head = nn.Identity() if self._whole else self._model.lm_head
        weight: Tensor | None = None
        if is_plain(head, nn.Linear) and head.bias is None:
            weight = head.weight
        elif is_plain(head, QuantizedHead) and hidden.is_cuda:
            # What the head would do for every chunk of rows; a CPU multiplies the low bits.
            weight = dequantize(head.weight, head.scale, head.bits).to(hidden.dtype)
        if weight is not None:
            return kernels.lm_head_loss(hidden, weight, targets, reduction="none")
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        for rows in row_chunks(len(hidden), self.config.vocab_size):
            logits = head(hidden[rows]).float()
            losses[rows] = F.cross_entropy(logits, targets[rows], reduction="none")
        return losses


def _has_own_forward(model: nn.Module) -> bool:
    """Whether a model's logits may be others than its head's on its body's hidden states.

    So they may where its forward pass is hooked, or that of a class of the user's own.
    """
    wrapped = (module for module in model.modules() if "lm_head" in module._modules)
    for module in (model, *wrapped):
        kind = type(module)
        source = next(base.__module__ for base in kind.__mro__ if "forward" in vars(base))
        known = source.startswith(("gpt2fast.", "transformers.", "peft."))
        if not known or not is_plain(module, kind):
            return True
    return False


def load(
    model: str | os.PathLike[str] | nn.Module,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    quantize: str | None,
) -> ScoredModel:
    """The model to score with.

    Args:
        model: as `from_pretrained` takes it; or a `GPT2LMHeadModel`, this package's or one of
            transformers. The latter's weights are used where they are, by this package's forward
            pass; by its own where something in it was hooked or replaced, as by adapters.
        dtype, device, quantize: for a model by its name; the device is by default the first GPU,
            or the CPU.

    Raises:
        ValueError: one of these for a model that is loaded already.
        (others): as `from_pretrained`, and as `ScoredModel`.
    """
    if isinstance(model, nn.Module):
        options = {"dtype": dtype, "device": device, "quantize": quantize}
        given = [f"{name}={value!r}" for name, value in options.items() if value is not None]
        if given:
            raise ValueError(f"{', '.join(given)}: only for a model that is given by its name")
        return ScoredModel(model)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = GPT2LMHeadModel.from_pretrained(model, dtype=dtype, device=device, quantize=quantize)
    return ScoredModel(loaded)


def _on_our_kernels(model: nn.Module) -> nn.Module:
    """A plain model of transformers as one of ours on the same memory; any other as it is."""
    kind = type(model)
    if not (kind.__module__.startswith(_TRANSFORMERS[0]) and kind.__name__ == "GPT2LMHeadModel"):
        return model
    for module in model.modules():
        known = type(module).__module__.startswith((*_TRANSFORMERS, "transformers.activations"))
        if not known or not is_plain(module, type(module)) or module.training:
            return model
    tensors = model.state_dict()
    if len({(t.dtype, t.device) for t in tensors.values()}) != 1:
        return model
    try:
        config = as_config(model.config)
    except ValueError:  # an option that this package does not have
        return model
    with torch.device("meta"):
        ours = GPT2LMHeadModel(config)
    if ours.state_dict().keys() != tensors.keys():
        return model
    ours.load_state_dict(tensors, assign=True)
    return ours.eval().requires_grad_(False)
