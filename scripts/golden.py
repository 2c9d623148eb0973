"""Records what the layers and functions compute, and compares two recordings bit for bit.

A change that moves code and no numbers is checked with it:

    python scripts/golden.py record before.pt      # at the commit before
    python scripts/golden.py compare before.pt     # after the change
    python scripts/golden.py time                  # forward + backward of a module at (64, 32) and (256, 256)

A recording holds, for each case, outputs, gradients, buffers, `repr`, the state and its metadata, or the type and text
of an error. The cases are options x modes x dtypes x memory formats x ways of calling: the C++ call, Python alone,
forward mode, vmap, torch.export, torch.fx and (for a few) torch.compile. Pickles that `record` wrote are loaded by
`compare`. Differences that are meant stand in `CHANGED`, with the reason; everything else is an error.
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import batchnorm as bn
from batchnorm.kernels import cpu

# Patterns of the names of cases that are meant to differ, and why.
CHANGED: dict[str, str] = {
    " ones": "one value that weights leave has no variance, so the running statistics stay",
    "always one": "nor has a batch of one value",
    " one": "the error advises by the layer's options, which .eval() does not always help",
    r"^steps batch \[1\]": "the same",
    " weights": "weighted statistics are computed in float64",
    "ghosts_decay (train|always) empty": "an empty batch counts, as in torch",
    "function": "the function's running statistics are the layer's to the last bit; a rounding of float64 at most",
    "samples=1": "one sequence has no variance at a step, so the running statistics stay",
    "^recurrent .*bfloat16": "running statistics stay in float32 beside parameters of 16 bits",
    "^option .* process_group": "no group of torch.distributed: refused",
    "^traced": "torch.fx records the count of batches, evaluation and never as torch's node; errors name a way out",
    "^exported": "programs in training compute in the input's compute dtype; evaluation and 'never' are torch's node",
    "^diagnosed": "advice that can be copied",
    "^folded domains": "the reason names a way out",
}

# Parts of warnings that were not given before.
WARNINGS = ("is not finite",)

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
MODES = ("train", "eval", "never", "always", "batch")
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "relu": {"activation": "relu"},
    "silu": {"activation": "silu"},
    "leaky": {"activation": "leaky_relu", "negative_slope": 0.2},
    "cumulative_momentum": {"momentum": None},
    "no_affine": {"affine": False},
    "no_bias": {"bias": False},
    "no_statistics": {"track_running_stats": False},
    "debiased": {"running": "debiased"},
    "cumulative": {"running": "cumulative"},
    "biased": {"running_var": "biased"},
    "skip": {"nonfinite": "skip"},
    "skip_channel": {"nonfinite": "skip_channel"},
    "renorm": {"renorm": (1.5, 0.5, 0)},
    "renorm_warmup": {"renorm": (3.0, 5.0, 8)},
    "example": {"example_weight": 0.25},
    "ghosts": {"ghost_size": 2},
    "ghosts_ragged": {"ghost_size": 4},
    "ghosts_decay": {"ghost_size": 2, "ghost_update": "decay"},
    "groups": {"channel_groups": 2},
    "domains": {"domains": 3},
    "world": {"process_group": "world"},
}
PAIRS = [
    p
    for p in itertools.combinations(
        ("relu", "no_affine", "debiased", "biased", "skip_channel", "renorm", "example", "ghosts", "groups", "domains"),
        2,
    )
    if set(p) != {"renorm", "ghosts"}
] + [("ghosts_decay", "domains"), ("cumulative", "skip"), ("cumulative", "domains"), ("debiased", "skip", "domains")]
CALLS = ("", "residual", "mask", "lengths", "weights", "ones", "empty_mask")
SEQUENCES: dict[str, dict[str, Any]] = {
    "sequence": {"pool": "sequence"},
    "time_first": {"pool": "sequence", "batch_first": False},
    "frame": {"pool": "frame", "max_steps": 4},
    "frame_long": {"pool": "frame", "max_steps": 9, "running": "debiased"},
    "frame_domains": {"pool": "frame", "max_steps": 4, "domains": 2, "nonfinite": "skip_channel"},
    "sequence_ghosts": {"pool": "sequence", "batch_first": False, "ghost_size": 2},
    "sequence_debiased": {"pool": "sequence", "running": "debiased", "running_var": "biased"},
    "frame_groups": {"pool": "frame", "max_steps": 4, "channel_groups": 2, "running": "cumulative"},
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values * 1.5 + 2).to(dtype)


def made(kind: Any, channels: int, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    options = dict(options)
    if "renorm" in options:
        options["renorm"] = bn.Renorm(*options["renorm"])
    layer = kind(channels, **options)
    with torch.no_grad():
        for k, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=40 + k) * 0.3)
    return layer.to(torch.float32 if dtype == torch.bfloat16 else dtype)


def in_mode(layer: Any, mode: str) -> Any:
    layer.train(mode != "eval")
    if mode == "never":
        layer.update = "never"
    elif mode == "always" and layer.track_running_stats:
        layer.eval().update = "always"
    elif mode == "batch":
        layer.eval().source = "batch"
    return layer


def arguments(call: str, x: Tensor, batch_first: bool = True) -> dict[str, Any]:
    """What is given beside the input; the last axis of space is time."""
    samples, space = x.shape[0], x.shape[2:]
    if call == "residual":
        return {"residual": normal(*x.shape, seed=9, dtype=x.dtype)}
    if call == "mask":
        return {"mask": normal(samples, *space, seed=3) > 1.5}
    if call == "ones":
        return {"weights": (torch.arange(samples * math.prod(space)) == 0).float().reshape(samples, *space)}
    if call == "empty_mask":
        return {"mask": torch.zeros(samples, *space, dtype=torch.bool)}
    if call == "weights":
        return {"weights": normal(samples, *space, seed=4).abs()}
    if call == "lengths":
        return {"lengths": torch.arange(samples) % (space[-1] + 1) if space else torch.arange(samples)}
    return {}


def values(item: Any) -> list[Any]:
    """Tensors of an output of any kind."""
    if isinstance(item, PackedSequence):
        return [item.data]
    if isinstance(item, Tensor):
        return [item.values() if item.is_nested else item]
    if isinstance(item, (tuple, list)):
        return [t for each in item for t in values(each)]
    return [item]


def run(layer: Any, x: Any, given: dict[str, Any], forwards: int = 2) -> dict[str, Any]:
    """Outputs and gradients of some forwards, then buffers, state, metadata and repr."""
    found: list[Any] = []
    for k in range(forwards):
        data = x.data if isinstance(x, PackedSequence) else x
        leaf = (data + k).detach().requires_grad_()
        y = layer(PackedSequence(leaf, x.batch_sizes) if isinstance(x, PackedSequence) else leaf, **given)
        (out, *_) = values(y)
        leaves = [leaf, *(p for p in layer.parameters() if p.requires_grad)]
        leaves += [t.requires_grad_() for t in given.values() if t.is_floating_point()]
        dy = normal(*out.shape, seed=7, dtype=out.dtype)
        found += [out.detach(), out.stride(), *torch.autograd.grad(out, leaves, dy, allow_unused=True)]
        for t in given.values():
            t.requires_grad_(False)
    return {"found": found, **standing(layer)}


def standing(layer: Any) -> dict[str, Any]:
    state = layer.state_dict()
    return {
        "buffers": {k: v.clone() for k, v in layer.named_buffers()},
        "state": {k: v.clone() for k, v in state.items()},
        "metadata": repr(dict(state._metadata)),
        "repr": repr(layer),
    }


def through_python(call: Callable[[], Any]) -> Any:
    kept, cpu.call = cpu.call, None
    try:
        return call()
    finally:
        cpu.call = kept


def images(dtype: torch.dtype, memory: torch.memory_format) -> Tensor:
    return normal(6, 4, 3, 5, seed=1, dtype=dtype).to(memory_format=memory)


Case = tuple[str, Callable[[], Any]]


def of_layers() -> Iterator[Case]:
    single = [(name,) for name in LAYERS]
    for names, mode, dtype in itertools.product([*single, *PAIRS], MODES, DTYPES):
        if len(names) > 1 and dtype != torch.float32:
            continue
        options = {k: v for name in names for k, v in LAYERS[name].items()}
        formats = (torch.contiguous_format, torch.channels_last) if len(names) == 1 else (torch.contiguous_format,)
        calls = CALLS if dtype == torch.float32 and mode in ("train", "eval", "always") else ("", "mask")
        for memory, call in itertools.product(formats, calls):
            if memory == torch.channels_last and call not in ("", "residual", "mask"):
                continue

            def do(options=options, mode=mode, dtype=dtype, memory=memory, call=call) -> Any:  # type: ignore[no-untyped-def]
                layer = in_mode(made(bn.BatchNorm2d, 4, dtype, options), mode)
                if layer.domains:
                    layer.domain = 1
                x = images(dtype, memory)
                return run(layer, x, arguments(call, x))

            label = f"layer {'+'.join(names)} {mode} {dtype} {memory} {call}"
            yield label, do
            yield label + " python", lambda do=do: through_python(do)


def of_unusual_batches() -> Iterator[Case]:
    for name, mode in itertools.product(LAYERS, MODES):
        for what, shape in {"empty": (0, 4), "one": (1, 4), "two": (2, 4), "wrong": (3, 5), "flat": (4,)}.items():

            def do(name=name, mode=mode, shape=shape) -> Any:  # type: ignore[no-untyped-def]
                layer = in_mode(made(bn.BatchNorm1d, 4, torch.float32, LAYERS[name]), mode)
                return run(layer, normal(*shape), {})

            yield f"unusual {name} {mode} {what}", do

        def infinite(name=name, mode=mode) -> Any:  # type: ignore[no-untyped-def]
            layer = in_mode(made(bn.BatchNorm1d, 4, torch.float32, LAYERS[name]), mode)
            x = normal(6, 4)
            x[2, 1] = math.inf
            with torch.no_grad():
                return [layer(x), layer(normal(6, 4)), standing(layer)]

        yield f"unusual {name} {mode} infinite", infinite


def of_sequences() -> Iterator[Case]:
    for name, mode, dtype in itertools.product(SEQUENCES, MODES, DTYPES):
        options = SEQUENCES[name]
        first = options.get("batch_first", True)
        for call in ("", "residual", "mask", "lengths", "weights", "packed", "jagged", "one"):

            def do(options=options, mode=mode, dtype=dtype, call=call, first=first) -> Any:  # type: ignore[no-untyped-def]
                layer = in_mode(made(bn.BatchNorm1d, 4, dtype, options), mode)
                x = normal(5, 7, 4, seed=2, dtype=dtype)
                lengths = torch.tensor([7, 6, 4, 4, 1])
                if call == "packed":
                    return run(layer, pack_padded_sequence(x, lengths, batch_first=True), {})
                if call == "jagged":
                    flat = torch.cat([s[:n] for s, n in zip(x, lengths.tolist(), strict=True)])
                    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
                    with torch.no_grad():
                        y = layer(torch.nested.nested_tensor_from_jagged(flat, offsets))
                    return [y.values(), standing(layer)]
                if call == "one":
                    x = x[:1]
                given = arguments(call, x.transpose(1, 2))
                if call == "residual":
                    given = {"residual": normal(*x.shape, seed=9, dtype=dtype)}
                if not first:
                    x = x.transpose(0, 1)
                    given = {k: v if k == "lengths" else v.transpose(0, 1) for k, v in given.items()}
                return run(layer, x, given)

            yield f"sequence {name} {mode} {dtype} {call}", do


def of_functions() -> Iterator[Case]:
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "relu": {"activation": "relu"},
        "ghosts": {"ghost_size": 2},
        "groups": {"channel_groups": 2},
        "ghost_groups": {"ghost_size": 4, "channel_groups": 2},
        "world": {"process_group": "world"},
    }
    for name, training, dtype, call in itertools.product(options, (True, False), DTYPES, CALLS):

        def do(name=name, training=training, dtype=dtype, call=call) -> Any:  # type: ignore[no-untyped-def]
            x = images(dtype, torch.contiguous_format)
            wide = torch.float32 if dtype == torch.bfloat16 else dtype
            mean, var = torch.zeros(4, dtype=wide), torch.ones(4, dtype=wide)
            weight, bias = (normal(4, seed=s, dtype=wide).requires_grad_() for s in (5, 6))
            leaf = x.requires_grad_()
            given = arguments(call, x.detach())
            y = bn.functional.batch_norm(leaf, mean, var, weight, bias, training, 0.3, 1e-3, **given, **options[name])
            dy = normal(*y.shape, seed=7, dtype=dtype)
            return [y.detach(), *torch.autograd.grad(y, [leaf, weight, bias], dy), mean, var]

        yield f"function {name} {training} {dtype} {call}", do
    for pool, training, call, samples in itertools.product(
        ("sequence", "frame"), (True, False), ("", "mask", "lengths", "weights", "residual"), (1, 5)
    ):

        def sequences(pool=pool, training=training, call=call, samples=samples) -> Any:  # type: ignore[no-untyped-def]
            x = normal(samples, 7, 4)
            rows = (5, 4) if pool == "frame" else (4,)
            mean, var = torch.zeros(rows), torch.ones(rows)
            given = arguments(call, x.transpose(1, 2)) if call != "residual" else {"residual": normal(*x.shape, seed=9)}
            y = bn.functional.batch_norm(x, mean, var, None, None, training, pool=pool, **given)
            return [y, mean, var]

        yield f"function {pool} {training} {call} samples={samples}", sequences
    wrong: dict[str, dict[str, Any]] = {
        "eps": {"eps": 0.0},
        "momentum": {"momentum": math.inf},
        "activation": {"activation": "nonsense"},
        "ghosts": {"ghost_size": -1},
        "groups": {"channel_groups": 3},
        "pool": {"pool": "nonsense"},
        "both": {"pool": "frame", "ghost_size": 2},
        "group": {"process_group": "nonsense"},
        "two": {"mask": torch.ones(6, dtype=torch.bool), "lengths": torch.ones(6, dtype=torch.long)},
    }
    for name, given in wrong.items():
        for rows in (None, 4, 5):
            buffers = (None, None) if rows is None else (torch.zeros(rows), torch.ones(rows))
            yield (
                f"function wrong {name} {rows}",
                lambda given=given, buffers=buffers: bn.functional.batch_norm(
                    normal(6, 4), *buffers, **{"training": True, **given}
                ),
            )


def of_transforms() -> Iterator[Case]:
    for name, mode in itertools.product(LAYERS, ("train", "eval", "never")):
        options = dict(LAYERS[name])

        def layer(options=options, mode=mode) -> Any:  # type: ignore[no-untyped-def]
            return in_mode(made(bn.BatchNorm2d, 4, torch.float32, options), mode)

        def tangent(layer=layer) -> Any:  # type: ignore[no-untyped-def]
            module = layer()
            x = images(torch.float32, torch.contiguous_format)
            return [*torch.func.jvp(module, (x,), (normal(*x.shape, seed=8),)), standing(module)]

        def mapped(layer=layer) -> Any:  # type: ignore[no-untyped-def]
            module = layer()
            x = torch.stack([images(torch.float32, torch.contiguous_format) + k for k in range(3)])
            state = {k: v.detach() for k, v in module.named_parameters()}
            buffers = {k: torch.stack([v] * 3) for k, v in module.named_buffers()}
            in_dims = (dict.fromkeys(state), dict.fromkeys(buffers, 0), 0)
            y = vmap(lambda p, b, v: functional_call(module, (p, b), (v,)), in_dims)(state, buffers, x)
            return [y, buffers]

        def exported(layer=layer) -> Any:  # type: ignore[no-untyped-def]
            x = images(torch.float32, torch.contiguous_format)
            program = torch.export.export(layer(), (x,))
            return [program.graph_module.code, program.module()(x)]

        def traced(layer=layer) -> Any:  # type: ignore[no-untyped-def]
            return torch.fx.symbolic_trace(layer()).code

        def second(layer=layer) -> Any:  # type: ignore[no-untyped-def]
            module, x = layer(), images(torch.float64, torch.contiguous_format).requires_grad_()
            module.double()
            (g,) = torch.autograd.grad(module(x), x, normal(*x.shape, dtype=x.dtype), create_graph=True)
            return list(torch.autograd.grad(g.square().sum(), [x, *module.parameters()], allow_unused=True))

        for way in (tangent, mapped, exported, traced, second):
            yield f"{way.__name__} {name} {mode}", way
    for name in ("plain", "relu", "ghosts", "skip_channel", "groups"):

        def compiled(name=name) -> Any:  # type: ignore[no-untyped-def]
            torch._dynamo.reset()
            module = in_mode(made(bn.BatchNorm2d, 4, torch.float32, LAYERS[name]), "train")
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            return run(compiled, images(torch.float32, torch.contiguous_format), {})

        yield f"compiled {name}", compiled


def of_networks() -> Iterator[Case]:
    """Verbs, steps and recurrences."""

    def network(**options: Any) -> nn.Module:
        torch.manual_seed(0)
        layer = made(bn.BatchNorm1d, 5, torch.float32, options)
        return nn.Sequential(nn.Linear(4, 5), layer, nn.ReLU(), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))

    batches = [normal(n, 4, seed=n) for n in (8, 5, 3)]
    for name in ("plain", "relu", "debiased", "biased", "skip", "renorm", "example", "ghosts", "groups", "domains"):
        for method in ("pooled", "ioffe", "sequential"):
            yield (
                f"calibrate {name} {method}",
                lambda name=name, method=method: standing(
                    bn.calibrate(network(**LAYERS[name]), batches, method=method)
                ),
            )
        for verb in (bn.accumulate, None):

            def accumulating(name=name, verb=verb) -> Any:  # type: ignore[no-untyped-def]
                net = network(**LAYERS[name]).train()
                if verb is None:
                    loss = bn.accumulate_exact(net, batches, lambda net, b: net(b).square().sum())
                    return [loss, *(p.grad for p in net.parameters()), standing(net)]
                with verb(net):
                    for batch in batches:
                        net(batch).square().sum().backward()
                return [*(p.grad for p in net.parameters()), standing(net)]

            yield f"accumulate {name} {verb is None}", accumulating

        def adapted(name=name) -> Any:  # type: ignore[no-untyped-def]
            net = network(**LAYERS[name])
            first = standing(bn.adapt(net, batches, prior=4))
            return [first, standing(bn.adapt(net, batches, method="tent")), standing(bn.restore(net))]

        def frozen(name=name) -> Any:  # type: ignore[no-untyped-def]
            net = network(**LAYERS[name])
            first = standing(bn.freeze(net))
            y = net(batches[0])
            loaded = network(**LAYERS[name])
            loaded.load_state_dict(net.state_dict())
            return [first, y, standing(loaded), standing(bn.unfreeze(net))]

        def converted(name=name) -> Any:  # type: ignore[no-untyped-def]
            net = bn.convert(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), **given(name))
            first = standing(net)
            y = net(normal(6, 4))
            return [first["repr"], first["metadata"], y.shape, standing(bn.revert(net))["repr"]]

        def diagnosed(name=name) -> Any:  # type: ignore[no-untyped-def]
            net = network(**LAYERS[name]).eval()
            return [str(bn.diagnose(net, [(b, b[:, 0].long() % 2) for b in batches])), standing(net)]

        def moments(name=name) -> Any:  # type: ignore[no-untyped-def]
            found = made(bn.BatchNorm1d, 4, torch.float32, LAYERS[name]).input_moments(normal(6, 4))
            return [found.count, found.mean, found.m2]

        def folded(name=name) -> Any:  # type: ignore[no-untyped-def]
            net = network(**LAYERS[name]).eval()
            result = bn.fold(net, batches[0])
            return [repr(result.model), result.model(batches[0]), str(result.certificate)]

        def explained(name=name) -> Any:  # type: ignore[no-untyped-def]
            from batchnorm.lab.explanation import explain

            return repr(explain(network(**LAYERS[name]), (batches[0], torch.zeros(8, dtype=torch.long)), layer="1"))

        for verb in (adapted, frozen, converted, diagnosed, moments, folded, explained):
            yield f"{verb.__name__} {name}", verb
    for kind, option, dtype in itertools.product(
        (bn.LSTM, bn.GRU, bn.RNN),
        ({"batch_norm": "sequence"}, {"batch_norm": "frame"}, {"batch_norm": "frame", "recurrent": True}),
        (torch.float32, torch.bfloat16),
    ):
        for mode, call in itertools.product(("train", "eval"), ("", "lengths", "packed")):

            def recurrent(kind=kind, option=option, dtype=dtype, mode=mode, call=call) -> Any:  # type: ignore[no-untyped-def]
                torch.manual_seed(0)
                net = kind(3, 4, bidirectional=True, max_steps=5, **option).to(dtype).train(mode == "train")
                x, lengths = normal(7, 4, 3, dtype=dtype), torch.tensor([7, 5, 5, 2])
                found: list[Any] = []
                for _ in range(2):
                    given = pack_padded_sequence(x, lengths) if call == "packed" else x
                    y = net(given, lengths=lengths) if call == "lengths" else net(given)
                    (out, *_) = values(y)
                    found += [t.detach() for t in values(y)]
                    found += torch.autograd.grad(out.float().square().sum(), list(net.parameters()), allow_unused=True)
                return [found, standing(net)]

            yield f"recurrent {kind.__name__} {option} {dtype} {mode} {call}", recurrent
    for mode, sizes, options in itertools.product(
        MODES, ([4, 3, 1], [4, 4, 4], [1], []), ({}, {"running": "ema"}, {"nonfinite": "skip", "domains": 2})
    ):

        def steps(mode=mode, sizes=sizes, options=options) -> Any:  # type: ignore[no-untyped-def]
            layer = in_mode(bn.StepBatchNorm(3, 4, **options), mode)
            x = normal(sum(sizes), 3)
            found = [layer(x, sizes), layer(x + 1, sizes, 2)]
            m = layer.input_moments(x, sizes, 1)
            return [found, m.count, m.mean, m.m2, standing(layer)]

        yield f"steps {mode} {sizes} {options}", steps


def given(name: str) -> dict[str, Any]:
    options = dict(LAYERS[name])
    if "renorm" in options:
        options["renorm"] = bn.Renorm(*options["renorm"])
    return options


def of_options() -> Iterator[Case]:
    wrong = ("activation", "source", "update", "running", "running_var", "nonfinite", "pool", "batch_first")
    wrong += ("ghost_update", "ghost_size", "max_steps", "channel_groups", "domains", "process_group", "renorm")
    for name, value in itertools.product((*wrong, "example_weight"), ("nonsense", -1, 2.5, True, None)):
        for kind in (bn.BatchNorm1d, bn.BatchNorm2d):
            yield f"option {kind.__name__} {name} {value!r}", lambda k=kind, n=name, v=value: repr(k(4, **{n: v}))

        def later(name=name, value=value) -> Any:  # type: ignore[no-untyped-def]
            layer = bn.BatchNorm1d(4)
            setattr(layer, name, value)
            return repr(layer)

        if name != "running_var":
            yield f"option set {name} {value!r}", later
        yield f"option steps {name} {value!r}", lambda n=name, v=value: repr(bn.StepBatchNorm(4, 3, **{n: v}))
        yield (
            f"option convert {name} {value!r}",
            lambda n=name, v=value: repr(bn.convert(nn.Sequential(nn.BatchNorm1d(4)), **{n: v})),
        )
    every = {**{n: LAYERS[n] for n in LAYERS}, **SEQUENCES}
    for (a, one), (b, two) in itertools.combinations(every.items(), 2):
        both = {**one, **two}
        if "renorm" in both:
            both["renorm"] = bn.Renorm(*both["renorm"])
        yield f"option together {a} {b}", lambda both=both: repr(bn.BatchNorm1d(4, **both))


def cases() -> Iterator[Case]:
    for part in (of_layers, of_unusual_batches, of_sequences, of_functions, of_transforms, of_networks, of_options):
        yield from part()


def settled(item: Any) -> Any:
    """The same as plain data, which nothing changes later."""
    if isinstance(item, Tensor):
        return item.detach().clone()
    if isinstance(item, dict):
        return {k: settled(v) for k, v in item.items()}
    if isinstance(item, (list, tuple)):
        return [settled(v) for v in item]
    return item if item is None or isinstance(item, (bool, int, float)) else str(item)


def outcome(do: Callable[[], Any]) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = do()
        except Exception as error:  # its text is part of the recording
            found = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    texts = [str(w.message).splitlines()[0] for w in caught if "batchnorm" in str(w.filename)]
    return [settled(found), [text for text in texts if not any(part in text for part in WARNINGS)]]


def pickles() -> dict[str, bytes]:
    return {
        name: pickle.dumps(in_mode(made(bn.BatchNorm2d, 4, torch.float32, options), mode))
        for (name, options), mode in itertools.product(LAYERS.items(), ("train", "always"))
    }


def unpickled(data: bytes) -> Any:
    layer = pickle.load(io.BytesIO(data))
    return run(layer, images(torch.float32, torch.contiguous_format), {})


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or (a != a and b != b)


def bits(t: Tensor) -> Tensor:
    """NaN is one value, and 0 is not -0."""
    t = t.detach().contiguous()
    if not t.is_floating_point():
        return t
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return torch.where(t.isnan(), -1, t.view(integers))


def shortened(item: Any) -> str:
    text = repr(item)
    return text if len(text) < 400 else text[:200] + " ... " + text[-150:]


def first_difference(a: Any, b: Any, path: str = "") -> str:
    if type(a) is type(b) and isinstance(a, (list, tuple)) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return next((first_difference(x, y, f"{path}[{i}]") for i, (x, y) in pairs if not is_carried(x, y)), path)
    if isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
        return next((first_difference(a[k], b[k], f"{path}[{k!r}]") for k in a if not is_carried(a[k], b[k], k)), path)
    return f"{path}\n    before {shortened(a)}\n    after  {shortened(b)}"


def compare(path: str, part: str = "") -> int:
    before = torch.load(path, weights_only=False)
    wrong = meant = count = 0
    found = ((name, outcome(do)) for name, do in cases() if part in name)
    old = ((f"pickle {k} {i}", outcome(lambda d=d: unpickled(d))) for i, (k, d) in enumerate(before["pickles"].items()))
    for name, after in itertools.chain(found, old if part in "pickle" else ()):
        count += 1
        if name not in before["cases"]:
            print("NEW", name)
        elif not same(before["cases"][name], after):
            after = without_verdict(after)
            if same(before["cases"][name], after):
                meant += 1
                continue
            meant_so = any(re.search(key, name) for key in CHANGED) or is_mended(before["cases"][name], after)
            if meant_so or is_carried(before["cases"][name], after):
                meant += 1
                continue
            wrong += 1
            print("DIFFERS", name, first_difference(before["cases"][name], after))
    print(f"{count} cases, {wrong} differ, {meant} differ as CHANGED says")
    return int(wrong > 0)


def is_carried(a: Any, b: Any, key: Any = "") -> bool:
    """Whether running statistics, and what evaluation makes of them, differ by their rounding, which is now carried."""
    if key == "metadata":
        return re.sub(r", 'batchnorm_carry': tensor\(.*?\)(?=[,}])", "", b, flags=re.DOTALL) == a
    if isinstance(a, Tensor) and isinstance(b, Tensor) and not same(a, b):
        close = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-6, torch.float64: 1e-14}.get(a.dtype, 0.0)
        return (
            a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=close, atol=close, equal_nan=True)
        )
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(is_carried(a[k], b[k], k) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(is_carried, a, b))
    return same(a, b)


def without_verdict(found: Any) -> Any:
    """A printed certificate without its first line, the verdict, which it did not have before."""
    if isinstance(found, str):
        return re.sub(r"\AProven: [^\n]*\n", "", found)
    if isinstance(found, (list, tuple)):
        return type(found)(map(without_verdict, found))
    return found


def is_mended(before: Any, after: Any) -> bool:
    """Whether torch raised an error of its own before, and the call works now."""
    return str(before[0]).startswith("RuntimeError") and not isinstance(after[0], str)


def record(path: str) -> int:
    found = {name: outcome(do) for name, do in cases()}
    saved = pickles()
    found |= {f"pickle {k} {i}": outcome(lambda d=d: unpickled(d)) for i, (k, d) in enumerate(saved.items())}
    torch.save({"cases": found, "pickles": saved}, path)
    errors = sum(isinstance(v[0], str) and "Error" in v[0].split(":")[0] for v in found.values())
    print(f"{len(found)} cases, {errors} of them errors")
    return 0


def timings() -> int:
    torch.set_num_threads(1)
    for shape in ((64, 32), (256, 256)):
        for way in ("C++", "Python"):
            kept = cpu.call
            cpu.call = kept if way == "C++" else None
            layer, x = bn.BatchNorm1d(shape[1], activation="relu"), normal(*shape).requires_grad_()
            dy, best = normal(*shape, seed=3), math.inf
            for _ in range(40):
                start = time.perf_counter()
                for _ in range(200):
                    layer(x).backward(dy)
                best = min(best, (time.perf_counter() - start) / 200)
            cpu.call = kept
            print(f"{shape} {way}: {best * 1e6:.1f} us")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    actions: dict[str, Any] = {"record": record, "compare": compare, "time": timings}
    sys.exit(actions[sys.argv[1]](*sys.argv[2:]))
