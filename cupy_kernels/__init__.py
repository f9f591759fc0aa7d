"""CUDA kernels, called through CuPy, that run the tiled programs of :mod:`simattn` on a GPU.

Importing the package imports neither CuPy nor a driver: the calls do.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cupy_kernels.api import attention, attention_backward, explain, workspace_bytes
    from cupy_kernels.compiler import CompileError
    from cupy_kernels.counting import CountedTraffic, count_traffic
    from cupy_kernels.explanation import Explanation, KernelLaunch
    from cupy_kernels.table import default_plan

__all__ = [
    "CompileError",
    "CountedTraffic",
    "Explanation",
    "KernelLaunch",
    "attention",
    "attention_backward",
    "count_traffic",
    "default_plan",
    "explain",
    "workspace_bytes",
]

_MODULE_OF = {
    "CompileError": "compiler",
    "CountedTraffic": "counting",
    "Explanation": "explanation",
    "KernelLaunch": "explanation",
    "attention": "api",
    "attention_backward": "api",
    "count_traffic": "counting",
    "default_plan": "table",
    "explain": "api",
    "workspace_bytes": "api",
}


def __getattr__(name: str) -> Any:
    """Load a public name at its first use, so that importing the package costs next to nothing."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'cupy_kernels' has no attribute {name!r}")
    value = getattr(import_module(f"cupy_kernels.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
