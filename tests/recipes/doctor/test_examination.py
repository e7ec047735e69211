"""The doctor on runs that are built and data that is read, and what it leaves untouched."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from tests.conftest import write_detector

from drkd import cli
from drkd.adapters import TorchvisionDetector, load_detector, save_student
from drkd.contracts import DrkdError
from drkd.data.digits import DigitsConfig, build_digits
from drkd.data.module import DetectionDataModule
from drkd.engine.distiller import Distiller
from drkd.recipes import preflight as preflight_module
from drkd.recipes.doctor import Diagnosis, examination
from drkd.recipes.doctor.batches import ValidationBatches
from drkd.recipes.doctor.preprocessing import average_precision, judge_preprocessing, preprocessing_changes
from drkd.recipes.doctor.steps import StepNumbers, _autocast, forecast
from drkd.recipes.preflight import doctor
from drkd.recipes.recipe import Recipe, load_recipe
from drkd.recipes.run_folder import RunFolder
from drkd.recipes.training import build_module, distill


def _options(tiny_coco: Path, teacher: Path, output: Path, *extra: str) -> list[str]:
    return [
        f"--data.root={tiny_coco}",
        "--data.val_split=val",
        "--data.pad_to=null",
        "--data.batch_size=2",
        "--data.min_size=64",
        "--data.max_size=96",
        "--data.workers=0",
        "--student.fpn_channels=32",
        "--student.backbone_weights=null",
        f"--teacher.path={teacher}",
        "--training.steps=null",
        "--training.epochs=1",
        "--training.validate_every=0",
        "--evaluation.split=null",
        "--inherit=false",
        f"--output={output}",
        *extra,
    ]


def _recipe(*arguments: object) -> Recipe:
    return load_recipe(["digits/retinanet"], _options(*arguments))  # type: ignore[arg-type]


def test_a_run_is_the_same_bit_for_bit_with_and_without_it(
    tiny_coco: Path, tiny_detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = []
    for doctor_on in ("true", "false"):
        output = tmp_path / doctor_on
        result = distill(_recipe(tiny_coco, tiny_detector, output, f"--doctor={doctor_on}"))
        assert (output / "doctor.json").exists() == (doctor_on == "true")
        assert ("drkd doctor: stop" in capsys.readouterr().err) == (doctor_on == "true")
        states.append(result.distiller.state_dict())
    assert set(states[0]) == set(states[1])
    for name, value in states[0].items():
        if torch.is_tensor(value):
            assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize(
    "failure",
    [DrkdError("an image is gone"), RuntimeError("CUDA out of memory\nmore"), TypeError("a detection of another kind")],
)
def test_a_run_goes_on_where_its_examination_fails(
    failure: Exception,
    tiny_coco: Path,
    tiny_detector: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(preflight_module, "examine_briefly", _raising(failure))
    distill(_recipe(tiny_coco, tiny_detector, tmp_path / "run"))
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("drkd doctor")]
    assert str(failure).splitlines()[0] in said
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    assert not (tmp_path / "run" / "doctor.json").exists()


def test_a_run_stopped_while_it_is_examined_is_not_left_running(
    tiny_coco: Path, tiny_detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight_module, "examine_briefly", _raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        distill(_recipe(tiny_coco, tiny_detector, tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"


def test_images_are_looked_at_in_the_recipes_batches_one_at_a_time(
    tiny_coco: Path, tiny_detector: Path, tmp_path: Path
) -> None:
    recipe = _recipe(tiny_coco, tiny_detector, tmp_path / "run")
    recipe.data.setup("fit")
    batches = ValidationBatches(recipe, 3, device=torch.device("meta"))
    assert batches.count == 3 and [batch.image_ids for batch in batches] == [(1, 2), (3,)]
    assert batches.first().images.device.type == "meta"
    alive: list[weakref.ref[torch.Tensor]] = []
    for batch in ValidationBatches(recipe, None, device=torch.device("cpu")):
        alive = [entry for entry in alive if entry() is not None] + [weakref.ref(batch.images)]
        assert len(alive) <= 2  # this one, and the last one until its name is given away


def test_the_preflight_runs_on_the_runs_device_and_puts_the_models_back(
    tiny_coco: Path, tiny_detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []
    moved: list[str] = []

    def note(recipe: Recipe, distiller: Distiller, *, device: torch.device) -> Diagnosis:
        asked.append(device)
        monkeypatch.setattr(examination, "_look", lambda *_, **__: ([], {}))
        monkeypatch.setattr(distiller, "to", lambda where: moved.append(str(where)) or distiller)
        return examination.examine_briefly(recipe, distiller, device=torch.device("cuda", 1))

    monkeypatch.setattr(preflight_module, "examine_briefly", note)
    recipe = _recipe(tiny_coco, tiny_detector, tmp_path / "run")
    recipe.data.setup("fit")
    distiller = build_module(recipe, kind="distill").distiller
    preflight_module.preflight(recipe, distiller, RunFolder(tmp_path / "run"), device=torch.device("cuda", 1))
    assert asked == [torch.device("cuda", 1)] and moved == ["cuda:1", "cpu"]


def test_a_first_start_with_resume_auto_is_examined_and_a_resumed_one_is_not(
    tiny_coco: Path, tiny_detector: Path, tmp_path: Path
) -> None:
    distill(_recipe(tiny_coco, tiny_detector, tmp_path / "run", "--resume=auto"))
    report = tmp_path / "run" / "doctor.json"
    report.unlink()  # it was there
    distill(_recipe(tiny_coco, tiny_detector, tmp_path / "run", "--resume=auto"))
    assert not report.exists()


def _raising(error: BaseException) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return fail


@pytest.mark.parametrize(("precision", "half"), [("32-true", False), ("32", False), ("bf16", True), ("16-mixed", True)])
def test_steps_are_taken_in_the_runs_precision(precision: str, half: bool) -> None:
    with _autocast(precision, torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") == half


def test_the_whole_form_takes_its_steps_with_a_student_that_trains(
    tiny_coco: Path, tiny_detector: Path, tmp_path: Path
) -> None:
    """A student of `from_pretrained` comes in eval mode; a norm that rests by itself is left alone."""
    recipe = _recipe(tiny_coco, tiny_detector, tmp_path / "run")
    recipe.data.setup("fit")
    distiller = build_module(recipe, kind="distill").distiller
    model, seen = distiller.student.model, []
    rests = next(name for name, part in model.named_modules() if isinstance(part, torch.nn.GroupNorm))
    for asleep in (True, False):
        model.train(not asleep)
        model.get_submodule(rests).eval()
        hook = model.get_submodule(rests).register_forward_pre_hook(
            lambda part, _: seen.append((model.training, part.training)) if torch.is_grad_enabled() else None
        )
        examination.examine(recipe, distiller, images=2, steps=2, device=torch.device("cpu"))
        hook.remove()
        assert set(seen) == {(True, asleep)}
        seen.clear()


def test_the_whole_form_measures_everything_and_says_that_this_teacher_is_bad(
    tiny_coco: Path, tiny_detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = _options(tiny_coco, tiny_detector, tmp_path / "run", "--images=2", "--steps=4", "--json")
    code = cli.main(["doctor", "--config=digits/retinanet", *options])
    printed = json.loads(capsys.readouterr().out)
    assert code == 2 and printed["verdict"] == "stop" and "AP is" in printed["reasons"]
    assert printed == json.loads((tmp_path / "run" / "doctor.json").read_text())
    numbers = printed["numbers"]
    assert numbers["teacher"]["images"] == 2 and numbers["classes"]["train"]["boxes"]["dog"] > 0
    shares = numbers["gradients"]["share"]
    assert sum(shares.values()) == pytest.approx(1.0) and min(shares.values()) > 0
    assert numbers["cost"]["steps"] == 3 and numbers["cost"]["seconds"] > 0


def test_a_run_folder_that_cannot_be_written_to_is_refused_first(tiny_coco: Path, tiny_detector: Path) -> None:
    recipe = _recipe(tiny_coco, tiny_detector, tiny_detector / "run")
    with pytest.raises(DrkdError, match=r"doctor\.json: cannot be written: .*: Not a directory"):
        doctor(recipe, images=2, steps=2)


def test_models_that_cannot_be_built_are_a_finding(tiny_coco: Path, tmp_path: Path) -> None:
    other = write_detector(tmp_path / "teacher.pt", classes=("cat", "horse"))
    diagnosis = doctor(_recipe(tiny_coco, other, tmp_path / "run"), images=2, steps=2)
    assert diagnosis.severity == "stop" and "horse" in diagnosis.verdict


def test_a_teacher_under_a_wrong_normalisation_is_found_out(tmp_path: Path) -> None:
    folder = build_digits(tmp_path, config=DigitsConfig(train=2, tune=2, val=16))
    right = load_detector("drkd:digits_retinanet")
    wrong_model = right.model
    transform = wrong_model.transform
    trained_with = list(transform.image_mean), list(transform.image_std)
    transform.image_mean, transform.image_std = [0.0] * 3, [1 / 255] * 3
    wrong = TorchvisionDetector(wrong_model, right.spec.class_names, label_ids=right.label_ids).eval()
    data = DetectionDataModule(str(folder), min_size=128, max_size=128, workers=0, pad_to=(128, 128))
    batches = list(data.val_dataloader())
    measured = average_precision(wrong, batches, data.val_split, preprocessing_changes(wrong, None))
    found = {name: numbers["ap"] for name, numbers in measured.items()}
    own = found.pop("")
    cure = "mean and std 0.5" if trained_with[0][0] == 0.5 else "ImageNet's mean and std"
    assert found[cure] == pytest.approx(average_precision(right, batches, data.val_split)[""]["ap"], abs=1e-6)
    finding = judge_preprocessing(own, {name: found[name] for name in (cure, "BGR instead of RGB")})
    assert finding.severity == "stop" and cure in finding.text


def test_channels_in_the_other_order_are_undone() -> None:
    images = torch.rand(1, 3, 2, 2)
    change = preprocessing_changes(load_detector("drkd:digits_retinanet"), None)["BGR instead of RGB"]
    assert torch.equal(change(images)[:, 0], images[:, 2])


def test_a_term_of_a_part_of_the_run_is_measured(tiny_coco: Path, tiny_detector: Path, tmp_path: Path) -> None:
    builder = _recipe(tiny_coco, tiny_detector, tmp_path / "run").student
    torch.manual_seed(1)
    alike = tmp_path / "alike.pt"
    settings = {"min_size": 64, "max_size": 96, "size_divisor": 32}
    save_student(alike, builder.build(("cat", "dog")), builder=builder, image_settings=settings)
    span = ("--method.response_weight=1", "--method.response_span=[0.5,1]")
    diagnosis = doctor(_recipe(tiny_coco, alike, tmp_path / "run", *span), images=2, steps=4)
    assert "gradients" in diagnosis.numbers, diagnosis.verdict
    ratios = diagnosis.numbers["gradients"]["ratio_to_task"]
    assert len(ratios) > 3 and all(ratio > 0 for ratio in ratios.values())


def test_accumulation_does_not_mix_with_warm_up(tiny_coco: Path, tiny_detector: Path, tmp_path: Path) -> None:
    found = []
    for extra in ((), ("--training.accumulate=4", "--method.warmup_steps=500")):
        recipe = _recipe(tiny_coco, tiny_detector, tmp_path / "run", "--method.balanced=false", *extra)
        ratios = doctor(recipe, images=2, steps=8).numbers["gradients"]["ratio_to_task"]
        found.append(ratios)
    plain, warming = found
    assert plain.keys() == warming.keys() and all(ratio > 0 for ratio in plain.values())
    for name, ratio in plain.items():
        # Other students after the first step, as the terms are quieter; the ratios are those of the whole weights.
        assert warming[name] == pytest.approx(ratio, rel=0.2), name


def test_a_run_shorter_than_the_examination_with_weights_that_fall(
    tiny_coco: Path, tiny_detector: Path, tmp_path: Path
) -> None:
    options = ("--method.decay=cosine", "--training.steps=2", "--training.epochs=null", "--method.balanced=false")
    recipe = _recipe(tiny_coco, tiny_detector, tmp_path / "run", *options)
    diagnosis = doctor(recipe, images=2, steps=8)
    ratios = diagnosis.numbers["gradients"]["ratio_to_task"]
    assert ratios and all(ratio > 0 for ratio in ratios.values())


def test_an_image_that_cannot_be_read_is_no_fault_of_the_teacher(
    tiny_coco: Path, tiny_detector: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    shutil.copytree(tiny_coco, root)
    last = sorted((root / "val").iterdir())[-1]
    last.write_bytes(last.read_bytes()[:-40])
    with pytest.raises(DrkdError, match=last.name):
        doctor(_recipe(root, tiny_detector, tmp_path / "run", "--training.validate_every=1"), images=3, steps=2)
    never = ("--training.validate_every=0", "--evaluation.split=null", "--data.batch_size=1")
    diagnosis = doctor(_recipe(root, tiny_detector, tmp_path / "run", *never), images=3, steps=2)
    (finding,) = (entry for entry in diagnosis.findings if "was not measured" in entry.text)
    assert finding.severity == "careful" and last.name in finding.text and diagnosis.numbers["gradients"]


@pytest.mark.parametrize(("devices", "nodes", "processes"), [("1", 1, 1), ("4", 2, 8), ("auto", 2, 2), ("0,1,", 1, 2)])
def test_several_processes_share_an_epoch(
    devices: str, nodes: int, processes: int, tiny_coco: Path, tiny_detector: Path, tmp_path: Path
) -> None:
    options = (f"--training.devices={devices}", f"--training.num_nodes={nodes}", "--training.epochs=24")
    recipe = _recipe(tiny_coco, tiny_detector, tmp_path / "run", "--data.batch_size=1", *options)
    recipe.data.setup("fit")
    assert preflight_module._count_processes(recipe.training, torch.device("cpu")) == processes
    numbers = StepNumbers(compute_seconds=2.0)
    passes = max(1, len(recipe.data.train_dataloader()) // processes)
    plan = forecast(recipe, numbers, detect_seconds=1.0, passes=passes, processes=processes)
    assert plan["steps"] == 24 * max(1, 6 // processes) and plan["seconds"] == 2.0 * plan["steps"]
    validating = replace(recipe, training=replace(recipe.training, validate_every=6))
    scored = forecast(validating, numbers, detect_seconds=1.0, passes=passes, processes=processes)
    images = math.ceil(len(recipe.data.val_split) / processes)
    assert scored["validations"] == 4 and scored["seconds"] == plan["seconds"] + 4 * images
