"""Prompts of any form to one left-padded batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpt2fast.config import GPT2Config
from gpt2fast.inputs import check_range


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts on the model's device.

    Attributes:
        ids: ``[B, T]``, int64.
        mask: ``[B, T]`` boolean, the tokens that count; None where all do.
        lengths: how many tokens count, for each row.
    """

    ids: Tensor
    mask: Tensor | None
    lengths: list[int]

    @property
    def leading(self) -> Tensor | None:
        """``[B]``, the padding in front of each row; None where there is none."""
        return None if self.mask is None else self.mask.int().argmax(dim=1)


def prepare_prompts(
    input_ids: Any,
    attention_mask: Tensor | None,
    config: GPT2Config,
    device: torch.device,
    pad: int,
    infer_mask: bool,
) -> Prompts:
    """Check prompts and lay them out as one batch, padded on the left.

    Args:
        input_ids: ``[B, T]`` or ``[T]`` integers, or a list of prompts of any lengths, each a list
            or a tensor of ids; None for the beginning-of-text token alone.
        attention_mask: the shape of a rectangular ``input_ids``, 0 where there is padding.
        pad: the token that fills rows up.
        infer_mask: whether ``pad`` in a tensor without a mask is padding.

    Raises:
        ValueError: no token, ids out of range, a mask of another shape, a row without a token, or
            padding at the end of a row.
    """
    if input_ids is None:
        _check_begin(config)
        input_ids = [[config.bos_token_id]]
    mask: Tensor | None = None
    if isinstance(input_ids, Tensor):
        ids = input_ids.unsqueeze(0) if input_ids.dim() == 1 else input_ids
    else:
        rows = _rows(input_ids)
        width = max(map(len, rows))
        if any(len(row) < width for row in rows):
            if attention_mask is not None:
                raise ValueError(
                    "attention_mask goes with prompts of one length; "
                    f"got lengths {[len(row) for row in rows]}"
                )
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]).bool()
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    if ids.dim() != 2 or not ids.numel():
        raise ValueError(
            f"input_ids must be [batch, time] with at least one token; got {list(ids.shape)}"
        )
    check_range("input_ids", ids, config.vocab_size)
    ids = ids.to(device, torch.int64)
    if attention_mask is not None:
        shapes = (ids.shape, ids.shape[1:]) if len(ids) == 1 else (ids.shape,)
        if attention_mask.shape not in shapes:
            raise ValueError(
                f"attention_mask must be {list(ids.shape)}, as input_ids; "
                f"got {list(attention_mask.shape)}"
            )
        mask = attention_mask.reshape(ids.shape) != 0
    elif mask is None and infer_mask:
        mask = ids != pad
    if mask is None or mask.all():
        return Prompts(ids, None, [ids.shape[1]] * len(ids))
    lengths = mask.sum(1).tolist()
    last = mask[:, -1].tolist()
    for i, length in enumerate(lengths):
        if not length:
            raise ValueError(f"attention_mask keeps no token of row {i}")
        if not last[i]:
            raise ValueError(f"pad on the left: the last token of row {i} is masked out")
    return Prompts(ids, mask.to(device), lengths)


def _check_begin(config: GPT2Config) -> None:
    begin = config.bos_token_id
    if begin is None or not 0 <= begin < config.vocab_size:
        raise ValueError(
            f"without input_ids the prompt is config.bos_token_id, which must be in "
            f"[0, {config.vocab_size}); got {begin}"
        )


def _rows(prompts: Any) -> list[list[int]]:
    """Lists of ids from a list of ids, or from a list of prompts."""
    if not isinstance(prompts, Sequence) or isinstance(prompts, str):
        raise ValueError(
            f"input_ids must be a tensor or a list of token ids; got {type(prompts).__name__}"
        )
    if prompts and isinstance(prompts[0], int):
        prompts = [prompts]
    rows = []
    for i, prompt in enumerate(prompts):
        row = prompt.tolist() if isinstance(prompt, Tensor) else prompt
        if not isinstance(row, Sequence) or not all(isinstance(token, int) for token in row):
            raise ValueError(f"prompt {i} must be a flat list of token ids")
        if not row:
            raise ValueError(f"prompt {i} is empty")
        rows.append(list(row))
    if not rows:
        raise ValueError("input_ids holds no prompt")
    return rows
