"""Whether the persistent kernel gives what the kernels by phases give, tried out on the device."""

import torch
from torch import Tensor

from gpt2fast.engine.float8 import FLOAT8
from gpt2fast.engine.runner import OutOfMemory, first_line, is_out_of_memory
from gpt2fast.kernels import decode_step
from gpt2fast.kernels.decode_state import DecodeState
from gpt2fast.kernels.decode_step import StepBuffers
from gpt2fast.kernels.packing import DecodeWeights

# How far the two drivers' hidden states may lie apart, of the largest, as they add up in other
# orders; by the cache's dtype: of float8 that may turn a last bit, which is an eighth of a value.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2, FLOAT8: 1e-1}


def disagreement(
    weights: DecodeWeights,
    trial: DecodeState,
    cache: Tensor,
    buffers: StepBuffers,
    persistent: StepBuffers,
    *,
    greedy: bool,
    drafts: int,
    ngram: int,
    pdl: bool,
) -> str | None:
    """Do a step by phases, and the same by the kernel that is to be trusted.

    Args:
        trial: a copy of the state, which the step changes.
        buffers, persistent: of the same rows, for either driver.

    Returns:
        why the kernel is not to be used, or None.

    Raises:
        OutOfMemory: there is no memory to try it.
    """
    try:
        if drafts and ngram:
            decode_step.propose(trial, buffers, drafts, ngram, pdl)
        decode_step.evaluate(weights, trial, cache, buffers, greedy=greedy, pdl=pdl)
        references = _outcome(buffers, greedy)
        decode_step.decode_persistent(
            weights, trial, cache, persistent, 1, greedy=greedy, drafts=drafts, ngram=ngram
        )
        errors = [
            float((ours - reference).abs().max() / reference.abs().max().clamp_min(1e-30))
            for ours, reference in zip(_outcome(persistent, greedy), references, strict=True)
        ]
    except Exception as failure:  # whatever compiler, driver or launch have to say
        reason = first_line(failure)
        if is_out_of_memory(failure):
            raise OutOfMemory(reason) from None
        return reason
    # Each by itself: the largest of several is not NaN wherever one of them is.
    wrong = [error for error in errors if not error <= _TOLERANCE[cache.dtype]]
    return f"it is off by {wrong[0]:.1e}" if wrong else None


def _outcome(buffers: StepBuffers, greedy: bool) -> tuple[Tensor, Tensor]:
    """What a step leaves of its rows, as copies: hidden states, and the largest logits."""
    used = buffers.slots >= 0
    logits = buffers.best_value if greedy else buffers.logits
    return buffers.residual[used], logits.amax(1)[used]
