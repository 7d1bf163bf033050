"""`Engine`: sequences that join and leave a running batch between any two steps."""

import threading
import weakref
from collections.abc import Sequence as Many
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpt2fast.engine.batch import Batch, Event
from gpt2fast.engine.float8 import FLOAT8, cache_dtype_of
from gpt2fast.engine.runner import OutOfMemory, Runner, first_line, is_out_of_memory
from gpt2fast.engine.scheduler import Sequence
from gpt2fast.engine.weights import fingerprint, why_not
from gpt2fast.generation.options import DEFAULT_NEW_TOKENS, GenerationOptions
from gpt2fast.generation.prompts import prepare_prompts
from gpt2fast.generation.sampling import row_streams
from gpt2fast.generation.stopping import StopStrings
from gpt2fast.kernels.backend import serves
from gpt2fast.kernels.decode_state import MAX_EOS

if TYPE_CHECKING:
    from gpt2fast.generation.decoding import LanguageModel

MAX_SLOTS = 256  # the largest bucket of rows that the kernels have


class Engine:
    """Generation for many callers at once: one batch that sequences join and leave at any step.

    `submit` takes a prompt; every `step` evaluates a share of the prompts that are waiting and one
    token (with prompt lookup several) of every sequence that runs. Each sequence comes out as it
    would alone. Memory is taken when the engine is built: a cache of ``slots * capacity``
    positions. All methods may be called from any thread.

    Args:
        model: a language model, as the engine can serve it: without hooks or adapters, not in
            training mode with dropout, no autocasting. Its weights may be copied; an engine does
            not follow a model that changes.
        slots: how many sequences run at once, 1 to 256; the others wait.
        capacity: positions of a slot, for prompt and continuation; default all that the model has.
        prefill_tokens: how many tokens of prompts a step evaluates at most, so that a long prompt
            does not hold up those that run; None for no bound.
        cache_dtype: None, or the model's dtype, keeps keys and values as the model computes them.
            `torch.float8_e4m3fn`, on GPUs of compute capability 8.9 or later, takes half the bytes
            of 16 bits: room for twice the positions, and half of what a step reads besides the
            weights, which counts in large batches and long contexts. Each value keeps 4
            significant bits and saturates at 448, so tokens may differ.
        runner: what evaluates the model, with a cache of its own; by default our kernels where they
            serve the model's device, and PyTorch's operators elsewhere.

    Raises:
        ValueError: a value out of range, or a model that the engine cannot serve, with the reason.
    """

    def __init__(
        self,
        model: "LanguageModel",
        slots: int = 8,
        capacity: int | None = None,
        *,
        prefill_tokens: int | None = 512,
        cache_dtype: torch.dtype | None = None,
        runner: Runner | None = None,
    ) -> None:
        positions = model.config.n_positions
        capacity = positions if capacity is None else capacity
        _check_range("slots", slots, 1, MAX_SLOTS)
        _check_range("capacity", capacity, 1, positions)
        if prefill_tokens is not None:
            _check_range("prefill_tokens", prefill_tokens, 1, 2**31 - 1)
        if runner is not None and cache_dtype is not None:
            raise ValueError(f"a runner has a cache of its own; got cache_dtype={cache_dtype}")
        reason = why_not(model)
        if reason is not None:
            raise ValueError(f"the engine cannot serve this model: {reason}")
        self._config = model.config
        self._model = weakref.ref(model)
        self._fingerprint = fingerprint(model)
        with torch.inference_mode(False), torch.no_grad():
            if runner is None:
                runner = build_runner(model, slots, capacity, cache_dtype)
            self._runner = runner
        self._batch = Batch(self._runner, prefill_tokens)
        self._lock = threading.RLock()
        self._closed = False
        self._failure: BaseException | None = None

    @property
    def slots(self) -> int:
        """How many sequences may run at once."""
        return self._runner.slots

    @property
    def capacity(self) -> int:
        """How many positions each has."""
        return self._runner.capacity

    @property
    def unfinished(self) -> int:
        """How many sequences run or wait."""
        with self._lock:
            return sum(1 for _ in self._batch.scheduler.unfinished())

    @property
    def idle(self) -> bool:
        """Whether nobody has a slot or waits for one."""
        with self._lock:
            if self._closed:
                return True
            with self._runner.working():
                self._batch.reap()
            return self._batch.scheduler.free() == self.slots

    def submit(
        self,
        input_ids: Any,
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        min_new_tokens: int | None = None,
        eos_token_id: Any = None,
        stop_strings: str | Many[str] | None = None,
        tokenizer: Any = None,
        seed: int | None = None,
        prompt_lookup_num_tokens: int | None = None,
        max_matching_ngram_size: int = 2,
        output_logprobs: bool = False,
    ) -> Sequence:
        """Hand in a prompt.

        Args:
            input_ids: token ids, a list or a tensor ``[T]`` or ``[1, T]``.
            temperature: 0 takes the likeliest token; above 0 tokens are drawn.
            (the others): as in `GPT2LMHeadModel.generate`, where ``do_sample=True, seed=seed``
                gives the same tokens. At most 8 ids may end a sequence.

        Returns:
            a handle: its ``token_ids`` grow with every `step` until it has a ``finish_reason``;
            ``cancel()`` ends it.

        Raises:
            ValueError: a value out of range, a prompt that is empty or longer than ``capacity``.
            RuntimeError: the engine is closed, or the model has changed since it was built.
        """
        options = GenerationOptions(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            min_new_tokens=min_new_tokens,
            eos_token_id=eos_token_id,
            stop_strings=stop_strings,
            tokenizer=tokenizer,
            seed=seed,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
            max_matching_ngram_size=max_matching_ngram_size,
            output_logprobs=output_logprobs,
        )
        _check_range("max_new_tokens", max_new_tokens, 1, 2**31 - 1)
        eos, pad = options.special_tokens(self._config)
        if len(eos) > MAX_EOS:
            raise ValueError(f"at most {MAX_EOS} ids may end a sequence; got {len(eos)}")
        prompts = prepare_prompts(input_ids, None, self._config, torch.device("cpu"), pad, False)
        if len(prompts.lengths) != 1:
            raise ValueError(f"submit takes one prompt; got {len(prompts.lengths)}")
        length = prompts.lengths[0]
        if length > self.capacity:
            raise ValueError(
                f"the prompt has {length} tokens; a slot of this engine holds {self.capacity}"
            )
        model = self._model()
        if model is not None and fingerprint(model) != self._fingerprint:
            raise RuntimeError("the model has changed since the engine was built: build another")
        most = length + max_new_tokens
        sequence = Sequence(
            prompts.ids[0].tolist(),
            options,
            eos,
            limit=min(most, self.capacity + 1),
            least=0 if min_new_tokens is None else length + min_new_tokens,
            at_limit="length" if most <= self.capacity + 1 else "context",
            stream=row_streams(options, 1)[0] if options.do_sample else None,
            stops=StopStrings(options.stops, tokenizer).ends if options.stops else None,
        )
        with self._lock:
            self._check_open()
            self._batch.scheduler.add(sequence)
        return sequence

    def step(self) -> list[Event]:
        """Go one step further with everybody.

        Returns:
            an event for each sequence that got tokens or ended; [] where nobody is left.

        Raises:
            RuntimeError: the engine is closed.
            Exception: what the evaluation raised, for want of memory
                `gpt2fast.engine.runner.OutOfMemory`; the engine is closed then.
        """
        with self._lock:
            self._check_open()
            return self._step()

    def enter(self, sequences: Many[Sequence]) -> bool:
        """Take in all of ``sequences`` at once if each gets a slot of its own right away.

        They rest until `pull` asks for their tokens.
        """
        with self._lock:
            if self._closed:
                return False
            with self._runner.working():
                self._batch.reap()
            if self._batch.scheduler.free() < len(sequences):
                return False
            for sequence in sequences:
                sequence.wanted = 0
                self._batch.scheduler.add(sequence)
            return True

    def pull(self, sequences: Many[Sequence], count: int) -> None:
        """Step until each of ``sequences`` has ``count`` new tokens, or has ended.

        An error that ends one before its token ``count`` is not kept waiting for the others.
        Several threads may pull at once: a step of any of them serves all.

        Raises:
            RuntimeError: the engine was closed, which has cancelled them.
        """
        for sequence in sequences:
            sequence.wanted = count
        while True:
            with self._lock:
                if any(sequence.finish_reason == "cancelled" for sequence in sequences):
                    self._check_open()
                if any(s.error is not None and len(s.token_ids) < count for s in sequences):
                    return
                if not any(sequence.hungry for sequence in sequences):
                    return
                self._step()

    def keys_values(self, sequence: Sequence, length: int, pad: int) -> list[Tensor]:
        """The cache of an ended sequence with ``keeps_slot``, and ``pad`` behind it to ``length``.

        Returns:
            for each layer ``[2, H, length, D]``; zeros beyond the slot's capacity.

        Raises:
            OutOfMemory: there is no memory for them; the engine is closed then, to make room.
            RuntimeError: the engine is closed.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._check_open()
            try:
                with self._runner.working():
                    layers = self._batch.keys_values(sequence, length, pad)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._failure = OutOfMemory(first_line(error))
                self.close()
                raise OutOfMemory(str(self._failure)) from None
        for layer in layers:
            if layer.is_cuda:  # made by another stream, which may not take it back before this one
                layer.record_stream(torch.cuda.current_stream(layer.device))
        return layers

    def close_if_idle(self) -> bool:
        """Close it unless somebody has a slot or waits for one; returns whether it is closed.

        Does not wait: whoever is within one of the methods is at work. In a step the garbage
        collector may run what waits for the caller of this one.
        """
        if not self._lock.acquire(blocking=False):
            return False
        try:
            idle = self.idle
            if idle:
                self.close()
            return idle
        finally:
            self._lock.release()

    def close(self) -> None:
        """Cancel what runs or waits and free the memory. A closed engine stays closed."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for sequence in self._batch.scheduler.unfinished():
                sequence.cancel()
            self._runner.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> str:
        raise TypeError("an engine cannot be copied or pickled: build one for the copied model")

    @property
    def closed(self) -> bool:
        """Whether it was closed, by `close` or by an error in a step."""
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            if isinstance(self._failure, OutOfMemory):  # in another thread's step
                raise OutOfMemory(str(self._failure))
            raise RuntimeError("the engine is closed")

    def _step(self) -> list[Event]:
        try:
            with torch.inference_mode(False), torch.no_grad(), self._runner.working():
                return self._batch.step()
        except BaseException as error:
            self._failure = OutOfMemory(first_line(error)) if is_out_of_memory(error) else error
            self.close()  # the state may be anything now
            if isinstance(self._failure, OutOfMemory):
                raise OutOfMemory(str(self._failure)) from None
            raise


def build_runner(
    model: "LanguageModel", slots: int, capacity: int, cache_dtype: torch.dtype | None = None
) -> Runner:
    """Our kernels where they serve the model, PyTorch's operators elsewhere.

    Raises:
        ValueError: there is no such cache for the model, on its device.
    """
    cache_dtype = cache_dtype_of(model, cache_dtype)
    reason: str | None = f"our kernels do not run on {str(model.device)!r}"
    if serves(model.device):
        from gpt2fast.engine.triton_runner import TritonRunner, unsupported

        reason = unsupported(model)
        if reason is None:
            return TritonRunner(model, slots, capacity, cache_dtype=cache_dtype)
    if cache_dtype == FLOAT8:
        raise ValueError(
            f"cache_dtype={cache_dtype} is for the engine on our kernels, not on PyTorch's "
            f"operators, which serve this model: {reason}"
        )
    from gpt2fast.engine.compiled import step_of
    from gpt2fast.engine.torch_runner import TorchRunner

    return TorchRunner(model, slots, capacity, step_of(model))


def _check_range(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} must be an integer from {least} to {most}; got {value!r}")
