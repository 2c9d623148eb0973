"""Folding in files: ONNX models and torch.export archives, by the rules of `fold` and with the same proof."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from batchnorm.errors import InputError, SurgeryError
from batchnorm.surgery.affine import is_norm
from batchnorm.surgery.archives import Archive, open_archive, quiet
from batchnorm.surgery.certificate import Certificate, Difference, Kept
from batchnorm.surgery.comparison import Example, copy_of, distances, run_example
from batchnorm.surgery.conversion import convert
from batchnorm.surgery.folding import Folding, fold
from batchnorm.surgery.onnx_flow import OnnxFlow
from batchnorm.surgery.onnx_graph import IN_MEMORY, OnnxGraph, needed, nested
from batchnorm.surgery.onnx_patterns import Chain, chains, with_norms, without_pairs
from batchnorm.surgery.onnx_precision import retyped
from batchnorm.surgery.onnx_run import Runner, examples
from batchnorm.surgery.rounding import TOLERANCE, Rounding, accepted, errors_against
from batchnorm.writing import refused, temporary_for, writing


def fold_onnx(
    path: str | Path, inputs: Mapping[str, Any] | None = None, *, tolerance: float | None = None
) -> tuple[Any, Certificate]:
    """Fold the ``BatchNormalization`` nodes of an ONNX file into the layers before or after them.

    The rules are those of `fold`: Conv, ConvTranspose, Gemm and MatMul (with the Add of its bias) take a scale and
    shift in, also through Identity, Dropout in inference, pooling, reshaping, transposing, Concat and Split, and one
    BatchNormalization takes in another, wherever that is exact. A layer whose padding would need a value is refused,
    since an ONNX Conv pads with zeros. Mul, Add, Sub and Div by constants per channel are folded as well, where they
    scale and shift together, or stand beside a BatchNormalization, also where the channels are the last axis: Keras 3
    and tf2onnx spell batch normalization so, and Paddle the bias of a convolution. All else stays as it was.
    Weights are computed in float64 and rounded once; constants that other nodes read too are copied. Names, opset and
    metadata stay.

    Args:
        path: the file, which is not changed; external data is read from beside it.
        inputs: arrays by input name to compare on, beside two random ones of the same shapes. Without them, random
            ones of two batch sizes, where the model leaves the sizes open.
        tolerance: largest accepted difference, relative to an output's largest value; by default that of `fold` for
            the dtype of the weights (float32: 1e-5).

    Returns:
        The folded ``onnx.ModelProto`` (see `save_onnx`), and the certificate: folded and original model compared in
        onnxruntime with its optimizations off, or in onnx's reference evaluator where that has no kernels (a model of
        float64 that neither runs, in float32). If they differ by more than the default tolerance, both are compared
        with the file in float64, and up to four times the file's own rounding error is accepted, as in `fold`.

    Raises:
        InputError: the file cannot be read, or the inputs do not fit.
        MissingDependencyError: onnx or onnxruntime is missing.
        SurgeryError: no BatchNormalization, a model that does not run, or outputs that differ.
    """
    onnx = needed("onnx")
    needed("onnxruntime")
    model = _read(onnx, path)
    graph = OnnxGraph(model)
    first = Runner(model, every=True)
    given = examples(model, first, None if inputs is None else dict(inputs))
    values = {name: x.to("meta") for name, x in first(next(iter(given.values()))).items() if isinstance(x, Tensor)}
    values |= {name: x.to("meta") for name, x in next(iter(given.values())).kwargs.items()}
    original = Runner(model)
    before = {name: original(example) for name, example in given.items()}
    inside = [n.name or n.output[0] for n, _ in nested(graph.graph) if graph.is_own(n, "BatchNormalization")]
    spelled = chains(graph, values)
    model, folding, behind = _with_chains(onnx, path, model, spelled, values)
    flow = folding.flow
    if not flow.labels and not inside and not folding.folded:
        raise SurgeryError(
            f"{path}: the model has no BatchNormalization"
            + (
                f", and {', '.join(c.label for c in spelled)}, which compute one, fold into no layer"
                if spelled
                else ": it has been folded, or never had one"
            )
        )
    kept = [*folding.kept, *(Kept(label, reason) for label, reason in flow.reasons.items())]
    kept += [Kept(name, "it is inside a branch or a loop") for name in inside]
    dtype = _coarsest(flow)
    folding.write()
    without_pairs(model, behind)
    try:
        if model.ByteSize() < IN_MEMORY:
            onnx.checker.check_model(model)
    except Exception as error:
        raise SurgeryError(f"{path}: the folded model is no valid ONNX ({error}); nothing was written") from error
    after = Runner(model)
    results = {name: (before[name], after(example)) for name, example in given.items()}
    ran_in = torch.float32 if original.narrowed else dtype
    limit = TOLERANCE[ran_in] if tolerance is None else tolerance
    text = str(dtype).removeprefix("torch.")
    differences = [
        Difference(name, text, d.output, d.absolute, d.relative, None, limit)
        for name, pair in results.items()
        for d in distances(*pair)
    ]
    if tolerance is None and dtype == torch.float32 and not all(d.passed for d in differences):
        differences = _beside_float64(_read(onnx, path), given, results, limit) or differences
    _check(differences, str(path))
    return model, Certificate(tuple(folding.folded), tuple(kept), tuple(differences), original.method, limit, text)


def _with_chains(
    onnx: Any, path: str | Path, model: Any, spelled: list[Chain], values: dict[str, Tensor]
) -> tuple[Any, _OnnxFolding, list[str]]:
    """The model to edit, where chains of Mul and Add that fold are BatchNormalization, and others stay; its folding.

    The third result names the Transpose nodes that stand behind such a BatchNormalization.

    A chain folds or stays whole, and one that stays may have been what another one needed, so this is tried again
    with those that folded until all do.
    """
    labels = {chain.label for chain in spelled}
    while True:
        behind = with_norms(model, spelled, labels, values)
        folding = _OnnxFolding(OnnxFlow(OnnxGraph(model), values))
        if any(is_norm(module) for module in folding.flow.modules.values()):
            folding.run()
        stay = labels - {item.layer for item in folding.folded}
        if not stay:
            return model, folding, behind
        labels -= stay
        model = _read(onnx, path)


def _beside_float64(
    original: Any, given: Mapping[str, Example], results: Mapping[str, tuple[Any, Any]], limit: float
) -> list[Difference]:
    """The differences with the file's own rounding, against float64, and the limit that it sets, as in `fold`.

    Nothing where the model cannot be run in float64.
    """
    try:
        exact = Runner(retyped(original, "FLOAT", "DOUBLE"))
        truths = {name: exact(example.to(torch.float64)) for name, example in given.items()}
    except Exception:  # an evaluator without a kernel can fail in any way
        return []
    differences = []
    for name, (before, after) in results.items():
        own, error = errors_against(truths[name], before), errors_against(truths[name], after)
        differences += [
            Difference(name, "float32", d.output, d.absolute, d.relative, rounding, accepted(limit, rounding), wrong)
            for d in distances(before, after)
            for rounding, wrong in [(own.get(d.output), error.get(d.output))]
        ]
    return differences


class _OnnxFolding(Folding):
    """Folding of a model: what stays is left as it is, and edits are made in the file's graph."""

    flow: OnnxFlow

    def reduce(self, name: str, layer: Any) -> str | None:
        return None

    def write(self) -> None:
        graph = self.flow.onnx
        before = graph.uses.copy()
        gone = {item.layer for item in self.folded}
        for label, new in self.state.weights.items():
            self.flow.write(label, new)
        for label, line in self.state.lines.items():
            if label not in gone:
                self.flow.write_line(label, line.scale, line.shift)
        for label in gone:
            graph.remove(self.flow.owners[label][0])
        graph.drop_unused(before)


def _read(onnx: Any, path: str | Path) -> Any:
    try:
        onnx.checker.check_model(str(path))
        model = onnx.load(str(path))
        if model.functions:
            model = needed("onnx.inliner").inline_local_functions(model)
    except Exception as error:  # protobuf, the checker and the system have errors of their own
        raise InputError(f"{path}: it cannot be read as an ONNX model ({error})") from error
    return model


def save_onnx(model: Any, path: str | Path) -> None:
    """Write a model under a temporary name, check it, and move it; above 2 GiB with its weights in ``PATH.data``.

    Raises:
        WriteError: the file cannot be written.
    """
    onnx, path = needed("onnx"), Path(path)
    try:
        with temporary_for(path) as folder:
            folder.mkdir()
            temporary, data = folder / path.name, folder / f"{path.name}.data"
            if model.ByteSize() < IN_MEMORY:
                temporary.write_bytes(model.SerializeToString())
            else:
                onnx.save(model, temporary, save_as_external_data=True, location=data.name)
            onnx.checker.check_model(str(temporary))
            for written in (data, temporary):
                if written.exists():
                    os.replace(written, path.parent / written.name)
    except OSError as error:
        raise refused(path, error, model.ByteSize()) from error


def _coarsest(flow: OnnxFlow) -> torch.dtype:
    dtypes = {p.dtype for module in flow.modules.values() for p in module.parameters(recurse=False)} & set(TOLERANCE)
    return max(dtypes, key=lambda dtype: TOLERANCE[dtype], default=torch.float32)


def fold_archive(path: str | Path, *, tolerance: float | None = None) -> tuple[ExportedProgram, Certificate]:
    """Fold a torch.export archive (.pt2) by the rules of `fold`, on the archive's own example input.

    Dynamic shapes, names of inputs, outputs and parameters stay.

    Raises:
        InputError: the file cannot be read, holds no example, or was exported in training mode.
        SurgeryError: no batch normalization, or the outputs differ.
    """
    archive = open_archive(path)
    with quiet():
        return _folded(archive, str(path), tolerance)


def _folded(archive: Archive, path: str, tolerance: float | None) -> tuple[ExportedProgram, Certificate]:
    result = fold(archive.net, archive.example, tolerance=tolerance)
    program = archive.export(result.model)
    _check(_differences(archive, program, result.certificate), path)
    return program, result.certificate


def convert_archive(
    path: str | Path, *, to: str = "batchnorm", of: str = "batch_norm", **options: Any
) -> ExportedProgram:
    """`convert` for a torch.export archive (.pt2); the options are those that matter in evaluation.

    Raises:
        InputError: the file cannot be read, or unknown options.
        SurgeryError: as of `convert`, or the outputs differ where no option was given.
    """
    archive = open_archive(path)
    with quiet():
        program = archive.export(convert(copy_of(archive.net), archive.example, to=to, of=of, **options))
        if not options:
            own = Rounding(archive.net, archive.example)
            own.compare(program.module(), TOLERANCE[own.dtype], str(path), " of the edited network")
    return program


def save_archive(program: ExportedProgram, path: str | Path) -> None:
    """Write a program under a temporary name, and move it.

    Raises:
        WriteError: the file cannot be written.
    """
    with writing(Path(path)) as stream, quiet():
        torch.export.save(program, stream)  # type: ignore[arg-type]  # which is a binary stream


def _differences(archive: Archive, program: ExportedProgram, certificate: Certificate) -> list[Difference]:
    """The exported program beside the network that was in the file, on the example and its random ones."""
    limit = max((d.tolerance for d in certificate.differences if d.dtype == certificate.dtype), default=1e-5)
    given = {"example": archive.example, "random 1": archive.example.randomized(1)}
    return [
        Difference(name, certificate.dtype, d.output, d.absolute, d.relative, None, limit)
        for name, example in given.items()
        for d in distances(run_example(archive.net, example), example.run(program.module()))
    ]


def _check(differences: list[Difference], path: str) -> None:
    for d in differences:
        if not d.passed:
            raise SurgeryError(
                f"{path}: {d.output} of the edited network differs by {d.relative:.1e} of its largest value on the "
                f"{d.inputs} input (accepted {d.tolerance:.0e}); nothing was written"
            )
