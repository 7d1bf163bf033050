"""Continue prompts: all at once, then one as it is written.

    python examples/generate.py
    python examples/generate.py --model gpt2 "The captain" "She closed the door, and"

The default model comes with the package: no network is needed.
"""

import argparse

from gpt2fast import GPT2LMHeadModel, GPT2Tokenizer

PROMPTS = ["The captain", "She closed the door, and", "It was a dark night, and the old house"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue prompts.")
    parser.add_argument("prompts", nargs="*", default=PROMPTS, metavar="PROMPT")
    parser.add_argument("--model", default="bundled", help="a preset, a folder or a Hub name")
    parser.add_argument("--max-new-tokens", type=int, default=30)
    args = parser.parse_args()

    tokenizer = GPT2Tokenizer()
    model = GPT2LMHeadModel.from_pretrained(args.model)
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": True, "temperature": 0.8}

    # Prompts of any lengths in one batch: each comes out as it would alone.
    prompts = [tokenizer.encode(prompt) for prompt in args.prompts]
    rows = model.generate(prompts, seed=0, **options)
    for text in tokenizer.batch_decode(rows, skip_special_tokens=True):
        print(text, end="\n\n")

    print(args.prompts[0], end="")
    for step in model.stream(prompts[:1], tokenizer=tokenizer, seed=1, **options):
        print(step.text[0], end="", flush=True)
    print()


if __name__ == "__main__":
    main()
