"""What the hub page shows, as functions of the loader, its misspelt variables repaired.

Imported by the tests, and run as a program by those that look at an uninstalled copy:

    python hub_example.py <repository> <model> ...
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TEXT_1 = "Who was Jim Henson ? Jim Henson was a puppeteer"
TEXT_2 = "Who was Jim Henson ? Jim Henson was a mysterious young man"

Load = Callable[[str], Any]


def published_example(load: Load) -> dict[str, Any]:
    """Tokenize, hidden states, past, next token, double heads; ``load`` takes an entry point."""
    tokenizer = load("gpt2Tokenizer")
    tokenized_text_1 = tokenizer.tokenize(TEXT_1)
    tokenized_text_2 = tokenizer.tokenize(TEXT_2)
    indexed_tokens_1 = tokenizer.convert_tokens_to_ids(tokenized_text_1)
    indexed_tokens_2 = tokenizer.convert_tokens_to_ids(tokenized_text_2)
    tokens_tensor_1 = torch.tensor([indexed_tokens_1])
    tokens_tensor_2 = torch.tensor([indexed_tokens_2])

    model = load("gpt2Model")
    model.eval()
    with torch.no_grad():
        hidden_states_1, past = model(tokens_tensor_1)
        hidden_states_2, past = model(tokens_tensor_2, past=past)

    lm_model = load("gpt2LMHeadModel")
    lm_model.eval()
    with torch.no_grad():
        predictions_1, past = lm_model(tokens_tensor_1)
        predictions_2, past = lm_model(tokens_tensor_2, past=past)
    predicted_index = torch.argmax(predictions_2[0, -1, :]).item()
    predicted_token = tokenizer.decode([predicted_index])

    double_head_model = load("gpt2DoubleHeadsModel")
    double_head_model.eval()
    tokens_tensor = torch.tensor([[indexed_tokens_1, indexed_tokens_2]])
    mc_token_ids = torch.LongTensor([[len(tokenized_text_1) - 1, len(tokenized_text_2) - 1]])
    with torch.no_grad():
        lm_logits, multiple_choice_logits, presents = double_head_model(tokens_tensor, mc_token_ids)

    return {
        "tokens": [tokenized_text_1, tokenized_text_2],
        "ids": [indexed_tokens_1, indexed_tokens_2],
        "hidden_states": [hidden_states_1, hidden_states_2],
        "predictions": [predictions_1, predictions_2],
        "past": past,
        "predicted_token": predicted_token,
        "lm_logits": lm_logits,
        "multiple_choice_logits": multiple_choice_logits,
        "presents": presents,
    }


def padded_example(load: Load) -> dict[str, Any]:
    """Double heads on texts of different lengths: padded on the right, scored at the last token."""
    tokenizer = load("gpt2Tokenizer")
    texts = [TEXT_2, "Who was Jim Henson ?", f"{TEXT_1} and a film maker."]
    encoded = [tokenizer.encode(text) for text in texts]
    longest = max(map(len, encoded))
    padding = tokenizer.encoder["<|endoftext|>"]
    tokens_tensor = torch.tensor([[ids + [padding] * (longest - len(ids)) for ids in encoded]])
    mc_token_ids = torch.tensor([[len(ids) - 1 for ids in encoded]])
    lm_labels = torch.tensor([[ids + [-1] * (longest - len(ids)) for ids in encoded]])

    model = load("gpt2DoubleHeadsModel")
    model.eval()
    with torch.no_grad():
        lm_logits, multiple_choice_logits, _ = model(tokens_tensor, mc_token_ids)
        losses = model(tokens_tensor, mc_token_ids, lm_labels, torch.tensor([0]))
        alone = [model(torch.tensor([[ids]]), torch.tensor([[len(ids) - 1]])) for ids in encoded]
    return {
        "ids": encoded,
        "lm_logits": lm_logits,
        "multiple_choice_logits": multiple_choice_logits,
        "losses": losses,
        "alone": alone,
    }


def _main(repository: str, *models: str) -> None:
    for model in models:

        def load(entry: str, model: str = model) -> Any:
            name = "gpt2" if entry == "gpt2Tokenizer" else model
            return torch.hub.load(repository, entry, name, source="local")

        torch.manual_seed(0)
        example = published_example(load)
        padded_example(load)
        print(json.dumps([example["predicted_token"], example["predictions"][1].sum().item()]))
    ours = [m for name, m in sys.modules.items() if name.split(".")[0] == "gpt2fast"]
    strays = [m.__file__ for m in ours if Path(repository) not in Path(m.__file__ or "").parents]
    print(json.dumps([len(ours), strays, repository in sys.path]))


if __name__ == "__main__":
    _main(*sys.argv[1:])
