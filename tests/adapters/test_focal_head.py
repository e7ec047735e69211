"""The focal head: torchvision's numbers at torchvision's constants, and harmless to whoever loads the student."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models.detection.retinanet import RetinaNetClassificationHead

from drkd.adapters import RetinaNetBuilder, load_detector, save_student
from drkd.adapters.focal_head import FocalClassificationHead


@pytest.mark.parametrize("counts", [(2, 0, 3), (0, 0, 0)])
def test_it_equals_torchvisions_loss(counts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    head = FocalClassificationHead(8, 2, 5)
    logits = torch.randn(3, 12, 5, dtype=torch.float64, requires_grad=True)
    targets = [{"labels": torch.randint(0, 5, (count,))} for count in counts]
    matched = [torch.randint(-2, count, (12,)) for count in counts]
    ours = head.compute_loss(targets, {"cls_logits": logits}, matched)
    plain = RetinaNetClassificationHead.compute_loss(head, targets, {"cls_logits": logits}, matched)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    (one,) = torch.autograd.grad(ours, logits)
    (two,) = torch.autograd.grad(plain, logits)
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_gamma_zero_is_cross_entropy() -> None:
    head = FocalClassificationHead(8, 1, 2, alpha=0.5, gamma=0.0)
    logits = torch.tensor([[[2.0, -1.0], [0.5, 0.0]]])
    loss = head.compute_loss([{"labels": torch.tensor([1])}], {"cls_logits": logits}, [torch.tensor([0, -1])])
    truth = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    expected = 0.5 * torch.nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
    torch.testing.assert_close(loss, expected)


def test_the_model_keeps_its_names_and_outputs() -> None:
    plain = RetinaNetBuilder(width=0.25, fpn_channels=32, extra="none", head_norm="group").build(["a", "b"])
    focal = RetinaNetBuilder(
        width=0.25, fpn_channels=32, extra="none", head_norm="group", focal_gamma=0.5, focal_alpha=0.5
    ).build(["a", "b"])
    focal.load_state_dict(plain.state_dict())
    image = [torch.rand(3, 64, 64)]
    plain.eval(), focal.eval()
    with torch.no_grad():
        ours, theirs = focal.model(image)[0], plain.model(image)[0]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("head_norm", ["none", "group"])
def test_the_builder_trains_with_its_constants(tmp_path: Path, head_norm: str) -> None:
    settings = {"width": 0.25, "fpn_channels": 32, "extra": "none", "head_norm": head_norm}
    builder = RetinaNetBuilder(**settings, focal_alpha=0.5, focal_gamma=0.0)
    torch.manual_seed(0)
    focal, after = builder.build(["a", "b"]), torch.rand(1)
    torch.manual_seed(0)
    plain = RetinaNetBuilder(**settings).build(["a", "b"])
    assert torch.equal(after, torch.rand(1))
    assert all(torch.equal(value, focal.state_dict()[name]) for name, value in plain.state_dict().items())
    heads = [detector.model.head.classification_head for detector in (focal, plain)]
    assert [type(head) for head in heads] == [FocalClassificationHead, RetinaNetClassificationHead]
    # Of one kind of head for what reads predictions off it, too.
    assert focal.spec == plain.spec
    logits = torch.randn(1, 6, 2, generator=torch.Generator().manual_seed(1))
    given = [{"labels": torch.tensor([1])}], {"cls_logits": logits}, [torch.tensor([0, -1, -1, -1, -1, -1])]
    truth = torch.zeros(1, 6, 2)
    truth[0, 0, 1] = 1
    expected = 0.5 * torch.nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
    torch.testing.assert_close(heads[0].compute_loss(*given), expected)
    assert abs(float(heads[1].compute_loss(*given)) - float(expected)) > 0.1
    file = tmp_path / "student.pt"
    save_student(file, focal, builder=builder, image_settings={"min_size": 64, "max_size": 64, "size_divisor": 32})
    assert type(load_detector(file).model.head.classification_head) is FocalClassificationHead
    scope: dict = {}
    code = torch.load(file, weights_only=True)["code"].replace("student.pt", str(file))
    exec(code, scope)
    image = [torch.rand(3, 64, 64)]
    focal.eval()
    with torch.no_grad():
        features = focal.model.head(list(focal.model.backbone(image[0][None]).values()))["cls_logits"]
        theirs = scope["model"].head(list(scope["model"].backbone(image[0][None]).values()))["cls_logits"]
    assert torch.equal(features, theirs)
