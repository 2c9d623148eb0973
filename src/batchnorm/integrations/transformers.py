"""A callback for the Trainer of Hugging Face transformers."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from batchnorm.errors import MissingDependencyError
from batchnorm.integrations.life import Life, layer_modes, options_of, set_layer_modes, warn_of_trap
from batchnorm.writing import write_atomically, write_text

try:
    import transformers as trainer_package
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingDependencyError(
        "batchnorm.integrations.transformers needs transformers: pip install transformers"
    ) from error

MODES_FILE = "batchnorm_modes.json"
"""Beside the weights in each checkpoint: files of weights alone do not hold the modes of layers."""
EMA_FILE = "batchnorm_ema.pt"
"""Beside it, where an average of the weights is kept: the averaged network's ``state_dict``."""


class BatchNormCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Batch normalization through a training with ``transformers.Trainer``: what `Life` does, at its own points.

    Micro-batches of ``gradient_accumulation_steps`` update the running statistics once, as one batch. Each checkpoint
    in ``output_dir`` gets a file with the modes of the layers, and one with the averaged network if there is one, which
    are read when a training is resumed from it.

    Args:
        batches: for calibration; by default the trainer's training batches.
        forward: ``forward(model, batch)``; by default the model is called with the batch's entries, labels left out.
        calibrate_at_end, calibrate_before_validation, freeze_from_epoch, accumulate, ema, watch: as of `Life`. The
            Trainer tells that it has evaluated, not that it will: so the calibration before a validation is made at the
            end of the optimizer step after which it evaluates.

    Attributes:
        life: the `Life`, from the start of the training.

    Warns:
        UserWarning: a trap of the trainer that was met, with its version.
    """

    def __init__(
        self,
        *,
        batches: Any = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        calibrate_at_end: bool = True,
        calibrate_before_validation: int = 0,
        freeze_from_epoch: int | None = None,
        accumulate: bool = True,
        ema: float | None = None,
        watch: Mapping[str, Any] | bool | None = None,
    ) -> None:
        self.options = options_of(locals())
        self.batches, self.forward = batches, forward or _without_labels
        self.life: Life | None = None
        self._handle: Any = None
        self._loss: Tensor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the `Life` of the model, and put the layers in the modes of the checkpoint that is resumed."""
        model, loader = kwargs["model"], kwargs.get("train_dataloader")
        batches = self.batches if self.batches is not None else loader
        self.life = Life(model, kwargs.get("optimizer"), batches=batches, forward=self.forward, **self.options)
        modes = _checkpoint(args, state) / MODES_FILE
        if state.global_step and modes.exists():
            set_layer_modes(model, json.loads(modes.read_text(encoding="utf-8")))
        self.life.begin()
        average = _checkpoint(args, state) / EMA_FILE
        if self.life.ema is not None and state.global_step and average.exists():
            self.life.ema.load_state_dict(torch.load(average, map_location="cpu", weights_only=True))
        self._handle = model.register_forward_hook(self._note_loss)
        _warn_of_traps(args, model)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Freeze from the chosen epoch on."""
        if self.life is not None:
            self.life.epoch(int(state.epoch or 0))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin an accumulation."""
        if self.life is not None:
            self.life.step_begins()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Commit the statistics; calibrate where an evaluation comes."""
        if self.life is not None:
            self.life.step_ends(self._loss)
            if control.should_evaluate:
                self.life.validation()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Calibrate where an evaluation comes at the end of the epoch."""
        if self.life is not None and control.should_evaluate:
            self.life.validation()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the watch the loss of the evaluation."""
        loss = (kwargs.get("metrics") or {}).get("eval_loss")
        if self.life is not None and self.life.watch is not None and loss is not None:
            self.life.watch.evaluated(float(loss))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the modes of the layers, and the averaged network, beside the weights."""
        folder = _checkpoint(args, state)
        if folder.is_dir() and state.is_world_process_zero:
            write_text(folder / MODES_FILE, json.dumps(layer_modes(kwargs["model"]), indent=1))
            if self.life is not None and self.life.ema is not None:
                average = self.life.ema.state_dict()
                write_atomically(folder / EMA_FILE, lambda path: torch.save(average, path))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Calibrate, and end the watch."""
        if self._handle is not None:
            self._handle.remove()
        if self.life is not None:
            self.life.end()

    def _note_loss(self, module: nn.Module, args: Any, output: Any) -> None:
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if module.training and isinstance(loss, Tensor):
            self._loss = loss.detach()


def _checkpoint(args: Any, state: Any) -> Path:
    """The folder in which the Trainer keeps the present step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _without_labels(model: nn.Module, batch: Any) -> Any:
    """The model called with a batch's entries on its device, without labels."""
    device = next(model.parameters()).device
    batch = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, dict(batch))
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key not in ("labels", "label", "label_ids")})


def _warn_of_traps(args: Any, model: nn.Module) -> None:
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
    classifies = type(model).__name__.endswith("ForImageClassification")
    if args.gradient_accumulation_steps > 1 and takes_any and classifies:
        steps = args.gradient_accumulation_steps
        warn_of_trap(
            f"the Trainer (transformers {trainer_package.__version__}; seen in 5.23.0) does not divide the loss of "
            f"{type(model).__name__} by the {steps} accumulation steps: loss and gradients are that much too large",
            "Divide the learning rate by that number, or give compute_loss_func= a loss of your own",
        )
