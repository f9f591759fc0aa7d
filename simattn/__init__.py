"""Counts every byte an attention algorithm moves through the memory hierarchy, and checks the papers' claims."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from simattn.algorithms import ALGORITHMS
from simattn.api import Run, closed_form, count, default_plan, profile, run, run_backward
from simattn.hardware import HARDWARE
from simattn.machine import CapacityError, Operations
from simattn.masks import BlockMask
from simattn.plan import Plan, Tiles
from simattn.problem import AttentionProblem
from simattn.traffic import ArrayTraffic, Traffic

if TYPE_CHECKING:
    from simattn import plots, report, testing
    from simattn.claims import claims
    from simattn.sweep import sweep

# Loaded at first use: they need matplotlib or hypothesis, or are not needed to count and run.
_LATER = {
    "claims": "simattn.claims",
    "plots": None,
    "report": None,
    "sweep": "simattn.sweep",
    "testing": None,
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'simattn' has no attribute {name!r}")
    module = _LATER[name]
    if module is None:
        return import_module(f"simattn.{name}")
    value = getattr(import_module(module), name)
    globals()[name] = value  # in place of the submodule, which the import has bound to the same name
    return value


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
    "claims",
    "closed_form",
    "count",
    "default_plan",
    "plots",
    "profile",
    "report",
    "run",
    "run_backward",
    "sweep",
    "testing",
]
