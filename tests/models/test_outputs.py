"""Model outputs: mapping, tuple and attributes at once; logits that wait until they are read."""

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree

from gpt2fast.outputs import BaseModelOutput, CausalLMOutput, DeferredLogits, DoubleHeadsOutput
from tests.models.reference import VOCAB, WIDTH, pair, tokens


def _raw(output: CausalLMOutput) -> Any:
    return output.raw_items()["logits"]


class TestMapping:
    def _output(self) -> CausalLMOutput:
        return CausalLMOutput(logits="l", loss="x", past_key_values=None, attentions=("a",))

    def test_reads_in_every_way(self) -> None:
        output = self._output()
        assert list(output.keys()) == ["loss", "logits", "attentions"]
        assert tuple(output) == output.to_tuple() == ("x", "l", ("a",))
        assert (output.loss, output["loss"], output[0], output[-1]) == ("x", "x", "x", ("a",))
        assert output[:2] == ("x", "l")
        assert output.past_key_values is None
        assert output.get("past_key_values") is None
        assert output.get("past_key_values", 3) == 3
        assert "logits" in output
        assert "past_key_values" not in output
        assert len(output) == 3
        assert dict(output) == dict(output.items()) == {"loss": "x", "logits": "l",
                                                        "attentions": ("a",)}  # fmt: skip
        assert {**output} == dict(output)
        assert list(output.values()) == ["x", "l", ("a",)]
        assert isinstance(output, Mapping)

    def test_writes(self) -> None:
        output = self._output()
        output.loss = "y"
        output["logits"] = "m"
        assert output.to_tuple() == ("y", "m", ("a",))

    def test_unknown_names(self) -> None:
        output = self._output()
        with pytest.raises(AttributeError, match=r"^CausalLMOutput has no field 'logit'$"):
            _ = output.logit
        with pytest.raises(AttributeError, match=r"^CausalLMOutput has no field 'logit'$"):
            output.logit = 1
        with pytest.raises(TypeError, match=r"^CausalLMOutput has no field 'mc_loss'$"):
            CausalLMOutput(mc_loss=1)
        with pytest.raises(KeyError):
            output["past_key_values"]
        with pytest.raises(IndexError):
            output[3]

    @pytest.mark.parametrize("cls", [BaseModelOutput, CausalLMOutput, DoubleHeadsOutput])
    def test_order_is_that_of_transformers(self, cls: type[Any]) -> None:
        import transformers.modeling_outputs as theirs
        from transformers.models.gpt2.modeling_gpt2 import GPT2DoubleHeadsModelOutput

        same = {
            BaseModelOutput: theirs.BaseModelOutputWithPastAndCrossAttentions,
            CausalLMOutput: theirs.CausalLMOutputWithCrossAttentions,
            DoubleHeadsOutput: GPT2DoubleHeadsModelOutput,
        }[cls]
        fields = [f for f in same.__dataclass_fields__ if f != "cross_attentions"]
        assert list(cls._fields) == fields

    @pytest.mark.parametrize(
        "duplicate",
        [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), lambda o: type(o)(o)],
        ids=["copy", "deepcopy", "pickle", "rebuilt"],
    )
    def test_copies(self, duplicate: Any) -> None:
        output = self._output()
        other = duplicate(output)
        assert type(other) is CausalLMOutput
        assert other.to_tuple() == output.to_tuple()
        other.loss = "changed"
        assert output.loss == "x"


class TestDeferredLogits:
    def test_never_computed_unless_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ours, _ = pair()
        computed = []
        monkeypatch.setattr(F, "linear", lambda *args: computed.append(args))
        ids = tokens(2, 5)
        output = ours(ids, labels=ids)
        output.loss.backward()
        assert isinstance(_raw(output), DeferredLogits)
        assert output.past_key_values is not None
        assert output["loss"] is output[0] is output.loss
        assert output[2:] == (output[-1],)
        assert "logits" in output
        assert len(output) == 3
        repr(list(output.keys()))
        assert isinstance(_raw(output), DeferredLogits)
        assert not computed

    @pytest.mark.parametrize(
        "read",
        [
            lambda o: o.logits,
            lambda o: o["logits"],
            lambda o: o[1],
            lambda o: o.get("logits"),
            lambda o: list(o)[1],
            lambda o: dict(o.items())["logits"],
            lambda o: dict(o)["logits"],
            lambda o: pickle.loads(pickle.dumps(o)).logits,
            lambda o: copy.deepcopy(o).logits,
        ],
    )
    def test_every_way_of_reading_computes_them(self, read: Any) -> None:
        ours, _ = pair()
        ids = tokens(2, 5)
        with torch.no_grad():
            output, want = ours(ids, labels=ids), ours(ids).logits
        got = read(output)
        assert isinstance(got, Tensor)
        assert torch.equal(got, want)

    def test_computed_once(self) -> None:
        ours, _ = pair()
        ids = tokens(2, 5)
        output = ours(ids, labels=ids)
        assert output.logits is output.logits is output["logits"] is output[1]

    def test_after_backward(self) -> None:
        ours, _ = pair()
        ids = tokens(2, 5)
        output = ours(ids, labels=ids)
        output.loss.backward()
        assert torch.equal(output.logits, ours(ids).logits)

    def test_stale(self) -> None:
        """After an optimizer step they would be another model's logits."""
        ours, _ = pair()
        optimizer = torch.optim.SGD(ours.parameters(), 0.1)
        ids = tokens(2, 5)
        read, unread = ours(ids, labels=ids), ours(ids, labels=ids)
        logits = read.logits.clone()
        unread.loss.backward()
        optimizer.step()
        assert torch.equal(read.logits, logits)
        for attempt in (lambda: unread.logits, lambda: unread[1], lambda: pickle.dumps(unread)):
            with pytest.raises(RuntimeError) as error:
                attempt()
            assert str(error.value) == (
                "the logits were not read before the head's weight changed (an optimizer step?); "
                "read output.logits before it"
            )
        assert unread.loss is not None

    @pytest.mark.parametrize("read_inside", [False, True])
    def test_inference_mode(self, read_inside: bool) -> None:
        ours, _ = pair()
        ids = tokens(2, 5)
        with torch.inference_mode():
            output = ours(ids, labels=ids)
            if read_inside:
                _ = output.logits
        assert torch.allclose(output.logits, ours(ids).logits)

    @pytest.mark.parametrize("grad", [False, True])
    @pytest.mark.parametrize("read_with_grad", [False, True])
    def test_part_of_the_graph_as_the_forward_pass_was(
        self, grad: bool, read_with_grad: bool
    ) -> None:
        """A look at the logits under no_grad, for a log, does not cut them off from training."""
        ours, _ = pair()
        ids = tokens(2, 5)
        with torch.set_grad_enabled(grad):
            output = ours(ids, labels=ids)
        with torch.set_grad_enabled(read_with_grad):
            _ = output.logits
        assert output.logits.requires_grad == grad

    @pytest.mark.parametrize("keep", [2, torch.tensor([1, 3])], ids=str)
    def test_with_kept_positions(self, keep: Any) -> None:
        ours, _ = pair()
        ids = tokens(2, 5)
        with torch.no_grad():
            want = ours(ids, logits_to_keep=keep).logits
            output = ours(ids, logits_to_keep=keep, labels=ids[:, :2])
            assert torch.equal(output.logits, want)
            exact = F.cross_entropy(want[:, :-1].flatten(0, 1), ids[:, 1:2].flatten())
            assert torch.allclose(output.loss, exact)


class TestWalkers:
    """Whoever looks for tensors in outputs finds those behind uncomputed logits."""

    def _output(self) -> CausalLMOutput:
        ours, _ = pair()
        ids = tokens(2, 5)
        return ours(ids, labels=ids)

    def test_pytree(self) -> None:
        output = self._output()
        leaves, spec = _pytree.tree_flatten(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        assert any(t is output.loss for t in tensors)
        assert any(t is _raw(output).hidden for t in tensors)
        assert isinstance(_raw(output), DeferredLogits)
        rebuilt = _pytree.tree_unflatten(leaves, spec)
        assert type(rebuilt) is CausalLMOutput
        assert torch.equal(rebuilt.logits, output.logits)

    def test_pytree_map_keeps_them_deferred(self) -> None:
        output = self._output()
        mapped = _pytree.tree_map_only(Tensor, lambda t: t * 1, output)
        assert isinstance(_raw(mapped), DeferredLogits)
        assert mapped.loss.requires_grad

    def test_distributed(self) -> None:
        """DDP collects tensors, FSDP maps over them and returns what it rebuilt."""
        from torch.distributed.utils import _apply_to_tensors
        from torch.nn.parallel.distributed import _find_tensors

        output = self._output()
        found = list(_find_tensors(output))
        assert isinstance(_raw(output), DeferredLogits)
        for tensor in (output.loss, *_raw(output)[:2]):
            assert any(t is tensor for t in found)
        mapped = _apply_to_tensors(lambda t: t * 1, output)
        assert type(mapped) is CausalLMOutput
        assert torch.equal(mapped.loss, output.loss)
        assert torch.equal(mapped.logits, output.logits)

    def test_mapping_walkers(self) -> None:
        """accelerate and others: ``type(data)({key: f(value) for key, value in data.items()})``."""
        output = self._output()
        rebuilt = type(output)({name: value for name, value in output.items()})  # noqa: C416
        assert torch.equal(rebuilt.logits, output.logits)


def test_deferred_logits_survive_an_untied_16_bit_head() -> None:
    """Hidden states of another dtype than the weight's, as autocast leaves them."""
    hidden, weight = torch.randn(2, 5, WIDTH), torch.randn(VOCAB, WIDTH).bfloat16()
    logits = DeferredLogits.of(hidden, weight).compute()
    assert torch.equal(logits, F.linear(hidden.bfloat16(), weight))
