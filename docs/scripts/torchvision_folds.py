"""docs/torchvision-folds.md: what `fold` and `accelerate` make of every definition of torchvision with batch norm.

    python docs/scripts/torchvision_folds.py folds.jsonl [NAME...]

adds the rows that the file lacks, smallest networks first, and writes the page. Weights, running statistics and signs
of gamma are random. A network with more parameters than --largest is named, and left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from printed import kept
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm as bn
from batchnorm.errors import BatchNormError

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "surgery"))
from real_networks import lively, torchvision  # noqa: E402

PAGE = ROOT / "docs" / "torchvision-folds.md"


def build(name: str) -> nn.Module:
    models = torchvision().models
    try:
        net: nn.Module = models.get_model(name, weights=None, weights_backbone=None)
    except TypeError:
        net = models.get_model(name, weights=None)
    return net


def norms(net: nn.Module) -> int:
    kinds = (_BatchNorm, torchvision().ops.FrozenBatchNorm2d)
    return sum(isinstance(module, kinds) for module in net.modules())


def example(name: str) -> Tensor | tuple[Tensor, ...]:
    if name in ("r3d_18", "mc3_18", "r2plus1d_18"):
        return torch.randn(1, 3, 4, 32, 32)
    if name == "s3d":
        return torch.randn(1, 3, 16, 224, 224)
    if name.startswith("raft"):
        return torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)
    size = {"inception_v3": 299, "maxvit_t": 224}.get(name, 64)
    return torch.randn(1 if size == 224 else 2, 3, size, size)


def row(name: str) -> dict[str, Any]:
    """What became of one network."""
    torch.manual_seed(0)
    net = lively(build(name))
    x, found = (
        example(name),
        {"name": name, "parameters": sum(p.numel() for p in net.parameters()), "norms": norms(net)},
    )
    begin = time.perf_counter()
    try:
        certificate = bn.fold(net, x).certificate
        found |= {
            "folded": len(certificate.folded), "kept": sorted({entry.reason for entry in certificate.kept}),
            "relative": certificate.relative, "rounding": certificate.rounding, "seconds": time.perf_counter() - begin,
        }  # fmt: skip
        bn.accelerate(net, x)
        fused = [m for m in net.modules() if isinstance(m, bn.BatchNorm2d | bn.BatchNorm3d)]
        found["fused"] = sum(m.activation is not None for m in fused)
    except BatchNormError as error:
        found["refused"] = str(error).splitlines()[0]
    return found


def _short(number: float | None) -> str:
    return "" if number is None else f"{number:.1e}"


def page(rows: list[dict[str, Any]], left_out: list[str]) -> str:
    done = [r for r in rows if "folded" in r]
    worst = max(r["relative"] for r in done)
    lines = [
        "# Every torchvision network, folded",
        "",
        f"Made by `docs/scripts/torchvision_folds.py` with torch {torch.__version__} and torchvision "
        f"{torchvision().__version__}: the definitions that contain batch normalization, with random weights, running "
        "statistics and signs of gamma, on small random inputs (64x64, most). *Difference* is the largest of the "
        "certificate, between the folded and the unfolded network, relative to the largest output, float32; "
        "*rounding* how far the unfolded network's own float32 output is from its float64 one. *Fused* counts the "
        "layers that `accelerate` gave an activation.",
        "",
        f"{len(done)} networks; largest difference {worst:.1e}.",
        "",
        "| network | parameters | batch norms | folded | fused | difference | rounding | s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in sorted(done, key=lambda r: r["name"]):
        lines.append(
            f"| {r['name']} | {r['parameters'] / 1e6:.1f} M | {r['norms']} | {r['folded']} | {r.get('fused', '')} "
            f"| {r['relative']:.1e} | {_short(r['rounding'])} | {r['seconds']:.0f} |"
        )
    kept = [f"{r['name']} {r['norms'] - r['folded']}" for r in done if r["norms"] > r["folded"]]
    if kept:
        lines += [
            "",
            f"Kept, as layers or as one scale and shift each ({', '.join(sorted(kept))}): those of DenseNet whose "
            "input other layers use as well, with a ReLU behind them; of GoogLeNet and Inception those of the "
            "classifiers that evaluation does not run. The certificate has the reason of each.",
        ]
    refused = [r for r in rows if "refused" in r]
    if refused:
        lines += ["", "Refused, with the reason that `fold` or `accelerate` gives:", ""]
        same: dict[str, list[str]] = {}
        for r in sorted(refused, key=lambda r: r["name"]):
            same.setdefault(r["refused"].split(". ")[0], []).append(r["name"])
        lines += [f"- {', '.join(names)}: {reason}" for reason, names in same.items()]
        lines += ["", "A detection network folds by its `backbone`, which is a network of its own (tested)."]
    if left_out:
        lines += ["", f"Left out, because of their size or for want of time: {', '.join(sorted(left_out))}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--largest", type=float, default=100e6)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no network after so long")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    sizes = {}
    for name in options.names or torchvision().models.list_models():
        if name.startswith("quantized"):
            continue
        try:
            with torch.device("meta"):
                net = build(name)
        except NotImplementedError:  # reads values while it is made
            net = build(name)
        if norms(net):
            sizes[name] = sum(p.numel() for p in net.parameters())
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    begin = time.monotonic()
    for name in sorted(sizes, key=sizes.__getitem__):
        known = name in {r["name"] for r in rows}
        if not known and sizes[name] <= options.largest and time.monotonic() - begin < options.seconds:
            rows.append(row(name))
            with options.rows.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            gc.collect()
    text = page(rows, sorted(set(sizes) - {r["name"] for r in rows}))
    PAGE.write_text(text + kept(PAGE), encoding="utf-8")


if __name__ == "__main__":
    main()
