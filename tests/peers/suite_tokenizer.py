"""transformers' common tests of tokenizers, on our GPT2Tokenizer."""

import unittest
from typing import Any, ClassVar

import transformers

from gpt2fast.tokenizer import GPT2Tokenizer
from tests.peers.carried import import_carried
from tests.peers.outcomes import CONTROL
from tests.peers.sources import TRANSFORMERS
from tests.peers.vocabulary import write_vocabulary

_common = import_carried(TRANSFORMERS, "test_tokenization_common", {})
_backend = import_carried(TRANSFORMERS, "test_tokenizers_backend_mixin", {})

# Both read the same folder: GPT-2's vocabulary, which tests find on the Hub otherwise.
FOLDER = str(write_vocabulary())


class Ours(GPT2Tokenizer):
    @classmethod
    def from_pretrained(cls, name_or_path: Any, **settings: Any) -> Any:
        # transformers' GPT-2 tokenizer takes and ignores it, as it does any keyword.
        settings.pop("do_lower_case", None)
        return super().from_pretrained(name_or_path, **settings)


class GPT2TokenizationTest(_common.TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class: Any = transformers.GPT2Tokenizer if CONTROL else Ours
    from_pretrained_id: ClassVar = [FOLDER]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        theirs = transformers.GPT2Tokenizer.from_pretrained(FOLDER)
        ids = theirs.encode(cls.integration_test_input_string)
        cls.integration_expected_token_ids = ids
        cls.integration_expected_tokens = theirs.convert_ids_to_tokens(ids)
        cls.integration_expected_decoded_text = theirs.decode(ids)


class GPT2BackendTest(_backend.TokenizersBackendTesterMixin, unittest.TestCase):
    tokenizer_class = rust_tokenizer_class = GPT2TokenizationTest.tokenizer_class
    from_pretrained_id: ClassVar = [FOLDER]
