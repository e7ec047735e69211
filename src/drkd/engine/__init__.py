"""Training: the plain `Distiller`, and the Lightning module and callbacks around it."""

from drkd.engine.balance import GradientBalance
from drkd.engine.distiller import DistillationMonitor, Distiller
from drkd.engine.guard import DeadDistillationError

__all__ = ["DeadDistillationError", "DistillationMonitor", "Distiller", "GradientBalance"]
