"""Recurrent layers and cells with batch normalization: drop-ins for torch.nn's."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from batchnorm.errors import InputError
from batchnorm.kernels import recurrent as aten
from batchnorm.nn.batch_norm import BatchNorm1d
from batchnorm.nn.leaves import recorded_call
from batchnorm.nn.outside import Unscriptable
from batchnorm.nn.sequences import frames_of, reversed_frames
from batchnorm.nn.step_batch_norm import StepBatchNorm
from batchnorm.ops import recurrent as ops
from batchnorm.ops.context import is_compiled
from batchnorm.pools import largest

POOLS = (None, "frame", "sequence")
State = Any  # h of shape (layers, N, H), or the pair of it and c


@dataclasses.dataclass(frozen=True)
class Options:
    """How a recurrent layer normalizes; see `LSTM`."""

    batch_norm: str | None = None
    recurrent: bool = False
    max_steps: int = 100
    gamma: float | None = None
    eps: float = 1e-5
    momentum: float | None = 0.1

    def __post_init__(self) -> None:
        if self.batch_norm not in POOLS:
            raise InputError(f"unknown batch_norm {self.batch_norm!r}; choose one of None, 'frame', 'sequence'")
        if self.recurrent and self.batch_norm is None:
            raise InputError(
                "recurrent=True normalizes W_hh h beside W_ih x and needs a pool for that, got batch_norm=None; "
                "choose batch_norm='frame' (Cooijmans et al. 2016) or 'sequence'"
            )
        if self.max_steps < 1:
            raise InputError(f"max_steps must be at least 1, got {self.max_steps}")

    def check_group(self, process_group: Any) -> None:
        """Raises where ranks would have no statistics to share."""
        if process_group is not None and self.batch_norm is None:
            raise InputError("process_group= shares the statistics of batch_norm=, got None; choose a pool for it")

    @property
    def initial_gamma(self) -> float:
        return (0.1 if self.recurrent else 1.0) if self.gamma is None else self.gamma

    def __str__(self) -> str:
        changed = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in changed)


@dataclasses.dataclass(frozen=True)
class _Direction:
    """The weights and normalizations of one layer in one direction: all that a recurrence is made of."""

    cell: str
    weight_ih: Tensor
    weight_hh: Tensor
    bias_hn: Tensor | None
    weight_hr: Tensor | None
    norm_ih: nn.Module | None
    norm_hh: StepBatchNorm | None
    norm_c: StepBatchNorm | None

    def run(
        self, data: Tensor, sizes: list[int], h0: Tensor, c0: Tensor | None, step: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states (frames, H), and the last h and c (N, H), from frames (frames, input size)."""
        gates = F.linear(data, self.weight_ih)
        if isinstance(self.norm_ih, StepBatchNorm):
            gates = self.norm_ih(gates, sizes, step)
        elif self.norm_ih is not None:
            gates = self.norm_ih(gates)
        norms = [norm for norm in (self.norm_hh, self.norm_c) if norm is not None]
        shared = next((norm for norm in norms if norm.synchronizes), None)
        if shared is not None:  # each step is an exchange, so every rank takes as many
            most = largest(len(sizes), shared.agreed_pool(gates), gates.device)
            sizes = [*sizes, *[0] * (most - len(sizes))]
        call = aten.Recurrence(self.cell, gates, sizes, self.weight_hh, self.bias_hn, self.weight_hr, h0, c0)
        if not StepBatchNorm.can_be_fused(norms):
            normalize = [_called(norm, step) for norm in (self.norm_hh, self.norm_c)]
            states, cells = aten.recurrence(call, *normalize)
            return states, ops.last(states, sizes), None if cells is None else ops.last(cells, sizes)
        by = [None if norm is None else norm.normalization(sizes, step) for norm in (self.norm_hh, self.norm_c)]
        result = ops.recurrence(call, *by)
        for norm, statistics in ((self.norm_hh, result.of_hh), (self.norm_c, result.of_c)):
            if norm is not None and statistics is not None and norm.updates_statistics:
                norm.take(*statistics, sizes, step)
        return result.output, result.h_n, result.c_n


@functools.cache
def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, left alone by Dynamo."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return]


def _called(norm: StepBatchNorm | None, step: int) -> aten.Normalize:
    """Normalization by a call of the layer at each step, which its hooks see."""
    if norm is None:
        return lambda x, t: x
    return lambda x, t: norm(x, [len(x)], step + t)


class _Normalized(Unscriptable, nn.Module):
    """What layers and cells share: the options, the normalizations, and the way from torch.nn's state_dict."""

    mode: str
    hidden_size: int
    bias: bool
    options: Options
    _padding: Any = None  # tells the valid steps of an input that comes without them; see `padding.mask_padding`

    def __init__(
        self,
        *args: Any,
        batch_norm: str | None = None,
        recurrent: bool = False,
        max_steps: int = 100,
        gamma: float | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        process_group: Any = None,
        **kwargs: Any,
    ) -> None:
        options = Options(batch_norm, recurrent, max_steps, gamma, eps, momentum)
        options.check_group(process_group)
        super().__init__(*args, **kwargs)
        self.options = options
        if batch_norm is not None:
            self._normalize_all(process_group)

    def _normalize_all(self, process_group: Any) -> None:
        """Puts normalizations into every direction of every layer."""
        for suffix in self._suffixes():
            self._normalize(suffix, process_group)

    def _normalize(self, suffix: str, process_group: Any) -> None:
        """Puts normalizations into one direction of one layer, and drops the biases that they make redundant."""
        weight = getattr(self, f"weight_hh{suffix}")
        gates, hidden = len(weight), self.hidden_size
        for name in (f"bias_ih{suffix}", f"bias_hh{suffix}"):
            self._parameters.pop(name, None)
        options = self.options
        factory = {"device": weight.device, "dtype": weight.dtype, "process_group": process_group}

        def by_step(features: int, bias: bool) -> StepBatchNorm:
            return StepBatchNorm(features, options.max_steps, options.eps, options.momentum, bias=bias, **factory)

        norm_ih: nn.Module
        if options.batch_norm == "frame":
            norm_ih = by_step(gates, self.bias)
        else:
            norm_ih = BatchNorm1d(gates, options.eps, options.momentum, bias=self.bias, **factory)
        self.add_module(f"norm_ih{suffix}", norm_ih)
        if options.recurrent:
            self.add_module(f"norm_hh{suffix}", by_step(gates, bias=False))
        if options.recurrent and self.mode == "LSTM":
            self.add_module(f"norm_c{suffix}", by_step(hidden, self.bias))
        if self.mode == "GRU" and self.bias:
            self.register_parameter(f"bias_hn{suffix}", nn.Parameter(weight.new_empty(hidden)))
        self._reset_normalization(suffix)

    def _reset_normalization(self, suffix: str) -> None:
        """gamma as the options say, beta zero, statistics those of no data, and the candidate's bias as torch's."""
        for name in (f"norm_ih{suffix}", f"norm_hh{suffix}", f"norm_c{suffix}"):
            norm = self._modules.get(name)
            if norm is not None:
                norm.reset_parameters()  # type: ignore[operator]
                nn.init.constant_(norm.weight, self.options.initial_gamma)  # type: ignore[arg-type]
        bias_hn = self._parameters.get(f"bias_hn{suffix}")
        if bias_hn is not None:
            nn.init.uniform_(bias_hn, -(bound := 1 / math.sqrt(self.hidden_size)), bound)

    def _direction(self, suffix: str) -> _Direction:
        modules = self._modules
        return _Direction(
            self.mode,
            getattr(self, f"weight_ih{suffix}"),
            getattr(self, f"weight_hh{suffix}"),
            getattr(self, f"bias_hn{suffix}", None),
            getattr(self, f"weight_hr{suffix}", None),
            *(modules.get(f"{name}{suffix}") for name in ("norm_ih", "norm_hh", "norm_c")),  # type: ignore[arg-type]
        )

    def _suffixes(self) -> list[str]:
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes the state of torch.nn's layer too: see `LSTM` on its biases."""
        if self.options.batch_norm is not None:
            for suffix in self._suffixes():
                self._absorb_biases(state_dict, prefix, suffix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _absorb_biases(self, state_dict: dict[str, Any], prefix: str, suffix: str) -> None:
        norms = [name for name in self._modules if name.startswith("norm_") and name.endswith(suffix)]
        norms = [name for name in norms if name.removesuffix(suffix) in ("norm_ih", "norm_hh", "norm_c")]
        if any(key.startswith(tuple(f"{prefix}{name}." for name in norms)) for key in state_dict):
            return
        for name in norms:
            state_dict.update(self._modules[name].state_dict(prefix=f"{prefix}{name}."))  # type: ignore[union-attr]
        of_input, of_state = (state_dict.pop(f"{prefix}{name}{suffix}", None) for name in ("bias_ih", "bias_hh"))
        if not self.bias:
            return
        if of_input is None or of_state is None:
            of_input = of_state = torch.zeros_like(getattr(self, f"norm_ih{suffix}").bias)
        if self.mode == "GRU":
            of_state = of_state.clone()
            state_dict[f"{prefix}bias_hn{suffix}"] = of_state[-self.hidden_size :].clone()
            of_state[-self.hidden_size :] = 0
        state_dict[f"{prefix}norm_ih{suffix}.bias"] = of_input + of_state

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), str(self.options))))


class _Layer(_Normalized, nn.RNNBase):
    """What `RNN`, `LSTM` and `GRU` share."""

    def _normalize_all(self, process_group: Any) -> None:
        super()._normalize_all(process_group)
        self._all_weights = [[name for name in names if not name.startswith("bias")] for names in self._all_weights]
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._init_flat_weights()

    def _suffixes(self) -> list[str]:
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{layer}{direction}" for layer in range(self.num_layers) for direction in directions]

    def reset_parameters(self) -> None:
        """Weights (and torch's biases) uniform as in torch.nn, and the normalizations as constructed."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self._parameters.values():
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)
        if "options" in self.__dict__ and self.options.batch_norm is not None:
            for suffix in self._suffixes():
                self._reset_normalization(suffix)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
        step: int = 0,
    ) -> tuple[Any, State]:
        """Output and last state, as torch.nn's layer of this name; see the class for what is new."""
        named = {"lengths": lengths, "mask": mask, "step": step or None}
        if isinstance(input, fx.Proxy) and (recorded := recorded_call(self, (input, hx), named)) is not None:
            return recorded
        run = _Layer._forward
        # Dynamo stops at a recurrent layer unless its config.allow_rnn is set, and would then compile the functions
        # inside one by one, again for all other lengths of sequences. Of this one it does not know the layer then, and
        # takes each attribute for something that is not None.
        if is_compiled() and not torch._dynamo.config.allow_rnn:
            torch._dynamo.skip_frame("a recurrent layer runs eagerly")
        if "torch._dynamo" in sys.modules and not is_compiled():
            run = _disabled(run)
        return run(self, input, hx, lengths, mask, step)

    def _forward(
        self, input: Any, hx: State | None, lengths: Tensor | Sequence[int] | None, mask: Tensor | None, step: int
    ) -> tuple[Any, State]:
        if self._padding is not None and lengths is None and mask is None and isinstance(input, Tensor):
            mask = self._padding.mask_of(self, input)
        is_torchs = self.options.batch_norm is None
        told = lengths is not None or mask is not None or (isinstance(input, Tensor) and input.is_nested)
        if is_torchs and not told:
            return super().forward(input, hx)  # type: ignore[no-any-return]
        frames = frames_of(input, lengths, mask, self.batch_first, type(self).__name__)
        if frames.is_alone and hx is not None:
            hx = self._each(hx, lambda h: h.unsqueeze(1))
        sequences = torch.tensor([frames.sequences])
        if hx is None:
            self.check_input(frames.data, sequences)
        else:
            self.check_forward_args(frames.data, hx, sequences)
        begun = self._initial(frames.data, frames.sequences, hx)
        states = self._each(begun, frames.begin)
        if not is_torchs:
            output, states = self._run(frames.data, frames.sizes, states, step)
        elif len(frames.data):
            packed, states = super().forward(frames.packed(), states)
            output = packed.data
        else:
            empty = frames.data.unflatten(0, (len(frames.sizes), 0))
            output, states = super().forward(empty.transpose(0, 1) if self.batch_first else empty, states)
            output = output.flatten(0, 1)
        ended = self._each(states, frames.end, begun)
        return frames.restore(output), ended

    def _each(self, states: State, function: Callable[..., Tensor], *others: State) -> State:
        """The function of h, or of h and of c; ``others`` are further states, whose parts are further arguments."""
        if self.mode != "LSTM":
            return function(states, *others)
        return tuple(map(function, states, *others))

    def _run(self, data: Tensor, sizes: list[int], states: State, step: int) -> tuple[Tensor, State]:
        suffixes = self._suffixes()
        h0, c0 = states if self.mode == "LSTM" else (states, None)
        directions = 2 if self.bidirectional else 1
        flipped = reversed_frames(sizes, data.device) if self.bidirectional else None
        h_n, c_n = [], []
        for k in range(self.num_layers):
            outputs = []
            for d in range(directions):
                i = k * directions + d
                x = data if d == 0 else data[flipped]
                c = None if c0 is None else c0[i]
                output, h, c = self._direction(suffixes[i]).run(x, sizes, h0[i], c, step)
                outputs.append(output if d == 0 else output[flipped])
                h_n.append(h)
                c_n.append(c)
            data = outputs[0] if directions == 1 else torch.cat(outputs, 1)
            if k + 1 < self.num_layers and self.dropout:
                data = F.dropout(data, self.dropout, self.training)
        h_last = torch.stack(h_n)
        return data, h_last if c0 is None else (h_last, torch.stack(c_n))  # type: ignore[arg-type]

    def _initial(self, data: Tensor, samples: int, hx: State | None) -> State:
        """The states that were given, or zeros."""
        if hx is not None:
            return hx
        count = self.num_layers * (2 if self.bidirectional else 1)
        h0 = data.new_zeros(count, samples, self.proj_size or self.hidden_size)
        return (h0, data.new_zeros(count, samples, self.hidden_size)) if self.mode == "LSTM" else h0

    def cell(self, layer: int = 0, *, reverse: bool = False) -> nn.Module:
        """One layer in one direction as a cell, which shares its parameters and statistics: for streaming.

        Args:
            layer: which; its input is the output of the layer before.
            reverse: the direction that reads each sequence from its end.

        Raises:
            InputError: no such layer or direction, or a layer with ``proj_size``, which torch's cells do not have.
        """
        suffix = f"_l{layer}{'_reverse' if reverse else ''}"
        if suffix not in self._suffixes():
            raise InputError(f"{type(self).__name__}.cell: there is no layer {layer} with reverse={reverse}")
        if self.proj_size:
            raise InputError(f"{type(self).__name__}.cell: cells have no projection, got proj_size={self.proj_size}")
        weight = getattr(self, f"weight_ih{suffix}")
        options = dataclasses.asdict(self.options)
        if self.mode.startswith("RNN"):
            options["nonlinearity"] = self.mode.removeprefix("RNN_").lower()
        made: nn.Module = _CELLS[self.mode](
            weight.shape[1], self.hidden_size, self.bias, device=weight.device, dtype=weight.dtype, **options
        )
        for name in [*made._parameters, *made._modules]:
            setattr(made, name, getattr(self, f"{name}{suffix}", None))
        return made.train(self.training)


class _Cell(_Normalized, nn.modules.rnn.RNNCellBase):
    """What `RNNCell`, `LSTMCell` and `GRUCell` share."""

    def _suffixes(self) -> list[str]:
        return [""]

    def forward(self, input: Tensor, hx: State | None = None, *, step: int | None = None) -> State:
        """The next state, as torch.nn's cell of this name; see the class for ``step``."""
        if isinstance(input, fx.Proxy) and (recorded := recorded_call(self, (input, hx), {"step": step})) is not None:
            return recorded
        if self.options.batch_norm is None:
            return super().forward(input, hx)
        called = type(self).__name__
        if step is None:
            if hx is not None and (self.options.recurrent or self.options.batch_norm == "frame"):
                raise InputError(
                    f"{called}: got a state and no step=, but this cell has statistics for every time step; "
                    "pass step=t, the number of inputs before this one"
                )
            step = 0
        if input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            raise InputError(
                f"{called}: expected an input (N, {self.input_size}) or ({self.input_size},), got {tuple(input.shape)}"
            )
        x = input if input.dim() == 2 else input[None]
        shape = (len(x), self.hidden_size)
        states = [x.new_zeros(shape) for _ in range(2)] if hx is None else list(hx) if self.mode == "LSTM" else [hx]
        states = [state if state.dim() == 2 else state[None] for state in states]
        if any(state.shape != shape for state in states):
            raise InputError(
                f"{called}: expected states {shape} for an input {tuple(input.shape)}, "
                f"got {[tuple(state.shape) for state in states]}"
            )
        c = states[1] if self.mode == "LSTM" else None
        _, h, c = self._direction("").run(x, [len(x)], states[0], c, step)
        if input.dim() == 1:
            h, c = h[0], None if c is None else c[0]
        return h if c is None else (h, c)


class InputBias(nn.Module):
    """What is left of the normalization of W_ih x when ``fold`` has scaled W_ih: gates + bias, (frames, gates)."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)

    def forward(self, gates: Tensor) -> Tensor:
        return gates + self.bias


_LAYER_DOC = """{paper}, a drop-in for `torch.nn.{name}`.

{formula}

With ``batch_norm=None`` this is torch.nn's layer. Otherwise biases that a normalization removes or repeats are gone:
one beta a gate is left, ``norm_ih_l0.bias``{candidate}.
A state_dict of torch.nn's layer loads: the beta of each gate becomes ``bias_ih + bias_hh``{loaded},
and what torch.nn does not have stays as it is. gamma, beta and the statistics are those of submodules:
``norm_ih_l0`` (a `BatchNorm1d` for "sequence", else a `StepBatchNorm`) and, with ``recurrent``, {submodules},
and the same with ``_l1``, ... and ``_reverse``.

Args:
    input_size, hidden_size, num_layers, {arguments}bias, batch_first, dropout, bidirectional,
        {projection}device, dtype: as torch.nn's. ``bias=False`` leaves out beta too.
    batch_norm: the pool that W_ih x is normalized over: "frame" (a pool for each time step: causal), "sequence" (one
        of all valid frames: Laurent et al. 2016, Amodei et al. 2016), or None.
    recurrent: whether {recurrent}, too,
        by the statistics of each time step (Cooijmans et al. 2016).
    max_steps: time steps with running statistics of their own; later steps use those of the last.
    gamma: its initial value; by default 1, and 0.1 with ``recurrent``.
    eps, momentum: as of `BatchNorm1d`.
    process_group: "world" or a group of torch.distributed, whose ranks share all statistics in training; each must
        make the call, with no sequences if it has no other. With ``recurrent`` that is an exchange for every
        normalization of every step, step by step on ATen.

Shape:
    As torch.nn's: (T, N, input), (N, T, input) with ``batch_first``, (T, input), or a `PackedSequence`; or a nested
    tensor (N, *, input) of jagged layout, which comes out as one. ``lengths=`` (N numbers) or ``mask=`` (N, T, True =
    valid, padding last) of ``forward`` say which frames of a padded input are valid: the others are in no pool, and
    zero in the output. A sequence of length 0 ends in the state that it begins with. ``step=`` is the number of frames
    before the first, where a sequence is read in parts. The *reverse* direction counts steps from each sequence's end.

Raises:
    InputError: options that do not fit, one sequence where a pool is a time step in training, a mask with gaps.

Source: {source}

Examples:
    >>> layer = {name}(3, 5, batch_norm="frame", recurrent=True)
    >>> output, state = layer(torch.randn(7, 4, 3))
    >>> output.shape
    torch.Size([7, 4, 5])
"""

_CELL_DOC = """One step of `{layer}`, a drop-in for `torch.nn.{name}`.

Options and normalizations are those of the layer, under the names ``norm_ih``{submodules}; its method ``cell``
gives a cell that shares its parameters, for streaming. In training the pool is the batch of the step, also for
"sequence", whose other frames are not known here.

Args:
    input_size, hidden_size, bias, {arguments}device, dtype: as torch.nn's.
    batch_norm, recurrent, max_steps, gamma, eps, momentum, process_group: as of `{layer}`.

Shape:
    input (N, input) or (input,), states (N, hidden) or (hidden,). ``step=`` of ``forward`` is the number of inputs
    before this one; needed beside a state where the statistics are those of time steps.

Raises:
    InputError: shapes that do not fit, a state without its step, one sample in training.

Source: as of `{layer}`.

Examples:
    >>> cell = {name}(3, 5, batch_norm="frame").eval()
    >>> state = cell(torch.randn(4, 3))
    >>> state = cell(torch.randn(4, 3), state, step=1)
"""

_GATES = "BN(W_ih x; gamma, beta) + W_hh h"
_LAURENT = "Laurent et al. 2016, Batch normalized recurrent neural networks; Amodei et al. 2016, Deep Speech 2"
_COOIJMANS = f"{_LAURENT};\n    Cooijmans et al. 2016, Recurrent batch normalization."


class RNN(_Layer, nn.RNN):
    __doc__ = _LAYER_DOC.format(
        name="RNN",
        paper="An Elman network with batch normalization",
        formula=(
            f"``h = tanh(z)`` (or relu), ``z = {_GATES}``; with ``recurrent``,\nW_hh h is ``BN(W_hh h; gamma_hh, 0)``."
        ),
        candidate="",
        loaded="",
        submodules="``norm_hh_l0``",
        arguments="nonlinearity, ",
        projection="",
        recurrent="W_hh h is normalized",
        source=_COOIJMANS + " For Elman networks theirs is applied by analogy.",
    )


class LSTM(_Layer, nn.LSTM):
    __doc__ = _LAYER_DOC.format(
        name="LSTM",
        paper="A long short-term memory with batch normalization",
        formula=(
            f"``i, f, g, o = {_GATES}``, ``c = sigmoid(f) c + sigmoid(i) tanh(g)``,\n"
            "``h = sigmoid(o) tanh(c)``; with ``recurrent``, W_hh h is ``BN(W_hh h; gamma_hh, 0)``, and\n"
            "``h = sigmoid(o) tanh(BN(c; gamma_c, beta_c))``."
        ),
        candidate="",
        loaded="",
        submodules="``norm_hh_l0`` and ``norm_c_l0``",
        arguments="",
        projection="proj_size, ",
        recurrent="W_hh h, and the cell before its output tanh, are normalized",
        source=_COOIJMANS,
    )


class GRU(_Layer, nn.GRU):
    __doc__ = _LAYER_DOC.format(
        name="GRU",
        paper="A gated recurrent unit with batch normalization",
        formula=(
            "``r, z, n = BN(W_ih x; gamma, beta)``, ``r', z', n' = W_hh h``, ``r = sigmoid(r + r')``,\n"
            "``z = sigmoid(z + z')``, ``n = tanh(n + r (n' + b_hn))``, ``h = (1 - z) n + z h``; with ``recurrent``,\n"
            "W_hh h is ``BN(W_hh h; gamma_hh, 0)``."
        ),
        candidate=", and ``bias_hn_l0`` inside the reset gate's product",
        loaded=" (bias_hh of the candidate:\n``bias_hn_l0``)",
        submodules="``norm_hh_l0``",
        arguments="",
        projection="",
        recurrent="W_hh h is normalized",
        source=_COOIJMANS + " For gated recurrent units theirs is applied by analogy.",
    )


class RNNCell(_Cell, nn.RNNCell):
    __doc__ = _CELL_DOC.format(name="RNNCell", layer="RNN", submodules=", ``norm_hh``", arguments="nonlinearity, ")

    @property
    def mode(self) -> str:  # type: ignore[override]
        return f"RNN_{self.nonlinearity.upper()}"


class LSTMCell(_Cell, nn.LSTMCell):
    __doc__ = _CELL_DOC.format(name="LSTMCell", layer="LSTM", submodules=", ``norm_hh``, ``norm_c``", arguments="")
    mode = "LSTM"


class GRUCell(_Cell, nn.GRUCell):
    __doc__ = _CELL_DOC.format(name="GRUCell", layer="GRU", submodules=", ``norm_hh``", arguments="")
    mode = "GRU"


_CELLS: dict[str, Any] = {"RNN_TANH": RNNCell, "RNN_RELU": RNNCell, "LSTM": LSTMCell, "GRU": GRUCell}
