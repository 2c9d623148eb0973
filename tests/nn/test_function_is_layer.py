"""The function is the layer: `functional.batch_norm` and `BatchNorm1d` give the same bits for all options of both.

`compared` is also what ranks run in synchronized_ranks.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import batchnorm as bn
from batchnorm.errors import BatchNormError

CHANNELS, STEPS, KEPT = 4, 6, 4
POOLS = ({}, {"pool": "sequence"}, {"pool": "sequence", "batch_first": False}, {"pool": "frame"})
SHARED = ({}, {"ghost_size": 2}, {"channel_groups": 2}, {"ghost_size": 3, "channel_groups": 2})
COUNTED = ("all", "mask", "lengths", "weights", "one value")
FUSED = ({}, {"activation": "leaky_relu", "negative_slope": 0.2})


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).add(1.5).to(dtype)


def options() -> Iterator[tuple[dict[str, Any], str, bool]]:
    """Every combination of pool, sharing, counting and fusion that the function and the layer know."""
    for pool, shared, fused, counted in itertools.product(POOLS, SHARED, FUSED, COUNTED):
        if not (pool.get("pool") == "frame" and "ghost_size" in shared):
            yield {**pool, **shared, **fused}, counted, bool(fused)


def given(option: dict[str, Any], counted: str, fused: bool, samples: int, dtype: torch.dtype, seed: int) -> Any:
    """x, and what goes with it into a forward."""
    x = normal(samples, CHANNELS, STEPS, seed=seed, dtype=dtype)
    call: dict[str, Tensor] = {}
    if counted == "mask":
        call["mask"] = normal(samples, STEPS, seed=seed + 1) > 1.2
    elif counted == "lengths":
        call["lengths"] = torch.arange(samples) % (STEPS + 1)
    elif counted == "weights":
        call["weights"] = (normal(samples, STEPS, seed=seed + 2) - 1).clamp(min=0)
    elif counted == "one value":
        call["weights"] = torch.zeros(samples, STEPS).index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(1.0))
    if fused:
        call["residual"] = normal(samples, CHANNELS, STEPS, seed=seed + 3, dtype=dtype)

    def turned(t: Tensor) -> Tensor:
        """As the layer of these options takes it."""
        if "pool" not in option or t.ndim == 1:
            return t
        t = t.transpose(1, 2) if t.ndim == 3 else t
        return t if option.get("batch_first", True) else t.transpose(0, 1)

    return turned(x), {name: turned(t) for name, t in call.items()}


def compared(
    option: dict[str, Any], counted: str, fused: bool, samples: int, dtype: torch.dtype, seed: int = 0, **group: Any
) -> None:
    """One training step and one evaluation of both; fails on the first bit that differs."""
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    steps = {"max_steps": KEPT} if option.get("pool") == "frame" else {}
    layer = bn.BatchNorm1d(CHANNELS, 1e-3, 0.3, dtype=wide, **option, **steps, **group)
    with torch.no_grad():
        layer.weight.copy_(normal(CHANNELS, seed=50))
        layer.bias.copy_(normal(CHANNELS, seed=51))
    weight, bias = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)

    def function(x: Tensor, **call: Tensor) -> Tensor:
        return bn.functional.batch_norm(
            x, mean, var, weight, bias, layer.training, 0.3, 1e-3, **call, **option, **group
        )

    for training in (True, False):
        layer.train(training)
        x, call = given(option, counted, fused, samples, dtype, seed)
        if not training:
            call = {name: t for name, t in call.items() if name != "weights"}
        results = []
        for run, parameters in ((layer, (layer.weight, layer.bias)), (function, (weight, bias))):
            leaves = {"x": x, **{name: t for name, t in call.items() if t.is_floating_point()}}
            leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
            inputs = {**call, **leaves}
            try:
                y = run(inputs.pop("x"), **inputs)
            except BatchNormError as error:
                results.append(("error", type(error)))
                continue
            dy = normal(*y.shape, seed=60, dtype=dtype)
            results.append([y, *torch.autograd.grad(y, [*leaves.values(), *parameters], dy, allow_unused=True)])
        assert_same(results[0], results[1], f"{option} {counted} {samples} {training}")
        if training:  # the function has no counter that tells which steps were reached
            torch.testing.assert_close(mean, layer.running_mean, rtol=0, atol=0)
            torch.testing.assert_close(var, layer.running_var, rtol=0, atol=0)
            with torch.no_grad():
                layer.num_batches_tracked.fill_(1)


def assert_same(ours: Any, theirs: Any, which: str) -> None:
    assert type(ours) is type(theirs), (which, ours, theirs)
    if isinstance(ours, tuple):
        assert ours == theirs, which
        return
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None), which
        assert mine is None or torch.equal(mine, other), which


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_function_is_the_layer(samples: int, dtype: torch.dtype):
    for option, counted, fused in options():
        compared(option, counted, fused, samples, dtype)


def test_one_sequence_has_no_variance_at_a_step():
    x, mean, var = normal(1, 5, 3, seed=1) + 7, torch.zeros(5, 3), torch.ones(5, 3)
    bn.functional.batch_norm(x, mean, var, training=True, pool="frame")
    layer = bn.BatchNorm1d(3, pool="frame", max_steps=5)
    layer(x)
    assert torch.equal(layer.running_var, torch.ones(5, 3))
    assert torch.equal(var, layer.running_var)
    assert torch.equal(mean, layer.running_mean)


@pytest.mark.parametrize(
    "option",
    [
        *({}, {"running": "cumulative"}, {"running": "debiased"}, {"nonfinite": "skip"}, {"domains": 2}),
        *({"ghost_size": 2}, {"ghost_size": 2, "ghost_update": "decay"}, {"running_var": "biased"}),
    ],
)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_one_value_that_a_mask_or_weights_leave_changes_no_statistics(option: dict[str, Any], axes: int):
    kind = (bn.BatchNorm1d, bn.BatchNorm2d, bn.BatchNorm3d)[axes - 1]
    x = normal(4, 3, *[2] * axes, seed=2)
    keep = torch.zeros(4, *[2] * axes, dtype=torch.bool)
    keep.view(-1)[0] = True
    for call in ({"mask": keep}, {"weights": keep.float()}, {"weights": keep.float() * 3}):
        layer = kind(3, **option)
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        layer(x, **call)
        assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers()), call


def test_a_batch_of_one_value_changes_no_statistics():
    for option in ({}, {"running": "cumulative"}, {"nonfinite": "skip"}, {"domains": 2}, {"channel_groups": 3}):
        layer = bn.BatchNorm1d(3, update="always", **option).eval()
        before = layer.running_mean.clone(), layer.running_var.clone()
        layer(normal(1, 3, seed=3))
        assert torch.equal(layer.running_mean, before[0]), option
        assert torch.equal(layer.running_var, before[1]), option
