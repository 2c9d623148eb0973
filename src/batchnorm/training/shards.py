"""Networks whose parameters are sharded over ranks: how they are cut, gathered again, and kept in checkpoints."""

from __future__ import annotations

import copy
import importlib
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from batchnorm.errors import DataError, SurgeryError, WriteError
from batchnorm.training.networks import modules_called
from batchnorm.undo import in_mode

PREFIX = "checkpoint-"  # of the folder of a checkpoint's shards; the number of steps follows

Named = Mapping[str, tuple[nn.Module, torch.optim.Optimizer]]
"""Networks with their optimizers, by name."""


def shard(network: nn.Module, example: Tensor, device: torch.device) -> nn.Module:
    """Cut the parameters of a network over all ranks, in place, by torch's `fully_shard`.

    Each module with parameters that a forward calls is a unit: its parameters are gathered for its own forward and
    backward alone. It computes in bfloat16; gradients are reduced in float32, and the parameters that are trained are
    float32. Batch normalization keeps gamma, beta and statistics in float32. The first layer that standardizes the data
    and the last that rescales outputs have no parameters and stay in float32.

    Args:
        network: on `device`; parameters alike on all ranks.
        example: a batch that it takes.
        device: of the parameters.

    Raises:
        SurgeryError: torch cannot shard it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    whole = network.get_submodule("network") if isinstance(network, nn.Sequential) and "network" in dict(
        network.named_children()
    ) else network  # fmt: skip
    half: Any = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    inside, outside = MixedPrecisionPolicy(**half), MixedPrecisionPolicy(**half, output_dtype=torch.float32)
    as_they_are = MixedPrecisionPolicy(cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    try:
        for module in _units(network, whole, example):
            policy = as_they_are if isinstance(module, nn.modules.batchnorm._BatchNorm) else inside
            fully_shard(module, mesh=mesh, mp_policy=policy)
        fully_shard(whole, mesh=mesh, mp_policy=outside)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise SurgeryError(
            f"train --fsdp: the parameters cannot be sharded ({str(error).strip().splitlines()[0]}). Leave --fsdp out; "
            "the ranks then share the batch alone."
        ) from error
    return network


def _units(network: nn.Module, whole: nn.Module, example: Tensor) -> list[nn.Module]:
    """The modules under `whole`, inner ones first, that have parameters of their own alone and that a forward calls."""
    called = set(modules_called(network, example))
    owners: dict[int, int] = {}
    for module in whole.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return [
        module
        for module in reversed(list(whole.modules()))
        if module is not whole
        and module in called
        and any(True for _ in module.parameters(recurse=False))
        and all(owners[id(p)] == 1 for p in module.parameters(recurse=False))
    ]


def gathered(network: nn.Module, like: nn.Module) -> nn.Module:
    """The same network with whole parameters, on every rank; a collective call.

    Args:
        network: sharded.
        like: what it was before, which gets the values.
    """
    state = network.state_dict()
    whole: OrderedDict[str, Tensor] = OrderedDict()
    whole._metadata = getattr(state, "_metadata", None)  # type: ignore[attr-defined]
    for key, value in state.items():
        whole[key] = value.full_tensor() if _is_sharded(value) else value
    like.load_state_dict(whole)
    return in_mode(like, network.training)


def _is_sharded(value: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def _checkpoint() -> Any:
    """torch.distributed.checkpoint, which takes time to import."""
    return importlib.import_module("torch.distributed.checkpoint")


def is_sharded(network: nn.Module) -> bool:
    """Whether its parameters are cut over ranks."""
    return dist.is_available() and any(map(_is_sharded, network.parameters()))


def fresh_name(folder: Path, step: int) -> str:
    """Of a folder that does not exist: what the last checkpoint names stays until the next one is whole."""
    name, number = f"{PREFIX}{step}", 1
    while (folder / name).exists():
        number += 1
        name = f"{PREFIX}{step}-{number}"
    return name


def save_shards(target: Path, networks: Named) -> None:
    """Write what is sharded of networks and optimizers into a folder of its own, each rank its part; a collective call.

    It is a checkpoint of torch.distributed.checkpoint in files of safetensors, so reading it executes nothing.

    Raises:
        WriteError: a rank could not write.
    """
    checkpoint = _checkpoint()

    writer = checkpoint.HuggingFaceStorageWriter(str(target), save_distributed=True)
    try:
        checkpoint.save(dict(_sharded(networks)), storage_writer=writer)
    except (checkpoint.CheckpointException, OSError) as error:
        causes = list(getattr(error, "failures", {}).values())
        first = causes[0][0] if causes and isinstance(causes[0], tuple) else error
        shutil.rmtree(target, ignore_errors=True)
        raise WriteError(f"{target}: it cannot be written ({first}). Nothing is left of it.") from error


def remove_shards(folder: Path, but: str | None = None) -> None:
    """Of all checkpoints but one. Folders of such a name that hold anything else are somebody else's."""
    others = (path for path in folder.glob(f"{PREFIX}[0-9]*") if path.name != but)
    for other in others:
        if other.is_dir() and not other.is_symlink() and all(p.name.startswith("shard-") for p in other.iterdir()):
            shutil.rmtree(other, ignore_errors=True)


def load_shards(folder: Path, networks: Named) -> None:
    """Read what `save_shards` wrote into networks and optimizers that are cut over any number of ranks; a collective.

    The optimizers have states of the right kind already: see `optimizer_state`.

    Raises:
        DataError: files that are missing or damaged, or tensors of other names or shapes.
    """
    _load(folder, dict(_sharded(networks)), alone=False)


def load_parameters(folder: Path, name: str, network: nn.Module) -> None:
    """Read the parameters of one network, which is whole and in one process.

    Raises:
        DataError: as of `load_shards`.
    """
    wanted = {f"{name}/network/{key}": value.detach() for key, value in network.named_parameters()}
    _load(folder, wanted, alone=True)


def _load(folder: Path, wanted: dict[str, Any], *, alone: bool) -> None:
    checkpoint = _checkpoint()

    if not folder.is_dir() or folder.is_symlink():
        raise DataError(f"checkpoint {folder}: the folder of the sharded tensors is missing.")
    try:
        _check_sizes(folder, wanted)
        reader = checkpoint.HuggingFaceStorageReader(str(folder))
        checkpoint.load(wanted, storage_reader=reader, no_dist=alone)
    except DataError:
        raise
    except Exception as error:  # safetensors and the planner raise anything on damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"checkpoint {folder}: it cannot be read ({type(error).__name__}: {reason}).") from error


def _check_sizes(folder: Path, wanted: Mapping[str, Any]) -> None:
    """The planner compares names and sizes of what is there; a file that is missing makes tensors smaller."""
    checkpoint = _checkpoint()

    held = checkpoint.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    for key, value in wanted.items():
        found = getattr(held.get(key), "size", None)
        if found != value.shape:
            raise DataError(
                f"checkpoint {folder}: {key} has shape {None if found is None else tuple(found)}, expected "
                f"{tuple(value.shape)}. A file is missing, or the network's factory was changed."
            )


def _sharded(networks: Named) -> Iterator[tuple[str, Any]]:
    for name, (network, optimizer) in networks.items():
        for key, parameter in network.named_parameters():
            if _is_sharded(parameter):
                yield f"{name}/network/{key}", parameter.detach()
            for slot, value in optimizer.state.get(parameter, {}).items():
                if _is_sharded(value):
                    yield f"{name}/optimizer/{key}/{slot}", value


def rest_of_network(network: nn.Module) -> OrderedDict[str, Tensor]:
    """What of a state is the same on all ranks: buffers, and what is in its metadata."""
    state = network.state_dict()
    rest = OrderedDict((key, value) for key, value in state.items() if not _is_sharded(value))
    rest._metadata = copy.copy(getattr(state, "_metadata", None))  # type: ignore[attr-defined]
    return rest


def rest_of_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor | None]]:
    """The optimizer's state by parameter and slot; None stands for what is sharded."""
    return {
        key: {slot: None if _is_sharded(value) else value for slot, value in optimizer.state[parameter].items()}
        for key, parameter in network.named_parameters()
        if parameter in optimizer.state
    }


def optimizer_state(
    network: nn.Module, optimizer: torch.optim.Optimizer, rest: Mapping[str, Mapping[str, Tensor | None]]
) -> None:
    """Give an optimizer the state of `rest_of_optimizer`, with zeros where shards are to be loaded."""
    parameters = dict(network.named_parameters())
    for key, slots in rest.items():
        parameter = parameters[key]
        optimizer.state[parameter] = {
            slot: torch.zeros_like(parameter) if value is None else value for slot, value in slots.items()
        }
