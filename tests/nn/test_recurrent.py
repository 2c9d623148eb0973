"""Recurrent layers: torch.nn's semantics, the reference's numbers, statistics by time step, streaming."""

from __future__ import annotations

import copy
import itertools
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import batchnorm as bn
from batchnorm import reference
from batchnorm.errors import InputError
from batchnorm.nn.recurrent import reversed_frames
from batchnorm.nn.step_batch_norm import StepBatchNorm
from batchnorm.ops import recurrent as ops

LAYERS = {"RNN": (bn.RNN, nn.RNN), "LSTM": (bn.LSTM, nn.LSTM), "GRU": (bn.GRU, nn.GRU)}
FORMS = [("frame", False), ("sequence", False), ("frame", True), ("sequence", True)]
STEPS, SAMPLES, INPUT, HIDDEN = 6, 4, 3, 5
LENGTHS = [4, 6, 2, 4]


def identity_statistics(layer):
    """Normalizations that change nothing in evaluation mode: mean 0, variance 1 - eps."""
    for norm in layer.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_var.fill_(1 - norm.eps)
    return layer.eval()


def close(ours, theirs, **tolerance):
    torch.testing.assert_close(ours, theirs, **{"rtol": 1e-9, "atol": 1e-10, **tolerance})


def states_like(layer, samples=SAMPLES):
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(count, samples, layer.proj_size or HIDDEN, dtype=torch.float64)
    return (h, torch.randn(count, samples, HIDDEN, dtype=torch.float64)) if layer.mode == "LSTM" else h


def of_samples(states, index):
    """States (layers, N, H), or pairs of them, of some samples."""
    return tuple(s[:, index] for s in states) if isinstance(states, tuple) else states[:, index]


OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "batch_first": True, "bias": False},
    {"bidirectional": True, "batch_first": True, "proj_size": 2, "num_layers": 2},
    {"nonlinearity": "relu"},
]


@pytest.mark.parametrize("kind", LAYERS)
def test_torchs_state_loads_and_identity_statistics_give_torchs_outputs(kind):
    ours, theirs = LAYERS[kind]
    for options, (pool, recurrent) in itertools.product(OPTIONS, FORMS):
        if ("proj_size" in options and kind != "LSTM") or ("nonlinearity" in options and kind != "RNN"):
            continue
        peer = theirs(INPUT, HIDDEN, **options).double()
        layer = ours(INPUT, HIDDEN, **options, batch_norm=pool, recurrent=recurrent, gamma=1.0).double()
        layer.load_state_dict(peer.state_dict())
        identity_statistics(layer)
        first = peer.batch_first
        shape = (SAMPLES, STEPS, INPUT) if first else (STEPS, SAMPLES, INPUT)
        x, states = torch.randn(shape, dtype=torch.float64), states_like(peer)
        for given in (None, states):
            close(layer(x, given), peer(x, given))
        one, of_one = x[0] if first else x[:, 0], of_samples(states, 0)
        close(layer(one, of_one), peer(one, of_one))
        packed = pack_padded_sequence(x, torch.tensor(LENGTHS), first, enforce_sorted=False)
        (ours_out, ours_last), (peer_out, peer_last) = layer(packed, states), peer(packed, states)
        close(ours_out.data, peer_out.data)
        close(ours_last, peer_last)
        assert torch.equal(ours_out.unsorted_indices, packed.unsorted_indices)
        mask = torch.arange(STEPS) < torch.tensor(LENGTHS)[:, None]
        for ending in ({"lengths": LENGTHS}, {"lengths": torch.tensor(LENGTHS)}, {"mask": mask}):
            padded, last = layer(x, states, **ending)
            close(padded, pad_packed_sequence(peer_out, first, total_length=STEPS)[0])
            close(last, peer_last)


def test_without_normalization_it_is_torchs_layer():
    for ours, theirs in LAYERS.values():
        peer, layer = theirs(INPUT, HIDDEN, num_layers=2), ours(INPUT, HIDDEN, num_layers=2)
        assert isinstance(layer, theirs)
        assert list(layer.state_dict()) == list(peer.state_dict())
        layer.load_state_dict(peer.state_dict())
        x = torch.randn(STEPS, SAMPLES, INPUT)
        close(layer(x), peer(x), rtol=0, atol=0)
        packed = pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False)
        close(layer(x, lengths=LENGTHS)[1], peer(packed)[1], rtol=0, atol=0)


def test_keys_are_torchs_and_those_of_the_normalizations():
    layer = bn.LSTM(INPUT, HIDDEN, bidirectional=True, batch_norm="sequence", recurrent=True, max_steps=7)
    weights = [f"{name}_l0{end}" for end in ("", "_reverse") for name in ("weight_ih", "weight_hh")]
    assert [key for key in layer.state_dict() if "norm" not in key] == weights
    norms = {name: type(module).__name__ for name, module in layer.named_children()}
    assert norms == {
        f"norm_{of}_l0{end}": "BatchNorm1d" if of == "ih" else "StepBatchNorm"
        for end in ("", "_reverse")
        for of in ("ih", "hh", "c")
    }
    assert layer.norm_hh_l0.bias is None
    assert layer.norm_hh_l0.running_mean.shape == (7, 4 * HIDDEN)
    assert layer.norm_c_l0.weight[0].item() == pytest.approx(0.1)
    assert bn.LSTM(INPUT, HIDDEN, batch_norm="frame").norm_ih_l0.weight[0].item() == 1
    again = bn.LSTM(INPUT, HIDDEN, bidirectional=True, batch_norm="sequence", recurrent=True, max_steps=7)
    again.load_state_dict(layer.state_dict())
    assert "batch_norm='sequence', recurrent=True, max_steps=7" in repr(again)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        bn.LSTM(INPUT, HIDDEN, batch_norm="frame").load_state_dict({**nn.LSTM(INPUT, HIDDEN).state_dict(), "a": 1})


def normalization(norm):
    return reference.StepNormalization(
        norm.weight.detach().numpy(), 0.0 if norm.bias is None else norm.bias.detach().numpy()
    )


def by_reference(layer, x, lengths, states, suffix=""):
    """One layer in one direction by the specification; x (T, N, C)."""
    parts = {name: getattr(layer, f"{name}_l0{suffix}", None) for name in ("norm_hh", "norm_c", "bias_hn", "weight_hr")}
    h0, c0 = states if layer.mode == "LSTM" else (states, None)
    i = 1 if suffix else 0
    if suffix:
        x = np.stack([np.concatenate([x[:n, k][::-1], x[n:, k]]) for k, n in enumerate(lengths)], 1)
    out = reference.recurrent(
        layer.mode,
        x,
        lengths,
        getattr(layer, f"weight_ih_l0{suffix}").detach().numpy(),
        getattr(layer, f"weight_hh_l0{suffix}").detach().numpy(),
        normalization(getattr(layer, f"norm_ih_l0{suffix}")),
        pool=layer.options.batch_norm,
        of_hh=None if parts["norm_hh"] is None else normalization(parts["norm_hh"]),
        of_c=None if parts["norm_c"] is None else normalization(parts["norm_c"]),
        bias_hn=0.0 if parts["bias_hn"] is None else parts["bias_hn"].detach().numpy(),
        weight_hr=None if parts["weight_hr"] is None else parts["weight_hr"].detach().numpy(),
        h0=h0[i].numpy(),
        c0=None if c0 is None else c0[i].numpy(),
    )
    if suffix:
        out = np.stack([np.concatenate([out[:n, k][::-1], out[n:, k]]) for k, n in enumerate(lengths)], 1)
    return out


def randomize(layer, about=1.0):
    """gamma and beta that are not all one and zero."""
    for name, parameter in layer.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5 * about, 1.5 * about)
    return layer


@pytest.mark.parametrize(("pool", "recurrent"), FORMS)
def test_training_is_the_references(pool, recurrent):
    for (kind, (ours, _)), lengths in itertools.product(LAYERS.items(), ([STEPS] * SAMPLES, LENGTHS)):
        for options in ({}, {"proj_size": 2}) if kind == "LSTM" else ({},):
            layer = ours(INPUT, HIDDEN, bidirectional=True, batch_norm=pool, recurrent=recurrent, **options).double()
            randomize(layer)
            x, states = torch.randn(STEPS, SAMPLES, INPUT, dtype=torch.float64), states_like(layer)
            output, _ = layer(x, states, lengths=lengths)
            expected = [by_reference(layer, x.numpy(), lengths, states, end) for end in ("", "_reverse")]
            close(output, torch.from_numpy(np.concatenate(expected, 2)))
            for i, kept in enumerate(layer.norm_ih_l0.running_mean.reshape(-1, 1)):  # every one of them is measured
                assert bool(torch.isfinite(kept).all()), i
    layer = bn.LSTM(INPUT, HIDDEN, batch_norm=pool, recurrent=recurrent)
    x = torch.randn(STEPS, SAMPLES, INPUT)
    out, _ = layer(x)
    poisoned = torch.cat([x, torch.full((2, SAMPLES, INPUT), torch.nan)])
    close(layer(poisoned, lengths=[STEPS] * SAMPLES)[0][:STEPS], out, rtol=0, atol=0)


@pytest.mark.parametrize(("pool", "recurrent"), FORMS)
def test_gradients(pool, recurrent):
    """Against finite differences, to every input and parameter, also of the second order."""
    for kind, (ours, _) in LAYERS.items():
        layer = randomize(ours(2, 3, batch_norm=pool, recurrent=recurrent).double())
        names, values = zip(*layer.named_parameters(), strict=True)
        x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
        states = [torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        states = states if kind == "LSTM" else states[:1]

        def run(x, *rest, layer=layer, names=names, kind=kind):
            states, parameters = rest[: -len(names)], dict(zip(names, rest[-len(names) :], strict=True))
            call = ((x, states if kind == "LSTM" else states[0]), {"lengths": [3, 2, 3, 2]})
            output, last = torch.func.functional_call(layer, parameters, *call)
            return output, *(last if kind == "LSTM" else (last,))

        inputs = (x, *states, *(v.detach().requires_grad_() for v in values))
        assert torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-6, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, inputs, eps=1e-6, atol=1e-5, fast_mode=True)


def by_kernels(layer, x, dy, dtype, threads=1):
    """Output and all gradients of a layer, in the dtype."""
    layer, x = copy.deepcopy(layer).to(dtype), x.detach().to(dtype).requires_grad_()
    torch.set_num_threads(threads)
    output, states = layer(x, lengths=[9, 20, 17, 20, 4, 20, 12, 20, 20] * 2)
    c = states[1].square().sum() if isinstance(states, tuple) else 0  # the last cells' gradients too
    ((output * dy.to(dtype)).sum() + c).backward()
    torch.set_num_threads(1)
    return {"y": output.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def test_the_core_is_as_exact_as_aten(monkeypatch):
    """Float32 against float64: the core's error is at most twice ATen's, root mean square; the same bits by threads."""
    for (pool, recurrent), (ours, _) in itertools.product(FORMS, LAYERS.values()):
        # With gamma near 1 a recurrence of normalizations is chaotic, and errors say nothing.
        layer = randomize(ours(9, 33, num_layers=2, bidirectional=True, batch_norm=pool, recurrent=recurrent), 0.3)
        x, dy = torch.randn(20, 18, 9), torch.randn(20, 18, 66)
        core = by_kernels(layer, x, dy, torch.float32)
        again = by_kernels(layer, x, dy, torch.float32, threads=2)
        with monkeypatch.context() as patch:
            patch.setattr(ops, "_is_native", lambda x: False)
            peer, exact = (by_kernels(layer, x, dy, dtype) for dtype in (torch.float32, torch.float64))
        for name, value in exact.items():
            error, bound = ((found[name] - value).norm() / value.norm() for found in (core, peer))
            assert error <= 2 * bound + 2e-7, (pool, recurrent, ours.__name__, name, error, bound)
            assert torch.equal(core[name], again[name]) or name.startswith("weight"), name


def test_nothing_of_a_graph_outlives_it():
    for ours, _ in LAYERS.values():
        output = ours(INPUT, HIDDEN, batch_norm="frame", recurrent=True)(torch.randn(STEPS, SAMPLES, INPUT))[0]
        node = output.grad_fn
        while "Recurrence" not in node.name():
            node = node.next_functions[0][0]
        alive = weakref.ref(node)
        del output, node
        assert alive() is None


def test_statistics_by_step():
    """Running statistics of step t are those of the frames at step t; late and unknown steps take the last one's."""
    layer = bn.RNN(INPUT, HIDDEN, batch_norm="frame", recurrent=True, max_steps=4, momentum=1.0).double()
    x = torch.randn(STEPS, SAMPLES, INPUT, dtype=torch.float64)
    lengths = [3, 6, 1, 3]
    out, _ = layer(x, lengths=lengths)
    valid = torch.arange(STEPS)[:, None] < torch.tensor(lengths)
    of_input = x @ layer.weight_ih_l0.t()
    for t, reached in enumerate([True, True, True, False]):  # one sequence is left at step 3
        frames = of_input[t][valid[t]]
        mean, var = (frames.mean(0), frames.var(0)) if reached else (torch.zeros(HIDDEN), torch.ones(HIDDEN))
        close(layer.norm_ih_l0.running_mean[t], mean.double().detach())
        close(layer.norm_ih_l0.running_var[t], var.double().detach())
    assert layer.norm_ih_l0.num_batches_tracked.tolist() == [1, 1, 1, 0]
    before = torch.cat([torch.zeros(1, SAMPLES, HIDDEN), out[:-1]]) @ layer.weight_hh_l0.t()
    close(layer.norm_hh_l0.running_mean[2], before[2][valid[2]].mean(0).detach())
    mean, var = layer.norm_ih_l0._population().read(9)
    assert torch.equal(mean[:3], layer.norm_ih_l0.running_mean[:3])
    assert all(torch.equal(row, mean[2]) for row in mean[3:])
    assert all(torch.equal(row, var[2]) for row in var[3:])
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    layer(x)
    close(layer.state_dict(), before, rtol=0, atol=0)


def test_running_statistics_take_torchs_convention():
    x = [torch.randn(5, 2, dtype=torch.float64) for _ in range(3)]
    for running, momentum in (("ema", 0.1), ("debiased", 0.3), ("cumulative", None)):
        steps = StepBatchNorm(2, 3, momentum=momentum, running=running, dtype=torch.float64)
        peer = bn.BatchNorm1d(2, momentum=momentum, running=running, dtype=torch.float64)
        for batch in x:
            steps(batch, step=1)
            peer(batch)
        close(steps.running_mean[1], peer.running_mean)
        close(steps.running_var[1], peer.running_var)
        assert torch.equal(steps.running_mean[::2], torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize(("pool", "recurrent"), FORMS)
def test_streaming_gives_the_same(pool, recurrent):
    """Step by step through cells, and in two parts, as the whole sequence at once; in evaluation mode."""
    for kind, (ours, _) in LAYERS.items():
        layer = ours(INPUT, HIDDEN, num_layers=2, batch_norm=pool, recurrent=recurrent, max_steps=4).double()
        x = torch.randn(STEPS, SAMPLES, INPUT, dtype=torch.float64)
        layer(x)
        layer.eval()
        whole, last = layer(x)
        first, states = layer(x[:2])
        second, states = layer(x[2:], states, step=2)
        close(torch.cat([first, second]), whole)
        close(states, last)
        cells = [layer.cell(k) for k in range(2)]
        assert cells[1].weight_hh is layer.weight_hh_l1
        assert not cells[0].training
        states = [None, None]
        for t in range(STEPS):
            h = x[t]
            for k, cell in enumerate(cells):
                states[k] = cell(h, states[k], step=t)
                h = states[k][0] if kind == "LSTM" else states[k]
            close(h, whole[t])
        if pool == "frame" or recurrent:
            with pytest.raises(InputError, match="step="):
                cells[0](x[0], states[0])


def test_cells_train_as_layers_of_one_step():
    for kind, (ours, _) in LAYERS.items():
        layer = ours(INPUT, HIDDEN, batch_norm="frame", recurrent=True).double()
        cell, peer = layer.cell(), copy.deepcopy(layer)
        x = torch.randn(2, SAMPLES, INPUT, dtype=torch.float64)
        states = None
        for t in range(2):
            states = cell(x[t], states, step=t)
        output, _ = peer(x)
        close(states[0] if kind == "LSTM" else states, output[1])
        close(layer.state_dict(), peer.state_dict())
        torch_cell = getattr(nn, f"{kind}Cell")(INPUT, HIDDEN).double()
        own = getattr(bn, f"{kind}Cell")(INPUT, HIDDEN, batch_norm="sequence", gamma=1.0).double()
        own.load_state_dict(torch_cell.state_dict())
        identity_statistics(own)
        close(own(x[0, 0]), torch_cell(x[0, 0]))
        plain = getattr(bn, f"{kind}Cell")(INPUT, HIDDEN).double()
        plain.load_state_dict(torch_cell.state_dict())
        close(plain(x[0]), torch_cell(x[0]), rtol=0, atol=0)


def test_dropout_lies_between_layers():
    layer = bn.GRU(INPUT, HIDDEN, num_layers=2, dropout=1.0, batch_norm="sequence").double()
    x = torch.randn(STEPS, SAMPLES, INPUT, dtype=torch.float64)
    other = layer(x + torch.randn_like(x))[0]
    close(layer(x)[0], other, rtol=0, atol=0)  # nothing of the first layer comes through
    layer.eval()
    assert not torch.allclose(layer(x)[0], layer(2 * x)[0])


def test_16_bit_and_autocast():
    x = torch.randn(STEPS, SAMPLES, INPUT)
    for pool, recurrent in FORMS:
        layer = bn.LSTM(INPUT, HIDDEN, batch_norm=pool, recurrent=recurrent)
        exact, _ = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, (h, c) = layer(x)
        close(y.float(), exact, rtol=0.1, atol=0.1)
        narrow = layer.bfloat16()
        y, (h, c) = narrow(x.bfloat16())
        assert (y.dtype, h.dtype, c.dtype) == (torch.bfloat16,) * 3
        close(y.float(), exact, rtol=0.1, atol=0.1)


def test_reversed_frames_are_their_own_inverse():
    sizes = [4, 4, 3, 1]
    index = reversed_frames(sizes, torch.device("cpu"))
    assert torch.equal(index[index], torch.arange(12))
    frames = PackedSequence(torch.arange(12), torch.tensor(sizes))
    padded, lengths = pad_packed_sequence(PackedSequence(index, frames.batch_sizes), batch_first=True)
    forward, _ = pad_packed_sequence(frames, batch_first=True)
    for row, back, n in zip(forward, padded, lengths.tolist(), strict=True):
        assert torch.equal(back[:n], row[:n].flip(0))


def test_batches_without_sequences():
    """No sequence, as torch; in training too, which changes nothing."""
    for (kind, (ours, theirs)), (pool, recurrent) in itertools.product(LAYERS.items(), [(None, False), *FORMS]):
        layer = ours(INPUT, HIDDEN, num_layers=2, bidirectional=True, batch_norm=pool, recurrent=recurrent)
        before, x = copy.deepcopy(layer.state_dict()), torch.randn(STEPS, 0, INPUT, requires_grad=True)
        expected = theirs(INPUT, HIDDEN, num_layers=2, bidirectional=True)(x)
        for given in ({}, {"lengths": []}):
            y, states = layer(x, **given)
            close((y, states), expected)
            y.sum().backward()
        norms = {key: value for key, value in layer.state_dict().items() if not key.endswith("batches_tracked")}
        close(norms, {key: before[key] for key in norms}, rtol=0, atol=0)
        assert layer.eval()(x)[0].shape == (STEPS, 0, 2 * HIDDEN), kind


def test_nested_tensors_and_sequences_without_frames():
    """As the sequences that have frames give them by themselves."""
    for (kind, (ours, _)), first, (pool, recurrent) in itertools.product(
        LAYERS.items(), (True, False), [(None, False), *FORMS]
    ):
        options = {"num_layers": 2, "bidirectional": True, "batch_first": first}
        layer = ours(INPUT, HIDDEN, **options, batch_norm=pool, recurrent=recurrent).double()
        lengths, kept = [3, 0, 6, 4, 0], [0, 2, 3]
        parts = [torch.randn(n, INPUT, dtype=torch.float64) for n in lengths]
        x = nn.utils.rnn.pad_sequence(parts, first)
        x.requires_grad_()
        states = states_like(layer, 5)
        own = copy.deepcopy(layer)
        some = x[kept] if first else x[:, kept]
        expected, ended = own(some, of_samples(states, kept), lengths=[3, 6, 4])
        y, last = layer(x, states, lengths=lengths)
        close(y[kept] if first else y[:, kept], expected)
        close(of_samples(last, kept), ended, rtol=0, atol=0)
        close(of_samples(last, [1, 4]), of_samples(states, [1, 4]), rtol=0, atol=0)
        close(layer.state_dict(), own.state_dict(), rtol=0, atol=0)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        (own_gradient,) = torch.autograd.grad(expected.square().sum(), x)
        close(gradient, own_gradient)
        nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
        out, of_nested = layer.eval()(nested, states)
        y, last = layer(x, states, lengths=lengths)
        padded = y if first else y.transpose(0, 1)
        for row, whole, n in zip(out.unbind(), padded, lengths, strict=True):
            close(row, whole[:n], msg=kind)
        close(of_nested, last)


def test_micro_batches_are_merged_by_step():
    layer = bn.GRU(INPUT, HIDDEN, batch_norm="frame", max_steps=4, momentum=1.0).double()
    x = torch.randn(STEPS, 2 * SAMPLES, INPUT, dtype=torch.float64)
    with bn.accumulate(layer):
        layer(x[:, :SAMPLES])
        layer(x[:2, SAMPLES:])
    of_input = (x @ layer.weight_ih_l0.t()).detach()
    for t in range(4):
        rows = of_input[t] if t < 2 else of_input[t, :SAMPLES]
        close(layer.norm_ih_l0.running_mean[t], rows.mean(0))
        close(layer.norm_ih_l0.running_var[t], rows.var(0))
    assert layer.norm_ih_l0.num_batches_tracked.tolist() == [1] * 4


def test_states_that_count_steps_apart_load():
    layer, other = (StepBatchNorm(2, 3) for _ in range(2))
    layer(torch.randn(7, 2), sizes=[4, 3])
    state = layer.state_dict()
    state["num_steps_tracked"] = state["num_batches_tracked"][:, None]
    state["num_batches_tracked"] = torch.tensor(5)
    other.load_state_dict(state)
    close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)


class Tagger(nn.Module):
    """A network with a recurrent layer in the middle."""

    def __init__(self, kind, **options):
        super().__init__()
        self.recurrent = getattr(bn, kind)(INPUT, HIDDEN, bidirectional=True, **options)
        self.out = nn.Linear(2 * HIDDEN, 2)

    def forward(self, x, lengths=None):
        return self.out(self.recurrent(x.tanh(), lengths=lengths)[0])


@pytest.mark.parametrize(
    ("kind", "pool", "recurrent", "lengths"),
    [("LSTM", "frame", True, None), ("GRU", "sequence", False, None), ("RNN", "frame", False, LENGTHS)],
)
def test_compiled(kind, pool, recurrent, lengths):
    """In one graph where Dynamo is let into recurrent layers, which are a break of the graph otherwise."""
    net = Tagger(kind, batch_norm=pool, recurrent=recurrent).double()
    for whole in (False, True) if lengths is None else (False,):  # lengths are values: they break the graph
        ours, peer = copy.deepcopy(net), copy.deepcopy(net)
        torch._dynamo.reset()
        with torch._dynamo.config.patch(allow_rnn=whole):
            compiled = torch.compile(ours, backend="aot_eager", fullgraph=whole)
            x = torch.randn(STEPS, SAMPLES, INPUT, dtype=torch.float64, requires_grad=True)
            expected_x = x.detach().clone().requires_grad_()
            y, expected = compiled(x, lengths), peer(expected_x, lengths)
            close(y, expected)
            y.square().sum().backward()
            expected.square().sum().backward()
            close(x.grad, expected_x.grad)
            close([p.grad for p in ours.parameters()], [p.grad for p in peer.parameters()])
            close(ours.state_dict(), peer.state_dict())
            close(compiled.eval()(x, lengths), peer.eval()(x, lengths))


def test_a_compiled_layer_alone_runs_eagerly_unless_dynamo_is_let_in():
    """Dynamo begins with the layer's own frame here, of which it takes nothing, or all."""
    layer, x = bn.GRU(INPUT, HIDDEN, batch_norm="sequence").double().eval(), torch.randn(3, 2, INPUT).double()
    for let_in in (False, True):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        with torch._dynamo.config.patch(allow_rnn=let_in):
            close(torch.compile(layer, backend=counter, fullgraph=let_in)(x), layer(x))
        assert counter.frame_count == let_in


def test_cells_compile_in_one_graph():
    torch._dynamo.reset()
    cell = bn.LSTMCell(INPUT, HIDDEN, batch_norm="frame", recurrent=True).double()
    peer, x = copy.deepcopy(cell), torch.randn(SAMPLES, INPUT, dtype=torch.float64)
    compiled = torch.compile(cell, backend="aot_eager", fullgraph=True)
    states = peer_states = None
    for t in range(2):
        states, peer_states = compiled(x, states, step=t), peer(x, peer_states, step=t)
        close(states, peer_states)
        states = [state.detach() for state in states]
    close(cell.state_dict(), peer.state_dict())


def test_exported():
    """torch.export in evaluation mode: the recurrence step by step on ATen's operators."""
    x = torch.randn(STEPS, SAMPLES, INPUT, dtype=torch.float64)
    for kind, (pool, recurrent) in zip(LAYERS, FORMS[:3], strict=True):
        net = Tagger(kind, batch_norm=pool, recurrent=recurrent, max_steps=4).double()
        net(x)
        net.eval()
        program = torch.export.export(net, (x,))
        close(program.module()(x), net(x))
        assert "batchnorm." not in str(program.graph)


def test_errors_come_before_anything_changes():
    layer = bn.LSTM(INPUT, HIDDEN, batch_norm="frame", recurrent=True)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(STEPS, SAMPLES, INPUT)
    holes = torch.ones(SAMPLES, STEPS, dtype=torch.bool)
    holes[0, 2] = False
    for call, message in (
        (lambda: layer(x[:, :1]), "more than 1 sequence"),
        (lambda: layer(x, lengths=[-1, 1, 2, 3]), "from 0 to 6"),
        (lambda: layer(torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged), lengths=[4, 4]), "nested tensor"),
        (lambda: layer(x, lengths=[1, 2, 3]), "4 numbers"),
        (lambda: layer(x, mask=holes), "before the padding"),
        (lambda: layer(x, mask=holes.float()), "boolean"),
        (lambda: layer(x, lengths=LENGTHS, mask=holes), "give one"),
        (lambda: layer(x[0, 0]), "2 axes"),
        (lambda: layer(x[:0]), "a step or more"),
        (lambda: bn.LSTM(INPUT, HIDDEN, process_group="world"), "choose a pool"),
        (lambda: setattr(layer.norm_hh_l0, "pool", "sequence"), "no meaning"),
        (lambda: layer.cell(1), "no layer 1"),
        (lambda: bn.LSTM(INPUT, HIDDEN, batch_norm="step"), "unknown batch_norm"),
        (lambda: bn.LSTM(INPUT, HIDDEN, recurrent=True), "needs a pool"),
        (lambda: bn.LSTM(INPUT, HIDDEN, batch_norm="frame", max_steps=0), "at least 1"),
        (lambda: StepBatchNorm(3, 4, activation="relu"), "no meaning"),
        (lambda: layer.norm_hh_l0(x), "frames"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(RuntimeError, match="input_size"):
        layer(torch.randn(STEPS, SAMPLES, INPUT + 1))
    close(layer.state_dict(), before, rtol=0, atol=0)
    layer.reset_parameters()
    assert layer.norm_c_l0.weight[0].item() == pytest.approx(0.1)
