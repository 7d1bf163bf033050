"""All benchmarks of a CPU, most important first, each within its share of the time.

    python -m bench.run                     # everything, in 40 minutes
    python -m bench.run --record            # and write bench/results/cpu/, after every case
    python -m bench.run --minutes 10 decode loading

No case begins after its benchmark's share has passed, so the last of them may end a few minutes
later, on the account of those after it; what a benchmark leaves goes to them as well. What there
was no time for is named in the record. Models are built before the clock starts. Afterwards
`python -m bench.report --write` makes the README's tables and the plots of the records.

Exit status: 0; 1 where a benchmark failed.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from gpt2fast.benchmark.progress import minutes

ROOT = Path(__file__).resolve().parents[1]
# Name -> minutes of forty. Those of one line are one file, bench_NAME.py.
SHARES = {
    "decode": 11.0,
    "prefill": 8.0,
    "loading": 3.0,
    "training": 5.0,
    "scoring": 3.0,
    "accelerate": 4.0,
    "ops": 4.0,
    "tokenizer": 2.0,
}
MODELS = ("gpt2", "gpt2-medium")


def benchmark(name: str, most: float, record: bool) -> bool:
    """Run one for so many seconds; whether it succeeded."""
    environment = {**os.environ, "GPT2FAST_BENCH_MINUTES": str(most / 60)}
    if record:
        environment["GPT2FAST_BENCH_RECORD"] = "1"
    file = f"bench/bench_{name}.py"
    command = [sys.executable, "-m", "pytest", file, "-q", "-s", "--benchmark-skip"]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=sum(SHARES.values()), metavar="M")
    parser.add_argument("--record", action="store_true", help="write bench/results/cpu")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SHARES)}")
    args = parser.parse_args()
    if unknown := set(args.names) - set(SHARES):
        parser.error(f"benchmarks are {', '.join(SHARES)}; got {', '.join(sorted(unknown))}")
    if not args.minutes > 0:
        parser.error(f"--minutes must be above 0; got {args.minutes}")
    names = [name for name in SHARES if name in args.names or not args.names]
    print("building models where they are not there yet", file=sys.stderr, flush=True)
    prepare = [sys.executable, "-m", "gpt2fast.benchmark.prepare", *MODELS]
    subprocess.run(prepare, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    begun, given = time.monotonic(), 60 * args.minutes
    failed = []
    for place, name in enumerate(names):
        left = given - (time.monotonic() - begun)
        most = max(left, 0) * SHARES[name] / sum(SHARES[other] for other in names[place:])
        print(
            f"\n[{minutes(given - left)} of {minutes(given)}] {name}: {place + 1} of {len(names)}, "
            f"up to {minutes(most)}; all ends within {minutes(max(left, 0))}",
            file=sys.stderr,
            flush=True,
        )
        if not benchmark(name, most, args.record):
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
