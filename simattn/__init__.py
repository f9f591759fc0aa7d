"""Counts every byte an attention algorithm moves through the memory hierarchy, and checks the papers' claims."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simattn import kv_cache, plots, report, testing
    from simattn.algorithms import ALGORITHMS
    from simattn.api import Run, closed_form, count, default_plan, profile, run, run_backward, run_decode
    from simattn.claims import claims
    from simattn.comparison import compare
    from simattn.hardware import HARDWARE
    from simattn.layers import AttentionLayer
    from simattn.machine import CapacityError, Operations
    from simattn.masks import BlockMask
    from simattn.models import MODELS, ModelShape
    from simattn.plan import Plan, Tiles
    from simattn.problem import AttentionProblem
    from simattn.sweep import sweep
    from simattn.traffic import ArrayTraffic, Traffic

__all__ = [
    "ALGORITHMS",
    "HARDWARE",
    "MODELS",
    "ArrayTraffic",
    "AttentionLayer",
    "AttentionProblem",
    "BlockMask",
    "CapacityError",
    "ModelShape",
    "Operations",
    "Plan",
    "Run",
    "Tiles",
    "Traffic",
    "claims",
    "closed_form",
    "compare",
    "count",
    "default_plan",
    "kv_cache",
    "plots",
    "profile",
    "report",
    "run",
    "run_backward",
    "run_decode",
    "sweep",
    "testing",
]

_MODULE_OF = {
    **dict.fromkeys(["Run", "closed_form", "count", "default_plan", "profile"], "api"),
    **dict.fromkeys(["run", "run_backward", "run_decode"], "api"),
    **dict.fromkeys(["CapacityError", "Operations"], "machine"),
    **dict.fromkeys(["MODELS", "ModelShape"], "models"),
    "compare": "comparison",
    **dict.fromkeys(["Plan", "Tiles"], "plan"),
    **dict.fromkeys(["ArrayTraffic", "Traffic"], "traffic"),
    "ALGORITHMS": "algorithms",
    "AttentionLayer": "layers",
    "AttentionProblem": "problem",
    "BlockMask": "masks",
    "HARDWARE": "hardware",
    "claims": "claims",
    "sweep": "sweep",
}
_MODULES = ("kv_cache", "plots", "report", "testing")


def __getattr__(name: str) -> Any:
    """Load a public name at its first use, so that importing the package costs next to nothing."""
    if name in _MODULES:
        return import_module(f"simattn.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'simattn' has no attribute {name!r}")
    value = getattr(import_module(f"simattn.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps ``simattn.claims`` and ``simattn.sweep`` functions when the modules that define them are imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and _MODULE_OF.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
