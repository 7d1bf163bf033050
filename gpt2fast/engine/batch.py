"""What a step does: the scheduler's plan carried out on a runner, and what it brought read back."""

from collections.abc import Sequence as Many
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt2fast.engine.runner import Runner
from gpt2fast.engine.scheduler import Chunk, Scheduler, Sequence
from gpt2fast.generation.sampling import no_next_token, random_numbers
from gpt2fast.kernels.decode_state import BROKEN, EOS, IDLE, MAX_EOS, RUNNING

_MAX_DRAFTS = 63


class Event(NamedTuple):
    """What a step brought to one sequence.

    Attributes:
        sequence: which one.
        token_ids: its new tokens: none, one, or with prompt lookup several.
        finish_reason: why it has ended, or None.
    """

    sequence: Sequence
    token_ids: list[int]
    finish_reason: str | None


class Batch:
    """The sequences of a runner. Not for several threads: `gpt2fast.engine.Engine` holds a lock.

    Args:
        prefill_tokens: how many tokens of prompts a step evaluates at most; None for no bound.
    """

    def __init__(self, runner: Runner, prefill_tokens: int | None) -> None:
        self.scheduler = Scheduler(runner.slots, runner.shares_prefix)
        self._runner = runner
        self._prefill_tokens = prefill_tokens
        # What was last written of each slot's settings: most are the same from one to the next.
        self._written: dict[tuple[int, str], Any] = {}

    def reap(self) -> None:
        """Take back the slots of those that have ended."""
        for slot in self.scheduler.reap():
            self._runner.state.status[slot] = IDLE

    def step(self) -> list[Event]:
        """One step with everybody for whom somebody waits.

        Raises:
            RuntimeError: somebody waits and nothing came of it, so that another step would be
                as useless.
        """
        before = [(s, len(s.token_ids)) for s in self.scheduler.unfinished()]
        self.reap()
        for sequence in self.scheduler.admit():
            self._set_up(sequence)
        chunks: list[Chunk] = []
        started, idle = [], True
        for chunk in self.scheduler.chunks(self._prefill_tokens):
            if any(chunk.source == earlier.sequence.slot for earlier in chunks):
                self._prefill(chunks)  # what is to be shared has to be there
                chunks = []
            self._prepare(chunk)
            idle = False
            if chunk.end > chunk.start:
                chunks.append(chunk)
                if chunk.last:
                    started.append(chunk.sequence)
        self._prefill(chunks)
        self._collect(started)
        running = self.scheduler.running()
        self._advance(running)
        stuck = idle and not running and any(s.hungry for s, _ in before)
        # One that was cancelled meanwhile may hold the slot that another gets in the next step.
        if stuck and not any(s.finish_reason == "cancelled" for s, _ in before):
            raise RuntimeError("no sequence can go on, though some have not ended")
        return [
            Event(s, s.token_ids[count:], s.finish_reason)
            for s, count in before
            if len(s.token_ids) > count or s.finish_reason is not None
        ]

    def keys_values(self, sequence: Sequence, length: int, pad: int) -> list[Tensor]:
        """See `gpt2fast.engine.Engine.keys_values`."""
        runner, slot = self._runner, sequence.slot
        start, end = len(sequence.tokens) - 1, min(length, runner.capacity)
        if start < end:
            tokens = runner.state.tokens
            tokens[slot, start] = sequence.tokens[-1]
            tokens[slot, start + 1 : end] = pad
            runner.state.status[slot] = IDLE
            runner.prefill(slot, start, end)
        layers = runner.keys_values(slot, end)
        return [torch.nn.functional.pad(kv, (0, 0, 0, length - end)) for kv in layers]

    def _set_up(self, sequence: Sequence) -> None:
        """Write what a new sequence brings into its slot."""
        state, slot, options = self._runner.state, sequence.slot, sequence.options
        device, length = state.tokens.device, len(sequence.prompt_ids)
        ids = torch.tensor(sequence.prompt_ids, device=device)
        state.tokens[slot, :length] = ids
        if options.repetition_penalty != 1:  # nobody reads it otherwise
            state.seen[slot] = 0
            state.seen[slot, ids] = 1
        if sequence.stream is not None:
            drawn = random_numbers(*sequence.stream).random(sequence.limit - length)
            state.uniforms[slot, length : sequence.limit] = torch.from_numpy(drawn).to(device)
        sampled = options.do_sample
        top_p = options.top_p if sampled else None
        settings = {
            "limits": sequence.limit,
            "least": sequence.least,
            "temperature": options.temperature if sampled else 0.0,
            "top_k": (options.top_k or 0) if sampled else 0,
            "top_p": 1.0 if top_p is None else top_p,
            "min_p": (options.min_p or 0.0) if sampled else 0.0,
            "penalty": options.repetition_penalty,
            "scored": int(options.output_logprobs),
            "eos": (*sequence.eos, *[-1] * (MAX_EOS - len(sequence.eos))),
            "prefix_slots": 0,
            "prefix_lengths": 0,
        }
        for name, value in settings.items():
            self._write(name, slot, value)

    def _write(self, name: str, slot: int, value: Any) -> None:
        if self._written.get((slot, name)) == value:
            return
        tensor = getattr(self._runner.state, name)
        tensor[slot] = torch.tensor(value, dtype=tensor.dtype, device=tensor.device)
        self._written[slot, name] = value

    def _prepare(self, chunk: Chunk) -> None:
        """Share what is to be shared, and begin to run where the prompt ends."""
        runner, slot = self._runner, chunk.sequence.slot
        if chunk.source is not None:
            if runner.shares_prefix:
                self._write("prefix_slots", slot, chunk.source)
                self._write("prefix_lengths", slot, chunk.start)
            else:
                runner.copy_prefix(chunk.source, slot, chunk.start)
        if chunk.last:
            runner.state.status[slot] = RUNNING
        if chunk.end == chunk.start:
            runner.state.lengths[slot] = chunk.start

    def _prefill(self, chunks: list[Chunk]) -> None:
        """Evaluate parts of prompts, of different slots."""
        pieces = [(chunk.sequence.slot, chunk.start, chunk.end) for chunk in chunks]
        many = getattr(self._runner, "prefill_many", None)  # where it saves passes over weights
        if many is not None and len(pieces) > 1:
            many(pieces)
            return
        for piece in pieces:
            self._runner.prefill(*piece)

    def _advance(self, running: list[Sequence]) -> None:
        """The next tokens of ``running``: of those with drafts and of those without."""
        if not running:
            return
        groups: dict[tuple[int, int], list[Sequence]] = {}
        proposals: dict[Sequence, list[int]] = {}
        for sequence in running:
            key = (0, 0)
            if sequence.lookup is not None:
                # None where the sequence will have ended.
                room = sequence.limit - 2 - sequence.cached
                proposed = sequence.lookup.propose(min(room, _MAX_DRAFTS))
                if proposed:
                    proposals[sequence] = proposed
                    key = (1, sequence.lookup.ngram)
            groups.setdefault(key if self._runner.proposes else (key[0], 0), []).append(sequence)
        steps: dict[Sequence, int] = {}
        for (speculates, ngram), members in groups.items():
            drafts = 0
            if speculates:
                room = min(self._runner.capacity - 1 - s.cached for s in members)
                drafts = min(room, max(len(proposals[s]) for s in members))
                if self._runner.proposes:
                    drafts = _kind_of_step(drafts, room)
            count = self._evaluate(members, drafts, ngram, proposals)
            steps.update(dict.fromkeys(members, count))
        before = {s: s.cached for s in running}
        self._collect(running)
        for s in running:
            gained = s.cached - before[s]
            if not gained and s.finish_reason is None:
                raise RuntimeError(f"the runner brought slot {s.slot} no token")
            if s in proposals:
                assert s.lookup is not None
                s.lookup.record(len(proposals[s]), -(-gained // steps[s]) - 1)

    def _evaluate(
        self,
        members: list[Sequence],
        drafts: int,
        ngram: int,
        proposals: dict[Sequence, list[int]],
    ) -> int:
        """Have ``members`` evaluated; returns in how many steps."""
        runner = self._runner
        longest = max(s.cached for s in members)
        left = max(s.limit - 1 - s.cached for s in members)
        steps = min(runner.look_every, left)
        if drafts:
            steps = max(1, min(steps, (runner.capacity - longest) // (drafts + 1)))
            if not runner.proposes:
                steps = 1
                for s in members:
                    ids = torch.tensor(proposals[s][:drafts], device=runner.state.tokens.device)
                    start = s.cached + 1
                    runner.state.tokens[s.slot, start : start + len(ids)] = ids
        plain = all(
            not s.options.do_sample
            and s.options.repetition_penalty == 1
            and s.least <= s.cached + 1
            for s in members
        )
        runner.advance(
            [s.slot for s in members], steps, drafts, ngram, plain=plain, context=longest
        )
        return steps

    def _collect(self, sequences: list[Sequence]) -> None:
        """Take in what the state holds anew of ``sequences``."""
        if not sequences:
            return
        state = self._runner.state
        lengths, status = state.lengths.tolist(), state.status.tolist()
        spans = [(s.slot, len(s.tokens), lengths[s.slot] + 1) for s in sequences]
        read = read_each if state.tokens.device.type == "cpu" else read_at_once
        tokens = read(state.tokens, spans)
        scored = any(s.options.output_logprobs for s in sequences)
        logprobs = read(state.log_probs, spans) if scored else tokens
        for s, ids, values in zip(sequences, tokens, logprobs, strict=True):
            s.cached = lengths[s.slot]
            self._take(s, status[s.slot], ids, values)

    def _take(self, s: Sequence, status: int, ids: list[int], logprobs: list[float]) -> None:
        for token, logprob in zip(ids, logprobs, strict=True):
            if s.finish_reason is not None:  # cancelled meanwhile, or its text has ended
                return
            if s.options.output_logprobs:
                s.logprobs.append(logprob)
            s.append(token)
        if s.finish_reason is not None or status == RUNNING:
            return
        if status == BROKEN:
            s.fail(no_next_token(s.row))
        else:
            s.finish_reason = "eos" if status == EOS else s.at_limit


def _kind_of_step(drafts: int, room: int) -> int:
    """So many drafts or more, as far as there is room: each number is a kernel and a graph."""
    return min((1 << drafts.bit_length()) - 1, (1 << (room + 1).bit_length() - 1) - 1)


def read_each(table: Tensor, spans: Many[tuple[int, int, int]]) -> list[list[Any]]:
    """Of ``[S, N]`` the entries of every (row, start, end), on a CPU."""
    values = table.numpy()  # reads a few elements in a tenth of torch's time
    return [values[row, start:end].tolist() for row, start, end in spans]


def read_at_once(table: Tensor, spans: Many[tuple[int, int, int]]) -> list[list[Any]]:
    """The same where each reading waits for the device."""
    device = table.device
    most = max(end - start for _, start, end in spans)
    index = torch.tensor(spans, device=device)
    columns = index[:, 1, None] + torch.arange(most, device=device)
    read = table[index[:, 0, None], columns.clamp(max=table.shape[1] - 1)].tolist()
    return [row[: end - start] for row, (_, start, end) in zip(read, spans, strict=True)]
