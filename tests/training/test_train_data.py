import errno
import json
import lzma
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from gpt2fast.tokenizer import GPT2Tokenizer
from gpt2fast.training.data import (
    BlockOrder,
    find_files,
    load_tokens,
    own_tokenizer,
    split_documents,
)

END_OF_TEXT = 50256


def test_documents_are_what_stands_between_separator_lines():
    text = "One.\n\nTwo lines.\n<|endoftext|>\nMid <|endoftext|> line\r\n<|endoftext|>\r\n"
    text += "<|endoftext|>\n"
    assert split_documents(text) == ["One.\n\nTwo lines.\n", "Mid <|endoftext|> line\r\n"]


def test_tokens_are_each_documents_ids_and_an_end(tmp_path):
    tiktoken_ids = {"It was a dark night.\n": [1026, 373, 257, 3223, 1755, 13, 198]}
    text = "It was a dark night.\n"
    (tmp_path / "a.txt").write_text(f"{text}<|endoftext|>\n{text}")
    with lzma.open(tmp_path / "b.xz", "wt") as file:
        file.write(text)
    np.array([7, 8], dtype=np.uint16).tofile(tmp_path / "c.bin")
    tokens = load_tokens(find_files([str(tmp_path / "*.*")]), tmp_path / "cache")
    document = [*tiktoken_ids[text], END_OF_TEXT]
    assert tokens.tolist() == document * 3 + [7, 8]
    assert tokens.dtype == np.uint16
    assert isinstance(tokens, np.memmap)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "plain.txt").write_text("Once \ufeffupon\n<|endoftext|>\n\ufeffa time")
    (tmp_path / "marked.txt").write_text("\ufeffOnce \ufeffupon\n<|endoftext|>\n\ufeffa time")
    plain, marked = (load_tokens([tmp_path / name], tmp_path / "cache") for name in
                     ("plain.txt", "marked.txt"))  # fmt: skip
    assert plain.tolist() == marked.tolist()


class _CountingTokenizer(GPT2Tokenizer):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def encode(self, text: str) -> list[int]:
        self.calls += 1
        return [ord(letter) for letter in text]


def test_the_cache_is_used_until_the_text_changes(tmp_path):
    path, cache, tokenizer = tmp_path / "a.txt", tmp_path / "cache", _CountingTokenizer()
    path.write_text("abc")
    load_tokens([path], cache, tokenizer)
    load_tokens([path], cache, tokenizer)
    assert tokenizer.calls == 1
    path.write_text("abd")
    assert load_tokens([path], cache, tokenizer).tolist() == [97, 98, 100, END_OF_TEXT]
    assert tokenizer.calls == 2
    assert not [path for path in cache.iterdir() if path.suffix != ".bin"]


def test_a_tokenizer_of_its_own_has_a_cache_of_its_own(tmp_path):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("abab b")
    folder = tmp_path / "model"
    GPT2Tokenizer().save_pretrained(folder)
    assert own_tokenizer(str(folder)) is own_tokenizer("gpt2") is None  # GPT-2's, if another file

    encoder = {"a": 0, "b": 1, "ab": 2, "\u0120": 3, "<|endoftext|>": 4}
    (folder / "vocab.json").write_text(json.dumps(encoder))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "tokenizer.json").unlink()
    tokenizer = own_tokenizer(str(folder))
    assert load_tokens([path], cache, tokenizer).tolist() == [2, 2, 3, 1, 4]
    assert load_tokens([path], cache).tolist() == [*GPT2Tokenizer().encode("abab b"), END_OF_TEXT]
    assert load_tokens([path], cache, tokenizer).tolist() == [2, 2, 3, 1, 4]


def test_a_tokenizer_that_is_not_in_the_hubs_cache_is_missed(tmp_path, monkeypatch):
    """Others fetch weights alone. GPT-2's tokenizer instead would be wrong, if nothing said so."""
    import gpt2fast.tokenizer.files as files

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(files, "download", lambda name, **options: tmp_path)
    with pytest.warns(UserWarning, match="found no tokenizer of some/model, so GPT-2's is used"):
        assert own_tokenizer("some/model") is None


@pytest.mark.skipif(os.name != "posix", reason="locks folders, which POSIX allows")
def test_where_folders_have_no_locks(tmp_path, monkeypatch):
    import fcntl

    def refuse(*arguments):
        raise OSError(errno.EBADF, "Bad file descriptor")  # as NFS does

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "a.txt").write_text("abc")
    tokens = load_tokens([tmp_path / "a.txt"], tmp_path / "cache", _CountingTokenizer())
    assert tokens.tolist() == [97, 98, 99, END_OF_TEXT]


@pytest.mark.skipif(os.name != "posix", reason="locks folders, which POSIX allows")
def test_of_several_at_once_one_tokenizes(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    tokenizer, encoding = _CountingTokenizer(), threading.Event()
    encode = tokenizer.encode

    def slow_encode(text: str) -> list[int]:
        encoding.set()
        time.sleep(0.2)
        return encode(text)

    tokenizer.encode = slow_encode
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(load_tokens, [tmp_path / "a.txt"], tmp_path / "cache", tokenizer)
        assert encoding.wait(60)
        second = pool.submit(load_tokens, [tmp_path / "a.txt"], tmp_path / "cache", tokenizer)
        assert first.result().tolist() == second.result().tolist() == [97, 98, 99, END_OF_TEXT]
    assert tokenizer.calls == 1


def test_a_name_is_no_pattern_where_there_is_such_a_file(tmp_path):
    for name in ("a[1].txt", "a1.txt", "b.txt"):
        (tmp_path / name).touch()
    assert find_files([str(tmp_path / "a[1].txt")]) == [tmp_path / "a[1].txt"]
    assert find_files([str(tmp_path / "[ab]*")]) == [
        tmp_path / name for name in ("a1.txt", "a[1].txt", "b.txt")
    ]


def test_bad_data_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no file matches '.*nothing\*'"):
        find_files([str(tmp_path / "nothing*")])
    (tmp_path / "a.pdf").touch()
    with pytest.raises(ValueError, match=r"a\.pdf"):
        find_files([str(tmp_path / "a.pdf")])
    for name, content, message in (
        ("empty.txt", b" \n<|endoftext|>\n", "no text in"),
        ("latin.txt", b"caf\xe9", r"latin\.txt.*utf-8"),
        ("broken.xz", b"not lzma", r"broken\.xz"),
        ("odd.bin", b"\x00\x01\x02", "3 bytes"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_tokens([path], tmp_path / "cache", _CountingTokenizer())


def test_an_epoch_visits_every_block_once():
    tokens = np.arange(1000, dtype=np.uint16)
    order = BlockOrder(tokens, block_size=10, seed=3)
    epochs = [order.blocks(start, 99) for start in (0, 99)]
    for epoch in epochs:
        firsts = sorted(epoch[:, 0].tolist())
        assert firsts == list(range(firsts[0], firsts[0] + 990, 10))
        assert torch.equal(epoch, epoch[:, :1] + torch.arange(10))
    assert not torch.equal(*epochs)


def test_the_order_depends_on_seed_and_position_alone():
    tokens = np.arange(1000, dtype=np.uint16)
    at_once = BlockOrder(tokens, 16, seed=1).blocks(0, 200)
    order = BlockOrder(tokens, 16, seed=1)
    pieces = [order.blocks(start, 25) for start in reversed(range(0, 200, 25))]
    assert torch.equal(at_once, torch.cat(pieces[::-1]))
    assert not torch.equal(at_once, BlockOrder(tokens, 16, seed=2).blocks(0, 200))


def test_too_little_data():
    with pytest.raises(ValueError, match="31 tokens: too few, two blocks of 16"):
        BlockOrder(np.zeros(31, dtype=np.uint16), 16, seed=0)
