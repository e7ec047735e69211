"""The typed recipe: what a YAML file with command-line overrides turns into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from drkd.contracts import DetectorBuilder, DetectorSpec, DrkdError, KDMethod
from drkd.data.module import DetectionDataModule
from drkd.engine.module import Optimization
from drkd.engine.unlabelled import UnlabelledImages
from drkd.recipes.home import expand_home
from drkd.recipes.limits import check_training, check_validation
from drkd.recipes.null_values import refuse_nulls
from drkd.recipes.recipe_error import readable
from drkd.recipes.recipe_file import RecipeFile
from drkd.recipes.teacher_assembly import WeightedTeacher


@dataclass(frozen=True)
class Training:
    """How long, how precise, on what.

    Args:
        steps: Optimizer steps; give this or ``epochs``.
        epochs: Passes over the training data.
        optimization: Optimizer and schedule.
        ema: Decay of the student's moving average, which is then what is validated and saved; None = off.
        clip_norm: Clip the norm of the gradient over all parameters; None = off.
        accumulate: Batches per optimizer step.
        precision: Lightning's precision: 32-true, bf16-mixed or 16-mixed; "auto" is bf16-mixed on a GPU that
            computes it, otherwise 32-true.
        accelerator: auto, cpu, gpu, mps, ...
        devices: Number of devices, or "auto".
        num_nodes: Number of machines.
        strategy: Lightning's strategy: auto, ddp, ...
        sync_batchnorm: Convert batch norms to synchronised ones (several devices).
        validate_every: Validate every so many epochs; 0 = only at the end.
        patience: Stop after so many validations without a better AP, and keep the best student; None = never.
        keep: Which student is saved: the "last", or the "best" on the validation split (an optimistic choice if you
            also report that split).
        channels_last: Use the channels-last memory layout.
        compile: Backend of torch.compile for the backbones and what reads their maps (inductor, ...); None = off.
        monitor_interval: Steps between measurements of the gradient ratios.
        calibration_steps: Steps after which balanced weights are frozen.
        dead_after: Stop the run after so many measurements in a row in which a term sent the student no gradient, or
            the teacher's maps were constant; None = never (such a term's ratio in the log is 0, or not finite where
            its gradient overflowed).
        log_interval: Steps between rows of metrics.csv.
        checkpoint_every: Also write the checkpoint to resume from every so many optimizer steps within an epoch;
            None = not by steps.
        checkpoint_minutes: Also write it when the last one is so many minutes old; None = not by time.
        skip_nonfinite: Leave out up to so many optimizer steps whose loss or gradient is NaN or infinite, and count
            them; 0 = the first one stops the run.
        unlabelled: How images of ``data.unlabelled`` train.
    """

    steps: int | None = None
    epochs: int | None = None
    optimization: Optimization = field(default_factory=Optimization)
    ema: float | None = None
    clip_norm: float | None = None
    accumulate: int = 1
    precision: str = "auto"
    accelerator: str = "auto"
    devices: int | str = 1
    num_nodes: int = 1
    strategy: str = "auto"
    sync_batchnorm: bool = False
    validate_every: int = 1
    patience: int | None = None
    keep: Literal["last", "best"] = "last"
    channels_last: bool = True
    compile: str | None = None
    monitor_interval: int = 50
    calibration_steps: int = 100
    dead_after: int | None = 3
    log_interval: int = 10
    checkpoint_every: int | None = None
    checkpoint_minutes: float | None = 10.0
    skip_nonfinite: int = 0
    unlabelled: UnlabelledImages = field(default_factory=UnlabelledImages)

    def __post_init__(self) -> None:
        check_training(self)
        if (self.steps is None) == (self.epochs is None):
            raise DrkdError(
                f"training: expected exactly one of steps and epochs, got steps={self.steps}, epochs={self.epochs}"
            )
        if (self.steps or self.epochs or 0) < 1:
            raise DrkdError(f"training: expected at least one step or epoch, got {self.steps or self.epochs}")
        if self.keeps_best and self.validate_every == 0:
            raise DrkdError("training: patience and keep=best need validation; set validate_every to 1 or more")
        check_validation(self, epochs=self.epochs)

    @property
    def keeps_best(self) -> bool:
        """Whether the student that is saved is the one that validated best."""
        return self.keep == "best" or self.patience is not None


@dataclass(frozen=True)
class Evaluation:
    """What is measured at the end.

    Args:
        split: Split that is evaluated once, at the end; None = none.
        area_scale: Factor on COCO's area limits of small and medium (32^2 and 96^2 px); 1 = COCO's. Said wherever
            AP_S is printed.
        cost: Also measure parameters, FLOPs and CPU latency.
    """

    split: str | None = "val"
    area_scale: float = 1.0
    cost: bool = False


@dataclass(frozen=True)
class Recipe:
    """A whole run, as typed objects.

    Args:
        student: How to build the student.
        teacher: How to build the teacher; None for training alone.
        method: Builds the method from the two specs; None for training alone.
        data: The data module.
        training: How to train.
        evaluation: What to measure at the end.
        class_map: Of a teacher with classes of its own: a YAML or JSON file of its class names and the data's, or
            "names" to share those of equal names; None expects the data's classes.
        teacher_size: Short side of the images that the teacher sees, px; None is the data's.
        teachers: Several teachers by name, in place of ``teacher``.
        inherit: Start the student from the teacher's neck and head where names and shapes agree; also for `train`, so
            that both arms of a comparison start alike.
        output: Run folder.
        seed: Of everything random.
        resume: Go on from the run folder's last checkpoint; "auto" starts where there is nothing to go on from.
        overwrite: Replace what is in the run folder; not together with ``resume``.
        doctor: Begin a distillation with the short form of `drkd doctor`.
        resolved: The recipe as YAML, every default written out.
    """

    student: DetectorBuilder
    data: DetectionDataModule
    training: Training
    evaluation: Evaluation
    output: Path
    seed: int = 0
    teacher: DetectorBuilder | None = None
    method: Callable[[DetectorSpec, DetectorSpec], KDMethod] | None = None
    class_map: str | None = None
    teacher_size: int | None = None
    teachers: dict[str, WeightedTeacher] | None = None
    inherit: bool = False
    resume: bool | Literal["auto"] = False
    overwrite: bool = False
    doctor: bool = True
    resolved: str = ""


def recipe_parser(description: str = "", **settings: Any) -> ArgumentParser:
    """Build the parser of a recipe: every field is both a YAML key and a command-line option."""
    parser = ArgumentParser(description=description, **settings)
    parser.add_argument(
        "--config",
        action=RecipeFile,
        help="Recipe file, or the name of a shipped recipe (demo, coco/retinanet_r50, ...). Give several and later "
        "ones override earlier ones.",
    )
    parser.add_argument("--student", type=DetectorBuilder, required=True, help="How to build the student.")
    parser.add_argument("--teacher", type=DetectorBuilder | None, default=None, help="How to build the teacher.")
    parser.add_argument(
        "--method",
        type=Callable[[DetectorSpec, DetectorSpec], KDMethod] | None,
        default=None,
        help="Distillation method, e.g. drkd.methods.DRKD.",
    )
    parser.add_argument(
        "--class_map",
        type=str | None,
        default=None,
        help="File that maps the teacher's class names to the data's, or 'names' to share those of equal names.",
    )
    parser.add_argument(
        "--teacher_size", type=int | None, default=None, help="Short side of the images that the teacher sees, px."
    )
    parser.add_argument(
        "--teachers",
        type=dict[str, WeightedTeacher] | None,
        default=None,
        help="Several teachers by name, each with detector, weight, class_map and teacher_size, in place of --teacher.",
    )
    parser.add_class_arguments(DetectionDataModule, "data")
    parser.add_class_arguments(Training, "training")
    parser.add_class_arguments(Evaluation, "evaluation")
    parser.add_argument(
        "--inherit", type=bool, default=False, help="Start the student from the teacher's neck and head where they fit."
    )
    parser.add_argument("--output", type=Path, required=True, help="Run folder.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of everything random.")
    parser.link_arguments("seed", "data.seed")
    parser.add_argument(
        "--resume",
        type=bool | Literal["auto"],
        nargs="?",
        const=True,
        default=False,
        help="Go on from the run folder's last checkpoint; auto: or start, where there is none.",
    )
    parser.add_argument(
        "--overwrite", type=bool, nargs="?", const=True, default=False, help="Replace what is in the run folder."
    )
    parser.add_argument(
        "--doctor", type=bool, nargs="?", const=True, default=True, help="Check the run for seconds before it starts."
    )
    return parser


@cache
def _library_parser() -> ArgumentParser:
    """The parser for calls from Python, made once: comparisons read a hundred recipes."""
    # Without --print_config, which the parser would remember from a call that failed.
    return recipe_parser(exit_on_error=False, print_config=None)


def instantiate(parser: ArgumentParser, config: Namespace) -> Recipe:
    """Turn a parsed recipe into objects.

    Raises:
        DrkdError: If a value is out of its range, or null where it must not be.
    """
    refuse_nulls(parser, config)
    expand_home(config)
    # Parsed a moment ago: what is valid needs no second look.
    resolved = parser.dump(config, skip_unset=False, skip_validation=True)
    try:
        built = parser.instantiate(config)
    except DrkdError:
        raise
    except (ValueError, TypeError) as error:
        raise DrkdError(f"A value of the recipe cannot be used: {error}") from error
    fields = {name: built[name] for name in Recipe.__dataclass_fields__ if name in built}
    fields["output"] = Path(str(fields["output"]))
    return Recipe(**fields, resolved=resolved)


def load_recipe(files: Sequence[Path | str], overrides: Sequence[str] = ()) -> Recipe:
    """Read recipe files, later ones over earlier ones, then overrides such as ``--training.steps=10``.

    Raises:
        DrkdError: If a file is missing, or a key or a value is wrong; the message is jsonargparse's, shortened.
    """
    parser = _library_parser()
    arguments = [f"--config={file}" for file in files]
    try:
        config = parser.parse_args([*arguments, *overrides])
    except DrkdError:
        raise
    except Exception as error:
        named = f" {', '.join(map(str, files))}" if files else ""
        raise DrkdError(f"The recipe{named} cannot be used: {readable(error, parser)}") from error
    return instantiate(parser, config)
