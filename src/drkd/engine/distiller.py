"""Student, frozen teacher and method in one plain ``nn.Module``: a batch goes in, named weighted losses come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from drkd.contracts import (
    DetectionBatch,
    Detector,
    DetectorOutput,
    DetectorSpec,
    DrkdError,
    KDMethod,
    Want,
)
from drkd.engine.balance import GradientBalance, gradient_norms, term_family
from drkd.engine.guard import DeadDistillationError, are_constant, check_parts, stop_if_silent
from drkd.engine.teachers import join_teachers
from drkd.engine.unlabelled import BatchPart, UnlabelledImages, split_batch

MethodFactory = Callable[[DetectorSpec, DetectorSpec], KDMethod]


@dataclass
class DistillationMonitor:
    """What the last step and the last measurement showed; read by loggers, never by the arithmetic.

    Attributes:
        terms: By term, its bare value summed over levels, 0-d and detached, of the last step.
        ratios: By term, gradient norm at the student's features over the task's, after weighting; 0-d, detached.
        weights: By full term name, the factor in force.
        targets: By term, the standard deviation of what the student's side is compared with, mean over levels, at the
            last measurement; of methods that look, see `KDMethod.target_spread`.
        silent: By term, consecutive measurements without any gradient although it could have had one.
    """

    terms: dict[str, Tensor] = field(default_factory=dict)
    ratios: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    targets: dict[str, Tensor] = field(default_factory=dict)
    silent: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Seen:
    """What came of the images that went through the detectors together.

    Args:
        images: Their number.
        losses: The student's task losses, where asked for.
        features: The student's feature maps.
        terms: The method's bare terms.
        counts: See `KDMethod.shared_counts`.
        compared: See `KDMethod.compared_counts`.
        taught: A teacher's feature maps by its name, where they are to be looked at; that of a single one is empty.
    """

    images: int
    losses: Mapping[str, Tensor]
    features: list[Tensor]
    terms: Mapping[str, Tensor]
    counts: Mapping[str, Tensor]
    compared: Mapping[str, Tensor]
    taught: Mapping[str, list[Tensor]]


def _average(parts: Sequence[tuple[Mapping[str, Tensor], float]]) -> dict[str, Tensor]:
    """Sum terms over parts, each times its share of the images; a single part stays as it is, bit for bit."""
    if len(parts) == 1:
        return dict(parts[0][0])
    return {name: torch.stack([share * terms[name] for terms, share in parts]).sum() for name in parts[0][0]}


def _share_counts(terms: Mapping[str, Tensor], counts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The terms that have a count, with its mean over the processes in its place; see `KDMethod.shared_counts`.

    One collective a pass, whatever the images: all processes have the same terms.
    """
    names = list(counts[0])
    if not names or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return {}
    values = torch.stack([terms[name] for name in names])
    own = torch.stack([torch.stack([part[name] for part in counts]).sum() for name in names]).to(values.dtype)
    mean = own / torch.distributed.get_world_size()
    torch.distributed.all_reduce(mean)
    return dict(zip(names, values * (own.clamp_min(1) / mean.clamp_min(1)), strict=True))


def _maps_by_teacher(output: DetectorOutput) -> dict[str, list[Tensor]]:
    outputs = output.members or {"": output}
    return {name: [level.tensor for level in own.features] for name, own in outputs.items()}


class Distiller(nn.Module):
    r"""Distillation as a plain module for any training loop: ``losses = distiller(batch); sum(losses.values())``.

    The total is L = sum task/* + sum_k w_k * kd/k (METHOD: DRKD equation of the paper, any method here). The teacher
    stays in eval mode whatever ``train()`` says, computes only what the method needs, and gets no gradient. The student
    is not changed: `student.model` keeps its parameter names and its graph.

    Optimise ``distiller.trainable_parameters()``: the student's and the method's connectors.

    Args:
        student: The detector to train. One that comes in eval mode as a whole, as ``from_pretrained`` leaves it, is
            set to training; for fixed norms set those to eval mode afterwards.
        teacher: The detector to learn from, or None to train the student alone. Several by name each get a method of
            their own; their terms are named ``kd/<teacher>.<term>``.
        method: A method, or what builds one from the two specs (``DRKD`` itself will do); None with no teacher. It is
            moved to the device of the student's weights.
        teacher_weights: Of several teachers, by name, > 0; 1 where absent.
        calibration_steps: With a balanced method, steps after which the weights are frozen.
        calibration_interval: Every how many steps norms are measured while calibrating.
        monitor_interval: Every how many steps norms are measured afterwards, for the log and the guard.
        dead_after: Consecutive silent measurements of a term that raise `DeadDistillationError`; None: none do, and
            silence shows in `monitor` only.
        accumulate: Forward passes per optimizer step; warm-up, calibration and monitoring count optimizer steps.
        total_steps: Optimizer steps of the whole run, for a method whose weights decay, see `KDMethod`, or that has
            terms in a part of the run only (such as ``response_span`` of `DRKD`); None: the weights stay, and such a
            method is refused. drkd's own trainer sets it.
        unlabelled: How images that ``DetectionBatch.labelled`` says have no labels are used. Without pseudo-labels they
            go through the detectors apart from the others, so batch norms and terms that relate images see two
            smaller batches; each term is then the mean over all images.

    Raises:
        ValueError: If exactly one of teacher and method is given.
        DrkdError: If the method, or one within it, has a ``decay`` that does not exist.
        DeadDistillationError: In forward, when a term is silent.
        DrkdError: In forward, when an image has no labels and there is no teacher, or a method needs ``total_steps``.
    """

    def __init__(
        self,
        student: Detector,
        teacher: Detector | Mapping[str, Detector] | None = None,
        method: KDMethod | MethodFactory | None = None,
        *,
        teacher_weights: Mapping[str, float] | None = None,
        calibration_steps: int = 100,
        calibration_interval: int = 5,
        monitor_interval: int = 50,
        dead_after: int | None = 3,
        accumulate: int = 1,
        total_steps: int | None = None,
        unlabelled: UnlabelledImages | None = None,
    ) -> None:
        super().__init__()
        if (teacher is None) != (method is None):
            raise ValueError("Distiller expects both a teacher and a method, or neither (student alone)")
        if min(monitor_interval, 1 if dead_after is None else dead_after, accumulate) < 1:
            raise ValueError(
                "Distiller expects monitor_interval, dead_after (unless None) and accumulate >= 1, "
                f"got {monitor_interval}, {dead_after} and {accumulate}"
            )
        check_parts(student, teacher, method)
        if isinstance(teacher, Mapping):
            if method is None or isinstance(method, KDMethod):
                raise ValueError("Distiller expects what builds a method (such as DRKD) with several teachers, not one")
            teacher, method = join_teachers(student.spec, teacher, method, weights=teacher_weights)
        elif teacher_weights:
            raise ValueError("Distiller expects teacher_weights with several teachers only")
        self.student = student
        self.teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False).eval()
        if method is None or isinstance(method, KDMethod):
            self.method = method
        else:
            assert teacher is not None  # narrowed by the check above
            self.method = method(student.spec, teacher.spec)
        device = next((parameter.device for parameter in student.parameters()), None)
        if self.method is not None and device is not None and device.type != "meta":
            self.method.to(device)
        for module in self.method.modules() if self.method is not None else ():
            if isinstance(module, KDMethod):
                module.schedule(0)  # says what is wrong with it now, not after the first batch
        self.balance = GradientBalance(calibration_steps=calibration_steps, interval=calibration_interval)
        self.monitor = DistillationMonitor()
        self.monitor_interval = monitor_interval
        self.dead_after = dead_after
        self.accumulate = accumulate
        self.total_steps = total_steps
        self.unlabelled = unlabelled or UnlabelledImages()
        self._passes = 0
        self._told: tuple[int, bool] | None = None
        self.wake_student()

    def train(self, mode: bool = True) -> Distiller:
        """Set the mode of the student and the method; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def wake_student(self) -> None:
        """Set a student to training that its builder made ready for use, as ``from_pretrained`` does.

        Otherwise its norms and its dropout would be at rest for the whole run. A model that is in training as a whole
        is left as it is, whatever parts of it rest.
        """
        # A wrapper's own mode says nothing of the model within.
        model = getattr(self.student, "model", None)
        asleep = isinstance(model, nn.Module) and not model.training
        if asleep or not self.student.training:
            self.student.train()

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters to give to the optimizer: the student's and the method's that require gradient."""
        for module in (self.student, self.method):
            if module is not None:
                yield from (p for p in module.parameters() if p.requires_grad)

    def at_step(self, step: int, *, first: bool) -> None:
        """Say where the next pass is, in a loop whose optimizer steps are not always ``accumulate`` passes long.

        Without it passes are counted. Some trainers, Lightning among them, step at the end of an epoch too.

        Args:
            step: Optimizer steps so far.
            first: Whether the next pass is the first of its step: only there gradient norms are measured.
        """
        self._told = step, first

    def forward(self, batch: DetectionBatch, *others: object) -> dict[str, Tensor]:
        """Run student, teacher and method.

        Args:
            batch: Images and targets in one.
            *others: None are expected: they are what torchvision's detectors take beside the images, and are refused.

        Returns:
            0-d tensors: ``task/<name>`` as the detector gives them, ``kd/<term>`` weighted and summed over levels.
            Their sum is what to back-propagate.

        Raises:
            ValueError: If a label is none of the student's classes, in a step that measures gradients, as the first
                does; not looked at on a GPU, which that would wait for.
        """
        if others or not isinstance(batch, DetectionBatch):
            found = " and ".join(type(value).__name__ for value in (batch, *others))
            raise TypeError(
                f"Distiller expects one DetectionBatch, got {found}. Make one of images and targets as "
                "torchvision's detectors take them: DetectionBatch.from_lists(images, targets)."
            )
        if self.method is None or self.teacher is None:
            if not all(batch.labelled):
                raise DrkdError(
                    "An image of the batch has no labels, and there is no teacher to label it: give a teacher and a "
                    "method, or leave out data.unlabelled."
                )
            output = self.student(batch, want=frozenset[Want]({"losses"}))
            return {f"task/{name}": value for name, value in output.losses.items()}
        if any(module.training for module in self.teacher.modules()):
            # Somebody called train() on it, or on the model within: its norms would follow the student's images.
            self.teacher.eval()
        training = self.training and torch.is_grad_enabled()
        measuring = training and self._measures
        if measuring:
            _refuse_unknown_labels(batch, len(self.student.spec.class_names))
        progress = min(1.0, self._step / self.total_steps) if self.total_steps else None
        for module in self.method.modules():
            if isinstance(module, KDMethod):
                if module.needs_run_length and progress is None and training:
                    raise DrkdError(
                        f"{type(module).__name__} has terms in a part of the run only (`span`, DRKD's `response_span`) "
                        "and nobody says how long the run is: expected `total_steps` of Distiller, or no such span."
                    )
                module.begin_pass(self._passes, measured=measuring or not training, progress=progress)
        parts = split_batch(batch, student=self.student, teacher=self.teacher, settings=self.unlabelled)
        seen = [self._see(part, losses=part is parts[0], looking=measuring) for part in parts]
        features = [feature for part in seen for feature in part.features]
        terms = _average([(part.terms, part.images / len(batch)) for part in seen])
        if self.training:
            terms |= _share_counts(terms, [part.counts for part in seen])
        # Parts whose task loss counts come first. Where none does, the losses are multiplied by zero rather than left
        # out: every parameter must take part in every step of every process, and names must stay the same.
        counts = parts[0].counts
        task = {f"task/{name}": value if counts else 0.0 * value for name, value in seen[0].losses.items()}
        if measuring:
            boxes = [box for part in parts for box in part.batch.boxes]
            total = sum(task.values(), torch.zeros((), device=batch.images.device))
            constant = {
                name: are_constant([feature for part in seen for feature in part.taught[name]], total)
                for name in seen[0].taught
            }
            compared: dict[str, Tensor] = {}
            for name, value in (item for part in seen for item in part.compared.items()):
                family = term_family(name)
                compared[family] = compared[family] + value if family in compared else value
            self._measure(total, terms, features, boxes=boxes, counts=counts, compared=compared, constant=constant)
        losses = {**task, **self._weigh(terms)}
        if self.training:
            self._passes += 1
            self._told = None
        return losses

    def _see(self, part: BatchPart, *, losses: bool, looking: bool) -> _Seen:
        """Run student, teacher and method on some of the images."""
        assert self.method is not None and self.teacher is not None  # only called with both
        teacher_needs = self.method.needs if self.method.teacher_needs is None else self.method.teacher_needs
        # First the teacher, before these images' student keeps anything for its backward pass: what the teacher's
        # layers take on the way is let go again.
        with torch.no_grad():
            teacher = self.teacher(part.batch, want=teacher_needs)
        student = self.student(part.batch, want=self.method.needs | ({"losses"} if losses else frozenset[Want]()))
        terms = self.method(student, teacher, part.batch)
        return _Seen(
            len(part.batch),
            student.losses,
            [level.tensor for level in student.features],
            terms,
            self.method.shared_counts(),
            self.method.compared_counts() if looking else {},
            _maps_by_teacher(teacher) if looking else {},
        )

    @property
    def _step(self) -> int:
        """Optimizer steps so far."""
        return self._passes // self.accumulate if self._told is None else self._told[0]

    @property
    def _calibrates(self) -> bool:
        """Whether the weights are set by what is measured at this step."""
        assert self.method is not None  # only called with a method
        return self.method.balanced and self.balance.wants_measurement(self._step)

    @property
    def _measures(self) -> bool:
        """Whether gradient norms are measured at this pass."""
        first_pass = self._passes % self.accumulate == 0 if self._told is None else self._told[1]
        return first_pass and (self._calibrates or self._step % self.monitor_interval == 0)

    def _schedule(self) -> float:
        assert self.method is not None  # only called with a method
        return self.method.schedule(self._step, self.total_steps)

    def _weight(self, name: str, like: Tensor) -> Tensor | float:
        assert self.method is not None  # only called with a method
        weight = self.method.weights.get(term_family(name), 1.0)
        return weight * self.balance.scale(name, like) if self.method.balanced else weight

    def _weigh(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        schedule = self._schedule()
        weighted: dict[str, Tensor] = {}
        bare: dict[str, Tensor] = {}
        for name, value in terms.items():
            weight = self._weight(name, value) * schedule
            self.monitor.weights[name] = torch.as_tensor(weight)
            key = f"kd/{term_family(name)}"
            weighted[key] = weighted[key] + weight * value if key in weighted else weight * value
            family = term_family(name)
            bare[family] = bare[family] + value.detach() if family in bare else value.detach()
        self.monitor.terms = bare
        return weighted

    def _measure(
        self,
        task: Tensor,
        terms: Mapping[str, Tensor],
        features: Sequence[Tensor],
        *,
        boxes: Sequence[Tensor],
        counts: bool,
        compared: Mapping[str, Tensor],
        constant: Mapping[str, Tensor],
    ) -> None:
        assert self.method is not None  # only called with a method
        heard = task.requires_grad and any(feature.requires_grad for feature in features)
        if not heard and not self.method.balanced and (self.dead_after is None or self._reaches_student(terms)):
            # Plain weights need no norms: a method of predictions alone, or a frozen neck and a head that learns.
            return
        if not heard:
            raise DeadDistillationError(
                "The student's features carry no gradient, so nothing can be distilled into them: its backbone and "
                "neck are frozen, its features were detached, or the method asked for none. Unfreeze it "
                "(frozen_stages) or distil other levels; a method that compares predictions alone needs plain weights "
                "(balanced: false)."
            )
        reached = [index for index, feature in enumerate(features) if feature.requires_grad]
        norms = gradient_norms({"": task, **terms}, [features[index] for index in reached])
        task_norms = norms.pop("")
        if self.method.balanced:
            self.balance.update(task_norms, norms, frozen=not self._calibrates)
        self._note_ratios(task_norms, norms, terms, boxes=boxes, counts=counts, compared=compared, constant=constant)
        spreads: dict[str, list[Tensor]] = {}
        for name, value in self.method.target_spread().items():
            spreads.setdefault(term_family(name), []).append(value)
        self.monitor.targets = {family: torch.stack(values).mean() for family, values in spreads.items()}

    def _reaches_student(self, terms: Mapping[str, Tensor]) -> bool:
        """Whether a term depends on a weight of the student's that is trained."""
        weights = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        heard = [term.float() for term in terms.values() if term.requires_grad]
        if not weights or not heard:
            return False
        total = torch.stack(heard).sum()
        found = torch.autograd.grad(total, weights, retain_graph=True, allow_unused=True)
        return any(gradient is not None for gradient in found)

    def _note_ratios(
        self,
        task: Tensor,
        norms: Mapping[str, Tensor],
        terms: Mapping[str, Tensor],
        *,
        boxes: Sequence[Tensor],
        counts: bool,
        compared: Mapping[str, Tensor],
        constant: Mapping[str, Tensor],
    ) -> None:
        assert self.method is not None  # only called with a method
        schedule = self._schedule()
        squared: dict[str, Tensor] = {}
        reached: dict[str, Tensor] = {}
        for name, value in norms.items():
            family = term_family(name)
            known = value.nan_to_num(posinf=float("inf")).sum()
            # Where no image has labels there is no task to be as loud as, and there may be no weight yet.
            weighted = known * (self._weight(name, terms[name]) * schedule) ** 2 if counts else known
            squared[family] = squared[family] + weighted if family in squared else weighted
            reached[family] = reached[family] | ~value.isnan() if family in reached else ~value.isnan()
        if counts:
            # Beside the task's gradient on the maps that the term reaches: what the balance holds the term to.
            self.monitor.ratios = {
                family: (
                    value / torch.where(reached[family], task.nan_to_num(posinf=float("inf")), 0).sum().clamp_min(1e-30)
                ).sqrt()
                for family, value in squared.items()
            }
        facts = torch.stack(
            [value.to(task.dtype) for value in (*squared.values(), *compared.values(), *constant.values())]
        )
        values = iter(facts.tolist())
        stop_if_silent(
            {name: next(values) for name in squared},
            self.monitor.silent,
            method=self.method,
            scheduled=schedule > 0,
            most_boxes=max((len(entry) for entry in boxes), default=0),
            compared={name: next(values) for name in compared},
            constant={name: bool(next(values)) for name in constant},
            dead_after=self.dead_after,
            step=self._step,
            like=task,
        )

    def get_extra_state(self) -> dict[str, Any]:
        """State saved with the state dict: the passes, how many of them are a step, and the guard's counters."""
        return {"passes": self._passes, "accumulate": self.accumulate, "silent": dict(self.monitor.silent)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over saved state; the clock goes on at its optimizer step where a step now takes other passes."""
        saved = max(1, int(state.get("accumulate", self.accumulate)))
        passes = int(state["passes"])
        self._passes = passes if saved == self.accumulate else passes // saved * self.accumulate
        self.monitor.silent = dict(state["silent"])


def _refuse_unknown_labels(batch: DetectionBatch, classes: int) -> None:
    labels = [target.labels for target in batch.targets if target.labels.device.type == "cpu"]
    largest = max((int(found.max()) for found in labels if len(found)), default=-1)
    if 0 < classes <= largest:
        raise ValueError(
            f"expected labels from 0 to {classes - 1}, the student's {classes} classes, got {largest}; do yours begin "
            "at 1 (from_lists(..., first_label=1))?"
        )
