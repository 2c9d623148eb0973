"""The page of a run: true words, one self-contained file, valid in light and dark."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.report import command, plots, verdict, write_report
from batchnorm.training import TrainConfig
from batchnorm.training.results import (
    Calibration,
    Curve,
    Export,
    InferenceTime,
    Insertion,
    LayerStatistics,
    TrainResult,
)


def curve(accuracies, every=10, seconds=1.0, diverged_at=None):
    steps = [every * i for i in range(len(accuracies))]
    losses = [1 / (1 + a) for a in accuracies]
    percentiles = [[-1.0 - a, 0.0, 1.0 + a] for a in accuracies]
    train_losses = [None, *losses[1:]]
    return Curve(steps, train_losses, losses, accuracies, percentiles, seconds, diverged_at)


def result(**changes):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    network.eval()
    example = torch.randn(8, 4)
    folded = batchnorm.fold(network, example)
    statistics = LayerStatistics("1", 3, 0.123, 0.9, 1.1)
    values = {
        "folder": Path("runs/<odd> & name"),
        "config": TrainConfig(data="da<b>ta & co.npz", steps=40, eval_every=10).resolve(),
        "environment": {"torch": "2.x"},
        "data": {
            "name": "toy",
            "training_samples": 4000,
            "test_samples": 1000,
            "input_shape": [4],
            "num_classes": 2,
            "notes": ["Held out.", "Taken as they are."],
            "sha256": "0" * 64,
        },
        "insertions": [Insertion("1", "BatchNorm1d", 3, "0", True)],
        "skipped": {"3": "it is an output layer"},
        "parameters": {"batch norm": 29, "baseline": 26},
        "probe": "unit 0 of layer 0",
        "curves": {
            "batch norm": curve([0.1, 0.8, 0.9, 0.95, 0.96]),
            "baseline": curve([0.1, 0.3, 0.5, 0.7, 0.8]),
        },
        "network": network,
        "example": example,
        "calibration": Calibration("pooled", 67, 4000, [statistics], 0.95, 0.952, 0.3, 0.29),
        "certificate": folded.certificate,
        "folded": folded.model,
        "exports": [Export("ONNX", "model.onnx", "verified", "any batch size.", 900, 1e-6, 2e-7)],
        "inference_time": InferenceTime(8, 31, 2.0, 1.0, 2.0),
    }
    return TrainResult(**{**values, **changes})


class Page(HTMLParser):
    """Open elements balance, and nothing outside the page is referred to."""

    VOID = ("meta", "link", "br", "wbr", "img", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.open, self.outside, self.text, self.ids = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action") and not value.startswith("#"):
                self.outside.append(value)
            if name == "id":
                self.ids.append(value)
        assert tag not in ("script", "link", "iframe")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page_of(found, folder):
    path = write_report(found, folder)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.outside == []
    return text, page


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A page with everything, its reader, and its folder: drawing takes seconds."""
    folder = tmp_path_factory.mktemp("whole")
    return *page_of(result(), folder), folder


@pytest.fixture
def no_drawings(monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)


def test_the_page_is_whole_self_contained_and_escaped(whole):
    text, page, _ = whole
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "da<b>ta" not in text
    assert "da<b>ta & co.npz" in "".join(page.text)
    assert len(page.ids) == len(set(page.ids))  # drawings inside one page share a name space
    assert "prefers-color-scheme: dark" in text


def test_drawings_take_their_colours_from_the_page(whole):
    text, _, folder = whole
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 6  # each for a wide screen and for a phone
    for drawing in drawings:
        assert 'role="img"' in drawing
        assert "var(--batch-norm)" in drawing
        assert "var(--baseline)" in drawing
        assert not re.search(r"#[0-9a-f]{6}\b(?!;?\")", re.sub(r'(xlink:)?href="[^"]*"|url\([^)]*\)', "", drawing))
    style = text[text.index("<style>") : text.index("</style>")]
    for variable in plots.VARIABLES.values():
        assert len(re.findall(rf"{variable}: #", style)) == 2  # light and dark
    names = {path.name for path in (folder / "plots").iterdir()}
    assert names == {f"{n}.{s}" for n in ("accuracy", "loss", "percentiles") for s in ("svg", "png")}
    assert "var(" not in (folder / "plots" / "loss.svg").read_text()


def saturating(rate, top, steps=30):
    return [0.1 + (top - 0.1) * (1 - 2.718 ** (-rate * step)) for step in range(steps)]


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize(
    ("ours", "baseline"),
    [
        (saturating(0.5, 0.97), saturating(0.12, 0.93)),
        (saturating(0.3, 0.45), saturating(0.15, 0.4)),
        (saturating(1.5, 0.99, 60), saturating(0.2, 0.98, 60)),
        (saturating(0.5, 0.25), saturating(0.2, 0.12)),
        ([0.1, 0.8, 0.9, 0.95, 0.96], [0.1, 0.3, 0.5, 0.7, 0.8]),
    ],
)
def test_named_steps_cover_no_line(ours, baseline, narrow):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    curves = {"batch norm": curve(ours, every=100), "baseline": curve(baseline, every=100)}
    with plots.drawing.styled("test"):
        figure = plots._accuracy(result(curves=curves), narrow)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        (axes,) = figure.axes
        boxes = [t.get_window_extent(canvas.get_renderer()) for t in axes.texts if t.get_text().startswith("step ")]
        assert len(boxes) == 2
        assert not boxes[0].overlaps(boxes[1])
        inside = axes.get_window_extent()
        for box in boxes:
            assert inside.x0 - 2 <= box.x0
            assert box.x1 <= inside.x1 + 2
            assert inside.y0 <= box.y0
            assert box.y1 <= inside.y1
            for line in axes.lines[:2]:
                path = line.get_transform().transform_path(line.get_path())
                assert not path.intersects_bbox(box, filled=False)


def test_the_page_is_the_same_again(whole, tmp_path):
    write_report(result(), tmp_path)
    for name in ("report.html", "plots/accuracy.svg", "plots/accuracy.png"):
        assert (tmp_path / name).read_bytes() == (whole[2] / name).read_bytes()


def test_the_page_shows_what_was_found(whole):
    page = whole[1]
    text = " ".join(" ".join(page.text).split())
    for shown in ("0.123", "0.900 to 1.100", "folded into", "model.onnx", "2.0e-07", "unit 0 of layer 0"):
        assert shown in text
    assert "None was put after 3 : it is an output layer." in text


def test_a_network_with_its_own_batch_norm_and_no_baseline(whole, tmp_path):
    alone = result(insertions=[], curves={"batch norm": curve([0.1, 0.9])})
    assert "that the baseline reached" in " ".join(whole[1].text)
    text = " ".join(page_of(alone, tmp_path)[1].text)
    assert "the network came with batch norm of its own" in text
    assert "that the baseline reached" not in text


def test_without_matplotlib_the_tables_stay_and_it_is_said(tmp_path, no_drawings):
    _, page = page_of(result(), tmp_path)
    assert "matplotlib is not installed" in " ".join(page.text)
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"curves": {"batch norm": curve([0.1, 0.5])}, "parameters": {"batch norm": 29}},
        {
            "curves": {
                "batch norm": curve([0.1], diverged_at=4),
                "baseline": curve([0.1, 0.3], diverged_at=17),
            },
            "calibration": None,
            "certificate": None,
            "folded": None,
            "exports": [],
            "inference_time": None,
        },
        {"fold_refusal": "it has a <reason>", "certificate": None, "inference_time": None},
        {"failure": "no", "calibration": None, "certificate": None, "exports": [], "inference_time": None},
        {"exports": [Export("ONNX", "model.onnx", "not written", "onnx is not installed")]},
    ],
)
def test_a_run_that_lacks_something_has_a_page_too(tmp_path, changes, monkeypatch):
    if "curves" not in changes:
        monkeypatch.setattr(plots, "available", lambda: False)  # drawing takes a second
    page_of(result(**changes), tmp_path)


def kinds(found):
    return [(finding.kind, finding.text) for finding in verdict(found)]


def compared(ours, baseline):
    return kinds(result(curves={"batch norm": curve(ours), "baseline": curve(baseline)}))


def test_a_faster_network_wins():
    first, second, *_ = compared([0.1, 0.8, 0.9, 0.95, 0.96], [0.1, 0.3, 0.5, 0.7, 0.8])
    assert first[0] == "win"
    assert "at step 10, in 25\N{NO-BREAK SPACE}% of the steps" in first[1]
    assert second[0] == "win"


def test_a_slower_network_loses():
    first, second, *_ = compared([0.1, 0.2, 0.3, 0.8, 0.8], [0.1, 0.8, 0.8, 0.8, 0.8])
    assert first[0] == "loss"
    assert "in 300\N{NO-BREAK SPACE}% of the steps" in first[1]
    assert second[0] == "tie"


def test_a_network_that_never_gets_there_loses():
    first, second, *_ = compared([0.1, 0.2, 0.3, 0.3, 0.3], [0.1, 0.8, 0.8, 0.8, 0.8])
    assert (first[0], second[0]) == ("loss", "loss")
    assert "did not reach" in first[1]


def test_equal_networks_tie():
    same = [0.1, 0.4, 0.6, 0.7, 0.7]
    first, second, *_ = compared(same, same)
    assert (first[0], second[0]) == ("tie", "tie")


def test_a_small_gain_on_few_samples_is_a_tie():
    (_, second, *_), few = compared([0.1, 0.92], [0.1, 0.90]), dict(result().data)
    assert second[0] == "tie"
    few["test_samples"] = 100_000
    many = result(curves={"batch norm": curve([0.1, 0.92]), "baseline": curve([0.1, 0.9])}, data=few)
    assert kinds(many)[1][0] == "win"


def test_divergence_failures_and_refusals_come_first():
    diverged = result(curves={"batch norm": curve([0.1], diverged_at=4)})
    assert kinds(diverged)[0] == ("loss", kinds(diverged)[0][1])
    assert "not finite at step 4" in kinds(diverged)[0][1]
    assert kinds(result(failure="so"))[0] == ("loss", "No network for inference: so")
    assert kinds(result(fold_refusal="so"))[0] == ("loss", "Not folded, exported as it is: so")


@pytest.mark.parametrize(
    ("statuses", "kind"),
    [(["verified"], "check"), (["verified", "failed"], "loss"), (["verified", "not checked"], "note")],
)
def test_exports_are_judged_by_their_worst(statuses, kind):
    exports = [Export("x", f"{s}.bin", s, "", 1, 1e-7, 1e-8) for s in statuses]
    [text] = [f.text for f in verdict(result(exports=exports)) if "exported forms" in f.text]
    [found] = [f.kind for f in verdict(result(exports=exports)) if f.text == text]
    assert found == kind
    assert text.startswith(f"1 of {len(statuses)} ")


@pytest.mark.parametrize(("speedup", "kind"), [(2.0, "win"), (1.02, "tie"), (0.8, "loss")])
def test_inference_time_is_judged_both_ways(speedup, kind):
    found = result(inference_time=InferenceTime(8, 31, 1.0, 1.0 / speedup, speedup))
    assert verdict(found)[-1].kind == kind


def test_the_command_repeats_the_run():
    found = result()
    words = command(found)
    assert "--data 'da<b>ta & co.npz'" in words
    for name, value in found.config.to_dict().items():
        option = "set" if name == "arguments" else name.replace("_", "-")
        assert (value is None) == (f"--{option}" not in words and f"--no-{option}" not in words)
