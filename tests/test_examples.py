"""The examples run, short, and show what their text claims; notebooks run cell by cell and hold no outputs."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, **options):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**options)


def test_fine_tuning_with_frozen_statistics():
    found = run("fine_tune_frozen", steps=60)
    assert found["first head moved, bn.freeze"] == 0
    assert found["first head moved, requires_grad=False"] > 0.01


def test_masked_speech():
    found = run("masked_speech")
    assert found["masked moves by"] < 1e-6 < 1 < found["plain moves by"]
    assert found["variance kept, masked / true"] == pytest.approx(1, abs=1e-5)
    assert found["variance kept, plain / true"] < 0.7


def test_tiny_batches():
    found = run("tiny_batches_3d", steps=2)
    assert all(0 <= value <= 1 for value in found.values())


def test_domains_of_a_gan():
    found = run("gan_domains", steps=60)
    assert found["a set for each domain"] < found["one set of statistics"]


def test_deployment(tmp_path):
    assert run("deploy", folder=tmp_path, steps=5) < 1e-5
    assert (tmp_path / "model.pt2").exists()


def test_a_broken_network():
    found = run("diagnose_broken", steps=80)
    assert found["after"] > found["before"]


@pytest.mark.parametrize("notebook", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 2
    namespace: dict = {"__name__": "__notebook__"}
    for number, cell in enumerate(code):
        assert (cell["outputs"], cell["execution_count"]) == ([], None), f"{notebook.name}: outputs are not stripped"
        exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), namespace)


def test_there_are_two_notebooks():
    assert len(list(EXAMPLES.glob("*.ipynb"))) == 2
