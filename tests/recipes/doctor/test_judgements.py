"""What the doctor concludes from what it sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from drkd.contracts import DetectorSpec, FeatureLevel, FeatureMap, ImageRecord
from drkd.data.split import DatasetSplit
from drkd.methods import CWD, DRKD, FGFI, NLD, PKD, Combination, DeFeat
from drkd.recipes.doctor.adapters import judge_adapters
from drkd.recipes.doctor.classes import compare_classes, count_boxes
from drkd.recipes.doctor.features import judge_features
from drkd.recipes.doctor.finding import Diagnosis, Finding
from drkd.recipes.doctor.levels import judge_levels
from drkd.recipes.doctor.preprocessing import judge_preprocessing, judge_teacher
from drkd.recipes.doctor.steps import StepNumbers, judge_cost, judge_gradients, shares


def _spec(*names: str) -> DetectorSpec:
    return DetectorSpec((FeatureLevel("p3", 8, 8.0),), names)


def test_same_classes_in_the_same_order_are_fine() -> None:
    (finding,) = compare_classes(_spec("cat", "dog"), _spec("cat", "dog"), ("cat", "dog"))
    assert finding.severity == "ok" and "2 classes" in finding.text


@pytest.mark.parametrize(
    ("teacher", "severity", "words"),
    [
        (("cat", "bird"), "careful", "does not know 'dog'"),
        (("bird", "horse"), "stop", "does not know 'cat', 'dog'"),
        (("cat", "dog", "bird"), "careful", "knows 'bird', which the data does not have"),
    ],
)
def test_missing_and_extra_classes_are_named(teacher: tuple[str, ...], severity: str, words: str) -> None:
    findings = compare_classes(_spec("cat", "dog"), _spec(*teacher), ("cat", "dog"))
    assert any(f.severity == severity and words in f.text and "teacher" in f.text for f in findings)


def test_the_students_order_is_the_datas_and_a_teacher_may_have_its_own() -> None:
    (finding,) = compare_classes(_spec("cat", "dog"), _spec("dog", "cat"), ("cat", "dog"))
    assert finding.severity == "ok"
    (finding,) = compare_classes(_spec("dog", "cat"), _spec("cat", "dog"), ("cat", "dog"))
    assert finding.severity == "stop" and "student" in finding.text and "in another order" in finding.text


def test_a_class_that_the_teacher_only_lists_is_missing() -> None:
    findings = compare_classes(_spec("cat", "dog"), _spec("cat", "dog"), ("cat", "dog"), missing=("dog",))
    assert [f.severity for f in findings] == ["careful"] and "'dog'" in findings[0].text


def _split(name: str, labels: list[int], *, crowd: bool = False) -> DatasetSplit:
    count = len(labels)
    record = ImageRecord(
        1,
        Path("1.png"),
        (10, 10),
        torch.zeros(count, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.full((count,), crowd),
        torch.ones(count),
    )
    return DatasetSplit(name, (record,), ("cat", "dog"))


def test_classes_without_boxes_are_named_by_split() -> None:
    findings, numbers = count_boxes(_split("train", [0, 0]), _split("val", [1]))
    assert [f.severity for f in findings] == ["careful", "careful"]
    assert "'dog' in the split 'train'" in findings[0].text and "'cat' in the split 'val'" in findings[1].text
    assert numbers["train"]["boxes"] == {"cat": 2, "dog": 0}


def test_crowds_are_no_boxes() -> None:
    findings, _ = count_boxes(_split("train", [0, 1], crowd=True), _split("val", [0, 1]))
    assert [f.severity for f in findings] == ["stop"] and "no boxes at all" in findings[0].text


@pytest.mark.parametrize(("ap", "severity"), [(0.01, "stop"), (float("nan"), "stop"), (0.1, "careful"), (0.3, "ok")])
def test_a_bad_teacher_is_said_to_be_bad_and_how_bad(ap: float, severity: str) -> None:
    finding = judge_teacher(ap, ap, 20, boxes=9)
    assert finding.severity == severity and (ap != ap or f"{100 * ap:.1f}" in finding.text)


def test_images_without_boxes_prove_nothing_of_the_teacher() -> None:
    assert judge_teacher(float("nan"), float("nan"), 20, boxes=0).severity == "careful"


@pytest.mark.parametrize(
    ("own", "other", "severity"), [(0.05, 0.3, "stop"), (0.2, 0.3, "careful"), (0.3, 0.31, "ok"), (0.0, 0.0, "ok")]
)
def test_a_strong_rise_under_another_preprocessing_is_a_mistake(own: float, other: float, severity: str) -> None:
    finding = judge_preprocessing(own, {"BGR instead of RGB": other, "0 to 255": 0.0})
    assert finding.severity == severity
    assert severity == "ok" or "BGR instead of RGB" in finding.text


def _map(tensor: torch.Tensor) -> FeatureMap:
    return FeatureMap("p3", tensor, 8.0, 8.0)


def test_living_constant_dying_and_broken_levels_are_told_apart() -> None:
    alive = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    dying, broken = alive.clone(), alive.clone()
    dying[:, :5] = 3.0
    broken[0, 0, 0, 0] = float("nan")
    cases = {"ok": alive, "careful": dying}
    for severity, tensor in cases.items():
        findings, _ = judge_features("teacher", [_map(tensor)])
        assert [f.severity for f in findings] == [severity]
    assert "62 %" in judge_features("teacher", [_map(dying)])[0][0].text
    assert "constant" in judge_features("student", [_map(torch.ones(1, 8, 4, 4))])[0][0].text
    assert "NaN" in judge_features("student", [_map(broken)])[0][0].text


def test_a_map_of_one_cell_is_not_called_constant() -> None:
    findings, numbers = judge_features("teacher", [_map(torch.ones(1, 8, 1, 1))])
    assert findings[0].severity == "ok" and numbers[0]["dead_channels"] is None


@pytest.mark.parametrize(
    ("ratio", "possible", "severity"),
    [
        (1.0, True, "ok"),
        (0.0, True, "stop"),
        (0.0, False, "careful"),
        (0.001, True, "careful"),
        (20.0, True, "careful"),
    ],
)
def test_terms_that_are_silent_or_drown_the_task_are_named(ratio: float, possible: bool, severity: str) -> None:
    numbers = StepNumbers(ratios={"hint": ratio, "other": 1.0}, possible={"hint": possible})
    findings = judge_gradients(numbers, {})
    assert [f.severity for f in findings] == [severity] and "hint" in findings[0].text


def test_a_term_of_weight_zero_is_meant_to_be_silent() -> None:
    assert judge_gradients(StepNumbers(ratios={"hint": 0.0}), {"hint": 0.0})[0].severity == "ok"


def test_shares_add_up() -> None:
    assert shares(StepNumbers(ratios={"a": 1.0, "b": 2.0})) == {"task": 0.25, "a": 0.25, "b": 0.5}


def test_waiting_for_images_is_worth_a_word() -> None:
    plan = {"steps": 9, "seconds_per_step": 1.0, "of_which_waiting_for_data": 0.8, "seconds": 9.0, "finish": "soon"}
    finding = judge_cost({**plan, "peak_memory_bytes": None, "peak_memory_kind": ""})
    assert finding.severity == "careful" and "data.workers" in finding.text


def test_the_verdict_gives_the_worst_reasons_only() -> None:
    findings = (Finding("ok", "a", "Fine."), Finding("careful", "b", "Look."), Finding("stop", "c", "Broken."))
    diagnosis = Diagnosis(findings, {})
    assert (
        diagnosis.verdict.startswith("stop: ") and "Broken." in diagnosis.verdict and "Look." not in diagnosis.verdict
    )
    assert json.loads(json.dumps(diagnosis.as_json()))["verdict"] == "stop"
    assert Diagnosis(findings[:1], {}).verdict.startswith("ok")


def _pyramid(family: str, *strides: int) -> DetectorSpec:
    return DetectorSpec(tuple(FeatureLevel(f"p{s.bit_length() - 1}", 8, float(s)) for s in strides), ("cat",), family)


@pytest.mark.parametrize(
    ("student", "teacher", "levels", "severity", "words"),
    [
        (("retinanet", 8, 16), ("faster_rcnn", 4, 8, 16), None, "careful", "`levels: {p3: p2, p4: p3}`"),
        (("retinanet", 8, 16), ("faster_rcnn", 4, 8, 16), {"p3": "p2", "p4": "p3"}, "ok", "p3 from p2, p4 from p3"),
        (("retinanet", 4, 8), ("faster_rcnn", 4, 8, 16), None, "ok", "p2 from p2"),
        (("faster_rcnn", 8, 16), ("faster_rcnn", 4, 8, 16), None, "ok", "p3 from p3"),
        (("retinanet", 8, 16), ("rt_detr", 4, 8, 16), None, "ok", "p3 from p3"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_two_stage_teachers_small_objects_are_not_forgotten(
    student: tuple[str, int], teacher: tuple[str, int], levels: object, severity: str, words: str, wrapped: bool
) -> None:
    ours, theirs = _pyramid(*student), _pyramid(*teacher)
    method: nn.Module = (DRKD if severity == "ok" else PKD)(ours, theirs, levels=levels)  # type: ignore[operator]
    if wrapped:
        method = Combination(
            ours, theirs, methods={"one": lambda *specs: method, "two": lambda *specs: CWD(*specs, levels=levels)}
        )
    findings = judge_levels(ours, theirs, method)
    assert [finding.severity for finding in findings] == [severity] and words in findings[0].text


def test_a_method_without_levels_has_none_to_judge() -> None:
    assert judge_levels(_pyramid("retinanet", 8), _pyramid("faster_rcnn", 4, 8), nn.Identity()) == []


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (FGFI, "FGFI"),
        (lambda *specs: FGFI(*specs, adapter_init="identity"), None),
        (DRKD, None),
        (PKD, None),
        (lambda *specs: Combination(*specs, methods={"one": DRKD, "two": NLD, "three": DeFeat}), "NLD and DeFeat"),
    ],
)
def test_a_random_basis_beside_an_inherited_head_is_named(build: Callable[..., nn.Module], named: str | None) -> None:
    method = build(_pyramid("retinanet", 8, 16), _pyramid("retinanet", 8, 16))
    findings = judge_adapters(method, inherits=True)
    assert [finding.severity for finding in findings] == ([] if named is None else ["careful"])
    assert named is None or findings[0].text.startswith(f"The adapters of {named} start as a random basis")
    assert judge_adapters(method, inherits=False) == [] == judge_adapters(None, inherits=True)


def test_where_the_widths_differ_nothing_could_pass_as_it_is() -> None:
    wide = DetectorSpec((FeatureLevel("p3", 16, 8.0),), ("cat",), "retinanet")
    assert judge_adapters(FGFI(_pyramid("retinanet", 8), wide), inherits=True) == []
    assert judge_adapters(NLD(_pyramid("retinanet", 8), wide), inherits=True) == []
    parted = {"adapter_init": "default", "adapter_size": 3, "adapter_separable": True}
    assert judge_adapters(DRKD(_pyramid("retinanet", 8), wide, **parted), inherits=True) == []
    assert judge_adapters(DRKD(_pyramid("retinanet", 8), _pyramid("retinanet", 8), **parted), inherits=True)
