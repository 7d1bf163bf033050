"""The past: a list of tensors to whoever looks, a shared cache to the model, a value to both."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpt2fast.legacy.past import Presents

Pair = tuple[nn.Module, nn.Module]


@pytest.fixture
def model(base: Pair) -> nn.Module:
    return base[0]


@pytest.fixture(params=[False, True], ids=["in place", "differentiable"])
def _grad(request: pytest.FixtureRequest) -> Any:
    with torch.set_grad_enabled(request.param):
        yield


def ids_of(*shape: int) -> Tensor:
    return torch.randint(211, shape)


@pytest.mark.usefixtures("_grad")
def test_presents_are_a_list_of_stacked_tensors(model: nn.Module) -> None:
    _, past = model(ids_of(2, 3, 5))
    assert isinstance(past, list)
    assert len(past) == 3
    assert [tuple(layer.shape) for layer in past] == [(2, 6, 4, 5, 16)] * 3
    assert past[0][0].size(-2) == 5
    key, value = past[1]
    assert key.shape == value.shape == (6, 4, 5, 16)
    assert type(past[1:]) is list
    assert torch.stack(past).shape == (3, 2, 6, 4, 5, 16)


@pytest.mark.usefixtures("_grad")
def test_no_branch_changes_the_past_or_another_branch(model: nn.Module) -> None:
    prompt, first, second = ids_of(2, 5), ids_of(2, 3), ids_of(2, 4)
    _, past = model(prompt)
    kept = [layer.clone() for layer in past]
    _, one = model(first, past=past)
    kept_one = [layer.clone() for layer in one]
    hidden_two, two = model(second, past=past)
    hidden_again, _ = model(first, past=past)
    model(second, past=one)
    model(first, past=two)
    assert all(map(torch.equal, past, kept))
    assert all(map(torch.equal, one, kept_one))
    torch.testing.assert_close(hidden_again, model(torch.cat((prompt, first), 1))[0][:, 5:])
    torch.testing.assert_close(hidden_two, model(torch.cat((prompt, second), 1))[0][:, 5:])


def test_continuing_copies_nothing(model: nn.Module) -> None:
    with torch.no_grad():
        _, past = model(ids_of(1, 5))
        _, longer = model(ids_of(1, 2), past=past)
    assert [layer.data_ptr() for layer in longer] == [layer.data_ptr() for layer in past]


@pytest.mark.usefixtures("_grad")
@pytest.mark.parametrize(
    "change",
    [
        list,
        tuple,
        torch.stack,
        lambda past: [(layer[0], layer[1]) for layer in past],
        lambda past: [layer.clone() for layer in past],
        copy.copy,
        copy.deepcopy,
        lambda past: pickle.loads(pickle.dumps(past)),
    ],
    ids=["list", "tuple", "stacked", "pairs", "clones", "copy", "deepcopy", "pickled"],
)
def test_any_form_of_the_past_continues_alike(
    model: nn.Module, change: Callable[[Presents], Any], request: pytest.FixtureRequest
) -> None:
    if torch.is_grad_enabled() and "deepcopy" in request.node.name:
        pytest.skip("PyTorch deep-copies no tensor that is part of a graph")
    _, past = model(ids_of(2, 5))
    more = ids_of(2, 3)
    expected, _ = model(more, past=past)
    assert torch.equal(model(more, past=change(past))[0], expected)


@pytest.mark.usefixtures("_grad")
def test_rows_and_positions_chosen_by_the_user(model: nn.Module) -> None:
    ids, more = ids_of(3, 5), ids_of(1, 2)
    _, past = model(ids)
    row = model(more, past=[layer[:, 1:2] for layer in past])[0]
    torch.testing.assert_close(row, model(torch.cat((ids[1:2], more), 1))[0][:, 5:])
    repeated = model(
        more.expand(4, 2), past=[layer[:, 1:2].expand(-1, 4, -1, -1, -1) for layer in past]
    )
    torch.testing.assert_close(repeated[0], row.expand(4, -1, -1))
    shorter = model(more, past=[layer[:, 1:2, :, :3] for layer in past])[0]
    torch.testing.assert_close(shorter, model(torch.cat((ids[1:2, :3], more), 1))[0][:, 3:])


@pytest.mark.usefixtures("_grad")
def test_a_changed_list_is_what_counts(model: nn.Module) -> None:
    _, past = model(ids_of(1, 5))
    _, other = model(ids_of(1, 5))
    more = ids_of(1, 2)
    expected = model(more, past=[other[0], *past[1:]])[0]
    past[0] = other[0]
    assert torch.equal(model(more, past=past)[0], expected)
    past.pop()
    with pytest.raises(ValueError, match=r"the past must be 3 layers of .*; got 2 of"):
        model(more, past=past)


def test_copies_are_plain_lists(model: nn.Module) -> None:
    """So that a pickle of them loads where this package is not."""
    with torch.no_grad():
        _, past = model(ids_of(1, 5))
    loaded = pickle.loads(pickle.dumps(past))
    assert type(loaded) is type(copy.deepcopy(past)) is list
    assert all(map(torch.equal, loaded, past))


def test_presents_of_several_devices_are_gathered(model: nn.Module) -> None:
    """`torch.nn.DataParallel` builds the output's type from an iterator of merged layers."""
    with torch.no_grad():
        parts = [model(ids_of(2, 5))[1] for _ in range(2)]
        merged = Presents(torch.cat(layers, 1) for layers in zip(*parts, strict=True))
        hidden, _ = model(ids_of(4, 1), past=merged)
    assert hidden.shape == (4, 1, 64)


@pytest.mark.parametrize("past_length", [0, 37])
def test_the_context_ends_at_n_ctx(model: nn.Module, past_length: int) -> None:
    past = model(ids_of(1, past_length))[1] if past_length else None
    kept = [layer.clone() for layer in past or ()]
    new = 41 - past_length
    message = f"the context holds 40 positions; got {past_length} in the past and {new} new ones"
    with pytest.raises(ValueError, match=message):
        model(ids_of(1, new), past=past)
    assert all(map(torch.equal, past or (), kept))
    assert model(ids_of(1, 40 - past_length), past=past)[0].shape[1] == 40 - past_length


def test_n_ctx_below_the_positions(make_pair: Callable[..., Pair]) -> None:
    model, _ = make_pair("GPT2Model", n_ctx=8)
    assert model(ids_of(1, 8))[0].shape == (1, 8, 64)
    with pytest.raises(ValueError, match="the context holds 8 positions; got 0 in the past and 9"):
        model(ids_of(1, 9))


@pytest.mark.parametrize("past", [3.5, [1, 2, 3], [torch.zeros(2, 1, 4, 3)] * 3])
def test_what_is_no_past_is_refused(model: nn.Module, past: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        model(ids_of(1, 2), past=past)
