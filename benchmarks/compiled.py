"""Compiled networks of linear layers with BN + ReLU: training steps and inference under torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm

from .networks import all_gradients
from .rows import Row, compare, refusal
from .timing import Phases, alternate, rotating

NETWORKS = {(64, 64): 8, (512, 64): 8, (256, 256): 4, (1024, 256): 4, (4096, 128): 4}
"""The number of layers, by the input's shape; all of them are as wide as the input."""
CONTESTANTS = ("torch", "ours fused", "ours fused, eager", "none")
"""All but one are compiled; `none` has ReLU alone, so that nothing in place of batch norm can be faster."""
CLASSES = 10


def network(shape: tuple[int, int], layers: int, contestant: str) -> nn.Module:
    torch.manual_seed(0)
    width, parts = shape[1], list[nn.Module]()
    for _ in range(layers):
        parts.append(nn.Linear(width, width))
        if contestant == "torch":
            parts += [nn.BatchNorm1d(width), nn.ReLU()]
        else:
            parts.append(nn.ReLU() if contestant == "none" else batchnorm.BatchNorm1d(width, activation="relu"))
    return nn.Sequential(*parts, nn.Linear(width, CLASSES))


def _data(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator), torch.randint(CLASSES, shape[:1], generator=generator)


def _step(run: Callable[[Tensor], Tensor], net: nn.Module, x: Tensor, target: Tensor) -> None:
    net.zero_grad(set_to_none=True)
    F.cross_entropy(run(x), target).backward()


def measure(shape: tuple[int, int], layers: int, seconds: float) -> Iterator[Row]:
    """The rows of a network: of the contestants that are not further from float64 than torch's layers (times 1.5)."""
    columns = {"suite": "compiled", "network": f"{layers} layers", "dtype": "float32", "shape": list(shape)}
    torch._dynamo.config.recompile_limit = 64  # networks of one kind count as one
    x, target = _data(shape)
    wide = network(shape, layers, "torch").double()
    _step(wide, wide, x.double(), target)
    truth = all_gradients(wide)
    nets: dict[str, tuple[Callable[[Tensor], Tensor], nn.Module]] = {}
    errors: dict[str, float] = {}
    for name in CONTESTANTS:
        net = network(shape, layers, name)
        run = net if name.endswith("eager") else torch.compile(net)
        _step(run, net, x, target)
        if name != "none":
            errors[name] = float((all_gradients(net) - truth).norm() / truth.norm())
            if reason := refusal(name, errors[name], errors["torch"], torch.float32):
                yield {**columns, "contestant": name, "absent": reason}
                continue
        nets[name] = run, net
    steps = {name: _alone("step", partial(_step, *each, x, target)) for name, each in nets.items()}
    times, rounds = alternate(steps, seconds, least=3)
    yield from compare({**columns, "rounds": rounds}, times, errors)
    for _, net in nets.values():
        net.eval()
    with torch.no_grad():
        batches = {name: _alone("inference", partial(run, x)) for name, (run, _) in nets.items()}
        times, rounds = alternate(batches, seconds / 3, least=3)
    yield from compare({**columns, "rounds": rounds}, times, {})


def _alone(phase: str, call: Callable[[], object]) -> Callable[[], Phases]:
    return rotating(lambda _: call(), 1, phase)
