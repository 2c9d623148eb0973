"""The operators on ATen give results that share no memory with their arguments, nor with one another.

torch 2.14 warns of an operator that does, and means to refuse it.
"""

import itertools

import pytest
import torch
from torch import Tensor

from batchnorm.ops.registration import _operators
from batchnorm.ops.schemas import ARGUMENTS, by_name

SHAPE = (4, 6, 5)
CHANGING = {"update_statistics", "mix_statistics"}  # which have no results


def arguments(dtype: torch.dtype) -> dict[str, object]:
    """A value for each argument of any operator."""
    vector = lambda: torch.rand(6, dtype=dtype) + 1  # noqa: E731
    row = lambda: torch.rand(1, 6, dtype=torch.float64) + 1  # noqa: E731
    return {
        "x": torch.randn(SHAPE, dtype=dtype), "dy": torch.randn(SHAPE, dtype=dtype), "weight": vector(),
        "bias": vector(), "residual": None, "mean": row(), "var": row(), "k1": row(), "k2": row(), "k3": row(),
        "count": row(), "sums": torch.rand(2, 1, 6, dtype=torch.float64), "signs": None, "pool_size": 0, "eps": 1e-5,
        "activation": 0, "slope": 0.01, "save_signs": False, "want_x": True, "want_residual": True, "groups": 0,
        "population": False, "own": False, "mask": None, "parts": torch.rand(1, 3, 1, 6, dtype=torch.float64) + 1,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(_operators.keys() - CHANGING))
def test_results_share_no_memory(name: str, dtype: torch.dtype):
    fields = ARGUMENTS[name]._fields
    for activation, groups, affine, residual, population in itertools.product((0, 1), (0, 2), *[(True, False)] * 3):
        given = {**arguments(dtype), "activation": activation, "groups": groups, "population": population}
        if not affine:
            given |= {"weight": None, "bias": None}
        if residual:
            given["residual"] = torch.randn(SHAPE, dtype=dtype)
        given = {field: given[field] for field in fields}
        found = by_name(name, _operators[name])(**given)
        results = [found] if isinstance(found, Tensor) else list(found)
        tensors = [t for t in given.values() if isinstance(t, Tensor)] + results
        places = [t.untyped_storage().data_ptr() for t in tensors if t.numel()]
        assert len(set(places)) == len(places), given
