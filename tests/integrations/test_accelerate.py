"""What `accelerate` changes and `restore` undoes, and the ecosystem around an accelerated model."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from torch import nn

import gpt2fast
from gpt2fast.integrations.deferred import DeferredLogits
from tests.integrations.conftest import pair, plain
from tests.models.reference import assert_forward, assert_gradients, sizes, tokens

KINDS = (
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2DoubleHeadsModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2ForQuestionAnswering",
)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Every module's class and attributes, by identity, and every tensor's bits."""
    modules = {
        name: (type(module), {key: id(value) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    }
    return {"modules": modules, "state": {n: t.clone() for n, t in model.state_dict().items()}}


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert after["modules"] == before["modules"]
    assert list(after["state"]) == list(before["state"])
    assert all(torch.equal(t, after["state"][n]) for n, t in before["state"].items())


@pytest.mark.parametrize("kind", KINDS)
def test_restore_undoes_it_to_the_last_bit(kind: str) -> None:
    model = plain(kind, n_layer=2)
    config = copy.deepcopy(model.config)
    before = snapshot(model)
    ids = tokens(2, 2, 6) if "Double" in kind else tokens(2, 6)
    wanted = model(ids)[0]
    assert gpt2fast.accelerate(model) is model
    model(ids)
    assert isinstance(model, getattr(transformers, kind))
    assert type(model).__name__ == kind
    assert list(model.state_dict()) == list(before["state"])
    assert gpt2fast.restore(model) is model
    assert_unchanged(model, before)
    assert model.config.to_dict() == config.to_dict()
    assert torch.equal(model(ids)[0], wanted)


def test_only_the_object_given_is_changed() -> None:
    config = transformers.GPT2Config(**sizes(n_layer=1))
    model, other = (transformers.GPT2LMHeadModel(config) for _ in range(2))
    before = snapshot(other)
    gpt2fast.accelerate(model)
    assert model.config._attn_implementation == "gpt2fast"
    assert other.config is config
    assert config._attn_implementation == "sdpa"
    assert_unchanged(other, before)
    assert type(transformers.GPT2LMHeadModel(config).transformer.ln_f) is nn.LayerNorm


def test_twice_is_once() -> None:
    model = plain(n_layer=1)
    before = snapshot(model)
    gpt2fast.accelerate(model)
    once = snapshot(model)
    gpt2fast.accelerate(model)
    assert_unchanged(model, once)
    gpt2fast.restore(gpt2fast.restore(model))
    assert_unchanged(model, before)


def test_what_is_set_meanwhile_stays_set() -> None:
    model = gpt2fast.accelerate(plain(n_layer=1))
    model.config.use_cache = False
    model.resize_token_embeddings(101, mean_resizing=False)
    gpt2fast.accelerate(model)  # takes the new head in
    ids = torch.tensor([[99, 100, 3]])
    out = model(ids, labels=ids)
    assert isinstance(out.logits, DeferredLogits)
    assert out.logits.shape == (1, 3, 101)
    gpt2fast.restore(model)
    assert model.config.vocab_size == 101
    assert not model.config.use_cache
    assert_forward(out.loss, model.double()(ids, labels=ids).loss)


def test_what_others_set_in_the_original_stays_set() -> None:
    config = transformers.GPT2Config(**sizes(n_layer=1))
    model, other = (transformers.GPT2LMHeadModel(config) for _ in range(2))
    gpt2fast.accelerate(model)
    other.config.pad_token_id = 5
    model.config.use_cache = False
    gpt2fast.restore(model)
    assert model.config is other.config is config
    assert (config.pad_token_id, config.use_cache) == (5, False)
    assert config._attn_implementation == "sdpa"


def test_the_original_is_found_again_after_another_attention() -> None:
    model = plain(n_layer=1)
    before = snapshot(model)
    gpt2fast.accelerate(model)
    model.set_attn_implementation("sdpa")
    gpt2fast.accelerate(model)
    assert model.config._attn_implementation == "gpt2fast"
    gpt2fast.restore(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "wrong", [nn.Linear(2, 2), object(), None, gpt2fast.GPT2Model], ids=lambda x: type(x).__name__
)
def test_other_objects_are_refused(wrong: Any) -> None:
    if wrong is gpt2fast.GPT2Model:  # ours has the kernels already
        wrong = wrong(gpt2fast.GPT2Config(**sizes(n_layer=1)))
    for function in (gpt2fast.accelerate, gpt2fast.restore):
        with pytest.raises(
            ValueError, match=f"GPT-2 model of transformers; got .*{type(wrong).__qualname__}"
        ):
            function(wrong)


def test_an_old_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "4.49.1")
    with pytest.raises(ValueError, match=r"4\.50 or newer; got 4\.49\.1"):
        gpt2fast.accelerate(plain(n_layer=1))


def test_copies_and_pickles_are_accelerated_and_apart() -> None:
    model = gpt2fast.accelerate(plain(n_layer=2))
    ids = tokens(1, 6)
    wanted = model(ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert torch.equal(other(ids).logits, wanted)
        gpt2fast.restore(other)
        assert type(other) is transformers.GPT2LMHeadModel
        assert other.config._attn_implementation == "sdpa"
        assert_forward(other(ids).logits, wanted)
    assert model.config._attn_implementation == "gpt2fast"


def test_pickles_work_in_other_processes(tmp_path: Path) -> None:
    """As those of workers, where nobody has called `accelerate`."""
    model, ids = gpt2fast.accelerate(plain(n_layer=1)), tokens(1, 6)
    options = {"num_beams": 2, "max_new_tokens": 3}
    (tmp_path / "model").write_bytes(pickle.dumps((model, ids, options)))
    program = f"""
import pathlib, pickle
model, ids, options = pickle.loads(pathlib.Path({str(tmp_path / "model")!r}).read_bytes())
print(model.generate(ids, **options).tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], timeout=60, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(model.generate(ids, **options).tolist()), done.stderr


def test_saved_folder_is_the_same(tmp_path: Path) -> None:
    model = plain(n_layer=1)
    model.save_pretrained(tmp_path / "before")
    gpt2fast.accelerate(model)
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert type(loaded) is transformers.GPT2LMHeadModel
    ids = tokens(1, 5)
    assert_forward(gpt2fast.accelerate(loaded)(ids).logits, model(ids).logits)


def test_trainer_trains_and_evaluates(tmp_path: Path) -> None:
    data = [{"input_ids": row, "labels": row} for row in tokens(8, 12).tolist()]
    losses, seen = [], []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {}

    for accelerated in (False, True):
        torch.manual_seed(0)
        model = plain(n_layer=1)
        if accelerated:
            gpt2fast.accelerate(model)
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model, arguments, train_dataset=data, eval_dataset=data, compute_metrics=metrics
        )
        trainer.train()
        history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        losses.append([*history, trainer.evaluate()["eval_loss"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert seen == [(8, 12, 97)] * 2


@pytest.mark.parametrize("order", ["adapters first", "adapters last"])
def test_low_rank_adapters(order: str) -> None:
    ids = tokens(2, 9)
    targets = ["c_attn", "c_proj", "c_fc"]
    config = peft.LoraConfig(
        r=4, target_modules=targets, fan_in_fan_out=True, init_lora_weights=False, lora_dropout=0.0
    )
    reference = plain(n_layer=2, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)
    model = copy.deepcopy(reference)
    torch.manual_seed(7)
    reference = peft.get_peft_model(reference, config).double()
    if order == "adapters last":
        gpt2fast.accelerate(model)
    torch.manual_seed(7)
    adapted = peft.get_peft_model(model, config)
    if order == "adapters first":
        gpt2fast.accelerate(adapted)
    for peer in (adapted, reference):
        peer.train()
        peer(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None for p in adapted.parameters())
    assert_gradients(adapted, reference)
    wanted = reference.eval().generate(input_ids=ids, max_new_tokens=5)
    assert torch.equal(adapted.eval().generate(input_ids=ids, max_new_tokens=5), wanted)
    merged = adapted.merge_and_unload()
    assert_forward(merged(ids).logits, reference(input_ids=ids).logits)
    assert torch.equal(merged.generate(ids, max_new_tokens=5), wanted)
    gpt2fast.restore(merged)
    assert type(merged.transformer.h[0].attn.c_attn) is transformers.pytorch_utils.Conv1D


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["prompt", "prefix"],
)
def test_learned_prompts(config: Any) -> None:
    """Which leave every module as it is."""
    ids = tokens(2, 9)
    ones = torch.ones_like(ids)
    results = []
    model = plain(n_layer=2)
    adapted = peft.get_peft_model(model, config).eval()
    prompt = list(adapted.prompt_encoder.parameters())
    for _ in range(2):
        loss = adapted(input_ids=ids, attention_mask=ones, labels=ids).loss
        (gradient,) = torch.autograd.grad(loss, prompt)
        generated = adapted.generate(input_ids=ids, attention_mask=ones, max_new_tokens=6)
        results.append((loss, gradient, generated))
        gpt2fast.accelerate(adapted)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
    assert not torch.equal(results[0][-1], model.generate(ids, max_new_tokens=6))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    ours, reference = pair(n_layer=2)
    ids = tokens(2, 8)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        ours.enable_input_require_grads()
    runs: list[int] = []
    ours.transformer.h[1].ln_1.register_forward_hook(lambda *args: runs.append(1))
    for model in (ours, reference):
        model.train()
        for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
            dropout.p = 0.0
        model(ids, labels=ids).loss.backward()
    assert len(runs) == 2
    assert_gradients(ours, reference)


def test_compiled() -> None:
    ours, reference = pair(n_layer=2)
    compiled = torch.compile(ours, backend="aot_eager")
    ids = tokens(2, 8)
    for model in (compiled, reference):
        out = model(ids, labels=ids, use_cache=False)
        out.loss.backward()
        assert type(out.logits) is torch.Tensor
    assert_gradients(ours, reference)


def test_moved_and_cast() -> None:
    model = gpt2fast.accelerate(plain(n_layer=2))
    ids = tokens(1, 6)
    wanted = model(ids).logits
    assert_forward(model.double()(ids).logits, wanted.double())
    assert_forward(model.float().to("cpu")(ids).logits, wanted)


@pytest.mark.parametrize("order", ["placed first", "placed last"])
def test_weights_placed_elsewhere(order: str) -> None:
    """As ``device_map`` does: hooks bring each module's weights when it is called."""
    ours, reference = plain(n_layer=2), plain(n_layer=2)
    reference.load_state_dict(ours.state_dict())
    if order == "placed last":
        gpt2fast.accelerate(ours)
    accelerate.cpu_offload(ours)
    if order == "placed first":
        gpt2fast.accelerate(ours)
    assert ours.transformer.h[0].mlp.c_fc.weight.is_meta
    ids = tokens(1, 6)
    with torch.no_grad():
        got, wanted = ours(ids, labels=ids), reference(ids, labels=ids)
        assert_forward(got.logits, wanted.logits)
        assert_forward(got.loss, wanted.loss)
    generated = reference.generate(ids, max_new_tokens=3)
    assert torch.equal(ours.generate(ids, max_new_tokens=3), generated)
    gpt2fast.restore(ours)
    assert torch.equal(ours.generate(ids, max_new_tokens=3), generated)


def test_transforms_of_torch_func() -> None:
    ours, reference = pair(n_layer=1)
    ids = tokens(1, 6)
    results = []
    for model in (ours, reference):
        parameters = dict(model.named_parameters())

        def loss(values: Any, model: Any = model) -> Any:
            return torch.func.functional_call(
                model, values, (ids,), {"labels": ids, "use_cache": False}
            ).loss

        results.append(torch.func.grad(loss)(parameters)["transformer.h.0.mlp.c_fc.weight"])
    assert_forward(*results)
