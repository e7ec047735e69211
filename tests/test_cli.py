"""The command line: help that teaches, results on stdout, and a readable paragraph for whatever a user gets wrong."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.conftest import write_coco, write_detector
from torch.multiprocessing.reductions import rebuild_storage_fd

from drkd import cli
from drkd.cli import main
from drkd.cli_errors import explain
from drkd.contracts import DrkdError, MachineError
from drkd.recipes import run_folder
from drkd.recipes.builtin import builtin_recipe
from drkd.recipes.recipe import Recipe

VERBS = [" ".join(key) for key in cli._VERBS]


@pytest.fixture
def recipe(tmp_path: Path, tiny_coco: Path, tiny_detector: Path) -> Path:
    """A recipe of two small steps."""
    content = {
        "student": {
            "class_path": "drkd.adapters.RetinaNetBuilder",
            "init_args": {"width": 0.25, "fpn_channels": 32, "norm": "frozen"},
        },
        "teacher": {"class_path": "drkd.adapters.SavedDetectorBuilder", "init_args": {"path": str(tiny_detector)}},
        "method": {"class_path": "drkd.methods.FeatureHint"},
        "data": {"root": str(tiny_coco), "batch_size": 2, "min_size": 64, "max_size": 96, "workers": 0},
        "training": {"steps": 2, "validate_every": 0, "accelerator": "cpu", "optimization": {"warmup_steps": 0}},
        "evaluation": {"split": None},
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def _fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail with code 2; return its one paragraph."""
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("drkd: ")
    assert "Traceback" not in message
    assert len(message) < 900
    return message


def test_overview_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_has_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"examples:\n  drkd {verb}" in shown
    assert "<class" not in shown


@pytest.mark.parametrize(
    "example",
    [
        example
        for key, verb in cli._VERBS.items()
        if key[0] not in ("train", "distill", "doctor")
        for example in verb.examples
    ],
)
def test_examples_are_accepted(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What examples of `drkd compare` name.
    shutil.copy(builtin_recipe("compare/digits"), tmp_path / "comparison.yaml")
    monkeypatch.chdir(tmp_path)
    words = example.split()
    key = next(key for key in cli._VERBS if tuple(words[: len(key)]) == key)
    verb = cli._VERBS[key]
    parser = verb.parser("", prog="drkd", exit_on_error=False, formatter_class=cli._Help)
    cli._parse(parser, words[len(key) :])


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from drkd.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_commands_that_do_not_train_do_not_wait_for_lightning() -> None:
    modules = ("prediction", "initialization", "datasets", "yolo", "evaluation", "exporting")
    names = ", ".join(f"drkd.recipes.{name}" for name in modules)
    code = f"import sys, {names}; sys.exit('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("drkd ")


def test_mistyped_verb_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'drkd distill'" in _fails(capsys, "distil")
    assert "'drkd data check'" in _fails(capsys, "data", "chek")


def test_train_distill_evaluate_predict_and_report(
    recipe: Path, tiny_coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["distill", "--config", str(recipe), "--evaluation.split=val"]) == 0
    captured = capsys.readouterr()
    assert "student.pt" in captured.out and "AP_S" in captured.out and "area < 32²" in captured.out
    assert "litlogger" not in captured.err
    assert main(["distill", "--config", str(recipe), "--resume", "--training.steps=3"]) == 0
    assert main(["train", "--config", str(recipe), "--output", str(tmp_path / "alone")]) == 0
    capsys.readouterr()
    numbers = tmp_path / "numbers.json"
    data = ["--data", str(tiny_coco), "--workers=0", "--device=cpu"]
    assert main(["evaluate", str(run), *data, "--area-scale=0.25", "--output", str(numbers)]) == 0
    assert "area < 16²" in capsys.readouterr().out
    assert json.loads(numbers.read_text())["thresholds_px"] == [16.0, 48.0]
    assert main(["predict", str(run), str(tiny_coco / "val"), "--output", str(tmp_path / "found")]) == 0
    assert "3 images" in capsys.readouterr().out
    assert main(["report", str(run)]) == 0


def test_init_writes_a_recipe_that_distill_takes(
    tiny_coco: Path, tiny_detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "mine.yaml"
    command = ["init", str(tiny_coco), "--teacher", str(tiny_detector), "--output", str(written)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert f"drkd distill --config {written}" in shown and "2 (cat, dog)" in shown and "retinanet" in shown
    assert "exists already" in _fails(capsys, *command)
    small = ["--student.backbone_weights=null", "--student.width=0.25", "--student.fpn_channels=32"]
    short = ["--training.steps=1", "--training.epochs=null", "--training.validate_every=0", "--data.workers=0"]
    output = ["--output", str(tmp_path / "run"), "--training.accelerator=cpu", "--evaluation.split=null"]
    assert main(["distill", "--config", str(written), *small, *short, *output]) == 0
    assert (tmp_path / "run" / "student.pt").is_file()


def test_init_refuses_a_teacher_of_other_classes(
    tiny_coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = write_detector(tmp_path / "three.pt", classes=("cat", "dog", "bird"))
    message = _fails(capsys, "init", tiny_coco, "--teacher", teacher, "--output", tmp_path / "r.yaml")
    assert "3 classes" in message and "cat, dog" in message
    assert not (tmp_path / "r.yaml").exists()


def test_data_check_lists_problems(tmp_path: Path, tiny_coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(tiny_coco), "--picture", str(tmp_path / "samples.png")]) == 0
    assert "0 errors" in capsys.readouterr().out
    broken = write_coco(tmp_path / "coco")
    (broken / "train" / "2.png").unlink()
    assert main(["data", "check", str(broken), "--picture", str(tmp_path / "broken.png")]) == 2
    assert "2.png" in capsys.readouterr().out


# --- what a user can get wrong ---------------------------------------------------------------------------------------


def test_no_data(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = _fails(capsys, "distill", "--config", recipe, f"--data.root={tmp_path / 'nothing'}")
    assert "nothing" in message and "no such folder" in message


def test_wrong_folder(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = _fails(capsys, "distill", "--config", recipe, f"--data.root={tmp_path}")
    assert "no COCO, YOLO or VOC annotations found" in message
    assert "no COCO, YOLO or VOC annotations found" in _fails(capsys, "data", "check", tmp_path)


def test_teacher_of_other_classes(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = write_detector(tmp_path / "three.pt", classes=("cat", "dog", "bird"))
    message = _fails(capsys, "distill", "--config", recipe, f"--teacher.path={teacher}")
    assert "3 classes" in message and "bird" in message


def test_data_of_classes_that_the_checkpoint_lacks(
    tiny_detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_coco(tmp_path / "coco", classes=("cat", "horse"))
    assert "'horse'" in _fails(capsys, "evaluate", tiny_detector, "--data", other, "--workers=0")


def test_checkpoint_of_another_model(
    recipe: Path, tiny_coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.pth"
    torch.save(torch.nn.Linear(2, 3).state_dict(), other)
    assert "not a detector saved by drkd" in _fails(capsys, "evaluate", other, "--data", tiny_coco)
    assert "another model" in _fails(capsys, "train", "--config", recipe, f"--student.weights={other}")
    assert "neither a detector" in _fails(capsys, "init", tiny_coco, f"--teacher={other}", "--output", tmp_path / "r")
    text = tmp_path / "text.pt"
    text.write_text("this is no checkpoint")
    assert "text.pt" in _fails(capsys, "predict", text, tiny_coco / "val", "--output", tmp_path / "found")


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image(workers: int, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = write_coco(tmp_path / "coco")
    (broken / "train" / "2.png").write_bytes(b"no picture")
    message = _fails(capsys, "train", "--config", recipe, f"--data.root={broken}", f"--data.workers={workers}",
                     "--data.batch_size=6")  # fmt: skip
    assert "2.png: this is not an image" in message


def test_loss_that_is_not_finite(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rate = "--training.optimization.learning_rate=1e9"
    message = _fails(capsys, "train", "--config", recipe, rate, "--training.steps=6")
    assert "NaN or infinite" in message and "learning_rate" in message
    assert not (tmp_path / "run" / "student.pt").exists()


def test_output_that_exists(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    message = _fails(capsys, "train", "--config", recipe)
    assert "already holds a run" in message and "--overwrite" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"training": {"stpes": 3}}, "did you mean 'training.steps'"),
        ({"tecaher": None}, "did you mean 'teacher'"),
        ({"student": {"class_path": "drkd.adapters.RetinaNetBuilder", "init_args": {"dpth": 3}}}, "'dpth'"),
        ({"training": {"steps": "many"}}, "training.steps: expected int, got 'many'"),
        ({"data": {"min_size": "big"}}, "data.min_size: expected int or list, got 'big'"),
        ({"student": {"class_path": "drkd.adapters.NoSuch"}}, "NoSuch"),
        ({"training": {"optimization": {"learning_rate": -1}}}, "learning_rate > 0"),
    ],
)
def test_recipe_with_a_wrong_key_or_value(
    change: dict[str, Any], expected: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    delta = tmp_path / "delta.yaml"
    delta.write_text(yaml.safe_dump({"base": "recipe.yaml", **change}))
    message = _fails(capsys, "train", "--config", delta)
    assert expected in message
    assert "Union" not in message and "<class" not in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--training.stpes=3"], "did you mean 'training.steps'"),
        (["--training.steps=many"], "training.steps: expected int, got 'many'"),
        (["--student.width=wide"], "width (of RetinaNetBuilder): expected float, got 'wide'"),
        (["--teacher=no.such.Builder"], "No module named 'no'"),
        (["--training.epochs=3"], "exactly one of steps and epochs"),
        (["--student.backbone=resnet17"], "resnet17"),
        (["--config=nowhere.yaml"], "There is no recipe file nowhere.yaml"),
        (["--training.accelerator=gqu"], "gqu"),
    ],
)
def test_wrong_option(arguments: list[str], expected: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in _fails(capsys, "train", "--config", recipe, *arguments)


@pytest.mark.parametrize("joined", [True, False])
def test_an_option_before_the_file_counts_too(
    joined: bool, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Recipe] = []

    def stop(made: Recipe) -> None:
        seen.append(made)
        raise SystemExit(0)

    monkeypatch.setattr("drkd.recipes.training.train", stop)
    (tmp_path / "second.yaml").write_text("seed: 4\ntraining: {steps: 77}\n")
    files = [recipe, tmp_path / "second.yaml"]
    options = [part for file in files for part in ([f"--config={file}"] if joined else ["--config", str(file)])]
    assert main(["train", "--seed=5", *options]) == 0
    assert seen[0].seed == 5 and seen[0].training.steps == 77


def test_recipe_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    message = _fails(capsys, "train")
    assert "student" in message and "must be given" in message and "--config" in message


def test_distill_without_teacher(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = _fails(capsys, "distill", "--config", recipe, "--teacher=null")
    assert "needs a teacher" in message and "drkd train" in message


def test_resume_without_checkpoint(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Nothing to resume" in _fails(capsys, "train", "--config", recipe, "--resume")


def test_missing_checkpoint(tiny_coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in _fails(capsys, "evaluate", tmp_path / "no.pt", "--data", tiny_coco)
    assert "holds no student.pt" in _fails(capsys, "evaluate", tmp_path, "--data", tiny_coco)
    assert "either a checkpoint" in _fails(capsys, "evaluate", "--data", tiny_coco)


def test_split_that_is_not_there(tiny_coco: Path, tiny_detector: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = _fails(capsys, "evaluate", tiny_detector, "--data", tiny_coco, "--split=tune", "--workers=0")
    assert "no split 'tune'" in message


def test_a_comparison_with_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "must be given" in _fails(capsys, "compare")
    assert "There is no recipe file nowhere.yaml" in _fails(capsys, "compare", "--config=nowhere.yaml")
    file = tmp_path / "mine.yaml"
    file.write_text("base: compare/digits\nrefernce: hint\n")
    message = _fails(capsys, "compare", "--config", file)
    assert "mine.yaml: there is no such key as 'refernce'; did you mean 'reference'?" in message
    message = _fails(capsys, "compare", "--config=compare/digits", "--reference=dkrd", "--dry-run")
    assert "digits.yaml: reference: there is no method 'dkrd'; did you mean 'drkd'?" in message
    assert "--only retinanet/hnit: no cell" in _fails(
        capsys, "compare", "--config=compare/digits", "--dry-run", "--only", "retinanet/hnit"
    )
    wrong = _fails(capsys, "compare", "--config=compare/digits", "--dry-run", "--overrides.training.stpes=3")
    assert "pairs.retinanet with methods.student" in wrong and "did you mean 'training.steps'" in wrong
    # And the other way round: a comparison is no recipe.
    assert "digits.yaml: this is a comparison" in _fails(capsys, "train", "--config=compare/digits")


def test_full_disk(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder.tempfile, "NamedTemporaryFile", no_space)
    assert main(["train", "--config", str(recipe)]) == 1
    assert "disk full" in capsys.readouterr().err


def test_interrupt(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("drkd.recipes.training.train", interrupt)
    assert main(["train", "--config", str(recipe)]) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr("drkd.recipes.datasets.check_dataset", interrupt)
    assert main(["data", "check", str(recipe.parent)]) == 130
    assert capsys.readouterr().err == "drkd: interrupted.\n"


def test_a_users_code_that_ends_with_words_has_failed(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("drkd.recipes.training.train", lambda _: sys.exit("no licence found"))
    assert main(["train", "--config", str(recipe)]) == 1
    assert "no licence found" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("drkd.recipes.training.train", break_down)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", "--config", str(recipe)])


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 1, "runs/x: no space is left"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), 2, "runs/x: Permission denied"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "data.batch_size"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 1, "batch_size"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), 1, "data.batch_size"),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be"), 1, "data.batch_size"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), 1, "data.batch_size"),
        (RuntimeError("[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried"), 1, "data.batch_size"),
        (RuntimeError("unable to write to file </torch_7_1>: No space left on device (28)"), 1, "--shm-size"),
        (RuntimeError("unable to open shared memory object </torch_7>: Too many open files (24)"), 1, "data.workers"),
        (RuntimeError("received 0 items of ancdata"), 1, "ulimit -n"),
        (OSError(errno.EMFILE, "Too many open files"), 1, "Too many open files"),
        (MachineError("x.png: there was not enough memory to decode this image."), 1, "x.png: there was not"),
        (
            MachineError("Caught it.\nOriginal Traceback:\n  x\ndrkd.contracts.MachineError: x.png: too many open"),
            *(1, "x.png: too many open"),
        ),
        (RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0"), 1, "disk full"),
        (DrkdError("Caught DrkdError in worker.\nOriginal Traceback:\n  x\ndrkd.contracts.DrkdError: bad"), 2, "bad"),
        (ValueError("expected 1, got 2"), 2, "expected 1, got 2 (DRKD_TRACEBACK=1"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), 1, "data.workers"),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer"),
            1,
            "Another process",
        ),
        (
            torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"),
            *(1, "--resume=auto"),
        ),
        (torch.distributed.DistNetworkError("Broken pipe"), 1, "--resume=auto"),
        (torch.distributed.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."), 1, "ended"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), 1, "data.workers"),
    ],
)
def test_explained_errors(error: Exception, code: int, expected: str) -> None:
    explained = explain(error)
    assert explained is not None
    assert explained[0] == code
    assert expected in explained[1]
    assert "\n" not in explained[1]


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_died_while_it_handed_a_batch_over(error: Exception) -> None:
    class Handle:
        def detach(self) -> int:
            raise error

    with pytest.raises(type(error)) as caught:
        rebuild_storage_fd(torch.UntypedStorage, Handle(), 4)
    explained = explain(caught.value)
    assert explained is not None and explained[0] == 1 and "data.workers" in explained[1]
    other = type(error)(*error.args)
    assert "data.workers" not in str(explain(other))


def test_copied_run_folder_evaluates(tiny_detector: Path, tiny_coco: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_detector, tmp_path / "student.pt")
    assert main(["evaluate", str(tmp_path), "--data", str(tiny_coco), "--workers=0", "--limit=1"]) == 0
