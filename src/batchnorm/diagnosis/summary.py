"""A network's batch normalization at a glance: one row a layer, and what it costs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from html import escape
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.diagnosis.tables import text_table
from batchnorm.errors import SurgeryError
from batchnorm.surgery.capture import NotCapturedError, capture_settled
from batchnorm.surgery.comparison import Example
from batchnorm.surgery.flow import DataFlow, data_inputs, is_input, rank, value_of
from batchnorm.surgery.folding import uses_batch_statistics
from batchnorm.surgery.freezing import is_frozen
from batchnorm.surgery.frozen import TENSORS, eps_of, is_frozen_layer
from batchnorm.surgery.modules import unwrap
from batchnorm.surgery.parts import Part, parts_of
from batchnorm.surgery.roles import (
    is_activation,
    is_layer,
    is_normalization,
    is_weighted,
    reach,
    users,
)

_STYLE = (
    "body{font:14px/1.4 system-ui,sans-serif;margin:2em}div{overflow-x:auto}table{border-collapse:collapse}"
    "th,td{text-align:left;padding:.3em .8em;border-bottom:1px solid #ccc;white-space:nowrap}"
    "tr:not(.good) td:last-child{color:#b00;font-weight:bold}"
)
_SHOWN = 3
DEAD = 1e-2  # a running variance below this share of eps


@dataclass(frozen=True)
class LayerSummary:
    """One batch normalization layer. Facts of the data flow are None where it is unknown.

    Attributes:
        name: qualified name; type: its class; features: number of channels C.
        fed_by: the modules or calls whose output it normalizes; followed_by: what takes its own.
        placement: ``"before activation"``, ``"after activation"`` or ``"no activation"``.
        redundant_bias: whether the layer before it adds a bias that the normalization removes.
        trained: values that are trained (gamma and beta: 2 C); not_trained: all others (running
            mean and variance: 2 C; gamma and beta too where they take no gradient).
        values_per_channel: size of the pool on the example, the smallest where it is called often.
        source: the statistics that normalize in the mode it is in: ``"batch"`` or ``"running"``.
        frozen: whether ``freeze`` holds it, or its class is one with fixed statistics.
        health: ``"good"``; ``"broken"`` (values that are not finite, a negative variance),
            ``"untracked"`` (no running statistics), ``"starved"`` (one value per channel and
            normalized by it), ``"untrained"`` (running statistics never updated), ``"dead"`` (a
            channel whose running variance is below eps / 100).
    """

    name: str
    type: str
    features: int
    fed_by: tuple[str, ...] | None
    followed_by: tuple[str, ...] | None
    placement: str | None
    redundant_bias: bool | None
    trained: int
    not_trained: int
    values_per_channel: int | None
    source: str
    frozen: bool
    health: str


@dataclass(frozen=True)
class Summary:
    """The layers in the order of the data (of registration without an example), and totals.

    Attributes:
        layers: one ``LayerSummary`` a batch normalization layer.
        trainable: parameters that take a gradient; shared ones count once.
        non_trainable: all other parameters, and the layers' running means and variances, as Keras
            counts (``num_batches_tracked`` is no parameter).
        note: why the data flow is unknown, or known within parts alone; or None.
        parts: the modules whose own data flow stands for that of a network that cannot be captured as a whole.
    """

    layers: tuple[LayerSummary, ...]
    trainable: int
    non_trainable: int
    note: str | None = None
    parts: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return self.trainable + self.non_trainable

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**dataclasses.asdict(self), "total": self.total}

    def rows(self) -> list[dict[str, str]]:
        """The table: column title to text, one mapping a layer."""
        return [_row(layer) for layer in self.layers]

    def to_html(self) -> str:
        """A page of its own, nothing loaded from elsewhere."""
        rows = self.rows()
        head = "".join(f"<th>{escape(title)}</th>" for title in (rows[0] if rows else {}))
        body = "".join(
            f'<tr class="{escape(layer.health)}">'
            + "".join(f"<td>{escape(text)}</td>" for text in row.values())
            + "</tr>"
            for layer, row in zip(self.layers, rows, strict=True)
        )
        notes = "".join(f"<p>{escape(line)}</p>" for line in self._footer())
        return (
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>Batch normalization</title>'
            f"<style>{_STYLE}</style><div><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{notes}"
        )

    def __rich__(self) -> Any:
        """A table of rich, with what is not well in red."""
        from rich.console import Group
        from rich.table import Table

        table = Table()
        rows = self.rows()
        for title in rows[0] if rows else ():
            table.add_column(title)
        for layer, row in zip(self.layers, rows, strict=True):
            table.add_row(*row.values(), style=None if layer.health == "good" else "red")
        return Group(table, *self._footer())

    def _footer(self) -> list[str]:
        lines = [
            f"Total params: {self.total:,}",
            f"Trainable params: {self.trainable:,}",
            f"Non-trainable params: {self.non_trainable:,}",
        ]
        return lines + ([self.note] if self.note else [])

    def __str__(self) -> str:
        rows = self.rows()
        lines = text_table(rows) if rows else ["no batch normalization"]
        return "\n".join(lines + self._footer())


def summary(net: nn.Module, example: Any = None) -> Summary:
    """The batch normalization layers of ``net``: what feeds them, what follows, state and counts.

    A layer holds four vectors of C values, two trained (gamma, beta) and two not (running mean and
    running variance, in torch the *unbiased* one). ``net`` is not changed. Of a network that cannot be captured as a
    whole, the data flow is that of the modules that can be captured by themselves, each as far as it goes.

    Args:
        net: the network.
        example: an input: a tensor, a tuple of positional or a mapping of keyword arguments.
            Without it, what depends on the data flow stays unknown.

    Returns:
        `Summary`: a row a layer. ``print`` shows it as a table.

    Raises:
        InputError: when ``net`` is no module or fails on the example.

    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2 (the four vectors).

    Examples:
        >>> [(row.name, row.features) for row in summary(nn.Sequential(nn.BatchNorm1d(3))).layers]
        [('0', 3)]
    """
    root = unwrap(net, "summary")
    layers = {n: m for n, m in root.named_modules() if _is_listed(m)}
    parts, note = ([], None) if example is None else _parts(root, Example.of(example), list(layers))
    places = {name: next((part for part in parts if part.holds(name)), None) for name in layers}
    trainable, non_trainable = _totals(root)
    rows = tuple(_summarize(places[name], name, layers[name]) for name in _in_order(places))
    return Summary(rows, trainable, non_trainable, note, tuple(part.name for part in parts if part.name))


def _parts(net: nn.Module, example: Example, layers: list[str]) -> tuple[list[Part[DataFlow]], str | None]:
    """The data flow of the whole network, or of the parts that can be captured, and what remains unknown and why."""
    try:
        return [Part("", example, capture_settled(net, example))], None
    except NotCapturedError as error:
        whole = error
    except SurgeryError as error:
        return [], str(error)

    def plan(name: str, given: Example, lent: frozenset[str]) -> DataFlow:
        return capture_settled(net.get_submodule(name), given)

    found = parts_of(net, example, _is_listed, plan, whole)
    if not found.parts:
        return [], str(whole)
    shown = ", ".join(f"'{part.name}'" for part in found.parts[:_SHOWN])
    more = len(found.parts) - _SHOWN
    note = f"the network {whole.short}; its data flow is that of its parts {shown}{f' and {more} more' * (more > 0)}"
    outside = [name for name in layers if not any(part.holds(name) for part in found.parts)]
    if outside:
        note += f". {len(outside)} of {len(layers)} layers lie in none: '{outside[0]}': {found.reason(outside[0])}"
    return found.parts, note


def _in_order(places: dict[str, Part[DataFlow] | None]) -> list[str]:
    """The layers' names in the order of the data within a part, and of registration beside that."""
    first: dict[str, int] = {}
    for index, (name, part) in enumerate(places.items()):
        first.setdefault(name if part is None else part.name, index)
    calls: dict[str, int] = {}
    for part in {id(part): part for part in places.values() if part is not None}.values():
        nodes = enumerate(part.plan.nodes)
        calls |= {part.full(part.plan.name(node)): i for i, node in nodes if node.op == "call_module"}

    def key(name: str) -> tuple[int, int]:
        part = places[name]
        return first[name if part is None else part.name], calls.get(name, len(calls))

    return sorted(places, key=key)


def _totals(net: nn.Module) -> tuple[int, int]:
    parameters = list(net.parameters())
    statistics = {
        id(tensor): tensor for module in net.modules() if _is_listed(module) for tensor in _statistics(module)
    }
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    fixed = sum(p.numel() for p in parameters if not p.requires_grad)
    return trainable, fixed + sum(t.numel() for t in statistics.values())


def _is_listed(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or is_frozen_layer(module)


def _statistics(layer: Any) -> list[Tensor]:
    """The vectors that are no parameters: the running statistics, and gamma and beta where they are buffers."""
    own = dict(layer.named_buffers(recurse=False))
    names = ("running_mean", "running_var") if isinstance(layer, _BatchNorm) else TENSORS
    return [own[name] for name in names if own.get(name) is not None]


def _summarize(part: Part[DataFlow] | None, name: str, layer: Any) -> LayerSummary:
    calls = [] if part is None else part.plan.calls(part.inner(name))
    pool = min((size for call in calls if (size := _pool(call, layer))), default=None)
    trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    fixed = sum(p.numel() for p in layer.parameters() if not p.requires_grad)
    return LayerSummary(
        name=name,
        type=type(layer).__name__,
        features=_features(layer),
        fed_by=_described(part, [n for call in calls for n in data_inputs(call)[:1]]),
        followed_by=_described(part, [n for call in calls for n in call.users]),
        placement=_placement(part, calls[0], layer) if part is not None and calls else None,
        redundant_bias=_redundant_bias(part, calls, layer) if part is not None and calls else None,
        trained=trained,
        not_trained=fixed + sum(t.numel() for t in _statistics(layer)),
        values_per_channel=pool,
        source="batch" if _uses_batch(layer) else "running",
        frozen=is_frozen(layer) or not isinstance(layer, _BatchNorm),
        health=_health(layer, pool),
    )


def _features(layer: Any) -> int:
    return int(layer.num_features) if isinstance(layer, _BatchNorm) else len(layer.running_mean)


def _uses_batch(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and uses_batch_statistics(layer)


def _described(part: Part[DataFlow] | None, nodes: list[fx.Node]) -> tuple[str, ...] | None:
    if part is None:
        return None
    described = []
    for node in nodes:
        text = part.plan.describe(node)
        if part.name and _is_end(node):
            text = f"the {'output' if node.op == 'output' else 'input'} of '{part.name}'"
        described.append(part.full(text) if node.op == "call_module" else text)
    return tuple(dict.fromkeys(described))


def _is_end(node: fx.Node) -> bool:
    """Whether a value comes into the graph there, or leaves it."""
    return node.op in ("placeholder", "output") or is_input(node)


def _pool(call: fx.Node, layer: nn.Module) -> int | None:
    value = value_of(data_inputs(call)[0]) if data_inputs(call) else None
    return value.numel() // _features(layer) if isinstance(value, Tensor) else None


def _placement(part: Part[DataFlow], call: fx.Node, layer: nn.Module) -> str | None:
    """Where the activation is that comes next, or came last, without weights between; None if a part ends before."""
    flow = part.plan

    def ends(node: fx.Node) -> bool:
        return is_activation(flow, node) or is_weighted(flow, node) or is_normalization(flow, node)

    if getattr(layer, "activation", None):
        return "before activation"
    for following, found in ((users, "before activation"), (data_inputs, "after activation")):
        reached = list(reach(call, following, ends))
        if any(is_activation(flow, node) for node in reached):
            return found
        if part.name and any(map(_is_end, reached)):
            return None
    return "no activation"


def _redundant_bias(part: Part[DataFlow], calls: list[fx.Node], layer: nn.Module) -> bool | None:
    if any(_has_redundant_bias(part.plan, call, layer) for call in calls):
        return True
    fed = (source for call in calls for source in data_inputs(call)[:1])
    return None if part.name and any(map(_is_end, fed)) else False


def _has_redundant_bias(flow: DataFlow, call: fx.Node, layer: nn.Module) -> bool:
    source = data_inputs(call)[0]
    while isinstance(flow.module(source), nn.Identity) and len(source.users) == 1:
        source = data_inputs(source)[0]
    before = flow.module(source)
    if before is None or not is_layer(before) or before.bias is None or len(source.users) > 1:
        return False
    if isinstance(before, nn.Linear):
        return rank(source) == 2 or bool(getattr(layer, "channels_last", False))
    return True


def _health(layer: Any, pool: int | None) -> str:
    mean, var, counter = layer.running_mean, layer.running_var, getattr(layer, "num_batches_tracked", None)
    values = [*layer.parameters(recurse=False), *_statistics(layer)]
    if not all(bool(value.isfinite().all()) for value in values):
        return "broken"
    if pool == 1 and _uses_batch(layer):
        return "starved"
    if mean is None or var is None:
        return "untracked"
    if bool((var < 0).any()):
        return "broken"
    if isinstance(counter, Tensor) and not bool(counter.any()):
        return "untrained"
    eps = layer.eps if isinstance(layer, _BatchNorm) else eps_of(layer) or 0.0
    dead = (var < DEAD * eps).reshape(-1, _features(layer)).all(0)  # at every step, where there are steps
    return "dead" if bool(dead.any()) else "good"


def _row(layer: LayerSummary) -> dict[str, str]:
    def text(value: Any) -> str:
        if value is None:
            return "?"
        if isinstance(value, tuple):
            return ", ".join(value) or "-"
        return {True: "redundant", False: "-"}[value] if isinstance(value, bool) else f"{value:,}"

    return {
        "layer": layer.name or "(the network)",
        "type": layer.type,
        "features": f"{layer.features:,}",
        "fed by": text(layer.fed_by),
        "followed by": text(layer.followed_by),
        "placement": layer.placement or "?",
        "bias before": text(layer.redundant_bias),
        "params": f"{layer.trained + layer.not_trained:,}",
        "trained": f"{layer.trained:,}",
        "values/channel": text(layer.values_per_channel),
        "statistics": layer.source + (" (frozen)" if layer.frozen else ""),
        "health": layer.health,
    }
