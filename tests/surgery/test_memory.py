"""Outputs made again by choice: the same results, a budget that is kept, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.ops.recomputation import is_active
from batchnorm.surgery import memory


def network() -> nn.Sequential:
    torch.manual_seed(0)
    norms = [bn.BatchNorm2d(c, activation="relu") for c in (4, 16)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), norms[0], nn.Conv2d(4, 16, 3), norms[1], nn.Conv2d(16, 2, 3))


def example() -> Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def results(net: nn.Module) -> tuple[list[Any], int]:
    """Gradients and buffers, and the number of outputs alive before the backward."""
    kept: list[Any] = []
    net = copy.deepcopy(net)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda _, args, y: kept.append(y.untyped_storage()._weak_ref()))
    loss = net(example()).square().mean()
    gc.collect()
    alive = sum(torch.UntypedStorage._new_with_weak_ptr(each) is not None for each in kept)
    loss.backward()
    return [*(p.grad for p in net.parameters()), *net.buffers()], alive


def test_all_none_and_some(monkeypatch: pytest.MonkeyPatch):
    net, x = network(), example()
    state = copy.deepcopy(net.state_dict())
    expected, before = results(net)
    assert before == 2
    plan = bn.save_memory(net, x, budget=1e9)
    assert {name: each.bytes for name, each in plan.outputs.items()} == {"1": 4 * 4 * 100 * 4, "3": 4 * 16 * 64 * 4}
    assert plan.saved == sum(each.bytes for each in plan.outputs.values())
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    found, alive = results(net)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert alive == 0
    # The smaller output takes nine times the time for its bytes: a budget for one goes to the other.
    monkeypatch.setattr(memory, "_normalization", lambda layout: 0.9 if layout.shape[1] == 4 else 0.5)
    monkeypatch.setattr(memory, "_step", lambda net, example: memory.run_example(net, example) is None or 1.0)
    plan = bn.save_memory(net, x, budget=0.9)
    assert [plan.outputs[name].remade for name in ("1", "3")] == [False, True]
    assert plan.seconds == 0.5
    assert "1: 0.01 MB, 900.00 ms: kept" in str(plan)
    assert "made again, in 50.0% of a step's time (budget 90%)" in str(plan)
    assert results(net)[1] == 1
    bn.save_memory(net, x, budget=0)
    assert results(net)[1] == 2
    assert not net._forward_pre_hooks
    assert not net._forward_hooks


def test_only_in_training_and_whatever_happens():
    net, x = network(), example()
    bn.save_memory(net, x, budget=1e9)
    seen: list[bool] = []
    net[4].register_forward_pre_hook(lambda *_: seen.append(is_active()))
    net(x)
    net.eval()(x)
    with torch.no_grad():
        net.train()(x)
    assert seen == [True, False, False]
    net[4].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net(x)
    assert not is_active()
    assert not memory._contexts()


def test_copies_and_pickles_save_too():
    net = network()
    bn.save_memory(net, example(), budget=1e9)
    assert results(pickle.loads(pickle.dumps(net)))[1] == 0
    assert results(copy.deepcopy(net))[1] == 0


def test_what_it_refuses():
    with pytest.raises(bn.errors.SurgeryError, match=r"bn\.accelerate it first"):
        bn.save_memory(nn.Sequential(nn.BatchNorm2d(3)), example())
    with pytest.raises(bn.errors.InputError, match="at least 0, got -1"):
        bn.save_memory(network(), example(), budget=-1)
    with pytest.raises(bn.errors.InputError, match="the network fails on the example"):
        bn.save_memory(network(), torch.zeros(2, 5))
