"""One tool on exported networks: python deployment_tools.py TOOL FOLDER... prints a line of JSON for each.

It is run by `after_the_fold.py` in an environment that has the tools and not this package. A folder holds net.pt2,
net.onnx, net.pt (TorchScript) and data.npz: the input x, and the output y in float64, rounded.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = {
    "torch.export": "torch",
    "AOTInductor": "torch",
    "onnxruntime": "onnxruntime",
    "OpenVINO": "openvino",
    "ExecuTorch": "executorch",
    "litert-torch": "litert-torch",
    "TVM": "apache-tvm",
    "Core ML": "coremltools",
    "pnnx": "pnnx",
}


def program(folder: Path) -> Any:
    import torch

    return torch.export.load(folder / "net.pt2")


def torch_export(folder: Path, x: np.ndarray) -> Any:
    import torch

    return program(folder).module()(torch.from_numpy(x)).detach().numpy()


def aot_inductor(folder: Path, x: np.ndarray) -> Any:
    import torch

    with tempfile.TemporaryDirectory() as place:
        path = torch._inductor.aoti_compile_and_package(program(folder), package_path=f"{place}/net.pt2")
        return torch._inductor.aoti_load_package(path)(torch.from_numpy(x)).detach().numpy()


def onnxruntime(folder: Path, x: np.ndarray) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "net.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def openvino(folder: Path, x: np.ndarray) -> Any:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(folder / "net.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([x])[0]


def executorch(folder: Path, x: np.ndarray) -> Any:
    import torch
    from executorch.exir import to_edge
    from executorch.runtime import Runtime

    made = to_edge(program(folder)).to_executorch()
    method = Runtime.get().load_program(made.buffer).load_method("forward")
    return method.execute([torch.from_numpy(x)])[0].numpy()


def litert(folder: Path, x: np.ndarray) -> Any:
    import litert_torch
    import torch

    made = litert_torch.convert(program(folder).module(), (torch.from_numpy(x),))
    return made(torch.from_numpy(x))


def tvm(folder: Path, x: np.ndarray) -> Any:
    import tvm
    from tvm import relax
    from tvm.relax.frontend.torch import from_exported_program

    made = from_exported_program(program(folder))
    machine = relax.VirtualMachine(tvm.compile(made, target="llvm"), tvm.cpu())
    return machine["main"](tvm.runtime.tensor(x))[0].numpy()


def coreml(folder: Path, x: np.ndarray) -> Any:
    import coremltools

    try:  # it knows more of torch's operators undecomposed, and some only decomposed
        coremltools.convert(program(folder).run_decompositions({}), minimum_deployment_target=coremltools.target.iOS17)
    except NotImplementedError:
        coremltools.convert(program(folder).run_decompositions(), minimum_deployment_target=coremltools.target.iOS17)
    return None  # which runs nowhere but there


def pnnx(folder: Path, x: np.ndarray) -> Any:
    import pnnx
    import torch

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "net.pt"
        path.write_bytes((folder / "net.pt").read_bytes())
        pnnx.convert(str(path), torch.from_numpy(x))
        spec = importlib.util.spec_from_file_location("net_pnnx", Path(place) / "net_pnnx.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        here = os.getcwd()
        os.chdir(place)  # where its file looks for its weights
        try:
            spec.loader.exec_module(module)
            with torch.no_grad():
                return module.Model().eval()(torch.from_numpy(x)).numpy()
        finally:
            os.chdir(here)


RUN = {
    "torch.export": torch_export,
    "AOTInductor": aot_inductor,
    "onnxruntime": onnxruntime,
    "OpenVINO": openvino,
    "ExecuTorch": executorch,
    "litert-torch": litert,
    "TVM": tvm,
    "Core ML": coreml,
    "pnnx": pnnx,
}


def main() -> None:
    """Print {"version", "error"}: the largest difference over the largest value, None where nothing runs."""
    tool, *folders = sys.argv[1:]
    if importlib.util.find_spec("batchnorm") is not None:
        sys.exit("this environment has the package")
    version = importlib.metadata.version(PACKAGES[tool])
    for folder in map(Path, folders):
        data = np.load(folder / "data.npz")
        found: dict[str, Any] = {"version": version}
        try:
            got = RUN[tool](folder, data["x"])
            found["error"] = None if got is None else float(np.abs(got - data["y"]).max() / np.abs(data["y"]).max())
        except BaseException as error:  # of any tool
            lines = [line for line in str(error).splitlines() if line.strip()]
            found["failed"] = f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
        print("\n" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
