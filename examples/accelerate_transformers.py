"""A GPT-2 of transformers, made faster in place: the same object, the same answers.

    python examples/accelerate_transformers.py
    python examples/accelerate_transformers.py --model gpt2-medium

Needs the extra `transformers`.
"""

import argparse
import time
from pathlib import Path

import torch
import transformers

import gpt2fast

BUNDLED = Path(gpt2fast.__file__).with_name("bundled")


def generate(model: torch.nn.Module, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    before = time.perf_counter()
    rows = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=model.config.eos_token_id,
    )
    print(f"  generated {new_tokens} tokens in {time.perf_counter() - before:.2f} s")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Accelerate a GPT-2 of transformers.")
    parser.add_argument("--model", default=str(BUNDLED), help="as transformers takes it")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    args = parser.parse_args()

    tokenizer = gpt2fast.GPT2Tokenizer()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.GPT2LMHeadModel.from_pretrained(args.model).to(device).eval()
    ids = torch.tensor([tokenizer.encode("It was a dark night, and")], device=device)

    print("transformers")
    expected = generate(model, ids, args.max_new_tokens)
    print("accelerated")
    gpt2fast.accelerate(model)
    generate(model, ids, 1)  # the engine is built at the first call
    rows = generate(model, ids, args.max_new_tokens)
    print("the same tokens:", torch.equal(rows, expected))
    print(tokenizer.decode(rows[0]))
    gpt2fast.restore(model)


if __name__ == "__main__":
    main()
