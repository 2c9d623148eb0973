"""The page to play with: its JavaScript follows the reference, and every control is driven in a browser."""

from __future__ import annotations

import copy
import math
import runpy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm import reference
from batchnorm.cli import main
from batchnorm.errors import InputError
from batchnorm.lab.explanation import explain
from batchnorm.lab.playing import Playground, lesson, play
from batchnorm.report import write_play

ROOT = Path(__file__).parents[2]
NUMBERS = ROOT / "src/batchnorm/report/templates/play/numbers.js"
CLOSE = {"rel": 1e-12, "abs": 1e-12}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_play(tmp_path_factory.mktemp("play") / "play.html", lesson())


def opened(browser, path, **options):
    page = browser.new_page(**{"viewport": {"width": 1200, "height": 900}, **options})
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(path.as_uri())
    return page


@pytest.fixture
def page(browser, written):
    page = opened(browser, written)
    yield page
    assert page.errors == []
    page.close()


@pytest.fixture(scope="module")
def js(browser):
    """`js("sum", [1, 2])` calls a function of numbers.js; nothing else of the page is there."""
    page = browser.new_page()
    page.add_script_tag(content=NUMBERS.read_text() + "\nwindow.numbers = numbers;")
    yield lambda name, *args: page.evaluate("([name, args]) => numbers[name](...args)", [name, list(args)])
    page.close()


# The numbers


@pytest.mark.parametrize("m", [1, 2, 13])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_transform_and_gradient_follow_the_reference(js, m, eps):
    rng = np.random.default_rng(m)
    x, dy, gamma, beta = 3 + 2 * rng.normal(size=m), rng.normal(size=m), -1.7, 0.3
    column = x[:, None]
    found, wanted = (
        js("batchNorm", x.tolist(), gamma, beta, eps),
        reference.batch_norm(column, [gamma], [beta], eps=eps),
    )
    for name, key in (("y", "y"), ("xhat", "xhat"), ("mean", "mean"), ("variance", "var"), ("invStd", "inv_std")):
        np.testing.assert_allclose(np.ravel(found[name]), np.ravel(getattr(wanted, key)), rtol=1e-12, atol=1e-12)
    steps = js("backwardStepwise", dy.tolist(), x.tolist(), gamma, eps)
    by_step = reference.backward_stepwise(dy[:, None], column, [gamma], eps=eps)
    for name in ("dx", "dgamma", "dbeta", "dxhat", "dvar", "dmean"):
        np.testing.assert_allclose(np.ravel(steps[name]), np.ravel(getattr(by_step, name)), rtol=1e-12, atol=1e-12)
    compact, wanted = (
        js("backward", dy.tolist(), x.tolist(), gamma, eps),
        reference.backward(dy[:, None], column, [gamma], eps=eps),
    )
    for name in ("dx", "dgamma", "dbeta"):
        np.testing.assert_allclose(np.ravel(compact[name]), np.ravel(getattr(wanted, name)), rtol=1e-12, atol=1e-12)
    given = reference.inference(column, [0.4], [2.0], [gamma], [beta], eps=eps)
    assert js("inference", x.tolist(), 0.4, 2.0, gamma, beta, eps) == pytest.approx(given.y.ravel().tolist(), **CLOSE)


def test_labelled_pools_follow_the_reference(js):
    rng = np.random.default_rng(3)
    x, labels, weights = (
        rng.normal(size=(4, 3, 5)),
        rng.integers(-1, 6, size=(4, 3, 5)),
        rng.uniform(0, 2, size=(4, 3, 5)),
    )
    weights[0] = 0
    for given in (None, weights):
        wanted = reference.labelled_batch_norm(x, labels, given)
        found = js(
            "labelledBatchNorm",
            x.ravel().tolist(),
            labels.ravel().tolist(),
            None if given is None else given.ravel().tolist(),
        )
        assert found["xhat"] == pytest.approx(wanted.xhat.ravel().tolist(), **CLOSE)


@pytest.mark.parametrize(
    ("options", "layer", "call"),
    [
        ({}, {}, {}),
        ({"ghost": 4}, {"ghost_size": 4}, {}),
        ({"groups": 2, "ghost": 2}, {"channel_groups": 2, "ghost_size": 2}, {}),
        ({"groups": 1}, {"channel_groups": 1}, {}),
        ({"frame": True}, {"pool": "frame", "max_steps": 6}, {}),
        ({"valid": [6, 2, 5, 3, 1, 4]}, {}, {"lengths": torch.tensor([6, 2, 5, 3, 1, 4])}),
    ],
)
def test_pools_are_those_of_the_layers(js, options, layer, call):
    module = runpy.run_path(str(ROOT / "docs" / "scripts" / "pools.py"))
    module["labels"].__globals__["N"] = 6
    wanted = module["labels"](layer, call)
    if "valid" in options:
        options = {"valid": [t < length for length in options["valid"] for t in range(6)]}
    found = np.reshape(js("poolLabels", {"n": 6, "c": 4, "l": 6}, options), (6, 4, 6))
    pairs = set(zip(wanted.ravel().tolist(), found.ravel().tolist(), strict=True))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    assert ((wanted < 0) == (found < 0)).all()


def test_moments_merge_as_in_the_reference(js):
    rng = np.random.default_rng(1)
    parts = [rng.normal(5, 1, size=size) for size in (3, 1, 8)]
    whole = {"count": 0, "mean": 0, "m2": 0}
    for part in parts:
        whole = js("merge", whole, js("moments", part.tolist()))
    wanted = reference.merge_all([reference.moments(part[:, None]) for part in parts])
    assert [whole["count"], whole["mean"], whole["m2"]] == pytest.approx([12, *wanted.mean, *wanted.m2], **CLOSE)
    assert js("varianceOf", {"count": 1, "mean": 2, "m2": 0}, True) == 0


@pytest.mark.parametrize("unbiased", [True, False])
def test_running_statistics_follow_the_reference(js, unbiased):
    rng = np.random.default_rng(2)
    batches = [rng.normal(2, 1.5, size=(size, 1)) for size in (8, 8, 3, 8, 2)]
    parts = [{"count": len(b), "mean": float(b.mean()), "m2": float(((b - b.mean()) ** 2).sum())} for b in batches]
    wanted = {
        "moving": lambda some: reference.running_statistics(some, 0.3, unbiased=unbiased),
        "debiased": lambda some: reference.debiased_statistics(some, 0.3, unbiased=unbiased),
        "cumulative": lambda some: reference.cumulative_statistics(some, unbiased=unbiased),
        "exact": lambda some: reference.pooled_statistics(some, unbiased=unbiased),
    }
    for kind, statistics in wanted.items():
        found = js("runningStatistics", parts, {"kind": kind, "momentum": 0.3, "unbiased": unbiased})
        for t, item in enumerate(found, start=1):
            expected = statistics(batches[:t])
            assert [item["mean"], item["variance"]] == pytest.approx([*expected.mean, *expected.var], **CLOSE)


def test_formats_round_as_numpy_and_torch_do(browser, js):
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [
            rng.normal(size=300) * 10.0 ** rng.integers(-9, 6, 300),
            [0.0, 65519.9, 65520.0, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 6e-8, 2.9e-8],
        ]
    )
    formats = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    page = browser.new_page()
    page.add_script_tag(content=NUMBERS.read_text() + "\nwindow.numbers = numbers;")
    for name, dtype in formats.items():
        found = page.evaluate("([name, values]) => values.map(numbers.stored[name])", [name, values.tolist()])
        with np.errstate(over="ignore"):  # float16 has an end
            half = values.astype(np.float16)
        exact = torch.from_numpy(half).double() if name == "float16" else torch.tensor(values).to(dtype).double()
        assert found == exact.tolist()
    page.close()


def test_folding_follows_the_reference(js):
    rng = np.random.default_rng(4)
    x, w, b = rng.normal(size=9), rng.normal(size=3), 0.7
    map_ = js("inferenceAffine", 0.3, 1.7, -1.2, 0.4, 1e-3)
    wanted = reference.inference_affine([0.3], [1.7], [-1.2], [0.4], eps=1e-3)
    assert [map_["scale"], map_["shift"]] == pytest.approx([*wanted.scale, *wanted.shift], **CLOSE)
    for name, folded in (
        ("foldAfter", reference.fold_after(w.reshape(1, 1, 3), [b], wanted)),
        ("foldBefore", reference.fold_before(w.reshape(1, 1, 3), [b], wanted)),
    ):
        found = js(name, w.tolist(), b, map_)
        assert [*found["weight"], found["bias"]] == pytest.approx([*folded.weight.ravel(), *folded.bias], **CLOSE)
    assert js("paddingValue", map_) == pytest.approx(float(reference.padding_value(wanted)[0]), **CLOSE)
    for padding in (0, 1):
        given = torch.nn.functional.conv1d(*(torch.tensor(v).reshape(1, 1, -1) for v in (x, w)), padding=padding)
        assert js("convolve", x.tolist(), w.tolist(), b, padding) == pytest.approx(
            (given + b).ravel().tolist(), **CLOSE
        )


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu"])
@pytest.mark.parametrize("normalized", [True, False])
def test_the_network_learns_as_torch_does(js, activation, normalized):
    rng = np.random.default_rng(6)
    x, y, sizes = rng.normal(size=(10, 2)), rng.integers(0, 3, 10), [2, 5, 4, 3]
    ours = js("makeNetwork", sizes, {"seed": 3, "spread": 0.8, "normalized": normalized, "activation": activation})
    acts, layers = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}, []
    for index, layer in enumerate(ours["layers"]):
        linear = nn.Linear(sizes[index], sizes[index + 1], bias=not layer["norm"], dtype=torch.float64)
        linear.weight.data = torch.tensor(layer["weight"], dtype=torch.float64)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
        last = index == len(sizes) - 2
        layers += (
            [linear] + [nn.BatchNorm1d(sizes[index + 1]).double()] * layer["norm"] + [acts[activation]()] * (not last)
        )
    net = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.7)
    for _ in range(3):
        loss = nn.functional.cross_entropy(net(torch.tensor(x)), torch.tensor(y))
        optimizer.zero_grad()
        loss.backward()
        step = js("trainStep", ours, x.tolist(), y.tolist(), 0.7)
        assert step["loss"] == pytest.approx(loss.item(), **CLOSE)
        along = js("lossAlong", ours, x.tolist(), y.tolist(), step["found"], [0.0, 0.7])
        optimizer.step()
        ours = step["network"]
        again = copy.deepcopy(net)
        after = nn.functional.cross_entropy(again(torch.tensor(x)), torch.tensor(y)).item()
        assert along == pytest.approx([loss.item(), after], **CLOSE)
    linears = [m for m in net if isinstance(m, nn.Linear)]
    for layer, linear in zip(ours["layers"], linears, strict=True):
        np.testing.assert_allclose(layer["weight"], linear.weight.detach(), rtol=1e-12, atol=1e-12)
    net.eval()
    test = js("evaluate", ours, x.tolist(), y.tolist())
    assert test["loss"] == pytest.approx(
        nn.functional.cross_entropy(net(torch.tensor(x)), torch.tensor(y)).item(), **CLOSE
    )
    for q in (0.15, 0.5, 0.85):
        assert js("quantile", x[:, 0].tolist(), q) == pytest.approx(float(np.quantile(x[:, 0], q)), **CLOSE)
    places = [js("batchPlaces", 10, 4, 0, step) for step in (0, 1, 2)]
    assert len(set(places[0] + places[1])) == 8
    assert places[0] != places[2]


# The page


def shown(page, *ids):
    """The numbers behind the text, as the page has them."""
    return [float(page.get_attribute(f"#{name}", "data-value").replace("Infinity", "inf")) for name in ids]


def drive(page, name, value=None):
    """A control, as a reader would: a choice, a check, a slider's place, or a press."""
    control = page.locator(f"#{name}")
    if control.evaluate("e => e.tagName") == "SELECT":
        control.select_option(value)
    elif control.get_attribute("type") == "range":
        control.evaluate(
            "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', { bubbles: true })); }", str(value)
        )
    else:
        control.click()
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.wait_for_selector("#learn:not([aria-busy=true])") if name != "learn-run" else None


def assert_shown(page, wanted):
    found = dict(zip(wanted, shown(page, *wanted), strict=True))
    assert found == pytest.approx({key: float(value) for key, value in wanted.items()}, **CLOSE, nan_ok=True)


POOLS = [
    ("pool-layout", "dense", {"pool-m": 6, "pool-count": 4}),
    ("pool-layout", "image", {"pool-m": 36, "pool-count": 4}),
    ("pool-layout", "last", {"pool-m": 36, "pool-count": 4}),
    ("pool-samples", "ghost2", {"pool-m": 12, "pool-count": 12}),
    ("pool-samples", "ghost4", {"pool-m": 24, "pool-count": 8}),
    ("pool-samples", "ranks", {"pool-m": 18, "pool-count": 8}),
    ("pool-samples", "all", {"pool-m": 36, "pool-count": 4}),
    ("pool-samples", "domains", {"pool-m": 36, "pool-count": 4}),
    ("pool-channels", "two", {"pool-m": 72, "pool-count": 2}),
    ("pool-channels", "one", {"pool-m": 144, "pool-count": 1}),
    ("pool-valid", "lengths", {"pool-m": 24, "pool-count": 4}),
    ("pool-valid", "mask", {"pool-m": 36, "pool-count": 4}),
    ("pool-valid", "weights", {"pool-m": 36, "pool-count": 4}),
]


@pytest.mark.parametrize(("control", "value", "wanted"), POOLS)
def test_what_shares_statistics(page, control, value, wanted):
    drive(page, control, value)
    assert_shown(page, wanted)
    cells = page.eval_on_selector_all(
        "#pool-grid [data-place]", "all => all.map((e) => [+e.dataset.place, +e.dataset.pool])"
    )
    labels = np.array([pool for _, pool in sorted(cells)])
    grid = lesson().grid
    x = np.reshape(grid.values, (grid.n, grid.c, grid.l))[:, :, : 1 if value == "dense" else None]
    own = x.ravel()[labels == labels[0]]
    expected = reference.batch_norm(own[:, None])
    assert_shown(page, {
        "pool-m": len(own), "pool-sum": own.sum(), "pool-mean": own.mean(), "pool-variance": own.var(),
        "pool-squares": own.var() * len(own), "pool-xhat": expected.xhat[0, 0],
    })  # fmt: skip
    assert page.locator("#pool-grid .lit").count() == len(own)
    assert eval(page.inner_text("#pool-code").split(")(")[0] + ")", {"bn": bn_without_ranks()}) is not None


def bn_without_ranks():
    """The package, whose layers are made without a process group, since a test has none."""

    class Without:
        def __getattr__(self, name):
            make = getattr(bn, name)
            return lambda *args, process_group=None, **options: make(*args, **options)

    return Without()


def test_steps_masks_weights_and_counting(page):
    drive(page, "pool-layout", "last")
    drive(page, "pool-time", "step")
    assert_shown(page, {"pool-m": 6, "pool-count": 24})
    assert 'pool="frame"' in page.inner_text("#pool-code")
    assert page.locator("#pool-samples option[value=ghost2]").is_disabled()
    drive(page, "pool-layout", "sequence")
    assert page.input_value("#pool-time") == "all"
    x = np.reshape(lesson().grid.values, (6, 4, 6))
    drive(page, "pool-valid", "mask")
    page.click("[data-place='0']")
    assert_shown(page, {"pool-count": 4, "pool-xhat": 0})
    assert "is in no pool" in page.inner_text("#pool-says")
    page.click("[data-place='1']")
    assert_shown(page, {"pool-m": 35, "pool-mean": np.delete(x[:, 0], 0).mean()})
    drive(page, "pool-valid", "weights")
    page.click("[data-place='1']")
    assert_shown(page, {"pool-m": 37, "pool-mean": (x[:, 0].sum() + x[0, 0, 1]) / 37})
    drive(page, "pool-valid", "all")
    drive(page, "pool-counted", 5)
    assert_shown(page, {"pool-m": 5, "pool-sum": x[0, 0, :5].sum(), "pool-variance": x[0, 0, :5].var()})
    assert page.is_visible("#pool-partial")
    page.click("#pool-play")
    page.wait_for_function("() => +document.getElementById('pool-m').dataset.value >= 2")
    page.click("#pool-play")
    assert shown(page, "pool-m")[0] < 36
    page.focus("[data-place='1']")
    for key, place in (
        ("ArrowRight", 2),
        ("ArrowDown", 8),
        ("PageDown", 32),
        ("ArrowLeft", 31),
        ("ArrowUp", 25),
        ("PageUp", 1),
    ):
        page.keyboard.press(key)
        assert page.evaluate("() => document.activeElement.dataset.place") == str(place)
    assert page.locator("#pool-grid [tabindex='0']").count() == 1


def layer_numbers(x, dy, gamma=1.5, beta=0.5, eps=1e-5):
    x, dy = np.array(x, float)[:, None], np.array(dy, float)[:, None]
    forward = reference.batch_norm(x, [gamma], [beta], eps=eps)
    back = reference.backward_stepwise(dy, x, [gamma], eps=eps)
    return {
        "layer-m": len(x), "layer-mean": forward.mean, "layer-variance": forward.var, "layer-invstd": forward.inv_std,
        "layer-dgamma": back.dgamma, "layer-dbeta": back.dbeta, "layer-dvar": back.dvar, "layer-dmean": back.dmean,
    }, forward, back  # fmt: skip


def columns(page):
    names = page.eval_on_selector_all("#layer-rows tr:first-child td", "all => all.map((e) => e.dataset.of)")
    return {
        name: [
            float(v)
            for v in page.eval_on_selector_all(
                f"#layer-rows td[data-of={name}]", "all => all.map((e) => e.dataset.value)"
            )
        ]
        for name in names
    }


def assert_layer(page, x, dy, **settings):
    wanted, forward, back = layer_numbers(x, dy, **settings)
    assert_shown(page, {key: float(np.squeeze(value)) for key, value in wanted.items()})
    found = columns(page)
    assert found["x"] == pytest.approx(list(x), **CLOSE)
    assert found["xhat"] == pytest.approx(forward.xhat.ravel().tolist(), **CLOSE)
    assert found["dx"] == pytest.approx(back.dx.ravel().tolist(), **CLOSE)
    if "y" in found:
        assert found["y"] == pytest.approx(forward.y.ravel().tolist(), **CLOSE)
    assert shown(page, "layer-gap")[0] < 1e-9


def test_one_layer(page):
    x, dy = lesson().pool.x, lesson().pool.dy
    assert_layer(page, x, dy)
    drive(page, "layer-gamma", -2)
    assert_layer(page, x, dy, gamma=-2.0)
    assert "order of the values round" in page.inner_text("#layer-says")
    drive(page, "layer-beta", 1.25)
    drive(page, "layer-eps", 0)
    assert_layer(page, x, dy, gamma=-2.0, beta=1.25, eps=1.0)
    drive(page, "layer-reset")
    drive(page, "layer-size", 8)
    assert_layer(page, [*x, *(v + 0.5 for v in x[:2])], [*dy, *dy[:2]])
    drive(page, "layer-reset")
    dot = page.locator("#layer-forward [role=slider]").nth(2)
    dot.focus()
    for key in ("ArrowRight", "PageUp", "ArrowDown", "ArrowUp"):
        page.keyboard.press(key)
    page.wait_for_timeout(50)
    assert_layer(page, [*x[:2], x[2] + 1.1, *x[3:]], dy)
    assert dot.get_attribute("aria-valuenow") == "2.1"
    page.keyboard.press("End")
    page.wait_for_timeout(50)
    assert_layer(page, [*x[:2], 10, *x[3:]], dy)


def test_a_dot_is_dragged(page):
    x = lesson().pool.x
    page.locator("#layer-forward").scroll_into_view_if_needed()
    box = page.locator("#layer-forward [role=slider]").first.bounding_box()
    line = page.locator("#layer-forward").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(line["x"] + 14 + (line["width"] - 28) * 0.35, box["y"] + 5, steps=4)
    page.mouse.up()
    page.wait_for_timeout(50)
    assert_layer(page, [-3.0, *x[1:]], lesson().pool.dy)


def test_gradients_that_arrive(page):
    x, dy = lesson().pool.x, lesson().pool.dy
    drive(page, "layer-way", "steps")
    assert_layer(page, x, dy)
    _, _, back = layer_numbers(x, dy)
    found = columns(page)
    assert found["dxhat"] == pytest.approx(back.dxhat.ravel().tolist(), **CLOSE)
    parts = np.sum([found[key] for key in ("direct", "byVariance", "byMean")], axis=0)
    assert parts == pytest.approx(back.dx.ravel(), **CLOSE)
    drive(page, "layer-way", "compact")
    drive(page, "layer-gradient", "same")
    assert max(map(abs, columns(page)["dx"])) < 1e-12
    drive(page, "layer-gradient", "along")
    assert max(map(abs, columns(page)["dx"])) < 1e-5
    drive(page, "layer-gradient", "rest")
    slider = page.locator("[data-dy='1']")
    slider.evaluate("e => { e.value = 1; e.dispatchEvent(new Event('input', { bubbles: true })); }")
    page.wait_for_timeout(50)
    assert page.input_value("#layer-gradient") == "own"
    assert_layer(page, x, [dy[0], 1.0, *dy[2:]])
    drive(page, "layer-gradient", "own")
    assert_layer(page, x, [dy[0], 1.0, *dy[2:]])


def test_pools_that_go_wrong(page):
    pool = lesson().pool
    drive(page, "layer-one")
    assert_layer(page, pool.x[:1], pool.dy[:1])
    assert columns(page)["y"] == [0.5]
    assert columns(page)["dx"] == [0]
    assert "batch of one" in page.inner_text("#layer-says")
    drive(page, "layer-reset")
    drive(page, "layer-constant")
    assert columns(page)["y"] == [0.5] * 6
    assert "constant channel" in page.inner_text("#layer-says")
    drive(page, "layer-reset")
    drive(page, "layer-outlier")
    assert max(columns(page)["xhat"]) > 0.99 * math.sqrt(5)
    assert "outlier" in page.inner_text("#layer-says")


BATCHES = [{"count": count, "mean": mean, "m2": m2} for count, mean, m2 in lesson().batches]


@pytest.mark.parametrize(
    ("control", "value", "change"),
    [
        ("running-kind", "debiased", {"kind": "debiased"}),
        ("running-kind", "cumulative", {"kind": "cumulative"}),
        ("running-kind", "exact", {"kind": "exact"}),
        ("running-momentum", 0.4, {"momentum": 0.4}),
        ("running-variance", "biased", {"unbiased": False}),
        ("running-dtype", "float32", {"dtype": "float32"}),
        ("running-dtype", "float16", {"dtype": "float16"}),
        ("running-dtype", "bfloat16", {"dtype": "bfloat16"}),
        ("running-at", 7, {"at": 7}),
        ("running-x", -2, {"x": -2}),
    ],
)
def test_the_running_average(page, js, control, value, change):
    drive(page, control, value)
    options = {"kind": "moving", "momentum": 0.1, "unbiased": True, "dtype": "float64", "at": 20, "x": 1, **change}
    kept = js("runningStatistics", BATCHES, options)[options["at"] - 1]
    batch = BATCHES[options["at"] - 1]
    whole = reference.merge_all([reference.Moments(*map(np.array, b.values())) for b in BATCHES])
    spread = math.sqrt(whole.m2 / (whole.count - 1))
    x = whole.mean + options["x"] * spread
    trained = (x - batch["mean"]) / math.sqrt(batch["m2"] / batch["count"] + 1e-5)
    evaluated = (x - kept["mean"]) / math.sqrt(kept["variance"] + 1e-5)
    assert_shown(page, {
        "running-mean": kept["mean"], "running-variance-kept": kept["variance"], "running-batch-mean": batch["mean"],
        "running-batch-variance": batch["m2"] / batch["count"], "running-exact-mean": whole.mean,
        "running-exact-variance": spread**2, "running-train": trained, "running-eval": evaluated,
        "running-apart": evaluated - trained, "running-decay": 1 - options["momentum"],
    })  # fmt: skip


def test_an_average_that_sticks_and_keras_momentum(page):
    drive(page, "running-dtype", "bfloat16")
    drive(page, "running-momentum", 0.001)
    assert page.inner_text("#running-says").startswith("It sticks")
    assert shown(page, "running-stuck")[0] > 2
    drive(page, "running-dtype", "float64")
    assert shown(page, "running-stuck")[0] == 0
    assert "initial values" in page.inner_text("#running-says")
    drive(page, "running-decay-as")
    assert "share of the old" in page.inner_text("#running-convention")
    assert page.inner_text("#running-shown-decay") == "0.999"
    assert page.inner_text("#running-code") == "bn.BatchNorm2d(C, decay=0.999)"
    assert not page.is_visible("#running-shown-momentum")
    drive(page, "running-variance", "biased")
    assert page.inner_text("#running-kind-of-variance") == "variance, unbiased; kept: biased"


@pytest.mark.filterwarnings("ignore:running statistics of this package's layers stay float32")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_the_page_says_of_sixteen_bits_holds(page, dtype):
    """A layer of torch.nn sticks where the page says so, one of this package does not, though both are converted."""
    drive(page, "running-dtype", dtype)
    drive(page, "running-momentum", 0.001)
    assert page.inner_text("#running-code") == f"torch.nn.BatchNorm2d(C, momentum=0.001).to(torch.{dtype})"
    assert ("those of this package keep float32" in page.inner_text("#running-says")) == (dtype == "bfloat16")
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(16, 1, generator=generator) * 1.5 + 2 for _ in range(600)]
    exact = nn.BatchNorm1d(1, momentum=0.001)
    theirs, ours = (make(1, momentum=0.001).to(getattr(torch, dtype)) for make in (nn.BatchNorm1d, bn.BatchNorm1d))
    for x in batches:
        exact(x)
        theirs(x.to(theirs.weight.dtype))
        ours(x.to(theirs.weight.dtype))
    assert abs(ours.running_var - exact.running_var) < 1e-3
    assert abs(theirs.running_var - exact.running_var) > (0.1 if dtype == "bfloat16" else 1e-3)


def fold_case(case, padding, gamma, zero=False):
    """The network of a case, with the page's numbers."""
    given = lesson().fold
    conv = nn.Conv1d(1, 1, 3, padding=padding).double()
    conv.weight.data = torch.tensor(given.kernel, dtype=torch.float64).reshape(1, 1, 3)
    conv.bias.data.fill_(given.bias)
    norm = nn.BatchNorm1d(1).double()
    for name, value in (
        ("weight", gamma),
        ("bias", given.beta),
        ("running_mean", given.mean),
        ("running_var", given.variance),
    ):
        getattr(norm, name).data.fill_(value)

    class Readers(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = conv, norm

        def forward(self, x):
            z = self.conv(x)
            return torch.cat([self.norm(z), z], 1)

    return {
        "after": lambda: nn.Sequential(conv, norm), "before": lambda: nn.Sequential(norm, conv),
        "pool": lambda: nn.Sequential(conv, nn.MaxPool1d(2, 1), norm), "readers": Readers,
        "relu": lambda: nn.Sequential(conv, nn.ReLU(), norm),
    }[case]().eval()  # fmt: skip


@pytest.mark.parametrize("case", ["after", "before", "pool", "relu", "readers"])
@pytest.mark.parametrize("gamma", [1.5, -1.5])
def test_folds_are_those_of_the_package(page, case, gamma):
    drive(page, "fold-case", case)
    drive(page, "fold-gamma", gamma)
    signal = torch.tensor(lesson().fold.signal, dtype=torch.float64).reshape(1, 1, -1)
    for padding in (0, 1):
        if padding:
            drive(page, "fold-padding")
        if case == "before" and padding:
            assert page.inner_text("#fold-says").startswith("Not like this.")
            assert shown(page, "fold-gap")[0] > 0.1
            drive(page, "fold-repair")
        net = fold_case(case, padding, gamma)
        folds = not bn.fold(net, signal).certificate.kept
        assert page.inner_text("#fold-says").startswith("Folds" if folds else "Refused."), (case, gamma, padding)
        wanted = net(signal).detach().ravel().tolist()
        rows = page.eval_on_selector_all(
            "#fold-rows tr", "all => all.map((r) => [...r.cells].slice(1).map((c) => +c.dataset.value))"
        )
        assert [row[0] for row in rows] == pytest.approx(wanted, **CLOSE)
        assert [row[2] for row in rows] == pytest.approx([row[1] - row[0] for row in rows], **CLOSE)
        gap = max(abs(row[2]) for row in rows)
        assert shown(page, "fold-gap")[0] == pytest.approx(gap, **CLOSE)
        assert (gap < 1e-12) == folds


@pytest.mark.parametrize("name", ["w0", "w1", "w2", "bias", "gamma", "beta", "mean", "variance"])
def test_numbers_of_a_fold(page, name):
    given = lesson().fold
    values = {
        "w0": given.kernel[0],
        "w1": given.kernel[1],
        "w2": given.kernel[2],
        "bias": given.bias,
        "gamma": given.gamma,
        "beta": given.beta,
        "mean": given.mean,
        "variance": given.variance,
    }
    values[name] = 0.77
    drive(page, f"fold-{name}", 0.77)
    affine = reference.inference_affine([values["mean"]], [values["variance"]], [values["gamma"]], [values["beta"]])
    folded = reference.fold_after([[values["w0"], values["w1"], values["w2"]]], [values["bias"]], affine)
    w = folded.weight.ravel()
    assert_shown(page, {
        "fold-scale": affine.scale[0], "fold-shift": affine.shift[0], "fold-w0-folded": w[0], "fold-w1-folded": w[1],
        "fold-w2-folded": w[2], "fold-bias-folded": folded.bias[0], f"fold-{name}-value": 0.77,
    })  # fmt: skip
    drive(page, "fold-reset")
    assert shown(page, "fold-scale")[0] == pytest.approx(given.gamma / math.sqrt(given.variance + 1e-5), **CLOSE)


TRAIN = """([settings, steps]) => {
  const { rate, spread, size, seed, activation } = settings;
  const { x, y, testX, testY, classes, hidden } = data.learn;
  return [true, false].map((normalized) => {
    let net = numbers.makeNetwork([2, ...hidden, classes], { seed, spread, normalized, activation });
    let loss = 0;
    for (let t = 0; t < steps; t++) {
      const at = numbers.batchPlaces(x.length, size, seed, t);
      ({ network: net, loss } = numbers.trainStep(net, at.map((i) => x[i]), at.map((i) => y[i]), 10 ** rate));
    }
    return loss;
  });
}"""


@pytest.mark.parametrize(
    ("control", "value", "change"),
    [
        ("learn-rate", 0, {"rate": 0}),
        ("learn-spread", 1, {"spread": 1}),
        ("learn-size", 20, {"size": 20}),
        ("learn-seed", 4, {"seed": 4}),
        ("learn-activation", "tanh", {"activation": "tanh"}),
        ("learn-activation", "relu", {"activation": "relu"}),
    ],
)
def test_settings_of_the_network_that_learns(page, control, value, change):
    drive(page, control, value)
    for _ in range(3):
        drive(page, "learn-once")
    settings = {"rate": -0.5, "spread": 0.5, "size": 60, "seed": 1, "activation": "sigmoid", **change}
    with_, without = page.evaluate(TRAIN, [settings, 3])
    assert_shown(page, {"learn-step": 3, "learn-batchloss-0": with_, "learn-batchloss-1": without})


def test_a_network_learns(page):
    for _ in range(2):
        drive(page, "learn-many")
    assert_shown(page, {"learn-step": 200})
    ours, others = shown(page, "learn-testaccuracy-0", "learn-testaccuracy-1")
    assert ours > others + 5
    assert "it had the other’s best" in page.inner_text("#learn-says")
    assert len(page.eval_on_selector_all("#learn-accuracy polyline", "all => all")) == 2
    drive(page, "learn-run")
    page.wait_for_function("() => +document.getElementById('learn-step').dataset.value > 210")
    assert page.inner_text("#learn-run") == "Pause"
    assert page.get_attribute("#learn", "aria-busy") == "true"  # or a screen reader would say every frame's sentence
    drive(page, "learn-run")
    page.wait_for_selector("#learn:not([aria-busy=true])")
    assert page.inner_text("#learn-run") == "Train"
    step = shown(page, "learn-step")
    page.wait_for_timeout(60)
    assert shown(page, "learn-step") == step
    drive(page, "learn-reset")
    assert_shown(page, {"learn-step": 0})
    assert "Nothing learned yet" in page.inner_text("#learn-says")
    assert len(page.eval_on_selector_all("#learn-accuracy circle", "all => all")) == 2  # step 0, where no line goes yet


ALONG = """() => {
  const { x, y, testX, testY, classes, hidden } = data.learn;
  return [true, false].map((normalized) => {
    const options = { seed: 1, spread: 0.5, normalized, activation: "sigmoid" };
    const net = numbers.makeNetwork([2, ...hidden, classes], options);
    const at = numbers.batchPlaces(x.length, 60, 1, 0);
    const [bx, by] = [at.map((i) => x[i]), at.map((i) => y[i])];
    const { network, found } = numbers.trainStep(net, bx, by, 10 ** -0.5);
    const along = numbers.lossAlong(net, bx, by, found, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4].map((k) => k * 10 ** -0.5));
    const unit = numbers.evaluate(net, testX, testY).trace[2].z.map((row) => row[0]);
    return [Math.max(...along) - Math.min(...along), numbers.quantile(unit, 0.85) - numbers.quantile(unit, 0.15)];
  });
}"""


def test_percentiles_and_the_loss_along_the_gradient(page):
    (flat, width), (other_flat, other_width) = page.evaluate(ALONG)
    assert page.inner_text("#learn-flat-0") == page.inner_text("#learn-batchloss-1") == "–"  # no step was taken
    assert_shown(page, {"learn-width-0": width, "learn-width-1": other_width})  # before the first step
    drive(page, "learn-once")
    assert_shown(page, {"learn-flat-0": flat, "learn-flat-1": other_flat})
    drive(page, "learn-rate", 0.5)  # the same step is looked at with another rate
    assert shown(page, "learn-flat-0")[0] > flat


PRESSED = """([selector, turn]) => {
  const e = document.querySelector(selector);
  if (e.tagName === "SELECT") {
    const free = [...e.options].filter((option) => !option.disabled);
    e.value = free[(free.findIndex(({ value }) => value === e.value) + 1) % free.length].value;
    for (const name of ["input", "change"]) e.dispatchEvent(new Event(name, { bubbles: true }));
  } else if (e.type === "range") {
    e.value = +e.min + ((e.max - e.min) * ((turn * 7 + 3) % 23)) / 23;
    e.dispatchEvent(new Event("input", { bubbles: true }));
  } else if (e.matches("[role=slider]"))
    e.dispatchEvent(new KeyboardEvent("keydown", { key: turn % 2 ? "ArrowRight" : "PageDown", bubbles: true }));
  else e.click();
  const busy = byId("learn").ariaBusy === "true";  // then both frames have work
  const next = (done) => requestAnimationFrame(done);
  return new Promise((done) => next(() => next(() => setTimeout(done, 0, busy ? 2 : 1))));
}"""
LIMIT = 1.5 / 60  # seconds: a frame of 60 a second, and half of one more for cores that others use


def test_every_control_answers_within_a_frame(browser, written):
    """Processor time of the page's thread for scripts, style and layout, the median of a few uses of each control."""
    page = opened(browser, written)
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    drive(page, "layer-size", 12)  # the most there is to draw
    drive(page, "layer-way", "steps")
    drive(page, "learn-many")

    def spent():
        found = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
        return sum(found[name] for name in ("ScriptDuration", "LayoutDuration", "RecalcStyleDuration"))

    names = page.eval_on_selector_all("main :is(input, select, button)[id]", "all => all.map((e) => `#${e.id}`)")
    longest = {}
    for name in [*names, "[data-dy='0']", "[data-place='30']", "#layer-forward [role=slider]"]:
        if not page.locator(name).first.is_visible():
            continue
        times = []
        for turn in range(3):
            before = spent()
            frames = page.evaluate(PRESSED, [name, turn])
            times.append((spent() - before) / frames)
            page.evaluate("() => byId('learn-run').textContent === 'Pause' && byId('learn-run').click()")
            page.wait_for_selector("#learn:not([aria-busy=true])")
        longest[name] = sorted(times)[1]
    assert len(longest) > 40
    assert {name: seconds for name, seconds in longest.items() if seconds > LIMIT} == {}
    page.close()


def test_every_control_is_driven_here(page):
    source = Path(__file__).read_text()
    ids = page.eval_on_selector_all("main input[id], main select[id], main button[id]", "all => all.map((e) => e.id)")
    assert len(ids) > 35
    fold = {f"fold-{name}" for name in ("w0", "w1", "w2", "bias", "gamma", "beta", "mean", "variance")}
    assert [name for name in ids if f'"{name}"' not in source and f'"#{name}"' not in source and name not in fold] == []


@pytest.mark.parametrize(("width", "scheme"), [(375, "dark"), (768, "light"), (1200, "dark")])
def test_it_fits_the_screen(browser, written, width, scheme):
    page = opened(browser, written, viewport={"width": width, "height": 800}, color_scheme=scheme)
    drive(page, "learn-many")
    for value in ("last", "image", "dense", "sequence"):
        drive(page, "pool-layout", value)
    drive(page, "layer-size", 12)
    drive(page, "layer-way", "steps")
    drive(page, "fold-case", "readers")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.evaluate(
        "(width) => [...document.querySelectorAll('main *')].filter((e) => !e.closest('.wide, .code') &&"
        " e.getClientRects().length && e.getBoundingClientRect().right > width + 1).map((e) => e.outerHTML)",
        width,
    )
    assert outside == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 26)")
    assert page.errors == []
    page.close()


def test_names_and_motion_for_those_who_do_not_see_or_do_not_want_it(browser, written):
    page = opened(browser, written, reduced_motion="reduce")
    nameless = page.eval_on_selector_all(
        "input, select, button, [role=slider], [role=img], [role=group], [role=grid]",
        "all => all.filter((e) => !e.ariaLabel && !e.getAttribute('aria-labelledby') && !(e.labels && e.labels.length)"
        " && !e.textContent.trim()).map((e) => e.outerHTML)",
    )
    assert nameless == []
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    # A screen reader says what is shown beside a slider, not its place, and not every number that follows.
    drive(page, "layer-eps", -2)
    drive(page, "learn-rate", 1)
    drive(page, "running-decay-as")
    said = {"layer-eps": "0.01", "learn-rate": "10", "running-momentum": "0.9", "fold-w1": "−0.5"}
    assert {name: page.get_attribute(f"#{name}", "aria-valuetext") for name in said} == said
    assert page.eval_on_selector_all("output", "all => all.every((e) => e.ariaLive === 'off')")
    drive(page, "pool-play")
    first = shown(page, "pool-m")
    page.wait_for_timeout(400)
    assert shown(page, "pool-m") == first == [1]
    ranks = page.evaluate("() => [...document.querySelectorAll('h1, h2, h3')].map((e) => +e.tagName[1])")
    assert all(b - a <= 1 for a, b in pairwise(ranks))
    page.keyboard.press("Tab")
    page.locator(".skip").press("Enter")
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("() => document.activeElement.id || document.activeElement.getAttribute('role')"))
    assert reached[:7] == [
        "pool-layout",
        "pool-samples",
        "pool-channels",
        "pool-time",
        "pool-valid",
        "pool-code",
        "gridcell",
    ] or (reached[:6] == ["pool-layout", "pool-samples", "pool-channels", "pool-time", "pool-valid", "gridcell"])
    assert "layer-size" in reached
    page.close()


# The numbers of a network


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu().mean((2, 3)))


def pairs(count=5, size=8):
    rng = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 2, 6, 5, generator=rng), torch.randint(3, (size,), generator=rng)) for _ in range(count)]


def test_the_numbers_of_a_network():
    net, batches = Net().double(), [(x.double(), y) for x, y in pairs()]
    nn.init.uniform_(net.norm.weight, 0.5, 2)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = play(net, batches, channel=2)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    walked = explain(net, batches[0], channel=2)
    assert (found.pool.x, found.pool.dy) == (walked.x[:12], walked.dy[:12])
    z = [net.first(x).detach() for x, _ in batches]
    for (count, mean, m2), values in zip(found.batches, z, strict=True):
        assert (count, mean) == (8 * 30, pytest.approx(float(values[:, 2].mean())))
        assert m2 == pytest.approx(float(values[:, 2].var(correction=0)) * count)
    assert (found.grid.n, found.grid.c, found.grid.space) == (6, 4, (2, 3))
    assert found.grid.values == z[0][:6, :, 2:4, 1:4].flatten().tolist()
    assert found.folded == "first"
    assert found.fold.kernel == net.first.weight[2, 0, 1].tolist()
    assert found.fold.gamma == net.norm.weight[2].item()
    assert found.learn.classes == 3
    assert len(found.learn.x) == 26


def test_layers_of_other_kinds():
    x, y = torch.randn(30, 7), torch.randint(2, (30,))
    dense = play(nn.Sequential(nn.BatchNorm1d(7), nn.Linear(7, 2)), [(x, y)])
    assert dense.folded is None
    assert (dense.grid.l, dense.grid.layouts) == (1, ("dense",))
    sequence = nn.Sequential(nn.Conv1d(3, 5, 1), nn.BatchNorm1d(5), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    found = play(sequence, [(torch.randn(4, 3, 9), torch.randint(5, (4,)))])
    assert (found.grid.layouts, found.grid.c, found.grid.n) == (("sequence", "last", "dense"), 4, 4)
    assert found.fold.kernel[0] == found.fold.kernel[2] == 0
    assert found.learn == lesson().learn  # too few samples
    volume = nn.Sequential(nn.BatchNorm3d(1), nn.Flatten(), nn.Linear(27, 2))
    assert play(volume, [(torch.randn(4, 1, 3, 3, 3), torch.randint(2, (4,)))]).grid.c == 1
    with pytest.raises(InputError, match="no batches"):
        play(Net(), [])


def test_a_page_of_a_network(browser, tmp_path):
    found = play(Net(), pairs())
    path = write_play(tmp_path / "own.html", Playground(**{**found.__dict__, "source": "</script><b>own</b>"}))
    page = opened(browser, path, viewport={"width": 375, "height": 800})
    assert page.inner_text("#source") == "</script><b>own</b>"
    assert_shown(page, {"running-batch-mean": found.batches[min(20, len(found.batches)) - 1][1], "layer-m": 12})
    assert "slice" in page.inner_text("#fold")
    assert page.locator("#pool-layout option[value=sequence]").is_disabled()
    drive(page, "learn-once")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.errors == []
    page.close()
    net = Net()
    with torch.no_grad():
        net.first.weight.fill_(float("inf"))
    with pytest.raises(InputError, match="not finite"):
        write_play(tmp_path / "bad.html", play(net, pairs()))
    assert not (tmp_path / "bad.html").exists()


def test_the_page_is_small_and_needs_nothing(written):
    text = written.read_text()
    assert len(text.encode()) < 300_000
    for word in ("http://", "https://", "src=", "@import", "fetch(", "XMLHttpRequest"):
        assert word not in text.replace("http://www.w3.org/2000/svg", "")


def test_the_command(tmp_path, capsys):
    assert main(["lab", "play", "--out", str(tmp_path / "lesson")]) == 0
    assert "to play with" in (tmp_path / "lesson" / "play.html").read_text()
    words = ["lab", "play", "--data", "digits", "--set", "steps=2", "--set", "channel=3", "--out", str(tmp_path)]
    assert main(words) == 0
    assert "after 2 training steps" in (tmp_path / "play.html").read_text()
    assert main([*words, "--checkpoint", str(tmp_path / "nowhere.pt")]) == 2
    assert "nowhere.pt" in capsys.readouterr().err
    assert main(["lab", "figure1", "--checkpoint", "x.pt"]) == 2
    assert "`lab play`" in capsys.readouterr().err
