"""A layer's options, modes, buffers and state: everything but its forward."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

from torch import Tensor, nn

from batchnorm.errors import InputError
from batchnorm.nn import buffers as layer_buffers
from batchnorm.nn import options, outside, saved_modes
from batchnorm.nn.options import DEFAULTS
from batchnorm.nn.outside import Swappable
from batchnorm.ops.context import is_recomputing
from batchnorm.running import Accumulator
from batchnorm.sources import Renorm, Source


class _Default(float):
    """A default that can be told from the same number given by hand."""


_MOMENTUM = _Default(0.1)
_warned = False


class ConfiguredLayer(Swappable, nn.modules.batchnorm._BatchNorm):
    """A batch normalization with the options of `nn/options.py`; `BatchNorm` computes with them."""

    activation: str | None
    negative_slope: float
    source: str
    update: str
    trains_affine: bool
    running: str
    running_var_kind: str
    nonfinite: str
    renorm: Renorm | None
    example_weight: float
    pool: str | None
    batch_first: bool
    max_steps: int
    ghost_size: int
    ghost_update: str
    channel_groups: int
    process_group: Any
    domains: int
    affine_by: str
    domain: int = 0
    reads_sizes: bool = False  # whether forward takes frames and the sizes of steps, and not sequences
    keeps_output: bool | None = None  # whether the output is kept for the backward; None: but in `recompute_outputs`
    label: str = ""  # the layer's name in its network, for errors of synchronization
    num_batches_skipped: Tensor
    renorm_r: Tensor
    renorm_d: Tensor
    running_carry: Tensor | None = None  # what rounding left of the running statistics; see `buffers.carry`
    _place: int = 0  # which layer of its ranks it is, from 1, once they have compared it before its first exchange
    _source: Source | None = None  # normalizes in place of the layer's own, which then takes in nothing
    _accumulator: Accumulator | None = None  # takes in statistics in place of the buffers
    _padding: Any = None  # tells the valid frames of an input that comes without them; see `padding.mask_padding`
    _call_size: int | None = None  # samples of a pool in the C++ call on the input itself; None: there is none
    _estimates: bool = False  # whether the running statistics are other than torch's
    _varies: bool = False  # whether that call renormalizes, or merges groups of channels
    _is_special: bool = True  # whether that call cannot compute the layer whatever its pools are

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = _MOMENTUM,
        affine: bool | str = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
        source: str = "auto",
        update: str = "auto",
        decay: float | None = None,
        running: str = "ema",
        running_var: str = "unbiased",
        nonfinite: str = "propagate",
        renorm: Renorm | None = None,
        example_weight: float = 0.0,
        pool: str | None = None,
        batch_first: bool = True,
        max_steps: int = 0,
        ghost_size: int = 0,
        ghost_update: str = "merge",
        channel_groups: int = 0,
        process_group: Any = None,
        domains: int = 0,
        affine_by: str = "shared",
    ) -> None:
        if isinstance(affine, str):
            affine_by = _agreed(affine, affine_by)
            affine = True
        given = dict(locals())  # by the names of the arguments
        values = {**DEFAULTS, **{name: given[argument] for argument, name in options.ATTRIBUTES.items()}}
        momentum = _momentum(momentum, decay)
        _check_numbers(num_features, eps, momentum)
        for name, value in values.items():
            options.check(name, value)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        options.check_together(values, self, momentum)
        if affine and not bias:
            self.register_parameter("bias", None)
        for name, value in values.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in DEFAULTS:
            options.check(name, value)
        super().__setattr__(name, value)
        if name == "process_group":
            self.__dict__.pop("_place", None)
        if name in DEFAULTS or name in layer_buffers.HANDED_IN:
            layer_buffers.prepare(self, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        old = (
            "_special",
            "_pooled",
            "_ghosts",
            "_has_agreed",
            "_place",
        )  # flags of pickles made before, and of other ranks
        super().__setstate__({**DEFAULTS, **{name: value for name, value in state.items() if name not in old}})
        layer_buffers.set_flags(self)

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None and not isinstance(self.process_group, str):
            raise InputError(
                f"{self._name()} cannot be pickled, because its process_group is a handle of this process; set it to "
                "'world' or None before, or save net.state_dict()"
            )
        return dict(self.__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy in the same process group, which is a handle and is not copied."""
        memo[id(self.process_group)] = self.process_group
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin

    def train(self, mode: bool = True) -> Any:
        """Sets the mode; warns if evaluation would use running statistics that are not finite."""
        super().train(mode)
        if not mode:
            layer_buffers.warn_of_overflow(self)
        return self

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        for name, value in (("weight", 1.0), ("bias", 0.0)):  # torch 2.10's own needs both of them
            if getattr(self, name, None) is not None:
                nn.init.constant_(getattr(self, name), value)
        for key, parameter in self._parameters.items():
            if parameter is not None and self.__dict__.get("affine_by", "shared") != "shared":
                nn.init.constant_(parameter, float(key.startswith("weight")))

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        layer_buffers.forget_carry(self)
        layer_buffers.forget_refusals(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What ``.to()``, ``.half()`` and their like do; running statistics that are wide stay so."""
        with layer_buffers.wide_statistics(self):
            return super()._apply(fn, recurse)

    @property
    def decay(self) -> float | None:
        """1 - momentum, as Keras, Flax and ONNX call it; None where the average is cumulative."""
        return None if self.momentum is None else 1 - self.momentum

    @property
    def channels_last(self) -> bool:
        """Whether the channels are the last axis of the input, and not the second."""
        return self.__dict__.get("pool") is not None

    @property
    def normalizes_by_batch(self) -> bool:
        """Whether the batch's statistics normalize, or else the running ones."""
        if self.source == "auto":
            return self.training or (self.running_mean is None and self.running_var is None)
        return self.source == "batch"

    @property
    def updates_statistics(self) -> bool:
        """Whether a forward changes the running statistics; not while a backward runs, which recomputes."""
        if self.update == "auto":
            wanted = self.training and self.track_running_stats
        else:
            wanted = self.update == "always" and self.running_mean is not None
        return wanted and not is_recomputing()

    def _name(self) -> str:
        return f"layer '{self.label}'" if self.label else f"{type(self).__name__}({self.num_features})"

    def _lost_in_a_swap(self, caller: str) -> str | None:
        kept = {"process_group", *(("activation", "negative_slope") if outside.GUARDED in self.__dict__ else ())}
        return options.spelled_out(self, kept)

    def _lost_in_evaluation(self) -> str | None:
        guarded = outside.GUARDED in self.__dict__
        if self.source == "batch" or self.update == "always":
            return f"source={self.source!r}, update={self.update!r}"
        kept = {o.name for o in options.TABLE if o.affine and (o.name != "activation" or guarded)}
        return options.spelled_out(self, kept)

    # Modes and the carry in the state: in the metadata of a state_dict, so that its keys stay torch's

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is None:
            return
        if mode := saved_modes.save(self):
            metadata[prefix[:-1]]["batchnorm"] = mode
        if self.running_carry is not None:  # with it a run that goes on has the bits of one that was not stopped
            metadata[prefix[:-1]]["batchnorm_carry"] = self.running_carry

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *rest: Any) -> None:
        layer_buffers.fill_in(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        layer_buffers.settle(self)
        layer_buffers.load_carry(self, local_metadata.get("batchnorm_carry"))
        saved_modes.load(self, local_metadata.get("batchnorm"))

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *options.shown(self)])


def _agreed(affine: str, affine_by: str) -> str:
    """``affine_by`` of a constructor's ``affine=`` that is a word."""
    if affine_by not in ("shared", affine):
        raise InputError(
            f"got affine={affine!r} and affine_by={affine_by!r}, two words for one thing; give one of them"
        )
    return affine


def _momentum(momentum: float | None, decay: float | None) -> float | None:
    """The momentum of `momentum=` or `decay=`; warns once of what looks like the other convention."""
    global _warned
    if decay is not None:
        if momentum is not _MOMENTUM:
            raise InputError(f"got momentum={momentum} and decay={decay}, two names for one number; give one of them")
        if not 0 <= decay <= 1:
            raise InputError(f"decay must be in [0, 1], got {decay}")
        return 1 - decay
    if momentum is None:
        return None
    if 0.5 < momentum < 1 and not _warned:
        _warned = True
        warnings.warn(
            f"momentum={momentum}: torch's momentum is the share of the *new* batch. If TensorFlow's convention was "
            f"meant (the share of the old), write decay={momentum}",
            stacklevel=3,
        )
    return float(momentum)


def _check_numbers(num_features: int, eps: float, momentum: float | None) -> None:
    if num_features < 0:
        raise InputError(f"num_features must not be negative, got {num_features}")
    if not math.isfinite(eps):
        raise InputError(f"eps must be finite, got {eps}")
    if momentum is not None and not math.isfinite(momentum):
        raise InputError(f"momentum must be finite or None, got {momentum}")
