"""The table of algorithms that have kernels, and what is asked of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NoReturn

import numpy as np

from cupy_kernels import flash1, flash2, flash3, standard
from cupy_kernels.algorithm import KernelAlgorithm
from cupy_kernels.compiler import Variant
from cupy_kernels.parameters import COLUMN_BUCKETS, STORAGE_TYPES, check_supported
from cupy_kernels.program import Kernel, Program
from cupy_kernels.ragged import RaggedProblem
from simattn.hardware import Hardware, get_hardware
from simattn.plan import Plan
from simattn.planning import DEFAULT_HARDWARE
from simattn.problem import AttentionProblem, Direction

ALGORITHMS: dict[str, KernelAlgorithm] = {
    item.ALGORITHM.name: item.ALGORITHM for item in (flash2, flash1, standard, flash3)
}
"""Algorithms that there are kernels for, by name."""

DEFAULT_ALGORITHM = "flash2"
"""What runs on every device."""

DEFAULT_LENGTHS = (256, 1024, 4096, 16384)
"""Sequence lengths by which every default plan is met."""

UNNAMED = tuple(ALGORITHMS[name] for name in ("flash3", DEFAULT_ALGORITHM))
"""Of these a call without algorithm and plan runs the first that takes its problem: the fastest comes first.

All save the same arrays, so that the backward pass of one takes what the forward pass of another saved."""


@dataclass(frozen=True)
class Choice:
    """What a call runs.

    Attributes
    ----------
    algorithm, plan, program
        Chosen by what the call names, its problem and its device.
    """

    algorithm: KernelAlgorithm
    plan: Plan
    program: Program


def get_algorithm(name: str) -> KernelAlgorithm:
    """Return an algorithm by name.

    Raises
    ------
    ValueError
        If there are no kernels of that name.
    """
    if not isinstance(name, str) or name not in ALGORITHMS:
        raise ValueError(f"algorithm={name!r} has no kernel: expected one of {tuple(ALGORITHMS)}")
    return ALGORITHMS[name]


def candidates(algorithm: str | None, plan: Plan | None) -> tuple[KernelAlgorithm, ...]:
    """Return the algorithms of which a call runs the first that takes its problem: more than one if it names nothing.

    Raises
    ------
    TypeError
        If no algorithm is named and the plan is none's.
    ValueError
        If there are no kernels of that name.
    """
    if algorithm is not None:
        return (get_algorithm(algorithm),)
    if plan is None:
        return UNNAMED
    for item in ALGORITHMS.values():
        if type(plan) is item.plan_class:
            return (item,)
    expected = tuple(item.plan_class.__name__ for item in ALGORITHMS.values())
    raise TypeError(f"plan is a {type(plan).__name__}: expected one of {expected}")


def choose_algorithm(
    algorithm: str | None, direction: Direction, problem: AttentionProblem, plan: Plan | None, hardware: Hardware
) -> KernelAlgorithm:
    """Return the algorithm that a call runs: the named one, else the plan's, else the fastest that takes the problem.

    Parameters
    ----------
    algorithm, plan
        As the call has them.
    direction, problem, hardware
        What is to run where.

    Raises
    ------
    TypeError, ValueError
        If no algorithm has kernels for it.
    """
    found = candidates(algorithm, plan)
    check_supported(problem)
    able = [item for item in found if direction in item.directions(problem)]
    for item in able:
        if item.refusal(problem, hardware) is None:
            return item
    _refuse((able or found)[-1], direction, problem, hardware)


def _refuse(refused: KernelAlgorithm, direction: Direction, problem: AttentionProblem, hardware: Hardware) -> NoReturn:
    """Raise a ValueError that says why an algorithm has no kernels for a problem."""
    name = refused.name
    if direction not in refused.programs:
        others = tuple(other for other, item in ALGORITHMS.items() if direction in item.programs)
        if others:
            raise ValueError(f"algorithm={name!r} has no kernel for the {direction} pass: expected one of {others}")
        raise ValueError(f"direction={direction!r}: expected one of {tuple(refused.programs)}")
    if direction not in refused.directions(problem):
        others = tuple(other for other, item in ALGORITHMS.items() if direction in item.ragged)
        expected = f"one of {others}, or sequences of one length each" if others else "sequences of one length each"
        raise ValueError(
            f"algorithm={name!r} takes no cu_seqlens_q and cu_seqlens_k for the {direction} pass: expected {expected}"
        )
    raise ValueError(refused.refusal(problem, hardware))


def default_plan(
    problem: AttentionProblem,
    hardware: str | Hardware = DEFAULT_HARDWARE,
    *,
    algorithm: str | None = None,
    direction: Direction = "forward",
    deterministic: bool = False,
) -> Plan:
    """Return the plan that the calls use when none is given.

    It depends on the GPU, and so do the bits: by the algorithm if none is named, by the formats that tensor cores take
    and by the shared memory that there is for tiles.

    Parameters
    ----------
    problem
        The problem.
    hardware
        Name or row of a GPU.
    algorithm
        "flash3", "flash2", "flash1" or "standard". Default: forward "flash3" if it takes the problem on this GPU,
        which 16-bit inputs on compute capability 9.0 are; otherwise "flash2".
    direction
        "forward" for :func:`cupy_kernels.attention`, "backward" for :func:`cupy_kernels.attention_backward`.
    deterministic
        As for :func:`cupy_kernels.attention_backward`.

    Raises
    ------
    ValueError
        If the kernels do not take the problem, or no tiles fit.
    """
    gpu = get_hardware(hardware)
    return choose(algorithm, direction, problem, None, gpu, deterministic=deterministic).plan


def make_program(
    algorithm: str | None, direction: Direction, problem: AttentionProblem, plan: Plan, hardware: str | Hardware
) -> Program:
    """Return the program of a plan.

    Raises
    ------
    TypeError
        If the plan is another algorithm's.
    ValueError
        If there are no kernels for it.
    """
    gpu = get_hardware(hardware)
    return _program_of(choose_algorithm(algorithm, direction, problem, plan, gpu), direction, problem, plan, gpu)


def _program_of(
    chosen: KernelAlgorithm, direction: Direction, problem: AttentionProblem, plan: Plan, gpu: Hardware
) -> Program:
    if type(plan) is not chosen.plan_class:
        expected = f"{chosen.plan_class.__module__}.{chosen.plan_class.__name__}"
        raise TypeError(f"plan is a {type(plan).__name__}: expected a {expected}")
    return chosen.programs[direction](problem, plan, gpu)


def choose(
    algorithm: str | None,
    direction: Direction,
    problem: AttentionProblem,
    plan: Plan | None,
    hardware: Hardware,
    *,
    deterministic: bool,
) -> Choice:
    """Return what a call runs.

    Raises
    ------
    TypeError, ValueError
        As :func:`default_plan` and :func:`make_program` do, and if the plan is not as deterministic as was asked.
    """
    if not isinstance(deterministic, (bool, np.bool_)):
        raise TypeError(f"deterministic={deterministic!r}: expected a bool")
    chosen = choose_algorithm(algorithm, direction, problem, plan, hardware)
    if plan is None:
        plan = chosen.default_plans[direction](problem, hardware, bool(deterministic))
    program = _program_of(chosen, direction, problem, plan, hardware)
    if deterministic and direction == "backward" and not chosen.is_deterministic(problem, plan):
        raise ValueError(f"deterministic=True, and plan={plan} adds in no fixed order: expected another plan")
    return Choice(chosen, plan, program)


def default_programs(problem: AttentionProblem, hardware: str | Hardware = DEFAULT_HARDWARE) -> Iterator[Program]:
    """Yield every program that a default plan runs for a problem, deterministic and not."""
    gpu = get_hardware(hardware)
    for name, chosen in ALGORITHMS.items():
        if chosen.refusal(problem, gpu) is not None:
            continue
        for direction in chosen.directions(problem):
            found = {default_plan(problem, gpu, algorithm=name, direction=direction, deterministic=repeats)
                     for repeats in ((False, True) if direction == "backward" else (True,))}  # fmt: skip
            for plan in sorted(found, key=repr):
                yield make_program(name, direction, problem, plan, gpu)


def default_kernels(hardware: str | Hardware = DEFAULT_HARDWARE) -> list[Kernel]:
    """Return the kernels of the default plans of a GPU, each once."""
    found: dict[Kernel, None] = {}
    cases = product(STORAGE_TYPES, COLUMN_BUCKETS, (False, True), DEFAULT_LENGTHS, (AttentionProblem, RaggedProblem))
    for dtype, columns, causal, length, problem_class in cases:
        # Long and grouped enough for every step of a program to have something to do.
        problem = problem_class(heads=2, kv_heads=1, q_len=length, head_dim=columns, dtype=dtype, causal=causal)
        for program in default_programs(problem, hardware):
            found |= dict.fromkeys(step.kernel for step in program.steps)
    return list(found)


def variants(hardware: str | Hardware = DEFAULT_HARDWARE) -> Iterator[Variant]:
    """Yield what to compile ahead for the default plans of a GPU: every kernel, and its build that counts."""
    for kernel in default_kernels(hardware):
        for count_traffic in (False, True):
            yield kernel.variant(count_traffic=count_traffic)
