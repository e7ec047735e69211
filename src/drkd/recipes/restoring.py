"""Going on from a checkpoint: one that does not fit is told from a fault of the training, a folder may have moved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from drkd.contracts import DrkdError
from drkd.engine.agreement import gather
from drkd.recipes.faults import of_machine
from drkd.recipes.saved_state import find_misfit, is_score

# What optimizers keep of each parameter in its own shape; Adafactor's rows and columns, say, have others.
_AS_LARGE = ("momentum_buffer", "exp_avg", "max_exp_avg_sq", "square_avg", "sum")
_DAMAGE = (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError)


class Restoring(Callback):
    """A context around ``Trainer.fit``: while a checkpoint is restored, an error of Python is the checkpoint's fault.

    What the device, its memory or the way to another process does meanwhile is not.

    Args:
        checkpoint: What the run goes on from; None where it starts.
        needs_best: Whether the best student so far must be there, as it may be the one that is kept.

    ``restored`` says whether that is over, so that what happens is the run's own.

    Raises:
        DrkdError: On leaving the context, instead of the error.
    """

    def __init__(self, checkpoint: Path | None, *, needs_best: bool = False) -> None:
        self._checkpoint = checkpoint
        self._needs_best = needs_best
        self._restores = False
        self._content: dict[str, Any] = {}
        self.restored = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to restore: the processes have found each other, and nothing of the checkpoint is read yet.

        Raises:
            DrkdError: In every process, if some of them see a checkpoint and others none. Training would go on all the
                same, each process at a step of its own.
        """
        del trainer, pl_module
        if stage != "fit":
            return
        found = gather(self._checkpoint is not None)
        if len(set(found)) > 1:
            raise DrkdError(
                f"{sum(found)} of {len(found)} processes see a checkpoint to go on from in the run folder, the others "
                "none. It has to be one folder that all of them see (--output on a shared disk). If it is, another run "
                "was ending in it: start all of them again."
            )
        self._restores = self._checkpoint is not None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Have Lightning's checkpoint callbacks find their files where the run folder is now.

        A checkpoint names them by where they were. Where the folder has another name since, or is mounted elsewhere,
        Lightning would forget the best score and still look for the best student in the old place.

        Raises:
            DrkdError: If the best student is needed and not there, or the state of a callback does not fit.
        """
        del pl_module
        self._content = checkpoint
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            state = checkpoint["callbacks"].get(callback.state_key)
            self._refuse(find_misfit(callback.state_dict(), state, callback.state_key) if state is not None else None)
            if isinstance(callback, EarlyStopping) and state is not None:
                state["patience"] = callback.patience  # the one that the run was given now
            if not isinstance(callback, ModelCheckpoint) or not state or callback.dirpath is None:
                continue
            self._refuse(_move(state, Path(callback.dirpath)))
            best = state.get("best_model_path")
            if self._needs_best and callback.monitor and best and not Path(best).exists():
                raise DrkdError(
                    f"{best}: the best student so far is not there, and the run may have to keep it (training.keep, "
                    "training.patience). Put the file back, or start anew with --overwrite=true."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look over what is not taken over yet: counters, schedule, the optimizer's settings, the place in the data.

        A run that had stopped early is not trained on.

        Raises:
            DrkdError: If they cannot be this run's.
        """
        del pl_module
        if not self._restores:
            return
        content = self._content
        optimizers = [optimizer.state_dict()["param_groups"] for optimizer in trainer.optimizers]
        schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        saved = [entry["param_groups"] for entry in content["optimizer_states"]]
        self._refuse(find_misfit(optimizers, saved, "optimizer_states"))
        self._refuse(find_misfit(schedules, content["lr_schedulers"], "lr_schedulers"))
        loops = content["loops"]["fit_loop"]
        self._refuse(find_misfit(trainer.fit_loop.state_dict(), loops, "loops.fit_loop"))
        places = loops["state_dict"].get("combined_loader", [])
        self._refuse(find_misfit([{"epoch": 0, "position": 0}] * len(places), places, "loops: combined_loader"))
        # A run that lost its patience has ended; only a larger one has it go on.
        waits = (entry for entry in trainer.callbacks if isinstance(entry, EarlyStopping))  # type: ignore[attr-defined]
        if any(entry.wait_count >= entry.patience for entry in waits):
            trainer.should_stop = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All is restored.

        Raises:
            DrkdError: If counters disagree, also those of several processes, or the optimizer's state has other shapes
                than its parameters.
        """
        del pl_module
        if self._restores:
            step = self._content["global_step"]
            self._refuse(
                None if trainer.global_step == step else f"global_step is {step}, loops: {trainer.global_step}"
            )
            self._refuse(next(_misfits(trainer.optimizers), None))
            steps = sorted(set(gather(step)))
            if len(steps) > 1:
                raise DrkdError(
                    f"{self._checkpoint}: the processes would go on from different steps "
                    f"({', '.join(map(str, steps))}), so they do not see one and the same file. "
                    "Start all of them again, with --output on a shared disk."
                )
        self._content = {}
        self._restores = False
        self.restored = True

    def _refuse(self, reason: str | None) -> None:
        if reason is not None:
            raise DrkdError(self._message(reason))

    def _message(self, reason: str) -> str:
        return (
            f"{self._checkpoint}: the run cannot go on from this checkpoint ({reason}). It belongs to another recipe "
            "or is damaged; start anew with --overwrite=true or another --output."
        )

    def __enter__(self) -> Restoring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, trace
        kept = isinstance(error, DrkdError) or of_machine(error)
        if not self._restores or kept or not isinstance(error, _DAMAGE):
            return
        raise DrkdError(self._message(_first_line(error))) from error


@contextmanager
def explained_by_checkpoint(path: str | Path) -> Iterator[None]:
    """A context in which the best student is taken from its checkpoint: an error of Python is the file's fault.

    Raises:
        DrkdError: On leaving the context, instead of the error.
    """
    try:
        yield
    except DrkdError as error:
        raise DrkdError(f"{path}: {error}") from error
    except _DAMAGE as error:
        raise DrkdError(
            f"{path}: the best student cannot be taken from this checkpoint ({_first_line(error)}); it is damaged. The "
            "last student is in last.ckpt beside it: go on with --training.keep=last and without training.patience."
        ) from error


def _first_line(error: BaseException) -> str:
    reason = (str(error).strip() or "no reason given").splitlines()[0][:200]
    return f"{type(error).__name__}: {reason}"


def _misfits(optimizers: list[torch.optim.Optimizer]) -> Iterator[str]:
    """Where an optimizer's state is of another shape or kind than the parameter that it belongs to."""
    states: list[tuple[Any, Any]] = [entry for optimizer in optimizers for entry in optimizer.state.items()]
    for parameter, state in states:
        if not isinstance(parameter, torch.Tensor):
            continue  # of an unknown number, which nothing reads
        entries = state if isinstance(state, dict) else {_AS_LARGE[0]: state}
        for name in entries.keys() & set(_AS_LARGE):
            value = entries[name]
            whole = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if not (value is None or (whole and value.layout == torch.strided)):
                yield f"the optimizer's {name} does not fit a parameter of shape {tuple(parameter.shape)}"


def _move(state: dict[str, Any], folder: Path) -> str | None:
    """Change a ModelCheckpoint's state as if it had been written in another folder; what is wrong with it, if anything.

    Lightning removes the file that it calls the best when there is a better one, and folders too.
    """
    paths = [state.get(name, "") for name in ("best_model_path", "kth_best_model_path", "last_model_path")]
    scores = state.get("best_k_models", {})
    wrong = next((path for path in (*paths, *scores) if path and not str(path).endswith(".ckpt")), None)
    if wrong is not None:
        return f"it names {str(wrong)[:80]!r}, which is no checkpoint"
    given = [state.get(name) for name in ("best_model_score", "current_score")]
    if not all(is_score(score) for score in (*scores.values(), *(score for score in given if score is not None))):
        return "a score of its best students is no number"

    def moved(path: str) -> str:
        return str(folder / Path(path).name) if path else path

    state["dirpath"] = str(folder)
    for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
        if name in state:
            state[name] = moved(state[name])
    if "best_k_models" in state:
        state["best_k_models"] = {moved(path): score for path, score in state["best_k_models"].items()}
    return None
