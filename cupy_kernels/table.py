"""The table of algorithms that have kernels, and what is asked of all of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupy_kernels import flash1, flash2, flash3, standard
from cupy_kernels.algorithm import KernelAlgorithm
from cupy_kernels.compiler import Variant
from cupy_kernels.parameters import COLUMN_BUCKETS, STORAGE_TYPES, check_supported
from cupy_kernels.program import Kernel, Program
from cupy_kernels.ragged import RaggedProblem
from simattn.hardware import Hardware, get_hardware
from simattn.plan import Direction, Plan
from simattn.planning import DEFAULT_HARDWARE
from simattn.problem import AttentionProblem

ALGORITHMS: dict[str, KernelAlgorithm] = {
    item.ALGORITHM.name: item.ALGORITHM for item in (flash2, flash1, standard, flash3)
}
"""Algorithms that there are kernels for, by name; the first is the default."""

DEFAULT_ALGORITHM = next(iter(ALGORITHMS))


def get_algorithm(name: str | None) -> KernelAlgorithm:
    """Return an algorithm by name, or the default one.

    Raises
    ------
    ValueError
        If there are no kernels of that name.
    """
    if name is None:
        return ALGORITHMS[DEFAULT_ALGORITHM]
    if not isinstance(name, str) or name not in ALGORITHMS:
        raise ValueError(f"algorithm={name!r} has no kernel: expected one of {tuple(ALGORITHMS)}")
    return ALGORITHMS[name]


def default_plan(
    problem: AttentionProblem,
    hardware: str | Hardware = DEFAULT_HARDWARE,
    *,
    algorithm: str | None = None,
    direction: Direction = "forward",
    deterministic: bool = False,
) -> Plan:
    """Return the plan that the calls use when none is given.

    It depends on the device only if the device has too little shared memory for the best tiles; so then do the bits.

    Parameters
    ----------
    problem
        The problem.
    hardware
        Name or row of a GPU.
    algorithm
        "flash2", the default, "flash1", "standard" or, forward on Hopper, "flash3".
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
    chosen = _algorithm_for(algorithm, direction, problem, gpu)
    plan = chosen.default_plans[direction](problem, gpu, deterministic)
    chosen.programs[direction](problem, plan, gpu)  # raises for what the kernels do not take
    return plan


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
    chosen = _algorithm_for(algorithm, direction, problem, gpu)
    if not isinstance(plan, chosen.plan_class):
        expected = f"{chosen.plan_class.__module__}.{chosen.plan_class.__name__}"
        raise TypeError(f"plan is a {type(plan).__name__}: expected a {expected}")
    return chosen.programs[direction](problem, plan, gpu)


def _algorithm_for(
    algorithm: str | None, direction: Direction, problem: AttentionProblem, gpu: Hardware
) -> KernelAlgorithm:
    """Return an algorithm that has kernels for the problem.

    Raises
    ------
    ValueError
        If it has none.
    """
    chosen = get_algorithm(algorithm)
    if direction not in chosen.programs:
        others = tuple(name for name, other in ALGORITHMS.items() if direction in other.programs)
        if others:
            raise ValueError(
                f"algorithm={chosen.name!r} has no kernel for the {direction} pass: expected one of {others}"
            )
        raise ValueError(f"direction={direction!r}: expected one of {tuple(chosen.programs)}")
    if isinstance(problem, RaggedProblem) and direction not in chosen.ragged:
        others = tuple(name for name, other in ALGORITHMS.items() if direction in other.ragged)
        raise ValueError(
            f"algorithm={chosen.name!r} takes no cu_seqlens_q and cu_seqlens_k for the {direction} pass: expected one "
            f"of {others}, or sequences of one length each"
        )
    check_supported(problem)
    refusal = chosen.refusal(problem, gpu)
    if refusal is not None:
        raise ValueError(refusal)
    return chosen


def chosen_program(
    algorithm: str | None,
    direction: Direction,
    problem: AttentionProblem,
    plan: Plan | None,
    hardware: Hardware,
    *,
    deterministic: bool,
) -> Program:
    """Return the program that a call runs.

    Raises
    ------
    TypeError, ValueError
        As :func:`default_plan` and :func:`make_program` do, and if the plan is not as deterministic as was asked.
    """
    if not isinstance(deterministic, (bool, np.bool_)):
        raise TypeError(f"deterministic={deterministic!r}: expected a bool")
    if plan is None:
        plan = default_plan(
            problem, hardware, algorithm=algorithm, direction=direction, deterministic=bool(deterministic)
        )
    program = make_program(algorithm, direction, problem, plan, hardware)
    if deterministic and not get_algorithm(algorithm).is_deterministic(problem, plan):
        raise ValueError(f"deterministic=True, and plan={plan} adds in no fixed order: expected another plan")
    return program


def default_programs(problem: AttentionProblem, hardware: str | Hardware = DEFAULT_HARDWARE) -> Iterator[Program]:
    """Yield every program that a default plan runs for a problem, deterministic and not."""
    gpu = get_hardware(hardware)
    for name, chosen in ALGORITHMS.items():
        if chosen.refusal(problem, gpu) is not None:
            continue
        for direction in chosen.ragged if isinstance(problem, RaggedProblem) else chosen.programs:
            found = {default_plan(problem, gpu, algorithm=name, direction=direction, deterministic=repeats)
                     for repeats in ((False, True) if direction == "backward" else (True,))}  # fmt: skip
            for plan in sorted(found, key=repr):
                yield make_program(name, direction, problem, plan, gpu)


def default_kernels(hardware: str | Hardware = DEFAULT_HARDWARE) -> list[Kernel]:
    """Return the kernels of the default plans of a GPU, each once."""
    found: dict[Kernel, None] = {}
    for dtype in STORAGE_TYPES:
        for columns in COLUMN_BUCKETS:
            for causal in (False, True):
                # Long and grouped enough for every step of a program to have something to do.
                for problem_class in (AttentionProblem, RaggedProblem):
                    problem = problem_class(
                        heads=2, kv_heads=1, q_len=256, head_dim=columns, dtype=dtype, causal=causal
                    )
                    for program in default_programs(problem, hardware):
                        found |= dict.fromkeys(step.kernel for step in program.steps)
    return list(found)


def variants(hardware: str | Hardware = DEFAULT_HARDWARE) -> Iterator[Variant]:
    """Yield what to compile ahead for the default plans of a GPU: every kernel, and its build that counts."""
    for kernel in default_kernels(hardware):
        for count_traffic in (False, True):
            yield kernel.variant(count_traffic=count_traffic)
