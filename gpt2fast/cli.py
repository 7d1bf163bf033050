"""The command line: ``gpt2fast generate``, ``score``, ``train`` and ``info``.

Torch is loaded by the commands, not by the parser: ``--help`` and mistakes in the options answer at
once. Exit status: 0, 1 after an error, 2 for a mistake in the options, 130 after Ctrl-C, 141 where
the reader of the output has gone (as ``| head`` does).
"""

import argparse
import json
import os
import secrets
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from gpt2fast.benchmark.options import add_arguments as add_bench_arguments
from gpt2fast.scoring import command as scoring
from gpt2fast.training import add_arguments as add_train_arguments
from gpt2fast.version import __version__

if TYPE_CHECKING:
    import torch

    from gpt2fast.generation import StreamStep

_INTERRUPTED = 128 + 2
_BROKEN_PIPE = 128 + 13


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; the chosen one's function is left in ``run``."""
    parser = argparse.ArgumentParser(prog="gpt2fast", description="GPT-2 on any machine.")
    parser.add_argument("--version", action="version", version=f"gpt2fast {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate",
        help="continue a text",
        description="Continue a text, printing it as it is generated. The prompt is the argument, "
        "or a file, or what comes in through a pipe; one newline at the end of these is dropped.",
    )
    _add_generate_arguments(generate)
    generate.set_defaults(run=_generate)

    info = commands.add_parser(
        "info",
        help="what this machine would use, and why",
        description="Versions, devices, what each op runs on, and the checkpoints at hand.",
    )
    info.add_argument("--json", action="store_true", help="as a JSON object")
    info.set_defaults(run=_info)

    bench = commands.add_parser(
        "bench",
        help="how fast this machine is, beside other runtimes",
        description="Measure greedy decoding and a prompt on this machine's CPU beside every "
        "other runtime of GPT-2 that is installed, answers compared first. Weights are random; "
        "those that are not installed are named.",
    )
    add_bench_arguments(bench)
    bench.set_defaults(run=_bench)

    train = commands.add_parser(
        "train",
        help="train or fine-tune on text files",
        description="Train a GPT-2 on text files, from scratch or from a checkpoint.",
    )
    add_train_arguments(train)
    train.set_defaults(run=_train)

    score = commands.add_parser(
        "score",
        help="how likely a model finds texts: log-probabilities and perplexity",
        description="The log-probability of texts under a model, as JSON Lines in the order of the "
        "files: n_tokens, n_scored, log_prob in nats and perplexity of each, then the perplexity "
        "of all on standard error.",
    )
    scoring.add_arguments(score)
    score.set_defaults(run=scoring.run)
    return parser


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to continue")
    prompt.add_argument("--file", metavar="FILE", help="read the prompt from a UTF-8 file")
    parser.add_argument(
        "--model",
        default="gpt2",
        help="a preset (distilgpt2, gpt2, gpt2-medium, gpt2-large, gpt2-xl) or another repository "
        "of the Hub, a folder, a file, or 'bundled': the small one inside this package, which "
        "needs no network (default: %(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=100, metavar="N", help="%(default)s"
    )
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end after this text")
    parser.add_argument(
        "--slide",
        action="store_true",
        help="where the model's context is full, go on from its last half instead of ending",
    )
    parser.add_argument(
        "--prompt-lookup",
        type=positive,
        metavar="N",
        help="propose up to N tokens at once where the text repeats itself: the same text, sooner",
    )
    parser.add_argument("--no-prompt", action="store_true", help="print the continuation alone")
    parser.add_argument("--json", action="store_true", help="one JSON object when it is finished")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--greedy", action="store_true", help="always the likeliest token")
    sampling.add_argument("--temperature", type=float, default=0.8, metavar="T", help="%(default)s")
    sampling.add_argument(
        "--top-k", type=int, default=40, metavar="K", help="the K likeliest (%(default)s; 0: all)"
    )
    sampling.add_argument("--top-p", type=float, metavar="P", help="the likeliest that sum to P")
    sampling.add_argument(
        "--min-p", type=float, metavar="P", help="those of at least P times the likeliest's"
    )
    sampling.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1 avoids")
    sampling.add_argument("--seed", type=int, help="repeats a run (default: a new one each time)")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="default: cuda where there is one, else cpu")
    machine.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights (%(default)s)",
    )
    machine.add_argument(
        "--quantize",
        choices=("int8", "fp16", "int4"),
        help="round weights while loading: int8 is fastest on a CPU, fp16 loses next to nothing",
    )
    machine.add_argument(
        "--compile",
        action="store_true",
        help="with int8 weights on a CPU: compile the decoding steps, which shortens them by "
        "up to a third; takes half a minute, once for a model's shape, and a C++ compiler",
    )
    machine.add_argument("--threads", type=positive, metavar="N", help="CPU threads")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after ``gpt2fast``; by default the process's.

    Returns:
        The exit status; see the module.

    Raises:
        SystemExit: with 2 for a mistake in the options, 0 after ``--help`` and ``--version``.
    """
    args = build_parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status: int = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # What is still buffered has nowhere to go, at the interpreter's exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except UsageError as error:
        return _fail(error, 2)
    except (ValueError, OSError) as error:
        return _fail(error, 1)


class UsageError(ValueError):
    """A mistake in the options that the parser cannot see."""


def _fail(error: Exception, status: int) -> int:
    print(f"gpt2fast: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"gpt2fast: warning: {message}", file=sys.stderr)


def _info(args: argparse.Namespace) -> int:
    from gpt2fast.info import collect, report

    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else report(facts))
    return 0


def _bench(args: argparse.Namespace) -> int:
    from gpt2fast.benchmark.command import run

    return run(args)


def _train(args: argparse.Namespace) -> int:
    from gpt2fast.training import run

    return run(args)


def _generate(args: argparse.Namespace) -> int:
    prompt = _read_prompt(args.prompt, args.file)
    import torch

    from gpt2fast.checkpoint.vocabulary import tokenizer_of
    from gpt2fast.engine import compile_decoding
    from gpt2fast.generation.options import GenerationOptions
    from gpt2fast.model import GPT2LMHeadModel

    device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = tokenizer_of(args.model)
    seed = secrets.randbits(32) if args.seed is None else args.seed
    options = {
        "max_new_tokens": args.max_new_tokens,
        "do_sample": not args.greedy,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "stop_strings": args.stop,
        "context_policy": "slide" if args.slide else "stop",
        "prompt_lookup_num_tokens": args.prompt_lookup,
        "seed": seed,
        "tokenizer": tokenizer,
    }
    try:
        GenerationOptions.of(options)  # before a model is fetched in vain
    except ValueError as error:
        raise UsageError(error) from error
    model = GPT2LMHeadModel.from_pretrained(
        args.model, dtype=args.dtype, device=device, quantize=args.quantize
    )
    if args.compile:
        compile_decoding(model)
    ids = tokenizer.encode(prompt)
    if len(ids) > (limit := model.config.n_positions):
        if not args.slide:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and the model's context {limit} positions; "
                "--slide goes on from the last of them"
            )
        ids = ids[-max(limit // 2, 1) :]  # as sliding does; what is not read is not counted
    result = _Result(prompt, len(ids), seed)
    interrupted = False
    steps = model.stream([ids], **options)
    if not args.json:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character
        _write("" if args.no_prompt else prompt)
    try:
        for text in result.take(steps):
            if not args.json:
                _write(text)
    except KeyboardInterrupt:
        interrupted, result.ended = True, "interrupted"
    if args.json:
        print(json.dumps(result.as_dict()))
    else:
        _write("\n")
        print(result.summary(), file=sys.stderr)
    return _INTERRUPTED if interrupted else 0


class _Result:
    """A continuation as it grows, and how long it took."""

    def __init__(self, prompt: str, prompt_tokens: int, seed: int) -> None:
        self.prompt, self.prompt_tokens, self.seed = prompt, prompt_tokens, seed
        self.text = ""
        self.tokens = 0
        self.ended = "length"
        self.prefill_seconds = self.decode_seconds = 0.0

    def take(self, steps: "Iterator[StreamStep]") -> Iterator[str]:
        """Pass the steps' text on, noting the rest.

        The first step reads the prompt: its time is prefill, that of all others decode.
        """
        before = time.perf_counter()
        for step in steps:
            now = time.perf_counter()
            if self.tokens == 0:
                self.prefill_seconds = now - before
            else:
                self.decode_seconds += now - before
            (text,) = step.text or [""]
            self.text += text
            self.tokens += 1
            self.ended = step.finish_reasons[0] or self.ended
            yield text
            before = time.perf_counter()

    def summary(self) -> str:
        """One line for people."""
        decoded = max(self.tokens - 1, 0)
        return (
            f"prefill {_rate(self.prompt_tokens, self.prefill_seconds)}; "
            f"decode {_rate(decoded, self.decode_seconds)}; ended by {self.ended}; seed {self.seed}"
        )

    def as_dict(self) -> dict[str, Any]:
        """The same for programs."""
        return dict(vars(self))


def _rate(tokens: int, seconds: float) -> str:
    speed = f" ({tokens / seconds:,.1f} tokens/s)" if tokens and seconds else ""
    return f"{tokens} tokens in {seconds:.3f} s{speed}"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _read_prompt(argument: str | None, file: str | None) -> str:
    """The prompt from the argument, the file or a pipe.

    Raises:
        UsageError: there is none of them.
        ValueError: it is empty or not UTF-8.
        OSError: the file cannot be read.
    """
    if argument is not None:
        source, data = "PROMPT", os.fsencode(argument)
    elif file is not None:
        source, data = file, Path(file).read_bytes()
    elif sys.stdin is None or sys.stdin.isatty():
        raise UsageError("give a PROMPT, a --file, or text through a pipe")
    else:
        source, data = "standard input", sys.stdin.buffer.read()
    try:
        prompt = data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise ValueError(f"{source} is not UTF-8: byte {byte:#04x} at {error.start}") from error
    if argument is None:
        prompt = prompt.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")
    if not prompt:
        raise ValueError(f"the prompt is empty: {source} holds no text")
    return prompt


def pick_device(name: str | None) -> "torch.device":
    """The device of ``--device``: the one named, else the first GPU, else the CPU.

    Raises:
        ValueError: it names no device that is here.
    """
    import torch

    count = torch.cuda.device_count()
    try:
        device = torch.device(name or ("cuda" if count else "cpu"))
    except RuntimeError as error:
        raise UsageError(f"--device must be cpu, cuda or cuda:N; got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"--device {name}: PyTorch sees {count} CUDA devices")
    return device


def positive(text: str) -> int:
    """The type of options that count something."""
    value = int(text)
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"must be from 1 to {2**31 - 1}; got {value}")
    return value
