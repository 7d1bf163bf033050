"""The score command: its options, and what happens from the files to the summary."""

import argparse
import hashlib
import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2fast.scoring.files import Record
    from gpt2fast.scoring.results import Results
    from gpt2fast.scoring.scorer import Score


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``gpt2fast score`` to ``parser``."""
    from gpt2fast.cli import positive

    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help=".txt: documents separated by a line <|endoftext|>; .jsonl: an object a line, with "
        '"text" or "token_ids", and an "id" if you like',
    )
    parser.add_argument("--model", default="gpt2", help="as for generate (default: %(default)s)")
    parser.add_argument(
        "--tokens", action="store_true", help="write every token's id and log-probability too"
    )
    parser.add_argument(
        "--bos",
        action="store_true",
        help="put the beginning-of-text token before each text, so that its first token is scored",
    )
    parser.add_argument(
        "--max-length",
        type=positive,
        metavar="N",
        help="tokens of a window over a long text (default: the model's context)",
    )
    parser.add_argument(
        "--stride",
        type=positive,
        metavar="N",
        help="tokens from one window to the next; every token has max-length minus stride tokens "
        "before it (default: half of max-length)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FILE", help="JSON Lines (default: standard output)")
    output.add_argument(
        "--resume",
        action="store_true",
        help="after a kill go on with --out, if there is one, behind the texts that are in it",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--batch-tokens",
        type=positive,
        metavar="N",
        help="tokens that are evaluated at once (default: 512, on a GPU 16384)",
    )
    machine.add_argument("--device", help="default: cuda where there is one, else cpu")
    machine.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights (%(default)s)",
    )
    machine.add_argument(
        "--quantize", choices=("int8", "fp16", "int4"), help="round weights while loading"
    )
    machine.add_argument("--threads", type=positive, metavar="N", help="CPU threads")


def run(args: argparse.Namespace) -> int:
    """Score texts of files; the results are in the order of the files.

    Returns:
        The exit status 0.

    Raises:
        ValueError: a mistake in the options or the files, before anything is scored; a
            log-probability that is not finite.
        OSError: a file cannot be read or written.
    """
    from gpt2fast.cli import UsageError, pick_device

    if args.resume and not args.out:
        raise UsageError("--resume goes on with an --out; there is none")
    paths = [Path(name) for name in args.files]
    for path in paths:
        if path.suffix not in (".txt", ".jsonl"):
            raise UsageError(f"texts come from .txt and .jsonl files; got {path}")
        if not path.is_file():
            raise ValueError(f"{path} is no file: it is read twice, first to check it")
    import torch

    from gpt2fast.checkpoint.vocabulary import rules, tokenizer_of
    from gpt2fast.scoring.files import read, survey
    from gpt2fast.scoring.results import Results, SavedResults
    from gpt2fast.scoring.scorer import ProgressBar, Scorer

    device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = tokenizer_of(args.model)
    scorer = Scorer(
        args.model,
        tokenizer,
        stride=args.stride,
        max_length=args.max_length,
        batch_tokens=args.batch_tokens,
        add_bos=args.bos,
        dtype=args.dtype,
        device=device,
        quantize=args.quantize,
    )
    total, digest = survey(paths, scorer.vocab_size)
    settings = {
        "files": digest,
        "model": scorer.fingerprint(),
        "tokenizer": hashlib.sha256(repr(rules(tokenizer)).encode()).hexdigest()[:16],
        **{name: getattr(args, name) for name in ("tokens", "bos", "dtype", "quantize")},
        **{name: getattr(scorer, name) for name in ("max_length", "stride", "batch_tokens")},
        "device": device.type,
    }
    results = SavedResults(Path(args.out), settings, args.resume) if args.out else Results()
    waiting: deque[Record] = deque()

    def feed() -> Iterator[tuple[str, str | list[int]]]:
        for record in islice(chain.from_iterable(map(read, paths)), results.texts, None):
            waiting.append(record)
            yield record.place, record.text

    started, earlier = time.perf_counter(), results.n_scored
    # None: where standard error is a terminal.
    with results, ProgressBar(total, hidden=None, done=results.texts) as bar:
        for group in scorer.groups(feed(), bar.advance):
            results.append([_line(waiting.popleft(), score, args.tokens) for score in group])
    print(_summary(results, results.n_scored - earlier, started), file=sys.stderr)
    return 0


def _line(record: "Record", score: "Score", tokens: bool) -> dict[str, Any]:
    """A result as it is written: numbers to six decimals, null where there is none."""
    for place, value in enumerate(score.log_probs):
        if value is not None and not math.isfinite(value):
            raise ValueError(
                f"{record.place}: the log-probability of token {place} is {value}: the weights, or "
                "numbers too large for the dtype"
            )
    ratio = score.perplexity
    line = {
        **record.labels,
        "n_tokens": len(score.token_ids),
        "n_scored": score.n_scored,
        "log_prob": round(score.log_prob, 6),
        "perplexity": round(ratio, 6) if math.isfinite(ratio) else None,
    }
    if tokens:
        line["token_ids"] = score.token_ids
        line["log_probs"] = [None if v is None else round(v, 6) for v in score.log_probs]
    return line


def _summary(results: "Results", scored: int, started: float) -> str:
    """One line for people; the speed is that of this run alone."""
    seconds = time.perf_counter() - started
    return (
        f"{results.texts:,} texts, {results.n_scored:,} tokens scored: "
        f"perplexity {results.perplexity:,.4f}; "
        f"{scored:,} tokens in {seconds:.1f} s ({scored / seconds:,.0f} tokens/s)"
    )
