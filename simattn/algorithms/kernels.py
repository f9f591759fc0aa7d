"""Arrays that the algorithms share, and the small kernels that run before and after their main loops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from simattn.machine import Array, Machine, Tile
from simattn.masks import Rows, Visibility
from simattn.plan import Plan
from simattn.problem import AttentionProblem, Heads


@dataclass
class ForwardArrays:
    """Memory arrays of a forward pass; ``k`` and ``v`` are the copied-out ones under ``repeat_kv``."""

    q: Array
    k: Array
    v: Array
    out: Array
    lse: Array


@dataclass
class KeySource:
    """Keys and values that a forward pass streams past its queries, and which of them each query sees."""

    k: Array
    v: Array
    seen: Visibility


@dataclass
class BackwardArrays:
    """Memory arrays of a backward pass."""

    q: Array
    k: Array
    v: Array
    dout: Array
    dq: Array
    dk: Array
    dv: Array


def declare_forward(machine: Machine, problem: AttentionProblem, plan: Plan) -> ForwardArrays:
    """Declare the outputs, and copy the keys and values out to every query head if the plan says so."""
    keys, values = copied_out(machine, plan)
    return ForwardArrays(
        q=machine.arrays["q"],
        k=keys,
        v=values,
        out=machine.array("out", problem.q_len, problem.value_dim, dtype=problem.output_dtype, role="output"),
        lse=machine.array("lse", problem.q_len, 1, role="saved"),
    )


def declare_backward(machine: Machine, problem: AttentionProblem, plan: Plan) -> BackwardArrays:
    """Declare the gradients; keys and values copied out by the forward pass are read where it left them."""
    keys, values = left_copied_out(machine, plan)
    gradients = declare_gradients(machine, problem)
    return BackwardArrays(q=machine.arrays["q"], k=keys, v=values, dout=machine.arrays["dout"], **gradients)


def copied_out(machine: Machine, plan: Plan) -> tuple[Array, Array]:
    """Return the keys and values to read, copied out to every query head if the plan says so."""
    keys, values = machine.arrays["k"], machine.arrays["v"]
    if plan.repeat_kv:
        return repeat_heads(machine, keys, plan), repeat_heads(machine, values, plan)
    return keys, values


def left_copied_out(machine: Machine, plan: Plan) -> tuple[Array, Array]:
    """Return the keys and values that a backward pass reads, those that the forward pass copied out if it did."""
    keys, values = machine.arrays["k"], machine.arrays["v"]
    if plan.repeat_kv:
        keys, values = (_repeated(machine, array, role="saved") for array in (keys, values))
        for source, copy in (("k", keys), ("v", values)):
            if copy.values is not None:
                copy.values[...] = machine.arrays[source].values
    return keys, values


def declare_gradients(machine: Machine, problem: AttentionProblem) -> dict[str, Array]:
    """Declare dq, dk and dv, and return them by name."""
    rows = {"dq": problem.q_len, "dk": problem.kv_len, "dv": problem.kv_len}
    columns = {"dq": problem.head_dim, "dk": problem.head_dim, "dv": problem.value_dim}
    heads: dict[str, Heads] = {"dq": "query", "dk": "kv", "dv": "kv"}
    return {
        name: machine.array(name, rows[name], columns[name], dtype=problem.dtype, heads=heads[name], role="output")
        for name in rows
    }


def fill(machine: Machine, array: Array, value: float, plan: Plan) -> None:
    """Write one value to a whole array."""
    for rows in machine.thread_blocks(array.rows, plan.tiles.q, per=array.heads, width=array.columns):
        # finish
        machine.store(machine.full(array.name, rows, array.columns, value, place="registers"), array, rows)


def convert(machine: Machine, source: Array, target: Array, plan: Plan) -> None:
    """Copy an array to one of another storage format."""
    for rows in machine.thread_blocks(source.rows, plan.tiles.q, per=source.heads, width=source.columns):
        # load
        tile = machine.load(source, rows, place="registers")
        # finish
        machine.store(tile, target, rows)


def row_dots(machine: Machine, a: Array, b: Array, target: Array, plan: Plan) -> None:
    """Write the dot product of each pair of rows: delta = rowsum(dO ∘ O)."""
    for rows in machine.thread_blocks(a.rows, plan.tiles.q, width=a.columns):
        # load
        left = machine.load(a, rows, place="registers")
        right = machine.load(b, rows, place="registers")
        # compute
        dots = machine.row_dot(left, right)
        # finish
        machine.store(dots, target, rows)


def _repeated(machine: Machine, array: Array, role: str = "workspace") -> Array:
    return machine.array(
        f"{array.name}_repeated",
        array.rows,
        array.columns,
        dtype=array.dtype,
        role="saved" if role == "saved" else "workspace",
    )


def repeat_heads(machine: Machine, array: Array, plan: Plan) -> Array:
    """Copy an array of KV heads out to every query head: each KV head is read once and written group times."""
    repeated = _repeated(machine, array)
    for rows in machine.thread_blocks(array.rows, plan.tiles.kv, per="kv", width=array.columns):
        # load
        tile = machine.load(array, rows, place="registers")
        # finish
        for _ in machine.group_heads():
            machine.store(tile, repeated, rows)
    return repeated


def sum_heads(machine: Machine, expanded: Array, target: Array, plan: Plan) -> None:
    """Sum the query heads of each KV head, in ascending order."""
    for rows in machine.thread_blocks(target.rows, plan.tiles.kv, per="kv", width=target.columns):
        total = machine.full(target.name, rows, target.columns, 0.0, place="registers")
        for _ in machine.group_heads():
            # load
            tile = machine.load(expanded, rows, place="registers")
            # compute
            machine.add(total, tile)
        # finish
        machine.store(total, target, rows)


@dataclass
class GroupedGradient:
    """dK or dV, summed over the query heads of a KV head in the way that the plan says."""

    target: Array
    partial: Array
    grouped: str
    reduces: bool

    @classmethod
    def declare(cls, machine: Machine, target: Array, plan: Plan, *, added_up: bool = False) -> GroupedGradient:
        """Declare the partial sums' array and, for a reduction, zero it.

        With ``added_up`` several thread blocks of one head hand in parts of the same rows, so all are reductions.
        """
        grouped = plan.grouped_gradients
        if not added_up and machine.problem.group_size == 1 and not plan.repeat_kv:
            grouped = "loop"
        reduces = added_up or grouped == "reduce"
        partial = target
        if reduces:
            heads: Heads = "query" if grouped == "expand" else "kv"
            partial = machine.array(f"{target.name}_accumulator", target.rows, target.columns, heads=heads)
            fill(machine, partial, 0.0, plan)
        elif grouped == "expand":
            partial = machine.array(f"{target.name}_expanded", target.rows, target.columns, dtype=target.dtype)
        return cls(target, partial, grouped, reduces)

    @property
    def per(self) -> Heads:
        """Whether a thread block serves one query head, or a KV head and so its whole group."""
        return "kv" if self.grouped == "loop" else "query"

    def add(self, machine: Machine, tile: Tile, rows: Rows, columns: Rows | None = None) -> None:
        """Hand in the sum of one thread block."""
        if self.reduces:
            machine.reduce(tile, self.partial, rows, columns)
        else:
            machine.store(tile, self.partial, rows, columns)

    def finish(self, machine: Machine, plan: Plan) -> None:
        """Sum or convert what the thread blocks handed in."""
        if self.grouped == "expand":
            sum_heads(machine, self.partial, self.target, plan)
        elif self.reduces:
            convert(machine, self.partial, self.target, plan)


def descales(machine: Machine, *names: str) -> tuple[Tile, ...]:
    """Load the descale factors of eight-bit arrays, or none."""
    if not machine.problem.is_float8:
        return ()
    return tuple(machine.load(machine.arrays[f"{name}_descale"], place="registers") for name in names)


def key_blocks(
    machine: Machine, problem: AttentionProblem, plan: Plan, per: Heads, *, sequential: bool
) -> Iterator[Rows]:
    """Walk the key tiles: a thread block for each, or all in order inside one thread block per head."""
    width = max(plan.tiles.q, problem.head_dim, problem.value_dim)
    if sequential:
        for _ in machine.thread_blocks(per=per):
            yield from machine.tiles(problem.kv_len, plan.tiles.kv)
    else:
        yield from machine.thread_blocks(problem.kv_len, plan.tiles.kv, per=per, width=width)
