"""The Python of the documentation's pages: how it is found, run, and compared with what the pages say that it prints.

    python docs/scripts/printed.py docs/modes.md ...

runs the blocks of these pages one after the other, and writes behind each what it printed. `tests/test_docs.py` runs
all pages so, and compares. A block below a line `<!-- needs: ray -->` is left out where that package is missing. The
blocks of a page with a line `<!-- ranks: 2 -->` are one program, which is run on so many ranks.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# The title is above the block on the site, whose Markdown takes nothing else behind the language.
FENCE = '```text title="prints"'
BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<needs>[\w, ]+) -->\n+)?```python\n(?P<source>.*?)^```$"
    rf"(?P<shown>\n+{FENCE}\n(?P<prints>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
RANKS = re.compile(r"^<!-- ranks: (\d+) -->$", re.MULTILINE)
TRY = "\n## Try it\n"


@dataclass(frozen=True)
class Block:
    """A block of Python, and what the page says that it prints (None where it says nothing)."""

    source: str
    prints: str | None
    needs: tuple[str, ...]
    end: int  # of the source's fence in the page
    shown_end: int  # of what it prints


def blocks(text: str) -> list[Block]:
    """The blocks of a page, in its order."""
    return [
        Block(
            match["source"],
            match["prints"],
            tuple(re.split(r"[, ]+", match["needs"])) if match["needs"] else (),
            match.start("shown") if match["shown"] else match.end(),
            match.end(),
        )
        for match in BLOCK.finditer(text)
    ]


def run(text: str, name: str) -> Iterator[tuple[int, Block, str]]:
    """Run the blocks one after the other; the number of each, and what it printed."""
    import torch

    if ranks := RANKS.search(text):
        yield from _run_on_ranks(text, int(ranks[1]))
        return
    torch.manual_seed(0)
    namespace: dict = {"__name__": "__docs__"}
    for number, block in enumerate(blocks(text)):
        if any(importlib.util.find_spec(package) is None for package in block.needs):
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(block.source, f"{name}, block {number}", "exec"), namespace)
        yield number, block, printed.getvalue()


def _run_on_ranks(text: str, ranks: int) -> Iterator[tuple[int, Block, str]]:
    """Run the blocks as one program of several ranks; what the first one prints counts."""
    end = "end of a block"
    script = "import os, sys, torch\ntorch.manual_seed(0)\nif os.environ['RANK'] != '0':\n"
    script += "    sys.stdout = open(os.devnull, 'w')\n"
    found = blocks(text)
    script += "".join(f"{block.source}\nprint({end!r})\n" for block in found)
    Path("page.py").write_text(script, encoding="utf-8")
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "page.py"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=240, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    for number, (block, printed) in enumerate(zip(found, done.stdout.split(f"{end}\n"), strict=False)):
        yield number, block, printed


def rough(text: str) -> str:
    """Rounding errors differ by machine, so those (numbers with an exponent) are left out; all else is compared."""
    lines = [line.rstrip() for line in re.sub(r"\d(?:\.\d+)?e[-+]\d+", "#", text).strip().splitlines()]
    return "\n".join(lines)


def kept(page: Path) -> str:
    """The section that a script which makes the page anew keeps: its example."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    return text[text.index(TRY) :] if TRY in text else ""


def fill(page: Path) -> None:
    """Write behind each block what it prints."""
    text = page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, _in(folder):
        found = list(run(text, page.name))
    for _, block, printed in reversed(found):
        lines = "".join(f"{line.rstrip()}\n" for line in printed.splitlines())
        shown = f"\n\n{FENCE}\n{lines}```" if lines.strip() else ""
        text = text[: block.end] + shown + text[block.shown_end :]
    page.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _in(folder: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


if __name__ == "__main__":
    pages = [Path(name).resolve() for name in sys.argv[1:]]
    sys.argv = ["docs"]
    for page in pages:
        print(page.name)
        fill(page)
