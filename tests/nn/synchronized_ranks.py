"""What every rank does in tests/nn/test_synchronized.py, which starts them: torchrun synchronized_ranks.py CHECK..."""

from __future__ import annotations

import sys
import traceback

import torch
from torch import distributed as dist
from torch import nn

import batchnorm as bn

EPS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}


def draw(*shape, seed=0, dtype=torch.float64):
    """The same numbers on every rank."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1).to(dtype)


def close(mine, expected, what, dtype=torch.float64):
    limit = EPS[dtype]
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    assert mine.dtype == expected.dtype and mine.shape == expected.shape, (what, mine.shape, expected.shape)
    error = float((mine.double() - expected.double()).abs().max()) if mine.numel() else 0.0
    assert error <= limit * scale, f"{what}: off by {error:.3g}, allowed {limit * scale:.3g}"  # NaN fails


def summed(value):
    """Over the ranks."""
    total = value.detach().to(torch.float64)
    dist.all_reduce(total)
    return total.to(value.dtype)


def share(sizes, axis=0):
    """This rank's part of what lies along an axis."""
    rank = dist.get_rank()
    start = sum(sizes[:rank])
    return lambda t: None if t is None else t.narrow(axis, start, sizes[rank])


def perturbed(layer, dtype):
    with torch.no_grad():
        for k, parameter in enumerate(layer.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=90 + k))
    return layer.to(dtype if dtype != torch.bfloat16 else torch.float32)


def gradients(layer, x, dy, direction, **inputs):
    """y, the gradients of <y, dy>, and where a direction is given those of a linear function of these gradients."""
    leaves = [x, *layer.parameters()]
    leaves += [t for t in (inputs.get("residual"), inputs.get("weights")) if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    y = layer(x, **inputs)
    first = torch.autograd.grad(y, leaves, dy, create_graph=direction is not None)
    if direction is None:
        return y.detach(), first, ()
    local = [direction, *(draw(*p.shape, seed=70) for p in layer.parameters())]
    local += [torch.ones_like(leaf) for leaf in leaves[len(local) :]]
    penalty = sum((g * u.to(g.dtype)).sum() for g, u in zip(first, local, strict=True))
    return y.detach(), first, torch.autograd.grad(penalty, leaves, materialize_grads=True)


def equals_whole(make, shape, sizes, dtype=torch.float64, order=torch.contiguous_format, second=False, **inputs):
    """The ranks' parts of a batch give the outputs, gradients and running statistics of the whole on one process."""
    whole, layer = perturbed(make(None), dtype), perturbed(make("world"), dtype)
    x, dy = draw(*shape, dtype=dtype), draw(*shape, seed=1, dtype=dtype)
    if order is not torch.contiguous_format:
        x, dy = (t.to(memory_format=order) for t in (x, dy))
    part, direction = share(sizes), draw(*shape, seed=2, dtype=dtype) if second else None

    def mine(t):
        return None if t is None else part(t).clone(memory_format=torch.preserve_format)

    everything = {name: value.clone() for name, value in inputs.items()}
    y, first, further = gradients(whole, x.clone(), dy, direction, **everything)
    what = f"{layer} of {tuple(shape)}, {dtype}, {sorted(inputs)}"
    got = gradients(layer, mine(x), part(dy), part(direction), **{k: mine(v) for k, v in inputs.items()})
    close(got[0], part(y), f"y of {what}", dtype)
    parameters = len(list(layer.parameters()))
    for round_, (ours, theirs) in enumerate(zip(got[1:], (first, further), strict=True)):
        for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            of_parameter = 0 < k <= parameters
            close(
                summed(a) if of_parameter else a,
                b if of_parameter else part(b),
                f"gradient {round_}.{k}: {what}",
                dtype,
            )
    for name, value in whole.named_buffers():
        close(
            layer.get_buffer(name),
            value,
            f"{name} of {what}",
            value.dtype if value.is_floating_point() else torch.float64,
        )


def unequal(n):
    """Samples of each rank, one of them none."""
    return [0 if rank == 1 else 3 + rank for rank in range(n)]


def equality():
    """Dense and convolutional inputs, dtypes, memory orders, fusions, second derivatives; also with an empty rank."""
    n = dist.get_world_size()
    for sizes in ([4] * n, unequal(n)):
        total = sum(sizes)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            equals_whole(lambda g: bn.BatchNorm1d(5, process_group=g), (total, 5), sizes, dtype)
            for order in (torch.contiguous_format, torch.channels_last):
                shape = (total, 3, 4, 5)
                equals_whole(lambda g: bn.BatchNorm2d(3, process_group=g), shape, sizes, dtype, order)
                for activation in ("relu", "silu"):
                    equals_whole(
                        lambda g, a=activation: bn.BatchNorm2d(3, process_group=g, activation=a),
                        shape, sizes, dtype, order, residual=draw(*shape, seed=5, dtype=dtype),
                    )  # fmt: skip
        for kwargs in ({}, {"affine": False}, {"bias": False}, {"track_running_stats": False}, {"momentum": None}):
            equals_whole(lambda g, k=kwargs: bn.BatchNorm1d(4, process_group=g, **k), (total, 4, 3), sizes, second=True)
        for activation in ("relu", "tanh"):
            equals_whole(
                lambda g, a=activation: bn.BatchNorm2d(3, process_group=g, activation=a),
                (total, 3, 2, 2), sizes, second=True, residual=draw(total, 3, 2, 2, seed=5),
            )  # fmt: skip


def pools():
    """With everything else that says which values share statistics."""
    n = dist.get_world_size()
    for sizes in ([4] * n, unequal(n)):
        total = sum(sizes)
        mask, lengths = draw(total, 6) > 0, torch.arange(total) % 7
        weights = draw(total, 6).abs()
        for dtype in (torch.float64, torch.float32):
            for inputs in ({"mask": mask}, {"lengths": lengths}, {"weights": weights.to(dtype)}):
                for kwargs in ({}, {"channel_groups": 2, "activation": "relu"}):
                    equals_whole(
                        lambda g, k=kwargs: bn.BatchNorm1d(4, process_group=g, **k),
                        (total, 4, 6), sizes, dtype, second=dtype == torch.float64, **inputs,
                    )  # fmt: skip
        for pool in ("sequence", "frame"):
            steps = {"max_steps": 4} if pool == "frame" else {}
            for inputs in ({}, {"lengths": lengths}, {"weights": weights}):
                equals_whole(
                    lambda g, p=pool, s=steps: bn.BatchNorm1d(4, process_group=g, pool=p, **s),
                    (total, 6, 4), sizes, second=True, **inputs,
                )  # fmt: skip
        equals_whole(
            lambda g: bn.BatchNorm1d(4, process_group=g, renorm=bn.Renorm(r_max=1.5, d_max=0.5, warmup=0)),
            (total, 4, 6), sizes,
        )  # fmt: skip
        for kwargs in ({"running": "debiased"}, {"running": "cumulative"}, {"running_var": "biased"}):
            equals_whole(lambda g, k=kwargs: bn.BatchNorm1d(4, process_group=g, **k), (total, 4), sizes)
        equals_whole(lambda g: bn.BatchNorm1d(4, process_group=g, domains=2), (total, 4), sizes)


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # and new memory is filled with NaN
    dist.init_process_group("gloo")
    try:
        for name in sys.argv[1:]:
            globals()[name]()
    except BaseException:
        print(f"rank {dist.get_rank()}, {name}:", traceback.format_exc(), sep="\n", flush=True)
        raise
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
