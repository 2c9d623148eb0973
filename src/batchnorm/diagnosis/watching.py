"""What batch normalization does while a network trains, read at steps whose cost stays within a budget."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from batchnorm.diagnosis.alerts import Alert, Rule, Rules, parse_rule
from batchnorm.diagnosis.summary import DEAD
from batchnorm.diagnosis.tables import finite, text_table
from batchnorm.errors import InputError
from batchnorm.nn import batch_norm as ours
from batchnorm.surgery.freezing import is_frozen
from batchnorm.surgery.modules import is_compiled

LAYER_METRICS = ("distance", "dead", "constant", "rate", "gamma", "gamma_gradient", "padding", "sticking", "skipped")
_FAR = 1.0  # nats
_PADDED = 0.01  # of the positions
_SETTLED = 3.0  # running averages have forgotten their start after momentum * batches of this size
_MOST_VALUES = 1 << 22  # of one input that are read


@dataclass(frozen=True)
class LayerReading:
    """One layer at one step.

    Attributes:
        name: the layer.
        distance: the mean over channels of the Kullback-Leibler divergence, in nats, of normal distributions with the
            batch's mean and *biased* variance from those with the running ones; None where a layer has no running
            statistics, or the values were masked.
        mean_off: root mean square over channels of the batch's mean less the running one, in running standard
        deviations. dead: channels whose variance in the batch is below eps / 100; constant: those of which all values
        are equal. channels: all channels. rate: learning rate over the squared norm of the weights before the layer,
        which it makes scale-invariant
            (van Laarhoven 2017); None without an optimizer.
        gamma: the mean absolute value of gamma; gamma_gradient: the norm of its gradient.
        padding: the share of positions at the end of the last axis that repeat the last one: padding in the statistics.
        sticking: whether the running statistics have not moved since the last reading, although they should.
        skipped: batches refused as not finite since the last reading.
    """

    name: str
    distance: float | None
    mean_off: float | None
    dead: int
    constant: int
    channels: int
    rate: float | None
    gamma: float | None
    gamma_gradient: float | None
    padding: float
    sticking: bool
    skipped: int


@dataclass(frozen=True)
class Reading:
    """All layers at one step. ``values``: over the layers, the largest or the sum; and the training loss, if known."""

    step: int
    layers: tuple[LayerReading, ...]
    values: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: what is not finite is None."""
        return {"kind": "reading", **finite(dataclasses.asdict(self))}


@dataclass(frozen=True)
class Evaluation:
    """Values of an evaluation; ``gap`` among them is its loss less the training loss since the last one, in nats."""

    step: int
    values: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: what is not finite is None."""
        return {"kind": "evaluation", **finite(dataclasses.asdict(self))}


Sink = Callable[["Watch", "Reading | Evaluation"], None]


@dataclass
class _Seen:
    """What one layer was given at a step that is read, as tensors on its device."""

    layer: _BatchNorm
    numbers: Tensor | None = None  # distance, mean_off, dead, constant, padding
    gradient: Tensor | None = None
    weight: Tensor | None = None  # of the layer before


@dataclass
class _Memory:
    """What is kept of a layer from one reading to the next."""

    mean: Tensor | None = None
    skipped: int = 0
    step: int = 0


class _RootHook:
    """Calls the watch before each forward of its network; copies of the network have none."""

    changes_nothing = True

    def __init__(self, watch: Watch | None) -> None:
        self.watch = watch

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.watch is not None and module is self.watch.net:
            self.watch._before(module)

    def __deepcopy__(self, memo: Any) -> _RootHook:
        return _RootHook(None)

    def __reduce__(self) -> Any:
        return _RootHook, (None,)


class Watch:
    """Reads the layers of a network while it trains. Made by `batchnorm.watch`; a context manager.

    Attributes:
        readings, evaluations: all so far.
        alerts: the rules that held; warnings: what was told, in words, each once a layer.
        cost: the share of the training time that watching has taken.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        alerts: Sequence[str] = (),
        on_alert: Callable[[Alert], None] | None = None,
        budget: float = 0.01,
        every: int | None = None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        if not isinstance(net, nn.Module):
            raise InputError(f"watch: expected a torch.nn.Module, got {type(net).__name__}")
        if is_compiled(net):
            raise InputError("watch: a compiled network does not run hooks; watch the network that was compiled")
        if not any(isinstance(module, _BatchNorm) for module in net.modules()):
            raise InputError(f"watch: {type(net).__name__} has no batch normalization; bn.insert puts it in")
        if not 0 < budget <= 1:
            raise InputError(f"watch: budget is a share of the training time, above 0 and at most 1; got {budget!r}")
        if every is not None and (not isinstance(every, int) or every < 1):
            raise InputError(f"watch: every is a number of steps, at least 1; got {every!r}")
        self.net, self.optimizer, self.budget, self.every = net, optimizer, budget, every
        self.on_alert, self.sinks = on_alert, list(sinks)
        rules: list[Rule] = [parse_rule(text) for text in ([alerts] if isinstance(alerts, str) else alerts)]
        self._rules = Rules(rules)
        self.readings: list[Reading] = []
        self.evaluations: list[Evaluation] = []
        self.alerts: list[Alert] = []
        self.warnings: list[str] = []
        self.steps = 0
        self._told: set[tuple[str, str]] = set()
        self._memory: dict[str, _Memory] = {}
        self._losses: list[Tensor | float] = []
        self._last_loss: Tensor | float | None = None
        self._seen: dict[str, _Seen] | None = None
        self._handles: list[Any] = []
        self._produced: list[tuple[Tensor, Tensor]] = []
        self._clock: float | None = None
        self._elapsed = self._spent = self._last_cost = self._reading_cost = 0.0
        self._root: Any = net.register_forward_pre_hook(_RootHook(self))

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    @property
    def cost(self) -> float:
        """The share of the training time that watching has taken so far."""
        return self._spent / self._elapsed if self._elapsed else 0.0

    def close(self) -> None:
        """End the watch: the last reading is finished, and the hooks are gone."""
        self._finish()
        self._detach()
        self._root.remove()
        for sink in self.sinks:
            close = getattr(sink, "close", None)
            if close is not None:
                close()
        self.sinks = []

    def step(self, loss: Tensor | float | None = None) -> None:
        """Tell that a training step is over, with its loss; gaps of evaluations are measured against it."""
        if loss is not None:
            self._last_loss = loss.detach() if isinstance(loss, Tensor) else float(loss)
            self._losses.append(self._last_loss)
            del self._losses[:-1000]
        self._finish()

    def evaluated(self, loss: float | None = None, training_loss: float | None = None, **values: float) -> Evaluation:
        """Tell what an evaluation gave, for rules and records.

        Args:
            loss: of the evaluation, in nats for a cross-entropy.
            training_loss: by default the mean of the losses that `step` was given since the last evaluation.
            values: more numbers by name.
        """
        if training_loss is None and self._losses:
            training_loss = sum(float(each) for each in self._losses) / len(self._losses)
        self._losses.clear()
        found = {name: float(value) for name, value in values.items()}
        if loss is not None:
            found["loss"] = float(loss)
        if training_loss is not None:
            found["training_loss"] = float(training_loss)
        if loss is not None and training_loss is not None:
            found.setdefault("gap", float(loss) - float(training_loss))
        evaluation = Evaluation(self.steps, found)
        self.evaluations.append(evaluation)
        self._tell(evaluation)
        return evaluation

    # A step

    def _before(self, net: nn.Module) -> None:
        if not net.training or not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return  # an evaluation, or a recomputation
        now = time.perf_counter()
        if self._clock is not None:
            self._elapsed += now - self._clock
        self._clock = now
        self._finish()
        self.steps += 1
        if self._is_due():
            self._attach()
        self._spend(now)

    def _is_due(self) -> bool:
        if self.every is not None:
            return (self.steps - 1) % self.every == 0
        return not self.readings or self._spent + self._last_cost <= self.budget * self._elapsed

    def _spend(self, since: float) -> None:
        spent = time.perf_counter() - since
        self._spent += spent
        self._reading_cost += spent

    def _attach(self) -> None:
        self._seen, self._produced, self._reading_cost = {}, [], 0.0
        for name, module in self.net.named_modules():
            if isinstance(module, _BatchNorm):
                self._handles.append(module.register_forward_pre_hook(self._noting(name), with_kwargs=True))
            elif isinstance(module, (nn.Linear, _ConvNd)) and self.optimizer is not None:
                self._handles.append(module.register_forward_hook(self._producing))
        self._handles.append(self.net.register_forward_hook(lambda module, args, output: self._detach()))

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._produced = [], []

    def _producing(self, module: Any, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self._produced.append((output, module.weight))

    def _noting(self, name: str) -> Callable[..., None]:
        def note(layer: Any, args: Any, kwargs: Any) -> None:
            if self._seen is None or name in self._seen:
                return
            start = time.perf_counter()
            x = args[0] if args else kwargs.get("input")
            weight = next((w for output, w in reversed(self._produced) if output is x), None)
            masked = any(kwargs.get(key) is not None for key in ("mask", "lengths", "weights"))
            seen = self._seen[name] = _Seen(layer, weight=weight)
            if isinstance(x, Tensor) and x.dim() >= 2 and x.numel() and not masked:
                with torch.no_grad():
                    seen.numbers = _numbers(layer, x.detach())
            if isinstance(layer.weight, Tensor) and layer.weight.requires_grad and torch.is_grad_enabled():
                self._gradients(layer.weight, seen)
            self._spend(start)

        return note

    def _gradients(self, gamma: Tensor, seen: _Seen) -> None:
        def keep(gradient: Tensor) -> None:
            seen.gradient = gradient.detach().norm()
            handle.remove()

        handle = gamma.register_hook(keep)

    # Afterwards

    def _finish(self) -> None:
        if self._seen is None:
            return
        start = time.perf_counter()
        self._detach()
        seen, self._seen = self._seen, None
        layers = tuple(self._layer(name, each) for name, each in seen.items())
        if layers:
            values = _totals(layers)
            if self._last_loss is not None:
                values["loss"] = float(self._last_loss)
            reading = Reading(self.steps, layers, values)
            self.readings.append(reading)
            self._warn(reading)
            self._tell(reading)
        self._spend(start)
        self._last_cost = self._reading_cost

    def _layer(self, name: str, seen: _Seen) -> LayerReading:
        layer: Any = seen.layer
        memory = self._memory.setdefault(name, _Memory())
        numbers = [None] * 5 if seen.numbers is None else seen.numbers.tolist()
        distance, mean_off, dead, constant, padding = (None if n is None or n == _UNKNOWN else n for n in numbers)
        skipped = getattr(layer, "num_batches_skipped", None)
        skipped = int(skipped.sum()) if isinstance(skipped, Tensor) else 0
        mean = layer.running_mean
        sticking = False
        if memory.mean is not None and mean is not None and memory.step < self.steps and _should_move(layer):
            sticking = torch.equal(mean, memory.mean)
        reading = LayerReading(
            name=name,
            distance=distance,
            mean_off=mean_off,
            dead=int(dead or 0),
            constant=int(constant or 0),
            channels=int(layer.num_features),
            rate=self._rate(seen.weight),
            gamma=None if layer.weight is None else float(layer.weight.detach().abs().mean()),
            gamma_gradient=None if seen.gradient is None else float(seen.gradient),
            padding=float(padding or 0.0),
            sticking=sticking,
            skipped=max(0, skipped - memory.skipped),
        )
        memory.mean = None if mean is None else mean.detach().clone()
        memory.skipped, memory.step = skipped, self.steps
        return reading

    def _rate(self, weight: Tensor | None) -> float | None:
        if weight is None or self.optimizer is None:
            return None
        for group in self.optimizer.param_groups:
            if any(p is weight for p in group["params"]):
                square = float(weight.detach().float().square().sum())
                return float(group["lr"]) / square if square else math.inf
        return None

    def _warn(self, reading: Reading) -> None:
        for kind, text, repair in _troubles(reading, dict(self.net.named_modules())):
            names = [layer.name for layer in reading.layers if _has(kind, layer, self.net)]
            new = [name for name in names if (kind, name) not in self._told]
            if not new:
                continue
            self._told |= {(kind, name) for name in new}
            shown = ", ".join(f"'{name}'" for name in new[:4]) + (f" and {len(new) - 4} more" if len(new) > 4 else "")
            message = f"step {reading.step}: {shown}: {text}. {repair}"
            self.warnings.append(message)
            warnings.warn(f"watch: {message}", stacklevel=2)

    def _tell(self, record: Reading | Evaluation) -> None:
        for alert in self._rules.see(record.step, record.values):
            self.alerts.append(alert)
            if self.on_alert is None:
                warnings.warn(f"watch: alert at {alert}", stacklevel=2)
            else:
                self.on_alert(alert)
        for sink in self.sinks:
            sink(self, record)

    def report(self) -> str:
        """The last reading as a table, the warnings and the alerts."""
        lines = [f"{len(self.readings)} readings in {self.steps} steps, {100 * self.cost:.2f} % of the time"]
        if self.readings:
            lines += text_table(rows(self.readings[-1]))
        lines += self.warnings + [f"alert: {alert}" for alert in self.alerts]
        return "\n".join(lines)

    __str__ = report


_UNKNOWN = -1.0


def _numbers(layer: Any, x: Tensor) -> Tensor:
    """Distance, mean_off, dead, constant and padding in one tensor, which is read back later; -1: unknown."""
    last = bool(getattr(layer, "channels_last", False))
    if x.numel() > _MOST_VALUES and len(x) > 1:
        x = x[:: math.ceil(x.numel() / _MOST_VALUES)]
    values = x.movedim(-1, 1) if last and x.dim() > 2 else x
    wide = values if values.dtype in (torch.float32, torch.float64) else values.float()
    var, mean = torch.var_mean(wide, [d for d in range(wide.dim()) if d != 1], correction=0)
    eps = float(layer.eps)
    found = [x.new_tensor(_UNKNOWN, dtype=var.dtype)] * 2
    running_mean, running_var = layer.running_mean, layer.running_var
    if running_mean is not None and running_mean.shape == mean.shape:
        off = (mean - running_mean) / (running_var + eps).sqrt()
        ratio = (var + eps) / (running_var + eps)
        found = [((ratio + off.square() - 1 - ratio.log()) / 2).mean(), off.square().mean().sqrt()]
    counts = [(var < DEAD * eps).sum().to(var.dtype), (var == 0).sum().to(var.dtype)]
    padding = x.new_zeros((), dtype=var.dtype) if last or x.dim() < 3 else _repeated_end(values).to(var.dtype)
    return torch.stack([*found, *counts, padding])


def _repeated_end(x: Tensor) -> Tensor:
    """The share of positions on the last axis that are the end of a sample and repeat its last position."""
    equal = x == x[..., -1:]
    equal = equal.all(dim=tuple(range(1, x.dim() - 1)))
    run = equal.flip(-1).cumprod(-1).sum(-1)
    whole = run == x.shape[-1]  # a constant sample is no padding
    return torch.where((run > 1) & ~whole, run, torch.zeros_like(run)).sum() / equal.numel()


def _should_move(layer: Any) -> bool:
    """Whether nobody has said that the running statistics stay."""
    return not is_frozen(layer) and getattr(layer, "update", "auto") != "never"


def _totals(layers: tuple[LayerReading, ...]) -> dict[str, float]:
    """Over the layers: the largest distance, rate and padding, the smallest gamma, and sums of counts."""
    found: dict[str, float] = {}
    for metric in ("distance", "mean_off", "rate", "gamma_gradient", "padding"):
        values = [value for layer in layers if (value := getattr(layer, metric)) is not None]
        if values:
            found[metric] = max(values, key=lambda value: math.inf if value != value else value)
    for metric in ("dead", "constant", "skipped", "sticking"):
        found[metric] = float(sum(getattr(layer, metric) for layer in layers))
    gammas = [layer.gamma for layer in layers if layer.gamma is not None]
    return found | ({"gamma": min(gammas)} if gammas else {})


def _has(kind: str, layer: LayerReading, net: nn.Module) -> bool:
    if kind == "distance":
        settled = _is_settled(net.get_submodule(layer.name))
        return settled and layer.distance is not None and not layer.distance <= _FAR
    if kind == "constant":
        return layer.constant > 0
    if kind == "dead":
        return layer.dead > layer.constant
    if kind == "padding":
        return layer.padding > _PADDED
    if kind == "skipped":
        return layer.skipped > 0
    return layer.sticking


def _is_settled(layer: Any) -> bool:
    """Whether enough batches came for the running averages to have left their start."""
    batches = layer.num_batches_tracked
    if batches is None or layer.momentum is None:
        return True
    return int(batches.max()) * float(layer.momentum) >= _SETTLED


def _troubles(reading: Reading, modules: dict[str, nn.Module]) -> list[tuple[str, str, str]]:
    """The kinds of trouble that there may be, each in words and with its repair."""
    worst = max((layer.distance or 0.0 for layer in reading.layers), default=0.0)
    padded = max((layer.padding for layer in reading.layers), default=0.0)
    stuck = next((layer.name for layer in reading.layers if layer.sticking), None)
    return [
        (
            "distance",
            f"running statistics are up to {worst:.2g} nats from the batch's, so evaluation does not follow training",
            "bn.calibrate(net, batches) before an evaluation measures them; bn.diagnose(net, batches) finds the cause",
        ),
        (
            "constant",
            "channels have one and the same value all over the batch; their output is beta",
            "Look at what comes before: a dead ReLU, a constant input, weights that are zero",
        ),
        (
            "dead",
            "channels have a variance below eps / 100, so that eps decides their scale",
            "Look at what comes before, or choose a smaller eps",
        ),
        (
            "padding",
            f"up to {100 * padded:.0f} % of the positions are ends that repeat one value, as padding does, and are in "
            "the statistics",
            "Give the layers mask= or lengths=, or run the network in bn.mask_padding(net, lengths)",
        ),
        (
            "skipped",
            "batches that were not finite were refused",
            "Look for an overflow before these layers, and at the learning rate",
        ),
        (
            "sticking",
            "running statistics have not moved since the last reading" + _why_stuck(modules.get(stuck or "")),
            "bn.freeze(net) says so where it is meant; else let them train",
        ),
    ]


def _why_stuck(layer: Any) -> str:
    if layer is None or not isinstance(layer, _BatchNorm):
        return ""
    if not layer.training:
        return ": the layer is in evaluation mode while the network trains"
    if layer.momentum == 0:
        return ": its momentum is 0"
    source = layer.source if isinstance(layer, ours.BatchNorm) else "auto"
    return ": it normalizes by its running statistics" if source == "running" else ""


def rows(reading: Reading) -> list[dict[str, str]]:
    """One row a layer: column title to text."""

    def text(value: float | None, pattern: str = "{:.3g}") -> str:
        return "" if value is None else "not finite" if not math.isfinite(value) else pattern.format(value)

    return [
        {
            "layer": layer.name or "(the network)",
            "distance, nats": text(layer.distance),
            "mean off": text(layer.mean_off),
            "dead": f"{layer.dead} of {layer.channels}",
            "constant": str(layer.constant),
            "effective rate": text(layer.rate),
            "gamma": text(layer.gamma),
            "its gradient": text(layer.gamma_gradient),
            "padding": text(layer.padding, "{:.1%}"),
            "skipped": str(layer.skipped),
            "moves": "no" if layer.sticking else "yes",
        }
        for layer in reading.layers
    ]
