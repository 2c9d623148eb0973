"""Bars: one line each at any width, and texts of the user's are never markup."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from batchnorm.progress import counting_bar, training_bar, trials_bar
from batchnorm.training.results import Curve


def terminal(width):
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)


def drawn(bar, use, width):
    """The lines of the bar on a terminal of that width."""
    console = terminal(width)
    with bar(console=console) as told:
        use(told)
        lines = console.render_lines(told._bar.get_renderable(), pad=False)
    return ["".join(segment.text for segment in line) for line in lines]


def printed(bar, use, width):
    """All that the bar has printed on a terminal of that width."""
    console = terminal(width)
    with bar(console=console) as told:
        use(told)
    return console.file.getvalue()


def train_a_little(bar):
    curves = {
        name: Curve(steps=[0], train_loss=[2.3], test_loss=[2.3], test_accuracy=[0.9876], percentiles=[[]])
        for name in ("batch norm", "baseline")
    }
    bar.step(1200, 5000, curves)


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_the_bar_of_a_training_is_one_line(width):
    lines = drawn(training_bar, train_a_little, width)
    assert len(lines) == 1
    assert len(lines[0]) <= width
    assert "1200/5000" in lines[0]
    assert width < 80 or "batch norm 98.8 %, baseline 98.8 %" in lines[0]


def test_a_network_that_diverged_says_so():
    curve = Curve(steps=[0], train_loss=[2.3], test_loss=[2.3], test_accuracy=[0.5], percentiles=[[]], diverged_at=3)
    (line,) = drawn(training_bar, lambda bar: bar.step(3, 5, {"batch norm": curve}), 80)
    assert "batch norm diverged" in line


def test_counts_and_trials_reach_their_end():
    text = printed(lambda console: counting_bar("calibrate", "batches", 2, console), lambda advance: advance(2), 80)
    assert "calibrate" in text
    assert "2/2" in text
    text = printed(lambda console: trials_bar("seeds;", console), lambda told: told(3, 4, "[bold]figure1[/x]"), 80)
    assert "3/4" in text
    assert "[bold]figure1[/x]" in text
