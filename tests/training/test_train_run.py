"""Whole runs of tiny models: learning, resuming, dying, and what is left on disk."""

import errno
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from gpt2fast.training.state import checkpoint_folders
from gpt2fast.training.trainer import Trainer, TrainingError
from tests.training.chain import SETTINGS, chain_tokens, chain_trainer


def _weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def _log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_it_learns_the_chain(tmp_path, capsys):
    trainer = chain_trainer(tmp_path, replace(SETTINGS, steps=300), save_every=100)
    before = trainer.evaluate(32)
    assert before > 4
    assert trainer.run() == 0
    assert trainer.evaluate(32) < 0.9  # the chain's own entropy is 0.69
    assert trainer.tokens == 300 * 128
    losses = [record["loss"] for record in _log(tmp_path) if "loss" in record]
    assert len(losses) == 30
    assert losses[-1] < 1.0 < losses[0]
    row_tokens = [r["valid_row_tokens"] for r in _log(tmp_path) if "valid_loss" in r]
    assert row_tokens == [16] * 12 + [32] * 3
    shown = capsys.readouterr().out.splitlines()
    words = ("tokens/s", "MFU", "loss", "left")
    assert sum(all(word in line for word in words) for line in shown) == 30
    assert any("measured now: matrix products in float32" in line for line in shown)


def test_validation_predicts_every_token_but_the_first_once(tmp_path):
    trainer = chain_trainer(tmp_path)
    trainer.model.eval()
    ids = torch.from_numpy(trainer.valid.astype(np.int64))
    total = 0.0
    with torch.no_grad():
        for start in range(0, 499, 15):
            window = ids[start : start + 16]
            logits = trainer.model(window[None]).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert trainer.evaluate(16) == pytest.approx(total / 499, rel=1e-5)


def test_accumulation_changes_nothing_but_the_memory(tmp_path):
    settings = replace(SETTINGS, sampled_head=0, clip=1e9)
    losses, gradients = [], []
    for parts in (1, 4):
        trainer = chain_trainer(tmp_path, replace(settings, accumulate=parts), dropout=0.0)
        losses.append(trainer._train_step(0.5))
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)


def test_bfloat16_is_for_the_products_alone(tmp_path):
    curves = []
    for dtype in ("float32", "bfloat16"):
        settings = replace(SETTINGS, steps=8, dtype=dtype)
        trainer = chain_trainer(tmp_path / dtype, settings, log_every=1)
        assert trainer.run() == 0
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        curves.append([r["loss"] for r in _log(tmp_path / dtype) if "loss" in r])
    assert curves[1] != curves[0]
    assert curves[1] == pytest.approx(curves[0], rel=0.01)


def test_compiled_layers_train_alike(tmp_path, monkeypatch):
    graphs = []

    def run_as_captured(graph, inputs):  # Inductor would take a minute, and is not ours
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=run_as_captured))
    settings, options = replace(SETTINGS, steps=10), {"log_every": 1, "valid_every": 5}
    plain = chain_trainer(tmp_path / "plain", settings, **options)
    compiled = chain_trainer(tmp_path / "compiled", settings, compile=True, **options)
    for trainer in (plain, compiled):
        assert trainer.run() == 0
    assert len(graphs) == 2  # of both layers, for rows of 16 and 32; none for validation
    for name in ("loss", "valid_loss"):
        curves = [
            [r[name] for r in _log(tmp_path / run) if name in r] for run in ("plain", "compiled")
        ]
        assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole = chain_trainer(tmp_path / "whole")
    whole.run()

    class Stop(Exception):
        pass

    def run_until(trainer, step):
        take_step = trainer._train_step

        def step_or_stop(progress):
            if trainer.step == step:
                raise Stop
            return take_step(progress)

        trainer._train_step = step_or_stop
        with pytest.raises(Stop):
            trainer.run()

    run_until(chain_trainer(tmp_path / "cut"), 17)  # the last checkpoint is of step 14
    second = chain_trainer(tmp_path / "cut")
    assert second.resume()
    assert second.step == 14
    run_until(second, 53)
    last = chain_trainer(tmp_path / "cut")
    assert last.resume()
    assert last.step == 49
    last.run()
    for name, expected in _weights(whole).items():
        assert torch.equal(_weights(last)[name], expected), name
    curves = [
        [(r["step"], r["tokens"], r.get("loss"), r.get("valid_loss")) for r in _log(tmp_path / run)]
        for run in ("cut", "whole")
    ]
    assert curves[0] == curves[1]


def test_a_finished_run_is_logged_once(tmp_path, capsys):
    """The last checkpoint is of the last step, which is not one of those that are reported."""
    options = {"save_every": 6, "log_every": 4}
    settings = replace(SETTINGS, steps=6)
    assert chain_trainer(tmp_path, settings, **options).run() == 0
    again = chain_trainer(tmp_path, settings, **options)
    assert again.resume()
    assert again.run() == 0
    assert [(r["step"], r["progress"]) for r in _log(tmp_path)] == [(4, 0.666667), (6, 1.0)]
    assert "step 6  100.0%" in capsys.readouterr().out


def test_a_full_disk_is_an_error_of_the_system(tmp_path, monkeypatch):
    def fill(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = chain_trainer(tmp_path)
    trainer.save()
    trainer.step = 5
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", fill)
        with pytest.raises(OSError, match=r"^cannot write .*step-00000005: .*No space left"):
            trainer.save()
    checkpoints = tmp_path / "checkpoints"
    assert [path.name for path in checkpoint_folders(checkpoints)] == ["step-00000000"]


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    trained = chain_trainer(tmp_path)
    trained.run()
    older, newest = checkpoint_folders(tmp_path / "checkpoints")
    assert (older.name, newest.name) == ("step-00000056", "step-00000060")
    (shard,) = newest.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    trainer = chain_trainer(tmp_path)
    with pytest.warns(UserWarning, match=r"cannot read .*60, .* bytes, it had"):
        assert trainer.resume()
    assert trainer.step == 56
    assert trainer.run() == 0  # and writes the damaged one anew
    for name, expected in _weights(trained).items():
        assert torch.equal(_weights(trainer)[name], expected), name

    (shard,) = newest.glob("*.safetensors")
    shard.write_bytes(b"\xff" * shard.stat().st_size)  # full length, and no safetensors
    (older / "run.json").write_text("{")
    with (
        pytest.warns(UserWarning, match="cannot read"),
        pytest.raises(ValueError, match="none of the checkpoints"),
    ):
        chain_trainer(tmp_path).resume()


def test_a_save_that_was_cut_short_is_no_checkpoint(tmp_path, monkeypatch):
    trainer = chain_trainer(tmp_path)
    trainer.save()
    trainer.step = 5

    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.rename", die)
        with pytest.raises(KeyboardInterrupt):
            trainer.save()
    checkpoints = tmp_path / "checkpoints"
    assert [path.name for path in checkpoint_folders(checkpoints)] == ["step-00000000"]
    trainer.save()
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000000", "step-00000005"]


def test_resuming_something_else_is_refused(tmp_path):
    chain_trainer(tmp_path, replace(SETTINGS, steps=2)).run()
    with pytest.raises(ValueError, match="seed was 0, now it is 1"):
        chain_trainer(tmp_path, replace(SETTINGS, seed=1)).resume()
    trainer = chain_trainer(tmp_path)
    trainer.data_id = "other"
    with pytest.raises(ValueError, match="data was 'chain', now it is 'other'"):
        trainer.resume()
    trainer = chain_trainer(tmp_path)
    trainer.model.config.n_head = 4
    with pytest.raises(ValueError, match=r"n_head was \[2\], now it is \[4\]"):
        trainer.resume()
    trainer = chain_trainer(tmp_path)
    trainer.model.transformer.wpe = torch.nn.Embedding(16, 32)
    with pytest.raises(ValueError, match=r"wpe.weight was \[32, 32\], now it is \[16, 32\]"):
        trainer.resume()


def test_time_used_survives_a_resume(tmp_path):
    trainer = chain_trainer(tmp_path, replace(SETTINGS, steps=None, minutes=1e6))
    trainer.elapsed = 3600.0
    trainer.save()
    resumed = chain_trainer(tmp_path, replace(SETTINGS, steps=None, minutes=60))
    assert resumed.resume()
    assert resumed.run() == 0
    assert (resumed.step, resumed.elapsed) == (0, 3600.0)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_before_it_reaches_the_weights(tmp_path, where):
    trainer = chain_trainer(tmp_path)

    def poison(value):
        return value * float("nan") if trainer.step == 20 else value

    if where == "loss":
        trainer.loss.register_forward_hook(lambda module, arguments, loss: poison(loss))
    else:
        trainer.model.transformer.wpe.weight.register_hook(poison)
    shown = "the loss is nan" if where == "loss" else "the gradient's norm nan"
    with pytest.raises(TrainingError, match=f"step 21: .*{shown}.*learning rate"):
        trainer.run()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert checkpoint_folders(tmp_path / "checkpoints")[-1].name == "step-00000014"


def test_unusable_data(tmp_path):
    trainer = chain_trainer(tmp_path)
    with pytest.raises(ValueError, match="training data holds token 64, vocab_size is 64"):
        Trainer(trainer.model, chain_tokens() + 1, None, tmp_path, SETTINGS, data_id="x")
    with pytest.raises(ValueError, match="validation needs at least two tokens, got 1"):
        Trainer(trainer.model, chain_tokens(), chain_tokens(1), tmp_path, SETTINGS, data_id="x")
