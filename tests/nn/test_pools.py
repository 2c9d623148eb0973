"""Which values share statistics: every option, alone and in pairs, against one labelling of the values in float64."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import batchnorm as bn
from batchnorm import functional, reference
from batchnorm.errors import DtypeError, InputError

N, C, L = 7, 6, 11
EPS, MOMENTUM = 1e-3, 0.3
LENGTHS = torch.tensor([11, 4, 0, 1, 9, 6, 11])


@dataclass
class Given:
    """What a combination of options hands to the layer, and what it means in (N, C, L)."""

    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    labels: np.ndarray = field(default_factory=lambda: np.broadcast_to(np.arange(C)[None, :, None], (N, C, L)))
    weights: np.ndarray | None = None
    activation: bool = False

    def split(self, part: np.ndarray) -> None:
        """Values stay in one pool only where this agrees as well; negative: in none."""
        both = self.labels * (part.max() + 1) + part
        self.labels = np.where((self.labels < 0) | (part < 0), -1, both)

    @property
    def is_sequence(self) -> bool:
        return "pool" in self.options


def _mask(given: Given) -> None:
    mask = torch.rand(N, L, generator=torch.Generator().manual_seed(3)) < 0.6
    given.call["mask"] = mask
    given.split(np.where(mask.numpy(), 0, -1)[:, None, :])


def _lengths(given: Given) -> None:
    given.call["lengths"] = LENGTHS
    given.split(np.where(np.arange(L) < LENGTHS.numpy()[:, None], 0, -1)[:, None, :])


def _weights(given: Given) -> None:
    weights = torch.rand(N, L, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2 + 0.5
    weights[1, :5] = 0
    given.call["weights"] = weights
    given.weights = weights.numpy()[:, None, :]
    given.split(np.where(given.weights > 0, 0, -1))


def _ghosts(given: Given) -> None:
    given.options["ghost_size"] = 3
    given.split(np.arange(N)[:, None, None] // 3)


def _groups(given: Given) -> None:
    given.options["channel_groups"] = 2
    given.labels = np.where(given.labels < 0, -1, given.labels - np.arange(C)[None, :, None] % 3)


def _sequence(given: Given) -> None:
    given.options["pool"] = "sequence"


def _time_first(given: Given) -> None:
    given.options.update(pool="sequence", batch_first=False)


def _frame(given: Given) -> None:
    given.options.update(pool="frame", max_steps=L - 3)
    given.split(np.arange(L)[None, None, :])


def _domains(given: Given) -> None:
    given.options["domains"] = 3


def _activation(given: Given) -> None:
    given.options["activation"] = "silu"
    given.activation = True


OPTIONS = {f.__name__[1:]: f for f in (_groups, _mask, _lengths, _weights, _ghosts, _sequence, _time_first, _frame)}
OPTIONS |= {f.__name__[1:]: f for f in (_domains, _activation)}
REFUSED = [{"mask", "lengths"}, {"ghosts", "frame"}]
SAME = [{"sequence", "time_first"}, {"sequence", "frame"}, {"time_first", "frame"}]
COMBINATIONS = [("plain",), *((name,) for name in OPTIONS)]
COMBINATIONS += [p for p in itertools.combinations(OPTIONS, 2) if set(p) not in REFUSED + SAME]
COMBINATIONS += [("groups", "lengths", "ghosts", "time_first"), ("groups", "weights", "frame", "activation")]


def _given(names: tuple[str, ...]) -> Given:
    given = Given()
    for name in names:
        if name != "plain":
            OPTIONS[name](given)
    if given.options.get("batch_first") is False:
        for key in ("mask", "weights"):
            if key in given.call:
                given.call[key] = given.call[key].t()
    return given


def _tensor(values: Tensor, given: Given, interleaved: bool) -> Tensor:
    """Values (N, C, L) as the layer takes them, in a memory order."""
    if given.is_sequence:
        turned = values.transpose(1, 2) if given.options.get("batch_first", True) else values.permute(2, 0, 1)
    else:
        turned = values.clone()
    if interleaved == given.is_sequence:
        return turned.contiguous()
    return turned.transpose(-1, -2).contiguous().transpose(-1, -2)


def _plain(values: Tensor, given: Given) -> np.ndarray:
    if given.is_sequence:
        values = values.transpose(1, 2) if given.options.get("batch_first", True) else values.permute(1, 2, 0)
    return values.detach().double().numpy()


def _layer(given: Given, dtype: torch.dtype) -> bn.BatchNorm1d:
    torch.manual_seed(1)
    layer = bn.BatchNorm1d(C, EPS, MOMENTUM, **given.options)
    nn.init.normal_(layer.weight, 1.0)
    nn.init.normal_(layer.bias)
    return layer.to(torch.float64) if dtype == torch.float64 else layer


def _draw(given: Given, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, dy and a residual, rounded to the dtype; NaN and infinity where nothing is valid."""
    torch.manual_seed(2)
    x, dy, residual = (torch.randn(N, C, L, dtype=torch.float64).to(dtype) for _ in range(3))
    x = (x * torch.rand(1, C, 1).to(dtype) + torch.randn(1, C, 1).to(dtype)).to(dtype)
    invalid = torch.from_numpy(given.labels < 0).expand(N, C, L)
    return (
        x.masked_fill(invalid, torch.nan),
        dy.masked_fill(invalid, torch.inf),
        residual.masked_fill(invalid, torch.nan),
    )


def _silu(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    s = 1 / (1 + np.exp(-z))
    return z * s, s * (1 + z * (1 - s))


def _near(ours: Any, right: np.ndarray, dtype: torch.dtype, what: str) -> None:
    ours = ours.detach().double().numpy() if isinstance(ours, Tensor) else ours
    tolerance = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 1.2e-2}[dtype]
    scale = max(np.abs(right).max(), 1e-3)
    assert ours.shape == right.shape, f"{what}: {ours.shape}, not {right.shape}"
    error = np.abs(ours - right).max()
    assert error <= tolerance * scale, f"{what} is off by {error:.2e} of {scale:.2e}"


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_every_option_and_pair_agrees_with_the_labelling(names: tuple[str, ...]) -> None:
    given = _given(names)
    for dtype, interleaved in itertools.product((torch.float64, torch.float32, torch.bfloat16), (False, True)):
        layer = _layer(given, dtype)
        x, dy, residual = _draw(given, dtype)
        leaves = [_tensor(t, given, interleaved).requires_grad_() for t in (x, residual)]
        call = dict(given.call)
        if "weights" in call:
            wide_enough = torch.float64 if dtype == torch.float64 else torch.float32
            call["weights"] = call["weights"].to(wide_enough, copy=True).requires_grad_()
        y = layer(leaves[0], leaves[1] if given.activation else None, **call)
        assert y.dtype == dtype
        y.backward(_tensor(dy, given, not interleaved))

        gamma, beta = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
        wide, labels = x.double().numpy(), given.labels
        valid = np.broadcast_to(labels >= 0, wide.shape)
        clean, upstream = np.where(valid, wide, 0), np.where(valid, dy.double().numpy(), 0)
        right = reference.labelled_batch_norm(clean, labels, given.weights, gamma, beta, eps=EPS)
        expected = right.y
        if given.activation:
            expected, slope = _silu(right.y + np.where(valid, residual.double().numpy(), 0))
            expected, upstream = np.where(valid, expected, 0), upstream * slope
        gradients = reference.labelled_backward(upstream, clean, labels, given.weights, gamma, eps=EPS)
        _near(_plain(y, given), expected, dtype, "y")
        _near(_plain(leaves[0].grad, given), gradients.dx, dtype, "dx")
        _near(layer.weight.grad, gradients.dgamma, dtype, "dgamma")
        _near(layer.bias.grad, gradients.dbeta, dtype, "dbeta")
        if given.activation:
            _near(_plain(leaves[1].grad, given), upstream, dtype, "d_residual")
        if given.weights is not None:
            dw = gradients.dweights.sum(1)
            dw = dw if given.options.get("batch_first", True) else dw.T
            _near(call["weights"].grad, dw, dtype, "dweights")
        _check_running(layer, given, clean)
        _check_inference(layer, given, x, expected=given.activation)


def _check_running(layer: bn.BatchNorm1d, given: Given, x: np.ndarray) -> None:
    """The running statistics are those of all valid values of a channel (group), or of a step: not of each ghost."""
    by_step = given.options.get("pool") == "frame"
    weights = np.ones((N, 1, L)) if given.weights is None else given.weights
    weights = np.where(np.broadcast_to(given.labels, x.shape) >= 0, weights, 0)
    mean = layer.running_mean.detach().double().numpy().reshape(-1, C)
    var = layer.running_var.detach().double().numpy().reshape(-1, C)
    for row, c in itertools.product(range(len(mean)), range(C)):
        where = np.zeros(x.shape, bool)
        channels = range(c // 3 * 3, c // 3 * 3 + 3) if "channel_groups" in given.options else [c]
        where[:, list(channels), row : row + 1 if by_step else None] = True
        if "domains" in given.options and row // (L - 3 if by_step else 1):
            where[:] = False  # another domain's
        w = weights[where]
        if w.sum() <= 1:
            assert (mean[row, c], var[row, c]) == (0, 1)
            continue
        m = (w * x[where]).sum() / w.sum()
        v = (w * (x[where] - m) ** 2).sum() / (w.sum() - 1)
        assert mean[row, c] == pytest.approx(MOMENTUM * m, rel=1e-5, abs=1e-6)
        assert var[row, c] == pytest.approx(1 - MOMENTUM + MOMENTUM * v, rel=1e-5, abs=1e-6)


def _check_inference(layer: bn.BatchNorm1d, given: Given, x: Tensor, expected: bool) -> None:
    """By the running statistics of the domain, or of each step, the last one's beyond those that are kept."""
    layer.eval()
    y = _plain(layer(_tensor(x, given, False), **given.call), given)
    mean, var = (b.detach().double() for b in (layer.running_mean, layer.running_var))
    if "domains" in given.options:
        mean, var = mean[0], var[0]
    if given.options.get("pool") == "frame":
        batches = layer.num_batches_tracked
        reached = int((batches[0] if "domains" in given.options else batches).gt(0).sum())
        steps = torch.arange(L).clamp(max=reached - 1)
        mean, var = mean[steps].t(), var[steps].t()
    else:
        mean, var = mean[:, None], var[:, None]
    gamma, beta = (p.detach().double().numpy()[:, None] for p in (layer.weight, layer.bias))
    right = (x.double().numpy() - mean.numpy()) / np.sqrt(var.numpy() + EPS) * gamma + beta
    right = _silu(right)[0] if expected else right
    _near(y, np.where(np.broadcast_to(given.labels, right.shape) >= 0, right, 0), x.dtype, "y in inference")


@pytest.mark.parametrize("names", REFUSED, ids=lambda names: "+".join(sorted(names)))
def test_what_has_no_meaning_is_refused(names: set[str]) -> None:
    given = _given(tuple(sorted(names)))
    x = _tensor(torch.randn(N, C, L), given, False)
    with pytest.raises(InputError):
        bn.BatchNorm1d(C, **given.options)(x, **given.call)


IMAGE_MASK = torch.rand(5, 1, 6, 7, generator=torch.Generator().manual_seed(0)) < 0.5
IMAGES = {
    "mask": {"mask": IMAGE_MASK},
    "ghosts": {"ghost_size": 2},
    "groups": {"channel_groups": 2},
    "all": {"mask": IMAGE_MASK.squeeze(1), "ghost_size": 2, "channel_groups": 2},
}


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["planar", "interleaved"])
def test_derivatives_of_every_order_and_mode_for_images(name: str, format: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4, 6, 7, dtype=torch.float64).to(memory_format=format).requires_grad_()
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    residual = torch.randn(5, 4, 6, 7, dtype=torch.float64, requires_grad=True)

    def function(*tensors: Tensor) -> Tensor:
        x, weight, bias, residual = tensors
        settings = {"training": True, "residual": residual, "activation": "leaky_relu", **IMAGES[name]}
        return functional.batch_norm(x, None, None, weight, bias, **settings)

    leaves = (x, weight, bias, residual)
    y = function(*leaves)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
    assert y.is_contiguous(memory_format=format)


def test_limits_of_channel_groups_are_batch_and_group_normalization() -> None:
    torch.manual_seed(0)
    x, x1 = torch.randn(4, 6, 5, 5), torch.randn(1, 6, 5, 5)
    alone = functional.batch_norm(x, None, None, training=True, channel_groups=6)
    torch.testing.assert_close(alone, functional.batch_norm(x, None, None, training=True))
    group = functional.batch_norm(x1, None, None, training=True, channel_groups=3)
    torch.testing.assert_close(group, nn.functional.group_norm(x1, 3))


def test_padding_reaches_nothing_and_its_amount_does_not_matter() -> None:
    torch.manual_seed(0)
    x, lengths = torch.randn(6, 4, 10), torch.tensor([10, 3, 7, 1, 5, 2])
    for options in ({}, {"activation": "relu"}):
        short, long = bn.BatchNorm1d(4, **options), bn.BatchNorm1d(4, **options)
        wide = torch.full((6, 4, 40), torch.nan)
        wide[:, :, :10] = x
        wide.requires_grad_()
        narrow = x.clone().requires_grad_()
        y, z = short(narrow, lengths=lengths), long(wide, lengths=lengths)
        y.square().sum().backward()
        z.square().sum().backward()
        torch.testing.assert_close(z[:, :, :10], y, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(wide.grad[:, :, :10], narrow.grad, rtol=1e-5, atol=1e-6)
        assert (z[:, :, 10:] == 0).all()
        assert (wide.grad[:, :, 10:] == 0).all()
        torch.testing.assert_close(long.running_var, short.running_var)


@pytest.mark.parametrize("options", [{}, {"running": "cumulative"}, {"channel_groups": 2}, {"ghost_size": 2}])
def test_a_fully_masked_batch_changes_nothing(options: dict[str, Any]) -> None:
    layer = bn.BatchNorm2d(4, **options)
    before = {name: b.clone() for name, b in layer.state_dict().items()}
    x = torch.full((3, 4, 5, 5), torch.nan, requires_grad=True)
    y = layer(x, mask=torch.zeros(3, 5, 5, dtype=torch.bool))
    y.sum().backward()
    assert (y == 0).all()
    assert (x.grad == 0).all()
    assert (layer.weight.grad == 0).all()
    assert all(torch.equal(b, before[name]) for name, b in layer.state_dict().items())


@pytest.mark.parametrize("pool", [None, "sequence", "frame"])
@pytest.mark.parametrize("sorted_", [False, True])
def test_packed_sequences_come_out_packed(pool: str | None, sorted_: bool) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([7, 5, 3, 2, 1]) if sorted_ else torch.tensor([3, 7, 5, 1, 2])
    x = torch.randn(5, 7, 3, dtype=torch.float64)
    options = {"pool": pool or "sequence", "max_steps": 5 if pool == "frame" else 0, "activation": "tanh"}
    padded = bn.BatchNorm1d(3, **options).double()
    packed = bn.BatchNorm1d(3, **{**options, "pool": pool}).double()
    one, other = (x.clone().requires_grad_() for _ in range(2))
    dense = padded(one, one, lengths=lengths)
    given = pack_padded_sequence(other, lengths, batch_first=True, enforce_sorted=sorted_)
    out = packed(given, given)
    back, _ = pad_packed_sequence(out, batch_first=True)
    torch.testing.assert_close(back, dense)
    dense.square().sum().backward()
    out.data.square().sum().backward()
    torch.testing.assert_close(other.grad, one.grad)
    torch.testing.assert_close(packed.running_var, padded.running_var)
    for layer in (padded, packed):
        layer.eval()
    torch.testing.assert_close(pad_packed_sequence(packed(given), batch_first=True)[0], padded(x, lengths=lengths))


@pytest.mark.parametrize("channels_last", [False, True])
def test_jagged_tensors_come_out_jagged(channels_last: bool) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(n, 3, dtype=torch.float64) for n in (4, 1, 6)]
    laid = parts if channels_last else [p.t() for p in parts]
    jagged_dim = 1 if channels_last else 2
    values = torch.cat(laid, 0 if channels_last else 1).requires_grad_()
    offsets = torch.tensor([0, 4, 5, 11])
    nested = torch.nested.nested_tensor_from_jagged(values, offsets, jagged_dim=jagged_dim)
    layer, plain = bn.BatchNorm1d(3).double(), bn.BatchNorm1d(3).double()
    out, right = layer(nested), plain(torch.cat(parts))
    assert out.layout is torch.jagged
    flat = out.values() if channels_last else out.values().t()
    torch.testing.assert_close(flat, right)
    out.values().square().sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(layer.running_mean, plain.running_mean)


def test_ghost_batches_update_by_decay_as_k_batches_of_one_step() -> None:
    torch.manual_seed(0)
    x = torch.randn(10, 3) * 2 + 1
    layer = bn.BatchNorm1d(3, momentum=0.2, ghost_size=4, ghost_update="decay")
    layer(x)
    mean, var, share = torch.zeros(3), torch.ones(3), 1 - 0.8 ** (1 / 3)
    for ghost in x.split(4):
        mean, var = mean.lerp(ghost.mean(0), share), var.lerp(ghost.var(0), share)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var)
    assert layer.num_batches_tracked == 1
    merged = bn.BatchNorm1d(3, momentum=0.2, ghost_size=4)
    merged(x)
    torch.testing.assert_close(merged.running_var, 0.8 + 0.2 * x.var(0))


@pytest.mark.parametrize("shape", [(902, 80), (902, 5, 3, 6)])
def test_many_small_ghost_batches_are_so_many_batches(shape: tuple[int, ...]) -> None:
    """Output and gradients are those of one ghost after the other, in the same bits on one thread and on two."""
    torch.manual_seed(0)
    x, dy = torch.randn(shape), torch.randn(shape)
    layer = (bn.BatchNorm1d if len(shape) == 2 else bn.BatchNorm2d)(shape[1], ghost_size=3, activation="relu")
    torch.nn.init.uniform_(layer.weight, -1, 1)
    parts, gradients = [], []
    plain = copy.deepcopy(layer).double()
    plain.ghost_size = 0
    for part, d_part in zip(x.double().split(3), dy.double().split(3), strict=True):
        part.requires_grad_()
        parts.append(plain(part))
        parts[-1].backward(d_part)
        gradients.append(part.grad)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        layer.zero_grad()
        given = x.clone().requires_grad_()
        y = layer(given)
        y.backward(dy)
        found.append((y.detach(), given.grad, layer.weight.grad.clone(), layer.bias.grad.clone()))
    torch.set_num_threads(before)
    right = (torch.cat(parts), torch.cat(gradients), plain.weight.grad, plain.bias.grad)
    for one, two, expected in zip(*found, right, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one.double(), expected.detach(), rtol=1e-6, atol=1e-6)


def test_options_travel_and_show() -> None:
    layer = bn.BatchNorm1d(4, pool="frame", max_steps=3, channel_groups=2, domains=2)
    assert "pool='frame', max_steps=3, channel_groups=2, domains=2" in repr(layer)
    assert layer.running_mean.shape == (2, 3, 4)
    other = bn.BatchNorm1d(4, pool="frame", max_steps=3, channel_groups=2, domains=2)
    layer(torch.randn(5, 3, 4))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.running_var, layer.running_var)
    plain = nn.BatchNorm1d(4)
    plain(torch.randn(8, 4))
    other.load_state_dict(plain.state_dict())
    assert (other.running_mean == plain.running_mean).all()


@pytest.mark.parametrize("activation", [None, "relu"])
def test_with_the_other_options_of_a_layer(activation: str | None) -> None:
    """Renormalization without limits reached, debiasing, skipping and accumulation see the valid values alone."""
    torch.manual_seed(0)
    x, lengths = torch.randn(6, 4, 9), torch.tensor([9, 2, 5, 0, 7, 1])
    frames = torch.cat([x[n, :, :k].t() for n, k in enumerate(lengths.tolist())])
    for options in (
        {"renorm": bn.Renorm(r_max=1.5, d_max=0.5, warmup=0)},
        {"running": "debiased"},
        {"running": "cumulative", "running_var": "biased"},
        {"nonfinite": "skip"},
        {"nonfinite": "skip_channel"},
    ):
        masked, dense = (bn.BatchNorm1d(4, activation=activation, **options) for _ in range(2))
        for _ in range(2):
            y, right = masked(x, lengths=lengths), dense(frames)
            ours = torch.cat([y[n, :, :k].t() for n, k in enumerate(lengths.tolist())])
            torch.testing.assert_close(ours, right)
        torch.testing.assert_close(dict(masked.named_buffers()), dict(dense.named_buffers()))
    masked, dense = bn.BatchNorm1d(4), bn.BatchNorm1d(4)
    with bn.accumulate(masked):
        masked(x[:3], lengths=lengths[:3])
        masked(x[3:], lengths=lengths[3:])
    dense(frames)
    torch.testing.assert_close(masked.running_var, dense.running_var)


def test_compiled_with_lengths() -> None:
    layer, eager = bn.BatchNorm1d(4, activation="relu"), bn.BatchNorm1d(4, activation="relu")
    x, lengths = torch.randn(6, 4, 9), torch.tensor([9, 2, 5, 0, 7, 1])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    one, other = (x.clone().requires_grad_() for _ in range(2))
    y = compiled(one, lengths=lengths)
    right = eager(other, lengths=lengths)
    y.square().sum().backward()
    right.square().sum().backward()
    torch.testing.assert_close((y, one.grad, layer.running_var), (right, other.grad, eager.running_var))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ({"mask": torch.ones(2, 5)}, DtypeError, "boolean"),
        ({"mask": torch.ones(2, 6, dtype=torch.bool)}, InputError, r"does not fit .* expected \(2, 5\)"),
        ({"mask": torch.ones(2, 3, 5, dtype=torch.bool)}, InputError, "differs between channels"),
        ({"lengths": torch.tensor([5, 6])}, InputError, "between 0 and 5"),
        ({"lengths": torch.tensor([5.0, 1.0])}, InputError, "integers"),
        ({"lengths": torch.tensor([5])}, InputError, r"shape \(2,\)"),
        ({"lengths": torch.tensor([5, 1]), "mask": torch.ones(2, 5, dtype=torch.bool)}, InputError, "one of them"),
        ({"weights": torch.tensor([[1.0, -1, 1, 1, 1]])}, InputError, "not negative"),
        ({"weights": torch.ones(2, 5, dtype=torch.long)}, DtypeError, "floating-point"),
    ],
)
def test_bad_input_is_one_clear_error_and_changes_nothing(call: dict[str, Any], error: type, words: str) -> None:
    layer = bn.BatchNorm1d(3)
    with pytest.raises(error, match=words):
        layer(torch.randn(2, 3, 5), **call)
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pool": "frame"}, "max_steps"),
        ({"pool": "word"}, "unknown pool"),
        ({"max_steps": 3}, "goes with pool='frame'"),
        ({"batch_first": False}, "batch_first"),
        ({"channel_groups": 4}, "does not divide"),
        ({"ghost_size": -1}, "at least 0"),
        ({"ghost_size": 2.5}, "integer"),
        ({"ghost_update": "decay"}, "needs ghost_size"),
        ({"ghost_size": 2, "renorm": bn.Renorm()}, "renorm"),
        ({"domains": 2, "track_running_stats": False}, "running statistics"),
        ({"process_group": "mars"}, "process_group"),
        ({"ghost_size": 2, "ghost_update": "decay", "process_group": "world"}, "give 'merge'"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        bn.BatchNorm1d(6, **options)
    if "pool" in options:
        with pytest.raises(InputError):
            bn.BatchNorm2d(6, pool="sequence")


def test_empty_batches_and_sequences() -> None:
    none = torch.zeros(0, dtype=torch.long)
    assert bn.BatchNorm1d(4)(torch.randn(0, 4, 5), lengths=none).shape == (0, 4, 5)
    assert bn.BatchNorm1d(4)(torch.randn(3, 4, 0), lengths=torch.zeros(3, dtype=torch.long)).shape == (3, 4, 0)
    for options in ({"pool": "sequence"}, {"pool": "frame", "max_steps": 3}):
        for shape in ((0, 5, 4), (2, 0, 4)):
            layer = bn.BatchNorm1d(4, **options)
            x = torch.randn(shape, requires_grad=True)
            layer(x).sum().backward()
            assert x.grad.shape == shape
            assert (layer.running_mean == 0).all()


def test_functional_transforms_see_masks_and_groups() -> None:
    torch.manual_seed(0)
    x, lengths = torch.randn(2, 3, 4, 5), torch.tensor([5, 2, 3])
    for options in ({"lengths": lengths}, {"channel_groups": 2}, {"ghost_size": 2}):

        def function(x: Tensor, options: dict[str, Any] = options) -> Tensor:
            return functional.batch_norm(x, None, None, training=True, **options)

        each = torch.stack([function(one) for one in x])
        torch.testing.assert_close(torch.func.vmap(function)(x), each)
        dx = torch.randn_like(x[0])
        wide = [t.double() for t in (x[0], dx)]
        _, tangent = torch.func.jvp(function, (wide[0],), (wide[1],))
        numeric = (function(wide[0] + 1e-6 * wide[1]) - function(wide[0] - 1e-6 * wide[1])) / 2e-6
        torch.testing.assert_close(tangent, numeric, rtol=1e-5, atol=1e-7)


class _Padded(nn.Module):
    """Two normalizations of padded sequences, the second of what the first makes."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first, self.second = bn.BatchNorm1d(3, **options), bn.BatchNorm1d(3, activation="relu", **options)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Any:
        extra = {} if lengths is None else {"lengths": lengths}
        return self.second(self.first(x, **extra), **extra)


@pytest.mark.parametrize("method", ["pooled", "ioffe", "sequential"])
def test_calibrated_on_padded_and_packed_data(method: Any) -> None:
    torch.manual_seed(0)
    lengths = [torch.tensor(n) for n in ([6, 2, 4], [1, 5], [3, 3, 6, 2])]
    batches = [{"x": torch.randn(len(n), 6, 3, dtype=torch.float64) * 2 + 1, "lengths": n} for n in lengths]
    packed = [pack_padded_sequence(b["x"], b["lengths"], True, False) for b in batches]
    frames = [p.data for p in packed]
    dense, padded, bundled = (net.double() for net in (_Padded(), _Padded(pool="sequence"), _Padded()))
    for b in batches:
        valid = torch.arange(6) < b["lengths"][:, None]
        b["x"] = b["x"].masked_fill(~valid[..., None], torch.nan)
    bn.calibrate(dense, frames, method=method)
    bn.calibrate(padded, batches, method=method)
    bn.calibrate(bundled, [[p] for p in packed], method=method)
    for net in (padded, bundled):
        torch.testing.assert_close(dict(net.named_buffers()), dict(dense.named_buffers()))
        assert net.first.source == "auto"


def test_calibrated_by_step_group_ghost_and_domain() -> None:
    torch.manual_seed(0)
    x = [torch.randn(5, 4, 6, dtype=torch.float64) + torch.arange(4)[:, None] for _ in range(3)]
    by_step = bn.BatchNorm1d(6, pool="frame", max_steps=3).double()
    bn.calibrate(by_step, x)
    frames = torch.cat(x)
    torch.testing.assert_close(by_step.running_mean, frames.mean(0)[:3])
    torch.testing.assert_close(by_step.running_var, frames.var(0)[:3])
    assert by_step.num_batches_tracked.tolist() == [3, 3, 3]

    rows = [batch.flatten(0, 1) for batch in x]
    whole = torch.cat(rows)
    ghosts = nn.Sequential(bn.BatchNorm1d(6, ghost_size=4), bn.BatchNorm1d(6)).double()
    bn.calibrate(ghosts, rows)
    torch.testing.assert_close(ghosts[0].running_var, whole.var(0))
    normalized = [functional.batch_norm(r, None, None, training=True, ghost_size=4) for r in rows]
    torch.testing.assert_close(ghosts[1].running_var, torch.cat(normalized).var(0))

    groups = bn.BatchNorm1d(6, channel_groups=2).double()
    bn.calibrate(groups, rows)
    torch.testing.assert_close(groups.running_var[:3], whole[:, :3].flatten().var().expand(3))

    domains = bn.BatchNorm1d(6, domains=3).double()
    domains.domain = 1
    bn.calibrate(domains, rows)
    torch.testing.assert_close(domains.running_mean[1], whole.mean(0))
    assert (domains.running_mean[[0, 2]] == 0).all()
    assert domains.num_batches_tracked.tolist() == [0, 3, 0]
    assert domains.domains == 3


def test_exact_accumulation_refuses_pools_that_it_would_get_wrong() -> None:
    x = torch.randn(4, 3, 5)
    with pytest.raises(InputError, match="ghost_size="):
        bn.accumulate_exact(bn.BatchNorm1d(3, ghost_size=2), [x, x], lambda net, b: net(b).sum())
    layer, lengths = bn.BatchNorm1d(3), torch.tensor([5, 1, 2, 2])
    with pytest.raises(InputError, match="masked"):
        bn.accumulate_exact(layer, [x, x], lambda net, b: net(b, lengths=lengths).sum())
    assert layer.source == "auto"
    assert layer.num_batches_tracked == 0


# The function takes what the layers take


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("given", ["padded", "lengths", "packed", "jagged"])
@pytest.mark.parametrize("pool", ["sequence", "frame"])
def test_sequences_of_the_function_are_those_of_the_layer(pool: str, given: str, batch_first: bool):
    if given == "jagged" and (pool == "frame" or not batch_first):
        pytest.skip("refused by the layer")
    steps = {"max_steps": 4} if pool == "frame" else {}
    layer = bn.BatchNorm1d(3, pool=pool, batch_first=batch_first, activation="relu", **steps).double()
    lengths = torch.tensor([6, 5, 5, 2])
    padded = torch.randn(4, 6, 3, dtype=torch.float64)
    x, extra = padded if batch_first else padded.transpose(0, 1), {"lengths": lengths} if given == "lengths" else {}
    if given == "packed":
        x = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=batch_first)
    elif given == "jagged":
        x = torch.nested.nested_tensor([row[:k] for row, k in zip(padded, lengths, strict=True)], layout=torch.jagged)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    arguments = (layer.weight, layer.bias)
    options = {"activation": "relu", "pool": pool, "batch_first": batch_first, **extra}
    for training in (True, True, False):
        layer.train(training)
        y = functional.batch_norm(x, mean, var, *arguments, training, 0.1, layer.eps, **options)
        expected = layer(x, **extra)
        assert type(y) is type(expected)
        values = [t.data if given == "packed" else t.values() if given == "jagged" else t for t in (y, expected)]
        torch.testing.assert_close(*values)
        torch.testing.assert_close(mean, layer.running_mean)
        torch.testing.assert_close(var, layer.running_var)


def test_the_function_refuses_sequences_it_cannot_take():
    x, mean = torch.randn(4, 6, 3), torch.zeros(3)
    with pytest.raises(InputError, match="unknown pool 'time'"):
        functional.batch_norm(x, None, None, training=True, pool="time")
    with pytest.raises(InputError, match="ghost_size does not go"):
        functional.batch_norm(x, None, None, training=True, pool="frame", ghost_size=2)
    with pytest.raises(InputError, match=r"running_mean is \(3,\); with pool='frame'"):
        functional.batch_norm(x, mean, mean + 1, training=True, pool="frame")
    with pytest.raises(InputError, match="takes sequences"):
        functional.batch_norm(x[0], None, None, training=True, pool="sequence")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("affine", [True, False])
def test_a_trace_of_frames_keeps_batch_and_length_free(affine):
    """Also beyond the steps that training reached; the older ONNX exporter records in the same way."""
    layer = bn.BatchNorm1d(4, pool="frame", max_steps=6, affine=affine, activation="relu").eval()
    with torch.no_grad():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        layer.num_batches_tracked.copy_(torch.tensor([3, 3, 3, 3, 0, 0]))
    traced = torch.jit.trace(layer, torch.randn(2, 5, 4))
    for batch, steps in ((2, 5), (3, 5), (1, 3), (4, 9)):
        x = torch.randn(batch, steps, 4)
        torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e5])
def test_weights_are_as_exact_as_the_plain_layer(mean: float):
    """At any mean: y, gradients and moments are one rounding from float64's."""
    x, weights = (torch.randn(64, 3) + mean).requires_grad_(), torch.rand(64)
    dy = torch.randn(64, 3)
    layer = bn.BatchNorm1d(3, momentum=1.0)
    y = layer(x, weights=weights)
    (dx,) = torch.autograd.grad(y, x, dy)
    wide, share = x.detach().double().requires_grad_(), (weights.double() / weights.double().sum())[:, None]
    centre = (wide * share).sum(0)
    expected = (wide - centre) * ((wide - centre).square() * share).sum(0).add(layer.eps).rsqrt()
    (expected_dx,) = torch.autograd.grad(expected, wide, dy.double())
    torch.testing.assert_close(y.double(), expected, rtol=2e-7, atol=2e-7)
    torch.testing.assert_close(dx.double(), expected_dx, rtol=2e-7, atol=2e-7)
    torch.testing.assert_close(layer.running_mean.double(), centre.detach(), rtol=1e-7, atol=1e-7)


def test_a_weighted_pool_of_one_value_is_beta():
    layer = bn.BatchNorm1d(1)
    nn.init.constant_(layer.bias, 0.25)
    y = layer(torch.tensor([[3e5], [1.0], [7.0]]), weights=torch.tensor([0.3, 0.0, 0.0]))
    assert y[0].item() == 0.25


@pytest.mark.parametrize("group", [3, True, 0.5, [0, 1], "everyone", object()])
def test_something_else_than_a_group_is_refused_everywhere(group):
    x, net = torch.randn(4, 2), nn.Sequential(bn.BatchNorm1d(2))
    with pytest.raises(InputError, match="process_group must be None, 'world' or a group"):
        bn.BatchNorm1d(2, process_group=group)
    with pytest.raises(InputError, match="process_group must be"):
        bn.functional.batch_norm(x, None, None, training=True, process_group=group)
    with pytest.raises(InputError, match="process_group must be"):
        bn.convert(net, process_group=group)
    with pytest.raises(InputError, match="process_group must be"):
        bn.calibrate(net, [x], process_group=group)
    assert not net[0].running_mean.any()
