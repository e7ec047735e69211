"""Damaged and hostile detectors, MMDetection's files and run folders: loaded, predicted with, gone on from."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from attacks import Attacks
from mutations import guarded, mutate_bytes, mutate_value, tiny_detectors
from PIL import Image

from drkd.adapters import MMDetectionBuilder, RetinaNetBuilder, SavedDetectorBuilder, save_student
from drkd.adapters.mmdetection import Architecture, _names, _rename
from drkd.engine.checkpoint_io import AtomicCheckpoints
from drkd.recipes.prediction import predict
from drkd.recipes.recipe import load_recipe
from drkd.recipes.teacher_assembly import build_teacher
from drkd.recipes.training import distill

_STEPS = 3


def write_student(path: Path) -> Path:
    """A detector of the class cat without skill."""
    torch.manual_seed(0)
    builder = RetinaNetBuilder(width=0.125, fpn_channels=32, extra="none", score_threshold=0.0, stages=(3, 4))
    settings = {"min_size": 32, "max_size": 64, "size_divisor": 32}
    extra = {"category_ids": {"cat": 3}, "seed": 0}
    save_student(path, builder.build(["cat"]), builder=builder, image_settings=settings, extra=extra)
    return path


class CheckpointAttacks(Attacks):
    """Files of detectors and of runs.

    Args:
        folder: Working folder.
        data: A small data set.
        teacher: A saved detector of its classes.
    """

    def __init__(self, folder: Path, *, data: Path, teacher: Path) -> None:
        super().__init__(folder)
        self._file = folder / "input"
        self._teacher = teacher
        self._saved = torch.load(teacher, weights_only=True)
        self._image = folder / "picture.png"
        Image.effect_noise((40, 30), 60).convert("RGB").save(self._image)
        self._mmdetection = _mmdetection_state()
        self._recipe = folder / "run.yaml"
        self._run = folder / "prepared"
        self._recipe.write_text(yaml.safe_dump(_run_recipe(data, teacher)))

    def try_student(self) -> str:
        """A student.pt with other values, or other bytes, loaded and predicted with."""
        file = self._damaged(self._saved, self._file.with_suffix(".pt"))
        output = self._folder / "predicted"
        return guarded(
            lambda: predict(file, self._image, output=output, threshold=0.0, device="cpu", overwrite=True), seconds=20.0
        )

    def try_teacher(self) -> str:
        """The same as a teacher."""
        file = self._damaged(self._saved, self._file.with_suffix(".pt"))
        settings = {"min_size": 32, "max_size": 64, "size_divisor": 32}
        builder = SavedDetectorBuilder(path=str(file), random_weights=self._chance.random() < 0.1)
        return guarded(lambda: build_teacher(builder, ["cat"], image_settings=settings))

    def try_mmdetection(self) -> str:
        """A checkpoint of MMDetection with other names, shapes, values or bytes, as teacher or its features."""
        file = self._damaged(self._mmdetection, self._file.with_suffix(".pth"))
        part = self._chance.choice(("detector", "features"))
        style = self._chance.choice(("pytorch", "pytorch", "caffe"))
        builder = MMDetectionBuilder(path=str(file), part=part, style=style)
        return guarded(lambda: builder.build(["cat", "dog"]), seconds=20.0)

    def try_checkpoint(self) -> str:
        """A checkpoint to resume from with other values, or other bytes, read alone."""
        zeros = {"a": torch.zeros(3)}
        whole = {
            **{"state_dict": zeros, "callbacks": {}, "optimizer_states": [zeros], "lr_schedulers": []},
            **{"loops": {"fit_loop": {}}, "global_step": 3, "epoch": 1, "pytorch-lightning_version": "2.6.0"},
        }
        file = self._damaged(whole, self._file.with_suffix(".ckpt"))
        return guarded(lambda: AtomicCheckpoints().load_checkpoint(file))

    def try_resume(self) -> str:
        """A run folder with a damaged file, gone on with for one step."""
        chance, run = self._chance, self._folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self._run, run)
        draw = chance.random()
        if draw < 0.75:
            # The first is read at the start, the second where the best student is kept.
            file = run / "checkpoints" / chance.choice(("last.ckpt", "last.ckpt", "last.ckpt", "best.ckpt"))
            self._damaged(torch.load(file, weights_only=True), file, bytes_share=0.2)
        elif draw < 0.9:
            file = run / "run.json"
            if chance.random() < 0.6:
                file.write_text(json.dumps(mutate_value(chance, json.loads(file.read_text()))))
            else:
                file.write_bytes(mutate_bytes(chance, file.read_bytes()))
        else:
            file = chance.choice([*sorted(run.glob("logs/*/metrics.csv")), run / "recipe.yaml", run / "metrics.csv"])
            file.write_bytes(mutate_bytes(chance, file.read_bytes()))
        return guarded(lambda: self._go_on(run, steps=_STEPS + 1, resume=True), seconds=60.0)

    def _prepare(self, kind: str) -> None:
        """Train the run that the resumed ones are copies of."""
        if kind == "resume":
            self._go_on(self._run, steps=_STEPS, resume=False)

    def _go_on(self, run: Path, *, steps: int, resume: bool) -> None:
        overrides = [f"--output={run}", f"--training.steps={steps}", f"--resume={str(resume).lower()}"]
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            distill(load_recipe([self._recipe], overrides))


def _run_recipe(data: Path, teacher: Path) -> dict[str, Any]:
    """A distillation with all that a checkpoint can hold: average, balance, best student, schedule; stops mid-epoch."""
    return {
        **tiny_detectors(teacher),
        "method": {"class_path": "drkd.methods.DRKD", "init_args": {"nodes": 4, "states": 8, "warmup_steps": 0}},
        "data": {"root": str(data), "batch_size": 1, "min_size": 32, "max_size": 64, "workers": 0},
        "training": {
            **{"steps": _STEPS, "accelerator": "cpu", "ema": 0.9, "patience": 3, "keep": "best", "log_interval": 1},
            **{"monitor_interval": 1, "calibration_steps": 2, "optimization": {"warmup_steps": 1}},
        },
        "evaluation": {"split": None},
        "doctor": False,
        "output": "run",
    }


def _mmdetection_state() -> dict[str, Any]:
    """A RetinaNet as MMDetection saves it; every tensor is one stored number, so that the file is small."""
    plan = Architecture(
        family="retinanet",
        blocks=(1, 1, 1, 1),
        bottleneck=True,
        groups=32,
        group_width=1,
        stages=(2, 3, 4),
        widths=(512, 1024, 2048),
        channels=64,
        extra_inputs=(2048, 64),
        deformable=(),
        modulated=False,
        classes=2,
    )
    with torch.device("meta"):
        model = MMDetectionBuilder(path="")._detector(plan)
    names = _names(plan)
    state = {
        _rename(name, names): torch.ones((), dtype=tensor.dtype).expand(tensor.shape)
        for name, tensor in model.state_dict().items()
    }
    return {"meta": {"dataset_meta": {"classes": ["cat", "dog"]}}, "state_dict": state}
