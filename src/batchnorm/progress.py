"""Progress bars on standard error, so that standard output is the result alone: one module for all long work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn


BESIDE_TEXT = 38  # columns for the count, a short bar, the rate and the time


class Measured(Protocol):
    """What the bar of a training shows of a network: the curve that is measured of it."""

    train_loss: list[float | None]
    diverged_at: int | None

    def latest(self) -> str:
        """The latest figure of the test part, in words."""


class TrainingBar:
    """Stages as lines, the training as a bar with the latest figures, the rate and the time left."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task: Any = None

    def stage(self, text: str) -> None:
        """A new part of the run has begun."""
        self._bar.console.print(text)

    def step(self, step: int, steps: int, curves: Mapping[str, Measured]) -> None:
        """`step` of `steps` updates are done."""
        if self._task is None:
            self._task = self._bar.add_task("", total=steps, completed=step)
        text = ", ".join(f"{name} {_figures(curve)}" for name, curve in curves.items())
        room = max(8, self._bar.console.width - BESIDE_TEXT)
        self._bar.update(self._task, completed=step, description=text if len(text) <= room else text[: room - 1] + "…")


def _figures(curve: Measured) -> str:
    return "diverged" if curve.diverged_at is not None else curve.latest()


@contextmanager
def training_bar(console: Console | None = None) -> Iterator[TrainingBar]:
    """The bar of `batchnorm train`: one line at any width, in which the figures of the networks go before the bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.speed:,.0f}/s" if task.speed else "")

    whole = Column(no_wrap=True)
    columns = (
        MofNCompleteColumn(table_column=whole),
        _text(),
        BarColumn(bar_width=None),
        Rate(table_column=whole),
        TimeRemainingColumn(compact=True, table_column=whole),
    )
    with _bar(columns, console) as bar:
        yield TrainingBar(bar)


@contextmanager
def counting_bar(
    title: str, unit: str, total: int | None = None, console: Console | None = None
) -> Iterator[Callable[[int], None]]:
    """A bar over things that are counted, such as batches; yields a function that takes how many more are done.

    A pass that has come to its end begins again with the next call.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

    columns = (_text(), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn())
    with _bar(columns, console) as bar:
        task = bar.add_task(title, total=total)

        def advance(done: int) -> None:
            if bar.tasks[0].finished:
                bar.reset(task)
            bar.advance(task, done)

        yield advance


@contextmanager
def trials_bar(unit: str, console: Console | None = None) -> Iterator[Callable[[int, int, str], None]]:
    """A bar over trials; yields a function that takes those done, those in all, and what was done last."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(unit), _text(), TimeElapsedColumn(), TimeRemainingColumn())
    with _bar(columns, console) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """A sign that work goes on whose length is unknown."""
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def _text() -> ProgressColumn:
    """The description, cut where the line has no room for it."""
    from rich.progress import TextColumn
    from rich.table import Column

    return TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))


def _bar(columns: Sequence[ProgressColumn], console: Console | None) -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    if console is None:
        console = Console(stderr=True, highlight=False, markup=False)
    return Progress(*columns, console=console, refresh_per_second=5)
