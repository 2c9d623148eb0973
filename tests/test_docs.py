"""The Python of the documentation: the README and the pages of verbs run, all other blocks at least are Python."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
VERBS = sorted((ROOT / "docs" / "verbs").glob("*.md"))
RUN = [ROOT / "README.md", *VERBS]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_are_python_and_name_what_exists(page):
    import batchnorm as bn

    for source in blocks(page):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "bn":
                assert hasattr(bn, node.attr), f"{page.name}: bn.{node.attr}"
