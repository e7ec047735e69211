"""Training: the plain `Distiller`, and the Lightning module and callbacks around it."""

from drkd.engine.balance import GradientBalance
from drkd.engine.distiller import DeadDistillationError, DistillationMonitor, Distiller

__all__ = ["DeadDistillationError", "DistillationMonitor", "Distiller", "GradientBalance"]
