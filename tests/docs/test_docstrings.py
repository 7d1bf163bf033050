"""Every public name says what it is."""

import inspect

import pytest

import gpt2fast
from gpt2fast import kernels


@pytest.mark.parametrize(
    ("module", "name"),
    [(module, name) for module in (gpt2fast, kernels) for name in module.__all__],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_public_name_has_a_docstring(module: object, name: str) -> None:
    value = getattr(module, name)
    if name == "__version__":
        assert value.count(".") == 2
        return
    # vars, not getdoc: a base class's docstring does not describe this one.
    docstring = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert docstring, f"{module.__name__}.{name} has no docstring"
    assert len(docstring.split()) >= 5
