"""`drkd doctor`, and the short form of it that a distillation begins with."""

from __future__ import annotations

import sys

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from drkd.contracts import DrkdError
from drkd.engine.distiller import Distiller
from drkd.recipes.doctor import Diagnosis, Finding, examine, examine_briefly
from drkd.recipes.loading import choose_device
from drkd.recipes.recipe import Recipe, Training
from drkd.recipes.run_folder import RunFolder, check_folder, write_json

REPORT = "doctor.json"


def doctor(recipe: Recipe, *, images: int | None = 200, steps: int = 8) -> Diagnosis:
    """Examine a run before it is started, and write ``doctor.json`` into its run folder.

    Args:
        recipe: The recipe.
        images: Validation images to measure the teacher on; None takes all.
        steps: Training steps to take.

    Raises:
        DrkdError: If the recipe names no teacher or method, something in it cannot be used, or the run folder cannot
            be written to.
    """
    from drkd.recipes.training import build_module

    if (recipe.teacher is None and not recipe.teachers) or recipe.method is None:
        raise DrkdError("drkd doctor: the recipe names no teacher or no method, so there is nothing to examine.")
    check_folder(recipe.output, wanted=recipe.output / REPORT)
    recipe.data.setup("fit")
    on_gpu = recipe.training.accelerator in ("auto", "gpu", "cuda")
    device = choose_device("auto" if on_gpu else "cpu")
    with isolate_rng():
        try:
            distiller = build_module(recipe, kind="distill").distiller
        except DrkdError as error:
            # Classes that differ, weights that do not fit: whatever keeps the run from being built at all.
            diagnosis = Diagnosis((Finding("stop", "build", str(error)),), {})
        else:
            processes = _count_processes(recipe.training, device)
            diagnosis = examine(recipe, distiller, images=images, steps=steps, device=device, processes=processes)
    write_json(recipe.output / REPORT, diagnosis.as_json())
    return diagnosis


def _count_processes(training: Training, device: torch.device) -> int:
    """How many the run will have; of "auto" and -1 as many as this machine has GPUs."""
    number = str(training.devices)
    if number in ("auto", "-1"):
        here = torch.cuda.device_count() if device.type == "cuda" else 1
    else:
        here = int(number) if number.isdecimal() else len(number.strip(",").split(","))
    return max(1, here) * training.num_nodes


def preflight(recipe: Recipe, distiller: Distiller, folder: RunFolder, *, device: torch.device) -> None:
    """The short form: writes ``doctor.json`` and says on standard error what speaks against the run.

    It never stops a run: a control with a random teacher, say, is meant to look hopeless; and where the examination
    itself fails, that is said in one line.
    """
    if not folder.writes:
        return
    try:
        diagnosis = examine_briefly(recipe, distiller, device=device)
        write_json(folder.path / REPORT, diagnosis.as_json())
    except Exception as error:  # whatever it is, the run may not touch it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not isinstance(error, ValueError | RuntimeError):  # whose text alone may be a mere name
            reason = f"{type(error).__name__}: {reason}"
        print(f"drkd doctor: could not examine this run, which goes on without it: {reason}", file=sys.stderr)
        return
    if diagnosis.severity != "ok":
        print(f"drkd doctor: {diagnosis.verdict} (--doctor=false turns this check off.)", file=sys.stderr)
