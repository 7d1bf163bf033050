"""Whole models on the Triton kernels: against transformers, and through PyTorch's own machinery.

Without a GPU the kernels run in Triton's interpreter, in float32 and float16.
"""

import copy
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import gpt2fast
from gpt2fast import kernels
from gpt2fast.kernels._triton import layer_norm
from tests.kernels.devices import DEVICE
from tests.models.reference import (
    assert_forward,
    assert_gradients,
    padding,
    pair,
    positions_under,
    sizes,
    tokens,
)
from tests.models.two_processes import gradients_of_rank
from tests.tolerances import relative_error

DIFFERENTIABLE = ("embedding", "layer_norm", "causal_attention", "gelu_mlp")

# Heads of 32: the smallest that every kernel is tuned for.
SIZES = {"n_embd": 64, "n_head": 2, "n_layer": 2}


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with gpt2fast.backend("triton"), torch.device(DEVICE):
        yield


def models(kind: str = "GPT2LMHeadModel", **overrides: Any) -> tuple[Any, Any]:
    ours, reference = pair(kind, **{**SIZES, **overrides})
    return ours.to(DEVICE), reference.to(DEVICE)


class _Ops(TorchDispatchMode):
    """Records the name of every operator that is called from the outside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


# Not matrix products: those without an epilogue are cuBLAS's on purpose.
ARITHMETIC = (
    "bmm", "gelu", "tanh", "softmax", "layer_norm", "embedding", "scaled_dot", "dropout",
    "nll_loss", "logsumexp",
)  # fmt: skip


def test_a_training_step_is_made_of_kernels_alone() -> None:
    ours, _ = models()
    ids = tokens(2, 7)
    with _Ops() as ops:
        ours(ids, labels=ids).loss.backward()
    plain = {name for name in ops.names if name.startswith("aten::")}
    assert not [n for n in plain for word in ARITHMETIC if word in n], sorted(plain)
    pairs = {f"gpt2fast::{op}_{way}" for op in DIFFERENTIABLE for way in ("fwd", "bwd")}
    assert pairs | {"gpt2fast::lm_head_loss_fwd_bwd"} <= ops.names


@pytest.mark.parametrize("train", [False, True])
def test_loss_and_gradients(train: bool) -> None:
    dropless = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    ours, reference = models(**dropless)
    ours.train(train)
    ids = tokens(2, 17)
    got, want = ours(ids, labels=ids), reference(ids, labels=ids)
    assert_forward(got.loss, want.loss)
    assert_forward(got.logits, want.logits)
    got.loss.backward()
    want.loss.backward()
    assert_gradients(ours, reference)


@pytest.mark.parametrize("kind", ["left", "right", "inner"])
def test_padding(kind: str) -> None:
    ours, reference = models()
    ids, mask = tokens(3, 9), padding(kind, 3, 9).to(DEVICE)
    with torch.no_grad():
        got = ours(ids, attention_mask=mask)
        want = reference(ids, attention_mask=mask, position_ids=positions_under(mask))
    assert_forward(got.logits, want.logits, mask.bool())


def test_prompt_chunk_and_tokens_from_a_past() -> None:
    """A prompt, a chunk, single tokens, and two branches of one past."""
    ours, reference = models()
    ids = tokens(2, 30)
    with torch.no_grad():
        want = reference(ids).logits
        past, start = None, 0
        for length in (11, 18, 1):
            out = ours(ids[:, start : start + length], past_key_values=past)
            assert_forward(out.logits, want[:, start : start + length])
            past, start = out.past_key_values, start + length
        shorter = past.crop(25)
        for branch in (tokens(2, 1), tokens(2, 3)):
            got = ours(branch, past_key_values=shorter).logits
            assert_forward(got, reference(torch.cat((ids[:, :25], branch), 1)).logits[:, 25:])


def test_a_differentiable_past() -> None:
    ours, reference = models()
    ids = tokens(2, 12)
    first = ours(ids[:, :5])
    second = ours(ids[:, 5:], past_key_values=first.past_key_values)
    weights = torch.randn_like(second.logits)
    (second.logits * weights).sum().backward()
    (reference(ids).logits[:, 5:] * weights).sum().backward()
    assert_gradients(ours, reference, but=["lm_head.weight"])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_past_that_grows_before_the_backward_pass(mode: Any) -> None:
    """Training on one branch of a past, while another appends to its storage in place."""
    ours, reference = models()
    ids = tokens(2, 9)
    with mode():
        past = ours(ids[:, :5]).past_key_values
    branch = ours(ids[:, 5:], past_key_values=past).logits
    with mode():
        ours(tokens(2, 1), past_key_values=past)
    weights = torch.randn_like(branch)
    (branch * weights).sum().backward()
    with torch.no_grad():
        fixed = reference(ids[:, :5]).past_key_values
    (reference(ids[:, 5:], past_key_values=fixed).logits * weights).sum().backward()
    assert_gradients(ours, reference, but=["lm_head.weight"])


def test_generation_gives_the_same_tokens() -> None:
    ours, reference = models()
    ids, mask = tokens(2, 6), padding("left", 2, 6).to(DEVICE)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    want = reference.generate(ids, attention_mask=mask, pad_token_id=0, **options)
    assert torch.equal(ours.generate(ids, attention_mask=mask, **options), want)


def test_double_heads() -> None:
    ours, reference = models("GPT2DoubleHeadsModel")
    ids = tokens(2, 3, 6)
    arguments = {"mc_token_ids": torch.tensor([[5, 2, 0], [1, 5, 4]])}
    with torch.no_grad():
        got, want = ours(ids, **arguments), reference(ids, **arguments)
    assert_forward(got.logits, want.logits)
    assert_forward(got.mc_logits, want.mc_logits)


def _gradients(model: nn.Module, ids: Tensor, call: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = (model if call is None else call)(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def _assert_same(got: tuple[Tensor, dict[str, Tensor]], want: Any, bound: float = 1e-5) -> None:
    assert relative_error(got[0], want[0]) <= bound
    for name, gradient in want[1].items():
        assert relative_error(got[1][name], gradient) <= bound, name


def test_compiles_as_one_graph() -> None:
    ours, _ = models()
    ids = tokens(2, 9)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    _assert_same(_gradients(ours, ids, compiled), _gradients(ours, ids))
    mask = padding("left", 2, 9).to(DEVICE)
    with torch.no_grad():
        got = compiled(ids, attention_mask=mask, use_cache=False).logits
        assert_forward(got, ours(ids, attention_mask=mask).logits)


def test_compiled_code_follows_the_backend() -> None:
    """One selection's graph does not serve another's: the selection is part of the graph."""
    ours, _ = models()
    ids, traced = tokens(1, 5), []

    def keep(graph: Any, inputs: Any) -> Any:
        traced.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    with torch.no_grad():
        for name in ("triton", "torch", "triton"):
            with gpt2fast.backend(name):
                compiled(ids, use_cache=False)
    assert ["gpt2fast.layer_norm_fwd.default" in names for names in traced] == [True, False]


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles C++ on a CPU")
def test_compiled_code_on_disk_follows_the_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor's cache, which outlives what a process remembers."""
    launched = []
    kernel = layer_norm._layer_norm_fwd_kernel

    class Counted:
        def __getitem__(self, grid: Any) -> Any:
            launched.append(grid)
            return kernel[grid]

    monkeypatch.setattr(layer_norm, "_layer_norm_fwd_kernel", Counted())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = torch.randn(3, 8)
    for name, cached in (("torch", 0), ("triton", 0), ("torch", 1), ("triton", 1)):
        torch._dynamo.reset()
        counters.clear()
        launched.clear()
        with gpt2fast.backend(name):
            torch.compile(lambda x: kernels.layer_norm(x, x[0], x[1]))(x)
        assert bool(launched) == (name == "triton")
        assert counters["inductor"]["fxgraph_cache_hit"] == cached


def test_checkpointing_replays_the_dropout() -> None:
    ours, _ = models()
    ours.train()
    ids = tokens(2, 9)
    torch.manual_seed(3)
    want = _gradients(ours, ids)
    ours.gradient_checkpointing_enable()
    torch.manual_seed(3)
    _assert_same(_gradients(ours, ids), want)
    torch.manual_seed(4)
    assert relative_error(_gradients(ours, ids)[0], want[0]) > 1e-4


def test_autocast_is_as_close_as_pytorch_under_autocast() -> None:
    ours, _ = models()
    ids = tokens(2, 9)
    exact = _gradients(ours, ids)

    def call(*args: Any, **options: Any) -> Any:
        with torch.autocast(DEVICE, dtype=torch.float16):
            return ours(*args, **options)

    got = _gradients(ours, ids, call)
    with gpt2fast.backend("torch"):
        plain = _gradients(ours, ids, call)
    for name, gradient in exact[1].items():
        ours_error = relative_error(got[1][name], gradient)
        assert ours_error <= 2 * relative_error(plain[1][name], gradient) + 1e-3, name


@pytest.mark.parametrize("name", ["h.0", "h.0.ln_1", "drop", "wte", "h.1.mlp.c_fc", "h.1.ln_2"])
def test_hooks_see_and_change_what_they_would(name: str) -> None:
    """Ops that fuse across a module step aside where somebody listens."""
    ours, _ = models("GPT2Model")
    ids = tokens(1, 5)
    plain = ours(ids).last_hidden_state
    calls = []
    handle = ours.get_submodule(name).register_forward_hook(
        lambda module, inputs, output: calls.append(1)
    )
    assert_forward(ours(ids).last_hidden_state, plain)
    assert calls
    handle.remove()
    rolled = ours.get_submodule(name).register_forward_pre_hook(
        lambda module, inputs: (inputs[0].roll(1, -1), *inputs[1:])
    )
    assert relative_error(ours(ids).last_hidden_state, plain) > 1e-3
    rolled.remove()


@pytest.mark.skipif(DEVICE == "cuda", reason="two processes of one test do not share a GPU")
def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    """Under DistributedDataParallel, and under FSDP2."""
    ours, _ = models()
    state, ids = copy.deepcopy(ours.state_dict()), tokens(2, 6)
    # Rows of one length: the mean over both is the mean of the two processes' means.
    _, want = _gradients(ours, ids)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (port, sizes(**SIZES), state, ids, tmp_path / "gradients")
    torch.multiprocessing.spawn(gradients_of_rank, arguments, nprocs=2)
    got = torch.load(tmp_path / "gradients")
    assert set(got) == {"ddp", "fsdp2"}
    for kind, gradients in got.items():
        assert gradients.keys() == want.keys()
        for name, gradient in want.items():
            assert relative_error(gradients[name], gradient) <= 1e-5, (kind, name)
