"""Fine-tune a model on a text, in a loop of one's own.

    python examples/fine_tune.py
    python examples/fine_tune.py --model gpt2 --steps 200 --out tuned novel.txt

`gpt2fast train` does this with checkpoints, validation, a schedule and many GPUs.
"""

import argparse
import json
from pathlib import Path

import torch

from gpt2fast import GPT2LMHeadModel, GPT2Tokenizer

LINES = Path(__file__).with_name("texts.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a model on a text.")
    parser.add_argument("file", nargs="?", help="a text file; default: lines of its own")
    parser.add_argument("--model", default="bundled", help="a preset, a folder or a Hub name")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", help="a folder for the model")
    args = parser.parse_args()

    if args.file:
        text = Path(args.file).read_text(encoding="utf-8-sig")
    else:
        rows = map(json.loads, LINES.read_text(encoding="utf-8").splitlines())
        text = "\n".join(row["text"] for row in rows)

    torch.manual_seed(0)
    tokenizer = GPT2Tokenizer()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT2LMHeadModel.from_pretrained(args.model, device=device).train()
    # Rows of the same length, from anywhere in the text.
    ids = torch.tensor(tokenizer.encode(text), device=device)
    row_tokens = min(128, len(ids), model.config.n_positions)
    windows = ids.unfold(0, row_tokens, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)
    for step in range(args.steps):
        rows = windows[torch.randint(len(windows), (4,), device=device)]
        loss = model(rows, labels=rows).loss  # the logits are never stored
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}")

    model.eval()
    print(tokenizer.decode(model.generate(ids[:4], max_new_tokens=20)[0]))
    if args.out:
        model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
