"""`python -m benchmarks`: see the package."""

from __future__ import annotations

import argparse
import datetime
import re
import sys
from pathlib import Path

from . import __doc__ as description
from .machine import ROOT, processor
from .page import APART, write_apart, write_gpu_page, write_page
from .rows import read, settled
from .run import run
from .suites import SUITES
from .tables import summary

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, 1 where something failed or was wrong, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the cases that tell most")
    parser.add_argument("--suite", action="append", choices=[*SUITES, "gpu"], help="only this suite; again for more")
    parser.add_argument("--out", type=Path, help="the rows' file (default: benchmarks/results/DATE-PROCESSOR.jsonl)")
    parser.add_argument("--page", action="store_true", help="measure nothing; write docs/performance.md and its plots")
    parser.add_argument("--rows", type=Path, nargs="+", help="the rows for --page (default: the newest full run's)")
    options = parser.parse_args(arguments)
    if options.page:
        return _page(options.rows)
    if "gpu" in (options.suite or ()):
        from . import gpu

        if len(options.suite) > 1:
            parser.error("--suite gpu runs alone")
        return gpu.run(options.quick, options.out)
    path = options.out or RESULTS / _name(options.quick)
    try:
        failures = run(options.suite or SUITES, options.quick, path)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the rows so far are in {path}", file=sys.stderr)
        return 130
    rows = read([path])
    print(summary(rows))
    print(f"{len(rows)} rows in {path}")
    wrong = [row["absent"] for row in rows if "no figure" in row.get("absent", "")]
    for failure in failures + wrong:
        print(f"benchmarks: {failure}", file=sys.stderr)
    return int(bool(failures or wrong))


def _page(paths: list[Path] | None) -> int:
    found = paths or sorted(p for p in RESULTS.glob("*.jsonl") if not p.stem.endswith("-quick"))[-1:]
    if not found:
        print("benchmarks: there are no rows yet; run python -m benchmarks first", file=sys.stderr)
        return 2
    for written in write_page(settled(read(found)), ROOT / "docs"):
        print(written)
    for kind in APART:
        if of_kind := sorted((RESULTS / kind).glob("*.jsonl")):
            print(write_apart(kind, read(of_kind[-1:]), ROOT / "docs"))
    if on_gpu := sorted((RESULTS / "gpu").glob("*.jsonl")):
        print(write_gpu_page(read(on_gpu), ROOT / "docs"))
    return 0


def _name(quick: bool) -> str:
    chip = re.sub(r"\W+", "-", processor()).strip("-").lower()
    return f"{datetime.date.today().isoformat()}-{chip}{'-quick' if quick else ''}.jsonl"


if __name__ == "__main__":
    sys.exit(main())
