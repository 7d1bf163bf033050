"""transformers' common tests of models, on GPT-2 models that are accelerated."""

import unittest
from typing import Any, ClassVar

import torch
import transformers
from transformers.testing_utils import torch_device

from tests.peers.carried import import_carried
from tests.peers.outcomes import CONTROL
from tests.peers.sources import TRANSFORMERS

# The distribution carries the files of tests/, not of the folders below it.
_MISSING = {
    "exporters.test_export": {"ExportTesterMixin": object},
    "generation.test_utils": {"GenerationTesterMixin": object},
}
_common = import_carried(TRANSFORMERS, "test_modeling_common", _MISSING)
_training = import_carried(TRANSFORMERS, "test_training_mixin", {})


def accelerated(plain: Any) -> Any:
    """``plain`` to look at; the models that it makes and loads are objects of ``plain`` itself,
    accelerated.
    """
    from gpt2fast import accelerate

    def put_in(model: Any) -> Any:
        accelerate(model)
        # Otherwise the tests would be those of a plain model, and pass.
        assert any(type(m).__module__.startswith("gpt2fast.") for m in model.modules())
        return model

    def load(cls: type, *args: Any, **kwargs: Any) -> Any:
        loaded = plain.from_pretrained(*args, **kwargs)
        put_in(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    body = {
        "__module__": plain.__module__,
        "__new__": lambda cls, *args, **kwargs: put_in(plain(*args, **kwargs)),
        "from_pretrained": classmethod(load),
        "_from_config": classmethod(
            lambda cls, *args, **kwargs: put_in(plain._from_config(*args, **kwargs))
        ),
    }
    return type(plain.__name__, (plain,), body)


_PLAIN = (
    transformers.GPT2DoubleHeadsModel,
    transformers.GPT2Model,
    transformers.GPT2LMHeadModel,
    transformers.GPT2ForQuestionAnswering,
    transformers.GPT2ForSequenceClassification,
    transformers.GPT2ForTokenClassification,
)
CLASSES = _PLAIN if CONTROL else tuple(map(accelerated, _PLAIN))


class ModelTester:
    """The sizes, configuration and inputs that the common tests ask for."""

    batch_size = 3
    seq_length = 7
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    num_choices = 4
    is_training = True
    causal_lm_class = CLASSES[2]

    def get_config(self) -> transformers.GPT2Config:
        last = self.vocab_size - 1
        return transformers.GPT2Config(
            vocab_size=self.vocab_size,
            n_embd=self.hidden_size,
            n_layer=self.num_hidden_layers,
            n_head=self.num_attention_heads,
            n_positions=512,
            bos_token_id=last,
            eos_token_id=last,
            pad_token_id=last,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        shape = (self.batch_size, self.seq_length)
        # Without the last id, which is padding: a classifier looks for it.
        inputs = {
            "input_ids": torch.randint(self.vocab_size - 1, shape, device=torch_device),
            # Few, because tests shrink the embedding that they share with the text.
            "token_type_ids": torch.randint(2, shape, device=torch_device),
            "attention_mask": torch.ones(shape, dtype=torch.int64, device=torch_device),
        }
        return self.get_config(), inputs


class GPT2ModelTest(_common.ModelTesterMixin, _training.TrainingTesterMixin, unittest.TestCase):
    all_model_classes: ClassVar = CLASSES[1:]
    # An object that the mixin's abstract property stands in the way of.
    model_tester = ModelTester()

    def setUp(self) -> None:
        transformers.set_seed(0)


class GPT2DoubleHeadsModelTest(_common.ModelTesterMixin, unittest.TestCase):
    all_model_classes: ClassVar = CLASSES[:1]
    model_tester = ModelTester()
    # Its ``loss`` is that of the language model; the other head has a loss of its own.
    test_all_params_have_gradient = False

    def setUp(self) -> None:
        transformers.set_seed(0)

    def _prepare_for_class(
        self, inputs_dict: dict[str, Any], model_class: Any, return_labels: bool = False
    ) -> dict[str, Any]:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels:
            # [batch, choices, time]
            choices = self.model_tester.num_choices
            inputs = {
                name: tensor[:, None].repeat(1, choices, 1) for name, tensor in inputs.items()
            }
            inputs["labels"] = inputs["input_ids"].clone()
            inputs["mc_labels"] = torch.zeros_like(inputs["labels"][:, 0, 0])
        return inputs
