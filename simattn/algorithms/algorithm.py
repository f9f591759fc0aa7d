"""What the registry holds about each algorithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from simattn.hardware import Hardware
from simattn.machine import Machine
from simattn.plan import Plan, PlanKind, PlanT, Tiles
from simattn.problem import AttentionProblem, Direction
from simattn.traffic import Traffic

Program = Callable[[Machine, Any, Any], None]
ClosedForm = Callable[[Any, Any], Traffic]
Family = Literal["dense", "state", "windows", "sparse", "decoding"]


def declare_output_and_lse(machine: Machine, problem: AttentionProblem, plan: Plan) -> None:
    """Declare the output and its log-sum-exp, all that most algorithms save."""
    machine.array("out", problem.q_len, problem.value_dim, dtype=problem.output_dtype, role="saved")
    machine.array("lse", problem.q_len, 1, role="saved")


def _no_defaults(problem: AttentionProblem, direction: Direction, kind: PlanKind, hardware: Hardware) -> dict[str, Any]:
    return {}


def _already_complete(problem: AttentionProblem, plan: PlanT, sram_bytes: int) -> PlanT:
    return plan


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Algorithm:
    """One algorithm: its tiled programs, closed forms and plans. Its repr has the name, title, directions and source.

    Attributes
    ----------
    name, title
        Name in calls, and in print.
    source
        Paper and place of the definition.
    summary
        One sentence.
    family
        Where tables put it: "dense", attention to all keys under any mask; "state", without a softmax and with a state
        in place of the keys; "windows"; "sparse", blocks of keys that queries choose; "decoding", decoding steps alone.
    plan_class
        Its plan type.
    problem_class
        Its problems: attention with a softmax, or a subclass whose fields are arguments of the calls too.
    reference
        Its definition, of problems of its own: (problem, inputs by name, and what intermediate results are rounded by)
        → results by name. It computes in the precision of its inputs: ``out``, the log-sum-exp ``lse`` if it has one,
        with ``dout`` among the inputs the gradients, and in a decoding step the new states.
    programs, closed_forms
        By direction.
    paper_tiles
        The paper's tile formula: (problem, M in elements, direction) → tiles.
    fit_tiles
        A family of tiles that grows with an integer, of which plan="fit" takes the largest that fits: (problem,
        integer, direction) → tiles.
    gpu_tiles
        Tiles to try on a GPU, best first: (problem, hardware, direction) → tiles.
    chunks_columns
        Whether ``tiles.depth`` columns of the head dimension are handled at a time; others take all and refuse it.
    exact_arithmetics
        Arithmetics that promise a kernel's bits, by the direction in which they fix the order of every operation.
    declare_saved
        Declares, besides q, k and v, the arrays that the forward pass leaves for the backward pass.
    plan_defaults
        Plan fields that differ from the class's defaults: (problem, direction, kind of plan, hardware) → fields.
    complete_plan
        Settles what depends on the tiles: (problem, plan, SRAM bytes) → plan.
    """

    name: str
    title: str
    source: str
    summary: str
    family: Family = "dense"
    plan_class: type[Plan]
    problem_class: type[AttentionProblem] = AttentionProblem
    reference: Callable[..., dict[str, Any]] | None = None
    programs: Mapping[Direction, Program]
    closed_forms: Mapping[Direction, ClosedForm]
    paper_tiles: Callable[[AttentionProblem, int, Direction], Tiles]
    fit_tiles: Callable[[AttentionProblem, int, Direction], Tiles]
    gpu_tiles: Callable[[AttentionProblem, Hardware, Direction], list[Tiles]]
    chunks_columns: bool = False
    exact_arithmetics: Mapping[Direction, tuple[str, ...]] = field(default_factory=dict)
    declare_saved: Callable[[Machine, Any, Any], None] = declare_output_and_lse
    plan_defaults: Callable[[AttentionProblem, Direction, PlanKind, Hardware], dict[str, Any]] = _no_defaults
    complete_plan: Callable[[AttentionProblem, Any, int], Any] = _already_complete

    def __repr__(self) -> str:
        return f"<Algorithm {self.name}: {self.title}; {', '.join(self.directions)}; {self.source}>"

    @property
    def takes_any_mask(self) -> bool:
        """Whether its results are those of attention with a softmax under any mask that a problem can have."""
        return self.problem_class is AttentionProblem

    @property
    def step_direction(self) -> Direction | None:
        """The program that a decoding step runs: its own, or the forward pass of few queries; None if there is none."""
        if "decode" in self.programs:
            return "decode"
        return "forward" if self.takes_any_mask and "forward" in self.programs else None

    @property
    def own_arguments(self) -> list[str]:
        """Names of the fields that its problems and its plan add to the arguments of a count."""
        shared = {item.name for item in fields(AttentionProblem)}
        problem = [item.name for item in fields(self.problem_class) if item.name not in shared]
        return sorted([*problem, *(item.name for item in fields(self.plan_class))])

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Directions that the algorithm has a program for."""
        return tuple(self.programs)
