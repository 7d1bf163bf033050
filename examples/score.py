"""Score texts: which words surprise the model, and which text it finds likelier.

    python examples/score.py
    python examples/score.py --model gpt2 novel.txt essay.txt

For large files there is `gpt2fast score`, which writes JSON Lines and goes on after a kill.
"""

import argparse
import json
from pathlib import Path

from gpt2fast import GPT2Tokenizer, Scorer

LINES = Path(__file__).with_name("texts.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description="Score texts.")
    parser.add_argument("files", nargs="*", metavar="FILE", help="text files; default: own lines")
    parser.add_argument("--model", default="bundled", help="a preset, a folder or a Hub name")
    args = parser.parse_args()

    if args.files:
        texts = {name: Path(name).read_text(encoding="utf-8-sig") for name in args.files}
    else:
        rows = map(json.loads, LINES.read_text(encoding="utf-8").splitlines())
        texts = {row["id"]: row["text"] for row in rows}

    # Texts longer than the context are scored in overlapping windows.
    scorer = Scorer(args.model, add_bos=True)
    tokenizer = GPT2Tokenizer()
    scores = dict(zip(texts, scorer(list(texts.values())), strict=True))
    print("perplexity  tokens  least expected  text")
    # An empty text has no perplexity: it comes last.
    for name, score in sorted(scores.items(), key=lambda s: (not s[1].n_scored, s[1].perplexity)):
        pairs = zip(score.log_probs, score.token_ids, strict=True)
        tokens = [token for _, token in sorted(pairs)[:1]]
        word = repr(tokenizer.decode(tokens)) if tokens else "-"
        print(f"{score.perplexity:10.1f}  {score.n_scored:6}  {word:14}  {name}")


if __name__ == "__main__":
    main()
