"""The numbers that the page to play with starts from: a lesson's, or those of a network and its data."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import InputError
from batchnorm.lab.explanation import Explanation, explain
from batchnorm.lab.fitting import train
from batchnorm.lab.instruments.objective import Loss
from batchnorm.lab.settings import Config, checked
from batchnorm.lab.task import Task
from batchnorm.training.loop import batch_indices
from batchnorm.training.networks import load_weights
from batchnorm.undo import in_mode

BATCHES = 60  # of the running average
SAMPLES, CHANNELS, SPACE = 6, 4, (2, 3)  # of the grid
POOL = 12  # values of the layer that are shown
FEATURES, TRAINING, TEST = 8, 300, 150  # of the network that learns
Feeding: TypeAlias = tuple[str, nn.Module, Tensor]  # a layer's name, the layer, and its input
LAYOUTS = {1: ("dense",), 2: ("sequence", "last", "dense"), 3: ("sequence", "last", "image", "dense")}


@dataclass(frozen=True)
class Grid:
    """Part of a layer's input, (samples, channels, positions) with the positions of space one after the other.

    Args:
        values: flat, samples first.
        n, c, l: samples, channels, positions.
        space: height and width, of which `l` is the product.
        layouts: the kinds of input that these values can be: "dense", "sequence", "last", "image".
    """

    values: list[float]
    n: int
    c: int
    l: int  # noqa: E741 (L is the field's name)
    space: tuple[int, int]
    layouts: tuple[str, ...]


@dataclass(frozen=True)
class Pool:
    """Values of one channel, the gradients that arrive at them, and the layer's parameters of that channel."""

    x: list[float]
    dy: list[float]
    gamma: float
    beta: float
    eps: float


@dataclass(frozen=True)
class Fold:
    """A convolution of three weights over a signal, and the batch norm behind it, with its running statistics.

    `variance` is the one that is kept, *unbiased*.
    """

    signal: list[float]
    kernel: list[float]
    bias: float
    gamma: float
    beta: float
    mean: float
    variance: float
    eps: float


@dataclass(frozen=True)
class Learn:
    """A task for the network that learns in the page: samples of a few features, and labels from 0 up.

    Args:
        x, y: for training; test_x, test_y: for the test.
        classes: how many labels.
        hidden: units of each hidden layer.
        text: what it is, a sentence.
    """

    x: list[list[float]]
    y: list[int]
    test_x: list[list[float]]
    test_y: list[int]
    classes: int
    hidden: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Playground:
    """All that the page starts from.

    Args:
        source: where the numbers come from, a sentence or more.
        given: whether they are those of a network and its data.
        layer, channel: where; "" and 0 in a lesson.
        grid, pool, fold, learn: of parts 1, 2, 4 and 5.
        folded: the name of the convolution or linear layer that `fold` shows a slice of; None where the numbers are the
            lesson's.
        batches: (count, mean, sum of squared distances from it) of each batch, for part 3.
    """

    source: str
    given: bool
    layer: str
    channel: int
    grid: Grid
    pool: Pool
    batches: list[tuple[int, float, float]]
    fold: Fold
    folded: str | None
    learn: Learn


def lesson() -> Playground:
    """Numbers that are easily checked by head and hand, always the same."""
    rng = np.random.default_rng(5)
    grid = np.arange(SAMPLES * CHANNELS * math.prod(SPACE)).reshape(SAMPLES, CHANNELS, -1)
    values = (grid * 37 % 19 - 9 + np.array([0, 4, -4, 2])[:, None]).astype(float)
    batches = []
    for _ in range(BATCHES):
        x = rng.normal(2.0 + rng.normal(0, 0.25), 1.5, size=16)
        batches.append(_moments(torch.from_numpy(x)))
    return Playground(
        source="The numbers are a lesson’s, chosen to be checked by hand. With --network and --data they are those of "
        "your own network and batch.",
        given=False, layer="", channel=0,
        grid=Grid(values.ravel().tolist(), SAMPLES, CHANNELS, math.prod(SPACE), SPACE, LAYOUTS[3]),
        pool=Pool([-2.0, 0.0, 1.0, 3.0, 4.0, 6.0], [0.5, -1.0, 0.25, 1.0, -0.75, 0.5], 1.5, 0.5, 1e-5),
        batches=batches,
        fold=Fold([1.0, 2.0, 0.0, -1.0, 3.0, 1.0, -2.0, 2.0], [1.0, -0.5, 0.25], 0.5, 1.5, -0.25, 0.75, 2.0, 1e-5),
        folded=None,
        learn=_spirals(rng),
    )  # fmt: skip


def _spirals(rng: np.random.Generator) -> Learn:
    """Three arms that wind round one another."""

    def draw(count: int) -> tuple[list[list[float]], list[int]]:
        label = np.arange(count) % 3
        radius = np.sqrt(rng.uniform(0.02, 1, count))
        angle = 4.2 * radius + label * 2 * math.pi / 3
        at = 2 * radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1) + rng.normal(0, 0.1, (count, 2))
        return _short(at), label.tolist()

    (x, y), (test_x, test_y) = draw(TRAINING), draw(TEST)
    text = f"The task: three spirals, {TRAINING} points for training and {TEST} for the test."
    return Learn(x, y, test_x, test_y, 3, (12, 12, 12), text)


def play(
    net: nn.Module, batches: Sequence[Any], *, layer: str | None = None, channel: int = 0, loss: Loss | None = None
) -> Playground:
    """The page's numbers out of a network's batch norm layer and batches of its data. The network is not changed.

    Args:
        net: any network with batch norm of torch.nn or this package.
        batches: a list of ``(x, y)``, or of what `loss` takes; the first is the one that is walked through.
        layer: its name; by default the first.
        channel: its number.
        loss: ``loss(net, batch)``, a scalar; by default the mean cross-entropy.

    Returns:
        A `Playground`; `report.write_play` makes the page.

    Raises:
        InputError: no batches, or what `lab.explain` raises.
    """
    batches = list(batches)
    if not batches:
        raise InputError("play: there are no batches; give a list of (x, y) with one or more")
    found = explain(net, batches[0], layer=layer, channel=channel, loss=loss)
    inputs, feeding = _inputs(net, batches, found.layer)
    norm = net.get_submodule(found.layer)
    axis = -1 if getattr(norm, "channels_last", False) else 1
    plain = lesson()
    fold = _fold(feeding, norm, channel) if feeding else None
    return Playground(
        source=f"Layer {found.layer!r}, channel {channel}, of {type(net).__name__}, on {len(batches)} batches.",
        given=True, layer=found.layer, channel=channel,
        grid=_grid(inputs[0].movedim(axis, 1), channel), pool=_pool(found),
        batches=[_moments(x.movedim(axis, 1)[:, channel].double()) for x in inputs[:BATCHES]],
        fold=fold or plain.fold, folded=feeding[0] if feeding and fold else None,
        learn=_learn(batches) or plain.learn,
    )  # fmt: skip


@dataclass(frozen=True)
class PlayConfig(Config):
    """Args: layer, channel: that are shown, "" for the first layer; seed: of everything random."""

    steps: int = 200
    layer: str = ""
    channel: int = 0
    seed: int = 0


def play_built_in(*, checkpoint: str | Path | None = None, **changes: Any) -> Playground:
    """`play` for a built-in or given network on training batches.

    Args:
        checkpoint: a file of its weights; without one it is trained for `steps` first.
        changes: of `PlayConfig`: network, data, insert, steps, batch_size, lr, layer, channel, seed.

    Raises:
        InputError: an unknown setting, weights that do not fit, or what `play` raises.
    """
    config = checked(PlayConfig(), "play", changes)
    task = Task("play", config, config.seed)
    net = task.normalized()
    if checkpoint is not None:
        load_weights(net, Path(checkpoint))
        state = f"with the weights of {Path(checkpoint).name}"
    else:
        train(net, task, every=None)
        state = f"after {config.steps:,} training steps"
    x, y = task.data.x_train, task.data.y_train
    places = [batch_indices(len(x), config.batch_size, config.seed, config.steps + i) for i in range(BATCHES)]
    found = play(net, [(x[at], y[at]) for at in places], layer=config.layer or None, channel=config.channel)
    names = config.plain()
    source = (
        f"Network {names['network']} {state}, layer {found.layer}, channel {found.channel}, on training batches of "
        f"{config.batch_size} of {names['data']}."
    )
    return Playground(**{**found.__dict__, "source": source})


def _inputs(
    net: nn.Module, batches: Sequence[Any], layer: str
) -> tuple[list[Tensor], tuple[str, nn.Module, Tensor] | None]:
    """What the layer gets in training from each batch, and the layer whose output that is, with its first input."""
    walked = in_mode(copy.deepcopy(net), True)
    made: dict[int, tuple[str, nn.Module, Tensor, Tensor]] = {}
    seen: list[Tensor] = []
    feeding: list[Feeding] = []

    def produced(name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not feeding and isinstance(output, Tensor):
                made[id(output)] = (name, module, args[0].detach(), output)

        return keep

    def reached(module: nn.Module, args: tuple[Any, ...]) -> None:
        if id(args[0]) in made and not feeding:
            feeding.append(made[id(args[0])][:3])
        seen.append(args[0].detach())

    for name, module in walked.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            module.register_forward_hook(produced(name))
    walked.get_submodule(layer).register_forward_pre_hook(reached)
    with torch.no_grad():
        for batch in batches[:BATCHES]:
            made.clear()
            walked(batch[0] if isinstance(batch, (tuple, list)) else batch)
    return seen, feeding[0] if feeding else None


def _grid(x: Tensor, channel: int) -> Grid:
    """The first samples, an even number of channels from `channel` on, and the middle of space."""
    n = max(1, min(SAMPLES, len(x)) // 2 * 2)
    c = 1 if x.shape[1] == 1 else min(CHANNELS, x.shape[1] // 2 * 2)
    first = min(channel, x.shape[1] - c)
    x = x[:n, first : first + c]
    if x.ndim == 2:
        space, layouts = (1, 1), LAYOUTS[1]
    elif x.ndim == 3:
        length = min(math.prod(SPACE), x.shape[2])
        space, layouts, x = (1, length), LAYOUTS[2], x[:, :, :length]
    else:
        while x.ndim > 4:
            x = x[:, :, x.shape[2] // 2]
        height, width = (min(most, have) for most, have in zip(SPACE, x.shape[2:], strict=True))
        top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
        space, layouts, x = (height, width), ("image", "dense"), x[:, :, top : top + height, left : left + width]
    return Grid(_numbers(x.flatten()), n, c, math.prod(space), space, layouts)


def _pool(found: Explanation) -> Pool:
    return Pool(found.x[:POOL], found.dy[:POOL], found.gamma, found.beta, found.eps)


def _moments(x: Tensor) -> tuple[int, float, float]:
    x = x.double()
    mean = float(x.mean())
    return x.numel(), mean, float((x - mean).square().sum())


def _fold(feeding: Feeding, norm: nn.Module, channel: int) -> Fold | None:
    """Three weights of the channel in a row, along the middle of the kernel, and what they pass over."""
    assert isinstance(norm, _BatchNorm)
    if norm.running_mean is None or norm.running_var is None:
        return None
    _, layer, x = feeding
    assert isinstance(layer.weight, Tensor)
    weights, signal = layer.weight[channel].detach(), x[0]
    if not isinstance(layer, nn.Linear):
        group = channel // (layer.weight.shape[0] // int(getattr(layer, "groups", 1)))
        weights, signal = weights[0], signal[group * weights.shape[0]]
        while weights.ndim > 1:
            weights, signal = weights[weights.shape[0] // 2], signal[signal.shape[0] // 2]
    kernel = _numbers(weights[:3])
    kernel = [0.0, *kernel, 0.0] if len(kernel) == 1 else [*kernel, *[0.0] * (3 - len(kernel))]
    shown = _numbers(signal.flatten()[:8])
    if len(shown) < 3:
        return None

    def of(values: Tensor | None, default: float) -> float:
        return default if values is None else float(values[channel].detach())

    bias = layer.bias if isinstance(layer.bias, Tensor) else None
    return Fold(
        shown, kernel, of(bias, 0.0), of(norm.weight, 1.0), of(norm.bias, 0.0),
        of(norm.running_mean, 0.0), of(norm.running_var, 1.0), norm.eps,
    )  # fmt: skip


def _learn(batches: Sequence[Any]) -> Learn | None:
    """The samples of the batches on their first principal components; None where they are not classified."""
    pairs = [batch for batch in batches if isinstance(batch, (tuple, list)) and len(batch) == 2]
    if not pairs or not all(isinstance(v, Tensor) for pair in pairs for v in pair):
        return None
    x = torch.cat([x.flatten(1).double() for x, _ in pairs]).numpy()
    y = torch.cat([y for _, y in pairs])
    if y.ndim != 1 or y.is_floating_point() or len(y) < 20 or int(y.max()) > 19 or int(y.min()) < 0:
        return None
    _, first = np.unique(x, axis=0, return_index=True)  # a sample may be in several batches
    first = np.sort(first)[: TRAINING + TEST]
    x, labels = x[first], y.numpy()[first]
    features = min(FEATURES, x.shape[1])
    cut = len(x) * 2 // 3
    projected = _components(x, cut, features)
    text = (
        f"The task: {cut} of your samples for training and {len(x) - cut} for the test, on their first {features} "
        "principal components."
    )
    classes = int(y.max()) + 1
    at, kind = _short(projected), labels.tolist()
    return Learn(at[:cut], kind[:cut], at[cut:], kind[cut:], classes, (12, 12, 12), text)


def _components(x: NDArray[Any], cut: int, features: int) -> NDArray[Any]:
    """Principal components of the first `cut` samples, each of variance 1 over these, its largest weight positive."""
    center = x[:cut].mean(0)
    _, _, directions = np.linalg.svd(x[:cut] - center, full_matrices=False)
    directions = directions[:features]
    signs = np.sign(np.take_along_axis(directions, np.abs(directions).argmax(1)[:, None], 1))
    projected = (x - center) @ (directions * signs).T
    spread = projected[:cut].std(0)
    return np.asarray(projected / np.where(spread > 1e-12 * max(spread.max(), 1e-300), spread, 1.0))


def _short(values: NDArray[Any]) -> list[list[float]]:
    """Rounded, so that the page stays small."""
    return [[round(float(v), 4) for v in row] for row in values]


def _numbers(values: Tensor) -> list[float]:
    return [float(v) for v in values.detach().double()]
