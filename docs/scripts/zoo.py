"""Puts architectures of seven packages through the verbs for networks, and writes docs/zoo.md.

Run by hand where the packages are installed::

    python docs/scripts/zoo.py run results.jsonl     # hours of one core become minutes with --limit
    python docs/scripts/zoo.py page results.jsonl

Every architecture is built with random weights and random running statistics, and given a small input. A verb is
*right* if it changed the network, and outputs in evaluation are what they were, up to four times the network's own
rounding. A refusal and "nothing to change" are told with their reasons.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import json
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

PAGE = Path(__file__).parent.parent / "zoo.md"
PACKAGES = (
    "timm",
    "transformers",
    "ultralytics",
    "segmentation_models_pytorch",
    "monai",
    "speechbrain",
    "torch_geometric",
)
VERBS = ("summary", "freeze", "convert", "modes", "calibrate", "accelerate", "fold", "insert")
SECONDS = 600  # a verb may take

TIMM = """
    bat_resnext26ts botnet26t_256 coat_lite_tiny coatnet_nano_rw_224 convit_tiny crossvit_9_240 cs3darknet_s csatv2
    cspresnet50 darknet17 densenet121 dla34 dla46_c dm_nfnet_f0 dpn48b eca_botnext26ts_256 ecaresnet26t
    edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientnet_lite0 efficientvit_b0
    efficientvit_m0 ese_vovnet19b_slim fastvit_t8 fbnetc_100 fbnetv3_b gernet_s ghostnet_100 ghostnetv2_100
    halonet26t hardcorenas_a hgnet_tiny hgnetv2_b0 hrnet_w18_small inception_next_atto inception_v3 lambda_resnet26t
    lcnet_035 legacy_seresnet18 levit_128s mambaout_femto maxvit_rmlp_pico_rw_256 mixnet_s mnasnet_small
    mobilenet_edgetpu_v2_xs mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_small_035 mobilenetv5_300m
    mobileone_s0 mobilevit_xxs mobilevitv2_050 nasnetalarge nextvit_small nf_resnet26 pit_ti_224 poolformerv2_s12
    pvt_v2_b0 regnetx_002 regnety_002 regnetz_005 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_14w_8s resnest14d
    resnet10t resnet18 resnet18d resnetv2_50 resnext26ts rexnet_100 rexnetr_100 sebotnet33ts_256 selecsls42
    semnasnet_050 seresnext26ts shvit_s1 skresnet18 spnasnet_100 starnet_s1 swiftformer_xs tf_efficientnet_b0
    tf_efficientnet_lite0 tf_mixnet_s tf_mobilenetv3_small_minimal_100 tiny_vit_5m_224 tinynet_e tresnet_m vgg11_bn
    visformer_tiny vovnet39a xception41 lcnet_050 mobilenetv3_small_075 resnet14t gcresnet33ts
""".split()  # noqa: SIM905


def timm_models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any]]]]:
    import timm

    known = set(timm.list_models())
    for name in TIMM:
        if name in known:
            yield name, lambda name=name: _timm(name)  # type: ignore[misc]


def _timm(name: str) -> tuple[nn.Module, Any]:
    import timm

    for size in (64, 96, 160, None):
        try:
            net = timm.create_model(name, pretrained=False, **({} if size is None else {"img_size": size}))
        except Exception:  # no argument img_size
            net = timm.create_model(name, pretrained=False)
        size = size or net.default_cfg["input_size"][-1]
        x = torch.randn(2, 3, size, size)
        try:
            with torch.no_grad():
                copy.deepcopy(net).eval()(x)
        except Exception:  # another size
            continue
        return net, x
    raise ValueError("takes none of the sizes that were tried")


def transformers_models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any]]]]:
    import transformers as t

    small = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}

    def vision(model: str, config: str, size: int = 64, **settings: Any) -> Callable[[], tuple[nn.Module, Any]]:
        def make() -> tuple[nn.Module, Any]:
            cfg = getattr(t, config)(**settings)
            return getattr(t, model)(cfg), {"pixel_values": torch.randn(2, 3, size, size)}

        return make

    backbone = {"backbone": None, "use_timm_backbone": False, "use_pretrained_backbone": False}
    resnet = {"backbone_config": t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
                                                out_features=["stage2", "stage3", "stage4"])}  # fmt: skip
    detr = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 4}  # fmt: skip
    yield "ResNet", vision("ResNetForImageClassification", "ResNetConfig", embedding_size=8, **small)
    yield "RegNet", vision("RegNetForImageClassification", "RegNetConfig", embedding_size=8, groups_width=8, **small)
    yield "MobileNetV1", vision("MobileNetV1ForImageClassification", "MobileNetV1Config", depth_multiplier=0.25)
    yield "MobileNetV2", vision("MobileNetV2ForImageClassification", "MobileNetV2Config", depth_multiplier=0.25)
    yield "MobileViT", vision("MobileViTForImageClassification", "MobileViTConfig", image_size=64)
    yield (
        "MobileViTV2",
        vision("MobileViTV2ForImageClassification", "MobileViTV2Config", image_size=64, width_multiplier=0.5),
    )
    yield "LeViT", vision("LevitForImageClassification", "LevitConfig", 224, hidden_sizes=[32, 64, 96])
    yield "Segformer", vision("SegformerForSemanticSegmentation", "SegformerConfig", 64, hidden_sizes=[8, 8, 16, 16],
                              depths=[1] * 4, num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16)  # fmt: skip
    yield "UperNet", vision("UperNetForSemanticSegmentation", "UperNetConfig", 64, hidden_size=16, pool_scales=[1, 2],
                            use_auxiliary_head=False, backbone_config=t.ResNetConfig(embedding_size=8,
                            hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
                            out_features=["stage1", "stage2", "stage3", "stage4"]))  # fmt: skip
    yield "DETR", vision("DetrForObjectDetection", "DetrConfig", 64, **backbone, **resnet, **detr)
    yield (
        "Conditional DETR",
        vision("ConditionalDetrForObjectDetection", "ConditionalDetrConfig", 64, **backbone, **resnet, **detr),
    )
    yield "DAB-DETR", vision("DabDetrForObjectDetection", "DabDetrConfig", 64, **backbone, **resnet, hidden_size=16,
                             encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
                             encoder_attention_heads=2, decoder_attention_heads=2, num_queries=4)  # fmt: skip
    yield (
        "Deformable DETR",
        vision("DeformableDetrForObjectDetection", "DeformableDetrConfig", 64, **backbone, **resnet, **detr),
    )
    yield (
        "Table Transformer",
        vision("TableTransformerForObjectDetection", "TableTransformerConfig", 64, **backbone, **resnet, **detr),
    )
    yield "RT-DETR", vision("RTDetrForObjectDetection", "RTDetrConfig", 64, num_queries=8)
    yield "Swiftformer", vision("SwiftFormerForImageClassification", "SwiftFormerConfig", 64)
    hybrid = {"encoder_hidden_dim": 16, "encoder_ffn_dim": 16, "encoder_attention_heads": 2, "d_model": 16,
              "decoder_ffn_dim": 16, "decoder_attention_heads": 2, "decoder_layers": 2, "num_queries": 6,
              "decoder_in_channels": [16, 16, 16]}  # fmt: skip
    narrow = {"encoder_in_channels": [16, 16, 32]}
    yield "RT-DETRv2", vision("RTDetrV2ForObjectDetection", "RTDetrV2Config", 64, **hybrid, **narrow,
                              backbone_config=t.RTDetrResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 32],
                              depths=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"]))  # fmt: skip
    yield "D-FINE", vision("DFineForObjectDetection", "DFineConfig", 64, **hybrid, **narrow,
                           backbone_config=t.HGNetV2Config(stem_channels=[3, 8, 8], stage_in_channels=[8, 8, 16, 16],
                           stage_mid_channels=[8, 8, 8, 8], stage_out_channels=[8, 16, 16, 32],
                           stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[2, 2, 2, 2],
                           use_learnable_affine_block=True, hidden_sizes=[8, 16, 16, 32],
                           out_features=["stage2", "stage3", "stage4"]))  # fmt: skip
    yield "LW-DETR", vision("LwDetrForObjectDetection", "LwDetrConfig", 64, d_model=16, decoder_ffn_dim=16,
                            decoder_self_attention_heads=2, decoder_cross_attention_heads=2, decoder_layers=2,
                            num_queries=6, group_detr=2, projector_scale_factors=[1.0, 2.0], c2f_num_blocks=1,
                            backbone_config=t.LwDetrViTConfig(hidden_size=16, num_hidden_layers=2,
                            num_attention_heads=2, image_size=64, pretrain_image_size=64, patch_size=16,
                            num_windows=4, window_block_indices=[0], out_indices=[1, 2]))  # fmt: skip
    vit = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    yield "BEiT", vision("BeitForSemanticSegmentation", "BeitConfig", 64, image_size=64, use_auxiliary_head=True,
                         out_indices=[1, 2, 3, 4], pool_scales=[1, 2], **vit)  # fmt: skip
    yield "CvT", vision("CvtForImageClassification", "CvtConfig", 64, embed_dim=[8, 16, 16], num_heads=[1, 1, 2],
                        depth=[1, 2, 3])  # fmt: skip
    small_superpoint = t.SuperPointConfig(encoder_hidden_sizes=[8, 8, 8, 8], decoder_hidden_size=8,
                                          descriptor_decoder_dim=16, border_removal_distance=0)  # fmt: skip

    def pairs(model: str, config: str, size: int, **settings: Any) -> Callable[[], tuple[nn.Module, Any]]:
        def make() -> tuple[nn.Module, Any]:
            net = getattr(t, model)(getattr(t, config)(**settings))
            return net, {"pixel_values": torch.rand(1, 2, settings.pop("channels", 3), size, size)}

        return make

    yield "EfficientLoFTR", pairs("EfficientLoFTRForKeypointMatching", "EfficientLoFTRConfig", 96,
                                  stage_num_blocks=[1, 2, 2, 2], out_features=[8, 8, 16, 32], hidden_size=32,
                                  num_attention_heads=1, num_attention_layers=1, fine_matching_slice_dim=4,
                                  rope_parameters={"rope_type": "default", "rope_theta": 10000.0,
                                                   "partial_rotary_factor": 0.5})  # fmt: skip
    yield "SuperGlue", pairs("SuperGlueForKeypointMatching", "SuperGlueConfig", 64, keypoint_detector_config=
                             small_superpoint, hidden_size=16, keypoint_encoder_sizes=[8, 8],
                             gnn_layers_types=["self", "cross"], num_attention_heads=2)  # fmt: skip
    yield "SuperPoint", vision("SuperPointForKeypointDetection", "SuperPointConfig", 64,
                               **small_superpoint.to_diff_dict())  # fmt: skip


def ultralytics_models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any]]]]:
    from ultralytics.nn.tasks import (
        ClassificationModel,
        DetectionModel,
        PoseModel,
        RTDETRDetectionModel,
        SegmentationModel,
    )

    kinds = {
        "yolo11n.yaml": DetectionModel,
        "yolov8n.yaml": DetectionModel,
        "yolov5n.yaml": DetectionModel,
        "yolov9t.yaml": DetectionModel,
        "yolov10n.yaml": DetectionModel,
        "yolo12n.yaml": DetectionModel,
        "yolov3-tiny.yaml": DetectionModel,
        "yolov8n-seg.yaml": SegmentationModel,
        "yolov8n-pose.yaml": PoseModel,
        "yolo11n-cls.yaml": ClassificationModel,
        "rtdetr-resnet50.yaml": RTDETRDetectionModel,
    }
    for name, kind in kinds.items():
        yield name, lambda name=name, kind=kind: (kind(name, verbose=False), torch.randn(2, 3, 64, 64))  # type: ignore[misc]


def smp_models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any]]]]:
    import segmentation_models_pytorch as smp

    pairs = [("Unet", "resnet18"), ("Unet", "efficientnet-b0"), ("UnetPlusPlus", "mobilenet_v2"), ("MAnet", "resnet18"),
             ("Linknet", "resnet18"), ("FPN", "densenet121"), ("PSPNet", "resnet18"), ("DeepLabV3", "resnet18"),
             ("DeepLabV3Plus", "resnet18"), ("PAN", "resnet34"), ("UPerNet", "mobileone_s0"),
             ("Segformer", "mit_b0"), ("Unet", "dpn68"), ("DPT", "tu-vit_tiny_patch16_224")]  # fmt: skip
    narrow = {"DPT": {"decoder_intermediate_channels": (16, 16, 16, 16), "decoder_fusion_channels": 16}}
    for kind, encoder in pairs:
        yield (
            f"{kind} on {encoder}",
            lambda kind=kind, encoder=encoder: (  # type: ignore[misc]
                getattr(smp, kind)(encoder, encoder_weights=None, **narrow.get(kind, {})),
                torch.randn(2, 3, *(2 * [224 if kind == "DPT" else 128])),
            ),
        )


def monai_models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any]]]]:
    from monai.networks import nets

    x = torch.randn(2, 1, 32, 32, 32)
    yield "BasicUNet 3-D", lambda: (nets.BasicUNet(3, 1, 2, (4, 4, 8, 8, 8, 4), norm="batch"), x)
    yield "UNet 3-D", lambda: (nets.UNet(3, 1, 2, (4, 8, 16), (2, 2), norm="batch", num_res_units=1), x)
    yield "SegResNet 3-D", lambda: (nets.SegResNet(3, 8, norm="batch"), x)
    yield "VNet 3-D", lambda: (nets.VNet(), torch.randn(2, 1, 16, 16, 16))
    yield "DynUNet 3-D", lambda: (nets.DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], norm_name="batch"), x)
    yield "DenseNet121 3-D", lambda: (nets.DenseNet121(3, 1, 2, init_features=8, growth_rate=4), x)
    yield (
        "ResNet10 3-D",
        lambda: (nets.resnet10(spatial_dims=3, n_input_channels=1, num_classes=2, widen_factor=0.25), x),
    )
    yield "AttentionUnet 3-D", lambda: (nets.AttentionUnet(3, 1, 2, (4, 8, 16), (2, 2)), x)
    yield "HighResNet 3-D", lambda: (nets.HighResNet(3, 1, 2), torch.randn(2, 1, 16, 16, 16))
    yield (
        "SENet 2-D",
        lambda: (nets.SEResNet50(spatial_dims=2, in_channels=1, num_classes=2), torch.randn(2, 1, 64, 64)),
    )
    yield "HoVerNet", lambda: (nets.HoVerNet("fast", out_classes=3), torch.randn(1, 3, 256, 256))


def speechbrain_models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any]]]]:
    from speechbrain.lobes.models import CRDNN, ECAPA_TDNN, Xvector

    x = torch.randn(2, 60, 20)
    yield "ECAPA-TDNN", lambda: (ECAPA_TDNN.ECAPA_TDNN(20, channels=[16] * 5, lin_neurons=8, attention_channels=8), x)
    yield "Xvector", lambda: (Xvector.Xvector(in_channels=20, tdnn_channels=[16] * 5, lin_neurons=8), x)
    yield (
        "CRDNN",
        lambda: (CRDNN.CRDNN(input_shape=[None, None, 20], cnn_channels=(4, 8), rnn_neurons=8, dnn_neurons=8), x),
    )


def pyg_models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any]]]]:
    from torch_geometric import nn as g

    x, edges = torch.randn(30, 8), torch.randint(0, 30, (2, 90))
    for kind in ("GCN", "GraphSAGE", "GIN", "GAT", "PNA", "EdgeCNN"):
        extra = (
            {"aggregators": ["mean", "max"], "scalers": ["identity"], "deg": torch.ones(20)} if kind == "PNA" else {}
        )
        yield (
            kind,
            lambda kind=kind, extra=extra: (  # type: ignore[misc]
                getattr(g, kind)(8, 16, 2, out_channels=4, norm="batch_norm", **extra),
                {"x": x, "edge_index": edges},
            ),
        )
    yield "MLP", lambda: (g.MLP([8, 16, 16, 4]), x)


SOURCES = {
    "timm": timm_models,
    "transformers": transformers_models,
    "ultralytics": ultralytics_models,
    "segmentation_models_pytorch": smp_models,
    "monai": monai_models,
    "speechbrain": speechbrain_models,
    "torch_geometric": pyg_models,
}


def randomized(net: nn.Module) -> nn.Module:
    """Random running statistics, gamma and beta, for classes of any package."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in net.modules():
            if not isinstance(getattr(module, "running_var", None), torch.Tensor):
                continue
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            for name, middle in (("weight", 1.0), ("bias", 0.0)):
                value = getattr(module, name, None)
                if isinstance(value, torch.Tensor):
                    value.copy_(middle + 0.2 * torch.randn(value.shape, generator=generator))
    return net


class TooLongError(BaseException):
    """No Exception, since code that catches every exception would catch the limit of time, too."""


def _too_long(*_: Any) -> None:
    raise TooLongError(f"took more than {SECONDS} s")


def tried(verb: str, net: nn.Module, example: Any) -> dict[str, Any]:
    """The outcome of one verb on a copy."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = _try(verb, copy.deepcopy(net), example)
        ours = [str(w.message) for w in told if str(w.message).startswith(verb)]
        return found | ({"told": ours[0]} if ours else {})
    except TooLongError as error:
        return {"outcome": "too slow", "reason": str(error)}
    except Exception as error:
        if (
            type(error).__name__ == "NothingToInsertError"
            or "no batch norm" in str(error)
            or "no batch-norm" in str(error)
        ):
            return {"outcome": "none"}
        return {"outcome": "refused", "reason": str(error)}
    finally:
        signal.alarm(0)


def _try(verb: str, net: nn.Module, example: Any) -> dict[str, Any]:
    import batchnorm as bn
    from batchnorm.surgery.comparison import Example
    from batchnorm.surgery.rounding import Rounding

    given = Example.of(example)
    before = copy.deepcopy(net).eval()
    if verb == "summary":
        found = bn.summary(net, example)
        return {"outcome": "right" if found.layers else "none", "layers": len(found.layers), "reason": found.note or ""}
    if verb == "fold":
        done = bn.fold(net.eval(), example).certificate
        kept = Counter(item.reason for item in done.kept)
        return {
            "outcome": "right",
            "folded": len(done.folded),
            "kept": len(done.kept),
            "merged": len(done.merged),
            "relative": done.relative,
            "rounding": done.rounding,
            "reason": "; ".join(f"{reason} ({n}x)" for reason, n in kept.most_common(2)),
        }
    if verb == "insert":
        bn.insert(net, example)
        return {"outcome": "right", "layers": len(list(net.modules())) - len(list(before.modules()))}
    if verb == "accelerate":
        bn.accelerate(net, example)
        report = getattr(net, "report", None)
        if report is None:
            return {"outcome": "unchanged"}
        Rounding(before, given).compare(net.eval(), 1e-4, verb)
        reasons = Counter((*report.kept.values(), *report.unfused.values()))
        return {
            "outcome": "right",
            "fused": len(report.fused),
            "swapped": len(report.swapped),
            "kept": len(report.kept),
            "reason": "; ".join(f"{reason} ({n}x)" for reason, n in reasons.most_common(2)),
        }
    if verb == "modes":
        return _modes(net, before, given)
    if verb == "calibrate":
        bn.calibrate(net, [None], forward=lambda each, _: given.run(each))
        if not all(torch.isfinite(value).all() for value in net.state_dict().values()):
            raise AssertionError("calibrate: statistics that are not finite")
        return {"outcome": "right"}
    if verb == "convert":
        bn.convert(net, nonfinite="skip")
    else:
        bn.freeze(net).train()
    Rounding(before, given).compare(net.eval(), 1e-4, verb)
    return {"outcome": "right"}


def _modes(net: nn.Module, before: nn.Module, given: Any) -> dict[str, Any]:
    """Running statistics stay in `no_update` and move in `accumulate`; outputs in evaluation are what they were."""
    import batchnorm as bn
    from batchnorm.surgery.rounding import Rounding

    def statistics() -> list[torch.Tensor]:
        return [b.clone() for name, b in net.named_buffers() if name.endswith(("running_mean", "running_var"))]

    kept = statistics()
    with torch.no_grad(), bn.no_update(net):
        given.run(net.train())
    if not all(torch.equal(a, b) for a, b in zip(kept, statistics(), strict=True)):
        raise AssertionError("no_update: running statistics moved")
    bn.set_mode(net, source="running", update="never")
    Rounding(before, given).compare(net.eval(), 1e-4, "modes")
    bn.set_mode(net, source="auto", update="auto")
    with torch.no_grad(), bn.accumulate(net):
        given.run(net.train())
        given.run(net)
    if all(torch.equal(a, b) for a, b in zip(kept, statistics(), strict=True)):
        raise AssertionError("accumulate: running statistics did not move")
    return {"outcome": "right"}


def run(path: Path, packages: list[str], limit: int | None, verbs: list[str], only: list[str] | None) -> None:
    done = {(r["package"], r["name"]): r for r in _read(path)} if path.exists() else {}
    for package in packages:
        try:
            models = list(SOURCES[package]())
        except Exception as error:
            print(f"{package}: {error}", file=sys.stderr)
            continue
        for name, make in models[:limit]:
            before = done.get((package, name), {})
            missing = [verb for verb in verbs if before.get(verb, {}).get("outcome", "too slow") == "too slow"]
            if not missing or (only is not None and name not in only) or _has_none(before):
                continue
            torch.manual_seed(0)
            row: dict[str, Any] = {"package": package, "name": name, "version": importlib.metadata.version(package)}
            row["dates"] = sorted({*before.get("dates", []), f"{datetime.date.today():%Y-%m-%d}"})
            try:
                net, example = make()
            except Exception as error:
                print(f"{package} {name}: cannot be built: {error}", file=sys.stderr)
                continue
            randomized(net)
            row |= {"summary": before.get("summary") or tried("summary", net, example)}
            if not _has_none(row):
                row |= {verb: tried(verb, net, example) for verb in missing if verb != "summary"}
            with path.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            print(package, name, {verb: row[verb]["outcome"] for verb in verbs if verb in row}, flush=True)


def _has_none(row: dict[str, Any]) -> bool:
    """Whether an architecture was found to have no batch norm."""
    return bool(row.get("summary", {}).get("outcome") == "none")


def _read(path: Path) -> list[dict[str, Any]]:
    """One row an architecture; what was tried again replaces what was found before."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        rows[row["package"], row["name"]] = {**rows.get((row["package"], row["name"]), {}), **row}
    return list(rows.values())


def _outcome(found: dict[str, Any]) -> str:
    """Code that catches every exception catches the limit of time, too."""
    reason = found.get("reason", "")
    late = found["outcome"] == "refused" and (not reason or "TooLongError" in reason or "took more than" in reason)
    return "too slow" if late else str(found["outcome"])


def _cell(verb: str, found: dict[str, Any] | None) -> str:
    if found is None:
        return "not run"
    if (outcome := _outcome(found)) != "right":
        return {"none": "-", "unchanged": "nothing to change"}.get(outcome, outcome)
    if verb == "fold":
        merged = f", {found['merged']} merged" if found["merged"] else ""
        return f"{found['folded']} of {found['folded'] + found['kept']}{merged}"
    if verb == "accelerate":
        return f"{found['fused']} fused, {found['swapped']} plain" + (
            f", {found['kept']} kept" if found["kept"] else ""
        )
    return str(found.get("layers", "yes"))


def _times(fold: dict[str, Any]) -> float:
    """How many times the larger of the network's own rounding and 2.5e-6 a fold is off; 0 where it was not made."""
    if "relative" in fold:
        return float(fold["relative"] / max(fold.get("rounding") or 0, 2.5e-6))
    return float(fold.get("times", 0))


def page(path: Path) -> str:
    """The page as Markdown."""
    rows = [row for row in _read(path) if row["summary"]["outcome"] == "right"]  # with batch norm
    counts = {verb: Counter(_outcome(row[verb]) for row in rows if verb in row) for verb in VERBS}
    worst = max(_times(row["fold"]) for row in rows if "fold" in row)
    versions = sorted({f"{row['package']} {row['version']}" for row in rows})
    dates = sorted({date for row in rows for date in row["dates"]})
    lines = [
        "# Other people's networks",
        "",
        f"{len(rows)} architectures of {len(versions)} packages were put through the verbs for networks, with random"
        f" weights and statistics and small inputs, on {' and '.join(dates)}, with torch"
        f" {torch.__version__}: "
        f"{', '.join(versions)}. `python docs/scripts/zoo.py` makes this page.",
        "",
        "A verb is *right* if the outputs in evaluation are what they were, up to four times the network's own"
        " rounding against float64, and 1e-5 of the largest value where that is more. `modes` is `no_update`,"
        " `set_mode` and `accumulate`, of which the first must leave running statistics and the last move them. The"
        f" largest difference of a folded network was {worst:.1f} times the larger of its rounding and 2.5e-6. *Too"
        " slow* is more than a minute"
        " (since, ten) on a machine that was busy with much else; *not run* was left out there.",
        "",
        "| verb | right | nothing to do | refused | too slow |",
        "| --- | --- | --- | --- | --- |",
    ]
    for verb, c in counts.items():
        lines.append(f"| {verb} | {c['right']} | {c['none'] + c['unchanged']} | {c['refused']} | {c['too slow']} |")
    for package in dict.fromkeys(row["package"] for row in rows):
        lines += [
            "",
            f"## {package}",
            "",
            "| architecture | " + " | ".join(VERBS) + " |",
            "| --- " * (len(VERBS) + 1) + "|",
        ]
        lines += [
            f"| {row['name']} | " + " | ".join(_cell(verb, row.get(verb)) for verb in VERBS) + " |"
            for row in rows
            if row["package"] == package
        ]
    lines += ["", "## Reasons", "", "What was refused, kept or left alone, and why, as the verbs tell it.", ""]
    for row in rows:
        for verb in VERBS:
            found = row.get(verb, {})
            reason = found.get("reason") or found.get("told")
            if reason and _outcome(found) != "too slow":
                text = " ".join(str(reason).split())
                text = text if len(text) <= 300 else f"{text[:300]} ..."
                lines.append(f"- {row['name']}, {verb}: {text.replace('|', '/').replace('<', '&lt;')}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("results", type=Path)
    parser.add_argument("--package", action="append", choices=PACKAGES)
    parser.add_argument("--limit", type=int, help="architectures of each package")
    parser.add_argument("--only", action="append", help="architectures by name; by default all")
    parser.add_argument("--verb", action="append", choices=VERBS, help="by default all")
    given = parser.parse_args()
    if given.what == "run":
        run(given.results, given.package or list(PACKAGES), given.limit, given.verb or list(VERBS), given.only)
    else:
        by_hand = "".join(PAGE.read_text().partition("\n## Try it")[1:])  # the end of the page
        PAGE.write_text(page(given.results) + by_hand)


if __name__ == "__main__":
    main()
