"""Which sequence has which slot, in which order prompts are evaluated, and what they share.

Plain bookkeeping, without a tensor. A sequence waits, gets a slot, has its prompt evaluated in
chunks, runs, and gives the slot back. A slot whose first positions others read (`Runner` calls it
sharing a prefix) is not given away before the last of them has ended.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from gpt2fast.engine.speculation import PromptLookup
from gpt2fast.generation.options import GenerationOptions

# A shorter common beginning is evaluated again rather than shared, unless it is all but the last
# token: every sharing costs a copy or a second place to read from.
MIN_SHARED = 16
_ENDLESS = 2**62


@dataclass(eq=False)
class Sequence:
    """A prompt and its continuation.

    Attributes:
        prompt_ids: the prompt.
        token_ids: what has been generated so far.
        logprobs: with ``output_logprobs``, of each generated token under the model.
        finish_reason: None while it goes on; then "eos", "stop_string", "length" (as many tokens
            as were asked for), "context" (there are no more positions), "cancelled", or "error".
        error: after "error" what was wrong: a ValueError where the model's scores hold NaN or
            infinity, or what the tokenizer raised that was to look for stop strings.
    """

    prompt_ids: list[int]
    options: GenerationOptions = field(repr=False)
    eos: list[int] = field(repr=False)
    limit: int = field(repr=False)  # tokens it may have, with the prompt
    least: int = field(repr=False)  # tokens it must have before an id of eos
    at_limit: str = field(repr=False)  # the reason where it comes to its limit
    stream: tuple[int, int] | None = field(default=None, repr=False)  # of random numbers
    keeps_slot: bool = field(default=False, repr=False)  # until it is cancelled
    stops: Callable[[list[int]], bool] | None = field(default=None, repr=False)
    row: int = field(default=0, repr=False)  # of its batch, for messages

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list, repr=False)
    finish_reason: str | None = None
    error: Exception | None = field(default=None, repr=False)

    slot: int = field(default=-1, repr=False)
    cached: int = field(default=0, repr=False)  # positions whose keys and values are in the cache
    wanted: int = field(default=_ENDLESS, repr=False)  # it rests when it has so many new tokens
    tokens: list[int] = field(default_factory=list, repr=False)  # prompt and continuation
    lookup: PromptLookup | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt_ids)
        # Asking for more is asking for all; and the runner's integers have 32 bits.
        self.least = min(self.least, self.limit)
        drafts = self.options.prompt_lookup_num_tokens
        if drafts:
            self.lookup = PromptLookup(self.tokens, drafts, self.options.max_matching_ngram_size)

    def cancel(self) -> None:
        """End it where it is; its slot is free at the engine's next step. Never waits."""
        # No lock and no call into the engine: the garbage collector may come by here at any time.
        if self.finish_reason is None:
            self.finish_reason = "cancelled"
        self.keeps_slot = False

    @property
    def hungry(self) -> bool:
        """Whether somebody waits for its next token."""
        return self.finish_reason is None and len(self.token_ids) < self.wanted

    def append(self, token: int) -> None:
        """Take in a new token, and end where its text does."""
        self.tokens.append(token)
        if self.stops is not None and token not in self.eos:
            try:
                if self.stops(self.tokens):
                    self.finish_reason = "stop_string"
            except Exception as error:  # the tokenizer's; the other sequences have no part in it
                self.fail(error)
                return
        self.token_ids.append(token)

    def fail(self, error: Exception) -> None:
        """End with an error."""
        self.finish_reason, self.error = "error", error


@dataclass
class Chunk:
    """Part of a prompt to evaluate: positions ``start`` to ``end`` of a slot.

    Attributes:
        last: whether nothing of the prompt is left to evaluate in this way.
        source: the slot whose first ``start`` positions are to be shared first, or None.
    """

    sequence: Sequence
    start: int
    end: int
    last: bool
    source: int | None


class Scheduler:
    """The slots of a runner, and who has them.

    Args:
        slots: how many there are.
        shares: whether the runner reads a shared prefix in its owner's slot, rather than copying.
    """

    def __init__(self, slots: int, shares: bool) -> None:
        self._shares = shares
        self._free = list(range(slots))[::-1]
        self._waiting: deque[Sequence] = deque()
        self._prompts: deque[Sequence] = deque()  # have a slot, not all of their prompt evaluated
        self._owners: dict[int, Sequence] = {}  # slot -> sequence; ended ones whose slot is held
        self._source: dict[int, int] = {}  # slot -> the slot that it reads its prefix from
        self._running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def waiting(self) -> int:
        """How many sequences have no slot yet."""
        return len(self._waiting)

    def free(self) -> int:
        """How many slots nobody has or waits for."""
        return max(0, len(self._free) - len(self._waiting))

    def unfinished(self) -> Iterator[Sequence]:
        """Everybody who has not ended."""
        for sequence in (*self._waiting, *self._owners.values()):
            if sequence.finish_reason is None:
                yield sequence

    def reap(self) -> list[int]:
        """Take back the slots of sequences that have ended; returns those slots."""
        self._waiting = deque(s for s in self._waiting if s.finish_reason is None)
        self._prompts = deque(s for s in self._prompts if s.finish_reason is None)
        self._running = [s for s in self._running if s.finish_reason is None]
        freed: list[int] = []
        for slot, sequence in list(self._owners.items()):
            if sequence.finish_reason is None or sequence.keeps_slot:
                continue
            self._source.pop(slot, None)
            if slot not in self._source.values():
                freed.append(slot)
                del self._owners[slot]
        self._free += freed[::-1]
        return freed

    def admit(self) -> list[Sequence]:
        """Give free slots to those that have waited longest."""
        admitted = []
        while self._free and self._waiting:
            sequence = self._waiting.popleft()
            sequence.slot = self._free.pop()
            self._owners[sequence.slot] = sequence
            self._prompts.append(sequence)
            admitted.append(sequence)
        return admitted

    def chunks(self, budget: int | None) -> Iterator[Chunk]:
        """The parts of prompts to evaluate in this step, of ``budget`` tokens together at most.

        They belong to different slots, and each must have been evaluated before one whose source it
        is. Where all but the last token of a prompt is cached already, the part is empty: that
        token is evaluated as the running rows' are.
        """
        while self._prompts and (budget is None or budget > 0):
            sequence = self._prompts.popleft()
            length, source = len(sequence.prompt_ids), None
            if sequence.cached == 0:
                source, sequence.cached = self._shared(sequence)
            start = sequence.cached
            if start == length - 1:
                end, last = start, True
            else:
                end = length if budget is None else min(length, start + budget)
                last = end == length
            yield Chunk(sequence, start, end, last, source)
            sequence.cached = end
            budget = None if budget is None else budget - (end - start)
            (self._running.append if last else self._prompts.appendleft)(sequence)

    def _shared(self, sequence: Sequence) -> tuple[int | None, int]:
        """The slot that holds the longest beginning of a prompt, and its length; None and 0."""
        prompt, best, source = sequence.prompt_ids, 0, None
        most = len(prompt) - 1
        for slot, other in self._owners.items():
            # A slot that reads its own prefix elsewhere lends nothing; its source may.
            if other is sequence or slot in self._source or other.cached <= best:
                continue
            length = _common(prompt, other.tokens, min(most, other.cached, len(other.tokens)))
            if length > best and (length == most or length >= MIN_SHARED):
                best, source = length, slot
        if source is not None and self._shares:
            self._source[sequence.slot] = source
        return source, best

    def running(self) -> list[Sequence]:
        """Those whose next token is to be evaluated now."""
        return [s for s in self._running if s.hungry]


def _common(first: list[int], second: list[int], most: int) -> int:
    """The length of the common beginning, ``most`` at most."""
    if first[:most] == second[:most]:
        return most
    return next(i for i in range(most) if first[i] != second[i])
