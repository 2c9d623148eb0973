"""What tools that prune channels, and loading by assignment, leave of a layer's own buffers."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import batchnorm as bn
from batchnorm.errors import InputError

KEEP = torch.tensor([0, 2])


def cut(layer):
    """What pruning tools do to a batch normalization: they know torch's tensors alone."""
    for key in ("weight", "bias"):
        setattr(layer, key, nn.Parameter(getattr(layer, key).data[KEEP]))
    layer.running_mean, layer.running_var = layer.running_mean[KEEP], layer.running_var[KEEP]
    layer.num_features = len(KEEP)
    return layer


@pytest.mark.parametrize("options", [{}, {"renorm": bn.Renorm(warmup=0)}, {"nonfinite": "skip"}, {"ghost_size": 4}])
def test_a_cut_layer_computes_as_the_whole_did_in_these_channels(options):
    layer, x = bn.BatchNorm1d(4, **options), torch.randn(8, 4) + 3
    layer(x)
    whole, layer = copy.deepcopy(layer), cut(layer)
    torch.testing.assert_close(layer(x[:, KEEP]), whole(x)[:, KEEP])
    torch.testing.assert_close(layer.running_mean, whole.running_mean[KEEP])
    torch.testing.assert_close(layer.eval()(x[:, KEEP]), whole.eval()(x)[:, KEEP])


def test_counts_by_channel_are_named_or_moved():
    layer = bn.BatchNorm1d(4, running="cumulative", nonfinite="skip_channel")
    for k in range(10):
        x = torch.randn(8, 4) + 3
        x[0, 1] = math.inf if k < 8 else 0.0
        layer(x)
    whole, x = copy.deepcopy(layer), torch.randn(8, 4) + 9
    with pytest.raises(InputError, match="num_batches_skipped"):
        cut(layer)(x[:, KEEP])
    layer.num_batches_skipped = layer.num_batches_skipped[KEEP]
    layer(x[:, KEEP]), whole(x)
    torch.testing.assert_close(layer.running_mean, whole.running_mean[KEEP])
    layer.reset_running_stats()
    assert not layer.num_batches_skipped.any()


@pytest.mark.parametrize("options", [{"domains": 3}, {"pool": "frame", "max_steps": 3}])
def test_rows_that_a_tool_took_for_channels_are_named(options):
    layer = cut(bn.BatchNorm1d(4, **options))
    x = torch.randn(6, 2) if "domains" in options else torch.randn(6, 3, 2)
    for each in (layer, layer.eval()):
        with pytest.raises(InputError, match="channels last"):
            each(x)


@pytest.mark.parametrize("options", [{}, {"renorm": bn.Renorm(warmup=0)}, {"domains": 2, "affine_by": "domain"}])
def test_masks_of_torchs_own_pruning(options):
    layer = bn.BatchNorm1d(4, **options)
    prune.l1_unstructured(layer, "weight", 2)
    y = layer(torch.randn(8, 4))
    assert (y == 0).all(0).sum() == 2  # where gamma is masked, beta is 0
    prune.remove(layer, "weight")
    layer(torch.randn(8, 4)).sum().backward()
    assert layer.weight.grad is not None


OWN = {
    "renorm": {"renorm": bn.Renorm(warmup=0)},
    "skip": {"nonfinite": "skip"},
    "skip_channel": {"nonfinite": "skip_channel"},
    "domains": {"domains": 2},
    "domains' own affine": {"domains": 2, "affine_by": "domain"},
    "steps": {"pool": "frame", "max_steps": 3, "affine_by": "step"},
    "both": {"pool": "frame", "max_steps": 3, "domains": 2, "nonfinite": "skip_channel"},
}


@pytest.mark.parametrize("options", OWN.values(), ids=OWN)
@pytest.mark.parametrize("of", ["torch", "itself"])
def test_loading_by_assignment_on_meta(options, of):
    layer = bn.BatchNorm1d(4, **options)
    shape = (6, 3, 4) if "pool" in options else (6, 4)
    layer(torch.randn(shape) + 2)
    source = layer if of == "itself" else nn.BatchNorm1d(4)
    empty = copy.deepcopy(layer).to("meta")
    empty.load_state_dict(source.state_dict(), assign=True)
    places = [t.data_ptr() for t in (*empty.parameters(), *empty.buffers())]
    assert len(set(places)) == len(places)
    for rows in (empty.running_mean, empty.running_var, *empty.parameters()):
        assert rows.is_contiguous()
    untouched = None if "domains" not in options else empty.running_mean[1].clone()
    x = torch.randn(shape) + 5
    empty(x)
    if untouched is not None:
        assert torch.equal(empty.running_mean[1], untouched)
    empty.eval()(x)


@pytest.mark.parametrize("options", OWN.values(), ids=OWN)
def test_memory_that_was_given_to_a_layer_on_meta_loads(options):
    layer = bn.BatchNorm1d(4, **options)
    shape = (6, 3, 4) if "pool" in options else (6, 4)
    layer(torch.randn(shape) + 2)
    empty = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for value in (*empty.parameters(), *empty.buffers()):
            value.fill_(math.nan if value.is_floating_point() else -7)
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(shape) + 5
    torch.testing.assert_close(empty(x), layer(x))
    torch.testing.assert_close(empty.eval()(x), layer.eval()(x))
