"""What a call runs on a GPU, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from types import MappingProxyType

from cupy_kernels.program import Step, Units
from cupy_kernels.table import ALGORITHMS, DEFAULT_ALGORITHM, Choice, choose_algorithm, default_plan
from simattn.hardware import Hardware
from simattn.plan import Plan
from simattn.problem import AttentionProblem, Direction
from simattn.tables import text_table

MODELLED_TENSOR_CORES = (9, 0)
"""Compute capability of the tensor cores that the arithmetics of tensor cores model; others add in other ways."""


@dataclass(frozen=True, kw_only=True)
class KernelLaunch:
    """One kernel of a call.

    Attributes
    ----------
    function
        The kernel's name.
    units
        What it multiplies matrices by: "CUDA cores", or an instruction of the tensor cores, "mma.sync" or "wgmma".
    threads
        Threads of a block.
    shared_bytes
        Dynamic shared memory of a block.
    blocks
        Thread blocks.
    build
        What it is compiled with, tiles among it.
    """

    function: str
    units: Units
    threads: int
    shared_bytes: int
    blocks: int
    build: Mapping[str, str]

    @classmethod
    def of(cls, step: Step) -> KernelLaunch:
        """Return what a step of a program launches."""
        kernel = step.kernel
        return cls(
            function=kernel.function,
            units=kernel.units,
            threads=kernel.threads,
            shared_bytes=kernel.shared_bytes,
            blocks=step.blocks,
            build=MappingProxyType({name.lower(): value for name, value in kernel.macros}),
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Explanation:
    """What a call runs and why; its ``repr`` is a table.

    Attributes
    ----------
    algorithm, direction, problem, plan
        What runs.
    hardware, compute_capability
        The GPU.
    kernels
        Its kernels, in the order in which they run; none where there is nothing to compute.
    arithmetic
        The ``arithmetic`` with which :func:`simattn.run` or :func:`simattn.run_backward` repeats the results' bits with
        this plan; None where no arithmetic models these tensor cores.
    deterministic
        Whether the bits are the same every time; otherwise the plan adds something up in no fixed order.
    reasons
        Why this algorithm, why these units, why this plan.
    others
        For each other algorithm, why it does not run: what it would be refused with, or that it was not asked for and
        how to. "The default" is what runs without algorithm and plan.
    """

    algorithm: str
    direction: Direction
    problem: AttentionProblem
    plan: Plan
    hardware: str
    compute_capability: tuple[int, int]
    kernels: tuple[KernelLaunch, ...]
    arithmetic: str | None
    deterministic: bool
    reasons: tuple[str, ...]
    others: Mapping[str, str]

    def __repr__(self) -> str:
        major, minor = self.compute_capability
        lines = [
            f"{self.algorithm} {self.direction}, {self.problem.dtype}, on {self.hardware}, compute capability "
            f"{major}.{minor}",
            f"plan: {_plan_text(self.plan)}",
            f"bits: {self._bits()}",
            f"why: {'; '.join(self.reasons)}",
            "",
        ]
        if self.kernels:
            heads = ["kernel", "units", "threads", "shared memory", "thread blocks"]
            numbers = [
                [launch.function, launch.units, *(f"{number:,}" for number in (launch.threads, launch.shared_bytes,
                                                                               launch.blocks))]
                for launch in self.kernels
            ]  # fmt: skip
            builds = [
                [launch.function, " ".join(f"{name}={value}" for name, value in launch.build.items())]
                for launch in self.kernels
            ]
            lines += [text_table(heads, numbers), "", text_table(["kernel", "build"], builds, numeric=False)]
        else:
            lines.append("no kernel: there is nothing to compute")
        others = [list(item) for item in self.others.items()]
        return "\n".join([*lines, "", text_table(["other algorithm", "why it does not run"], others, numeric=False)])

    def _bits(self) -> str:
        """Return what repeats the results' bits."""
        if self.arithmetic is None:
            return "no arithmetic models these tensor cores"
        exception = "" if self.deterministic else ", but for what the plan adds up in no fixed order"
        return f'those of arithmetic="{self.arithmetic}" with this plan{exception}'


def explanation_of(
    choice: Choice,
    direction: Direction,
    hardware: Hardware,
    *,
    algorithm_given: bool,
    plan_given: bool,
    device_name: str,
) -> Explanation:
    """Return what a call runs and why.

    Parameters
    ----------
    choice
        What it runs.
    direction
        As the call has it.
    hardware
        What kernels are chosen by.
    algorithm_given, plan_given
        Whether the call names the algorithm, and whether it has the plan.
    device_name
        What to call the GPU.
    """
    chosen, plan, problem = choice.algorithm, choice.plan, choice.program.problem
    kernels = tuple(KernelLaunch.of(step) for step in choice.program.steps)
    arithmetic: str | None = "simt"
    if any(launch.units != "CUDA cores" for launch in kernels):
        modelled = hardware.compute_capability == MODELLED_TENSOR_CORES
        arithmetic = chosen.arithmetic(problem, plan) if modelled else None
    major, minor = hardware.compute_capability
    if algorithm_given:
        why = f"algorithm={chosen.name!r}"
    elif plan_given:
        why = f"the plan is a {type(plan).__name__}"
    elif chosen.name == DEFAULT_ALGORITHM:
        why = f"{chosen.name} is the default"
    else:
        why = f"{chosen.name} is the fastest that takes the problem on compute capability {major}.{minor}"
    return Explanation(
        algorithm=chosen.name,
        direction=direction,
        problem=problem,
        plan=plan,
        hardware=device_name,
        compute_capability=hardware.compute_capability,
        kernels=kernels,
        arithmetic=arithmetic,
        deterministic=direction == "forward" or chosen.is_deterministic(problem, plan),
        reasons=(
            why,
            chosen.why_these_units(direction, problem, plan, hardware),
            "the plan was given" if plan_given else "the plan is the default",
        ),
        others=MappingProxyType(dict(_others(chosen.name, direction, problem, hardware))),
    )


def _others(
    chosen: str, direction: Direction, problem: AttentionProblem, hardware: Hardware
) -> Iterator[tuple[str, str]]:
    """Yield every other algorithm and why it does not run."""
    for name in ALGORITHMS:
        if name == chosen:
            continue
        try:
            default_plan(problem, hardware, algorithm=name, direction=direction)
        except ValueError as error:
            yield name, f"refused: {error}"
        else:
            is_default = name == choose_algorithm(None, direction, problem, None, hardware).name
            how = "the default, without algorithm= and plan=" if is_default else f"algorithm={name!r}"
            yield name, f"not asked for; it takes the problem ({how})"


def _plan_text(plan: Plan) -> str:
    """Return a plan as it could be written: tiles, and the fields that are not as they are by default."""
    tiles = (plan.tiles.q, plan.tiles.kv, *(() if plan.tiles.depth is None else (plan.tiles.depth,)))
    changed = [
        f", {item.name}={getattr(plan, item.name)!r}"
        for item in fields(plan)
        if item.default is not MISSING and getattr(plan, item.name) != item.default
    ]
    return f"{type(plan).__name__}(tiles={tiles}{''.join(changed)})"
