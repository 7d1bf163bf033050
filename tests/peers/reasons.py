"""Why tests of others are not passed: ``(suite, tests, reason)``, the first that matches counts.

``tests`` is a pattern of ``fnmatch``.
"""

_MODEL = "GPT2*ModelTest::test_"
_TEXT = "GPT2TokenizationTest::test_"
_BACKEND = "GPT2BackendTest::test_"

_CHATS = "chat templates are not offered, GPT-2 has none"
_PAIRS = (
    "pairs of texts are not offered, nor the masks and types of a pair or of special tokens that "
    "GPT-2 does not add"
)
_OBJECTS = "it asks for the object of the tokenizers library inside, and there is none"
_ATTRIBUTES = (
    "transformers' own bookkeeping (init_kwargs, roles without use in GPT-2, extra_special_tokens "
    "as an attribute, AddedToken) is not kept"
)
_KEYWORDS = "a keyword that is unknown raises TypeError here, as in any call"

REASONS = (
    (
        "models",
        f"{_MODEL}sdpa_can_dispatch_non_composite_models",
        "the configuration of an accelerated model names our attention where the test looks for "
        "sdpa",
    ),
    ("tokenizer", f"{_TEXT}chat_template*", _CHATS),
    ("tokenizer", f"{_TEXT}continue_final_message*", _CHATS),
    ("tokenizer", f"{_TEXT}jinja_*", _CHATS),
    ("tokenizer", f"{_TEXT}call", _PAIRS),
    ("tokenizer", f"{_TEXT}encode_plus_with_padding_?", _PAIRS),
    ("tokenizer", f"{_TEXT}mask_output", _PAIRS),
    ("tokenizer", f"{_TEXT}maximum_encoding_length_pair_input", _PAIRS),
    ("tokenizer", f"{_TEXT}number_of_added_tokens", _PAIRS),
    ("tokenizer", f"{_TEXT}special_tokens_mask*", _PAIRS),
    ("tokenizer", f"{_TEXT}token_type_ids", _PAIRS),
    ("tokenizer", f"{_BACKEND}offsets_mapping", _PAIRS),
    (
        "tokenizer",
        f"{_TEXT}maximum_encoding_length_single_input",
        "the warning of too long a text does not come from transformers' logger",
    ),
    (
        "tokenizer",
        f"{_TEXT}batch_encode_dynamic_overflowing",
        "what truncation cuts off is not returned (return_overflowing_tokens)",
    ),
    (
        "tokenizer",
        f"{_TEXT}prepare_seq2seq_batch",
        "text_target is for models that translate",
    ),
    ("tokenizer", f"{_TEXT}tokenizer_initialization_with_conflicting_key", _KEYWORDS),
    ("tokenizer", f"{_TEXT}added_tokens_serialization", _ATTRIBUTES),
    ("tokenizer", f"{_TEXT}save_and_load_tokenizer", _ATTRIBUTES),
    ("tokenizer", f"{_TEXT}tokenize_special_tokens", _ATTRIBUTES),
    ("tokenizer", f"{_TEXT}tokenizer_store_full_signature", _ATTRIBUTES),
    ("tokenizer", f"{_TEXT}tokenizers_common_*", _ATTRIBUTES),
    ("tokenizer", f"{_BACKEND}training_new_tokenizer*", "a vocabulary is read here, not trained"),
    ("tokenizer", f"{_TEXT}integration_from_extractor", _OBJECTS),
    ("tokenizer", f"{_TEXT}sequence_ids", _OBJECTS),
    ("tokenizer", f"{_BACKEND}alignment_methods", _OBJECTS),
    ("tokenizer", f"{_BACKEND}add_bos_token_*", "the option add_bos_token is not offered"),
    ("tokenizer", f"{_BACKEND}rust_tokenizer_add_prefix_space_?", _OBJECTS),
)
