"""How far a result may lie from its float64 oracle, and the one function that asserts it.

An error is ``max |ours - oracle| / max |oracle|``: relative to the largest value of the tensor that
is compared, because a sum of many terms is only as exact as its largest ones.

- float32: the bounds of `FLOAT32`, a small multiple of what rounding alone explains. They are for
  sums of up to a few thousand terms; for longer ones (models' real sizes) `BUDGET` times the error
  of plain PyTorch where that is more.
- float16 and bfloat16: at most `BUDGET` times the error that plain PyTorch makes in the same dtype
  on the same inputs, plus half a unit in the last place for the store.

Nothing in the environment loosens them.
"""

import torch
from torch import Tensor

BUDGET = 2.0

# The spread of an int8 product's error, against that of activations rounded to the nearest level
# (a uniform error of a step): 1 but for chance. Sums that saturate make it several times that.
INT8_SPREAD = 1.25

# (op, direction): bound in float32, where one rounding is 6e-8.
FLOAT32 = {
    # Two reductions over a row of at most a few thousand, then two multiplications.
    ("layer_norm", "forward"): 1e-6,
    # dweight and dbias add up all rows in float32.
    ("layer_norm", "backward"): 2e-6,
    # Rows around 1000 with a spread of 1: the input itself is only given to 6e-5 of the spread,
    # and the mean is rounded likewise.
    ("layer_norm_large_mean", "forward"): 2e-4,
    ("layer_norm_large_mean", "backward"): 5e-4,
    ("embedding", "forward"): 2e-7,  # two additions
    ("embedding", "backward"): 1e-6,  # a repeated id adds up its gradients
    # Inner products of up to a few thousand terms.
    ("linear", "forward"): 2e-6,
    ("linear", "backward"): 2e-6,
    ("gelu_mlp", "forward"): 2e-6,
    ("gelu_mlp", "backward"): 5e-6,
    # exp() magnifies the rounding of scores of size 10 tenfold.
    ("attention", "forward"): 3e-6,
    ("attention", "backward"): 1e-5,
    ("lm_head_loss", "forward"): 1e-6,
    ("lm_head_loss", "backward"): 5e-6,
    # One inner product, accumulated in float32 and not rounded, in 16 bits too; tensor cores cut
    # what they add off instead of rounding it, which is seen in sums of 1600.
    ("lm_head_topk", "forward"): 8e-6,
    # A phase of a decoding step: LayerNorm, an inner product, GELU. Its weights' scales are applied
    # to the sum or to each weight, in float32.
    ("decode_phase", "forward"): 4e-6,
    # A whole model against the reference, both in float32: either may be off, so no tighter than
    # what the project promises.
    ("model", "forward"): 1e-5,
    ("model", "backward"): 1e-5,
}


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """``max |actual - oracle| / max |oracle|`` in float64; infinite where either is not finite."""
    assert actual.shape == oracle.shape, (tuple(actual.shape), tuple(oracle.shape))
    if not actual.numel():
        return 0.0
    actual, oracle = actual.detach().double(), oracle.detach().double()
    if not (torch.isfinite(actual).all() and torch.isfinite(oracle).all()):
        return float("inf")
    largest = oracle.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((actual - oracle).abs().max() / largest)


def assert_close(
    op: str,
    direction: str,
    actual: Tensor,
    oracle: Tensor,
    plain: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Assert the rule above.

    ``plain`` is plain PyTorch's result, for the 16-bit dtypes and long sums; ``dtype`` the one that
    was computed in, where it is not the result's (a loss is float32 in any case).
    """
    error, dtype = relative_error(actual, oracle), dtype or actual.dtype
    if dtype in (torch.float32, torch.float64):
        bound = FLOAT32[op, direction]
        if plain is not None:
            bound = max(bound, BUDGET * relative_error(plain, oracle))
    else:
        assert plain is not None
        assert plain.dtype == actual.dtype, (plain.dtype, actual.dtype)
        bound = BUDGET * relative_error(plain, oracle) + torch.finfo(dtype).eps / 2
    assert error <= bound, f"{op} {direction} {dtype}: error {error:.2e} > {bound:.2e}"
