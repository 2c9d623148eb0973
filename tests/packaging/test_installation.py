"""The package installed from a wheel, off the source tree: what runs, what does not, and what it says about it.

The wheel is one without the native library, which takes seconds to make; `BATCHNORM_WHEEL` names another, as
`make release-check` does.
"""

from __future__ import annotations

import _ctypes
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import batchnorm
from batchnorm.installation import is_cut_short, mended

ROOT = Path(__file__).parent.parent.parent
LIBRARIES = [path for path in sys.path if Path(path).name == "site-packages"]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip makes of the source where there is no compiler."""
    if "BATCHNORM_WHEEL" in os.environ:
        return Path(os.environ["BATCHNORM_WHEEL"])
    pytest.importorskip("scikit_build_core")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder)]
    without_compiler = {**os.environ, "PATH": str(Path(sys.executable).parent), "CXX": "/no/compiler/here"}
    done = subprocess.run(
        [*command, f"--config-settings=build-dir={folder / 'build'}", str(ROOT)],
        capture_output=True, text=True, env=without_compiler,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wheel = next(folder.glob("batchnorm-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
    return wheel


@pytest.fixture
def site(wheel: Path, tmp_path: Path) -> Path:
    """A folder with nothing but the contents of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    return tmp_path / "site"


def run(site: Path, *arguments: str, beside: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """Python with the folder and the libraries of this environment, without what `site` would add to them."""
    path = os.pathsep.join([str(site), *(LIBRARIES if beside is None else beside)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-W", "error::ImportWarning", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=site.parent, env=environment)


LAYERS = """
import torch, batchnorm as bn
assert bn.__path__[0].startswith({site!r}), bn.__path__
torch.manual_seed(0)
x, dy = torch.randn(64, 32), torch.randn(64, 32)
results = []
for layers in (bn, torch.nn):
    net = torch.nn.Sequential(layers.BatchNorm1d(32), torch.nn.ReLU())
    y = net(x.requires_grad_())
    dx, = torch.autograd.grad(y, x, dy)
    net.eval()
    results.append([y, dx, *net.buffers(), net(x)])
torch.testing.assert_close(*results)
image = torch.randn(4, 8, 5, 5)
y = bn.BatchNorm2d(8, activation="gelu")(image, image, mask=torch.ones(4, 5, 5, dtype=torch.bool))
assert y.isfinite().all()
print("ran")
"""


def test_layers_run_and_nothing_is_written(site: Path):
    before = sorted(site.rglob("*"))
    done = run(site, "-c", LAYERS.format(site=str(site)))
    assert done.stdout == "ran\n", done.stderr
    assert sorted(site.rglob("*")) == before  # a read-only folder is enough


@pytest.mark.slow
def test_the_demo_runs(site: Path, tmp_path: Path):
    pytest.importorskip("sklearn")
    options = ["--data", "digits", "--steps", "20", "--no-baseline", "--out", str(tmp_path / "run")]
    done = run(site, "-m", "batchnorm", "train", *options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").is_file()


def test_info_says_what_runs_and_why(site: Path):
    done = run(site, "-m", "batchnorm", "info")
    assert done.returncode == 0, done.stderr
    assert f"{batchnorm.__version__} in {site / 'batchnorm'}" in done.stdout
    if not list(site.rglob("_C.*")):
        assert f"ATen operations, because the native library is not in {site / 'batchnorm'}" in done.stdout
        assert "torch's own operator, because" in done.stdout


def test_another_version_on_the_path_is_told(site: Path, tmp_path: Path):
    other = tmp_path / "other" / "batchnorm-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: batchnorm\nVersion: 0.0.1\n")
    done = run(site, "-m", "batchnorm", "info", beside=[str(other.parent), *LIBRARIES])
    assert f"0.0.1 in {other.parent}" in done.stdout, done.stderr
    assert "pip uninstall" in done.stdout


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


def test_a_second_copy_on_the_path_is_told(site: Path, tmp_path: Path):
    other = tmp_path / "copy" / "batchnorm"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text('__version__ = "0.0.2"\n')
    done = run(site, "-m", "batchnorm", "info", beside=[str(other.parent), *LIBRARIES])
    assert f"0.0.2 in {other.parent}" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("gone", "missing"),
    [("kernels", "batchnorm.kernels"), ("pools.py", "batchnorm.pools"), ("ops/schemas.py", "batchnorm.ops.schemas")],
)
def test_a_damaged_installation_says_what_to_do(site: Path, gone: str, missing: str):
    path = site / "batchnorm" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    message = last_line(run(site, "-c", "import batchnorm; batchnorm.BatchNorm1d"))
    assert message.startswith("batchnorm.errors.InstallationError: ")
    assert f"{missing} is missing from {site / 'batchnorm'}" in message
    assert message.endswith("pip install --force-reinstall --no-deps batchnorm")


@pytest.mark.parametrize("gone", ["cli/fold.py", "cli/settings.py", "errors.py"])
def test_a_damaged_command_line_says_what_to_do(site: Path, gone: str):
    (site / "batchnorm" / gone).unlink()
    done = run(site, "-m", "batchnorm", "info")
    message = last_line(done)
    assert f"batchnorm.{gone[:-3].replace('/', '.')}" in message
    if gone.startswith("cli"):
        assert message.startswith("batchnorm: error: ")
        assert "Traceback" not in done.stderr
        assert f"{batchnorm.__version__} in {site / 'batchnorm'}" in done.stderr


def test_a_missing_dependency_is_mended_without_replacing_torch():
    assert mended("not_on_this_machine.parts") == "pip install batchnorm"  # brings what is missing, and no more
    assert mended("typer.main") == "pip install --force-reinstall --no-deps typer"  # its list is there, the file is not
    assert mended(None) == "pip install batchnorm"


def test_info_lists_what_is_missing_and_changed(site: Path):
    assert re.search(r"^files +complete$", run(site, "-m", "batchnorm", "info").stdout, re.MULTILINE)
    (site / "batchnorm" / "py.typed").unlink()
    with (site / "batchnorm" / "reference.py").open("a") as file:
        file.write("# edited\n")
    told = run(site, "-m", "batchnorm", "info").stdout
    assert "batchnorm/py.typed missing; batchnorm/reference.py changed: pip install --force-reinstall" in told


def test_a_library_that_does_not_load_is_left_out(site: Path):
    for path in site.rglob("*.so"):
        path.unlink()
    (site / "batchnorm" / "_C.abi3.so").write_bytes(b"")
    done = run(site, "-c", LAYERS.format(site=str(site)))
    assert done.stdout == "ran\n", done.stderr
    assert "the native library does not load" in run(site, "-m", "batchnorm", "info").stdout


def test_a_file_that_is_damaged_or_missed_while_a_command_runs_is_one_line(site: Path):
    package = site / "batchnorm"
    (package / "pools.py").write_text('"""cut in its')
    for arguments in (["-m", "batchnorm", "info"], ["-c", "import batchnorm as bn; bn.BatchNorm1d(3)"]):
        done = run(site, *arguments)
        assert done.returncode
        assert re.search(r"pools\.py is damaged \(line 1: .*\); pip install --force", done.stderr.splitlines()[-1])
    (package / "__init__.py").unlink()
    others = site.parent / "others"  # a whole package further along the path would be taken instead
    others.mkdir()
    for entry in (entry for folder in LIBRARIES for entry in Path(folder).glob("*")):
        if not entry.name.startswith("batchnorm") and not (others / entry.name).exists():
            (others / entry.name).symlink_to(entry)
    call = "from batchnorm.cli import main; raise SystemExit(main(['info']))"
    done = run(site, "-c", call, beside=[str(others)])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "error: __init__.py is missing from" in done.stderr


def test_a_command_that_lacks_its_report_says_so(site: Path, tmp_path: Path):
    shutil.rmtree(site / "batchnorm" / "report")
    done = run(site, "-c", "from batchnorm.cli import main; raise SystemExit(main(['train', '--data', 'none.npz']))")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "batchnorm.report is missing from" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="libraries of Linux")
@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_library_that_is_cut_short_is_left_out(site: Path, share: float):
    for path in site.rglob("*.so"):
        path.unlink()
    whole = Path(str(_ctypes.__file__)).read_bytes()
    cut = site / "batchnorm" / "_C.abi3.so"
    cut.write_bytes(whole)
    assert not is_cut_short(cut)
    cut.write_bytes(whole[: int(len(whole) * share)])
    assert is_cut_short(cut)
    done = run(site, "-c", LAYERS.format(site=str(site)))
    assert done.stdout == "ran\n", done.stderr


def test_info_names_a_library_that_is_cut_short(site: Path):
    (site / "batchnorm" / "_C.abi3.so").write_bytes(Path(str(_ctypes.__file__)).read_bytes()[:4000])
    assert "_C.abi3.so is cut short; pip install --force-reinstall" in run(site, "-m", "batchnorm", "info").stdout


def test_a_torch_without_what_is_needed_is_named(site: Path, tmp_path: Path):
    (tmp_path / "old" / "torch").mkdir(parents=True)
    (tmp_path / "old" / "torch" / "__init__.py").write_text('__version__ = "2.5.1"\n')
    message = last_line(run(site, "-c", "import batchnorm; batchnorm.BatchNorm1d", beside=[str(tmp_path / "old")]))
    assert "batchnorm needs torch 2.10 or later, this is torch 2.5.1" in message
    assert message.endswith("pip install --upgrade 'torch>=2.10'")


def test_without_torch_one_line_says_so(site: Path):
    message = last_line(run(site, "-c", "import batchnorm; batchnorm.BatchNorm1d", beside=[]))
    assert message.endswith("batchnorm needs torch, and this Python has none: pip install 'torch>=2.10'")


OLD = "import torch; torch.__version__ = '2.9.1'; import sys; sys.argv = ['batchnorm', 'info']; "


def test_an_old_torch_one_line_says_so(site: Path):
    for use in ("import batchnorm; batchnorm.BatchNorm1d", "import batchnorm.nn"):
        message = last_line(run(site, "-c", OLD + use))
        assert "batchnorm needs torch 2.10 or later, this is torch 2.9.1" in message
    done = run(site, "-c", OLD + "import batchnorm.cli; sys.exit(batchnorm.cli.main())")
    assert f"{batchnorm.__version__} in {site / 'batchnorm'}" in done.stdout
    assert "needs torch 2.10 or later" in last_line(done)


def test_it_is_typed_and_its_version_is_one(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        assert f"\nVersion: {batchnorm.__version__}\n" in archive.read(metadata).decode()
    assert "batchnorm/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "csrc/"))]


def test_the_typed_user_names_the_whole_public_face():
    source = (Path(__file__).parent / "user_code.py").read_text()
    assert not [name for name in batchnorm.__all__ if f"bn.{name}" not in source]
