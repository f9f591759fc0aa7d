"""dK and dV, summed over the query heads of a KV head in the way that a plan says.

The twin of :class:`simattn.algorithms.kernels.GroupedGradient`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cupy_kernels import elementwise
from cupy_kernels.program import Access, Array, Step
from simattn.plan import Plan
from simattn.problem import AttentionProblem

GRID_HEADS = ("loop", "expand", "reduce")
"""What the macro GRID_HEADS of the kernels counts."""


def grouping(problem: AttentionProblem, plan: Plan) -> str:
    """Return how a plan sums the query heads of a KV head; where there is one, it has nothing to sum."""
    return "loop" if problem.group_size == 1 else plan.grouped_gradients


@dataclass(frozen=True)
class GroupedGradient:
    """One of them.

    Attributes
    ----------
    target
        The result.
    partial
        What the thread blocks hand in; the result itself where one block serves a KV head.
    grouped
        How: "loop", "expand" or "reduce".
    """

    target: Array
    partial: Array
    grouped: str

    @classmethod
    def of(cls, problem: AttentionProblem, plan: Plan, target: Array) -> GroupedGradient:
        """Return how a result is summed."""
        grouped = grouping(problem, plan)
        partial = target
        if grouped == "expand":
            partial = replace(target, name=f"{target.name}_expanded", heads=problem.heads, role="workspace")
        elif grouped == "reduce":
            partial = replace(target, name=f"{target.name}_accumulator", dtype="float32", role="workspace")
        return cls(target, partial, grouped)

    @property
    def access(self) -> Access:
        """What the thread blocks do to ``partial``."""
        return "a" if self.grouped == "reduce" else "w"

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The result, and what is handed in."""
        return (self.target,) if self.partial is self.target else (self.target, self.partial)

    @property
    def before(self) -> tuple[Step, ...]:
        """What runs before the thread blocks."""
        return (elementwise.fill(self.partial, 0.0),) if self.grouped == "reduce" else ()

    @property
    def after(self) -> tuple[Step, ...]:
        """What runs after them."""
        if self.grouped == "expand":
            return (elementwise.sum_heads(self.partial, self.target),)
        return (elementwise.convert(self.partial, self.target),) if self.grouped == "reduce" else ()
