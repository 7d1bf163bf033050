"""A forward pass's inputs: checked, flattened to ``[B, T]``, with positions and mask derived.

Everything is refused here, before anything is computed and before any cache is touched.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpt2fast import kernels
from gpt2fast.cache import KVCache, is_foreign
from gpt2fast.config import GPT2Config
from gpt2fast.kernels.backend import readable


@dataclass
class ModelInputs:
    """Inputs of the transformer.

    Attributes:
        input_ids: ``[B, T]`` or None, then inputs_embeds is ``[B, T, C]``.
        token_type_ids: ``[B, T]`` or None.
        position_ids: ``[B, T]`` or ``[1, T]``.
        past: None for an empty one.
        mask: as the attention ops take it; None where causality alone decides.
        lead: the leading dimensions that were flattened into B.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor
    past: KVCache | None
    mask: Tensor | None
    lead: tuple[int, ...]

    @property
    def past_length(self) -> int:
        return 0 if self.past is None else self.past.get_seq_length()


def check_range(name: str, values: Tensor, limit: int) -> None:
    """Raise a ValueError unless all of ``values`` are integers in ``[0, limit)``.

    Waits for the device; skipped under ``torch.compile``, in the capture of a CUDA graph, and on
    the meta device.
    """
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{name} must be integers; got {values.dtype}")
    if not values.numel() or not readable(values):
        return
    low, high = torch.stack(torch.aminmax(values)).tolist()  # one wait, not two
    if low < 0 or high >= limit:
        raise ValueError(f"{name} must be in [0, {limit}); got {low if low < 0 else high}")


def prepare_inputs(
    config: GPT2Config,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    past_key_values: Any,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    weights_device: torch.device | None,
) -> ModelInputs:
    """Check and complete the arguments of `GPT2Model.forward`, which documents them.

    Args:
        weights_device: where everything goes; None for where the input is, if no weights are at
            hand to tell (replicas of DataParallel, offloaded ones, positions that are computed).

    Raises:
        ValueError: see there.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds, and not both")
    for name, value in (("input_ids", input_ids), ("inputs_embeds", inputs_embeds)):
        if not isinstance(value, Tensor | None):
            raise ValueError(f"{name} must be a tensor; got {type(value).__name__}")
    if input_ids is not None:
        given, shape = input_ids, input_ids.shape
    else:
        assert inputs_embeds is not None
        given, shape = inputs_embeds, inputs_embeds.shape[:-1]
    device = given.device if weights_device is None else weights_device
    if len(shape) == 0 or 0 in shape:
        raise ValueError(f"the input is empty: got shape {list(shape)}")
    lead, batch, length = tuple(shape[:-1]), shape[:-1].numel(), shape[-1]
    if input_ids is not None:
        check_range("input_ids", input_ids, config.embedding_rows)
        input_ids = input_ids.to(device, torch.long).reshape(-1, length)
    elif inputs_embeds is not None:
        if inputs_embeds.shape[-1] != config.n_embd:
            raise ValueError(
                f"inputs_embeds must be [..., {config.n_embd}]; got {list(inputs_embeds.shape)}"
            )
        inputs_embeds = inputs_embeds.to(device).reshape(-1, length, config.n_embd)

    past = _check_past(past_key_values, batch, config, device)
    past_length = 0 if past is None else past.get_seq_length()
    if token_type_ids is not None:
        if token_type_ids.numel() != batch * length or token_type_ids.shape[-1] != length:
            raise ValueError(
                f"token_type_ids must be {list(shape)}; got {list(token_type_ids.shape)}"
            )
        check_range("token_type_ids", token_type_ids, config.embedding_rows)
        token_type_ids = token_type_ids.to(device, torch.long).reshape(-1, length)
    key_mask, mask = _check_mask(attention_mask, batch, length, past_length, config)
    position_ids = _positions(
        position_ids, key_mask, batch, length, past_length, config.n_positions, device
    )
    if key_mask is not None:
        everything = readable(key_mask) and bool(key_mask.all())
        mask = None if everything else kernels.prepare_mask(key_mask, length, device)
    return ModelInputs(
        input_ids,
        inputs_embeds,
        token_type_ids,
        position_ids,
        past,
        None if mask is None else mask.to(device),
        lead,
    )


def _check_past(past: Any, batch: int, config: GPT2Config, device: torch.device) -> KVCache | None:
    if past is None or (is_foreign(past) and past.get_seq_length() == 0):
        return None
    cache = KVCache.from_past(past)
    expected = [2, batch, config.n_head, cache.get_seq_length(), config.head_size]
    if len(cache) != config.n_layer or list(cache[0].shape) != expected:
        raise ValueError(
            f"the past must be {config.n_layer} layers of {expected}; "
            f"got {len(cache)} of {list(cache[0].shape)}"
        )
    if cache[0].device != device:
        raise ValueError(f"the past must be on {device}, as the model; it is on {cache[0].device}")
    return cache


def _check_mask(
    attention_mask: Tensor | None, batch: int, length: int, past_length: int, config: GPT2Config
) -> tuple[Tensor | None, Tensor | None]:
    """Split what users pass into a boolean ``[B, S]`` of kept keys, or a complete 4-D mask."""
    if attention_mask is None:
        return None, None
    keys = past_length + length
    if attention_mask.dim() == 4:
        rows, heads, queries, columns = attention_mask.shape
        if (
            rows in (1, batch)
            and heads in (1, config.n_head)
            and (queries, columns) == (length, keys)
        ):
            if not (attention_mask.dtype == torch.bool or attention_mask.is_floating_point()):
                raise ValueError(
                    f"a 4-D attention_mask must be boolean or float; got {attention_mask.dtype}"
                )
            return None, attention_mask
    elif attention_mask.numel() == batch * keys and attention_mask.shape[-1] == keys:
        return attention_mask.reshape(batch, keys) != 0, None
    raise ValueError(
        f"attention_mask must be [{batch}, {keys}] (past and new tokens), or 4-D "
        f"[{batch} or 1, {config.n_head} or 1, {length}, {keys}]; got {list(attention_mask.shape)}"
    )


def _positions(
    position_ids: Tensor | None,
    key_mask: Tensor | None,
    batch: int,
    length: int,
    past_length: int,
    limit: int,
    device: torch.device,
) -> Tensor:
    """``[B, T]`` or ``[1, T]``: given, counted over the kept tokens, or counted from the past."""
    if position_ids is not None:
        if position_ids.numel() not in (length, batch * length) or position_ids.shape[-1] != length:
            raise ValueError(
                f"position_ids must be [{batch}, {length}] or [{length}]; "
                f"got {list(position_ids.shape)}"
            )
        check_range("position_ids", position_ids, limit)
        return position_ids.reshape(-1, length).to(device, torch.long)
    needed = past_length + length
    if needed > limit and key_mask is not None and readable(key_mask):
        needed = int(key_mask.sum(-1).max())  # padding takes up no position
    if needed > limit:
        raise ValueError(
            f"the context holds {limit} positions; got {past_length} in the past and "
            f"{length} new ones"
        )
    if key_mask is None:
        return torch.arange(past_length, needed, device=device).unsqueeze(0)
    # Padding sits at position 0, wherever it stands.
    positions = (key_mask.long().cumsum(-1) - 1).masked_fill(~key_mask, 0)
    return positions[:, past_length:].to(device)
