"""Choosing the next tokens on the device and committing them, as phases of a decoding step.

What is chosen and what is kept is defined by `gpt2fast.engine.sampling.select_and_commit`.

A step's rows are those of `gpt2fast.kernels.decode_step`, grouped by slot: its newest token, then
its drafts. `select_best` and `select` choose a token for each row, `commit` keeps those that count
(between the two stands a barrier), and `propose` looks for the next drafts. Rows without a slot,
and slots that are not RUNNING, are left alone.
"""

import triton
import triton.language as tl

from gpt2fast.kernels._triton.common import LOG2_E
from gpt2fast.kernels._triton.engine import configs
from gpt2fast.kernels._triton.engine.barrier import allow_next, wait_for_previous
from gpt2fast.kernels._triton.engine.ranking import (
    INF_ORDER,
    LARGEST_INDEX,
    MINUS_INF_ORDER,
    draw,
    find_limit,
    largest,
    log_sum,
    score_of,
)
from gpt2fast.kernels._triton.target import current_target
from gpt2fast.kernels.decode_state import BROKEN, EOS, LIMIT, MAX_EOS, RUNNING, DecodeState
from gpt2fast.kernels.decode_step import StepBuffers

_RUNNING, _MAX_EOS = tl.constexpr(RUNNING), tl.constexpr(MAX_EOS)
_EOS, _LIMIT, _BROKEN = tl.constexpr(EOS), tl.constexpr(LIMIT), tl.constexpr(BROKEN)
_ENDS = tl.constexpr(1 << 24)  # more than a capacity has; above it, matched tokens are counted
_LARGEST_RATE = tl.constexpr(3.0e38)


@triton.jit
def _runs(slot, status_ptr):
    """Whether a row or group has a slot, and this one is RUNNING."""
    status = tl.load(status_ptr + tl.maximum(slot, 0))
    return (slot >= 0) & (status == _RUNNING)


@triton.jit
def select_best(
    program, programs,
    best_value_ptr, best_index_ptr, best_sum_ptr, slots_ptr, status_ptr, chosen_ptr, log_probs_ptr,
    rows, SHARES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Choose the largest logit of each row from what the head left of its SHARES; M = ``rows``.

    best_value, best_index, best_sum as in `StepBuffers`. Writes chosen int64 ``[M]``, -1 where
    there is no finite maximum, and log_probs float32 ``[M]``. BLOCK >= SHARES.
    """
    offs = tl.arange(0, BLOCK)
    mask = offs < SHARES
    for row in range(program, rows, programs):
        if _runs(tl.load(slots_ptr + row), status_ptr):
            share = row * SHARES + offs
            value = tl.load(best_value_ptr + share, mask=mask, other=-float("inf"))
            index = tl.load(best_index_ptr + share, mask=mask, other=0)
            total = tl.load(best_sum_ptr + share, mask=mask, other=0.0)
            top = tl.max(value, 0)
            shift = tl.where(tl.abs(top) < float("inf"), top, 0.0)
            total = tl.sum(total * tl.exp2((value - shift) * LOG2_E), 0)  # NaN if a logit is
            first = tl.min(tl.where(value == top, index, LARGEST_INDEX), 0)
            sound = (tl.abs(top) < float("inf")) & (total < float("inf"))
            tl.store(chosen_ptr + row, tl.where(sound, first, -1).to(tl.int64))
            tl.store(log_probs_ptr + row, -tl.log(total))


@triton.jit
def _process(
    logits_ptr, scores_ptr, seen_ptr, penalty, newest_ptr, drafts, eos_ptr, forbidden,
    V, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scores of a row behind repetition penalty and least length.

    Seen are the slot's tokens, and the drafts behind its newest one that stand before the row's.
    """
    for start in range(0, V, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < V
        scores = tl.load(logits_ptr + offs, mask=mask, other=0.0)
        seen = tl.load(seen_ptr + offs, mask=mask, other=0) != 0
        for draft in range(drafts):
            seen = seen | (offs == tl.load(newest_ptr + 1 + draft))
        penalized = tl.where(scores < 0.0, scores * penalty, scores / penalty)
        scores = tl.where(seen, penalized, scores)
        if forbidden:
            for i in range(_MAX_EOS):
                scores = tl.where(offs == tl.load(eos_ptr + i), -float("inf"), scores)
        tl.store(scores_ptr + offs, scores, mask=mask)
    tl.debug_barrier()


@triton.jit
def select(
    program, programs,
    logits_ptr, slots_ptr, offsets_ptr, chosen_ptr, log_probs_ptr, scores_ptr, candidates_ptr,
    tokens_ptr, lengths_ptr, least_ptr, eos_ptr, status_ptr, temperature_ptr, top_k_ptr, top_p_ptr,
    min_p_ptr, penalty_ptr, uniforms_ptr, seen_ptr, scored_ptr,
    capacity, V,
    rows, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Choose a token for each of M = ``rows`` rows as its slot's settings say, a row a program.

    logits float32 ``[M, V]``, which are not changed; scores, as large, and candidates int64
    ``[M, CANDIDATES]`` for the time of the call. Writes chosen int64 ``[M]``, -1 where there is no
    finite best score, and of slots that are scored log_probs float32 ``[M]``. Rows behind the
    capacity are skipped.
    """
    for row in range(program, rows, programs):
        slot = tl.load(slots_ptr + row).to(tl.int64)
        drafts = tl.load(offsets_ptr + row)
        position = tl.load(lengths_ptr + tl.maximum(slot, 0)) + drafts
        if _runs(slot, status_ptr) & (position < capacity):
            at = slot * (capacity + 1) + position + 1  # of the token that is chosen
            logits_row = logits_ptr + tl.cast(row, tl.int64) * V
            source = logits_row
            penalty = tl.load(penalty_ptr + slot)
            forbidden = position + 1 < tl.load(least_ptr + slot)
            if (penalty != 1.0) | forbidden:
                source = scores_ptr + tl.cast(row, tl.int64) * V
                _process(
                    logits_row, source, seen_ptr + slot * V, penalty,
                    tokens_ptr + at - 1 - drafts, drafts, eos_ptr + slot * _MAX_EOS, forbidden,
                    V, BLOCK,
                )  # fmt: skip
            lanes, tiles = largest(source, V, BLOCK)
            top = tl.max(lanes, 0)
            token = tl.full([], -1, tl.int32)
            if (top > MINUS_INF_ORDER) & (top < INF_ORDER):
                temperature = tl.load(temperature_ptr + slot)
                if temperature == 0.0:
                    offs = tiles * BLOCK + tl.arange(0, BLOCK)
                    token = tl.min(tl.where(lanes == top, offs, LARGEST_INDEX), 0)
                else:
                    scale = (score_of(top), tl.minimum(1.0 / temperature * LOG2_E, _LARGEST_RATE))
                    limit, keys, listed = find_limit(
                        source, lanes, scale, tl.load(top_k_ptr + slot), tl.load(top_p_ptr + slot),
                        candidates_ptr + row * CANDIDATES, V, BLOCK, CANDIDATES,
                    )  # fmt: skip
                    uniform = tl.load(uniforms_ptr + at)
                    min_p = tl.load(min_p_ptr + slot)
                    token = draw(source, limit, keys, listed, min_p, uniform, scale, V, BLOCK)
                if tl.load(scored_ptr + slot) != 0:
                    log_prob = tl.load(logits_row + token) - log_sum(logits_row, V, BLOCK)
                    tl.store(log_probs_ptr + row, log_prob)
            tl.store(chosen_ptr + row, token.to(tl.int64))


@triton.jit
def commit(
    program, programs,
    chosen_ptr, chosen_log_probs_ptr, slots_ptr,
    tokens_ptr, lengths_ptr, limits_ptr, eos_ptr, status_ptr, seen_ptr, scored_ptr, log_probs_ptr,
    capacity, V,
    rows, DRAFTS: tl.constexpr,
):  # fmt: skip
    """Keep what counts of the tokens chosen for each group of DRAFTS + 1 rows.

    These are the first one, and each one behind it as long as the draft before it is what was
    chosen for that place; none behind an id of eos, or behind the slot's limit. Writes tokens,
    seen, log_probs, where they are asked for, lengths and status. Rows that make no whole group
    are not looked at.
    """
    for group in range(program, rows // (DRAFTS + 1), programs):
        slot = tl.load(slots_ptr + group * (DRAFTS + 1)).to(tl.int64)
        if _runs(slot, status_ptr):
            length = tl.load(lengths_ptr + slot)
            limit = tl.load(limits_ptr + slot)
            scored = tl.load(scored_ptr + slot) != 0
            ends = tl.load(eos_ptr + slot * _MAX_EOS + tl.arange(0, _MAX_EOS))
            status = tl.full([], _RUNNING, tl.int32)
            counts = tl.full([], True, tl.int1)
            for draft in tl.static_range(DRAFTS + 1):
                row = group * (DRAFTS + 1) + draft
                if counts:
                    token = tl.load(chosen_ptr + row)
                    if token < 0:
                        status = tl.full([], _BROKEN, tl.int32)
                        counts = tl.full([], False, tl.int1)
                    else:
                        length += 1
                        at = slot * (capacity + 1) + length
                        drafted = tl.load(tokens_ptr + at)
                        tl.store(tokens_ptr + at, token)
                        tl.store(seen_ptr + slot * V + token, 1)
                        if scored:
                            tl.store(log_probs_ptr + at, tl.load(chosen_log_probs_ptr + row))
                        if tl.max((ends == token).to(tl.int32), 0) != 0:
                            status = tl.full([], _EOS, tl.int32)
                        elif length + 1 >= limit:
                            status = tl.full([], _LIMIT, tl.int32)
                        counts = (status == _RUNNING) & (drafted == token)
            tl.store(lengths_ptr + slot, length)
            if status != _RUNNING:
                tl.store(status_ptr + slot, status.to(tl.int8))


@triton.jit
def propose(
    program, programs, slots_ptr, tokens_ptr, lengths_ptr, status_ptr, capacity,
    rows, DRAFTS: tl.constexpr, NGRAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write DRAFTS tokens behind the newest one of each group of DRAFTS + 1 rows.

    They are what followed the last occurrence of the longest n-gram, of up to NGRAM tokens, that
    ends the sequence, going round where it overlaps the end; or the newest token again.
    """
    for group in range(program, rows // (DRAFTS + 1), programs):
        slot = tl.load(slots_ptr + group * (DRAFTS + 1)).to(tl.int64)
        if _runs(slot, status_ptr):
            sequence = tokens_ptr + slot * (capacity + 1)
            count = tl.load(lengths_ptr + slot) + 1
            # The largest of (matched tokens, where the match ends).
            best = count - 1
            for start in range(0, count, BLOCK):
                end = start + tl.arange(0, BLOCK)
                matches = (end > 0) & (end < count)
                for size in tl.static_range(1, NGRAM + 1):
                    matches = matches & (end >= size)
                    last = tl.load(sequence + tl.maximum(count - size, 0))
                    matches = matches & (
                        tl.load(sequence + end - size, mask=matches, other=-1) == last
                    )
                    found = tl.where(matches, end + size * _ENDS, 0)
                    best = tl.maximum(best, tl.max(found, 0))
            start = best % _ENDS
            place = start
            for draft in tl.static_range(DRAFTS):
                if count + draft <= capacity:
                    token = tl.load(sequence + place)
                    tl.store(sequence + count + draft, token)
                    place = tl.where(place + 1 < count, place + 1, start)


@triton.jit(do_not_specialize=["capacity", "V", "rows"])
def _select_best_kernel(
    best_value_ptr, best_index_ptr, best_sum_ptr, slots_ptr, chosen_ptr, chosen_log_probs_ptr,
    tokens_ptr, lengths_ptr, limits_ptr, eos_ptr, status_ptr, seen_ptr, scored_ptr, log_probs_ptr,
    capacity, V,
    rows, SHARES: tl.constexpr, BLOCK: tl.constexpr, COMMIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`select_best` on a grid of any size; with COMMIT, `commit` of steps without drafts too."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    allow_next(PDL)
    wait_for_previous(PDL)
    select_best(
        program, programs,
        best_value_ptr, best_index_ptr, best_sum_ptr, slots_ptr, status_ptr,
        chosen_ptr, chosen_log_probs_ptr, rows, SHARES, BLOCK,
    )  # fmt: skip
    if COMMIT:
        tl.debug_barrier()  # without drafts a program commits what it has chosen
        commit(
            program, programs, chosen_ptr, chosen_log_probs_ptr, slots_ptr,
            tokens_ptr, lengths_ptr, limits_ptr, eos_ptr, status_ptr, seen_ptr, scored_ptr,
            log_probs_ptr, capacity, V, rows, 0,
        )  # fmt: skip


@triton.jit(do_not_specialize=["capacity", "V", "rows"])
def _select_kernel(
    logits_ptr, slots_ptr, offsets_ptr, chosen_ptr, chosen_log_probs_ptr, scores_ptr,
    candidates_ptr,
    tokens_ptr, lengths_ptr, limits_ptr, least_ptr, eos_ptr, status_ptr, temperature_ptr,
    top_k_ptr, top_p_ptr, min_p_ptr, penalty_ptr, uniforms_ptr, seen_ptr, scored_ptr,
    log_probs_ptr,
    capacity, V,
    rows, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr, COMMIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`select` on a grid of any size; with COMMIT, `commit` of steps without drafts too."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    allow_next(PDL)
    wait_for_previous(PDL)
    select(
        program, programs,
        logits_ptr, slots_ptr, offsets_ptr, chosen_ptr, chosen_log_probs_ptr, scores_ptr,
    candidates_ptr,
        tokens_ptr, lengths_ptr, least_ptr, eos_ptr, status_ptr, temperature_ptr,
        top_k_ptr, top_p_ptr, min_p_ptr, penalty_ptr, uniforms_ptr, seen_ptr, scored_ptr,
        capacity, V, rows, BLOCK, CANDIDATES,
    )  # fmt: skip
    if COMMIT:
        tl.debug_barrier()  # without drafts a program commits what it has chosen
        commit(
            program, programs, chosen_ptr, chosen_log_probs_ptr, slots_ptr,
            tokens_ptr, lengths_ptr, limits_ptr, eos_ptr, status_ptr, seen_ptr, scored_ptr,
            log_probs_ptr, capacity, V, rows, 0,
        )  # fmt: skip


@triton.jit(do_not_specialize=["capacity", "V", "rows"])
def _commit_kernel(
    chosen_ptr, chosen_log_probs_ptr, slots_ptr,
    tokens_ptr, lengths_ptr, limits_ptr, eos_ptr, status_ptr, seen_ptr, scored_ptr, log_probs_ptr,
    capacity, V,
    rows, DRAFTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`commit` on a grid of any size."""
    allow_next(PDL)
    wait_for_previous(PDL)
    commit(
        tl.program_id(0), tl.num_programs(0), chosen_ptr, chosen_log_probs_ptr, slots_ptr,
        tokens_ptr, lengths_ptr, limits_ptr, eos_ptr, status_ptr, seen_ptr, scored_ptr,
        log_probs_ptr, capacity, V, rows, DRAFTS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["capacity", "rows"])
def _propose_kernel(
    slots_ptr, tokens_ptr, lengths_ptr, status_ptr, capacity,
    rows, DRAFTS: tl.constexpr, NGRAM: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`propose` on a grid of any size."""
    allow_next(PDL)
    wait_for_previous(PDL)
    propose(
        tl.program_id(0), tl.num_programs(0),
        slots_ptr, tokens_ptr, lengths_ptr, status_ptr, capacity, rows, DRAFTS, NGRAM, BLOCK,
    )  # fmt: skip


def launch_select(
    state: DecodeState, buffers: StepBuffers, drafts: int, greedy: bool, pdl: bool = False
) -> None:
    """Choose a token for each of the step's rows and commit those that count.

    Rows are grouped by slot, ``drafts`` + 1 each. greedy: by ``best_*`` of the buffers, which is
    for rows that all have temperature 0, no penalty and no id forbidden; else by ``logits``.
    """
    rows, vocab_size = buffers.rows, state.seen.shape[1]
    capacity = state.tokens.shape[1] - 1
    at_once = drafts == 0
    programs = min(rows, current_target(state.tokens.device).multiprocessors)
    if greedy:
        shares = buffers.best_value.shape[1]
        _select_best_kernel[(programs,)](
            buffers.best_value, buffers.best_index, buffers.best_sum,
            buffers.slots, buffers.chosen, buffers.chosen_log_probs,
            state.tokens, state.lengths, state.limits, state.eos, state.status, state.seen,
            state.scored, state.log_probs,
            capacity, vocab_size,
            rows, SHARES=shares, BLOCK=triton.next_power_of_2(shares), COMMIT=at_once, PDL=pdl,
            num_warps=configs.ENGINE_SELECT_BEST_WARPS, launch_pdl=pdl,
        )  # fmt: skip
    else:
        config = configs.ENGINE_SELECT
        _select_kernel[(programs,)](
            buffers.logits, buffers.slots, buffers.offsets,
            buffers.chosen, buffers.chosen_log_probs, buffers.scores, buffers.candidates,
            state.tokens, state.lengths, state.limits, state.least, state.eos, state.status,
            state.temperature, state.top_k, state.top_p, state.min_p, state.penalty,
            state.uniforms, state.seen, state.scored, state.log_probs,
            capacity, vocab_size,
            rows, BLOCK=config.block, CANDIDATES=buffers.candidates.shape[1], COMMIT=at_once,
            PDL=pdl, num_warps=config.warps, launch_pdl=pdl,
        )  # fmt: skip
    if not at_once:
        _commit_kernel[(min(programs, max(1, rows // (drafts + 1))),)](
            buffers.chosen, buffers.chosen_log_probs, buffers.slots,
            state.tokens, state.lengths, state.limits, state.eos, state.status, state.seen,
            state.scored, state.log_probs,
            capacity, vocab_size,
            rows, DRAFTS=drafts, PDL=pdl, num_warps=1, launch_pdl=pdl,
        )  # fmt: skip


def launch_propose(
    state: DecodeState, buffers: StepBuffers, drafts: int, ngram: int, pdl: bool = False
) -> None:
    """Propose ``drafts`` tokens for each group of ``drafts`` + 1 rows, by matching n-grams."""
    _propose_kernel[(max(1, buffers.rows // (drafts + 1)),)](
        buffers.slots, state.tokens, state.lengths, state.status, state.tokens.shape[1] - 1,
        buffers.rows, DRAFTS=drafts, NGRAM=ngram, BLOCK=configs.ENGINE_PROPOSE_BLOCK,
        PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
