"""Files of the finished network, each proven against the unfolded one before it gets its name."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batchnorm.errors import InputError, MissingDependencyError, SurgeryError, WriteError
from batchnorm.surgery.archives import quiet
from batchnorm.training.results import Export
from batchnorm.undo import evaluating
from batchnorm.writing import temporary_for, write_bytes, writing

TOLERANCE = 1e-5  # of the largest logit
FOLDED, UNFOLDED, ARCHIVE, UNFOLDED_ARCHIVE, ONNX = EXPORTED_FILES = (
    "model.safetensors",
    "batchnorm.safetensors",
    "model.pt2",
    "batchnorm.pt2",
    "model.onnx",
)


@dataclass(frozen=True)
class _Form:
    """How one form is written, and how what was written is run."""

    name: str
    file: str
    needs: tuple[str, ...]  # packages without which it cannot be written
    write: Callable[[Path], str]  # returns a note
    checker: str | None  # package without which it cannot be run
    run: Callable[[Path], Tensor]
    optional: bool = False  # whether a network that cannot be written so is still whole


def export_network(folded: nn.Module, unfolded: nn.Module, example: Tensor, folder: Path) -> list[Export]:
    """Write both networks' weights (safetensors), a torch.export archive and an ONNX file.

    Each file is written under a temporary name, loaded again and run on `example`; it is moved to
    its name only if no logit differs from `unfolded(example)` in eval mode by more than 1e-5 of the
    largest. A form whose package is missing is reported as not written or not checked.

    Args:
        folded, unfolded: networks on the CPU, from `fold`.
        example: a batch of two or more samples, on the CPU.
    """
    with evaluating(unfolded), evaluating(folded), torch.no_grad():
        reference = unfolded(example)
        return [_export(form, folder, reference) for form in _forms(folded, unfolded, example)]


def _forms(folded: nn.Module, unfolded: nn.Module, example: Tensor) -> list[_Form]:
    def weights(network: nn.Module) -> Callable[[Path], str]:
        return lambda path: _write_weights(network, path)

    def reloaded(network: nn.Module) -> Callable[[Path], Tensor]:
        return lambda path: _run_weights(network, path, example)

    return [
        _Form("folded weights", FOLDED, (), weights(folded), None, reloaded(folded)),
        _Form(
            "unfolded weights",
            UNFOLDED,
            (),
            weights(unfolded),
            None,
            reloaded(unfolded),
        ),
        _Form(
            "torch.export archive",
            ARCHIVE,
            (),
            lambda path: _write_archive(folded, example, path),
            None,
            lambda path: _run_archive(path, example),
        ),
        _Form(
            "unfolded torch.export archive",
            UNFOLDED_ARCHIVE,
            (),
            lambda path: _write_archive(unfolded, example, path),
            None,
            lambda path: _run_archive(path, example),
            optional=True,
        ),
        _Form(
            "ONNX",
            ONNX,
            ("onnx", "onnxscript"),
            lambda path: _write_onnx(folded, example, path),
            "onnxruntime",
            lambda path: _run_onnx(path, example),
        ),
    ]


def _export(form: _Form, folder: Path, reference: Tensor) -> Export:
    path = folder / form.file
    missing = [name for name in form.needs if importlib.util.find_spec(name) is None]
    if missing:
        note = f"{missing[0]} is not installed: pip install 'batchnorm[export]'"
        return Export(form.name, form.file, "not written", note)
    with temporary_for(path) as temporary:
        return _checked(form, path, temporary, reference)


def _checked(form: _Form, path: Path, temporary: Path, reference: Tensor) -> Export:
    """Write a form under a temporary name, run it, and move it if it gives the reference."""
    try:
        note = form.write(temporary)
        size = temporary.stat().st_size
        if form.checker is not None and importlib.util.find_spec(form.checker) is None:
            os.replace(temporary, path)
            note += f" {form.checker} is not installed: pip install 'batchnorm[export]'"
            return Export(form.name, form.file, "not checked", note, size)
        output = form.run(temporary)
        difference, relative = _differences(output, reference)
        if not relative <= TOLERANCE:
            note = f"differs by more than {TOLERANCE:g} of the largest logit; not kept"
            return Export(form.name, form.file, "failed", note, None, difference, relative)
        os.replace(temporary, path)
        return Export(form.name, form.file, "verified", note, size, difference, relative)
    except WriteError as error:  # of the temporary name
        raise WriteError(str(error).replace(str(temporary), str(path))) from error
    except Exception as error:  # exporters and runtimes raise anything; the others shall go on
        reason = str(error).strip().splitlines() or ["no message"]
        status = "not written" if form.optional and not temporary.exists() else "failed"
        return Export(form.name, form.file, status, f"{type(error).__name__}: {reason[0]}")


def _differences(output: Tensor, reference: Tensor) -> tuple[float, float]:
    """Largest absolute difference, and its ratio to the largest absolute value of the reference."""
    if output.shape != reference.shape:
        raise ValueError(f"output has shape {tuple(output.shape)}, not {tuple(reference.shape)}")
    difference = float((output.double() - reference.double()).abs().max())
    largest = float(reference.double().abs().max())
    return difference, difference / largest if largest else difference


def _write_weights(network: nn.Module, path: Path) -> str:
    tensors = {name: t.detach().clone().contiguous() for name, t in network.state_dict().items()}
    write_bytes(path, to_safetensors(tensors, metadata={"format": "pt"}))
    return "loaded into a copy and run."


def save_weights(network: nn.Module, path: Path) -> None:
    """Write the state dict of `network` as safetensors, under a temporary name first.

    Raises:
        WriteError: the file cannot be written.
    """
    _write_weights(network, path)


def save_network(network: nn.Module, example: Tensor, path: Path) -> None:
    """Write a network in evaluation mode: its weights (.safetensors), an archive (.pt2) or an ONNX file (.onnx).

    The last two hold the whole network, for any batch size where it lets them.

    Raises:
        InputError: another suffix.
        WriteError: the file cannot be written.
        MissingDependencyError: ONNX without its packages.
        SurgeryError: the network cannot be exported.
    """
    if path.suffix == ".safetensors":
        save_weights(network, path)
        return
    writers = {".pt2": _write_archive, ".onnx": _write_onnx}
    if path.suffix not in writers:
        raise InputError(f"{path}: expected a .safetensors, .pt2 or .onnx file.")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise MissingDependencyError(f"{missing[0]} is not installed: pip install 'batchnorm[export]'")
    if not path.parent.is_dir():
        raise InputError(f"{path}: it cannot be written (there is no folder {path.parent}).")
    try:
        with evaluating(network), torch.no_grad():
            writers[path.suffix](network, example, path)
    except WriteError:
        raise
    except Exception as error:  # the exporters raise anything
        reason = (str(error).strip().splitlines() or ["no message"])[0].partition(". ")[0].removesuffix(".")
        raise SurgeryError(
            f"{path}: the network cannot be exported ({type(error).__name__}: {reason}). "
            f"{_unknown_class(network, example)}A .safetensors file takes its weights alone."
        ) from error


def _unknown_class(network: nn.Module, example: Tensor) -> str:
    """What to do about an output that holds an object of a class that torch.export does not know, if it does."""
    try:
        with evaluating(network), torch.no_grad():
            output = network(example)
    except Exception:  # the exporter's own error tells why
        return ""
    tensor_or_number = (Tensor, int, float, bool, str, type(None))
    classes = [type(leaf) for leaf in tree_leaves(output) if not isinstance(leaf, tensor_or_number)]
    if isinstance(output, tuple) and type(output) is not tuple:  # known to torch, but not to its files
        classes.append(type(output))
    if not classes:
        return ""
    return f"Its output is of the class {classes[0].__name__}, which archives cannot hold: return a tuple or a dict. "


def _run_weights(network: nn.Module, path: Path, example: Tensor) -> Tensor:
    loaded = copy.deepcopy(network)
    with torch.no_grad():
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            tensor.fill_(1)  # so that a tensor that the file lacks cannot pass unseen
    loaded.load_state_dict(load_file(path), strict=True)
    output: Tensor = loaded(example)
    return output


def _exported_program(network: nn.Module, example: Tensor) -> tuple[torch.export.ExportedProgram, str]:
    """The program for any batch size, or for the example's alone where a network insists."""
    try:
        dynamic = {0: torch.export.Dim.DYNAMIC}
        program = torch.export.export(network, (example[:4].clone(),), dynamic_shapes=(dynamic,))
        return program, "any batch size."
    except Exception:  # the constraint violations of torch.export have no public type
        program = torch.export.export(network, (example.clone(),))
        return program, f"for batches of {len(example)} only: the network fixes the batch size."


def _write_archive(network: nn.Module, example: Tensor, path: Path) -> str:
    program, note = _exported_program(network, example)
    with writing(path) as stream, quiet():
        torch.export.save(program, stream)  # type: ignore[arg-type]  # which is a binary stream
    return note


def _run_archive(path: Path, example: Tensor) -> Tensor:
    output: Tensor = torch.export.load(path).module()(example)
    return output


def _write_onnx(network: nn.Module, example: Tensor, path: Path) -> str:
    program, note = _exported_program(network, example)
    with quiet():
        made = torch.onnx.export(
            program,
            (),
            input_names=["input"],
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )
    assert made is not None
    write_bytes(path, made.model_proto.SerializeToString())
    return note


def _run_onnx(path: Path, example: Tensor) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: example.numpy()}
    return torch.from_numpy(session.run(None, feed)[0])
