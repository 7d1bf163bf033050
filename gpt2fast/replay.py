"""Forward passes over prompts, recorded as CUDA graphs: no Python and no launch but one.

A pass of a small model is a hundred short kernels, and the host takes several times as long to
issue them as a GPU to run them. So a pass that comes again is recorded and replayed. What the
caller gets is what the modules would have computed, in tensors of the caller's own. That holds for
a `GPT2Model` (also under a head) on a GPU that our kernels serve, in eval mode, with autograd and
autocast off, where nobody has hooked or replaced a module, traces, profiles or captures, for ids
alone: no past, mask, positions, nor more outputs than hidden states and the cache. Everything else
goes through the modules, as do models of other classes, those of transformers that were accelerated
among them.

The first pass of a shape goes through the modules: it compiles the kernels, and shapes that come
once cost nothing. The second is recorded. Of a model's shapes `_MOST` are kept; from then on one
has to come `_SIGHTS_WHEN_FULL` times before it displaces another, the next twice as often and so
on: many shapes in turn are not recorded again and again.

Graphs read the weights where they lie: written in place, they count. Where a parameter or module is
another one, lies elsewhere or works otherwise, all is recorded anew. What a graph reads is looked
at before it is replayed; the rest while the GPU is at work, whose result is dropped if it is stale.

``GPT2FAST_GRAPHS=0`` in the environment, read here alone, turns this off.
"""

import contextlib
import math
import os
import sys
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from gpt2fast.cache import KVCache, _round_up, _Storage
from gpt2fast.inputs import check_range
from gpt2fast.kernels.backend import DTYPES, selected_backend, serves
from gpt2fast.kernels.registry import _unobserved
from gpt2fast.layers import GPT2MLP, Conv1D, GPT2Attention, GPT2Block, LayerNorm

if TYPE_CHECKING:
    from gpt2fast.transformer import GPT2Model

_MOST = 8  # recordings of a model
_SIGHTS = 2  # the pass of a shape that is recorded
_SIGHTS_WHEN_FULL = 8  # the one that is recorded in the place of another
_MOST_SEEN = 64  # shapes that are counted
_MOST_CHANGES = 16  # then parameters come and go with every pass, and it is not worth looking
_MOST_TOKENS = 16384  # there a GPU has been busy for long when the host is done
_MOST_CACHE = 512 << 20  # bytes of keys and values, which lie in memory beside the caller's copy
_DEVICES = ("cuda",)

_KNOWN = {
    *(GPT2Block, GPT2Attention, GPT2MLP, LayerNorm, Conv1D),
    *(nn.Embedding, nn.Dropout, nn.ModuleList),
    *(nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid),
}
_DROPPING = (GPT2Block, GPT2Attention, nn.Dropout)  # whose mode makes a difference
_MUST_BE_EMPTY = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    "_buffers",
)


def _enabled() -> bool:
    value = os.environ.get("GPT2FAST_GRAPHS") or "1"
    if value not in ("0", "1"):
        raise ValueError(f"GPT2FAST_GRAPHS must be 0 or 1; got {value!r}")
    return value == "1"


ENABLED = _enabled()


class _Modules:
    """What a recording takes from a model's modules, and whether it is still the same.

    Asked at every pass, so it looks at flat lists instead of walking through the modules.

    Attributes:
        usable: whether a pass through such modules may be recorded.
    """

    def __init__(self, model: "GPT2Model") -> None:
        everything = list(model.modules())
        modules = self._modules = everything[1:]  # without the model, which this must not keep
        self._classes = list(map(type, modules))
        # Modes, scales, replaced methods and children are values of these.
        self._tables = [vars(module) for module in everything]
        self._tables += [module._modules for module in everything if module._modules]
        self._values = [*chain.from_iterable(map(dict.values, self._tables))]
        self._empty = [getattr(module, name) for module in everything for name in _MUST_BE_EMPTY]
        self._parameter_tables = [m._parameters for m in everything if m._parameters]
        self._parameters: list[Any] = [
            *chain.from_iterable(map(dict.values, self._parameter_tables))
        ]
        self._ids = [*map(id, self._parameters)]
        self.usable = self._usable()
        self._addresses = [*map(Tensor.data_ptr, self._parameters)] if self.usable else []

    def _usable(self) -> bool:
        if not self._parameters or not {*map(type, self._parameters)} <= {nn.Parameter, Tensor}:
            return False
        kinds = {(p.dtype, p.device, p.layout) for p in self._parameters}
        dtype, _, layout = next(iter(kinds))
        return (
            len(kinds) == 1
            and dtype in DTYPES
            and layout == torch.strided
            and all(kind in _KNOWN for kind in self._classes)
            and not any("forward" in table for table in self._tables)
            and not any(m.training for m in self._modules if type(m) in _DROPPING)
        )

    def same_memory(self) -> bool:
        """Whether the parameters are the same, and where they were."""
        parameters = chain.from_iterable(map(dict.values, self._parameter_tables))
        return [*map(id, parameters)] == self._ids and (
            not self.usable or [*map(Tensor.data_ptr, self._parameters)] == self._addresses
        )

    def same_work(self) -> bool:
        """Whether the modules are the same, and do what they did, but for hooks."""
        try:
            return [*map(type, self._modules)] == self._classes and (
                [*chain.from_iterable(map(dict.values, self._tables))] == self._values
            )
        except (RuntimeError, ValueError):  # two arrays, which do not say whether they are equal
            return False

    def hooked(self) -> bool:
        """Whether somebody has hooked a module, and is to see this pass."""
        return any(self._empty) or _has_any_global_hook()


class _Recording:
    """A pass over ``[B, T]`` tokens in memory that stays.

    Attributes:
        ids, positions: what it reads.
        layers: keys and values, ``[L, 2, B, H, capacity, D]``, where a cache is wanted.
        hidden: what it leaves, ``[B, T, C]``.
    """

    def __init__(self, ids: Tensor, positions: Tensor, layers: Tensor | None) -> None:
        self.ids, self.positions, self.layers = ids, positions, layers
        self.hidden: Tensor | None = None

    def evaluate(self, model: "GPT2Model") -> None:
        """The pass itself. Given positions keep it from being replayed in its turn."""
        layers = self.layers
        past = None if layers is None else KVCache._of(_Storage(list(layers.unbind()), 0), 0)
        self.hidden = model.forward(
            self.ids,
            past_key_values=past,
            position_ids=self.positions,
            use_cache=layers is not None,
            return_dict=True,
        )[0]


class _Replays:
    """The recordings of one model. They do not keep it alive."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._modules: _Modules | None = None
        self._changes = 0  # of the modules since a pass was recorded
        self._replayer: Any = None
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._sights_when_full = _SIGHTS_WHEN_FULL
        self._sights: OrderedDict[Hashable, int] = OrderedDict()
        self._refused: set[Hashable] = set()
        # Keys and values of all recordings lie here, one after the other in time: each is copied
        # before the next is replayed.
        self._room: Tensor | None = None

    def wants(self, model: "GPT2Model", key: Hashable) -> bool:
        """Whether this pass is to be replayed, or recorded; it counts as seen.

        Of one that is replayed `holds` is to be asked before its results are used.
        """
        modules = self._modules
        if self._changes > _MOST_CHANGES:
            return False
        if (
            modules is None
            or not modules.same_memory()
            or not (key in self._recordings or modules.same_work())
        ):
            self._changes += 1
            self.forget()
            modules = self._modules = _Modules(model)
            self._sights.clear()
            self._refused.clear()
        if not modules.usable or modules.hooked() or key in self._refused:
            return False
        if key in self._recordings:
            return True
        sights = self._sights.pop(key, 0) + 1
        self._sights[key] = sights
        if len(self._sights) > _MOST_SEEN:
            self._sights.popitem(last=False)
        return sights >= (_SIGHTS if len(self._recordings) < _MOST else self._sights_when_full)

    def holds(self) -> bool:
        """Whether the modules would have computed what was replayed; if not, all is dropped."""
        if self._modules is None or self._modules.same_work():
            return True
        self._modules = None
        self.forget()
        return False

    def run(
        self, model: "GPT2Model", key: Hashable, ids: Tensor, cache: bool
    ) -> tuple[Tensor, KVCache | None] | None:
        """Hidden states and cache of one pass; None where there is no memory for it."""
        try:
            return self._run(model, key, ids, cache)
        except (MemoryError, RuntimeError) as error:
            # Here, because the engine's package imports the models.
            from gpt2fast.engine.runner import is_out_of_memory

            if not is_out_of_memory(error):
                warnings.warn(
                    f"a forward pass cannot be recorded, and runs as it is: {error}", stacklevel=5
                )
        # Out of the block above, whose traceback holds on to memory.
        self._refused.add(key)
        self.forget()
        from gpt2fast.engine.graphs import empty_cache

        with contextlib.suppress(RuntimeError):
            empty_cache()
        return None

    def _run(
        self, model: "GPT2Model", key: Hashable, ids: Tensor, cache: bool
    ) -> tuple[Tensor, KVCache | None]:
        if self._replayer is None:
            from gpt2fast.engine.graphs import Replayer

            self._replayer = Replayer(model.wpe.weight.device)
        with self._replayer.ordered():
            recording = self._recordings.get(key)
            if recording is None:
                recording = self._record(model, key, ids, cache)
            else:
                self._recordings.move_to_end(key)
                recording.ids.copy_(ids)
                self._replayer.run(key, partial(recording.evaluate, model))
            return self._copied(recording, ids.shape[1])

    def _record(self, model: "GPT2Model", key: Hashable, ids: Tensor, cache: bool) -> _Recording:
        if len(self._recordings) >= _MOST:
            oldest = next(iter(self._recordings))
            self._replayer.forget(oldest)
            del self._recordings[oldest]
            self._sights_when_full *= 2
        # Static tensors are ordinary ones whatever mode the caller is in.
        with torch.inference_mode(False), torch.no_grad(), self._replayer.stream():
            static = torch.empty(ids.shape, dtype=torch.long, device=model.wpe.weight.device)
            static.copy_(ids)
            positions = torch.arange(ids.shape[1], device=static.device)[None]
            layers = self._layers(model, ids) if cache else None
            recording = _Recording(static, positions, layers)
            # Once as it is, for what libraries set up on a stream and kernels compile for a layout.
            for _ in range(2):
                self._replayer.run(key, partial(recording.evaluate, model))
        self._recordings[key] = recording
        self._changes = 0
        self._sights.pop(key, None)
        return recording

    def _layers(self, model: "GPT2Model", ids: Tensor) -> Tensor:
        shape = cache_shape(model, ids)
        size, weight = math.prod(shape), model.wpe.weight
        if self._room is None or len(self._room) < size:
            # Doubled, so that those that earlier recordings keep add up to no more than the last.
            least = 0 if self._room is None else 2 * len(self._room)
            self._room = torch.empty(max(size, least), dtype=weight.dtype, device=weight.device)
        return self._room[:size].view(shape)

    def _copied(self, recording: _Recording, length: int) -> tuple[Tensor, KVCache | None]:
        """What a pass left, in the caller's memory: the next one writes over it."""
        assert recording.hidden is not None
        hidden = torch.empty_like(recording.hidden).copy_(recording.hidden)
        if recording.layers is None:
            return hidden, None
        layers = torch.empty_like(recording.layers).copy_(recording.layers)
        return hidden, KVCache._of(_Storage(list(layers.unbind()), length), length)

    def forget(self) -> None:
        """Drop all recordings, and what they hold."""
        if self._replayer is not None:
            self._replayer.forget()
        self._recordings.clear()
        self._room = None


_KEPT: weakref.WeakKeyDictionary[nn.Module, _Replays] = weakref.WeakKeyDictionary()
_TABLE = threading.RLock()  # reentrant: the garbage collector may drop a model meanwhile
_INHERITED: list[_Replays] = []


def _start_anew() -> None:
    """In a forked process: it has not the threads that may hold a lock, nor the use of a GPU."""
    global _KEPT, _TABLE
    _INHERITED.extend(_KEPT.values())  # not freed: that would call CUDA
    _KEPT, _TABLE = weakref.WeakKeyDictionary(), threading.RLock()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_start_anew)


def cache_shape(model: "GPT2Model", ids: Tensor) -> tuple[int, ...]:
    """Of all layers' keys and values, with the room that a forward pass leaves for one more."""
    config = model.config
    capacity = _round_up(ids.shape[1] + 1)
    return config.n_layer, 2, ids.shape[0], config.n_head, capacity, config.head_size


def replayed(
    model: "GPT2Model", input_ids: Tensor, use_cache: bool
) -> tuple[Tensor, KVCache | None] | None:
    """A pass over ids ``[..., T]`` from position 0 on, autograd off, if it may be replayed.

    Returns:
        Hidden states ``[B, T, C]``, and the cache where it is wanted, in memory of their own; None
        where the modules are to be called.

    Raises:
        ValueError: ids out of range.
    """
    weight = getattr(model.wpe, "weight", None)
    if (
        not ENABLED
        or getattr(model, "_is_replica", False)  # of DataParallel, made anew for every pass
        or not isinstance(weight, Tensor)
        or weight.device.type not in _DEVICES
        or not isinstance(input_ids, Tensor)
        or input_ids.device.type not in ("cpu", weight.device.type)
        or input_ids.dim() == 0
        or not 0 < input_ids.numel() <= _MOST_TOKENS
        or input_ids.shape[-1] > model.config.n_positions
        or not _unobserved((input_ids, weight), ())
        or torch.is_autocast_enabled(weight.device.type)
        or (weight.is_cuda and torch.cuda.is_current_stream_capturing())
        or not serves(weight.device)
    ):
        return None
    ids = input_ids.reshape(-1, input_ids.shape[-1])
    if use_cache and math.prod(cache_shape(model, ids)) * weight.element_size() > _MOST_CACHE:
        return None
    # What PyTorch's products depend on besides their operands, where cuBLAS serves.
    matmul = torch.backends.cuda.matmul
    key = (
        *(*ids.shape, bool(use_cache), selected_backend(), matmul.fp32_precision),
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
    )
    replays = _KEPT.get(model)
    if replays is None:
        with _TABLE:
            replays = _KEPT.setdefault(model, _Replays())
    with replays.lock:
        if not replays.wants(model, key):
            return None
        check_range("input_ids", input_ids, model.config.embedding_rows)
        result = replays.run(model, key, ids, use_cache)
        return result if replays.holds() else None


def forget(model: nn.Module) -> None:
    """Give back what is recorded of a model, whose parameters are about to move."""
    if _KEPT:
        with _TABLE:
            replays = _KEPT.pop(model, None)
        if replays is not None:
            with replays.lock:
                replays.forget()
