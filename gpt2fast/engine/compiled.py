"""Compiled decoding steps: built once for a shape on this machine, kept in files, loaded in
milliseconds.

`compile_decoding` is what users call. What it compiles, `compiled_graph`, is packaged by PyTorch's
AOTInductor into a shared library that takes the weights as arguments. It serves every model of that
shape; a step loads it without the compiler, and so without the seconds that importing that takes.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gpt2fast.engine import compiled_graph
from gpt2fast.engine.runner import first_line
from gpt2fast.engine.weights import why_not
from gpt2fast.files import cache_folder
from gpt2fast.layers import GPT2Block, LayerNorm
from gpt2fast.quantized_layers import QuantizedConv1D, QuantizedHead

if TYPE_CHECKING:
    from gpt2fast.generation.decoding import LanguageModel

LEAST = 2  # positions, with the token's own: the compiler takes other lengths for constants
_FILES = ("layer.pt2", "head.pt2")
_RECORD = "record.json"


class CannotCompile(RuntimeError):
    """What the compiler says, or that there is none."""


@dataclass(frozen=True)
class Shape:
    """What a compiled step is made for."""

    heads: int
    head_size: int
    inner: int
    vocab_size: int
    scale: float
    eps: float

    @property
    def width(self) -> int:
        return self.heads * self.head_size

    @classmethod
    def of(cls, model: "LanguageModel") -> "Shape":
        """That of a model.

        Raises:
            ValueError: one that has no compiled step, with the reason.
        """
        reason = why_not(model) or _why_not_compiled(model)
        if reason is not None:
            raise ValueError(f"this model's decoding cannot be compiled: {reason}")
        config, block = model.config, _blocks(model)[0]
        return cls(
            heads=config.n_head,
            head_size=config.head_size,
            inner=config.inner_size,
            vocab_size=config.vocab_size,
            scale=block.attn.scaling,
            eps=block.ln_1.eps,
        )

    def folder(self) -> Path:
        """Where its files are, or would be: another one for another CPU, PyTorch or source."""
        facts = {
            **asdict(self),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "cpu": _instructions(),
            "options": _options(),
            "source": Path(compiled_graph.__file__).read_text(encoding="utf-8"),
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return cache_folder("compiled").expanduser() / digest[:32]


class CompiledStep:
    """The step of one sequence of a model, on files that are there.

    Args:
        model: its weights are read where they lie, int8 as in a file.
        folder: of `Shape.folder`.
    """

    def __init__(self, model: "LanguageModel", folder: Path) -> None:
        # One thread at a time calls it: the engine's lock is held.
        self._layer, self._head = (_load(folder / name) for name in _FILES)
        self._threads = torch.get_num_threads()
        self._weights = [_layer_weights(block) for block in _blocks(model)]
        self._head_weights = [*_norm(model.transformer.ln_f), *_integers(model.lm_head)[:2]]
        self._places = torch.arange(model.config.n_positions, device="cpu")

    def serves(self, past: int, capacity: int) -> bool:
        """Whether it can evaluate the token at position ``past`` of a cache."""
        # The compiler has assumed that the cache is longer than what is read of it. Compiled loops
        # have buffers for as many threads as there were.
        return LEAST <= past + 1 < capacity and torch.get_num_threads() == self._threads

    def __call__(self, hidden: Tensor, cache: Tensor, past: int) -> Tensor:
        """Evaluate a token and cache its keys and values.

        Args:
            hidden: its embedding ``[C]`` float32.
            cache: ``[2 L, H, capacity, D]`` float32, keys and values of each layer in turn.
            past: its position.

        Returns:
            logits ``[V]``.
        """
        places, layers = self._places[: past + 1], cache.unbind(0)
        for i, weights in enumerate(self._weights):
            args = [hidden, places, layers[2 * i], layers[2 * i + 1], *weights]
            hidden = self._layer.boxed_run(args)[0]
        logits: Tensor = self._head.boxed_run([hidden, *self._head_weights])[0]
        return logits


_ASKED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def compile_decoding(model: "LanguageModel") -> "LanguageModel":
    """Let `generate`, `stream` and new engines of this model decode by compiled steps.

    For int8 models on a CPU: one sequence then takes 55 to 75% of the time (as
    `bench/results/cpu` has it), with activations of 16 bits instead of 8. Several at once, prompts
    and proposed tokens are evaluated as before, so tokens that are nearly level may come out
    otherwise there than alone.

    Compiles for some 30 seconds where it has not been done for such a model on this machine, and
    keeps the result in files (in ``$XDG_CACHE_HOME`` or ``~/.cache``, folder
    ``gpt2fast/compiled``), so that other models of the same shape, and later processes, take
    milliseconds. The number of PyTorch's threads counts: with another one, steps are not compiled.

    Where there is no C++ compiler, or its result is not faster here, a warning says so and the
    model decodes as before. What `gpt2fast info` says of it: `compiler`.

    Args:
        model: quantised to int8, on the CPU.

    Returns:
        the model.

    Raises:
        ValueError: another model.
    """
    from gpt2fast.engine.kept import release

    shape = Shape.of(model)
    folder = shape.folder()
    try:
        if _record(folder) is None:
            _build(model, shape, folder)
        record = _record(folder)
        if record is None:
            raise CannotCompile(f"{folder} does not belong to this user alone")
    except CannotCompile as error:
        warnings.warn(f"decoding is not compiled: {error}", stacklevel=2)
        return model
    if not record.is_faster:
        warnings.warn(
            f"decoding is not compiled: here a token takes {record.compiled_ms:.1f} ms so, and "
            f"{record.plain_ms:.1f} ms without",
            stacklevel=2,
        )
        return model
    _ASKED.add(model)
    release(model)
    return model


def step_of(model: "LanguageModel") -> CompiledStep | None:
    """The compiled step of a model of which `compile_decoding` was asked; None without."""
    if model not in _ASKED:
        return None
    try:
        folder = Shape.of(model).folder()
    except ValueError:
        return None  # it has been changed since
    record = _record(folder)
    if record is None or not record.is_faster:
        return None
    try:
        return CompiledStep(model, folder)
    except CannotCompile as error:
        warnings.warn(f"decoding is not compiled: {error}", stacklevel=2)
        return None


def compiler() -> str | None:
    """The C++ compiler that would be used; None if there is none."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


@dataclass(frozen=True)
class _Record:
    """Of files that are complete: what a token took when they were made."""

    plain_ms: float
    compiled_ms: float

    @property
    def is_faster(self) -> bool:
        return self.compiled_ms < self.plain_ms


def _record(folder: Path) -> _Record | None:
    """None where there are no files, or others may have written them: they are executed."""
    try:
        if os.name == "posix":
            for path in (folder.parent, folder, *(folder / name for name in _FILES)):
                about = path.stat()
                if about.st_uid != os.getuid() or about.st_mode & 0o022:
                    return None
        return _Record(**json.loads((folder / _RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _build(model: "LanguageModel", shape: Shape, folder: Path) -> None:
    """Compile, check, measure; the folder is there when all is done.

    Raises:
        CannotCompile: the compiler fails, or what it made is wrong.
    """
    if compiler() is None:
        raise CannotCompile("there is no C++ compiler (CXX, or g++)")
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as temporary:
        made = Path(temporary) / "made"
        made.mkdir(mode=0o700)
        with torch.inference_mode(False), torch.no_grad():
            _compile(shape, made)
            record = _measured(model, shape, made)
        (made / _RECORD).write_text(json.dumps(asdict(record)), encoding="utf-8")
        for path in made.iterdir():
            path.chmod(0o600)
        with contextlib.suppress(OSError):  # another process was first: its files will do
            made.rename(folder)


def _compile(shape: Shape, folder: Path) -> None:
    """Write the two files."""
    import torch._inductor

    layer = compiled_graph.Layer(shape.heads, shape.scale, shape.eps)
    head = compiled_graph.Head(shape.eps)
    count, capacity = torch.export.Dim("count", min=LEAST), torch.export.Dim("capacity")
    fixed: tuple[Any, ...] = (None, (None,) * 2, (None,) * 3)
    dynamic = (None, {0: count}, {1: capacity}, {1: capacity})
    dynamic += tuple(fixed[i] for i in (1, 2, 2, 1, 2, 2))
    tasks = (
        (layer, _layer_example(shape), dynamic, folder / _FILES[0]),
        (head, _head_example(shape), None, folder / _FILES[1]),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch, about itself
            for module, args, shapes, path in tasks:
                program = torch.export.export(
                    module,
                    args,
                    dynamic_shapes=shapes,
                    strict=False,
                    prefer_deferred_runtime_asserts_over_guards=True,
                )
                torch._inductor.aoti_compile_and_package(
                    program, package_path=str(path), inductor_configs=_options()
                )
    except Exception as error:  # of the compiler's many kinds
        raise CannotCompile(first_line(error)) from error


def _options() -> dict[str, Any]:
    """Inductor's."""
    options: dict[str, Any] = {
        # Not the flag for unsafe arithmetic: with it GCC links a start-up file by which the whole
        # process rounds the smallest numbers to 0.
        "cpp.enable_floating_point_contract_flag": "fast",
        # Work for two threads begins at rows of matrices, not at a row of the width.
        "cpp.min_chunk_size": 2048,
        # Allocating what lies between a layer's loops took a twentieth of its time.
        "aot_inductor.allow_stack_allocation": True,
    }
    if platform.machine() in ("x86_64", "AMD64"):
        # Inductor turns the compiler's own vectors off, as it writes them out where it can.
        options["cpp.march"] = "native -ftree-loop-vectorize"
    return options


def _instructions() -> str:
    """What tells CPUs apart that cannot run each other's code."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"


def _load(path: Path) -> Any:
    # The public function imports the compiler first, which takes seconds.
    try:
        return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
    except RuntimeError as error:
        raise CannotCompile(f"{path}: {first_line(error)}") from error


def _why_not_compiled(model: "LanguageModel") -> str | None:
    if model.device.type != "cpu":
        return f"it is on {model.device}; a GPU's steps are captured instead"
    modules: list[nn.Module] = [model.lm_head]
    for block in _blocks(model):
        modules += [block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj]
    for module in modules:
        if not isinstance(module, QuantizedConv1D | QuantizedHead) or module.bits != 8:
            return 'it is not quantised to int8 (quantize="int8")'
    if len({(block.attn.scaling, block.ln_1.eps, block.ln_2.eps) for block in _blocks(model)}) > 1:
        return "its layers scale attention, or normalise, differently"
    return None


def _blocks(model: "LanguageModel") -> list[GPT2Block]:
    return [block for block in model.transformer.h if isinstance(block, GPT2Block)]


def _norm(module: LayerNorm) -> list[Tensor]:
    return [module.weight.detach().float(), module.bias.detach().float()]


def _integers(module: nn.Module) -> list[Tensor]:
    """Weight, scale and bias of a quantised module."""
    assert isinstance(module, QuantizedConv1D | QuantizedHead)
    assert module.scale is not None
    bias = torch.empty(0, device="cpu") if module.bias is None else module.bias.float()
    return [module.weight, module.scale, bias]


def _layer_weights(block: GPT2Block) -> list[Tensor]:
    """In the order of `compiled_graph.Layer`."""
    attn, mlp = block.attn, block.mlp
    return [
        *(*_norm(block.ln_1), *_integers(attn.c_attn), *_integers(attn.c_proj)),
        *(*_norm(block.ln_2), *_integers(mlp.c_fc), *_integers(mlp.c_proj)),
    ]


def _layer_example(shape: Shape) -> tuple[Any, ...]:
    """Arguments of `compiled_graph.Layer`, with lengths that it will meet."""
    width, inner, count, capacity = shape.width, shape.inner, 300, 700

    def matrix(outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
        integers = torch.randint(-127, 128, (outputs, inputs), generator=source, device="cpu").to(
            torch.int8
        )
        return integers, random(outputs).mul_(1e-3), random(outputs)

    def random(*sizes: int) -> Tensor:
        return torch.rand(sizes, dtype=torch.float32, generator=source, device="cpu")

    source = torch.Generator("cpu").manual_seed(0)
    cached = [random(shape.heads, capacity, shape.head_size) for _ in range(2)]
    return (
        random(width).sub_(0.5),
        torch.arange(count, device="cpu"),
        *cached,
        (random(width), random(width)),
        matrix(3 * width, width),
        matrix(width, width),
        (random(width), random(width)),
        matrix(inner, width),
        matrix(width, inner),
    )


def _head_example(shape: Shape) -> tuple[Any, ...]:
    hidden, _, _, _, norm, (integers, scale, _), *_ = _layer_example(shape)
    vocab = shape.vocab_size
    repeats = -(-vocab // len(scale))
    return hidden, norm, integers.repeat(repeats, 1)[:vocab], scale.repeat(repeats)[:vocab]


def _measured(model: "LanguageModel", shape: Shape, folder: Path) -> _Record:
    """Check the compiled files against what was compiled, and time tokens with and without them.

    Raises:
        CannotCompile: they compute something else.
    """
    from gpt2fast.engine.engine import Engine
    from gpt2fast.engine.torch_runner import TorchRunner

    for name, module, args in (
        (
            _FILES[0],
            compiled_graph.Layer(shape.heads, shape.scale, shape.eps),
            _layer_example(shape),
        ),
        (_FILES[1], compiled_graph.Head(shape.eps), _head_example(shape)),
    ):
        found = [tensor.clone() for tensor in _flat(args)]  # some are written to
        found += _load(folder / name).boxed_run([*found])
        expected = [*_flat(args), module(*args)]
        for ours, right in zip(found, expected, strict=True):
            error = (ours - right).abs().max() / right.abs().max()
            if not error < 1e-3:  # another rounding of an activation is some 1e-4
                raise CannotCompile(f"the compiled {name} is off by {float(error):.2g}")

    steps = CompiledStep(model, folder), None
    prompt = list(range(min(8, model.config.n_positions - 1, shape.vocab_size)))
    new = min(40, model.config.n_positions - len(prompt))
    best = []
    for step in (*steps, *steps):
        runner = TorchRunner(model, 1, len(prompt) + new, step)
        with Engine(model, 1, len(prompt) + new, runner=runner) as engine:
            engine.submit(prompt, max_new_tokens=new)
            times = []
            while engine.unfinished:
                start = time.perf_counter()
                engine.step()
                times.append(time.perf_counter() - start)
        best.append(1e3 * min(times[1:], default=0.0))  # the first evaluates the prompt
    return _Record(plain_ms=min(best[1::2]), compiled_ms=min(best[::2]))


def _flat(args: Sequence[Any]) -> list[Tensor]:
    return [tensor for arg in args for tensor in (arg if isinstance(arg, tuple) else (arg,))]
