"""Models that change, are copied or go away beside their engine."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch

from gpt2fast import Engine, GPT2LMHeadModel
from gpt2fast.engine import kept
from tests.engine.conftest import IDS, PLAIN, engine_of, general, make_model


def step_of_sgd(model: GPT2LMHeadModel) -> None:
    ids = torch.tensor(IDS)
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()


def load_other(model: GPT2LMHeadModel) -> None:
    model.load_state_dict(make_model().state_dict())


def assign_other(model: GPT2LMHeadModel) -> None:
    model.load_state_dict(make_model().state_dict(), assign=True)


def resize(model: GPT2LMHeadModel) -> None:
    model.resize_token_embeddings(120)
    with torch.no_grad():
        model.transformer.wte.weight[97:] *= 30


def round_trip(model: GPT2LMHeadModel) -> None:
    model.half()
    model.float()


CHANGES: list[Callable[[GPT2LMHeadModel], None]] = [
    step_of_sgd,
    load_other,
    assign_other,
    resize,
    round_trip,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_changes_between_two_calls(
    model: GPT2LMHeadModel, change: Callable[[GPT2LMHeadModel], None]
) -> None:
    before = model.generate(IDS, **PLAIN)
    first = engine_of(model)
    handle_engine = Engine(model, 1)
    change(model)
    after = model.generate(IDS, **PLAIN)
    assert engine_of(model) is not first
    assert after.equal(general(model).generate(IDS, **PLAIN))
    if change is not round_trip:
        assert not after.equal(before)
    message = r"^the model has changed since the engine was built: build another$"
    with pytest.raises(RuntimeError, match=message):
        handle_engine.submit(IDS[0])


def test_a_model_in_another_precision(model: GPT2LMHeadModel) -> None:
    model.generate(IDS, **PLAIN)
    model.to(torch.bfloat16)
    output = model.generate(IDS, return_dict_in_generate=True, **PLAIN)
    assert output.past_key_values[0].dtype == torch.bfloat16
    assert engine_of(model).closed is False


def test_a_stream_over_a_change(model: GPT2LMHeadModel) -> None:
    """An open stream goes on; others get the new weights."""
    stream = model.stream(IDS, **PLAIN)
    next(stream)
    load_other(model)
    assert model.generate(IDS, **PLAIN).equal(general(model).generate(IDS, **PLAIN))
    assert len(list(stream)) == 7


def test_copies_and_pickles_know_nothing_of_the_engine(model: GPT2LMHeadModel) -> None:
    expected = model.generate(IDS, **PLAIN)
    engine = engine_of(model)
    fresh = make_model()
    assert model.state_dict().keys() == fresh.state_dict().keys()
    assert vars(model).keys() == vars(fresh).keys()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin not in kept._KEPT
        assert twin.generate(IDS, **PLAIN).equal(expected)
        assert engine_of(twin) is not engine
    with pytest.raises(TypeError, match="an engine cannot be copied or pickled"):
        copy.deepcopy(engine)
    with pytest.raises(TypeError, match="an engine cannot be copied or pickled"):
        pickle.dumps(engine)


def test_model_and_engine_are_collected(model: GPT2LMHeadModel) -> None:
    """Neither keeps the other alive, nor does a finished call."""
    model = make_model()
    output = model.generate(IDS, return_dict_in_generate=True, **PLAIN)
    cache = weakref.ref(engine_of(model)._runner.state.tokens)
    stream = model.stream(IDS, **PLAIN)
    next(stream)
    stream.close()
    own = Engine(model, 1)
    handle = own.submit(IDS[0], **PLAIN)
    reference = weakref.ref(model)
    del model, stream
    gc.collect()
    assert reference() is None
    assert cache() is None
    own.step()
    assert handle.token_ids == output.sequences[0, 3:5].tolist()
    state = weakref.ref(own._runner.state.tokens)
    del own
    gc.collect()
    assert state() is None
