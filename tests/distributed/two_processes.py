"""Losses and gradients of two gloo processes beside those of one process with both their images.

    python tests/distributed/two_processes.py          # prints the table of docs/distributed.md

Started with RANK set, it is one of the two processes and writes what it found to the folder in its first argument.
"""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from drkd.adapters import FasterRCNNBuilder, FCOSBuilder, RetinaNetBuilder
from drkd.contracts import BoxTargets, DetectionBatch, DetectorBuilder, DetectorSpec, DrkdError, KDMethod
from drkd.engine import Distiller
from drkd.engine.module import DistillationModule, Optimization
from drkd.engine.nonfinite import NonFiniteSteps
from drkd.methods import (
    CWD,
    DRKD,
    FGD,
    FGFI,
    MGD,
    NLD,
    PKD,
    CrossKD,
    DeFeat,
    FeatureHint,
    FitNet,
    LogitKD,
    PaperDRKD,
    ReleasedDRKD,
)
from drkd.recipes.restoring import Restoring

MethodFactory = Callable[[DetectorSpec, DetectorSpec], KDMethod]
Found = dict[str, dict[str, torch.Tensor]]
_SMALL = {"width": 0.25, "norm": "frozen", "image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}


def fixed_drkd(student: DetectorSpec, teacher: DetectorSpec) -> KDMethod:
    return DRKD(student, teacher, balanced=False, warmup_steps=0)


def _cases() -> dict[str, tuple[DetectorBuilder, MethodFactory | None]]:
    retinanet = RetinaNetBuilder(fpn_channels=32, extra="none", **_SMALL)
    small = RetinaNetBuilder(backbone="resnet18", fpn_channels=32, extra="none", **_SMALL)
    return {
        "RetinaNet": (retinanet, None),
        "RetinaNet, feature hint": (retinanet, lambda s, t: FeatureHint(s, t)),
        "RetinaNet, DRKD": (retinanet, fixed_drkd),
        "RetinaNet, PKD": (retinanet, lambda s, t: PKD(s, t)),
        "RetinaNet, batch norm": (RetinaNetBuilder(fpn_channels=32, extra="none", **{**_SMALL, "norm": "batch"}), None),
        "FCOS": (FCOSBuilder(fpn_channels=64, **_SMALL), None),
        "Faster R-CNN": (FasterRCNNBuilder(fpn_channels=32, representation_size=64, **_SMALL), None),
        **{
            name: (small, method if name == BALANCED else partial(method, balanced=False))
            for name, method in ALONE.items()
        },
    }


BALANCED = "DRKD, balanced"
# Their terms without the task's loss, which would hide them: with fixed weights they may be a millionth of it.
ALONE: dict[str, Callable[..., KDMethod]] = {
    "FitNet": FitNet,
    "CWD": CWD,
    "FGD": FGD,
    "MGD": MGD,
    "MGD, no mask": partial(MGD, masked_share=0.0),
    "NLD": NLD,
    "FGFI": FGFI,
    "DeFeat": DeFeat,
    "CrossKD": CrossKD,
    "CrossKD, no align": partial(CrossKD, align=False),
    "LogitKD": LogitKD,
    "Feature hint": FeatureHint,
    "PKD": PKD,
    "DRKD": DRKD,
    BALANCED: partial(DRKD, warmup_steps=0),
    "DRKD, paper": PaperDRKD,
    "DRKD, released": ReleasedDRKD,
}
CASES = _cases()


def images(count: int, boxes: tuple[int, ...]) -> DetectionBatch:
    """Images of 96 px with so many boxes each, in float64."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand(count, 3, 96, 96, generator=generator, dtype=torch.float64)
    targets = []
    for number in boxes:
        corner = torch.rand(number, 2, generator=generator) * 50
        sides = 18 + torch.rand(number, 2, generator=generator) * 24
        labels = torch.randint(0, 2, (number,), generator=generator)
        targets.append(
            BoxTargets(torch.cat([corner, corner + sides], 1).double(), labels, torch.zeros(number, dtype=torch.bool))
        )
    size = ((96, 96),) * count
    return DetectionBatch(pixels, size, size, tuple(targets), tuple(range(count)))


def share(batch: DetectionBatch, rank: int) -> DetectionBatch:
    """Half of a batch of four."""
    half = slice(2 * rank, 2 * rank + 2)
    fields = (batch.images, batch.sizes, batch.original_sizes, batch.targets, batch.image_ids)
    return DetectionBatch(*(field[half] for field in fields))


def distiller(name: str) -> Distiller:
    """Student, teacher and method of a case, in float64."""
    builder, method = CASES[name]
    torch.manual_seed(0)
    student = builder.build(("cat", "dog"))
    teacher = None
    if method is not None:
        torch.manual_seed(1)
        teacher = builder.build(("cat", "dog"))
    torch.manual_seed(2)
    return Distiller(student, teacher, method).double().train()


def step(module: nn.Module, batch: DetectionBatch, *, seed: int, alone: bool) -> dict[str, torch.Tensor]:
    """One forward and backward pass: the losses by name, and all gradients in one vector."""
    torch.manual_seed(seed)
    losses = module(batch)
    if alone:
        # Times zero: every parameter must take part.
        losses = {key: (0.0 if key.startswith("task/") else 1.0) * value for key, value in losses.items()}
    torch.stack([value.double() for value in losses.values()]).sum().backward()
    gradients = [
        (p.grad if p.grad is not None else torch.zeros_like(p)).flatten()
        for p in module.parameters()
        if p.requires_grad
    ]
    return {**{key: value.detach() for key, value in losses.items()}, "gradient": torch.cat(gradients)}


SCENES = {"boxes in all": (2, 2, 2, 2), "unlike counts": (4, 1, 2, 3), "none on one rank": (2, 3, 0, 0)}


def compute(rank: int | None) -> Found:
    """Every case and scene, as one process with all four images (rank None) or as one of two."""
    found: Found = {}
    for name in CASES:
        built = distiller(name)
        for scene, counts in SCENES.items():
            batch, module = images(4, counts), copy.deepcopy(built)
            wrapped = module if rank is None else DistributedDataParallel(module)
            mine = batch if rank is None else share(batch, rank)
            found[f"{name} / {scene}"] = step(wrapped, mine, seed=10 + (rank or 0), alone=name in ALONE)
    return found


class _Breaking(DistillationModule):
    """Its loss becomes infinite at one step, by a summand without a gradient: the gradients stay finite."""

    at: int | None = None

    def training_step(self, batch: DetectionBatch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + math.inf if batch_idx == self.at else loss


def skip(rank: int, *, broken: bool) -> dict[str, torch.Tensor]:
    """The student after three steps of two processes, without and with two more that are not finite on the second."""
    builder, _ = CASES["RetinaNet, batch norm"]
    torch.manual_seed(0)
    module = _Breaking(
        Distiller(builder.build(("cat", "dog"))),
        Optimization(optimizer="sgd", learning_rate=0.01, warmup_steps=0, milestones=()),
    )
    good = share(images(4, (2, 2, 2, 2)), rank)
    good = replace(good, images=good.images.float())
    batches = [good] * 3
    if broken:
        pixels = good.images.clone()
        pixels[0, 0, 0, 0] = math.nan if rank == 1 else 0.5
        batches = [good, replace(good, images=pixels), good, good, good]
        module.at = 3 if rank == 1 else None
    skipping = NonFiniteSteps(2)
    _fit(module, batches, skipping)
    state = {name: tensor for name, tensor in module.distiller.student.state_dict().items() if tensor.ndim}
    return {**state, "skipped": torch.tensor(skipping.skipped)}


def learn(rank: int) -> dict[str, torch.Tensor]:
    """The teacher and the student after two steps of two processes that built unlike teachers."""
    builder, method = CASES["RetinaNet, feature hint"]
    torch.manual_seed(0)
    student = builder.build(("cat", "dog"))
    torch.manual_seed(1 + rank)
    distiller = Distiller(student, builder.build(("cat", "dog")), method)
    module = DistillationModule(distiller, Optimization(learning_rate=0.01, warmup_steps=0, milestones=()))
    batch = share(images(4, (2, 2, 2, 2)), rank)
    _fit(module, [replace(batch, images=batch.images.float())] * 2)
    return {name: tensor for name, tensor in distiller.state_dict().items() if isinstance(tensor, Tensor)}


def disagree(rank: int) -> dict[str, str]:
    """What two processes say that see a checkpoint each for itself, or checkpoints of unlike steps."""
    trainer: Any = SimpleNamespace(callbacks=[], optimizers=[], global_step=3 + rank)
    said = {}
    for what, seen in {"one": rank == 0, "none": False, "both": True}.items():
        restoring = Restoring(Path("last.ckpt") if seen else None)
        try:
            restoring.setup(trainer, nn.Module(), "fit")  # type: ignore[arg-type]
            restoring.on_load_checkpoint(trainer, nn.Module(), {"global_step": 3 + rank, "callbacks": {}})  # type: ignore[arg-type]
            restoring.on_train_start(trainer, nn.Module())  # type: ignore[arg-type]
            said[what] = ""
        except DrkdError as error:
            said[what] = str(error)
    return said


def _fit(module: DistillationModule, batches: list[DetectionBatch], *callbacks: Callback) -> None:
    Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
    ).fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]


def run_two(folder: Path) -> tuple[Found, Found]:
    """Start both processes and return what each found; what `skip`, `learn` and `disagree` return is left there."""
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=480)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started):
        raise RuntimeError("\n".join(error[-1500:] for error in errors))
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))
    return first, second


def relative_differences(one: Found, pair: tuple[Found, Found]) -> dict[str, tuple[float, float]]:
    """By case, how far the mean loss and the gradient of two processes are from one process', relative."""
    table = {}
    for name, alone in one.items():
        ours = [sum(float(v) for k, v in rank[name].items() if k != "gradient") for rank in pair]
        theirs = sum(float(v) for k, v in alone.items() if k != "gradient")
        gradient = pair[0][name]["gradient"] - alone["gradient"]
        table[name] = (
            abs(sum(ours) / 2 - theirs) / abs(theirs),
            float(gradient.norm() / alone["gradient"].norm()),
        )
    return table


def main() -> None:
    """Be one of two processes, or start both and print the table."""
    if "RANK" in os.environ:
        folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
        store = distributed.FileStore(str(folder / "store"), 2)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
        torch.save(compute(rank), folder / f"{rank}.pt")
        torch.save([skip(rank, broken=broken) for broken in (False, True)], folder / f"skip{rank}.pt")
        torch.save(learn(rank), folder / f"learn{rank}.pt")
        torch.save(disagree(rank), folder / f"disagree{rank}.pt")
        distributed.barrier()
        distributed.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as place:
        pair = run_two(Path(place))
    for name, (loss, gradient) in relative_differences(compute(None), pair).items():
        print(f"{name:<45} loss {loss:.1e}  gradient {gradient:.1e}")


if __name__ == "__main__":
    main()
