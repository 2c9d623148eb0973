"""The build backend builds for the torch that is installed, and downloads none beside it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("scikit_build_core")
    monkeypatch.syspath_prepend(str(ROOT / "build_backend"))
    monkeypatch.delitem(sys.modules, "batchnorm_build", raising=False)
    import batchnorm_build

    return batchnorm_build


def site_with_torch(folder: Path, version: str) -> str:
    (folder / "torch" / "include").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\ndebug = False\n")
    return str(folder)


@pytest.mark.parametrize(("version", "new_enough"), [("2.12.0+cu130", True), ("2.9.1", False), ("3.0.0", True)])
def test_it_builds_for_the_torch_beside(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, new_enough: bool
):
    site = site_with_torch(tmp_path, version)
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda kind: site)
    monkeypatch.setattr(backend, "has_compiler", lambda: True)
    assert backend.requirements(None, ["cmake"]) == (["cmake"] if new_enough else ["cmake", "torch>=2.10"])
    expected = {"cmake.define.BATCHNORM_TORCH": f"{tmp_path.as_posix()}/torch"} if new_enough else {}
    assert backend.with_torch(None) == expected
    given = {"cmake.define.BATCHNORM_TORCH": "/elsewhere"}
    assert backend.with_torch(given) == given
    assert backend.requirements(given, []) == []


def test_without_torch_it_asks_for_one_and_without_a_compiler_for_none(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda kind: str(tmp_path))
    monkeypatch.setattr(backend, "has_compiler", lambda: True)
    assert backend.requirements(None, []) == ["torch>=2.10"]
    monkeypatch.setattr(backend, "has_compiler", lambda: False)
    assert backend.requirements(None, []) == []
