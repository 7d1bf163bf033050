"""The Ray example with two actors, and what an actor makes of its CPUs and of a bad row."""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2fast.integrations.batches import GenerateBatch, place
from tests.examples.runs import EXAMPLES, run_example

pytest.importorskip("ray.data", reason="needs the extra ray")

import ray

LIMIT = 300  # seconds, on a busy machine


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Two CPUs of this machine, in reach of nobody else."""
    # A path of its own, and short: sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
        )
        yield
        ray.shutdown()


def test_two_actors_write_as_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source, out = EXAMPLES / "texts.jsonl", tmp_path / "out"
    run_example(monkeypatch, "ray_generate", str(source), str(out))
    lines = [line for path in out.iterdir() for line in path.read_text("utf-8").splitlines()]
    found = {row["id"]: row for row in map(json.loads, lines)}
    rows = [json.loads(line) for line in source.read_text("utf-8").splitlines()]
    assert len(lines) == len(found) == len(rows)
    run = GenerateBatch(
        "bundled", column="text", id_column="id", temperature=0.8, max_new_tokens=20
    )
    expected = run({name: [row[name] for row in rows] for name in ("id", "text")})
    for row, text, ids in zip(
        rows, expected["generated_text"], expected["generated_ids"], strict=True
    ):
        assert found[row["id"]]["generated_text"] == text
        assert found[row["id"]]["generated_ids"] == ids
        assert found[row["id"]]["n_scored"] == len(ids) - 1
        assert found[row["id"]]["perplexity"] > 1


def test_an_actor_has_the_threads_of_its_cpus_and_names_a_bad_row() -> None:
    threads, device = torch.get_num_threads(), place()
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert torch.get_num_threads() == threads  # this process is no actor
    actor: Any = ray.remote(num_cpus=2)(GenerateBatch).remote("bundled", id_column="id")
    in_actor = actor.__ray_call__.remote(lambda self: (os.getpid(), torch.get_num_threads()))
    process, threads = ray.get(in_actor, timeout=LIMIT)
    assert process != os.getpid()
    assert threads == 2
    batch = {"id": ["first", "second"], "prompt": ["The captain", ""]}
    with pytest.raises(ValueError, match="row 'second': the prompt is empty"):
        ray.get(actor.__call__.remote(batch), timeout=LIMIT)
    ray.kill(actor)
