"""Selection of the next tokens and their commit to the state, in torch.

The kernels do the same on the device; this is what they are checked against, and what a runner
calls that evaluates the model with PyTorch's operators. The functions are those of
`gpt2fast.generation.sampling`, so a seed gives the same tokens here as there.

A slot with d drafts brings d + 1 rows of logits. The token chosen in row j counts if all drafts
before it are what the rows before it chose, so what comes out is what decoding one token at a
time with the same random numbers gives: drafts are proposed without chance, so this is rejection
sampling too (Leviathan et al. 2023, arXiv:2211.17192): a draft x is kept with probability p(x), and
otherwise the token is drawn from what is left of p.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpt2fast.generation.sampling import sample, warp
from gpt2fast.kernels.decode_state import BROKEN, EOS, LIMIT, RUNNING, DecodeState


def select_and_commit(
    state: DecodeState, slots: Sequence[int], drafts: int, logits: Tensor
) -> None:
    """Choose a token for every row and commit those that count.

    Of slots that are RUNNING: writes ``tokens``, ``lengths``, ``seen`` and ``status``, and
    ``log_probs`` where ``scored`` asks for them. Others are left alone. Waits for the device.

    Args:
        slots: different slots.
        drafts: how many drafts stand behind each slot's newest token.
        logits: ``[len(slots) * (drafts + 1), V]`` float32, grouped by slot: of the newest token,
            then of each draft. Never changed.
    """
    status = state.status.tolist()
    running = [i for i, slot in enumerate(slots) if status[slot] == RUNNING]
    if not running:
        return
    rows = drafts + 1
    if len(running) < len(slots):
        slots = [slots[i] for i in running]
        logits = logits.unflatten(0, (-1, rows))[running].flatten(0, 1)
    lengths, limits = state.lengths.tolist(), state.limits.tolist()
    eos = state.eos.tolist()
    proposed = [
        state.tokens[slot, lengths[slot] + 1 : lengths[slot] + rows].tolist() if drafts else []
        for slot in slots
    ]
    scores = _processed(state, slots, rows, logits, lengths, eos, proposed)
    chosen, finite = _chosen(state, slots, rows, scores, lengths)

    tokens, seen = _writable(state.tokens), _writable(state.seen)
    written_lengths, written_status = _writable(state.lengths), _writable(state.status)
    accepted: list[tuple[int, int, int, int]] = []  # slot, position, token, row
    for i, slot in enumerate(slots):
        position = lengths[slot]
        for j in range(rows):
            row = i * rows + j
            if not finite[row]:
                written_status[slot] = BROKEN
                break
            token = chosen[row]
            position += 1
            accepted.append((slot, position, token, row))
            tokens[slot, position] = token
            seen[slot, token] = 1
            if token in eos[slot]:
                written_status[slot] = EOS
                break
            if position + 1 >= limits[slot]:
                written_status[slot] = LIMIT
                break
            if j < drafts and token != proposed[i][j]:
                break
        written_lengths[slot] = position
    scored = state.scored.tolist()
    accepted = [entry for entry in accepted if scored[entry[0]]]
    if accepted:
        at, positions, ids, read = torch.tensor(accepted, device=logits.device).unbind(1)
        log_probs = logits[read].log_softmax(-1).gather(1, ids[:, None]).squeeze(1)
        state.log_probs.index_put_((at, positions), log_probs)


def _writable(tensor: Tensor) -> Any:
    """A view to write single elements through: in numpy, where it can be, that takes a tenth of the
    time."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def _processed(
    state: DecodeState,
    slots: Sequence[int],
    rows: int,
    logits: Tensor,
    lengths: list[int],
    eos: list[list[int]],
    proposed: list[list[int]],
) -> Tensor:
    """Scores after the repetition penalty and the least length; ``logits`` itself without them."""
    scores = logits
    penalties = state.penalty.tolist()
    if any(penalties[slot] != 1 for slot in slots):
        index = torch.tensor(slots, device=logits.device)
        seen = state.seen[index].bool().repeat_interleave(rows, 0)
        for i, drafts in enumerate(proposed):
            for j, token in enumerate(drafts):
                seen[i * rows + j + 1 : (i + 1) * rows, token] = True
        penalty = state.penalty[index].repeat_interleave(rows)[:, None]
        penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(seen, penalized, scores)
    least = state.least.tolist()
    if any(lengths[slot] + 1 < least[slot] for slot in slots):
        scores = scores.clone() if scores is logits else scores
        for i, slot in enumerate(slots):
            early = min(rows, least[slot] - lengths[slot] - 1)
            ends = [token for token in eos[slot] if token >= 0]
            if early > 0 and ends:
                scores[i * rows : i * rows + early, ends] = -torch.inf
    return scores


def _chosen(
    state: DecodeState, slots: Sequence[int], rows: int, scores: Tensor, lengths: list[int]
) -> tuple[list[int], list[bool]]:
    """The token of every row, and whether the row has a finite best score to choose by."""
    temperature = state.temperature.tolist()
    if all(temperature[slot] == 0 for slot in slots):
        return _best(scores)
    settings = (state.top_k.tolist(), state.top_p.tolist(), state.min_p.tolist())
    groups: dict[tuple[float, ...], list[int]] = {}
    for i, slot in enumerate(slots):
        key = (temperature[slot], *(values[slot] for values in settings))
        groups.setdefault(key if key[0] else (0.0,), []).append(i)
    chosen, finite = [0] * len(scores), [False] * len(scores)
    for key, members in groups.items():
        index = [i * rows + j for i in members for j in range(rows)]
        part = scores if len(index) == len(scores) else scores[index]
        if key[0] == 0:
            tokens, ends = _best(part)
        else:
            part = warp(part, key[0], int(key[1]), key[2], key[3])
            ends = part.amax(-1).isfinite().tolist()
            uniform = [
                state.uniforms[slots[i], lengths[slots[i]] + 1 : lengths[slots[i]] + 1 + rows]
                for i in members
            ]
            tokens = sample(part, torch.cat(uniform)).tolist()
        for row, token, end in zip(index, tokens, ends, strict=True):
            chosen[row], finite[row] = token, end
    return chosen, finite


def _best(scores: Tensor) -> tuple[list[int], list[bool]]:
    """The first of the largest scores of each row, and whether it is finite; NaN is largest."""
    if scores.device.type != "cpu":
        best, tokens = scores.max(-1)
        return tokens.tolist(), best.isfinite().tolist()
    # numpy's argmax takes a few microseconds for a vocabulary, where torch's takes a hundred.
    values = scores.numpy()
    best_at = values.argmax(-1).tolist()
    return best_at, [math.isfinite(values[row, token]) for row, token in enumerate(best_at)]
