"""The layers: drop-in subclasses of torch.nn's, with explicit modes and fusions."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm import functional
from batchnorm.errors import InputError
from batchnorm.nn import saved_modes
from batchnorm.nn.example_weighing import by_example
from batchnorm.nn.renormalization import Renorm, by_measured, effective
from batchnorm.nn.running_statistics import ESTIMATORS, NONFINITE, VARIANCES, Accumulator, recomputing, update
from batchnorm.ops.schemas import ACTIVATIONS, statistics_dtype

SOURCES = ("auto", "batch", "running")
UPDATES = ("auto", "never", "always")

# The options of a layer beyond torch's, and their defaults.
OPTIONS: dict[str, Any] = {
    "activation": None,
    "negative_slope": 0.01,
    "source": "auto",
    "update": "auto",
    "trains_affine": True,
    "running": "ema",
    "running_var_kind": "unbiased",
    "nonfinite": "propagate",
    "renorm": None,
    "example_weight": 0.0,
}
# Those of them (and the accumulator of `accumulate`) that the short path through `forward` does not know.
_SPECIAL = ("trains_affine", "running", "running_var_kind", "nonfinite", "renorm", "example_weight", "_accumulator")


class _Default(float):
    """A default that can be told from the same number given by hand."""


_MOMENTUM = _Default(0.1)
_warned = False


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """What `BatchNorm1d`, `BatchNorm2d` and `BatchNorm3d` share."""

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
    num_batches_skipped: Tensor
    renorm_r: Tensor
    renorm_d: Tensor
    _accumulator: Accumulator | None = None
    _special: bool = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = _MOMENTUM,
        affine: bool = True,
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
    ) -> None:
        options = {
            **OPTIONS,
            "activation": activation,
            "negative_slope": negative_slope,
            "source": source,
            "update": update,
            "running": running,
            "running_var_kind": running_var,
            "nonfinite": nonfinite,
            "renorm": renorm,
            "example_weight": example_weight,
        }
        momentum = _momentum(momentum, decay)
        _check_numbers(num_features, eps, momentum)
        for name, value in options.items():
            _check_option(name, value)
        if running == "debiased" and momentum is None:
            raise InputError("running='debiased' corrects a moving average and needs a momentum, got None")
        if renorm is not None and not track_running_stats:
            raise InputError("renorm= needs running statistics, got track_running_stats=False")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if affine and not bias:
            self.register_parameter("bias", None)
        for name, value in options.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OPTIONS:
            _check_option(name, value)
        super().__setattr__(name, value)
        if name in OPTIONS or name == "_accumulator":
            self._prepare(name)

    def _prepare(self, option: str) -> None:
        """Makes what an option needs: its buffers, and the flag that the short path is left by."""
        at = None if self.running_mean is None else self.running_mean.device
        if option == "nonfinite" and self.nonfinite != "propagate":
            shape = (self.num_features,) if self.nonfinite == "skip_channel" else ()
            if "num_batches_skipped" not in self._buffers or self.num_batches_skipped.shape != shape:
                self.register_buffer("num_batches_skipped", torch.zeros(shape, dtype=torch.long, device=at))
        elif option == "nonfinite":
            self._buffers.pop("num_batches_skipped", None)
        if option == "renorm" and self.renorm is not None:
            for name, value in (("renorm_r", torch.ones), ("renorm_d", torch.zeros)):
                dtype = None if self.running_mean is None else self.running_mean.dtype
                self.register_buffer(name, value(self.num_features, dtype=dtype, device=at), persistent=False)
        elif option == "renorm":
            for name in ("renorm_r", "renorm_d"):
                self._buffers.pop(name, None)
                self._non_persistent_buffers_set.discard(name)
        options = self.__dict__
        options["_special"] = any(options.get(key, OPTIONS.get(key)) != OPTIONS.get(key) for key in _SPECIAL)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**OPTIONS, **state})

    @property
    def decay(self) -> float | None:
        """1 - momentum, as Keras, Flax and ONNX call it; None where the average is cumulative."""
        return None if self.momentum is None else 1 - self.momentum

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
        return wanted and not recomputing()

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(BN(input) + residual); see the class."""
        if not isinstance(input, Tensor):  # a proxy of torch.fx
            return self._traced(input, residual)
        self._check_input_dim(input)
        use_batch, updates = self.normalizes_by_batch, self.updates_statistics
        # Straight from the dictionaries: Module's own look-up costs as much as a small kernel. A parametrized weight is
        # in none of them.
        parameters, buffers, eps = self._parameters, self._buffers, self.eps
        weight = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        mean = buffers["running_mean"] if "running_mean" in buffers else self.running_mean  # noqa: SIM401
        var = buffers["running_var"] if "running_var" in buffers else self.running_var  # noqa: SIM401
        tracked = updates or not use_batch
        functional.check(
            input,
            mean if tracked else None,
            var if tracked else None,
            weight,
            bias,
            residual,
            self.activation,
            eps,
            use_batch,
        )
        if functional.is_traced(input):
            return self._traced(input, residual)
        if self._special:
            return self._by_options(input, residual, use_batch, updates)
        if not use_batch:
            if mean is None or var is None:
                raise InputError(
                    f"{type(self).__name__}: source='running', but the layer tracks no running statistics; "
                    "construct it with track_running_stats=True, or set source='auto'"
                )
            y = functional.by_population(
                input, mean, var, weight, bias, residual, eps, self.activation, self.negative_slope
            )
            if updates:
                self._update(mean, var, input, *functional.batch_statistics(input))
            return y
        y, batch_mean, batch_var = functional.by_batch(
            input, weight, bias, residual, eps, self.activation, self.negative_slope
        )
        if updates:
            self._update(mean, var, input, batch_mean, batch_var)
        return y

    def _update(
        self, running_mean: Tensor | None, running_var: Tensor | None, x: Tensor, mean: Tensor, var: Tensor
    ) -> None:
        counter, momentum = self._buffers.get("num_batches_tracked"), self.momentum
        if momentum is None and counter is None:
            momentum = 0.0
        functional.update(running_mean, running_var, counter, mean, var, x, momentum)

    def _by_options(self, x: Tensor, residual: Tensor | None, use_batch: bool, updates: bool) -> Tensor:
        """`forward` for all that is not torch's: renormalization, example weighing, other estimates."""
        weight, bias = self._affine()
        settings = (self.eps, self.activation, self.negative_slope)
        mean, var = self.running_mean, self.running_var
        if not use_batch and (mean is None or var is None):
            raise InputError(f"{type(self).__name__}: source='running', but the layer tracks no running statistics")
        statistics = None
        if use_batch and self.renorm is not None and mean is not None:
            y, statistics = self._renormalized(x, residual)
        elif use_batch:
            y, *statistics = functional.by_batch(x, weight, bias, residual, *settings)
        elif self.example_weight and x.numel():
            y = by_example(x, mean, var, weight, bias, residual, *settings, self.example_weight)  # type: ignore[arg-type]
        else:
            y = functional.by_population(x, mean, var, weight, bias, residual, *settings)  # type: ignore[arg-type]
        if updates:
            self._take_in(x, *(statistics or functional.batch_statistics(x)))
        return y

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        """gamma and beta, as constants where they do not train."""
        weight, bias = self.weight, self.bias
        if self.trains_affine:
            return weight, bias
        return None if weight is None else weight.detach(), None if bias is None else bias.detach()

    def _renormalized(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        mean, var = functional.batch_statistics(x)
        dtype = x.dtype if self.weight is None else self.weight.dtype
        weight, bias = effective(*self._affine(), *self._corrections(mean[0], var[0]), dtype)
        activation = self.activation or "identity"
        y = by_measured(x, weight, bias, residual, mean, var, 0, self.eps, activation, self.negative_slope)
        return y, [mean, var]

    def _corrections(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """r and d for this batch; a recomputation takes those of the forward that it repeats."""
        assert self.renorm is not None
        with torch.no_grad():
            if not recomputing():
                statistics = (mean, var, self.running_mean, self.running_var)
                r, d = self.renorm.corrections(*statistics, self.eps, self.num_batches_tracked)  # type: ignore[arg-type]
                self.renorm_r.copy_(r)
                self.renorm_d.copy_(d)
            return self.renorm_r.to(mean.dtype, copy=True), self.renorm_d.to(mean.dtype, copy=True)

    def _take_in(self, x: Tensor, mean: Tensor, var: Tensor) -> None:
        """Updates the running statistics, or what `accumulate` collects for them."""
        count = x.shape[0] * math.prod(x.shape[2:])
        mean, var = mean.detach().reshape(-1), var.detach().reshape(-1)
        with torch.no_grad():
            if count == 0:  # nothing to mix in; torch counts the batch all the same
                if self.num_batches_tracked is not None and self._accumulator is None:
                    self.num_batches_tracked.add_(1)
            elif self._accumulator is not None:
                self._accumulator.add(mean, var, count)
            else:
                update(self, mean, var, mean.new_full((), count))

    def _traced(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The same on ATen's own operators, for other runtimes and for torch.fx."""
        use_batch, updates = self.normalizes_by_batch, self.updates_statistics
        if self._special or (updates and (self.momentum is None or not use_batch)):
            return self._traced_by_options(x, residual, use_batch, updates)
        tracked = updates or not use_batch
        momentum = 0.0 if self.momentum is None else self.momentum
        if updates and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        y = F.batch_norm(
            x,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            use_batch,
            momentum,
            self.eps,
        )
        return functional.finish(y, residual, self.activation, self.negative_slope)

    def _traced_by_options(self, x: Tensor, residual: Tensor | None, use_batch: bool, updates: bool) -> Tensor:
        weight, bias = self._affine()
        mean, var = self.running_mean, self.running_var
        if updates or self.renorm is not None:
            wide = x.detach().to(statistics_dtype(x.device))
            batch_var, batch_mean = torch.var_mean(wide, (0, *range(2, x.ndim)), correction=0)
        if use_batch:
            if self.renorm is not None:
                dtype = self.renorm_r.dtype if weight is None else weight.dtype
                weight, bias = effective(weight, bias, *self._corrections(batch_mean, batch_var), dtype)
            y = F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
            y = functional.finish(y, residual, self.activation, self.negative_slope)
        elif self.example_weight:
            settings = (self.eps, self.activation, self.negative_slope, self.example_weight)
            y = by_example(x, mean, var, weight, bias, residual, *settings)  # type: ignore[arg-type]
        else:
            y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
            y = functional.finish(y, residual, self.activation, self.negative_slope)
        if updates:
            self._take_in(x, batch_mean, batch_var)
        return y

    def _check_input_dim(self, input: Tensor) -> None:
        try:
            super()._check_input_dim(input)
        except ValueError as error:
            raise InputError(*error.args) from None

    # Modes in the state: in the metadata of a state_dict, so that its keys stay torch's

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None and (mode := saved_modes.save(self)):
            metadata[prefix[:-1]]["batchnorm"] = mode

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *rest: Any) -> None:
        key = prefix + "num_batches_skipped"
        if "num_batches_skipped" in self._buffers and key not in state_dict:
            state_dict[key] = self.num_batches_skipped
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        saved_modes.load(self, local_metadata.get("batchnorm"))

    def extra_repr(self) -> str:
        shown = {"running_var_kind": "running_var"}
        changed = [
            f"{shown.get(name, name)}={getattr(self, name)!r}"
            for name, default in OPTIONS.items()
            if getattr(self, name) != default
        ]
        return ", ".join([super().extra_repr(), *changed])


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


_CHOICES: dict[str, tuple[Any, ...]] = {
    "activation": (None, *ACTIVATIONS),
    "source": SOURCES,
    "update": UPDATES,
    "trains_affine": (True, False),
    "running": ESTIMATORS,
    "running_var_kind": VARIANCES,
    "nonfinite": NONFINITE,
}


def _check_option(name: str, value: Any) -> None:
    """Raises unless an option can be this."""
    if name in _CHOICES and value not in _CHOICES[name]:
        shown = "running_var" if name == "running_var_kind" else name
        raise InputError(f"unknown {shown} {value!r}; choose one of {', '.join(map(str, _CHOICES[name]))}")
    if name == "renorm" and not (value is None or isinstance(value, Renorm)):
        raise InputError(f"renorm must be a Renorm or None, got {value!r}")
    if name == "example_weight" and not (isinstance(value, (int, float)) and 0 <= value <= 1):
        raise InputError(f"example_weight must be a number in [0, 1], got {value!r}")


_DOC = """Batch normalization over {axes}, a drop-in for `torch.nn.{name}`.

``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``; ``var`` is the *biased* variance, the
running variance kept for inference the *unbiased* one, as in torch. Constructor, state_dict, errors and hooks are
torch's; what is new is keyword-only.

Args:
    num_features: C.
    eps: added to the variance, inside the root.
    momentum: share of the *new* statistics in the running ones; None for the cumulative average.
    affine: whether gamma (``weight``) and beta (``bias``) are learned.
    track_running_stats: whether running statistics are kept.
    bias: whether beta is learned where gamma is.
    activation: fused into the layer: "relu", "relu6", "leaky_relu", "silu", "gelu" (exact), "hardswish", "sigmoid",
        "tanh" or None.
    negative_slope: of "leaky_relu".
    source: which statistics normalize: "auto" (the batch's in training, the running ones in evaluation, as torch),
        "batch" or "running".
    update: whether the running statistics are updated: "auto" (in training, as torch), "never" or "always".
    decay: 1 - momentum, the share of the *old* statistics; give one of the two.
    running: the estimate: "ema" (a moving average), "debiased" (divided by 1 - decay^t) or "cumulative" (the plain
        average over batches; momentum is not used).
    running_var: the variance kept for inference: "unbiased" (as torch) or "biased" (as Keras and Flax); attribute
        ``running_var_kind``.
    nonfinite: what a batch with infinite or NaN statistics does: "propagate" (as torch), "skip" (the update is
        refused) or "skip_channel" (in the channels concerned); counted in the buffer ``num_batches_skipped``.
    renorm: batch renormalization in training; see `Renorm`. r and d of the last batch: ``renorm_r``, ``renorm_d``.
    example_weight: alpha in [0, 1], how much an example's own statistics count when the running ones normalize;
        see `tune_example_weight`.

Shape:
    input {shape}, residual and output the same.

Raises:
    InputError: options or shapes that do not fit, one value per channel in training.
    DtypeError: dtypes or devices that do not fit.

Source: Ioffe & Szegedy 2015, Algorithms 1 and 2; Ioffe 2017 (renorm); Summers & Dinneen 2020 (example_weight).

Example:
    >>> import torch
    >>> layer = {name}(4, activation="relu")
    >>> layer(torch.randn({example})).shape
    torch.Size([{example}])
"""


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    __doc__ = _DOC.format(
        axes="the batch (and length)",
        name="BatchNorm1d",
        shape="(N, C) or (N, C, L)",
        example="8, 4",
    )


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    __doc__ = _DOC.format(axes="batch and image", name="BatchNorm2d", shape="(N, C, H, W)", example="8, 4, 5, 5")


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    __doc__ = _DOC.format(
        axes="batch and volume",
        name="BatchNorm3d",
        shape="(N, C, D, H, W)",
        example="8, 4, 3, 3, 3",
    )


BY_RANK: dict[int, type[_BatchNorm]] = {1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d}
"""The layer for so many axes of space (1 also for none)."""
