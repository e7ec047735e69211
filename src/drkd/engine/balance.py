"""Keep every distillation term as loud as it was meant to be, by gradient norms at the student's features."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from drkd.contracts import DrkdError


def term_family(name: str) -> str:
    """Return the part of a term's name before the level: ``pixel_relation`` of ``pixel_relation/p3``."""
    return name.partition("/")[0]


def gradient_norms(losses: Mapping[str, Tensor], features: Sequence[Tensor]) -> dict[str, Tensor]:
    """Measure the squared gradient norm of each loss at each feature map, without touching any ``.grad``.

    Args:
        losses: 0-d tensors by name; their graph is kept.
        features: L maps the losses were computed from.

    Returns:
        (L,) float32 by name; NaN marks a map that the loss does not depend on at all, infinity one whose gradient is
        not finite.
    """
    # Gradients of float16 maps are float16 too. Those of a mean over a large map underflow unless they are scaled, and
    # those of a sum overflow if they are: measured loudly first, then as they are, then quietly.
    half = any(feature.dtype == torch.float16 for feature in features)
    first, *quieter = (2.0**14, 1.0, 2.0**-10) if half else (1.0,)
    measured = {name: _squared_norms(loss, features, first) for name, loss in losses.items()}
    for factor in quieter:
        for name in _overflown(measured):
            again = _squared_norms(losses[name], features, factor)
            measured[name] = torch.where(measured[name].isinf(), again, measured[name])
    return measured


def _overflown(measured: Mapping[str, Tensor]) -> list[str]:
    """Names of what is infinite in any process: all measure again alike, since backward passes may be collective."""
    found = torch.stack([norms.isinf().any() for norms in measured.values()]).int()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return [name for name, flag in zip(measured, found.tolist(), strict=True) if flag]


def _squared_norms(loss: Tensor, features: Sequence[Tensor], factor: float) -> Tensor:
    if not loss.requires_grad:
        return torch.full((len(features),), float("nan"), device=features[0].device)
    gradients = torch.autograd.grad(loss * factor, list(features), retain_graph=True, allow_unused=True)
    return torch.stack(
        [
            torch.full((), float("nan"), device=feature.device)
            if gradient is None
            else _infinite_unless_finite((gradient.detach().float() / factor).square().sum())
            for gradient, feature in zip(gradients, features, strict=True)
        ]
    )


def _infinite_unless_finite(value: Tensor) -> Tensor:
    # Said twice: by itself `nan_to_num` makes the largest number there is of infinity.
    return value.nan_to_num(nan=float("inf"), posinf=float("inf"))


class GradientBalance(nn.Module):
    r"""Weights that hold each term's gradient norm at the student's features at a wanted ratio to the task loss's.

    For a term k with wanted ratio r, and the feature maps M(k) that k depends on, the weight is

        w_k = r * ||d task / d M(k)|| / ||d k / d M(k)||

    with both norms averaged over the measurements taken in the first ``calibration_steps`` steps (recent ones count
    more: early training is not typical), and frozen afterwards. Why: with weights that look sensible the gradient of
    relative distances was 10 to 100 times smaller than the task's and distillation was silently off
    (docs/method.md). A plain weight has to be found anew for each method and teacher; over image size, batch size
    and width a ratio was about as sensitive as a plain weight (benchmarks/results/sensitivity).

    The state (norms, weights, step) is part of the state dict, so a resumed run goes on with the same weights. Under
    ``torch.distributed`` the norms are averaged over the processes, so that all use the same weights.

    Args:
        calibration_steps: Steps after which the weights are frozen.
        interval: Every how many steps a measurement is taken while calibrating.
        momentum: Share of the old average kept at a measurement, in [0, 1).
    """

    def __init__(self, *, calibration_steps: int = 100, interval: int = 5, momentum: float = 0.8) -> None:
        super().__init__()
        if calibration_steps < 1 or interval < 1 or not 0 <= momentum < 1:
            raise ValueError(
                "GradientBalance expects calibration_steps >= 1, interval >= 1 and 0 <= momentum < 1, "
                f"got {calibration_steps}, {interval} and {momentum}"
            )
        self.calibration_steps = calibration_steps
        self.interval = interval
        self.momentum = momentum
        self._task_norms: dict[str, Tensor] = {}
        self._term_norms: dict[str, Tensor] = {}
        self._step = 0
        self._known: set[str] = set()
        self._warned = False

    def forward(
        self,
        task_loss: Tensor,
        terms: Mapping[str, Tensor],
        features: Sequence[Tensor],
        *,
        weights: Mapping[str, float],
    ) -> Tensor:
        """Balance and sum the terms, for a training loop that does not use `Distiller` (which calls the parts).

        Args:
            task_loss: 0-d, the student's own loss.
            terms: Bare terms by name, as a method returns them.
            features: The student's feature maps that the losses were computed from; those of a frozen stage, which
                carry no gradient, are left out.
            weights: Wanted gradient ratio by term, such as ``DRKD.weights``; 1 where absent.

        Without gradients (validation) nothing is measured, and no step counts. A term that had nothing to say in the
        first steps (no boxes) is measured when it has.

        Returns:
            0-d, to be added to the task loss.
        """
        if torch.is_grad_enabled() and task_loss.requires_grad:
            late = self._step >= self.calibration_steps and self._step % self.interval == 0 and self._lacks(terms)
            if late or self.wants_measurement(self._step):
                heard = [feature for feature in features if feature.requires_grad]
                if not heard:
                    raise DrkdError(
                        "GradientBalance: expected feature maps that carry a gradient, got none: they were detached, "
                        "or all that makes them is frozen."
                    )
                norms = gradient_norms({"": task_loss, **terms}, heard)
                self.update(norms.pop(""), norms, frozen=late)
            self._step += 1
        weighted = [weights.get(term_family(name), 1.0) * self.scale(name, term) * term for name, term in terms.items()]
        return torch.stack(weighted).sum()

    def _lacks(self, terms: Mapping[str, Tensor]) -> bool:
        """Whether a term has no weight yet; waits for the device, but no more once all have one."""
        unknown = [name for name in terms if name not in self._known]
        if unknown:
            found = torch.stack([self.scale(name, terms[name]) for name in unknown]).tolist()
            self._known |= {name for name, value in zip(unknown, found, strict=True) if value > 0}
        silent = [name for name in unknown if name not in self._known]
        if silent and not self._warned:
            self._warned = True
            warnings.warn(
                f"Distillation is partly off: {', '.join(silent)} sent no gradient to the features in the first "
                f"{self.calibration_steps} steps and weighs nothing until it does. Usual causes: images with too few "
                "boxes for it, features that are detached, or a teacher that is constant.",
                stacklevel=3,
            )
        return bool(silent)

    def wants_measurement(self, step: int) -> bool:
        """Whether the norms are to be measured at this step (0-based)."""
        return step < self.calibration_steps and step % self.interval == 0

    def update(self, task: Tensor, terms: Mapping[str, Tensor], *, frozen: bool = False) -> None:
        """Take in one measurement.

        Args:
            task: (L,) squared gradient norms of the task loss, from `gradient_norms`.
            terms: (L,) squared gradient norms by term; NaN where a term does not reach a map.
            frozen: Calibration is over: only a term that could not be measured until now is taken in (a data set
                with few pairs of objects may show none in the first steps).
        """
        for name, squared in terms.items():
            reached = ~squared.isnan()
            # Infinity stays that: as the largest number there is it would make a weight.
            whole = (norms.nan_to_num(posinf=float("inf")) for norms in (task, squared))
            pair = torch.stack([torch.where(reached, norms, 0).sum().sqrt() for norms in whole])
            pair = _mean_over_processes(pair)
            # A batch in which the term had nothing to say (no boxes) must not pull the averages down.
            usable = _is_usable(pair)
            # Nothing yet is 0, which `scale` gives no weight. A resumed run's norms come from a checkpoint on the CPU.
            old = torch.stack([norms.get(name, torch.zeros_like(pair[0])).to(pair.device) for norms in self._norms])
            started = (old > 0).all() & old.isfinite().all()
            averaged = old if frozen else self.momentum * old + (1 - self.momentum) * pair
            kept = torch.where(started, averaged, pair)
            new = torch.where(usable, kept, old)
            self._task_norms[name], self._term_norms[name] = new[0], new[1]

    @property
    def _norms(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self._task_norms, self._term_norms

    def scale(self, name: str, like: Tensor) -> Tensor:
        """Return the factor that makes the term exactly as loud as the task loss; 0 before any measurement."""
        if name not in self._term_norms:
            return torch.zeros((), device=like.device)
        task, term = (norms[name].to(like.device) for norms in self._norms)
        self._task_norms[name], self._term_norms[name] = task, term
        return torch.where((term > 0) & term.isfinite(), task / term.clamp_min(1e-30), torch.zeros_like(term))

    def get_extra_state(self) -> dict[str, Any]:
        """State that is saved with the state dict."""
        return {"task": dict(self._task_norms), "terms": dict(self._term_norms), "step": self._step}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over saved state."""
        self._task_norms, self._term_norms = dict(state["task"]), dict(state["terms"])
        self._step = int(state["step"])


def _is_usable(pair: Tensor) -> Tensor:
    """Whether norms of task and term say how loud the term is.

    Those of a term that is all but silent would make a weight beyond all bounds, and for good.
    """
    return (pair > 0).all() & pair.isfinite().all() & (pair[1] > 1e-8 * pair[0])


def _mean_over_processes(value: Tensor) -> Tensor:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    # A process whose boxes gave the term nothing to say neither counts nor adds.
    good = _is_usable(value)
    total = torch.cat([torch.where(good, value, torch.zeros_like(value)), good.to(value).reshape(1)])
    torch.distributed.all_reduce(total)
    return total[:2] / total[2].clamp_min(1)
