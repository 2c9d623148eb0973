"""What all pages share: they fit a phone, whatever the names; labels stay apart; a verdict stands above each proof."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path

import pytest
import torch
from test_training_report import curve, result
from torch import nn

import batchnorm as bn
from batchnorm.lab.experiments import EXPERIMENTS
from batchnorm.lab.explanation import explain
from batchnorm.lab.results import Result, Trial
from batchnorm.report import drawing, lab_figures, plots, write_diagnosis, write_gallery, write_report
from batchnorm.report.diagnosis_page import short_names
from batchnorm.report.explain_page import write_explanation
from batchnorm.training.results import Calibration, ClassAccuracy, Curve, Insertion, LayerStatistics

LONG = "encoder.layers.11.a_very_long_name_of_a_projection_in_a_block.and_its_normalization"
NAN = float("nan")
DOCS = Path(__file__).parents[2] / "docs"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a_very_long_name_of_a_projection = nn.Linear(4, 4)
        self.the_normalization_that_follows_the_projection = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.the_normalization_that_follows_the_projection(self.a_very_long_name_of_a_projection(x))


def diagnosed(net):
    torch.manual_seed(0)
    return bn.diagnose(net, [2 * torch.randn(16, 4) + 1 for _ in range(3)])


def report_of_long_names(folder):
    layers = [LayerStatistics(f"{LONG}.{i}", 3, 0.1, 0.9, 1.1) for i in range(200)]
    found = result(
        insertions=[Insertion(f"{LONG}.{i}", "BatchNorm1d", 3, LONG, True) for i in range(200)],
        calibration=Calibration("pooled", 67, 4000, layers, 0.9, 0.9, 0.3, 0.2),
        classes=[ClassAccuracy("the only class", 4000, 1000, 1.0)],
    )  # fmt: skip
    return write_report(found, folder)


def report_of_nan(folder):
    broken = Curve([0, 10], [None, NAN], [2.0, NAN], [0.1, 0.1], [[NAN] * 3] * 2, 1.0, 10)
    found = result(
        curves={"batch norm": broken, "baseline": curve([0.1, 0.1])}, calibration=None, certificate=None, folded=None,
        exports=[], inference_time=None,
    )  # fmt: skip
    return write_report(found, folder)


def diagnosis_of_many(folder):
    return write_diagnosis(folder / "page.html", diagnosed(nn.Sequential(*[Block() for _ in range(40)])))


def diagnosis_of_one(folder):
    return write_diagnosis(folder / "page.html", diagnosed(nn.BatchNorm1d(4)))


def diagnosis_of_nan(folder):
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    net[1].running_var[0] = NAN
    return write_diagnosis(folder / "page.html", diagnosed(net))


def explanation(folder):
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    found = explain(net, (torch.randn(20, 4), torch.randint(3, (20,))))
    return write_explanation(folder / "page.html", found)


def gallery(folder):
    return write_gallery(folder / "page.html", [EXPERIMENTS["figure1"]], [figure1()])


def figure1():
    """A result with the panels of Figure 1, in which one network's unit moves ten times as far."""
    steps, trials = [0, 10, 20], []
    for seed in range(2):
        trial = Trial(seed)
        for arm, factor in (("batch norm", 1.0), ("without", 10.0)):
            trial.curve("accuracy", arm, steps, [0.1, 0.5, 0.9 / factor])
            bands = [[factor * (k + t / 20) for t in steps] for k in (-1, 0, 1)]
            trial.curve(f"percentiles {arm}", arm, steps, *bands)
            trial.values[arm] = {"best": 0.9, "final": 0.9, "steps": 10, "drift": 0.1}
        trials.append(trial)
    experiment = EXPERIMENTS["figure1"]
    settings = experiment.config.plain()
    data = {"training_samples": 1, "test_samples": 1, "notes": []}
    return Result(experiment.name, settings, data, tuple(trials), (), {})


PAGES = [
    report_of_long_names, report_of_nan, diagnosis_of_many, diagnosis_of_one, diagnosis_of_nan, explanation, gallery,
]  # fmt: skip


@pytest.mark.parametrize("make", PAGES, ids=lambda make: make.__name__)
def test_pages_fit_a_phone_in_light_and_dark(browser, tmp_path, make):
    path = make(tmp_path)
    for width, scheme in ((375, "light"), (1200, "dark")):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        wider = page.evaluate(
            "(width) => [...document.querySelectorAll('main *')].filter((e) => !e.closest('pre, .formula, svg') &&"
            " e.getClientRects().length && !e.closest('thead') && e.getBoundingClientRect().right > width + 1)"
            ".map((e) => e.outerHTML.slice(0, 200))",
            width,
        )
        assert wider == []
        shown = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert shown == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 26)")
        figures = page.eval_on_selector_all(
            "figure svg[role=img]", "all => all.filter((e) => e.getClientRects().length).length"
        )
        assert figures == page.locator("figure").count()  # one of the two drawings of each
        assert overlapping(page) == []
        page.close()


def overlapping(page):
    """Pairs of labels in the figures that cover each other."""
    texts = page.evaluate(
        "() => [...document.querySelectorAll('figure svg text')].filter((e) => e.getClientRects().length)"
        ".filter((e) => !(e.getAttribute('transform') || '').match(/rotate\\(-[1-8]/))"
        ".map((e) => { const r = e.getBoundingClientRect(); return [e.textContent, r.x, r.y, r.right, r.bottom]; })"
    )
    slack = 2.5  # pixels; the boxes are those of the line, which is higher than its letters
    return [
        (a[0], b[0])
        for a, b in combinations(texts, 2)
        if min(a[3], b[3]) - max(a[1], b[1]) > slack and min(a[4], b[4]) - max(a[2], b[2]) > 2 * slack
    ]


def test_a_verdict_stands_above_each_proof(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "available", lambda: False)
    monkeypatch.setattr(plots, "available", lambda: False)
    (tmp_path / "report").mkdir()
    report = write_report(result(), tmp_path / "report").read_text()
    for heading in ("Layers after training", "Moving averages against exact statistics", "certificate", "Files for"):
        part = report[re.search(rf"<h2>[^<]*{heading}", report).end() :]
        assert part.index('class="says') < part.index("<table"), heading
    for page in (diagnosis_of_one(tmp_path), explanation(tmp_path)):
        text = page.read_text()
        assert text.index('class="says') < text.index("<table")


def test_tables_keep_their_meaning_as_cards(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "available", lambda: False)
    text = diagnosis_of_many(tmp_path).read_text()
    cards = re.search(r'<table class="full cards.*?</table>', text, re.DOTALL)[0]
    assert cards.count('role="columnheader"') == 9
    assert cards.count('role="rowheader"') == 40
    assert cards.count('data-title="cause"') == 40


def test_both_networks_have_one_axis():
    result_ = figure1()
    with drawing.styled("test"):
        _, left, right = lab_figures.draw(EXPERIMENTS["figure1"], result_).get_axes()
        assert left.get_ylim() == right.get_ylim()
        assert right.get_ylim()[1] >= 20
        ends = [text.get_text() for text in right.texts]
    assert ends == ["15th", "50th", "85th"]


def drawn_again(name, narrow):
    """A figure of the lab's page, out of what the page keeps."""
    kept = json.loads((DOCS / "lab-figures.json").read_text(encoding="utf-8"))
    assert list(kept) == list(EXPERIMENTS)
    trials = tuple(Trial(**trial) for trial in kept[name])
    with drawing.styled(name):
        return lab_figures.draw(EXPERIMENTS[name], Result(name, {}, {}, trials, (), {}), narrow=narrow)


@pytest.mark.parametrize(
    ("name", "narrow", "ends"),
    [("padding", False, 2), ("padding", True, 2), ("standardization", False, 4), ("standardization", True, 0)],
)
def test_long_names_leave_room_for_lines(name, narrow, ends):
    figure = drawn_again(name, narrow)
    assert [len(axes.texts) for axes in figure.get_axes()] == [ends]
    figure.draw_without_rendering()
    assert figure.get_axes()[0].get_position().width > 0.5
    in_legends = sum(len(legend.get_texts()) for legend in figure.legends)
    assert in_legends == (0 if ends else 4)


@pytest.mark.parametrize("width", [1200, 375])
def test_the_gallery_of_the_documentation(browser, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(f"file://{DOCS}/lab-gallery.html")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert overlapping(page) == []
    cut = page.evaluate(
        "() => [...document.querySelectorAll('figure svg text')].filter((e) => e.getClientRects().length)"
        ".filter((e) => { const r = e.getBoundingClientRect(), s = e.ownerSVGElement.getBoundingClientRect();"
        " return r.left < s.left - 2 || r.right > s.right + 2; }).map((e) => e.textContent)"
    )
    assert cut == []
    page.close()


@pytest.mark.parametrize(("high", "scale"), [(5.0, "linear"), (50.0, "log")])
def test_logarithms_from_a_decade_on(high, scale):
    from matplotlib.figure import Figure

    from batchnorm.lab.experiment import Panel

    axes = Figure().subplots()
    axes.plot([1, 2], [1.0, high])
    lab_figures._name_axes(axes, Panel("loss", "Loss", yscale="log"))
    assert axes.get_yscale() == scale


def test_short_names():
    assert short_names(["0", "1"]) == ["0", "1"]
    names = [f"encoder.blocks.{i}.the_normalization_of_the_block" for i in range(3)]
    assert short_names(names) == ["0", "1", "2"]
    assert short_names([LONG]) == ["…and_its_normalization"]
    assert len(set(short_names([f"{LONG}_{i}" for i in range(3)]))) == 3


def test_the_certificate_begins_with_its_verdict():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    found = bn.fold(net, torch.randn(8, 4)).certificate
    assert found.proven
    assert str(found).startswith(f"Proven: in float32 the outputs moved by {found.relative:.1e} of the largest one")
    assert not type(found)((), (), (), "torch.fx", 1e-5).proven
