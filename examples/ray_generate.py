"""Continue texts and score what came out, in two Ray actors.

    python examples/ray_generate.py
    python examples/ray_generate.py --model gpt2-xl --actors 8 --gpus 1 texts.jsonl out

Needs the extra `ray`. Started on a cluster, it runs on all of it. The same row gets the same text,
however many actors there are.
"""

import argparse
from pathlib import Path

import ray.data

from gpt2fast.integrations.batches import GenerateBatch, ScoreBatch

LINES = Path(__file__).with_name("texts.jsonl")


class WriteAndScore:
    """Both in one actor, with one copy of the weights."""

    def __init__(self, model: str) -> None:
        options = {"temperature": 0.8, "max_new_tokens": 20}
        self.write = GenerateBatch(model, column="text", id_column="id", **options)
        self.score = ScoreBatch(self.write.model, column="generated_ids", id_column="id")

    def __call__(self, batch: dict) -> dict:
        return self.score(self.write(batch))


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue and score texts of JSON Lines.")
    parser.add_argument("source", nargs="?", default=LINES, help='objects with "id" and "text"')
    parser.add_argument("out", nargs="?", help="a new folder for the results; default: print them")
    parser.add_argument("--model", default="bundled", help="a preset, a folder or a Hub name")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--cpus", type=float, default=0.5, help="of an actor; leave one to read")
    parser.add_argument("--gpus", type=float, default=0)
    parser.add_argument("--batch-size", type=int, default=4, help="rows an actor gets at once")
    args = parser.parse_args()

    scored = ray.data.read_json(str(args.source)).map_batches(
        WriteAndScore,
        fn_constructor_kwargs={"model": args.model},
        compute=ray.data.ActorPoolStrategy(size=args.actors),
        batch_size=args.batch_size,
        num_cpus=args.cpus,
        num_gpus=args.gpus,
    )
    if args.out:
        scored.write_json(args.out)
        return
    for row in sorted(scored.take_all(), key=lambda row: row["perplexity"]):
        print(f"{row['perplexity']:8.1f}  {row['text']}|{row['generated_text']}")


if __name__ == "__main__":
    main()
