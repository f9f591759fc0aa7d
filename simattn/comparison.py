"""Which is cheapest? Every algorithm on a model's attention: bytes, operations, the least time; prefill and decode.

A prefill runs the sequence at once, causally; a decoding step runs one new token on a cache of the sequence, itself
included, by the algorithm's program for it or else by its forward program. Numbers are those of one attention program,
times the layers. The time is a bound: all resources of the GPU at their published peaks and overlapped perfectly
(:func:`simattn.roofline.time_bounds`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

from simattn.algorithms import ALGORITHMS, get_algorithm
from simattn.api import Run, profile
from simattn.bounds import compulsory_traffic
from simattn.hardware import Hardware, get_hardware
from simattn.models import MODELS, ModelShape
from simattn.plan import check_choice
from simattn.planning import DEFAULT_HARDWARE
from simattn.problem import Direction, Window, checked_integer
from simattn.roofline import time_bounds, work_of
from simattn.tables import byte_text, second_text, text_table

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One algorithm in one phase, in all layers.

    Attributes
    ----------
    phase, algorithm
        What ran.
    variant
        How its plan differs from the default, or an empty text.
    refusal
        Why it was not counted, else None; then all numbers are None.
    hbm_bytes, times_compulsory
        Bytes between memory and multiprocessors, and how many times reading inputs and writing outputs once.
    matmul_flops, exponentials
        Operations of matrix products, and exponentials.
    seconds, limited_by
        Least time, and the resource that sets it.
    """

    phase: Phase
    algorithm: str
    variant: str = ""
    refusal: str | None = None
    hbm_bytes: int | None = None
    times_compulsory: float | None = None
    matmul_flops: int | None = None
    exponentials: int | None = None
    seconds: float | None = None
    limited_by: str | None = None

    @property
    def label(self) -> str:
        """The algorithm and its variant."""
        return f"{self.algorithm}, {self.variant}" if self.variant else self.algorithm


@dataclass(frozen=True, repr=False)
class Comparison:
    """What :func:`simattn.compare` returns. Its repr has a table for each phase, the least time first.

    Below stand the arguments that are usual for algorithms and not the model's, such as the size of their windows.

    Attributes
    ----------
    shape, length, batch, hardware
        What was compared: the model, tokens of a sequence, sequences, and the GPU's name.
    rows
        Each algorithm in each phase that it has a program for.
    """

    shape: ModelShape
    length: int
    batch: int
    hardware: str
    rows: tuple[ComparisonRow, ...]

    def of_phase(self, phase: Phase) -> list[ComparisonRow]:
        """Return a phase's rows: those counted, the least time first and then the fewest bytes, then those refused."""
        return sorted(
            (row for row in self.rows if row.phase == phase),
            key=lambda row: (row.seconds is None, row.seconds or 0.0, row.hbm_bytes or 0),
        )

    def cheapest(
        self, phase: Phase, by: Literal["hbm_bytes", "matmul_flops", "seconds"] = "hbm_bytes"
    ) -> ComparisonRow:
        """Return the row with the least of a number.

        Raises
        ------
        ValueError
            If the phase or the number is unknown, or nothing was counted.
        """
        check_choice("phase", phase, PHASES)
        check_choice("by", by, ("hbm_bytes", "matmul_flops", "seconds"))
        counted = [row for row in self.rows if row.phase == phase and row.refusal is None]
        if not counted:
            raise ValueError(f"phase={phase!r}: expected an algorithm that was counted, every one refuses the shape")
        return min(counted, key=lambda row: getattr(row, by))

    def as_rows(self) -> Iterator[dict[str, Any]]:
        """Yield one flat row per algorithm and phase."""
        for row in self.rows:
            yield {item.name: getattr(row, item.name) for item in fields(row)}

    def __repr__(self) -> str:
        shape = self.shape
        columns = (
            f"{shape.head_dim}" if shape.head_dim == shape.value_dim else f"{shape.head_dim} and {shape.value_dim}"
        )
        window = "" if shape.window is None else f", window {shape.window}"
        title = (
            f"{shape.name}: {_several(shape.layers, 'layer')}, {_several(shape.heads, 'query head')} on "
            f"{_several(shape.heads // shape.group_size, 'KV head')} of {columns} columns in {shape.dtype}{window}; "
            f"{self.batch} × {self.length:,} tokens; {self.hardware}"
        )
        heads = ["algorithm", "bytes", "× once", "matmul FLOPs", "exponentials", "least time", "limited by"]
        parts = [title]
        for phase in dict.fromkeys(row.phase for row in self.rows):
            body = [_cells(row) for row in self.of_phase(phase) if row.refusal is None]
            refused = [f"{row.label}: {row.refusal}" for row in self.of_phase(phase) if row.refusal is not None]
            parts.append("\n".join(["", phase, text_table(heads, body), *refused]))
        if usual := usual_text(dict.fromkeys(row.algorithm for row in self.rows), self.length, shape.window):
            parts.append(f"\nUsual arguments: {usual}")
        return "\n".join(parts)


def usual_text(algorithms: Iterable[str], length: int, window: Window | None = None) -> str:
    """Return the arguments besides sizes that are usual for algorithms, without a window that all are given."""
    parts = []
    for name in algorithms:
        usual = get_algorithm(name).problem_class.usual_arguments("forward", length, window)
        own = [
            f"{key}={value}" for key, value in usual.items() if key != "q_len" and (key, value) != ("window", window)
        ]
        if own:
            parts.append(f"{name} {', '.join(own)}")
    return "; ".join(parts)


def _several(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _cells(row: ComparisonRow) -> list[str]:
    assert row.hbm_bytes is not None
    assert row.seconds is not None
    return [
        row.label,
        byte_text(row.hbm_bytes),
        f"{row.times_compulsory:.3g}",
        f"{row.matmul_flops:.3g}",
        f"{row.exponentials:.3g}",
        second_text(row.seconds),
        str(row.limited_by),
    ]


def compare(
    length: int,
    model: str | ModelShape,
    *,
    batch: int = 1,
    phases: Iterable[Phase] = PHASES,
    algorithms: Iterable[str] | None = None,
    hardware: str | Hardware = DEFAULT_HARDWARE,
) -> Comparison:
    """Count every algorithm on a model's attention.

    Parameters
    ----------
    length
        Tokens of a sequence; in decoding those of the cache, the new one included.
    model
        A name of ``MODELS``, or a :class:`ModelShape` of your own.
    batch
        Sequences.
    phases
        "prefill", "decode" or both.
    algorithms
        Names in :data:`simattn.ALGORITHMS`; default all.
    hardware
        Name or row of a GPU, whose tiles are counted and whose peaks bound the time.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError, TypeError
        If an argument is unknown or out of range. An algorithm that refuses the shape has a row that says why.

    Examples
    --------
    >>> found = compare(8192, "Llama-3-8B", algorithms=["standard", "flash2"])
    >>> found.cheapest("prefill").algorithm
    'flash2'
    """
    length, batch = checked_integer("length", length, 1), checked_integer("batch", batch, 1)
    if isinstance(model, str):
        check_choice("model", model, tuple(MODELS))
        model = MODELS[model]
    elif not isinstance(model, ModelShape):
        raise TypeError(f"model is a {type(model).__name__}: expected one of {tuple(MODELS)} or a ModelShape")
    chosen = [get_algorithm(name).name for name in (ALGORITHMS if algorithms is None else algorithms)]
    gpu = get_hardware(hardware)
    rows = []
    for phase in phases:
        check_choice("phases", phase, PHASES)
        for name in (name for name in chosen if _direction(name, phase) is not None):
            for variant, options in _variants(name, model, phase):
                rows.append(_row(name, variant, options, model, phase, length, batch, gpu))
    return Comparison(model, length, batch, gpu.name, tuple(rows))


def _direction(algorithm: str, phase: Phase) -> Direction | None:
    """Return the direction of the program for a phase; None if there is none."""
    spec = ALGORITHMS[algorithm]
    if phase == "decode":
        return spec.step_direction
    return "forward" if "forward" in spec.programs else None


def _variants(algorithm: str, model: ModelShape, phase: Phase) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the default plan and, in decoding, what else the query heads of a KV head can do: share a block, or not."""
    yield "", {}
    defaults = {item.name: item.default for item in fields(ALGORITHMS[algorithm].plan_class)}
    if phase == "decode" and model.group_size > 1:
        if defaults.get("packed_heads", 0) == 1:
            yield "heads packed", {"packed_heads": model.group_size}
        if "packed_heads" in defaults and defaults["packed_heads"] is None:
            yield "one head per block", {"packed_heads": 1}
        if "query_heads" in defaults:
            yield "one head per block", {"query_heads": "one_per_block"}


def _row(
    algorithm: str,
    variant: str,
    options: dict[str, Any],
    model: ModelShape,
    phase: Phase,
    length: int,
    batch: int,
    gpu: Hardware,
) -> ComparisonRow:
    usual = ALGORITHMS[algorithm].problem_class.usual_arguments(
        "decode" if phase == "decode" else "forward", length, model.window
    )
    if phase == "prefill":
        usual["causal"] = True
    direction = _direction(algorithm, phase)
    try:
        run = profile(algorithm, batch=batch, **model.sizes, **usual, direction=direction, **options, hardware=gpu)
    except ValueError as error:
        return ComparisonRow(phase=phase, algorithm=algorithm, variant=variant, refusal=str(error))
    return _counted(run, variant, model.layers, phase, gpu)


def _counted(run: Run, variant: str, layers: int, phase: Phase, gpu: Hardware) -> ComparisonRow:
    bounds = time_bounds(work_of(run), gpu)
    return ComparisonRow(
        phase=phase,
        algorithm=run.algorithm,
        variant=variant,
        hbm_bytes=layers * run.traffic.hbm_bytes,
        times_compulsory=run.traffic.hbm_bytes / compulsory_traffic(run.problem, run.direction).hbm_bytes,
        matmul_flops=layers * run.operations.matmul_flops,
        exponentials=layers * run.operations.exponentials,
        seconds=layers * bounds.seconds,
        limited_by=bounds.limited_by,
    )
