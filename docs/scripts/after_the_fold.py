"""docs/after-the-fold.md: folded networks, and options of the layers, given to nine tools.

    python docs/scripts/after_the_fold.py FOLDER --python /path/to/env/bin/python

writes each network as .pt2, .onnx and TorchScript into FOLDER, lets `deployment_tools.py` run each tool there with the
other Python, which needs the tools but not this package, and writes the page. Seconds a cell; one process each.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from printed import kept
from torch import Tensor, nn

import batchnorm as bn

ROOT = Path(__file__).parent.parent.parent
PAGE, RUNNER = ROOT / "docs" / "after-the-fold.md", Path(__file__).parent / "deployment_tools.py"
TOOLS = {
    "torch.export": "torch.export.load, without this package",
    "AOTInductor": "torch._inductor.aoti_compile_and_package",
    "onnxruntime": "from torch.onnx.export(dynamo=True)",
    "OpenVINO": "from the .onnx file, float32",
    "ExecuTorch": "to_edge, portable kernels",
    "litert-torch": "litert_torch.convert, run by its interpreter",
    "TVM": "relax.frontend.torch, target llvm",
    "Core ML": "coremltools.convert: it converts here, and runs on machines of Apple alone",
    "pnnx": "from torch.jit.trace; its own .py file is run",
}


class Frames(nn.Module):
    """Sequences (batch, time, channels)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(3, 8), layer, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.embed(x))))


class Named(nn.Module):
    """A network whose parts have names: pnnx writes `self.0` for those of a Sequential."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Recurrence(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = bn.LSTM(3, 8, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def images(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), bn.BatchNorm2d(8, **options), nn.ReLU(), nn.Conv2d(8, 4, 3))


def standardized() -> nn.Module:
    layer = bn.Standardize(3)
    layer.fit([torch.randn(16, 3, 8, 8) * 3 + 1])
    return nn.Sequential(layer, nn.Conv2d(3, 4, 3))


def folded(net: nn.Module, x: Tensor) -> nn.Module:
    certificate = bn.fold(net.eval(), x)
    assert certificate.certificate.folded, certificate
    return certificate.model


def as_it_is(net: nn.Module, x: Tensor) -> nn.Module:
    return net.eval()


def accelerated(net: nn.Module, x: Tensor) -> nn.Module:
    return bn.accelerate(net.eval(), x)


IMAGES, STEPS = (2, 3, 8, 8), (2, 6, 3)
Form = Callable[[nn.Module, Tensor], nn.Module]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Form]] = {
    "folded into a convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)), IMAGES, folded
    ),
    "folded into a transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), IMAGES, folded
    ),
    "what stays behind a ReLU, as scale and shift": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU()),
        IMAGES, folded,
    ),
    "not folded": (images, IMAGES, as_it_is),
    "activation=, residual (accelerate)": (images, IMAGES, accelerated),
    "frozen": (images, IMAGES, lambda net, x: bn.freeze(net).eval()),
    "example_weight": (lambda: images(example_weight=0.3), IMAGES, as_it_is),
    'pool="frame"': (lambda: Frames(bn.BatchNorm1d(8, pool="frame", max_steps=6)), STEPS, as_it_is),
    "Standardize": (standardized, IMAGES, as_it_is),
    "LSTM, folded": (lambda: Recurrence(batch_norm="sequence"), STEPS, folded),
    "LSTM, by time step": (lambda: Recurrence(batch_norm="frame", recurrent=True, max_steps=6), STEPS, as_it_is),
}  # fmt: skip


def lively(net: nn.Module) -> nn.Module:
    """With statistics and weights that no error hides behind."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        for name, tensor in [*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)]:
            if "running_var" in name:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point() and isinstance(module, nn.modules.batchnorm._BatchNorm):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5 + (name == "weight"))
    return net


def prepare(folder: Path, name: str) -> list[str]:
    """Writes the files of one network; what could not be written, and why."""
    make, shape, form = NETWORKS[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    with torch.no_grad():
        net = form(lively(make()), x).eval()
        y = copy.deepcopy(net).double()(x.double()).float()
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "data.npz", x=x.numpy(), y=y.numpy())
    program = torch.export.export(net, (x,))
    failed = []
    for file, write in (
        ("net.pt2", lambda path: torch.export.save(program, path)),
        ("net.onnx", lambda path: torch.onnx.export(program, (), path, external_data=False, verbose=False)),
        ("net.pt", lambda path: torch.jit.save(torch.jit.trace(Named(net), (x,), check_trace=False), path)),
    ):
        try:
            write(folder / file)
        except Exception as error:  # of the exporter, which has no public base
            failed.append(f"{file}: {str(error).splitlines()[0]}")
    custom = {str(n.target) for n in program.graph.nodes if str(n.target).startswith("batchnorm")}
    return [*failed, *(f"operator {each} in the archive" for each in custom)]


def cells(python: Path, tool: str, places: dict[str, Path], limit: float) -> dict[str, dict[str, Any]]:
    """What a tool made of the networks: {"version", "error"} or {"failed"} each.

    One process takes all of them. Where it dies, the network that it died of has failed, and another goes on.
    """
    found: dict[str, dict[str, Any]] = {}
    while len(found) < len(places):
        left = [name for name in places if name not in found]
        command = [python, RUNNER, tool, *(places[name] for name in left)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit * len(left))
            out, reason = done.stdout, (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
        except subprocess.TimeoutExpired as error:
            out, reason = (error.stdout or b"").decode(), f"more than {limit:g} s"
        lines = [json.loads(line) for line in out.splitlines() if line.startswith('{"version"')]
        found |= dict(zip(left, lines, strict=False))
        if len(lines) < len(left):
            found[left[len(lines)]] = {"failed": reason}
    return found


def render(results: dict[str, dict[str, dict[str, Any]]], versions: dict[str, str]) -> str:
    """The page."""
    shown = [tool for tool in TOOLS if any(tool in row for row in results.values())]
    lines = [HEAD.format(date=datetime.date.today(), torch=torch.__version__.partition("+")[0])]
    lines += ["| tool | version | how |", "|---|---|---|"]
    lines += [f"| {tool} | {versions.get(tool, '')} | {TOOLS[tool]} |" for tool in shown]
    lines += ["", MIDDLE, f"| network, in evaluation | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
    notes: list[str] = []
    for name, row in results.items():
        cells = []
        for tool in shown:
            found = row.get(tool, {"failed": "not run"})
            if "failed" in found:
                text = f"{tool}: " + re.sub(r"/[^\s:]*/(?=[^/\s:]+:)", "", found["failed"])  # no path of this machine
                if text not in notes:
                    notes.append(text)
                cells.append(f"no ({notes.index(text) + 1})")
            else:
                cells.append("converts" if found["error"] is None else f"{found['error']:.0e}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [""]
    if notes:
        lines += ["What a tool said where it stopped:", "", *(f"{i}. {note}" for i, note in enumerate(notes, 1)), ""]
    return "\n".join([*lines, TAIL])


HEAD = """# After the fold: nine tools

Networks that `fold`, `freeze` and `accelerate` return, and layers with options of their own, were exported with torch
{torch} and given to nine tools, in an environment that does not have this package. Seen on {date}; the page is made by
`docs/scripts/after_the_fold.py`.
"""
MIDDLE = """A number is the largest difference from the same network in float64, over the output's largest value. No
archive holds an operator of this package.
"""
TAIL = """## What to know

- **Fold first.** `batchnorm fold` takes away what a tool would have to fuse, and proves it.
- **OpenVINO** computes in bfloat16 by default where the processor has it, and is then off by 2e-3 to 5e-3; the table
  asks for float32 (`INFERENCE_PRECISION_HINT`).
- **onnxruntime** with float16: a channel whose variance and epsilon round to 0 becomes NaN where it fuses the layer
  into a convolution. `preview_export` warns of it.
- **Recurrent layers** are exported step by step, for as many steps as the example has.
- **Training mode** is exported as it is: `preview_export` says what that means for each layer.
"""


def main() -> None:
    """Run all cells, and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", type=Path, required=True)
    parser.add_argument("--tools", nargs="*", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--limit", type=float, default=120)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    cache = options.folder / "results.json"
    options.folder.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = json.loads(cache.read_text()) if cache.exists() else {}
    versions: dict[str, str] = known.setdefault("versions", {})
    rows = known.setdefault("rows", {name: {} for name in NETWORKS})
    places = {name: (options.folder / str(i)).resolve() for i, name in enumerate(NETWORKS)}
    for name, place in places.items():
        if not (place / "data.npz").exists():
            print(name, *prepare(place, name), file=sys.stderr)
    for tool in options.tools:
        open_ = {name: place for name, place in places.items() if tool not in rows[name]}
        for name, made in cells(options.python, tool, open_, options.limit).items():
            rows[name][tool] = made
            versions |= {tool: made["version"]} if "version" in made else {}
            print(tool, name, made, file=sys.stderr)
        cache.write_text(json.dumps(known))
    PAGE.write_text(render(rows, versions) + kept(PAGE))


if __name__ == "__main__":
    main()
