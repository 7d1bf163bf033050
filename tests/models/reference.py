"""Pairs of models with the same random weights: transformers' in float64, and ours."""

from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import gpt2fast
from tests.tolerances import assert_close

VOCAB, CONTEXT, WIDTH, LAYERS, HEADS = 97, 40, 48, 3, 4
KINDS = ("GPT2Model", "GPT2LMHeadModel", "GPT2DoubleHeadsModel")


def sizes(**overrides: Any) -> dict[str, Any]:
    """Fields of a tiny configuration."""
    small = {
        "vocab_size": VOCAB,
        "n_positions": CONTEXT,
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return {**small, **overrides}


@torch.no_grad()
def randomize(model: nn.Module, std: float = 0.1) -> None:
    """Weights of a trained GPT-2's scale: no bias is zero, no LayerNorm weight is one."""
    for name, parameter in model.named_parameters():
        if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
            parameter.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.1)
        else:
            parameter.normal_(0, 0.02 if "wpe" in name else std)


def ours_from(reference: nn.Module, **overrides: Any) -> Any:
    """Our model of the same class name, configuration and weights, in float32, in eval mode."""
    config = gpt2fast.GPT2Config.from_dict({**reference.config.to_dict(), **overrides})
    model = getattr(gpt2fast, type(reference).__name__)(config)
    model.load_state_dict({k: v.float() for k, v in reference.state_dict().items()})
    return model.eval()


def pair(
    kind: str = "GPT2LMHeadModel", attention: str = "sdpa", std: float = 0.1, **overrides: Any
) -> tuple[Any, Any]:
    """(ours in float32, transformers' in float64), in eval mode."""
    config = transformers.GPT2Config(**sizes(**overrides), attn_implementation=attention)
    reference = getattr(transformers, kind)(config).eval()
    randomize(reference, std)
    ours = ours_from(reference)
    for module in reference.modules():
        if hasattr(module, "reorder_and_upcast_attn"):
            module.reorder_and_upcast_attn = False  # to float32: from float64 it is down
    return ours, reference.double()


def tokens(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape)


def assert_forward(ours: Tensor, reference: Tensor, keep: Tensor | None = None) -> None:
    """Equal to 1e-5 of the largest value; ``keep`` picks the positions that count."""
    if keep is not None:
        ours, reference = ours[keep], reference[keep]
    assert_close("model", "forward", ours, reference)


def assert_gradients(ours: nn.Module, reference: nn.Module, but: Iterable[str] = ()) -> None:
    """Every parameter's gradient equal to 1e-5 of its largest value, and none missing."""
    wanted = {n: p.grad for n, p in reference.named_parameters()}
    got = {n: p.grad for n, p in ours.named_parameters()}
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        if name in but:
            continue
        if gradient is None:
            assert got[name] is None, name
            continue
        assert got[name] is not None, name
        assert_close("model", "backward", got[name], gradient)


def positions_under(mask: Tensor) -> Tensor:
    """What transformers has to be told: positions counted over the kept tokens."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def padding(kind: str, batch: int, length: int) -> Tensor:
    """An int64 mask ``[batch, length]`` whose first row is full and whose others are padded."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        if kind == "left":
            mask[row, : 2 * row] = 0
        elif kind == "right":
            mask[row, length - 2 * row :] = 0
        elif kind == "inner":
            mask[row, 2 + row] = 0
    return mask
