"""The documentation: every page has an example that runs and prints what it says, every public name its place."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import inspect
import io
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batchnorm.errors import MissingDependencyError

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
VERBS = sorted((ROOT / "docs" / "verbs").glob("*.md"))
REFERENCE = ROOT / "docs" / "reference"
RUN = [page for page in PAGES if REFERENCE not in page.parents]
PRINTED = runpy.run_path(str(ROOT / "docs" / "scripts" / "printed.py"))
rough = PRINTED["rough"]


def blocks(page: Path) -> list[str]:
    return [block.source for block in PRINTED["blocks"](page.read_text(encoding="utf-8"))]


def test_every_verb_has_a_page_with_an_example():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert VERBS
    for page in VERBS:
        assert blocks(page), page
        assert f"verbs/{page.name}" in nav


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_every_page_has_an_example_and_what_it_prints(page):
    text = page.read_text(encoding="utf-8")
    found = PRINTED["blocks"](text)
    assert len(found) == len(re.findall("^```python", text, re.MULTILINE))
    assert any(block.prints for block in found)
    assert text.count(PRINTED["FENCE"]) == sum(block.prints is not None for block in found)


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["docs"])
    for number, block, printed in PRINTED["run"](page.read_text(encoding="utf-8"), page.name):
        if block.prints is not None or printed.strip():
            assert told(printed) == told(block.prints or ""), f"{page.name}, block {number}"


def told(text: str) -> str:
    """`rough`, without what some versions of torch alone print: ``bias`` in a layer's repr, and the number of ranks."""
    text = re.sub(r"^\[Gloo\] .*\n?", "", text, flags=re.MULTILINE)
    if "bias" not in repr(torch.nn.BatchNorm1d(1)):
        text = text.replace(" bias=True,", "").replace(", bias=True)", ")")
    return rough(text)


def test_printed_blocks_are_compared():
    assert told("[Gloo] Rank 0 is connected\n2 folded\n") == "2 folded" != told("1 folded")
    assert rough("relative 2.63e-07 (accepted 1e-05), 1 folded") == "relative # (accepted #), 1 folded"
    assert rough("2 folded") != rough("1 folded")
    text = f"<!-- needs: ray -->\n\n```python\nprint(1)\n```\n\n{PRINTED['FENCE']}\n1\n```\n"
    found = PRINTED["blocks"](text)
    assert [(block.source, block.prints, block.needs) for block in found] == [("print(1)\n", "1\n", ("ray",))]


NUMBER = r"(?<![\w.#/-])\d+(?:\.\d+)?(?:e-?\d+)?"


def answers():
    """Each paragraph of the questions that links to a page of measurements, and the text of what it links to."""
    results = (ROOT / "docs" / "lab-results.md").read_text(encoding="utf-8")
    sections = {part.split("}")[0]: part for part in re.split(r"^## .*\{#", results, flags=re.MULTILINE)[1:]}
    for paragraph in (ROOT / "docs" / "questions.md").read_text(encoding="utf-8").split("\n\n"):
        experiments = re.findall(r"lab-results\.md#(\w+)", paragraph)
        pages = re.findall(r"\]\((torchvision-folds|verbs/fold)\.md", paragraph)
        linked = [sections[name] for name in experiments]
        linked += [(ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").partition("\n| ")[0] for name in pages]
        if linked:
            yield re.sub(r"^\*\*\d+\.|\]\([^)]*\)|`[^`]*`", "", paragraph), "\n".join(linked)


@pytest.mark.parametrize(("answer", "measured"), list(answers()), ids=lambda text: text.split("?")[0].strip()[:40])
def test_the_numbers_of_an_answer_are_those_of_its_source(answer, measured):
    known = [number.replace(",", "") for number in re.findall(NUMBER, measured)]
    for number in re.findall(NUMBER, answer):
        digits = len(number.partition(".")[2]) if "e" not in number else None
        same = [
            k for k in known if (float(k) == float(number) if digits is None else f"{float(k):.{digits}f}" == number)
        ]
        assert same, number


def test_the_pictures_of_pools_are_computed():
    module = runpy.run_path(str(ROOT / "docs" / "scripts" / "pools.py"))
    pools = {title: module["labels"](options, call) for title, options, call in module["PANELS"]}
    plain, valid, ghosts, groups, frames, all_ = pools.values()
    assert (plain == plain[:1, :, :1]).all()
    assert plain.max() + 1 == 4
    assert (valid[1, :, 2:] == -1).all()
    assert len(set(ghosts.flatten())) == 8
    assert len(set(groups.flatten())) == 2
    assert len(set(frames.flatten())) == 24
    assert len(set(all_.flatten()) - {-1}) == 4


def test_the_page_to_play_with_is_the_one_that_is_written(tmp_path):
    from batchnorm.lab import lesson
    from batchnorm.report import write_play

    written = write_play(tmp_path / "play.html", lesson())
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "play.html", written)]
    kept, new = (re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL) for page in pages)
    assert kept == new, "write it anew: batchnorm lab play --out docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_are_python_and_name_what_exists(page):
    import batchnorm as bn

    for source in blocks(page):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "bn":
                assert hasattr(bn, node.attr), f"{page.name}: bn.{node.attr}"


def test_every_public_name_has_an_anchor_of_its_own():
    import batchnorm as bn

    listed = set()
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        listed |= set(re.findall(r"^::: batchnorm\.([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert set(bn.__all__) - {"__version__"} <= listed
    for name in listed:
        owner, _, last = f"batchnorm.{name}".rpartition(".")
        with contextlib.suppress(MissingDependencyError):  # of an engine that is not installed
            assert getattr(importlib.import_module(owner), last).__doc__, name


def modules():
    import batchnorm as bn

    names = [m.name for m in pkgutil.walk_packages(bn.__path__, "batchnorm.") if "._" not in m.name]
    for name in names:
        with contextlib.suppress(MissingDependencyError):  # of an optional package that is not installed
            yield importlib.import_module(name)


def test_the_examples_of_docstrings_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = [e for m in modules() for e in doctest.DocTestFinder().find(m, globs={**vars(m)}) if e.examples]
    assert len(examples) > 60
    runner = doctest.DocTestRunner(verbose=False)
    wrong = []
    for example in examples:
        torch.manual_seed(0)
        printed = io.StringIO()
        if runner.run(example, out=printed.write).failed:
            wrong.append(printed.getvalue())
    assert not wrong, "\n".join(wrong)


def test_every_public_name_says_what_it_takes_gives_and_raises_and_from_where():
    import batchnorm as bn

    missing = []
    for name in bn.__all__:
        value = getattr(bn, name)
        if not callable(value) or (inspect.isclass(value) and issubclass(value, Exception)):
            continue
        wanted = ["Source:", "Examples:"]
        if inspect.signature(value).parameters:
            wanted.append("Args:")
        if inspect.isfunction(value):
            wanted += ["Returns:", "Raises:"]
        text = inspect.getdoc(value) or ""
        missing += [f"{name}: {section}" for section in wanted if not re.search(rf"^{section}", text, re.MULTILINE)]
    assert not missing, missing


@pytest.mark.slow
def test_the_built_site_has_an_anchor_for_each_public_name(tmp_path):
    import batchnorm as bn

    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed")
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)],
        cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    pages = " ".join(page.read_text(encoding="utf-8") for page in (site / "reference").rglob("*.html"))
    anchors = set(re.findall(r'id="batchnorm\.(\w+)"', pages))
    assert anchors >= set(bn.__all__) - {"__version__"}
    assert "drop-in for" in pages
    names = set(re.findall(r'id="(batchnorm\.[\w.]+)"', pages))
    assert [name for name in names if re.search(r"\._", name)] == []
    inner = ("forward_parts", "check_sequences", "can_be_fused", "check_choice", "checked_columns", "check_batch_size")
    assert [name for name in names if name.rpartition(".")[2] in inner] == []
    assert not re.search(r"=</span>\s*<span[^>]*>_[A-Z]", pages), "a default that is a private name"
    assert not re.findall(r"<summary>Example</summary>", pages)
    for page in site.rglob("*.html"):  # a fence that the site's Markdown does not know becomes a line of text
        told = re.sub(r"<pre.*?</pre>|<script.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert "<code>text" not in told, page
        assert "```" not in told, page
