"""The options of ``gpt2fast bench``; loads nothing that the parser does not need."""

import argparse

from gpt2fast.config import PRESETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--model",
        "--size",
        choices=("tiny", *PRESETS),
        default="gpt2",
        help="whose sizes the weights have; 'tiny' tries the command out (%(default)s)",
    )
    parser.add_argument("--threads", type=_threads, metavar="N", help="all cores by default")
    parser.add_argument(
        "--minutes", type=_minutes, default=3.0, metavar="M", help="at most (%(default)g)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the record, after every case")


def _threads(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 1024:
        raise argparse.ArgumentTypeError(f"must be from 1 to 1024; got {value}")
    return value


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value <= 24 * 60:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1440; got {text}")
    return value
