"""Outputs made again by choice: the same results, a budget that is kept, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

import batchnorm as bn
import batchnorm.ops
from batchnorm.kernels import cpu
from batchnorm.ops.recomputation import is_active
from batchnorm.surgery import memory
from batchnorm.surgery.comparison import Example


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


def test_a_step_is_a_forward_and_a_backward():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, activation="relu"), nn.Conv2d(4, 2, 3))
    reached = []
    for parameter in net.parameters():
        parameter.register_hook(lambda gradient: reached.append(gradient.shape))
    assert memory.training_step(net, Example.of(torch.randn(2, 3, 8, 8))) > 0
    assert len(reached) == len(list(net.parameters()))
    assert all(parameter.grad is None for parameter in net.parameters())


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
    monkeypatch.setattr(memory, "training_step", lambda net, example: memory.run_example(net, example) is None or 1.0)
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


class Block(nn.Module):
    """What `accelerate` fuses: two activations, and an addition."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.first_norm = nn.Conv2d(3, 8, 7, padding=3), nn.BatchNorm2d(8)
        self.second, self.second_norm = nn.Conv2d(8, 3, 7, padding=3), nn.BatchNorm2d(3)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.first_norm(self.first(x)))
        return self.relu(self.second_norm(self.second(y)) + x)


@pytest.mark.skipif(cpu.call is None, reason=f"needs the C++ call: {cpu.call_error}")
def test_accelerate_lets_outputs_be_made_again_that_cost_little():
    """The same bits, less alive, without a context; an operand that changes is refused; other ways keep the output."""
    net = bn.accelerate(nn.Sequential(Block(), Block(), nn.Conv2d(3, 2, 1)), example())
    assert net.report.remade == {f"{k}.first_norm": 4 * 8 * 144 * 4 for k in range(2)}
    assert "makes 2 outputs again (0.0 MB" in str(net.report)
    ours, alive = results(net)
    kept = copy.deepcopy(net)
    for layer in kept.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.keeps_output is (False if layer.num_features == 8 else None)
            layer.keeps_output = True
    expected, before = results(kept)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert (alive, before) == (2, 4)
    x = example().requires_grad_()
    convolved: list[Tensor] = []
    net[0].first.register_forward_hook(lambda _, args, y: convolved.append(y))
    loss = net(x).sum()
    torch.autograd.grad(loss, x, retain_graph=True)
    with torch.no_grad():
        convolved[0].mul_(2)
    with pytest.raises(bn.errors.StateError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(cpu.call is None, reason=f"needs the C++ call: {cpu.call_error}")
def test_what_is_made_again_has_further_derivatives_and_compiled_autograd():
    net, x = bn.accelerate(nn.Sequential(Block(), Block()), example()).double(), example().double().requires_grad_()
    kept = copy.deepcopy(net)
    for layer in kept.modules():
        layer.keeps_output = True

    def penalty(net: nn.Module) -> Any:
        (gradient,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), list(net.parameters()), allow_unused=True)

    torch.testing.assert_close(penalty(net), penalty(kept), rtol=1e-12, atol=1e-12)
    loss = net(x).square().sum()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    torch.compiler.reset()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-12)
