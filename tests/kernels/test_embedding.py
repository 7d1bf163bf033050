"""embedding against indexing in float64."""

import pytest
import torch

from gpt2fast import kernels
from tests.kernels import oracles
from tests.kernels.oracles import DTYPES, compare


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_types", [False, True])
@pytest.mark.parametrize(
    ("shape", "position_rows", "width"), [((1, 1), 1, 1), ((3, 7), 1, 63), ((2, 5), 2, 64)], ids=str
)
def test_embedding(
    shape: tuple[int, int], position_rows: int, width: int, with_types: bool, dtype: torch.dtype
) -> None:
    ids = torch.randint(11, shape)  # small: ids repeat, so their gradients add up
    positions = torch.randint(13, (position_rows, shape[1]))
    types = torch.randint(11, shape) if with_types else None
    tables = [torch.randn(11, width).to(dtype), torch.randn(13, width).to(dtype)]
    compare(
        "embedding",
        lambda *tables: kernels.embedding(ids, positions, types, *tables),
        lambda *tables: oracles.embedding(ids, positions, types, *tables),
        tables,
    )


def test_int32_and_non_contiguous_ids() -> None:
    ids, wte, wpe = torch.randint(11, (5, 3)).t(), torch.randn(11, 8), torch.randn(13, 8)
    positions = torch.arange(5)[None]
    expected = oracles.embedding(ids, positions, None, wte, wpe)
    assert not ids.is_contiguous()
    assert torch.equal(kernels.embedding(ids, positions, None, wte, wpe), expected)
    assert torch.equal(kernels.embedding(ids.int(), positions, None, wte, wpe), expected)


def test_wrong_shapes() -> None:
    ids, wte, wpe = torch.zeros(2, 3, dtype=torch.long), torch.randn(11, 8), torch.randn(13, 8)
    row = ids[:1]
    with pytest.raises(ValueError, match=r"^input_ids must be \[batch, time\]; got \[3\]$"):
        kernels.embedding(ids[0], row, None, wte, wpe)
    with pytest.raises(ValueError, match=r"^position_ids must be \[2, 3\] or \[1, 3\]; got \[3\]$"):
        kernels.embedding(ids, row[0], None, wte, wpe)
    with pytest.raises(ValueError, match=r"^token_type_ids must be \[2, 3\]; got \[1, 3\]$"):
        kernels.embedding(ids, row, row, wte, wpe)
    with pytest.raises(ValueError, match=r"^expected wte \[V, C\] and wpe \[P, C\]; got \[11, 8\]"):
        kernels.embedding(ids, row, None, wte, wpe[:, :1])
