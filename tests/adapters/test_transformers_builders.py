"""Building transformers detectors from configurations, names and folders; saving them and loading them without drkd."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from drkd.adapters import DetrBuilder, PretrainedDetrBuilder, SavedDetectorBuilder, load_detector, save_student
from drkd.adapters.transformers import TransformersDetector, wrap_transformers
from drkd.adapters.transformers_backbone import backbone_of
from drkd.adapters.transformers_library import build_model
from drkd.adapters.transformers_start import draw_start
from drkd.adapters.weights import shipped_checkpoint
from drkd.contracts import DetectionBatch, DrkdError, Want

transformers = pytest.importorskip("transformers", minversion="5.24")

CLASSES = ("cat", "dog", "cup")
SETTINGS = {"min_size": 64, "max_size": 96, "size_divisor": 32}
SMALL: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_layers": 2,
    "decoder_ffn_dim": 32,
    "num_queries": 20,
}
HYBRID = {**SMALL, "encoder_hidden_dim": 32, "decoder_in_channels": [32, 32, 32], "num_denoising": 5}
TIMM = "timm/resnet10t"
FEATURES = frozenset[Want]({"features"})


def small(kind: str = "rt_detr", **options: Any) -> TransformersDetector:
    torch.manual_seed(0)
    config = {**(SMALL if kind == "deformable_detr" else HYBRID), **options.pop("config", {})}
    options = {"backbone": TIMM, **options}
    return DetrBuilder(model_type=kind, config=config, **options).build(CLASSES)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the Hub has it: COCO's names as RT-DETR's authors wrote them, with an image processor. Read only."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub") / "model"
    names = ("person", "sofa", "aeroplane", "cup")
    model = DetrBuilder(backbone=TIMM, config=HYBRID).build(names).model
    model.save_pretrained(folder)  # type: ignore[operator]
    transformers.RTDetrImageProcessor(do_normalize=True, image_mean=[0.4] * 3, image_std=[0.2] * 3).save_pretrained(
        folder
    )
    return folder


def detections(detector: TransformersDetector, batch: DetectionBatch) -> list[torch.Tensor]:
    return [value for found in detector.eval().detect(batch) for value in (found.boxes, found.scores, found.labels)]


@pytest.mark.parametrize("kind", ["rt_detr", "rt_detr_v2", "d_fine", "deformable_detr"])
def test_a_timm_backbone_of_random_weights_is_trained_whole(kind: str) -> None:
    detector = small(kind)
    model: Any = detector.model
    assert [level.stride for level in detector.spec.levels][:3] == [8, 16, 32]
    assert all(parameter.requires_grad for parameter in model.model.backbone.parameters())
    norms = [m for m in model.model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert bool(norms) == (kind != "deformable_detr")
    assert model.config.id2label == dict(enumerate(CLASSES)) and model.config.label2id["dog"] == 1
    assert detector.spec.class_names == CLASSES and detector.label_ids == (0, 1, 2)


def test_resnets_of_rt_detr_by_name() -> None:
    detector = small(backbone="resnet18")
    config: Any = detector.model.config
    assert config.backbone_config.model_type == "rt_detr_resnet"
    assert list(config.encoder_in_channels) == [128, 256, 512]


def test_backbone_weights_bring_their_normalisation_and_the_librarys_freezing(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(3)
    network = timm.create_model("resnet10t")
    torch.save(network.state_dict(), tmp_path / "backbone.pt")
    detector = small(backbone_weights=str(tmp_path / "backbone.pt"))
    model: Any = detector.model
    body = model.model.backbone.model._backbone
    assert torch.equal(body.layer2[0].conv1.weight, network.layer2[0].conv1.weight)
    assert detector.image_mean == pytest.approx(list(network.pretrained_cfg["mean"]))
    assert not [m for m in body.modules() if type(m) is torch.nn.BatchNorm2d], "RT-DETR freezes batch norms"
    assert small().image_mean == [0, 0, 0]
    save_student(tmp_path / "student.pt", detector, builder=None, image_settings=SETTINGS)
    again: Any = small(backbone_weights=str(tmp_path / "student.pt")).model
    other = again.model.backbone.model._backbone.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in body.state_dict().items())
    shipped: Any = small(backbone="timm/tf_efficientnet_lite0", backbone_weights="drkd:digits_faster_rcnn").model
    first = shipped.model.backbone.model._backbone.blocks[1][0].conv_pw.weight
    source = torch.load(shipped_checkpoint("drkd:digits_faster_rcnn"), weights_only=True)["state_dict"]
    torch.testing.assert_close(first, source["backbone.body.blocks_1.0.conv_pw.weight"].float())
    with pytest.raises(DrkdError, match="whose names no classifier's file has"):
        small(backbone="resnet18", backbone_weights=str(tmp_path / "backbone.pt"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(DrkdError, match=r"other\.pt: the weights are those of another model"):
        small(backbone_weights=str(tmp_path / "other.pt"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model_type": "detr"}, "multi-scale encoder.*got 'detr'"),
        ({"backbone": "resnet19"}, "backbone: expected one of resnet18"),
        ({"backbone": "timm/no_such_net"}, "has no model named 'no_such_net'"),
        ({"backbone": "timm/vit_tiny_patch16_224"}, "strides .* px, expected \\[8, 16, 32\\]"),
        ({"backbone": TIMM, "config": {"backbone_config": {}}}, "got both"),
        ({"model_type": "deformable_detr", "config": {"two_stage": True}}, "two_stage: .* would stay random"),
        ({"backbone_weights": "imagenet"}, "expected a backbone of timm"),
        ({"config": {"num_queries": "many"}}, "config: transformers .* builds no rt_detr of this .*num_queries"),
        ({"config": {"num_querys": 3}}, "no entry 'num_querys'. Did you mean 'num_queries'"),
        ({"backbone": TIMM, "config": HYBRID, "weights": "no_such.pt"}, "no_such.pt: no such checkpoint"),
    ],
)
def test_what_cannot_be_built_is_said(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(DrkdError, match=expected):
        DetrBuilder(**options).build(CLASSES)
    with pytest.raises(DrkdError, match="at least one class"):
        DetrBuilder().build([])


def test_weights_bring_the_normalisation_that_they_were_trained_with(tmp_path: Path) -> None:
    import timm

    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "backbone.pt")
    first, file = small(backbone_weights=str(tmp_path / "backbone.pt")), tmp_path / "student.pt"
    save_student(file, first, builder=None, image_settings=SETTINGS)
    second = small(weights=str(file))
    assert (second.image_mean, second.image_std) == (first.image_mean, first.image_std) != ([0] * 3, [1] * 3)
    assert small(weights=str(file), image_mean=(0.1, 0.2, 0.3)).image_mean == pytest.approx([0.1, 0.2, 0.3])
    content = torch.load(file, weights_only=True)
    torch.save(content["state_dict"], tmp_path / "bare.pt")
    assert small(weights=str(tmp_path / "bare.pt")).image_mean == [0, 0, 0]
    for name, values in (("mean", "grey"), ("std", [0.2, 0.0, 0.2])):
        torch.save({**content, "preprocessing": {**content["preprocessing"], name: values}}, tmp_path / "bad.pt")
        with pytest.raises(DrkdError, match=rf"bad\.pt: preprocessing\.{name}: expected three numbers"):
            small(weights=str(tmp_path / "bad.pt"))


def test_a_folder_keeps_its_classes_and_its_processor(
    published: Path, make_batch: Callable[..., DetectionBatch]
) -> None:
    detector = PretrainedDetrBuilder(name=str(published)).build(["airplane", "couch", "zebra"])
    assert detector.label_ids == (2, 1, -1) and detector.missing_classes == ("zebra",)
    assert detector.image_mean == pytest.approx([0.4] * 3) and detector.image_std == pytest.approx([0.2] * 3)
    plain = transformers.AutoModelForObjectDetection.from_pretrained(published)
    batch = make_batch([(64, 96)])
    theirs = wrap_transformers(plain, image_processor=transformers.AutoImageProcessor.from_pretrained(published))
    for one, other in zip(
        detector.eval()(batch, want=FEATURES).features, theirs.eval()(batch, want=FEATURES).features, strict=True
    ):
        torch.testing.assert_close(one.tensor, other.tensor)


def test_a_new_head_keeps_everything_else(published: Path) -> None:
    detector = PretrainedDetrBuilder(name=str(published), head="new", config={"num_denoising": 7}).build(CLASSES)
    assert detector.spec.class_names == CLASSES and not detector.missing_classes
    model: Any = detector.model
    plain = transformers.AutoModelForObjectDetection.from_pretrained(published).state_dict()
    state = model.state_dict()
    changed = {
        name for name, value in state.items() if value.shape != plain[name].shape or not torch.equal(value, plain[name])
    }
    assert changed and all("class" in name or "score" in name for name in changed)
    assert model.config.num_labels == 3 and model.config.num_denoising == 7


def test_a_teacher_with_a_new_head_is_refused_where_it_would_be_random(published: Path) -> None:
    builder = PretrainedDetrBuilder(name=str(published), head="new")
    advice = r"classes, or head: own, which finds those that it knows\.$"
    with pytest.raises(DrkdError, match=rf"the layers that name the 3 classes would be new \(.*class_embed.*{advice}"):
        builder.build_teacher(CLASSES)
    with pytest.raises(DrkdError, match=r"called a, b, c, d, and they mean others\. It knows 4 classes .* classes\.$"):
        builder.build_teacher(["a", "b", "c", "d"])
    config = published / "config.json"
    own = json.loads(config.read_text())["id2label"]
    with pytest.raises(DrkdError, match=f"they mean others.*{advice}"):
        builder.build_teacher([*reversed(own.values())])
    same = builder.build_teacher([*own.values()])
    plain = transformers.AutoModelForObjectDetection.from_pretrained(published).state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in same.model.state_dict().items())
    assert PretrainedDetrBuilder(name=str(published)).build_teacher(["couch"]).label_ids == (1,)


def test_a_student_keeps_what_the_outputs_of_as_many_classes_mean(published: Path) -> None:
    builder = PretrainedDetrBuilder(name=str(published), head="new")
    student = builder.build(["cup", "airplane", "couch", "person"])
    assert student.label_ids == (3, 2, 1, 0)
    model: Any = student.model
    assert model.config.id2label == {0: "person", 1: "couch", 2: "airplane", 3: "cup"}
    with pytest.warns(UserWarning, match=r"begin as those of its own \(person, sofa, aeroplane, cup\)"):
        assert builder.build(["a", "b", "c", "d"]).label_ids == (0, 1, 2, 3)


def test_a_folder_that_does_not_hold_its_model_is_refused(published: Path, tmp_path: Path) -> None:
    with pytest.raises(DrkdError, match="none of the classes zebra"):
        PretrainedDetrBuilder(name=str(published)).build(["zebra"])
    with pytest.raises(DrkdError, match=r"expected a folder with config\.json"):
        PretrainedDetrBuilder(name=str(tmp_path / "absent"))
    with pytest.raises(DrkdError, match=r"not loaded\. Expected a folder with config\.json"):
        PretrainedDetrBuilder(name=str(tmp_path)).build(["cup"])
    folder = tmp_path / "deeper"
    shutil.copytree(published, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "decoder_layers": 3}))
    with pytest.raises(DrkdError, match=r"those of another model than its config.json describes: \d+ missing"):
        PretrainedDetrBuilder(name=str(folder)).build(["cup"])
    (folder / "config.json").write_text(json.dumps({"model_type": "detr"}))
    with pytest.raises(DrkdError, match="got 'detr'"):
        PretrainedDetrBuilder(name=str(folder)).build(["cup"])


def test_a_pickle_is_never_loaded(published: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(published, folder)
    (folder / "model.safetensors").unlink()
    model = transformers.AutoModelForObjectDetection.from_pretrained(published)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(DrkdError, match="safetensors"):
        PretrainedDetrBuilder(name=str(folder)).build(["cup"])


@pytest.mark.parametrize("kind", ["rt_detr", "rt_detr_v2", "d_fine", "deimv2", "deformable_detr"])
def test_saved_and_loaded(kind: str, tmp_path: Path, make_batch: Callable[..., DetectionBatch]) -> None:
    detector = small(kind, image_mean=(0.5, 0.4, 0.3), detections_per_image=7)
    save_student(tmp_path / "student.pt", detector, builder=None, image_settings=SETTINGS)
    batch = make_batch([(64, 96), (90, 50)])
    again = load_detector(tmp_path / "student.pt")
    assert isinstance(again, TransformersDetector) and not again.training
    for one, other in zip(detections(detector, batch), detections(again, batch), strict=True):
        torch.testing.assert_close(one, other)
    turned = SavedDetectorBuilder(path=str(tmp_path / "student.pt")).build(("cup", "cat", "dog"))
    ours, theirs = turned.detect(batch)[0], again.detect(batch)[0]
    assert ours.labels.tolist() == [{0: 1, 1: 2, 2: 0}[label] for label in theirs.labels.tolist()]
    with pytest.raises(DrkdError, match="knows 3 classes"):
        load_detector(tmp_path / "student.pt", class_names=["cat", "cow", "cup"])


def test_saved_again_by_a_run_that_loaded_it(tmp_path: Path) -> None:
    detector = small()
    save_student(tmp_path / "a.pt", detector, builder=None, image_settings=SETTINGS, half=True)
    builder = SavedDetectorBuilder(path=str(tmp_path / "a.pt"))
    save_student(tmp_path / "b.pt", builder.build(CLASSES), builder=builder, image_settings=SETTINGS)
    assert load_detector(tmp_path / "b.pt").spec == detector.spec


def test_the_file_loads_without_drkd(tmp_path: Path, make_batch: Callable[..., DetectionBatch]) -> None:
    detector = small("rt_detr").eval()
    save_student(tmp_path / "student.pt", detector, builder=None, image_settings=SETTINGS)
    saved = torch.load(tmp_path / "student.pt", weights_only=True)
    assert saved["preprocessing"] == {"mean": [0.0] * 3, "std": [1.0] * 3, "color": "RGB", **SETTINGS}
    assert saved["class_names"] == list(CLASSES) and saved["label_ids"] == [0, 1, 2]
    image = make_batch([(64, 96)]).images
    torch.save(image, tmp_path / "image.pt")
    check = (
        "import sys\nsys.modules['drkd'] = None\n" + saved["code"] + "image = torch.load('image.pt')\n"
        "with torch.no_grad():\n    out = model(pixel_values=image)\n"
        "torch.save([out.logits, out.pred_boxes, model.config.id2label], 'out.pt')\n"
    )
    subprocess.run([sys.executable, "-c", check], cwd=tmp_path, check=True, timeout=300)
    logits, boxes, names = torch.load(tmp_path / "out.pt", weights_only=True)
    model: Any = detector.model
    with torch.no_grad():
        expected = model(pixel_values=image)
    torch.testing.assert_close(logits, expected.logits)
    torch.testing.assert_close(boxes, expected.pred_boxes)
    assert names == dict(enumerate(CLASSES))


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    save_student(tmp_path / "student.pt", small(), builder=None, image_settings=SETTINGS)
    content = torch.load(tmp_path / "student.pt", weights_only=True)
    del content["state_dict"]["model.enc_score_head.bias"]
    torch.save(content, tmp_path / "short.pt")
    with pytest.raises(DrkdError, match=r"short.pt.*1 missing: model.enc_score_head.bias"):
        load_detector(tmp_path / "short.pt")
    content["build"]["config"]["d_model"] = "wide"
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(DrkdError, match=r"other.pt .saved with transformers .* builds no rt_detr"):
        load_detector(tmp_path / "other.pt")


@pytest.mark.parametrize(("name", "value"), [("score_threshold", 2), ("detections_per_image", None)])
def test_options_out_of_range_are_named_with_the_file(name: str, value: Any, tmp_path: Path) -> None:
    detector = small()
    with pytest.raises(DrkdError, match=f"^{name}: expected"):
        TransformersDetector(detector.model, CLASSES, label_ids=range(3), **{name: value})
    save_student(tmp_path / "student.pt", detector, builder=None, image_settings=SETTINGS)
    content = torch.load(tmp_path / "student.pt", weights_only=True)
    content["build"]["detection"][name] = value
    torch.save(content, tmp_path / "student.pt")
    with pytest.raises(DrkdError, match=f"student.pt: {name}: expected"):
        load_detector(tmp_path / "student.pt")


def test_a_files_configuration_runs_no_code_and_looks_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        pytest.fail("Expected neither a question nor a look-up")

    monkeypatch.setattr("builtins.input", never)
    monkeypatch.setattr("socket.socket.connect", never)
    monkeypatch.setattr("transformers.models.auto.auto_factory.resolve_trust_remote_code", never)
    save_student(tmp_path / "good.pt", small(), builder=None, image_settings=SETTINGS)
    content = torch.load(tmp_path / "good.pt", weights_only=True)
    config = content["build"]["config"]
    elsewhere = {
        "auto_map": {"AutoBackbone": "some/one--code.Body", "AutoModelForObjectDetection": "some/one--code.Model"},
        "name_or_path": "some/one",
        "attn_implementation": "some/kernels",
        "_attn_implementation": "some/kernels",
        "quantization_config": {"quant_method": "bitsandbytes"},
    }
    config.update({**elsewhere, "backbone": "some/one", "use_pretrained_backbone": True})
    config["backbone_config"].update(elsewhere)
    torch.save(content, tmp_path / "harmless.pt")
    rebuilt: Any = load_detector(tmp_path / "harmless.pt").model
    for part in (rebuilt.config, rebuilt.config.backbone_config):
        assert not hasattr(part, "auto_map") and not hasattr(part, "quantization_config")
    for name in ("hf-hub:some/one", "local-dir:/tmp", "some/one", 7):
        config["backbone_config"]["backbone"] = name
        torch.save(content, tmp_path / "bad.pt")
        with pytest.raises(DrkdError, match=r"bad\.pt: its configuration has the backbone"):
            load_detector(tmp_path / "bad.pt")
    config["backbone_config"] = {"model_type": "bert"}
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(DrkdError, match=r"bad\.pt: .*a part of the type 'bert', which is no backbone"):
        load_detector(tmp_path / "bad.pt")
    content["build"]["family"] = "yolos"
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(DrkdError, match=r"bad\.pt: expected a detector with a multi-scale encoder"):
        load_detector(tmp_path / "bad.pt")


@pytest.mark.parametrize("kind", ["rt_detr", "rt_detr_v2"])
def test_a_new_detector_starts_with_features_of_ordinary_size(kind: str) -> None:
    """The library leaves them a thousandth of that, and such a detector hardly learns."""

    def size_of(detector: Any) -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            maps = detector.train().model(torch.rand(2, 3, 64, 64)).encoder_last_hidden_state
        return float(maps[0].std())

    started = small(kind, backbone=TIMM)
    assert size_of(started.model) > 0.3
    entries = started.model.config.to_dict()
    del entries["model_type"]
    torch.manual_seed(0)
    left = build_model(kind, entries, source="config")
    assert size_of(left) < 0.01
    assert draw_start(left, backbone=True) > 50 and size_of(left) > 0.3


@pytest.mark.parametrize("kind", ["d_fine", "deimv2", "deformable_detr"])
def test_layers_that_the_library_left_small_are_drawn_again(kind: str) -> None:
    torch.manual_seed(0)
    left = build_model(kind, {"num_labels": 3}, source="config")
    before = {name: value.clone() for name, value in left.state_dict().items()}
    assert draw_start(left, backbone=True) > 50
    after = left.state_dict()
    query = next(name for name in after if name.endswith("decoder.layers.0.self_attn.q_proj.weight"))
    assert after[query].std() > 2 * before[query].std()
    meant = next(name for name in after if name.endswith("decoder.layers.0.encoder_attn.sampling_offsets.bias"))
    assert torch.equal(before[meant], after[meant])
    body = [name for name in after if re.match(r"model\.(backbone|conv_encoder)\.model\.", name)]
    assert len(body) > 20
    opened = [name for name in body if not torch.equal(before[name], after[name])]
    # Deformable DETR freezes norms that timm left at zero: nothing would ever come through those branches.
    assert bool(opened) == (kind == "deformable_detr")
    assert all(name.endswith(".weight") and before[name].abs().max() == 0 and after[name].min() == 1 for name in opened)
    torch.manual_seed(0)
    weighted = build_model(kind, {"num_labels": 3}, source="config")
    draw_start(weighted, backbone=False)
    assert all(torch.equal(before[name], weighted.state_dict()[name]) for name in body)


@pytest.mark.parametrize("kind", ["rt_detr", "d_fine", "deimv2"])
def test_the_first_boxes_of_a_new_detector_are_its_anchors(kind: str) -> None:
    detector: Any = small(kind, backbone=TIMM).model
    with torch.no_grad():
        found = detector.train().model(torch.rand(2, 3, 64, 64))
    # Of one level all anchors have one size: 0.05 of the image, doubled with every level.
    sizes = found.enc_topk_bboxes[..., 2:]
    levels = torch.tensor([0.05, 0.1, 0.2])
    assert (sizes.unsqueeze(-1) - levels).abs().amin(dim=-1).max() < 1e-4


def test_a_new_deformable_detr_has_its_authors_queries_and_priors() -> None:
    model: Any = small("deformable_detr", backbone="resnet18").model
    assert 0.8 < float(model.model.query_position_embeddings.weight.std()) < 1.2
    assert all(torch.allclose(layer.bias.sigmoid(), torch.tensor(0.01)) for layer in model.class_embed)
    assert model.bbox_embed[0].layers[-1].bias.tolist() == [0.0, 0.0, -2.0, -2.0]


def test_batch_norms_that_hold_activations_are_not_frozen_away(tmp_path: Path) -> None:
    """Transformers puts a bare frozen norm in their place: the network would be all but linear."""
    import timm

    name = "timm/mobilenetv3_small_050"
    torch.manual_seed(0)
    network: Any = timm.create_model("mobilenetv3_small_050", features_only=True).eval()
    torch.save(network.state_dict(), tmp_path / "body.pt")
    detector = small(backbone=name, backbone_weights=str(tmp_path / "body.pt")).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found = backbone_of(detector.model).model(images).feature_maps
        expected = network(images)[-3:]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert small(backbone=TIMM, backbone_weights=None).model.config.freeze_backbone_batch_norms is False
    with pytest.raises(DrkdError, match=r"mobilenetv3_small_050 hold the activations.*Set config\.freeze"):
        small(backbone=name, config={"freeze_backbone_batch_norms": True})
    with pytest.raises(DrkdError, match="Deformable DETR always freezes"):
        small("deformable_detr", backbone=name)
    raw = {"model_type": "timm_backbone", "backbone": "mobilenetv3_small_050", "out_indices": [2, 3, 4]}
    with pytest.raises(DrkdError, match=r"norms of config\.backbone_config hold"):
        DetrBuilder(model_type="deformable_detr", config={"backbone_config": raw}).build(CLASSES)
