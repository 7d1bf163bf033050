"""Continue texts and score what came out, in two Ray actors for each task.

    python examples/ray_generate.py
    python examples/ray_generate.py --model gpt2-xl --gpus 1 --actors 8 texts.jsonl out

Needs the extra `ray`. On a cluster, start it there: `ray.init` joins the one that is running. The
same row gets the same text, however many actors there are.
"""

import argparse
from pathlib import Path

import ray
import ray.data

from gpt2fast.integrations.batches import GenerateBatch, ScoreBatch

LINES = Path(__file__).with_name("texts.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue texts of JSON Lines, and score them.")
    parser.add_argument("source", nargs="?", default=LINES, help='objects with "id" and "text"')
    parser.add_argument("out", nargs="?", help="a folder for the results; default: print them")
    parser.add_argument("--model", default="bundled", help="a preset, a folder or a Hub name")
    parser.add_argument("--actors", type=int, default=2, help="of each of the two tasks")
    parser.add_argument("--gpus", type=float, default=0, help="of an actor")
    parser.add_argument("--batch-size", type=int, default=4, help="rows an actor gets at once")
    parser.add_argument("--max-new-tokens", type=int, default=20)
    args = parser.parse_args()

    # Two actors a task and one that reads: with fewer CPUs than these they would wait for ever.
    actors = {
        "compute": ray.data.ActorPoolStrategy(size=args.actors),
        "batch_size": args.batch_size,
        "num_cpus": 0.25,
        "num_gpus": args.gpus,
    }
    texts = ray.data.read_json(str(args.source), lines=True)
    options = {"temperature": 0.8, "max_new_tokens": args.max_new_tokens}
    columns = {"model": args.model, "id_column": "id"}
    written = texts.repartition(2 * args.actors).map_batches(
        GenerateBatch, fn_constructor_kwargs={"column": "text", **columns, **options}, **actors
    )
    scored = written.map_batches(
        ScoreBatch, fn_constructor_kwargs={"column": "generated_ids", **columns}, **actors
    )
    if args.out:
        scored.write_json(args.out)
    else:
        for row in sorted(scored.take_all(), key=lambda row: row["perplexity"]):
            print(f"{row['perplexity']:8.1f}  {row['text']}|{row['generated_text']}")


if __name__ == "__main__":
    main()
