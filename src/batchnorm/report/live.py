"""A watch that writes: a page that refreshes itself, JSON lines, TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from torch import nn

from batchnorm.diagnosis.alerts import Alert
from batchnorm.diagnosis.watching import Evaluation, Reading, Sink, Watch, rows
from batchnorm.errors import MissingDependencyError
from batchnorm.report.pages import as_name, render, write_page
from batchnorm.writing import refused

_EVERY = 2.0  # seconds between two pages
_POINTS = 240  # of a line


def watch(
    net: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    page: str | Path | None = None,
    jsonl: str | Path | None = None,
    tensorboard: Any = None,
    alerts: str | Sequence[str] = (),
    on_alert: Callable[[Alert], None] | None = None,
    budget: float = 0.01,
    every: int | None = None,
) -> Watch:
    """Diagnose batch normalization while a network trains, within a share of the training time.

    Now and then a training step is read: for each layer the distance between the batch's and the running statistics,
    ``KL(N(mean, var) || N(running_mean, running_var))`` in nats, mean over channels, with *biased* variance of the
    batch; dead and constant channels; the effective rate ``lr / |w|^2`` of the weights before the layer; gamma and its
    gradient; padding in the statistics; running statistics that stick; batches refused as not finite. A warning tells
    once of each fault, in words and with its repair. A step is read when the time that watching has taken stays
    within ``budget``; the other steps run without a hook on any layer.

    Args:
        net: the network that trains, not compiled. Its own forward has to be called. Copies of it are not watched.
        optimizer: for the effective rate. page: of an HTML file that is written anew and refreshes itself; it needs no
        server. jsonl: of a file of JSON lines, one a reading or evaluation; they are appended. tensorboard: a folder,
        or a writer with ``add_scalar(tag, value, step)``. alerts: rules such as ``"gap > 1 nat for 3 evaluations"``,
        ``"dead > 0"``, ``"distance > 2 nats for 5 readings"``;
            their metrics are those of `LayerReading` (over the layers the largest, the sum of counts, the smallest
            gamma), ``loss``, ``gap`` and what ``evaluated`` is given.
        on_alert: called with each `Alert`; by default a warning tells it.
        budget: the share of the training time, default 1 %.
        every: read each so many steps, whatever it costs.

    Returns:
        The `Watch`, a context manager. ``step(loss)`` and ``evaluated(loss)`` tell it losses; ``readings``,
        ``warnings``, ``alerts``, ``cost`` and ``report()`` say what it found.

    Raises:
        InputError: no batch normalization, a compiled network, a text that is no rule, a file that cannot be written.
        MissingDependencyError: a TensorBoard folder without the package tensorboard.

    Source: van Laarhoven 2017, section 3 (effective rate).

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> with watch(net, every=1) as found:
        ...     for _ in range(3):
        ...         net(torch.randn(16, 4)).sum().backward()
        >>> [reading.step for reading in found.readings]
        [1, 2, 3]
    """
    sinks: list[Sink] = []
    if jsonl is not None:
        sinks.append(JsonLines(jsonl))
    if tensorboard is not None:
        sinks.append(TensorBoard(tensorboard))
    found = Watch(net, optimizer=optimizer, alerts=alerts, on_alert=on_alert, budget=budget, every=every, sinks=sinks)
    if page is not None:
        live = LivePage(page)
        live.write(found)
        found.sinks.append(live)
    return found


class JsonLines:
    """Appends one line a record. A file of another watch is continued."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.stream = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise refused(self.path, error) from error

    def __call__(self, watch: Watch, record: Reading | Evaluation) -> None:
        self.stream.write(json.dumps(record.to_dict(), allow_nan=False) + "\n")
        self.stream.flush()

    def close(self) -> None:
        self.stream.close()


class TensorBoard:
    """Writes scalars: ``batchnorm/METRIC`` over all layers, ``LAYER/METRIC`` of each."""

    def __init__(self, writer: Any) -> None:
        self.writer, self.own = writer, not hasattr(writer, "add_scalar")
        if self.own:
            try:
                from torch.utils.tensorboard.writer import SummaryWriter
            except ImportError as error:
                raise MissingDependencyError(
                    "watch: tensorboard= of a folder needs the package tensorboard: pip install tensorboard"
                ) from error
            self.writer = SummaryWriter(str(writer))

    def __call__(self, watch: Watch, record: Reading | Evaluation) -> None:
        for name, value in record.values.items():
            self.writer.add_scalar(f"batchnorm/{name}", value, record.step)
        for layer in record.layers if isinstance(record, Reading) else ():
            for metric in ("distance", "dead", "rate", "gamma", "gamma_gradient"):
                value = getattr(layer, metric)
                if value is not None:
                    self.writer.add_scalar(f"{layer.name or 'network'}/{metric}", value, record.step)

    def close(self) -> None:
        if self.own:
            self.writer.close()


class LivePage:
    """One HTML file that is replaced whole, at most each two seconds, and that a browser loads again by itself."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.written = path, -math.inf
        self.watch: Watch | None = None

    def __call__(self, watch: Watch, record: Reading | Evaluation) -> None:
        if time.monotonic() - self.written >= _EVERY:
            self.write(watch)
        self.watch = watch

    def close(self) -> None:
        if self.watch is not None:
            self.write(self.watch, ended=True)

    def write(self, watch: Watch, ended: bool = False) -> None:
        """Write the page of what the watch knows now."""
        self.written = time.monotonic()
        last = watch.readings[-1] if watch.readings else None
        table = rows(last) if last is not None else []
        names = [layer.name for layer in last.layers] if last is not None else []
        values = render(
            "watch",
            ended=ended,
            watch=watch,
            rows=table,
            cells=[
                [
                    as_name(row["layer"]),
                    *list(row.values())[1:],
                    Markup(_line([_distance(r, name) for r in watch.readings])),
                ]
                for row, name in zip(table, names, strict=True)
            ],
            losses=_course("loss", watch.readings),
            gaps=_course("gap", watch.evaluations),
            written=time.strftime("%H:%M:%S"),
        )
        write_page("watch", self.path, values)


def _distance(reading: Reading, name: str) -> float | None:
    return next((layer.distance for layer in reading.layers if layer.name == name), None)


def _course(name: str, of: Sequence[Reading | Evaluation]) -> dict[str, str] | None:
    """A line of one number, and between what it lies."""
    values = [each.values.get(name) for each in of]
    drawn = _line(values, 600, 90)
    if not drawn:
        return None
    words = (
        f"{_words([v for v in values if v is not None and math.isfinite(v)])}, in steps {of[0].step} to {of[-1].step}."
    )
    return {"drawing": drawn, "words": words[0].upper() + words[1:]}


def _words(values: Sequence[float]) -> str:
    return f"from {values[0]:.3g} to {values[-1]:.3g}, between {min(values):.3g} and {max(values):.3g}"


def _line(values: Sequence[float | None], width: int = 140, height: int = 28) -> str:
    """A small line as SVG, without axes; empty for fewer than two numbers."""
    finite = [(i, v) for i, v in enumerate(values) if v is not None and math.isfinite(v)]
    finite = finite[:: max(1, math.ceil(len(finite) / _POINTS))]
    if len(finite) < 2:
        return ""
    low, high = min(v for _, v in finite), max(v for _, v in finite)
    first, last = finite[0][0], finite[-1][0]
    points = " ".join(
        f"{2 + (width - 4) * (i - first) / (last - first):.1f},"
        f"{height - 2 - (height - 4) * ((v - low) / (high - low) if high > low else 0.5):.1f}"
        for i, v in finite
    )
    label = _words([v for _, v in finite])
    line = f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg {size} role="img" aria-label="{label}"><title>{label}</title>{line}</svg>'
