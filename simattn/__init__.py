"""Counts every byte an attention algorithm moves through the memory hierarchy, and checks the papers' claims."""

from simattn.algorithms import ALGORITHMS
from simattn.api import Run, closed_form, count, default_plan, profile, run, run_backward
from simattn.hardware import HARDWARE
from simattn.machine import CapacityError, Operations
from simattn.masks import BlockMask
from simattn.plan import Plan, Tiles
from simattn.problem import AttentionProblem
from simattn.traffic import ArrayTraffic, Traffic

__all__ = [
    "ALGORITHMS",
    "HARDWARE",
    "ArrayTraffic",
    "AttentionProblem",
    "BlockMask",
    "CapacityError",
    "Operations",
    "Plan",
    "Run",
    "Tiles",
    "Traffic",
    "closed_form",
    "count",
    "default_plan",
    "profile",
    "run",
    "run_backward",
]
