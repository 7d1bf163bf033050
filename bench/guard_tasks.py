"""What the regression guard times, in a process of its own: lines of JSON in, lines of JSON out.

    PYTHONPATH=TREE python bench/guard_tasks.py

The package is that of the tree, old or new, so only its public names are used. Times are of the
processor, in one thread: a crowded machine disturbs them least.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

Call = Callable[[], Any]


def _model(**options: Any) -> Any:
    import torch

    from gpt2fast import GPT2LMHeadModel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    return GPT2LMHeadModel.from_pretrained("bundled", **options)


def _ids(rows: int, length: int) -> Any:
    import torch

    return torch.randint(50256, (rows, length), generator=torch.Generator().manual_seed(0))


def tokenizer() -> Call:
    from gpt2fast.tokenizer import GPT2Tokenizer

    ours = GPT2Tokenizer()
    words = [ours.decode([token]) for token in range(1000, 1500)]
    text = "".join(f" {first.strip()}{second}" for first in words[:60] for second in words)
    return lambda: ours.encode(text)


def decode() -> Call:
    model, ids = _model(), _ids(1, 32)
    return lambda: model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=[])


def decode_int8() -> Call:
    model, ids = _model(quantize="int8"), _ids(1, 32)
    return lambda: model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=[])


def prefill() -> Call:
    model, ids = _model(), _ids(2, 256)
    return lambda: model.generate(ids, max_new_tokens=1, do_sample=False, eos_token_id=[])


def training() -> Call:
    model, ids = _model().train(), _ids(1, 96)
    return lambda: model(ids, labels=ids).loss.backward()


def scoring() -> Call:
    import gpt2fast

    model, rows = _model(), _ids(3, 64).tolist()
    return lambda: gpt2fast.score(rows, model=model)


TASKS = {
    made.__name__: made for made in (tokenizer, decode, decode_int8, prefill, training, scoring)
}


def main() -> None:
    import gpt2fast

    print(json.dumps({"package": gpt2fast.__file__}), flush=True)
    calls: dict[str, Call] = {}
    for line in sys.stdin:
        name = json.loads(line)
        try:
            if name not in calls:
                calls[name] = TASKS[name]()
                calls[name]()  # to warm up
            start = time.process_time()
            calls[name]()
            answer = {"seconds": time.process_time() - start}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
