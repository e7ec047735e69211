"""Preflight: is this run worth starting? `examine` does the whole of it, `examine_briefly` what costs seconds."""

from drkd.recipes.doctor.examination import examine, examine_briefly
from drkd.recipes.doctor.finding import Diagnosis, Finding

__all__ = ["Diagnosis", "Finding", "examine", "examine_briefly"]
