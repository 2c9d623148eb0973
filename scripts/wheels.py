"""Builds the wheels that are given away, and proves what they promise: `python scripts/wheels.py [x86_64] [aarch64]`.

Each holds `_C` and one `_autograd` for each minor version of torch in TORCHES. Only torch's headers are needed. They
come out of torch's own wheels (those for aarch64, which are the smallest with Linux's headers), and stay in
build/headers. A second build of the same commit gives the same bytes. The aarch64 wheel is cross-compiled with Debian's
g++-aarch64-linux-gnu.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADERS, DIST = ROOT / "build" / "headers", ROOT / "dist"
TORCHES = ("2.10.0", "2.11.0", "2.12.0", "2.13.0", "2.14.1", "2.15.0")
PLATFORM = "manylinux_2_28"
LIMIT = 5_500_000  # bytes
PROCESSORS = ("x86_64", "aarch64")
# What the libraries take from torch, which is imported before them.
OF_TORCH = ("libtorch_cpu.so", "libtorch_python.so", "libc10.so")
OF_SYSTEM = ("libc.so.", "libm.so.", "libgcc_s.so.", "libstdc++.so.", "ld-linux-")
# An absolute path of a source or a library, in a library's strings.
SOURCE = re.compile(rb"(?<![\w.+/-])(?:/[\w.+-]+){2,}\.(?:h|hpp|c|cc|cpp|o|so|py)(?![\w.])")
# The newest versions of symbols on AlmaLinux 8, which defines manylinux_2_28.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


def run(*command: str | Path, **environment: str) -> str:
    """What a command prints; stops with its errors where it fails."""
    # `make` pins one torch for the environment of this clone, and pip's own settings may pin one, too. The headers of
    # the others are taken all the same.
    surroundings = {**os.environ, "PIP_CONSTRAINT": os.devnull}
    done = subprocess.run(
        [str(each) for each in command], cwd=ROOT, text=True, capture_output=True, env={**surroundings, **environment}
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def headers(version: str) -> Path:
    """The folder of a torch of which nothing but its headers is here."""
    folder = HEADERS / version
    if not (folder / "torch" / "include").is_dir():
        download = HEADERS / f"{version}.download"
        run(
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", download,
            "--platform", f"{PLATFORM}_aarch64", "--python-version", "3.12", "--implementation", "cp",
            f"torch=={version}",
        )  # fmt: skip
        with zipfile.ZipFile(next(download.glob("torch-*.whl"))) as archive:
            members = [name for name in archive.namelist() if name.startswith("torch/include/")]
            archive.extractall(folder.with_suffix(".part"), members)
        folder.with_suffix(".part").rename(folder)
        shutil.rmtree(download)
    return folder.resolve() / "torch"


def build(processor: str) -> Path:
    """A wheel for Linux on that processor, tagged as what it was checked for."""
    raw = ROOT / "build" / "wheels" / processor
    shutil.rmtree(raw, ignore_errors=True)
    settings = {
        "cmake.define.BATCHNORM_RELEASE": "ON",
        "cmake.define.BATCHNORM_TORCH": ";".join(headers(version).as_posix() for version in TORCHES),
        "build-dir": f"build/release-{processor}",
    }
    if processor != "x86_64":
        settings["cmake.define.CMAKE_TOOLCHAIN_FILE"] = f"{ROOT}/cmake/{processor}.cmake"
    environment = {
        "SOURCE_DATE_EPOCH": date_of_commit(),
        "_PYTHON_HOST_PLATFORM": f"linux-{processor}",
    }
    options = [f"--config-settings={key}={value}" for key, value in settings.items()]
    run(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", raw,
        *options, ROOT, **environment,
    )  # fmt: skip
    (built,) = raw.glob("*.whl")
    if processor != os.uname().machine:  # auditwheel knows this machine's processor alone; `check` looks at the symbols
        run(sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", f"{PLATFORM}_{processor}", built,
            **environment)  # fmt: skip
        (tagged,) = raw.glob("*.whl")
        return Path(shutil.move(tagged, DIST / tagged.name))
    excludes = [option for library in OF_TORCH for option in ("--exclude", library)]
    run(
        sys.executable, "-m", "auditwheel", "repair", "--plat", f"{PLATFORM}_{processor}", "--only-plat", *excludes,
        "--wheel-dir", DIST, built, **environment,
    )  # fmt: skip
    return next(DIST.glob(f"batchnorm-*{PLATFORM}_{processor}.whl"))


def date_of_commit() -> str:
    """Seconds since 1970: of the commit in a clone, of pyproject.toml in an unpacked archive."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given:
        return given
    if (ROOT / ".git").exists():
        return run("git", "log", "-1", "--format=%ct").strip()
    return str(int((ROOT / "pyproject.toml").stat().st_mtime))


def check(wheel: Path) -> None:
    """Raises for a wheel that is too large, knows this machine, or lacks a library."""
    if wheel.stat().st_size > LIMIT:
        raise SystemExit(f"{wheel.name} has {wheel.stat().st_size:,} bytes, more than {LIMIT:,}")
    wanted = {"batchnorm/_C.abi3.so", "batchnorm/py.typed"}
    wanted |= {f"batchnorm/_autograd_{'_'.join(version.split('.')[:2])}.abi3.so" for version in TORCHES}
    paths = {str(Path.home()), str(ROOT), sys.prefix, str(HEADERS), str(HEADERS.resolve())}
    with zipfile.ZipFile(wheel) as archive:
        missing = wanted - set(archive.namelist())
        if missing:
            raise SystemExit(f"{wheel.name} lacks {', '.join(sorted(missing))}")
        for name in archive.namelist():
            contents = archive.read(name)
            found = [path for path in paths if path.encode() in contents]
            if name.endswith(".so"):
                found += [path.decode() for path in SOURCE.findall(contents)]
            if found:
                raise SystemExit(f"{wheel.name}: {name} has the path {found[0]} of this machine inside")
            if name.endswith(".so"):
                check_python_symbols(name, contents)
                check_versions(name, contents)
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes")


def check_python_symbols(name: str, contents: bytes) -> None:
    """Raises where a library needs a function of Python that is not of its stable ABI of 3.10."""
    from abi3info import DATAS, FUNCTIONS
    from abi3info.models import Symbol
    from elftools.elf.elffile import ELFFile

    table = ELFFile(io.BytesIO(contents)).get_section_by_name(".dynsym")
    for symbol in table.iter_symbols():
        if symbol["st_shndx"] != "SHN_UNDEF" or not symbol.name.startswith(("Py", "_Py")):
            continue
        known = FUNCTIONS.get(Symbol(symbol.name)) or DATAS.get(Symbol(symbol.name))
        if known is None or (known.added.major, known.added.minor) > (3, 10):
            raise SystemExit(f"{name} needs {symbol.name}, which is not in Python 3.10's stable ABI")


def check_versions(name: str, contents: bytes) -> None:
    """Raises where a library needs a version of a system library that PLATFORM does not have, or another library."""
    from elftools.elf.elffile import ELFFile

    elf = ELFFile(io.BytesIO(contents))
    for library, versions in elf.get_section_by_name(".gnu.version_r").iter_versions():
        for version in versions:
            family, _, number = version.name.partition("_")
            newest = NEWEST.get(family)
            if newest is None or not number[:1].isdigit() or tuple(map(int, number.split("."))) > newest:
                raise SystemExit(f"{name} needs {version.name} of {library.name}, which {PLATFORM} lacks")
    for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED"):
        if tag.needed not in OF_TORCH and not tag.needed.startswith(OF_SYSTEM):
            raise SystemExit(f"{name} needs {tag.needed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("processors", nargs="*", choices=PROCESSORS, default=PROCESSORS)
    parser.add_argument("--twice", action="store_true", help="build again, and compare the bytes")
    options = parser.parse_args()
    DIST.mkdir(exist_ok=True)
    for processor in options.processors:
        wheel = build(processor)
        check(wheel)
        if options.twice:
            first = wheel.read_bytes()
            shutil.rmtree(ROOT / "build" / f"release-{processor}")
            if build(processor).read_bytes() != first:
                raise SystemExit(f"{wheel.name}: a second build has other bytes")
            print(f"{wheel.name}: a second build has the same bytes")


if __name__ == "__main__":
    main()
