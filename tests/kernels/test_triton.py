"""The Triton kernels: their laws under the interpreter, tilings, compilation for real devices, and on CUDA."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import batchnorm
from batchnorm.ops import cuda, schemas
from batchnorm.ops.schemas import ARGUMENTS

LAWS = Path(__file__).with_name("triton_laws.py")

triton = pytest.importorskip("triton", reason="needs triton: pip install 'batchnorm[gpu]'")
kernels = pytest.importorskip("batchnorm.kernels.triton")

from triton_laws import TritonLaws  # noqa: E402

from benchmarks import inspect_triton  # noqa: E402  (needs triton)

# ---------------------------------------------------------------------------------------------- on the CPU

PARTS = ("scheme or ghost or activation or bit",)


@pytest.mark.slow
@pytest.mark.parametrize("part", [*PARTS, f"not ({' or '.join(PARTS)})"])
def test_laws_under_the_interpreter(part: str) -> None:
    """In a process of its own: Triton decides at its import whether it interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", str(LAWS), "-p", "no:cacheprovider", "-p", "no:xdist", "-k", part]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


WALKS = st.builds(
    lambda planar, rows, channels, columns, pool: kernels.Walk(
        planar, rows, channels, columns if planar else channels, min(pool, rows)
    ),
    st.booleans(),
    st.integers(1, 1 << 22),
    st.integers(1, 5000),
    st.integers(1, 1 << 18),
    st.integers(1, 1 << 22),
)


@given(WALKS, st.sampled_from(["forward", "backward", "map"]), st.sampled_from([2, 4]), st.sampled_from([1, 20, 132]))
def test_a_tiling_covers_every_element_and_no_more(w: Any, kind: str, itemsize: int, processors: int) -> None:
    t = kernels.tiling(kind, w, itemsize, processors, "none")
    tiles = -(-w.pool_rows // t.A) * (-(-w.columns // t.B) if w.planar else 1)
    assert (t.splits - 1) * t.tiles < tiles <= t.splits * t.tiles
    blocks = w.channels if w.planar else -(-w.channels // t.B)
    assert t.programs == w.pools * blocks * t.splits
    assert all(n & (n - 1) == 0 for n in (t.A, t.B, t.warps))
    assert t.B >= 8  # a byte of signs
    assert t.A * t.B <= 1 << 20  # the most elements of a tile in Triton
    if t.scheme == "single":
        assert t.splits == tiles == 1
    if kind != "map":
        assert t.splits <= 1024
        assert t.A * t.B <= 32 * 32 * 16


@given(st.integers(1, 1 << 16), st.sampled_from([64, 1024]))
def test_column_blocks_leave_little_idle(columns: int, most: int) -> None:
    block = kernels._column_block(columns, most)
    assert block & (block - 1) == 0
    assert 8 <= block <= most
    if columns >= 512:
        assert (-(-columns // block) * block - columns) / columns <= 0.125


@given(st.data())
def test_strides_are_those_of_the_elements(data: st.DataObject) -> None:
    """Where a walk is found, it reaches every element; where not, no walk would."""
    axes = data.draw(st.integers(2, 4))
    shape = data.draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes))
    order = data.draw(st.permutations(range(axes)))
    base = torch.arange(10000).view(10, 10, 10, 10)[tuple([slice(None)] * axes)]
    base = base if axes == 4 else base.flatten(axes - 1)
    t = base.permute(order)[tuple(slice(0, n) for n in shape)]
    columns = t[0, 0].numel()
    for planar in (True, False):
        found = kernels.strides(t.shape, t.stride(), planar)
        first = int(t.flatten()[0])
        flat = t.reshape(shape[0], shape[1], -1)
        if found is None:
            continue
        row, channel = found
        for s in range(shape[0]):
            for c in range(shape[1]):
                for i in range(columns):
                    at = s * row + c * channel + i if planar else (s * columns + i) * row + c
                    assert int(flat[s, c, i]) == first + at
    plain = torch.empty(shape)
    assert kernels.strides(plain.shape, plain.stride(), True) is not None
    rows = torch.empty(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    assert kernels.strides(rows.shape, rows.stride(), False) is not None


# ---------------------------------------------------------------------------------------------- the choice


@pytest.fixture
def _nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_reasons", {})
    monkeypatch.setattr(cuda, "_kernels", None)


@pytest.mark.usefixtures("_nothing_chosen")
def test_without_triton_aten_serves_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(batchnorm.kernels, "triton")
    monkeypatch.setitem(sys.modules, "batchnorm.kernels.triton", None)
    device = torch.device("cpu")
    with pytest.warns(RuntimeWarning, match=r"pip install 'batchnorm\[gpu\]'"):
        assert "triton does not load" in (cuda.reason(device) or "")
    served = cuda.implementation("moments", lambda a: "aten")
    assert served(ARGUMENTS["moments"](torch.randn(4, 3), 0)) == "aten"
    assert "pip install" in cuda.describe(device)


@pytest.mark.usefixtures("_nothing_chosen")
def test_what_the_kernels_do_not_take_goes_to_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "self_test", lambda device: None)
    x = torch.randn(4, 3)
    assert cuda.serving(x, 0) is kernels
    for other in (x[:0], torch.randn(4, 0)):
        assert cuda.serving(other, 0) is None
        assert cuda.implementation("moments", lambda a: "aten")(ARGUMENTS["moments"](other, 0)) == "aten"


def test_signs_fit_what_the_schema_promises() -> None:
    for shape in ((3, 5, 9), (7, 13), (2, 9, 3, 3), (1, 1, 1, 17)):
        for x in (torch.empty(shape), torch.empty(shape[:1] + shape[2:] + shape[1:2]).movedim(-1, 1)):
            w = kernels.walk(x, 0)
            lines = w.rows * w.channels if w.planar else w.rows
            assert lines * ((w.columns + 7) // 8) <= schemas.signs_size(x)


# ---------------------------------------------------------------------------------------------- nothing waits


def _mask() -> dict[str, Tensor]:
    return {"mask": torch.ones(8, 5, dtype=torch.bool, device="meta")}


@pytest.mark.parametrize(
    ("options", "inputs"),
    [
        ({}, {}),
        ({}, _mask()),
        ({}, {"lengths": torch.ones(8, dtype=torch.int64, device="meta")}),
        ({}, {"lengths": torch.ones(8, dtype=torch.int64)}),
        ({"momentum": None}, {}),
        ({"ghost_size": 3}, _mask()),
        ({"ghost_size": 3, "ghost_update": "decay"}, {}),
        ({"channel_groups": 2}, _mask()),
        ({"running": "debiased"}, {}),
        ({"nonfinite": "skip"}, {}),
        ({"nonfinite": "skip_channel"}, {}),
        ({"renorm": batchnorm.Renorm()}, {}),
    ],
    ids=lambda given: "-".join(given) or "plain",
)
def test_no_value_is_read_on_the_way(options: dict[str, Any], inputs: dict[str, Tensor]) -> None:
    """Tensors without values stand in for those of a device: to read one back raises, as waiting would cost there."""
    layer = batchnorm.BatchNorm1d(6, activation="relu", **options).to("meta")
    x, residual = (torch.empty(8, 6, 5, device="meta", requires_grad=True) for _ in range(2))
    layer(x, residual, **inputs).backward(torch.empty_like(x))
    layer.eval()(x, residual, **inputs)
    assert x.grad is not None


def test_reading_a_value_back_would_show() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones(2, device="meta").sum().item()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Kernels that would be launched, and whether under the guard of the tensor's device; nothing runs."""
    from triton.runtime.jit import JITFunction

    found: list[tuple[str, bool]] = []
    guards: list[Any] = []

    @contextlib.contextmanager
    def guard(x: Tensor) -> Iterator[None]:
        guards.append(x)
        yield
        guards.pop()

    monkeypatch.setattr(kernels, "_guard", guard)
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: found.append((self.__name__, bool(guards))))
    return found


@pytest.mark.parametrize("shape", [(64, 32), (32, 64, 56, 56)], ids=["small", "large"])
def test_every_launch_is_on_the_device_of_its_tensors(launches: list[tuple[str, bool]], shape: tuple[int, ...]) -> None:
    """And none of these functions reads a value, or makes memory whose size depends on one."""
    x, c = torch.empty(shape, device="meta"), shape[1]
    weight, mean = torch.empty(c, device="meta"), torch.empty(1, c, dtype=torch.float64, device="meta")
    mask = torch.empty(shape[0], *shape[2:], dtype=torch.bool, device="meta")
    settings, saved = (0, 1e-5, "relu", 0.0), (weight, weight, None, None, mean, mean)
    parts, sums = torch.empty(2, 3, 1, c, device="meta"), torch.empty(2, 1, c, device="meta")
    for valid in (None, mask):
        kernels.moments(x, 0, valid)
        kernels.forward(x, weight, weight, None, *settings, None, valid)
        kernels.normalize(x, mean, mean, weight, weight, None, *settings, None, valid)
        kernels.backward_reduce(x, x, *saved, *settings, valid)
        kernels.backward_apply(x, x, *saved, mean, mean, mean, *settings, True, valid)
        for population in (False, True):
            kernels.backward(x, x, *saved, *settings, population, True, True, valid)
        for groups in (0, 4):
            kernels.normalize_merged(x, parts, weight, weight, None, *settings, groups, None, valid)
        kernels.backward_merged(x, x, *saved, sums, mean, *settings, True, valid)
    kernels.update_statistics(weight, weight, torch.empty((), device="meta"), mean, mean, 64, 64, None, True)
    assert {name for name, _ in launches} >= {"normalize", "merge_groups", "apply_gradients", "update_statistics"}
    assert all(guarded for _, guarded in launches)


def test_the_guard_is_the_device_of_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entered where another device is the current one; elsewhere it would only cost."""
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or contextlib.nullcontext())
    for index in (0, 1):
        with kernels._guard(SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))):
            pass
    assert entered == [torch.device("cuda", 1)]


def test_small_shapes_are_one_launch_each_way(launches: list[tuple[str, bool]]) -> None:
    x, weight = torch.empty(256, 256), torch.ones(256)
    settings = (0, 1e-5, "relu", 0.0)
    _, mean, var = kernels.forward(x, weight, weight, None, *settings, None)
    kernels.backward(x, x, weight, weight, None, None, mean, var, *settings, False, True, False)
    assert [name for name, _ in launches] == ["forward_whole", "backward_whole"]


# ---------------------------------------------------------------------------------------------- compiled, not run


@pytest.fixture
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What a test compiles; each launch must say itself that it fuses, as Triton 3.10 will not by default."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    with inspect_triton.compiling(getattr(request, "param", 90)) as found:
        yield found
    assert all(kernel.metadata.enable_fp_fusion for kernel in found)


@pytest.mark.parametrize("masked", [False, True], ids=["bits", "mask"])
@pytest.mark.parametrize("last", [False, True], ids=["planar", "interleaved"])
def test_large_shapes_compile_well(compiled: list[Any], last: bool, masked: bool) -> None:
    """Every load and store of elements is 128 bits wide, nothing spills, loops are free of float64, offsets have 64
    bits and no sum is atomic."""
    x = torch.empty(32, 256, 28, 28, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last) if last else x
    signs = None if masked else torch.empty(schemas.signs_size(x), dtype=torch.uint8)
    mask = torch.ones(32, 28, 28, dtype=torch.bool) if masked else None
    inspect_triton.call_everything(x, "relu", signs, mask)
    assert compiled
    for kernel in compiled:
        ptx = kernel.asm["ptx"]
        assert "ld.global.b16" not in ptx
        assert "st.global.b16" not in ptx
        assert "atom." not in ptx
        seen = inspect_triton.inspect(kernel)
        # Bytes: ptxas of Triton 3.8 keeps one float64 of the masked `normalize` on the stack, that of 3.6 none.
        assert seen.spilled <= (8 if masked and last and seen.name == "normalize" else 0)
        if kernel.src.fn.arg_names[0] not in ("x", "dy"):
            continue
        assert seen.load == 16
        if not (masked and seen.name in ("partial_moments", "forward_whole")):  # which may choose their shift late
            assert seen.doubles == 0
        offsets = re.findall(
            r"tt\.addptr .*: tensor<\d+x\d+x!tt\.ptr<\w+>>, tensor<\d+x\d+xi(\d+)>", kernel.asm["ttir"]
        )
        assert offsets
        assert set(offsets) == {"64"}


def test_the_inspection_sees_what_it_looks_for() -> None:
    """A loop with a float64 instruction in it and one behind it."""
    ptx = """
    $L__BB0_1:
        add.f64 \t%fd1, %fd2, %fd3;
        fma.rn.f32 \t%f1, %f2, %f3, %f4;
        @%p1 bra \t$L__BB0_1;
        mul.f64 \t%fd1, %fd2, %fd3;
        @%p1 bra \t$L__BB0_3;
    $L__BB0_3:
        ret;
    """
    assert inspect_triton.doubles_in_loops(ptx) == 1
    assert inspect_triton.doubles_in_loops(ptx.replace("bra \t$L__BB0_3", "bra \t$L__BB0_1")) == 2


@pytest.mark.parametrize("compiled", [80, 90], indirect=True)
def test_small_shapes_compile_in_two_launches(compiled: list[Any]) -> None:
    inspect_triton.call_everything(torch.empty(64, 32), "gelu", None)
    assert [kernel.src.fn.__name__ for kernel in compiled] == ["forward_whole", "backward_whole", "normalize"]


def test_the_rest_compiles(compiled: list[Any]) -> None:
    """Ghost batches, populations, verbs apart, merges of ranks and groups, masks, float64, running statistics."""
    x, weight = torch.empty(64, 24, 14, 14, dtype=torch.float16), torch.ones(24)
    mean = torch.zeros(3, 24, dtype=torch.float64)
    settings = (30, 1e-3, "tanh", 0.0)
    kernels.moments(x, 30)
    kernels.normalize(x, mean, mean, weight, None, None, *settings, None)
    kernels.backward(x, x, weight, None, None, None, mean, mean, *settings, True, True, False)
    kernels.backward(x, x, weight, None, None, None, mean, mean, *settings, False, True, False)
    kernels.backward_reduce(x, x, weight, None, None, None, mean, mean, *settings)
    kernels.backward_apply(x, x, weight, None, None, None, mean, mean, mean, mean, mean, *settings, False)
    parts, sums = torch.zeros(4, 3, 3, 24, dtype=torch.float64), torch.zeros(2, 3, 24, dtype=torch.float64)
    for groups in (0, 6):
        kernels.normalize_merged(x, parts, weight, None, None, *settings, groups, None)
    kernels.backward_merged(x, x, weight, None, None, None, mean, mean, sums, mean, *settings, False)
    for dtype in (torch.float16, torch.float64):
        y, mask = x.to(dtype), torch.ones(64, 14, 14, dtype=torch.bool)
        kernels.count_moments(y, 30, mask)
        kernels.normalize_merged(y, parts, weight, None, y, *settings, 0, None, mask)
        kernels.backward(y, y, weight, None, None, None, mean, mean, *settings, False, True, False, mask)
    for momentum in (0.1, None):
        kernels.update_statistics(weight, weight, torch.tensor(0), mean, mean, 64 * 196, 30 * 196, momentum, True)
    names = {kernel.src.fn.__name__ for kernel in compiled}
    assert names >= {
        "normalize",
        "merge_groups",
        "partial_gradients",
        "apply_gradients",
        "parameter_gradients",
        "update_statistics",
    }
    signature = next(k for k in compiled if k.src.fn.__name__ == "normalize").src.signature
    assert signature["eps"] == "fp64"


# ---------------------------------------------------------------------------------------------- on CUDA


@pytest.mark.gpu
class TestOnCuda(TritonLaws):
    """The same laws on a real device, and those that only a device can break."""

    device = "cuda"

    SHAPES = ((32, 64, 56, 56), (32, 512, 7, 7), (8192, 256), (64, 32), (6, 3, 224, 224))

    def step(self, layer: torch.nn.Module, x: Tensor, dy: Tensor, *rest: Tensor | None) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y = layer(x, *rest)
        return [y.detach(), *torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)]

    def test_triton_serves_this_device(self) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        assert cuda.reason(device) is None
        assert cuda.describe(device).startswith("Triton")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_real_sizes(self, shape: tuple[int, ...], last: bool, dtype: torch.dtype) -> None:
        last = last and len(shape) == 4
        x, dy, residual = (self.randn(*shape, dtype=dtype, last=last) for _ in range(3))
        self.check(x, dy, residual, "relu", 0, with_signs=True)
        self.check(x, dy, None, "identity", shape[0] // 3, with_signs=False)

    def test_the_same_bits_a_hundred_times_under_load(self) -> None:
        """Another stream keeps the device busy, so that programs run in other orders."""
        layer = batchnorm.BatchNorm2d(64, activation="relu").to(self.device)
        x, dy, residual = (self.randn(32, 64, 56, 56, dtype=torch.bfloat16) for _ in range(3))
        first = self.step(layer, x, dy, residual)
        noise, side = self.randn(64 << 20), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        for _ in range(100):
            with torch.cuda.stream(side):
                noise.sin_()
            for ours, again in zip(first, self.step(layer, x, dy, residual), strict=True):
                assert torch.equal(ours, again)
        torch.cuda.synchronize()

    def test_a_graph_replays_on_new_data(self) -> None:
        layer = batchnorm.BatchNorm2d(64, activation="relu").to(self.device)
        x, dy, residual = (self.randn(16, 64, 28, 28) for _ in range(3))
        self.step(layer, x, dy, residual)  # compiles
        start = [b.clone() for b in layer.buffers()]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = self.step(layer, x, dy, residual)
        for buffer, value in zip(layer.buffers(), start, strict=True):
            buffer.copy_(value)
        eager = batchnorm.BatchNorm2d(64, activation="relu").to(self.device)
        eager.load_state_dict(layer.state_dict())
        for _ in range(3):
            for t in (x, dy, residual):
                t.copy_(self.randn(*t.shape))
            graph.replay()
            truth = self.step(eager, x, dy, residual)
            torch.testing.assert_close(captured, truth, rtol=0, atol=0)
            torch.testing.assert_close(list(layer.buffers()), list(eager.buffers()), rtol=0, atol=0)

    def test_work_runs_on_the_current_stream(self) -> None:
        """x is made late on a side stream; a launch on another stream would read it before."""
        layer = batchnorm.BatchNorm2d(8).to(self.device)
        x, dy = self.randn(16, 8, 32, 32), self.randn(16, 8, 32, 32)
        truth = self.step(layer, x, dy)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            late = torch.zeros_like(x)
            torch.cuda._sleep(50_000_000)
            late.copy_(x)
            result = self.step(layer, late, dy)
        torch.cuda.current_stream().wait_stream(side)
        torch.testing.assert_close(result, truth, rtol=0, atol=0)

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("options", [{"momentum": None}, {"ghost_size": 5}, {"channel_groups": 2}], ids=str)
    def test_nothing_waits_for_the_device(self, options: dict[str, Any], masked: bool) -> None:
        layer = batchnorm.BatchNorm2d(8, activation="relu", **options).to(self.device)
        x, dy, residual = (self.randn(16, 8, 32, 32) for _ in range(3))
        rest = (residual, self.randn(16, 32, 32) > 0) if masked else (residual,)
        self.step(layer, x, dy, *rest)
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.step(layer, x, dy, *rest)
            layer.eval()
            self.step(layer, x, dy, *rest)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("options", [{}, {"ghost_size": 5}, {"channel_groups": 2}], ids=str)
    def test_masked_steps_are_captured(self, options: dict[str, Any]) -> None:
        layer = batchnorm.BatchNorm2d(8, activation="relu", update="never", **options).to(self.device)
        x, dy, mask = self.randn(16, 8, 14, 14), self.randn(16, 8, 14, 14), self.randn(16, 14, 14) > 0
        self.step(layer, x, dy, None, mask)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = self.step(layer, x, dy, None, mask)
        for t in (x, dy):
            t.copy_(self.randn(*t.shape))
        mask.copy_(self.randn(16, 14, 14) > 0)
        graph.replay()
        torch.testing.assert_close(captured, self.step(layer, x, dy, None, mask), rtol=0, atol=0)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_several_devices_in_one_process(self) -> None:
        layer = batchnorm.BatchNorm2d(8)
        x, dy = torch.randn(16, 8, 32, 32), torch.randn(16, 8, 32, 32)
        results = []
        for index in (1, 0):  # the current device stays 0
            device = torch.device("cuda", index)
            moved = self.step(layer.to(device), x.to(device), dy.to(device))
            assert all(t.device == device for t in moved)
            results.append([t.cpu() for t in moved])
        torch.testing.assert_close(*results, rtol=0, atol=0)

    def test_offsets_beyond_31_bits(self) -> None:
        if torch.cuda.mem_get_info()[0] < 24 << 30:
            pytest.skip("needs 24 GB of device memory")
        x = torch.zeros(3, 1 << 30, 1, dtype=torch.bfloat16, device=self.device).transpose(1, 2)
        x[2, 0, -7:] = 3.0
        mean, m2 = self.kernels.moments(x, 1)
        torch.testing.assert_close(mean[2, 0].item(), 21.0 / (1 << 30))
        torch.testing.assert_close(m2[2, 0].item(), 63.0, rtol=1e-6, atol=0)
        y = self.kernels.normalize(x, mean, m2 / (1 << 30), None, None, None, 1, 1e-5, "identity", 0.0, None)
        assert bool((y[2, 0, -7:] > 100).all())
        assert bool((y[2, 0, -8] < 0.1).all())

    def test_compiled_networks_call_the_kernels(self) -> None:
        layer = batchnorm.BatchNorm2d(16, activation="relu").to(self.device)
        x, dy = self.randn(8, 16, 14, 14), self.randn(8, 16, 14, 14)
        eager = self.step(layer, x, dy)
        fast = torch.compile(layer, fullgraph=True)
        torch.testing.assert_close(self.step(fast, x, dy), eager, rtol=0, atol=0)
