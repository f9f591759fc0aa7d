"""From a problem and a machine to a plan: the paper's tiles, the largest that fit, or a GPU's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

from simattn.algorithms.algorithm import Algorithm
from simattn.hardware import Hardware, get_hardware
from simattn.machine import CapacityError, Machine
from simattn.plan import (
    PLAN_KINDS,
    Plan,
    PlanKind,
    Tiles,
    check_choice,
    check_tiles_divide_blocks,
    dividing_tiles,
    first_fitting,
    largest_fitting,
)
from simattn.problem import AttentionProblem, Direction, checked_integer
from simattn.tables import byte_text

DEFAULT_HARDWARE = "H100-SXM"


@dataclass(frozen=True)
class Capacity:
    """On-chip memory of one thread block, in bytes; None is unlimited."""

    sram_bytes: int
    register_bytes: int | None


def get_capacity(hardware: Hardware, sram_bytes: int | None) -> Capacity:
    """Return the machine's capacity: the GPU's, or the SRAM that the caller gives with free registers."""
    if sram_bytes is None:
        return Capacity(hardware.sram_bytes_per_block, hardware.register_bytes_per_block)
    return Capacity(checked_integer("sram_bytes", sram_bytes, 1), None)


def make_plan(
    algorithm: Algorithm,
    problem: AttentionProblem,
    direction: Direction,
    *,
    plan: Plan | PlanKind | None = None,
    hardware: str | Hardware | None = None,
    sram_bytes: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Plan, Capacity]:
    """Return the plan of a program and the on-chip memory it runs in.

    Parameters
    ----------
    algorithm, problem, direction
        What runs.
    plan
        A plan of the algorithm; "gpu" (the kernels' tiles, accumulators in registers), "fit" (the largest tiles that
        fit, all in SRAM) or "paper" (the paper's formula, all in SRAM, capacity reported and not enforced). Default
        "fit" if ``sram_bytes`` is given, else "gpu".
    hardware
        Name or row of a GPU; default H100-SXM.
    sram_bytes
        SRAM of one thread block, in place of the GPU's; M in the papers, in bytes.
    options
        Plan fields to set by name.

    Raises
    ------
    ValueError, TypeError
        If an argument is unknown or out of range, or no tile fits.
    """
    options = dict(options or {})
    known = {item.name for item in fields(algorithm.plan_class)}
    for name in options:
        if name not in known:
            raise TypeError(
                f"{name}={options[name]!r}: {name!r} is no argument and no plan option of {algorithm.name}; options: "
                f"{algorithm.own_arguments}"
            )
    gpu = get_hardware(DEFAULT_HARDWARE if hardware is None else hardware)
    capacity = get_capacity(gpu, sram_bytes)
    if isinstance(plan, Plan):
        if not isinstance(plan, algorithm.plan_class):
            raise TypeError(f"plan is a {type(plan).__name__}: expected a {algorithm.plan_class.__name__}")
        made = algorithm.complete_plan(problem, replace(plan, **options), capacity.sram_bytes)
    else:
        kind = ("gpu" if sram_bytes is None else "fit") if plan is None else plan
        check_choice("plan", kind, PLAN_KINDS)
        made = _plan_of_kind(algorithm, problem, direction, kind, gpu, capacity, options)
    if made.tiles.depth is not None and not algorithm.chunks_columns:
        raise ValueError(f"tiles.depth={made.tiles.depth}: {algorithm.name} takes all columns at a time; expected None")
    check_tiles_divide_blocks(problem, made.tiles)
    return made, capacity


def _plan_of_kind(
    algorithm: Algorithm,
    problem: AttentionProblem,
    direction: Direction,
    kind: PlanKind,
    gpu: Hardware,
    capacity: Capacity,
    options: dict[str, Any],
) -> Plan:
    defaults: dict[str, Any] = {"accumulators": "registers" if kind == "gpu" else "sram"}
    if kind == "paper":
        defaults["enforce_capacity"] = False
    settings = {**algorithm.plan_defaults(problem, direction, kind, gpu), **defaults, **options}
    if "tiles" in settings:
        made = algorithm.plan_class(**settings)
    else:
        smallest = algorithm.plan_class(tiles=Tiles(q=1, kv=1), **settings)

        def fits(tiles: Tiles) -> bool:
            return _fits(algorithm, problem.of_one_row(), direction, replace(smallest, tiles=tiles), capacity)

        made = replace(smallest, tiles=_choose_tiles(algorithm, problem, direction, kind, gpu, capacity, fits))
    completed: Plan = algorithm.complete_plan(problem, made, capacity.sram_bytes)
    return completed


def _choose_tiles(
    algorithm: Algorithm,
    problem: AttentionProblem,
    direction: Direction,
    kind: PlanKind,
    gpu: Hardware,
    capacity: Capacity,
    fits: Callable[[Tiles], bool],
) -> Tiles:
    if kind == "paper":
        elements = capacity.sram_bytes // problem.item_bytes
        return dividing_tiles(problem, algorithm.paper_tiles(problem, elements, direction))
    if kind == "fit":
        size = largest_fitting(lambda candidate: fits(algorithm.fit_tiles(problem, candidate, direction)))
        tiles = None if size is None else algorithm.fit_tiles(problem, size, direction)
    else:
        tiles = first_fitting(algorithm.gpu_tiles(problem, gpu, direction), fits)
    if tiles is None:
        raise CapacityError(
            f"sram_bytes={capacity.sram_bytes} ({byte_text(capacity.sram_bytes)}) holds no tile of {algorithm.name} "
            f"{direction} for head_dim={problem.head_dim}, value_dim={problem.value_dim}, dtype={problem.dtype!r}"
            + (
                "; "
                if capacity.register_bytes is None
                else f" beside {byte_text(capacity.register_bytes)} of registers; "
            )
            + "expected more on-chip memory or a smaller head dimension"
        )
    return dividing_tiles(problem, tiles)


@lru_cache(maxsize=4096)
def _fits(
    algorithm: Algorithm, problem: AttentionProblem, direction: Direction, plan: Plan, capacity: Capacity
) -> bool:
    machine = Machine(problem, capacity.sram_bytes, capacity.register_bytes)
    declare_inputs(machine, algorithm, problem, direction, plan)
    try:
        algorithm.programs[direction](machine, problem, plan)
    except CapacityError:
        return False
    return True


def declare_inputs(
    machine: Machine,
    algorithm: Algorithm,
    problem: AttentionProblem,
    direction: Direction,
    plan: Plan,
    values: Mapping[str, Any] | None = None,
) -> None:
    """Declare the arrays that a program finds in memory: its inputs and what the forward pass left."""
    values = values or {}
    for name, shape in problem.inputs(direction).items():
        machine.array(
            name,
            shape.rows,
            shape.columns,
            dtype=shape.dtype or problem.dtype,
            heads=shape.heads,
            role="input",
            values=values.get(name),
        )
    if problem.is_float8:
        for name in "qkv":
            machine.array(f"{name}_descale", 1, 1, heads="kv", role="input", values=values.get(f"{name}_descale"))
    if direction == "backward":
        algorithm.declare_saved(machine, problem, plan)
