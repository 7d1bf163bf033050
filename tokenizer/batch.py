"""What a tokenizer returns for a batch: padding, truncation and tensors."""

from collections.abc import Mapping
from typing import Any

PADDED = ("input_ids", "attention_mask", "offset_mapping")


class BatchEncoding(dict[str, Any]):
    """``input_ids``, ``attention_mask`` and, where asked for, ``offset_mapping``.

    The items are attributes as well, and ``model(**encoding)`` works.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r} here, only {', '.join(self)}") from None

    def to(self, device: Any, *, non_blocking: bool = False) -> "BatchEncoding":
        """Move the tensors to ``device``; returns this object."""
        for name, value in self.items():
            if hasattr(value, "to"):
                self[name] = value.to(device, non_blocking=non_blocking)
        return self


def check_side(name: str, side: str) -> str:
    """``side`` if it is "left" or "right"; else a ValueError."""
    if side not in ("left", "right"):
        raise ValueError(f"{name} must be 'left' or 'right', found {side!r}")
    return side


def truncate(values: list[Any], max_length: int, side: str) -> list[Any]:
    """The first ``max_length`` of ``values``, or the last where ``side`` is ``"left"``."""
    if len(values) <= max_length:
        return values
    return values[len(values) - max_length :] if side == "left" else values[:max_length]


def pad_rows(
    rows: Mapping[str, list[Any]],
    pad_id: int,
    length: int,
    side: str,
) -> dict[str, list[Any]]:
    """Fill each row up to ``length``: ids with ``pad_id``, masks with 0, offsets with (0, 0).

    Rows that are longer stay as they are.
    """
    fill = dict(zip(PADDED, (pad_id, 0, (0, 0)), strict=True))
    padded: dict[str, list[Any]] = {}
    for name, values in rows.items():
        if name not in fill:
            padded[name] = list(values)
            continue
        padded[name] = []
        for row in values:
            padding = [fill[name]] * (length - len(row))
            row = [tuple(item) for item in row] if name == "offset_mapping" else list(row)
            padded[name].append(padding + row if side == "left" else row + padding)
    return padded


def to_tensors(values: dict[str, Any], kind: str | None) -> BatchEncoding:
    """``values`` as torch tensors (``"pt"``), numpy arrays (``"np"``) or lists (None), of int64.

    Raises:
        ValueError: rows of different lengths, or another ``kind``.
    """
    if kind not in (None, "pt", "np"):
        raise ValueError(f"return_tensors must be 'pt', 'np' or None, found {kind!r}")
    if kind is None:
        return BatchEncoding(values)
    lengths = sorted({len(row) for row in values["input_ids"]})
    if len(lengths) > 1:
        raise ValueError(
            f"rows of {lengths[0]} to {lengths[-1]} tokens make no tensor; "
            "pass padding=True, or truncation=True with a max_length"
        )
    if kind == "np":
        import numpy as np

        return BatchEncoding({name: np.array(v, dtype=np.int64) for name, v in values.items()})
    import torch

    return BatchEncoding({name: torch.tensor(v, dtype=torch.long) for name, v in values.items()})
