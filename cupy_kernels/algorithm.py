"""What the table of kernels holds about each algorithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cupy_kernels.parameters import STORAGE_TYPES
from cupy_kernels.program import Program
from cupy_kernels.ragged import RaggedProblem
from simattn.hardware import Hardware
from simattn.plan import Plan
from simattn.problem import AttentionProblem, Direction

MakeProgram = Callable[[AttentionProblem, Any, Hardware], Program]
DefaultPlan = Callable[[AttentionProblem, Hardware, bool], Plan]


def _refuses_nothing(problem: AttentionProblem, hardware: Hardware) -> str | None:
    return None


def _on_cuda_cores(problem: AttentionProblem, plan: Plan) -> str:
    return "simt"


def _for_cuda_cores(direction: Direction, problem: AttentionProblem, plan: Plan, hardware: Hardware) -> str:
    return "its kernels are for CUDA cores"


@dataclass(frozen=True, kw_only=True)
class KernelAlgorithm:
    """One algorithm's programs on the GPU.

    Attributes
    ----------
    name
        As :data:`simattn.ALGORITHMS` has it.
    plan_class
        Its plan type.
    default_plans
        By direction: (problem, hardware, whether bits must repeat) → the plan when none is given.
    programs
        By direction: (problem, plan, hardware) → program. A ValueError says what there is no kernel for.
    saved
        Names of the arrays that the backward program takes from the forward program.
    is_deterministic
        Whether a plan's backward pass returns the same bits every time for a problem.
    refusal
        Why there is no kernel for a problem on a GPU, whatever the plan; None if there is one.
    arithmetic
        The simulated machine's arithmetic whose bits a plan's kernels have.
    why_these_units
        Why a plan's kernels multiply by what they do on a GPU.
    ragged
        Directions whose programs take sequences with lengths of their own.
    """

    name: str
    plan_class: type[Plan]
    default_plans: Mapping[Direction, DefaultPlan]
    programs: Mapping[Direction, MakeProgram]
    saved: tuple[str, ...]
    is_deterministic: Callable[[AttentionProblem, Any], bool]
    refusal: Callable[[AttentionProblem, Hardware], str | None] = _refuses_nothing
    arithmetic: Callable[[AttentionProblem, Any], str] = _on_cuda_cores
    why_these_units: Callable[[Direction, AttentionProblem, Any, Hardware], str] = _for_cuda_cores
    ragged: tuple[Direction, ...] = ()

    def directions(self, problem: AttentionProblem) -> Sequence[Direction]:
        """Return the directions that there are programs for, given whether sequences have lengths of their own."""
        return self.ragged if isinstance(problem, RaggedProblem) else tuple(self.programs)

    def dtypes(self, hardware: Hardware) -> tuple[str, ...]:
        """Return the storage formats that there are kernels for on a GPU; none if there are no kernels for it."""
        return tuple(
            dtype for dtype in STORAGE_TYPES if self.refusal(AttentionProblem(q_len=1, dtype=dtype), hardware) is None
        )
