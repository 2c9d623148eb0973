"""The Python of the documentation: the README and the pages of verbs run, all other blocks at least are Python."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
VERBS = sorted((ROOT / "docs" / "verbs").glob("*.md"))
OTHERS = ("federated", "pools", "own-data", "run-files")
RUN = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in OTHERS), *VERBS]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_every_verb_has_a_page_with_an_example():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert VERBS
    for page in VERBS:
        assert blocks(page), page
        assert f"verbs/{page.name}" in nav


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__docs__"}
    for number, source in enumerate(blocks(page)):
        exec(compile(source, f"{page.name}, block {number}", "exec"), namespace)


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
    assert (ROOT / "docs" / "play.html").read_bytes() == written.read_bytes(), "batchnorm lab play --out docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_are_python_and_name_what_exists(page):
    import batchnorm as bn

    for source in blocks(page):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "bn":
                assert hasattr(bn, node.attr), f"{page.name}: bn.{node.attr}"
