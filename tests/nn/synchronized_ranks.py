"""What every rank does in tests/nn/test_synchronized.py, which starts them: torchrun synchronized_ranks.py CHECK..."""

from __future__ import annotations

import copy
import io
import itertools
import os
import sys
import time
import traceback
import warnings
from datetime import timedelta

import pytest
import test_function_is_layer  # beside this script
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.errors import InputError, SynchronizationError

EPS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}


def draw(*shape, seed=0, dtype=torch.float64):
    """The same numbers on every rank."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1).to(dtype)


def close(mine, expected, what, dtype=torch.float64, times=1):
    limit = EPS[dtype] * times
    mine, expected = mine.detach(), expected.detach()
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    assert (mine.dtype, mine.shape) == (expected.dtype, expected.shape), (what, mine.shape, expected.shape)
    error = float((mine.double() - expected.double()).abs().max()) if mine.numel() else 0.0
    assert error <= limit * scale, f"{what}: off by {error:.3g}, allowed {limit * scale:.3g}"  # NaN fails


def summed(value):
    """Over the ranks."""
    total = value.detach().to(torch.float64, copy=True)
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


def function():
    """The function is the layer on several ranks, too, to the last bit."""
    for option, counted, fused in test_function_is_layer.options():
        for samples in (1, 5):
            seed = 10 * dist.get_rank()
            test_function_is_layer.compared(option, counted, fused, samples, torch.float32, seed, process_group="world")


def ghosts_of_the_function():
    """Running statistics take in the ghost batches of all ranks."""
    whole = draw(16, 3) + torch.tensor([0.0, 5.0]).repeat_interleave(8)[:, None]
    mean, var = torch.zeros(3, dtype=whole.dtype), torch.ones(3, dtype=whole.dtype)
    mine = share([8, 8])(whole)
    bn.functional.batch_norm(mine, mean, var, training=True, ghost_size=4, process_group="world")
    close(mean, 0.1 * whole.mean(0), "mean")
    close(var, 0.9 + 0.1 * whole.var(0), "variance")


def same_buffers(mine, expected, what):
    for name, value in expected.named_buffers():
        limit = value.dtype if value.is_floating_point() else torch.float64
        close(mine.get_buffer(name), value, f"{name} of {what}", limit)


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


def ghosts():
    """Ghost batches stay on their rank; the running statistics are those of the whole batch."""
    for sizes in ([5] * dist.get_world_size(), unequal(dist.get_world_size())):
        for kwargs in ({}, {"mask": draw(sum(sizes), 6) > 0}):
            layer, local = (
                perturbed(bn.BatchNorm1d(4, ghost_size=2, process_group=g), torch.float64) for g in ("world", None)
            )
            whole = perturbed(bn.BatchNorm1d(4), torch.float64)
            x, dy, part = draw(sum(sizes), 4, 6), draw(sum(sizes), 4, 6, seed=1), share(sizes)
            mine = {k: part(v) for k, v in kwargs.items()}
            whole(x, **kwargs)
            y, first, _ = gradients(layer, part(x).clone(), part(dy), None, **mine)
            if len(y):
                expected = gradients(local, part(x).clone(), part(dy), None, **mine)
                for a, b in zip((y, *first), (expected[0], *expected[1]), strict=True):
                    close(a, b, "ghost batches")
            same_buffers(layer, whole, f"ghost batches of {sizes}")


def steps():
    """Frame-wise, where the ranks' sequences have different lengths."""
    rank, n = dist.get_rank(), dist.get_world_size()
    layer, whole = (
        perturbed(bn.BatchNorm1d(3, pool="frame", max_steps=6, process_group=g), torch.float64) for g in ("world", None)
    )
    lengths = [4 + r for r in range(n)]
    x, dy = draw(2 * n, max(lengths), 3), draw(2 * n, max(lengths), 3, seed=1)
    mine = slice(2 * rank, 2 * rank + 2), slice(0, lengths[rank])
    y, first, _ = gradients(whole, x.clone(), dy, None, lengths=torch.tensor(lengths).repeat_interleave(2))
    got, own, _ = gradients(layer, x[mine].clone(), dy[mine], None)
    close(got, y[mine], "y by steps")
    close(own[0], first[0][mine], "dx by steps")
    for a, b in zip(own[1:], first[1:], strict=True):
        close(summed(a), b, "gradient by steps")
    same_buffers(layer, whole, "steps")
    packed = nn.utils.rnn.pack_padded_sequence(x[mine], [lengths[rank]] * 2, batch_first=True)
    close(nn.utils.rnn.pad_packed_sequence(layer(packed), batch_first=True)[0], y[mine], "y of a packed sequence")


def recurrences():
    """Recurrent layers in all forms: sequences of unequal lengths, packed or padded, and a rank that has none."""
    rank, n = dist.get_rank(), dist.get_world_size()
    forms = [("sequence", False), ("frame", False), ("frame", True)]
    for sizes, kind in itertools.product(([3] * n, unequal(n)), ("LSTM", "GRU", "RNN")):
        lengths = torch.tensor([2 + (3 * k + r) % (3 + r) for r, size in enumerate(sizes) for k in range(size)])
        total, longest, part = sum(sizes), int(lengths.max()), share(sizes)
        own = part(lengths)
        steps = int(own.max()) if len(own) else 2
        x, dy = draw(total, longest, 3), draw(total, longest, 8, seed=1)
        for pool, recurrent in forms:
            whole, layer = (
                perturbed(
                    getattr(bn, kind)(
                        3, 4, bidirectional=True, batch_first=True, batch_norm=pool, recurrent=recurrent,
                        max_steps=5, process_group=group,
                    ),
                    torch.float64,
                )
                for group in (None, "world")
            )  # fmt: skip
            what = f"{kind}, {pool}, recurrent={recurrent}, {sizes}"
            inputs, theirs = (v.clone().requires_grad_() for v in (x, part(x)[:, :steps]))
            y, states = whole(inputs, lengths=lengths)
            if len(own) and rank % 2:
                packed = nn.utils.rnn.pack_padded_sequence(theirs, own, batch_first=True, enforce_sorted=False)
                got, own_states = layer(packed)
                got = nn.utils.rnn.pad_packed_sequence(got, batch_first=True)[0]
            else:
                got, own_states = layer(theirs, lengths=own)
            h, own_h = (v[0] if kind == "LSTM" else v for v in (states, own_states))
            close(got, part(y)[:, :steps], f"y of {what}")
            close(own_h, share(sizes, 1)(h), f"h of {what}")
            expected = torch.autograd.grad(y, [inputs, *whole.parameters()], dy)
            gradients = torch.autograd.grad(got, [theirs, *layer.parameters()], part(dy)[:, :steps])
            # One unit in the last place of x moves these gradients by up to 1e-12 of their size: a step has few values.
            close(gradients[0], part(expected[0])[:, :steps], f"dx of {what}", times=4)
            for a, b in zip(gradients[1:], expected[1:], strict=True):
                close(summed(a), b, f"gradient of {what}", times=4)
            same_buffers(layer, whole, what)
            if rank == 0:  # alone: whoever exchanged in evaluation would wait for ever
                layer.eval()(theirs[:1])


def network(group=None, **options):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), bn.BatchNorm2d(4, process_group=group, activation="relu", **options), nn.Flatten(),
        nn.Linear(4 * 9, 6), bn.BatchNorm1d(6, process_group=group, **options), nn.Tanh(), nn.Linear(6, 3),
    )  # fmt: skip
    return net.double()


def dense(group):
    return nn.Sequential(bn.BatchNorm1d(3, process_group=group)).double()


class Checkpointed(nn.Sequential):
    """Forwards run again within the backward."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def parallel(net, **kwargs):
    return nn.parallel.DistributedDataParallel(net, **kwargs)


def follows(net, whole, sizes, x, target, rounds=4, step=None):
    """Trained on its part, each rank's network stays the one that is trained on everything."""
    part, total = share(sizes), sum(sizes)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (net, whole)]
    step = step or (lambda m, x: m(x))
    for _ in range(rounds):
        for m, optimizer, inputs, wanted, scale in (
            (whole, optimizers[1], x, target, 1),
            (net, optimizers[0], part(x), part(target), dist.get_world_size()),  # whose gradients are averaged
        ):
            optimizer.zero_grad()
            ((step(m, inputs) - wanted).square().sum() * scale / total).backward()
            optimizer.step()
        x, target = x.roll(1, 0) * 1.1, target.roll(1, 0)
    ours = net.module
    for (name, a), b in zip(ours.named_parameters(), whole.parameters(), strict=True):
        close(a.detach(), b.detach(), f"{name} in data parallel training", a.dtype)
    same_buffers(ours, whole, "data parallel training")


def data_parallel():
    """Under DistributedDataParallel: the properties that torch tests of its SyncBatchNorm, and domains."""
    rank, n = dist.get_rank(), dist.get_world_size()
    for sizes in ([2] * n, [2 + r for r in range(n)], [1] * n):
        total = sum(sizes)
        x, target = draw(total, 2, 5, 5), draw(total, 3, seed=3)
        for options in ({}, {"affine": False}, {"channel_groups": 2}):
            follows(parallel(network("world", **options)), network(**options), sizes, x, target)
        last = x.to(memory_format=torch.channels_last)
        saved = io.BytesIO()
        torch.save(parallel(network("world").to(memory_format=torch.channels_last)), saved)
        saved.seek(0)
        follows(torch.load(saved, weights_only=False), network(), sizes, last, target)
        own = dist.new_group()
        plain = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).double()
        theirs = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain), own)
        net = bn.convert(theirs, example=x)
        assert (net[1].process_group, net[1].label) == (own, "1")
        follows(parallel(net), plain, sizes, x, target)
        follows(parallel(dense("world")), dense(None), sizes, draw(total, 3), target)

    layer = bn.BatchNorm1d(2, momentum=0.99, process_group="world")
    parts = [
        torch.stack([torch.ones(2, 10 ** (r + 1)) * 0.1 ** (r - 1), torch.ones(2, 10 ** (r + 1)) * 0.3 ** (r - 1)], 1)
        for r in range(n)
    ]
    for _ in range(20):
        layer(parts[rank]).mean().backward()
    everything = torch.cat([p.transpose(0, 1).flatten(1) for p in parts], 1)
    close(layer.running_mean, everything.mean(1), "mean of unequal lengths", torch.float32)
    close(layer.running_var, everything.var(1), "variance of unequal lengths", torch.float32)
    if rank == 0:  # alone: whoever exchanged in evaluation would wait for ever
        layer.eval()(parts[0]).sum().backward()

    net = parallel(network("world").to(torch.bfloat16))
    y = net(draw(2, 2, 5, 5, dtype=torch.bfloat16))
    y.sum().backward()
    assert {y.dtype, *(p.grad.dtype for p in net.parameters())} == {torch.bfloat16}


def domains():
    """Two forwards of different domains before one backward, under DistributedDataParallel."""
    n = dist.get_world_size()

    def real_and_fake(net, x):
        with bn.use_domain(net, 1):
            fake = net(x.flip(1) * 3)
        return net(x) * fake

    for kwargs in ({"broadcast_buffers": True}, {"broadcast_buffers": False}):
        net, whole = parallel(network("world", domains=2), **kwargs), network(domains=2)
        follows(net, whole, [2] * n, draw(2 * n, 2, 5, 5), draw(2 * n, 3, seed=3), step=real_and_fake)
        statistics = whole[1].running_mean
        assert statistics.shape == (2, 4)
        assert (statistics[0] != statistics[1]).all()


def two_forwards():
    """Before one backward, each of which broadcasts the buffers: the gradients are the means of all ranks' own."""
    x = draw(2, 4, 2, 5, 5, seed=dist.get_rank())
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Conv2d(2, 3, 3), bn.BatchNorm2d(3)).double()
    net = parallel(copy.deepcopy(alone))
    for module in (alone, net):
        (module(x[0]) * module(x[1])).sin().sum().backward()
    for p, q in zip(net.parameters(), alone.parameters(), strict=True):
        close(p.grad, summed(q.grad) / dist.get_world_size(), "gradient of two forwards")


def uneven():
    """Inside Join, with another number of batches on each rank."""
    rank, n = dist.get_rank(), dist.get_world_size()
    with pytest.raises(InputError, match="one of their own"):
        bn.joinable(parallel(network("world")))
    with pytest.raises(SynchronizationError, match="no batch of its own"):
        bn.joinable(parallel(network(dist.new_group()))).join_hook().record.repeat()
    for options in ({}, {"renorm": bn.Renorm(r_max=2, d_max=2)}, {"ghost_size": 1}, {"channel_groups": 2}):
        for divide in (True, False):
            joins(rank, n, options, divide)
    joins(rank, n, {}, True, checkpointed=True)
    joins(rank, n, {}, True, broadcast_buffers=False)


def joins(rank, n, options, divide, checkpointed=False, **kwargs):
    group = dist.new_group()
    net, whole = network(group, **options), network(**{k: v for k, v in options.items() if k != "ghost_size"})
    net = parallel(Checkpointed(*net) if checkpointed else net, **kwargs)
    batches = [draw(2, 2, 5, 5, seed=10 * r + k) for r in range(n) for k in range(r + 1)]
    mine = batches[sum(range(rank + 1)) :][: rank + 1]

    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (net, whole))
    with Join([bn.joinable(net)], divide_by_initial_world_size=divide):
        for x in mine:
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    for k in range(n):  # the batches of the ranks that have not joined
        there = [r for r in range(n) if k <= r]
        x = torch.cat([draw(2, 2, 5, 5, seed=10 * r + k) for r in there])
        other.zero_grad()
        (whole(x).square().sum() / (n if divide else len(there))).backward()
        other.step()
    if "ghost_size" not in options:
        for (name, a), b in zip(net.module.named_parameters(), whole.parameters(), strict=True):
            close(a.detach(), b.detach(), f"{name} after Join, {options}")
        same_buffers(net.module, whole, f"Join, {options}")
    for name, value in net.module.state_dict().items():
        close(summed(value.double()) / n, value.double(), f"{name} on all ranks")


def own_statistics():
    """Ranks that normalize by themselves merge their running statistics by the batches that they have tracked."""
    rank, n = dist.get_rank(), dist.get_world_size()
    for make in (lambda: nn.BatchNorm1d(3), lambda: bn.BatchNorm1d(3, domains=2, running_var="biased")):
        nets = [nn.Sequential(make()).double() for _ in range(n)]  # those of all ranks, on each
        for r, net in enumerate(nets):
            for k in range(r):  # rank 0 has seen nothing
                net(draw(4, 3, seed=10 * r + k))
        expected = bn.average_statistics(copy.deepcopy(nets[0]), nets)
        for _ in range(2):  # merging again changes nothing
            assert bn.sync_running_statistics(nets[rank]) is nets[rank]
            for key in ("running_mean", "running_var"):
                close(getattr(nets[rank][0], key), getattr(expected[0], key), key)
            assert int(nets[rank][0].num_batches_tracked.max()) == rank
        fresh = nn.Sequential(make()).double()
        before = copy.deepcopy(fresh.state_dict())
        bn.sync_running_statistics(fresh)
        assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())
    with pytest.raises(SynchronizationError, match="expected the same layers on all"):
        bn.sync_running_statistics(nn.BatchNorm1d(2 + rank))
    outside = dist.new_group([0])
    if rank:
        with pytest.raises(SynchronizationError, match="not in the process group"):
            bn.BatchNorm1d(2, process_group=outside)(draw(4, 2, dtype=torch.float32))


def precisions():
    """Automatic mixed precision and torch.compile."""
    n = dist.get_world_size()
    x, part = draw(4 * n, 2, 5, 5, dtype=torch.float32), share([4] * n)
    nets = [network(group).float() for group in ("world", None)]
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = nets[0](part(x)), nets[1](x)
    close(y.float(), part(expected).float(), "autocast", torch.bfloat16)
    for out in (y, expected):
        out.float().square().sum().backward()
    close(summed(nets[0][1].weight.grad), nets[1][1].weight.grad, "dgamma under autocast", torch.bfloat16)
    layer, whole = (perturbed(bn.BatchNorm2d(2, process_group=g), torch.float64) for g in ("world", None))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for k in range(2):
        x, dy = draw(4 * n, 2, 5, 5, seed=k), draw(4 * n, 2, 5, 5, seed=k + 5)
        y, first, _ = gradients(whole, x.clone(), dy, None)
        got, own, _ = gradients(compiled, part(x).clone(), part(dy), None)
        close(got, part(y), "y, compiled")
        close(own[0], part(first[0]), "dx, compiled")
        close(summed(own[1]), first[1], "dgamma, compiled")
    same_buffers(layer, whole, "compiled")
    layer, whole = (perturbed(bn.BatchNorm2d(2, process_group=g), torch.float64) for g in ("world", None))
    layer(part(x)), whole(x)
    mixed = layer if dist.get_rank() else torch.compile(layer, backend="aot_eager")  # after a first exchange without it
    close(mixed(part(x)), part(whole(x)), "y, compiled on one rank alone")
    same_buffers(layer, whole, "compiled on one rank alone")


class Recurrent(nn.Module):
    """A recurrent layer and a linear one behind its last step."""

    def __init__(self, kind, group, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layer = getattr(bn, kind)(3, 6, batch_first=True, process_group=group, **options)
        self.out = nn.Linear(6, 2)

    def forward(self, x, lengths):
        return self.out(self.layer(x, lengths=lengths)[0][:, -1])


class ByStep(nn.Module):
    """A cell that is called for each step, and a linear one behind its last state."""

    def __init__(self, kind, group, **options):
        super().__init__()
        torch.manual_seed(0)
        self.cell = getattr(bn, kind)(3, 6, process_group=group, **options)
        self.out = nn.Linear(6, 2)

    def forward(self, x, lengths):
        state = None
        for step, each in enumerate(x.unbind(1)):
            state = self.cell(each, state, step=step)
        return self.out(state[0] if isinstance(state, tuple) else state)


def sharded(net, by_module):
    """fully_shard of the whole, and before it of each module with parameters, the norms inside a recurrence too."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    units = [m for m in reversed(list(net.modules())) if m is not net and list(m.parameters(recurse=False))]
    for module in units if by_module else []:
        fully_shard(module, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def trained_recurrences():
    """Recurrent layers and cells under DistributedDataParallel and fully_shard follow the network of one process."""
    n = dist.get_world_size()
    part, lengths = share([4] * n), torch.tensor([6, 4, 5, 6] * n)
    x, target = draw(4 * n, 6, 3), draw(4 * n, 2, seed=3)
    frames = {"batch_norm": "frame", "max_steps": 5}
    whole, steps = {"batch_norm": "sequence"}, frames | {"recurrent": True}
    layers = [("LSTM", whole), ("LSTM", steps), ("GRU", frames), ("RNN", whole)]
    kinds = [*layers, ("LSTMCell", steps), ("GRUCell", frames)]
    warnings.filterwarnings("error", message="FSDP2-wrapped module")
    for kind, options in kinds:
        make = ByStep if kind.endswith("Cell") else Recurrent
        for wrap in (parallel, lambda net: sharded(net, False), lambda net: sharded(net, True)):
            nets = make(kind, None, **options).double(), wrap(make(kind, "world", **options).double())
            optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
            for _ in range(2):
                for net, optimizer, cut in zip(nets, optimizers, (lambda t: t, part), strict=True):
                    optimizer.zero_grad()
                    (net(cut(x), cut(lengths)) - cut(target)).square().mean().backward()
                    optimizer.step()
            state = getattr(nets[1], "module", nets[1]).state_dict()
            for name, value in nets[0].state_dict().items():
                mine = state[name].full_tensor() if isinstance(state[name], DTensor) else state[name]
                if value.is_floating_point():
                    close(mine, value, f"{name} of {kind}, {options}", value.dtype)


def absent():
    """A rank that never arrives, forward or backward, is an error that names the layer, within the group's timeout."""
    net = nn.Sequential(nn.Linear(3, 3), bn.BatchNorm1d(3))
    for arrives in (False, True):
        bn.convert(net, process_group=dist.new_group(timeout=timedelta(seconds=2)))
        begin = time.monotonic()
        if dist.get_rank():
            _ = arrives and net(torch.randn(4, 3))
        else:
            with pytest.raises(SynchronizationError, match="layer '1'"):
                net(torch.randn(4, 3)).sum().backward()
            assert time.monotonic() - begin < 20
        dist.barrier()


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # and new memory is filled with NaN
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        for name in sys.argv[1:]:
            globals()[name]()
    except BaseException:
        print(f"rank {dist.get_rank()}, {name}:", traceback.format_exc(), sep="\n", flush=True)
        os._exit(1)  # at once: the others wait for this rank
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
