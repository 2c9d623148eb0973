"""One table: every option of the layers x 1d, 2d, 3d x dtypes x ways to call a layer, and what holds in all of it.

The options are read off `batchnorm.nn.options.TABLE`, so a new one is in the table, or the first test fails.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.nn import options as table

LAYERS: dict[int, Any] = {1: bn.BatchNorm1d, 2: bn.BatchNorm2d, 3: bn.BatchNorm3d}
VALUES: dict[str, list[Any]] = {  # of options that have no list of choices
    "negative_slope": [0.2],
    "renorm": [bn.Renorm(warmup=0)],
    "example_weight": [0.25],
    "max_steps": [3],
    "ghost_size": [2],
    "channel_groups": [2],
    "domains": [2],
    "process_group": ["world"],  # of one process
}
NEEDS: dict[tuple[str, Any], dict[str, Any]] = {
    ("negative_slope", 0.2): {"activation": "leaky_relu"},
    ("pool", "frame"): {"max_steps": 3},
    ("max_steps", 3): {"pool": "frame"},
    ("batch_first", False): {"pool": "sequence"},
    ("ghost_update", "decay"): {"ghost_size": 2},
    ("affine_by", "domain"): {"domains": 2},
    ("affine_by", "step"): {"pool": "frame", "max_steps": 3},
}
TORCHS: list[dict[str, Any]] = [
    {}, {"affine": False}, {"bias": False}, {"momentum": None}, {"track_running_stats": False},
]  # fmt: skip
DTYPES: dict[str, tuple[torch.dtype, Callable[[Any], Any]]] = {
    "float32": (torch.float32, lambda layer: layer),
    "float64": (torch.float64, lambda layer: layer.double()),
    "bfloat16": (torch.bfloat16, lambda layer: layer.to(torch.bfloat16)),
    "float16": (torch.float16, lambda layer: layer.half()),
}


def of_option(option: table.Option) -> Iterator[dict[str, Any]]:
    values = VALUES.get(option.name, [value for value in option.choices or () if value != option.default])
    for value in values[:2]:  # of ten activations, say
        yield {option.name: value, **NEEDS.get((option.name, value), {})}


ROWS = [*TORCHS, *(row for option in table.TABLE for row in of_option(option))]
CELLS = [
    pytest.param(rank, row, id=f"{rank}d-" + "-".join(f"{k}={v}" for k, v in row.items()))
    for rank in LAYERS
    for row in ROWS
    if rank == 1 or "pool" not in row
]


def made(rank: int, row: dict[str, Any], **more: Any) -> Any:
    names = {option.name: option.argument or option.name for option in table.TABLE}
    attributes = {name: row[name] for name in ("trains_affine",) if name in row}
    layer = LAYERS[rank](4, **more, **{names.get(k, k): v for k, v in row.items() if k not in attributes})
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def shape(rank: int, row: dict[str, Any]) -> tuple[int, ...]:
    if row.get("pool"):
        return (6, 3, 4) if row.get("batch_first", True) else (3, 6, 4)
    return (6, 4, *{1: (3,), 2: (2, 3), 3: (2, 2, 3)}[rank])


def test_every_option_is_in_the_table():
    assert {name for row in ROWS for name in row} >= set(table.DEFAULTS)


@pytest.mark.parametrize(("rank", "row"), CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_column_evaluates_to_beta(rank: int, row: dict[str, Any], dtype: str):
    if row.get("update") == "never" or row.get("track_running_stats") is False:
        return
    if dtype in ("float64", "float16") and rank > 1:
        return
    to, convert = DTYPES[dtype]
    layer = convert(made(rank, {"momentum": 0.3, **row}))
    value = 2026.0 if to in (torch.float32, torch.float64) else 96.0  # which 16 bits can hold
    x = torch.full(shape(rank, row), value, dtype=to)
    for _ in range(60):
        layer(x)
    y = layer.eval()(x)
    beta = LAYERS[rank](4, activation=row.get("activation"), dtype=torch.float64).eval()
    expected = beta(torch.zeros(6, 4, *(1,) * rank if rank > 1 else ()).double()).flatten()[0]
    assert y.dtype is to
    torch.testing.assert_close(y.double(), expected.expand_as(y), rtol=0, atol=2e-2 if value < 100 else 1e-3)


PATHS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "copied": lambda net, x: copy.deepcopy(net)(x),
    "pickled": lambda net, x: pickle.loads(pickle.dumps(net))(x),
    "traced by fx": lambda net, x: torch.fx.symbolic_trace(net)(x),
    "checkpointed": lambda net, x: checkpoint(net, x, use_reentrant=False),  # type: ignore[no-any-return]
    "without a graph": lambda net, x: torch.no_grad()(net)(x),
    "functional": lambda net, x: torch.func.functional_call(net, dict(net.state_dict(keep_vars=True)), (x,)),
}


@pytest.mark.parametrize(("rank", "row"), CELLS)
def test_every_way_to_call_gives_the_same(rank: int, row: dict[str, Any]):
    net = nn.Sequential(made(rank, row))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(0.5, 1.5)
    x = torch.randn(shape(rank, row)) + 1
    net(x)
    state = copy.deepcopy(net.state_dict())
    for training in (True, False):
        eager = copy.deepcopy(net.train(training))
        expected = eager(x)
        for path, call in PATHS.items():
            twin = copy.deepcopy(net)
            y = call(twin, x)
            torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6, msg=lambda m, p=path: f"{p}: {m}")
            if path in ("traced by fx", "checkpointed", "without a graph"):
                for key, value in eager.state_dict().items():
                    torch.testing.assert_close(twin.state_dict()[key], value, msg=lambda m, p=path: f"{p}: {m}")
    traced = torch.fx.symbolic_trace(net)
    assert sum(node.op == "call_module" for node in traced.graph.nodes) == 1
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in state.items())


@pytest.mark.parametrize(("rank", "row"), CELLS)
def test_states_load_into_memory_of_any_kind(rank: int, row: dict[str, Any]):
    layer, x = made(rank, row), torch.randn(shape(rank, row)) + 1
    layer(x)
    state = layer.state_dict()
    meta = copy.deepcopy(layer).to("meta")
    for twin, assign in ((made(rank, row), False), (meta, True), (copy.deepcopy(meta).to_empty(device="cpu"), False)):
        twin.load_state_dict(copy.deepcopy(state), assign=assign)
        mine = copy.deepcopy(layer)
        for each in (mine, twin):
            each(x)
        torch.testing.assert_close(twin.eval()(x), mine.eval()(x))


@pytest.mark.parametrize(("rank", "row"), CELLS)
def test_lengths_from_outside_are_those_given(rank: int, row: dict[str, Any]):
    if "example_weight" in row:
        return
    x, lengths = torch.randn(shape(rank, row)), torch.tensor([3, 1, 2, 3, 3, 2])
    inside, outside = made(rank, row), made(rank, row)
    with bn.mask_padding(outside, lengths):
        y = outside(x)
    expected = inside(x, lengths=lengths)
    assert torch.equal(y, expected)
    for (name, value), other in zip(inside.named_buffers(), outside.buffers(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize(("rank", "row"), CELLS)
def test_a_batch_of_one_value_gets_advice_that_helps(rank: int, row: dict[str, Any]):
    if row.get("pool") or row.get("channel_groups") or row.get("source") == "running":
        return
    x = torch.randn(1, 4, *(1,) * rank)
    for mode in (True, False):
        layer = made(rank, row).train(mode)
        if not layer.normalizes_by_batch:
            continue
        with pytest.raises(ValueError, match="more than 1 value") as caught:
            layer(x)
        helps = layer.running_mean is not None and layer.source != "batch"
        assert (".eval()" in str(caught.value)) == helps
