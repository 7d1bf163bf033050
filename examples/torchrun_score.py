"""Score a file of JSON Lines with several processes, or continue its texts.

    torchrun --standalone --nproc-per-node 2 examples/torchrun_score.py
    torchrun --standalone --nproc-per-node 8 examples/torchrun_score.py \\
        --task generate --model gpt2-large texts.jsonl out.jsonl

Each process takes every n-th line, on the GPU of its rank where there is one. The same command
goes on after a kill, with any number of processes; results are in the order of the input.
"""

import argparse
import os
from pathlib import Path

from gpt2fast.integrations.batches import GenerateBatch, ScoreBatch
from gpt2fast.integrations.shards import map_lines

LINES = Path(__file__).with_name("texts.jsonl")
ADDED = {
    "score": ("log_prob", "n_scored"),
    "generate": ("generated_text", "finish_reason"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Score or continue texts of JSON Lines.")
    parser.add_argument("source", nargs="?", default=LINES, help='objects with "id" and "text"')
    parser.add_argument("out", nargs="?", default="scored.jsonl")
    parser.add_argument("--task", choices=sorted(ADDED), default="score")
    parser.add_argument("--model", default="bundled", help="a preset, a folder or a Hub name")
    parser.add_argument("--max-new-tokens", type=int, default=30)
    args = parser.parse_args()

    columns = {"column": "text", "id_column": "id"}
    if args.task == "score":
        run = ScoreBatch(args.model, add_bos=True, **columns)
    else:
        length = args.max_new_tokens
        run = GenerateBatch(args.model, temperature=0.8, max_new_tokens=length, **columns)

    def work(rows: list[dict]) -> list[dict]:
        batch = run({name: [row[name] for row in rows] for name in ("id", "text")})
        names = ("id", *ADDED[args.task])
        columns = (batch[name] for name in names)
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]

    settings = {"task": args.task, "model": args.model, "max_new_tokens": args.max_new_tokens}
    finished = map_lines(args.source, args.out, work, settings=settings)
    share = f"process {os.environ.get('RANK', 0)} is done with its lines"
    print(f"{share}; all are in {args.out}" if finished else share)


if __name__ == "__main__":
    main()
