"""Detectors of Hugging Face transformers: every family through the same cases, tiny and built without a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from drkd.adapters.transformers import DetrBuilder, TransformersDetector, wrap_transformers
from drkd.adapters.transformers_labels import find_labels
from drkd.adapters.transformers_library import FAMILIES
from drkd.contracts import BoxTargets, DetectionBatch, DetectorOutput, DrkdError, Want

transformers = pytest.importorskip("transformers", minversion="5.24")

CLASSES = ("cat", "dog", "cup")
BACKBONE = {
    "model_type": "rt_detr_resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_indices": [2, 3, 4],
}
COMMON = {
    "backbone_config": BACKBONE,
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "decoder_layers": 2,
    "decoder_ffn_dim": 32,
    "decoder_attention_heads": 4,
    "num_queries": 30,
}
HYBRID = {
    **COMMON,
    "encoder_in_channels": [16, 24, 32],
    "encoder_hidden_dim": 32,
    "decoder_in_channels": [32, 32, 32],
    "num_denoising": 10,
}
FLAT = "deformable_detr"
KINDS = pytest.mark.parametrize("kind", list(FAMILIES))
FEATURES, LOSSES, BOTH = (frozenset[Want](want) for want in (["features"], ["losses"], ["features", "losses"]))
MIXED = [(64, 96), (96, 50)]


def tiny(kind: str, *, classes: tuple[str, ...] = CLASSES, seed: int = 0, **config: Any) -> TransformersDetector:
    torch.manual_seed(seed)
    entries = {**(COMMON if kind == FLAT else HYBRID), **config}
    return DetrBuilder(model_type=kind, config=entries).build(classes)  # type: ignore[arg-type]


def total(output: DetectorOutput) -> Tensor:
    return torch.stack([value.float() for value in output.losses.values()]).sum()


@KINDS
def test_features_lie_at_the_declared_strides(kind: str, make_batch: Callable[..., DetectionBatch]) -> None:
    detector = tiny(kind).eval()
    levels = detector.spec.levels
    assert [level.stride for level in levels] == ([8, 16, 32, 64] if kind == FLAT else [8, 16, 32])
    assert [level.name for level in levels] == ["p3", "p4", "p5", "p6"][: len(levels)]
    batch = make_batch([(128, 190), (100, 192)])
    with torch.no_grad():
        alone = detector(batch, want=FEATURES)
        both = detector(batch, want=BOTH)
    assert not alone.losses and both.losses
    for level, one, other in zip(levels, alone.features, both.features, strict=True):
        assert one.name == level.name and one.stride_y == one.stride_x == level.stride
        assert one.tensor.shape == (2, level.channels, 128 // level.stride, 192 // level.stride)
        torch.testing.assert_close(one.tensor, other.tensor)


@KINDS
def test_the_features_are_what_the_library_calls_the_encoders_output(
    kind: str, make_batch: Callable[..., DetectionBatch]
) -> None:
    detector = tiny(kind).eval()
    batch = make_batch([(64, 96), (96, 64)])
    encoder: Any = detector.model.model.encoder  # type: ignore[union-attr]
    seen = []
    with encoder.register_forward_hook(lambda module, args, output: seen.append(output[0])), torch.no_grad():
        detector(batch, want=LOSSES)
    maps = [level.tensor for level in detector(batch, want=FEATURES).features]
    if kind == FLAT:
        maps = [torch.cat([entry.flatten(2).transpose(1, 2) for entry in maps], dim=1)]
        seen = [seen]
    for ours, theirs in zip(maps, seen[0], strict=True):
        torch.testing.assert_close(ours, theirs)


@KINDS
def test_the_decoder_runs_for_losses_only(kind: str, make_batch: Callable[..., DetectionBatch]) -> None:
    detector = tiny(kind).eval()
    decoder: Any = detector.model.model.decoder  # type: ignore[union-attr]
    calls = []
    with decoder.register_forward_hook(lambda *args: calls.append(1)):
        detector(make_batch(MIXED), want=FEATURES)
        assert not calls
        detector(make_batch(MIXED), want=LOSSES)
    assert calls
    encoder: Any = detector.model.model.encoder  # type: ignore[union-attr]
    assert not encoder._forward_hooks, "the hook outlives the call"


@KINDS
def test_losses_sum_to_the_librarys(kind: str, make_batch: Callable[..., DetectionBatch]) -> None:
    detector = tiny(kind).train()
    batch = make_batch([(96, 128), (96, 128)])
    labels = []
    for target in batch.targets:
        corners = target.boxes / torch.tensor([128, 96, 128, 96])
        centre, sides = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
        labels.append({"class_labels": target.labels, "boxes": torch.cat([centre, sides], dim=1)})
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (detector.image_mean, detector.image_std))
    torch.manual_seed(1)  # denoising queries and dropout are drawn
    expected = detector.model(pixel_values=(batch.images - mean) / std, labels=labels)
    torch.manual_seed(1)
    output = detector(batch, want=BOTH)
    torch.testing.assert_close(total(output), expected.loss)
    assert len(output.losses) < len(expected.loss_dict)
    assert expected.loss_dict["loss_giou"] * (2.0 if kind == FLAT else 1.0) == output.losses["loss_giou"]


@KINDS
def test_the_task_reaches_every_level(kind: str, make_batch: Callable[..., DetectionBatch]) -> None:
    """Gradient balance is measured on the very tensors that the decoder reads."""
    output = tiny(kind).train()(make_batch(MIXED), want=BOTH)
    gradients = torch.autograd.grad(total(output), [level.tensor for level in output.features])
    assert all(float(gradient.norm()) > 0 for gradient in gradients)


@pytest.mark.slow
@KINDS
def test_losses_fall_over_twenty_steps_on_eight_images(kind: str, make_batch: Callable[..., DetectionBatch]) -> None:
    detector = tiny(kind).train()
    batch = make_batch([(64, 64), (64, 50), (40, 64), (64, 64)] * 2, boxes=2)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    values = []
    for _ in range(20):
        loss = total(detector(batch, want=LOSSES))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        values.append(float(loss.detach()))
    assert all(value < float("inf") for value in values)
    assert sum(values[-5:]) < 0.8 * sum(values[:5])


@KINDS
def test_every_parameter_is_used_with_boxes_and_without(kind: str, make_batch: Callable[..., DetectionBatch]) -> None:
    """What data-parallel training waits for, also when a process draws images without a box."""
    detector = tiny(kind).train()
    names = set()
    for boxes in (2, 0):
        detector.zero_grad()
        output = detector(make_batch(MIXED, boxes=boxes), want=LOSSES)
        total(output).backward()
        unused = [name for name, p in detector.named_parameters() if p.requires_grad and p.grad is None]
        assert not unused
        assert all(p.grad.isfinite().all() for p in detector.parameters() if p.grad is not None)
        names.add(tuple(sorted(output.losses)))
    names.add(tuple(sorted(detector.eval()(make_batch(MIXED), want=LOSSES).losses)))
    assert len(names) == 1, "names of losses depend on the batch or on the mode"


@KINDS
def test_a_box_means_the_same_whatever_the_padding(kind: str, make_batch: Callable[..., DetectionBatch]) -> None:
    """Labels are fractions of what the family's boxes are fractions of."""
    detector = tiny(kind)
    boxes = torch.tensor([[10.0, 20, 30, 60]])
    target = BoxTargets(boxes, torch.tensor([2]), torch.tensor([False]))
    batch = DetectionBatch(torch.rand(1, 3, 96, 128), ((80, 100),), ((80, 100),), (target,), (0,))
    (labels,) = detector._targets(batch)
    width, height = (100, 80) if kind == FLAT else (128, 96)
    expected = torch.tensor([[20 / width, 40 / height, 20 / width, 40 / height]])
    torch.testing.assert_close(labels["boxes"], expected)
    assert labels["class_labels"].tolist() == [2]


@KINDS
def test_detected_boxes_are_in_pixels_of_the_original(kind: str) -> None:
    """A model that always answers one box at a known place, in a padded and enlarged image that is no square."""
    detector = tiny(kind).eval()
    original, size, padded = (120, 200), (60, 100), (64, 128)
    frame = size if kind == FLAT else padded
    box = torch.tensor([10.0, 20.0, 50.0, 40.0])  # px of the batch
    fractions = torch.tensor([30.0 / frame[1], 30.0 / frame[0], 40.0 / frame[1], 20.0 / frame[0]])

    def answer(module: Any, args: Any, output: Any) -> Any:
        output.pred_boxes = fractions.expand_as(output.pred_boxes)
        output.logits = output.logits - 20
        output.logits[0, 7, 1] = 5.0
        return output

    target = BoxTargets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    batch = DetectionBatch(torch.rand(1, 3, *padded), (size,), (original,), (target,), (0,))
    with detector.model.register_forward_hook(answer):
        (found,) = detector.detect(batch)
    torch.testing.assert_close(found.boxes[0], 2 * box)
    assert found.labels[0] == 1 and found.scores[0] > 0.9
    assert (found.scores[:-1] >= found.scores[1:]).all() and len(found.boxes) <= 100


@KINDS
def test_detect_keeps_to_the_image_and_needs_eval_mode(kind: str, make_batch: Callable[..., DetectionBatch]) -> None:
    detector = tiny(kind)
    batch = make_batch(MIXED, original_sizes=[(32, 48), (192, 100)])
    with pytest.raises(ValueError, match="eval mode"):
        detector.train().detect(batch)
    for found, (height, width) in zip(detector.eval().detect(batch), batch.original_sizes, strict=True):
        assert len(found.boxes) > 0 and found.labels.max() < len(CLASSES)
        assert found.boxes.min() >= 0
        assert found.boxes[:, 2].max() <= width and found.boxes[:, 3].max() <= height


@KINDS
def test_padding_is_black_whatever_the_batch_holds_there(kind: str, make_batch: Callable[..., DetectionBatch]) -> None:
    detector = tiny(kind).eval()
    batch = make_batch([(50, 70)])
    noisy = batch.images.clone()
    noisy[:, :, 50:] = 0.7
    noisy[:, :, :, 70:] = 0.7
    again = DetectionBatch(noisy, batch.sizes, batch.original_sizes, batch.targets, batch.image_ids)
    with torch.no_grad():
        one, other = (detector(entry, want=FEATURES).features for entry in (batch, again))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.tensor, b.tensor)


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(kind: str, dtype: torch.dtype, make_batch: Callable[..., DetectionBatch]) -> None:
    detector = tiny(kind).train()
    batch = make_batch([(96, 96)])
    with torch.autocast("cpu", dtype=dtype):
        loss = total(detector(batch, want=BOTH))
        detector.eval()
        (found,) = detector.detect(batch)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert found.boxes.dtype == torch.float32 and found.boxes.isfinite().all()


@KINDS
def test_validation_without_autograd_leaves_nothing_behind(
    kind: str, make_batch: Callable[..., DetectionBatch]
) -> None:
    """The library caches positions and anchors by size; those made under inference_mode must not reach training."""
    detector = tiny(kind)
    batch = make_batch([(96, 160)])
    with torch.inference_mode():
        detector.eval().detect(batch)
    total(detector.train()(batch, want=LOSSES)).backward()


@KINDS
def test_ignored_boxes_train_nothing(kind: str, make_batch: Callable[..., DetectionBatch]) -> None:
    detector = tiny(kind).eval()
    batch = make_batch([(96, 96)], boxes=3)
    (target,) = batch.targets
    first = BoxTargets(target.boxes[:1], target.labels[:1], target.ignore[:1])
    marked = BoxTargets(target.boxes, target.labels, torch.tensor([False, True, True]))
    values = [
        total(detector(DetectionBatch(batch.images, batch.sizes, batch.sizes, (entry,), (0,)), want=LOSSES))
        for entry in (first, marked, target)
    ]
    torch.testing.assert_close(values[0], values[1])
    assert not torch.isclose(values[0], values[2])


@KINDS
def test_the_wrapper_adds_nothing_to_the_model(kind: str, make_batch: Callable[..., DetectionBatch]) -> None:
    detector = tiny(kind)
    plain = transformers.AutoModelForObjectDetection.from_config(detector.model.config)
    assert set(plain.state_dict()) == set(detector.model.state_dict())
    assert {f"model.{name}" for name in plain.state_dict()} == set(detector.state_dict())
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in detector.model.named_parameters()}
    detector.requires_grad_(False).eval()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    with torch.no_grad():
        detector(make_batch(MIXED), want=FEATURES)
    for name, value in detector.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_wrapping_leaves_modes_and_statistics_alone() -> None:
    model = tiny("rt_detr").model.train()
    model.model.encoder.eval()  # type: ignore[union-attr]
    modes = [part.training for part in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrap_transformers(model)
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_normalisation_is_the_image_processors() -> None:
    plain, normalised = tiny("rt_detr"), tiny(FLAT)
    assert plain.image_mean == [0, 0, 0] and plain.image_std == [1, 1, 1]
    assert normalised.image_mean == pytest.approx([0.485, 0.456, 0.406])
    assert normalised.image_std == pytest.approx([0.229, 0.224, 0.225])
    picture = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    for processor in (
        transformers.RTDetrImageProcessor(do_resize=False, do_normalize=True),
        transformers.DeformableDetrImageProcessor(do_resize=False, do_pad=False),
        transformers.RTDetrImageProcessor(do_resize=False, do_rescale=False),
    ):
        detector = wrap_transformers(plain.model, image_processor=processor)
        batch = DetectionBatch.from_lists(
            [picture / 255], [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]
        )
        expected = processor(images=picture, return_tensors="pt")["pixel_values"].float()
        torch.testing.assert_close(
            detector._inputs(batch, decode=False)["pixel_values"], expected, atol=1e-4, rtol=1e-4
        )


def test_labels_round_trip(make_batch: Callable[..., DetectionBatch]) -> None:
    model = tiny("rt_detr").model
    detector = wrap_transformers(model, ["cup", "cat"]).eval()
    assert detector.label_ids == (2, 0) and not detector.missing_classes
    batch = make_batch([(64, 64)], boxes=2)
    assert detector._targets(batch)[0]["class_labels"].tolist() == [2, 0]
    ours, theirs = detector.detect(batch)[0], wrap_transformers(model).eval().detect(batch)[0]
    kept = theirs.labels != 1
    count = int(kept.sum())
    assert ours.labels[:count].tolist() == [{2: 0, 0: 1}[label] for label in theirs.labels[kept].tolist()]
    torch.testing.assert_close(ours.boxes[:count], theirs.boxes[kept])
    torch.testing.assert_close(ours.scores[:count], theirs.scores[kept])
    # In the places of the class that was not asked for are the next best, below all that there were.
    assert len(ours.scores) == len(theirs.scores) and ours.scores[count:].max() <= theirs.scores.min()


def test_a_class_that_the_model_lacks_still_teaches(make_batch: Callable[..., DetectionBatch]) -> None:
    model: Any = tiny("rt_detr").model
    for layer in model.model.decoder.class_embed:
        torch.nn.init.constant_(layer.bias[:1], 5.0)
    detector = wrap_transformers(model, ["cat", "bird"]).eval()
    assert detector.missing_classes == ("bird",)
    batch = make_batch([(64, 64)], boxes=1)
    assert len(detector(batch, want=FEATURES).features) == 3
    assert set(detector.detect(batch)[0].labels.tolist()) == {0}
    with pytest.raises(ValueError, match="no output for \\['bird'\\]"):
        detector(batch, want=LOSSES)


def test_class_names_are_found_as_people_write_them() -> None:
    published = {0: "person", 1: "motorbike", 2: "sofa", 3: "tvmonitor", 4: "pottedplant", 5: "N/A", 6: "aeroplane"}
    names = ["couch", "Potted Plant", "tv", "motorcycle", "airplane", "person", "zebra"]
    assert find_labels(published, names, source="x") == [2, 4, 3, 1, 6, 0, -1]
    assert find_labels({0: "LABEL_0", 1: "LABEL_1"}, ["b", "a"], source="x") == [0, 1]
    with pytest.raises(DrkdError, match=r"x: none of the classes zebra is among the model's 6 \(person"):
        find_labels(published, ["zebra"], source="x")
    assert wrap_transformers(tiny("rt_detr").model).spec.class_names == CLASSES


def test_what_cannot_be_wanted_or_wrapped_is_said(make_batch: Callable[..., DetectionBatch]) -> None:
    detector = tiny("rt_detr")
    with pytest.raises(ValueError, match=r"expected any of \['features', 'losses'\].*predictions"):
        detector(make_batch([(64, 64)]), want=frozenset[Want]({"predictions"}))
    assert detector(make_batch([(64, 64)]), want=frozenset()) == DetectorOutput()
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}
    odd = DetectionBatch.from_lists([torch.rand(3, 40, 64)], [nothing], size_divisor=8)
    with pytest.raises(DrkdError, match="multiples of 32 px"):
        detector(odd, want=FEATURES)
    with pytest.raises(DrkdError, match=r"at least 30 places .* got 21 \(32 x 32 px\)"):
        detector(make_batch([(32, 32)]), want=LOSSES)
    assert len(detector.eval()(make_batch([(32, 32)]), want=FEATURES).features) == 3
    with pytest.raises(ValueError, match=r"expected a \.\.\.ForObjectDetection model of transformers"):
        wrap_transformers(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="one label below 3 for each of 1"):
        TransformersDetector(detector.model, ["cat"], label_ids=[3])
    detector.model.config.anchor_image_size = [640, 640]
    with pytest.raises(ValueError, match="anchor_image_size = None"):
        wrap_transformers(detector.model)


def test_a_missing_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from drkd.adapters import transformers_library

    real = transformers_library.importlib.import_module

    def refuse(name: str, package: str | None = None) -> Any:
        if name == "transformers":
            raise ImportError("No module named 'transformers'")
        return real(name, package)

    monkeypatch.setattr(transformers_library.importlib, "import_module", refuse)
    with pytest.raises(DrkdError, match=r"pip install 'drkd\[transformers\]'"):
        DetrBuilder().build(CLASSES)


@KINDS
def test_classes_that_nobody_asked_for_take_no_places(kind: str, make_batch: Callable[..., DetectionBatch]) -> None:
    detector = tiny(kind).eval()
    batch = make_batch([(96, 96), (80, 64)])
    raw: dict[str, torch.Tensor] = {}
    hook = detector.model.register_forward_hook(lambda _module, _inputs, output: raw.update(logits=output.logits))
    detector.detect(batch)
    hook.remove()
    only = TransformersDetector(detector.model, ["cup"], label_ids=[2], detections_per_image=4).eval().detect(batch)
    for entry, logits in zip(only, raw["logits"], strict=True):
        torch.testing.assert_close(entry.scores, logits[:, 2].sigmoid().sort(descending=True).values[:4])
