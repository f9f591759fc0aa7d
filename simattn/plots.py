"""Pictures of counted traffic: against length, against SRAM size, by array, and the roofline; the KV cache over time.

Every function draws into the Axes it is given, or into a new figure of its own, and returns the Axes. None
touches pyplot, so no global backend is chosen: save with ``axes.figure.savefig(...)``.

>>> axes = traffic_against_length(["standard", "flash2"], heads=32, head_dim=128, causal=True)
>>> axes.figure.savefig("length.png")                                                    # doctest: +SKIP
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, NamedTuple

from simattn.algorithms import ALGORITHMS, get_algorithm
from simattn.api import Run, profile
from simattn.arithmetic.formats import ITEM_BYTES, storage_name
from simattn.bounds import compulsory_traffic, saha_ye_elements
from simattn.hardware import Hardware, get_hardware
from simattn.machine import CapacityError
from simattn.problem import AttentionProblem, Direction
from simattn.roofline import ridge_point
from simattn.tables import byte_text, second_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from simattn.comparison import Comparison, Phase
    from simattn.kv_cache import CacheRun

__all__ = [
    "RooflinePoint",
    "algorithm_style",
    "comparison",
    "kv_cache_over_time",
    "roofline",
    "traffic_against_length",
    "traffic_against_sram",
    "traffic_by_array",
]

INK = "#24292f"
"""Text and axes."""

MUTED = "#6e7781"
"""Reference lines and their labels."""

PALETTE = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    *("#7b2fbe", "#c51b3a", "#5a4500", "#bdb95a", "#2fd3d0", "#98107f", "#3355ff", "#f4a997", "#14245c"),
)
"""Six of Okabe and Ito's colours, then others that are far from these and from each other, also to the colour-blind."""

_DASHES = ("-", (0, (6, 2)), (0, (2, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (9, 3)), (0, (4, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

LENGTHS = tuple(1 << exponent for exponent in range(10, 21))
"""Default sequence lengths."""

_ARRAY_COLOURS = {
    "q": "#0072b2",
    "k": "#56b4e9",
    "v": "#9bd3f2",
    "out": "#009e73",
    "dout": "#66c2a5",
    "scores": "#d55e00",
    "probabilities": "#e69f00",
    "dscores": "#f0c95c",
    "dprobabilities": "#f5e0a0",
    "dq": "#cc79a7",
    "dq_accumulator": "#8e4585",
    "dk": "#b9a0d0",
    "dv": "#dccbe6",
    "out_accumulator": "#8c8c4f",
    "dk_accumulator": "#7f6000",
    "dv_accumulator": "#a6761d",
}
_SLOT_COLOURS = {
    "used": "#0072b2",
    "reserved": "#9bd3f2",
    "internal": "#e69f00",
    "external": "#d55e00",
    "free": "#e6e9ec",
}
_SPARE_COLOURS = ("#5f6b6d", "#b07aa1", "#86bcb6", "#c49c94", "#4e79a7", "#bab0ac")
_OTHER_COLOUR = "#b8bec5"
_SMALLEST_SHARE = 0.01


class RooflinePoint(NamedTuple):
    """One program under the roof.

    Attributes
    ----------
    name
        Label; colour and marker follow the algorithm and the direction if it begins with their names.
    intensity
        Matrix-product operations per byte between memory and multiprocessors.
    flops_per_second
        Rate attained, or the rate that a bound allows.
    """

    name: str
    intensity: float
    flops_per_second: float


def algorithm_style(algorithm: str) -> dict[str, Any]:
    """Return the line properties of an algorithm, the same in every picture: colour, dashes and marker."""
    names = list(ALGORITHMS)
    index = names.index(algorithm) if algorithm in ALGORITHMS else len(names)
    return {
        "color": PALETTE[index % len(PALETTE)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)],
    }


def traffic_against_length(
    algorithms: Iterable[str] | None = None,
    *,
    lengths: Sequence[int] = LENGTHS,
    direction: Direction = "forward",
    ax: Axes | None = None,
    **arguments: Any,
) -> Axes:
    """Draw the bytes between memory and multiprocessors against the sequence length.

    Parameters
    ----------
    algorithms
        Names; default every algorithm that has the direction.
    lengths
        Rows of queries and of keys.
    direction
        "forward" or "backward".
    ax
        Where to draw; default a new figure.
    **arguments
        Further arguments of :func:`simattn.count`.

    Returns
    -------
    matplotlib.axes.Axes
        One line per algorithm, and a dashed one for inputs and outputs moved once.

    Raises
    ------
    ValueError, TypeError
        As :func:`simattn.count`, or if there is no algorithm or no length.
    """
    names = _checked_names(algorithms, direction)
    lengths = _checked_axis("lengths", lengths)
    ax = _axes(ax)
    ends: list[_End] = []
    for name in names:
        runs = [profile(name, **_usual(name, direction, length, arguments)) for length in lengths]
        line = ax.plot(lengths, [run.traffic.hbm_bytes for run in runs], label=name, **_line(name))[0]
        ends.append(_End.of(line))
    once = [compulsory_traffic(problem, direction).hbm_bytes for problem in _problems(direction, lengths, arguments)]
    line = ax.plot(lengths, once, label="inputs and outputs once", **_reference())[0]
    ends.append(_End.of(line))
    _bytes_axis(ax)
    _powers_of_two_axis(ax, lengths)
    ax.set_xlabel("sequence length (tokens)")
    ax.set_title(_title(direction, arguments), loc="left", fontsize="medium")
    _label_ends(ax, ends)
    return ax


def traffic_against_sram(
    algorithms: Iterable[str] | None = None,
    *,
    sram_bytes: Sequence[int] | None = None,
    q_len: int = 1 << 14,
    head_dim: int = 128,
    dtype: str = "float32",
    direction: Direction = "forward",
    ax: Axes | None = None,
    **arguments: Any,
) -> Axes:
    """Draw the bytes between memory and multiprocessors against the SRAM of a thread block.

    Each point uses the largest tiles that fit (plan "fit"); a line begins where the smallest tiles fit. Dashed
    lines show N²d²/M and, below the knee at M = d², N²d/√M, both with constant 1: the shape that no algorithm
    with standard matrix products can beat.

    Parameters
    ----------
    algorithms
        Names; default every algorithm that has the direction and attends to all keys.
    sram_bytes
        Sizes; default from d/2 to 16·d² elements.
    q_len, head_dim, dtype
        Length of queries and keys, columns of every array, and storage format.
    direction
        "forward" or "backward".
    ax
        Where to draw; default a new figure.
    **arguments
        Further arguments of :func:`simattn.count`.

    Returns
    -------
    matplotlib.axes.Axes
        One line per algorithm that fits anywhere, two reference lines and the knee; M is in elements.

    Raises
    ------
    ValueError, TypeError
        As :func:`simattn.count`, or if there is no algorithm or no size.

    References
    ----------
    Saha and Ye 2024, arXiv 2402.07443, Theorem 3.1.
    """
    if algorithms is None:
        algorithms = [name for name, spec in ALGORITHMS.items() if spec.takes_any_mask and direction in spec.programs]
    names = _checked_names(algorithms, direction)
    item_bytes = ITEM_BYTES[storage_name(dtype)]
    if sram_bytes is None:
        sram_bytes = [size * item_bytes for size in _half_octaves(max(1, head_dim // 2), 16 * head_dim**2)]
    sizes = _checked_axis("sram_bytes", sram_bytes)
    _checked_axis("q_len", [q_len])
    shape = {"head_dim": head_dim, "dtype": dtype, **arguments}
    ax = _axes(ax)
    ends: list[_End] = []
    for name in names:
        points = _fitting_traffic(name, sizes, **_usual(name, direction, q_len, shape))
        if not points:
            continue
        elements, traffic = zip(*((size / item_bytes, count) for size, count in points), strict=True)
        style = {**_line(name), "marker": ""}
        ends.append(_End.of(ax.plot(elements, traffic, label=name, **style)[0]))
    _bytes_axis(ax)
    sram_elements = [size / item_bytes for size in sizes]
    _powers_of_two_axis(ax, sram_elements)
    matrices: float = arguments.get("batch", 1) * arguments.get("heads", 1)
    matrices *= (arguments.get("kv_len") or q_len) / q_len

    def reference(elements: float) -> float:
        return matrices * item_bytes * saha_ye_elements(q_len, head_dim, round(elements))

    _draw_references(ax, sram_elements, head_dim**2, reference)
    ax.set_xlabel(f"SRAM of a thread block, M ({dtype} elements)")
    ax.set_title(_title(direction, {"q_len": q_len, **shape}), loc="left", fontsize="medium")
    _label_ends(ax, ends)
    return ax


def roofline(
    hardware: str | Hardware,
    points: Iterable[RooflinePoint | tuple[str, float, float]],
    *,
    dtype: str = "bfloat16",
    ax: Axes | None = None,
) -> Axes:
    """Draw a GPU's roofs and programs under them.

    Parameters
    ----------
    hardware
        Row, or its name.
    points
        Programs: name, intensity in FLOP per byte, and FLOP per second.
    dtype
        Storage format of the matrix operands, which sets the flat roof.
    ax
        Where to draw; default a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        One line per memory level whose bandwidth is published, HBM and L2, and one marker per point. The L2 roof
        is at twice the read bandwidth, because reads and writes have their own wires.

    Raises
    ------
    ValueError, TypeError
        If the hardware is unknown or lacks the format, or a point's numbers are not above 0.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    row = get_hardware(hardware)
    placed = [RooflinePoint(*point) for point in points]
    for point in placed:
        if not (0 < point.intensity < math.inf and 0 < point.flops_per_second < math.inf):
            raise ValueError(f"point {point}: expected finite numbers above 0")
    ax = _axes(ax, height=max(4.2, 0.6 + 0.21 * len(placed)))
    ridge, peak = ridge_point(row, dtype), row.matmul_flops_per_second(dtype)
    seen = [ridge / 16, ridge, *(point.intensity for point in placed)]
    low, high = min(seen) / 4, max(seen) * 2
    lowest = min([peak / 64, *(point.flops_per_second / 2 for point in placed)])
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(lowest, peak * 2))
    _draw_roofs(ax, row, dtype, low, high)
    for point in placed:
        _draw_point(ax, point)
    for axis, (least, greatest) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        # Labels at 1, 2 and 5 touch when there are many decades.
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if greatest < 300 * least else (1.0,)))
        axis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value / 1e12:g}")
    ax.set_xlabel("matrix-product FLOP per byte moved")
    ax.set_ylabel("TFLOP/s")
    ax.set_title(f"{row.name}, {dtype}", loc="left", fontsize="medium")
    if placed:
        _legend_beside(ax, ax.get_lines()[-len(placed) :])
    return ax


def traffic_by_array(runs: Iterable[Run] | Mapping[str, Run], *, ax: Axes | None = None) -> Axes:
    """Draw each program's bytes between memory and multiprocessors as a bar, stacked by array.

    Parameters
    ----------
    runs
        Results of :func:`simattn.profile`, or such results by label.
    ax
        Where to draw; default a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        One horizontal bar per run. Arrays below 1 % of the longest bar in every run are drawn as "other".

    Raises
    ------
    ValueError
        If there is no run, or two have the same label.
    """
    from matplotlib.ticker import MaxNLocator

    labelled = _labelled(runs)
    moved = {label: _bytes_by_array(run) for label, run in labelled.items()}
    longest = max(sum(parts.values()) for parts in moved.values())
    ordered = sorted({name for parts in moved.values() for name in parts}, key=_array_rank)
    shown = [
        name for name in ordered if max(parts.get(name, 0) for parts in moved.values()) >= _SMALLEST_SHARE * longest
    ]
    colours = _colours_of_arrays(shown)
    ax = _axes(ax, height=1.4 + 0.42 * len(moved))
    labels = list(moved)
    left = [0] * len(labels)
    segments = [(name, [parts.get(name, 0) for parts in moved.values()]) for name in shown]
    other = [sum(count for name, count in parts.items() if name not in shown) for parts in moved.values()]
    if any(other):
        segments.append(("other", other))
    for name, widths in segments:
        colour = colours.get(name, _OTHER_COLOUR)
        ax.barh(labels, widths, left=left, label=name, color=colour, edgecolor="white", linewidth=0.6, height=0.72)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for position, end in enumerate(left):
        ax.annotate(byte_text(end), (end, position), xytext=(4, 0), textcoords="offset points", va="center", color=INK)
    ax.set_xlim(0, longest * 1.24 or 1)
    ax.invert_yaxis()
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_formatter(lambda value, _: byte_text(round(value)))
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("bytes between memory and multiprocessors")
    _legend_beside(ax, ax.containers)
    return ax


def comparison(compared: Comparison, phase: Phase, *, axes: Sequence[Axes] | None = None) -> tuple[Axes, Axes, Axes]:
    """Draw bytes, operations of matrix products and the least time of every algorithm as bars.

    Parameters
    ----------
    compared
        Result of :func:`simattn.compare`.
    phase
        "prefill" or "decode".
    axes
        Three Axes to draw on; default those of a new figure.

    Returns
    -------
    tuple of matplotlib.axes.Axes
        Of bytes, of operations and of the time, on logarithmic scales; the algorithms with the least time first.

    Raises
    ------
    ValueError
        If nothing was counted in the phase, or there are not three Axes.
    """
    from matplotlib.ticker import NullFormatter

    rows = [row for row in compared.of_phase(phase) if row.refusal is None]
    if not rows:
        raise ValueError(f"phase={phase!r}: expected an algorithm that was counted")
    if axes is None:
        from matplotlib.figure import Figure

        axes = Figure(figsize=(9.0, 1.4 + 0.34 * len(rows)), layout="constrained").subplots(1, 3, sharey=True)
    panels: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("hbm_bytes", "bytes to and from memory", lambda value: byte_text(round(value))),
        ("matmul_flops", "FLOPs of matrix products", lambda value: f"{value:.3g}"),
        ("seconds", "least time, seconds", second_text),
    )
    if len(axes) != len(panels):
        raise ValueError(f"axes has {len(axes)} Axes: expected {len(panels)}")
    labels = [row.label for row in rows]
    for ax, (name, title, text) in zip(axes, panels, strict=True):
        _axes(ax)
        values = [getattr(row, name) for row in rows]
        colours = [algorithm_style(row.algorithm)["color"] for row in rows]
        ax.barh(labels, values, color=colours, edgecolor="white", linewidth=0.6, height=0.72)
        for position, value in enumerate(values):
            ax.annotate(
                text(value), (value, position), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7,
                color=INK,
            )  # fmt: skip
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlim(min(values) / 3, max(values) * (max(values) / min(values) * 9) ** 0.4)
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel(title)
    axes[0].invert_yaxis()  # shared by all
    return axes[0], axes[1], axes[2]


def kv_cache_over_time(run: CacheRun, *, ax: Axes | None = None) -> Axes:
    """Draw the slots of a KV cache's pool against time, stacked by their state.

    Parameters
    ----------
    run
        Result of :func:`simattn.kv_cache.simulate`.
    ax
        Where to draw; default a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        One area per state, in percent of the pool. Between the steps that the run recorded they are joined by lines.
    """
    from simattn.kv_cache.result import allocator_text

    ax = _axes(ax)
    shares = [100 * getattr(run, state) / run.pool_tokens for state in _SLOT_COLOURS]
    ax.stackplot(run.step, shares, labels=list(_SLOT_COLOURS), colors=list(_SLOT_COLOURS.values()), linewidth=0)
    ax.set_ylim(0, 100)
    ax.margins(x=0)
    ax.set_xlabel("step")
    ax.set_ylabel("% of the pool")
    ax.set_title(f"{allocator_text(run.allocator)}; pool of {run.pool_tokens:,} tokens", loc="left", fontsize="medium")
    _legend_beside(ax, ax.collections)
    return ax


# Counting for the pictures


def _checked_names(algorithms: Iterable[str] | None, direction: Direction) -> list[str]:
    if algorithms is None:
        names = [name for name, spec in ALGORITHMS.items() if direction in spec.programs]
    else:
        names = [algorithms] if isinstance(algorithms, str) else list(algorithms)
        for name in names:
            get_algorithm(name)
    if not names:
        raise ValueError(f"algorithms={algorithms!r}: expected at least one algorithm with direction={direction!r}")
    return names


def _usual(algorithm: str, direction: Direction, length: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an algorithm's usual problem of a length, those that are given in place of its own."""
    usual = get_algorithm(algorithm).problem_class.usual_arguments(direction, length, arguments.get("window"))
    return {**usual, **arguments, "direction": direction}


def _problems(direction: Direction, lengths: Sequence[int], arguments: Mapping[str, Any]) -> Iterator[AttentionProblem]:
    """Yield attention under any mask, of each length."""
    names = {item.name for item in fields(AttentionProblem)}
    given = {name: value for name, value in arguments.items() if name in names}
    for length in lengths:
        yield AttentionProblem(**{**AttentionProblem.usual_arguments(direction, length), **given})


def _checked_axis(name: str, values: Sequence[int]) -> list[int]:
    ordered = sorted(values)
    if not ordered or ordered[0] < 1:
        raise ValueError(f"{name}={values!r}: expected at least one value, all positive")
    return ordered


def _half_octaves(low: int, high: int) -> list[int]:
    """Return integers from ``low`` to ``high`` that grow by √2."""
    steps = round(2 * math.log2(high / low))
    return [round(low * 2 ** (step / 2)) for step in range(steps + 1)]


def _fitting_traffic(algorithm: str, sram_bytes: Sequence[int], **arguments: Any) -> list[tuple[int, int]]:
    """Return (SRAM bytes, bytes moved) for the sizes that hold a tile."""
    points = []
    for size in sram_bytes:
        try:
            run = profile(algorithm, sram_bytes=size, plan="fit", **arguments)
        except CapacityError:
            continue
        points.append((size, run.traffic.hbm_bytes))
    return points


def _labelled(runs: Iterable[Run] | Mapping[str, Run]) -> dict[str, Run]:
    pairs = (
        list(runs.items()) if isinstance(runs, Mapping) else [(f"{run.algorithm} {run.direction}", run) for run in runs]
    )
    if not pairs:
        raise ValueError("runs is empty: expected at least one result of simattn.profile")
    labelled = dict(pairs)
    if len(labelled) < len(pairs):
        raise ValueError(
            f"runs has the labels {[label for label, _ in pairs]}: expected a mapping from distinct labels"
        )
    return labelled


def _bytes_by_array(run: Run) -> dict[str, int]:
    parts = {
        name: counters.hbm_read_bytes + counters.hbm_write_bytes + counters.hbm_reduce_bytes
        for name, counters in run.traffic.by_array.items()
    }
    return {name: count for name, count in parts.items() if count}


def _array_rank(name: str) -> tuple[int, str]:
    known = list(_ARRAY_COLOURS)
    return (known.index(name) if name in known else len(known), name)


def _colours_of_arrays(names: Sequence[str]) -> dict[str, str]:
    unknown = [name for name in names if name not in _ARRAY_COLOURS]
    spare = dict(zip(unknown, islice(cycle(_SPARE_COLOURS), len(unknown)), strict=True))
    return {name: _ARRAY_COLOURS.get(name) or spare[name] for name in names}


def _title(direction: Direction, arguments: Mapping[str, Any]) -> str:
    heads = arguments.get("heads", 1)
    kv_heads = arguments.get("kv_heads") or heads
    parts = [
        direction,
        f"{heads} head{'s' * (heads != 1)}" + (f" on {kv_heads} KV heads" if kv_heads != heads else ""),
        f"head_dim {arguments.get('head_dim', 64)}",
        str(arguments.get("dtype", "bfloat16")),
        *(["causal"] if arguments.get("causal") else []),
        *([f"N = {_power_text(arguments['q_len'])}"] if "q_len" in arguments else []),
    ]
    return ", ".join(parts)


# Drawing


def _axes(ax: Axes | None, *, height: float = 4.2) -> Axes:
    """Return the Axes, or those of a new figure, with thin lines and a grid behind the data."""
    if ax is None:
        from matplotlib.figure import Figure

        ax = Figure(figsize=(6.0, height), layout="constrained").add_subplot()
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(MUTED)
    ax.grid(visible=True, color=MUTED, alpha=0.22, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(which="both", color=MUTED)
    return ax


def _line(algorithm: str) -> dict[str, Any]:
    return {**algorithm_style(algorithm), "linewidth": 1.8, "markersize": 4.5, "markeredgewidth": 0}


def _reference() -> dict[str, Any]:
    return {"color": MUTED, "linewidth": 1.1, "linestyle": (0, (4, 3))}


def _draw_references(
    ax: Axes, sram_elements: Sequence[float], knee: float, reference: Callable[[float], float]
) -> None:
    """Draw the two slopes of Saha and Ye's bound and the knee between them, as far as the axis shows them."""
    smallest, largest = sram_elements[0], sram_elements[-1]
    for label, start, stop in (
        ("N²d/√M", smallest, min(largest, knee)),
        ("N²d²/M", max(smallest, knee), largest),
    ):
        if start < stop:
            ax.plot([start, stop], [reference(start), reference(stop)], label=label, **_reference())
            middle = math.sqrt(start * stop)
            _note(ax, label, (middle, reference(middle)), (-3, -4), ha="right", va="top")
    if smallest <= knee <= largest:
        ax.axvline(knee, color=MUTED, linewidth=0.8, label="M = d²")
        _note(ax, "M = d²", (knee, 1), (4, -4), xycoords=("data", "axes fraction"), va="top")


def _note(ax: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **properties: Any) -> None:
    """Write a muted text some points away from a place."""
    properties |= {"color": MUTED, "fontsize": "small"}
    ax.annotate(text, at, xytext=offset, textcoords="offset points", **properties)


def _power_text(value: float) -> str:
    """Return a number with the binary suffix that divides it: 131072 is 128k."""
    for suffix, factor in (("G", 1 << 30), ("M", 1 << 20), ("k", 1 << 10)):
        if value >= factor and value % factor == 0:
            return f"{value / factor:.0f}{suffix}"
    return f"{value:g}"


def _powers_of_two_axis(ax: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    ax.set_xscale("log", base=2)
    low, high = math.ceil(math.log2(values[0])), math.floor(math.log2(values[-1]))
    step = max(1, math.ceil((high - low) / 6))
    powers = [2.0**exponent for exponent in range(low, high + 1, step)]
    ax.xaxis.set_major_locator(FixedLocator(powers or list(values)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: _power_text(value))
    ax.set_xlim(values[0] / 1.1, values[-1] * 1.1)


def _bytes_axis(ax: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(base=10, numticks=12))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(lambda value, _: byte_text(round(value)))
    ax.set_ylabel("bytes between memory and multiprocessors")


@dataclass(frozen=True)
class _End:
    """Where a line ends, and what to write there."""

    text: str
    x: float
    y: float
    colour: Any

    @classmethod
    def of(cls, line: Any) -> _End:
        return cls(line.get_label(), line.get_xdata()[-1], line.get_ydata()[-1], line.get_color())


def _label_ends(ax: Axes, ends: Sequence[_End]) -> None:
    """Write each line's label right of its end, moved apart where labels would touch."""
    ax.margins(y=0.08)
    ax.autoscale_view()
    ax.set_xlim(ax.get_xlim())
    ax.set_ylim(ax.get_ylim())
    to_axes = ax.transData + ax.transAxes.inverted()
    wanted = sorted(((float(to_axes.transform((end.x, end.y))[1]), end) for end in ends), key=lambda pair: pair[0])
    size = float(_font_size())
    height_points = ax.get_window_extent().height * 72 / ax.figure.dpi
    gap = 1.35 * size / height_points
    for (_, end), position in zip(wanted, _spread([height for height, _ in wanted], gap), strict=True):
        ax.annotate(
            end.text,
            (end.x, end.y),
            xytext=(1.06, position),
            textcoords="axes fraction",
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": end.colour,
                "linewidth": 0.9,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 2,
            },
            annotation_clip=False,
        )


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Return ascending positions at least ``gap`` apart and below 1, groups centred on where they were wanted."""
    groups: list[list[float]] = []  # each group: its wanted positions, placed around their mean
    for position in wanted:
        groups.append([position])
        while len(groups) > 1 and _top(groups[-2], gap) + gap > _bottom(groups[-1], gap):
            groups[-2:] = [groups[-2] + groups[-1]]
    spread = [_bottom(group, gap) + index * gap for group in groups for index in range(len(group))]
    below_top = [1 - gap * (index + 0.5) for index in reversed(range(len(spread)))]
    return [min(position, limit) for position, limit in zip(spread, below_top, strict=True)]


def _bottom(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) + gap * (len(group) - 1) / 2


def _font_size() -> float:
    from matplotlib import rcParams
    from matplotlib.font_manager import FontProperties

    return FontProperties(size=rcParams["font.size"]).get_size_in_points()


def _draw_roofs(ax: Axes, row: Hardware, dtype: str, low: float, high: float) -> None:
    """Draw the flat roof, and a slope for every memory level whose bandwidth is published."""
    peak = row.matmul_flops_per_second(dtype)
    bottom = ax.get_ylim()[0]
    slopes = [(row.hbm_bytes_per_second, f"HBM {row.hbm_bytes_per_second / 1e12:.3g} TB/s", 1.6)]
    if row.l2_bytes_per_second is not None:
        l2_text = f"L2 {row.l2_bytes_per_second / 1e12:.3g} TB/s each way"
        slopes.append((2 * row.l2_bytes_per_second, l2_text, 0.9))
    for bandwidth, text, width in slopes:
        corner = min(max(peak / bandwidth, low), high)
        at = [low, corner, high]
        rates = [min(peak, intensity * bandwidth) for intensity in at]
        ax.plot(at, rates, color=MUTED, linewidth=width, zorder=1.5, label=text)
        start = max(low, bottom / bandwidth)  # where the slope enters the picture
        _note(
            ax,
            text,
            (start, start * bandwidth),
            (3, 14),
            rotation=45,
            rotation_mode="anchor",
            transform_rotates_text=True,
        )
    _note(ax, f"matrix products {peak / 1e12:.0f} TFLOP/s", (high, peak), (-4, 12), ha="right")


def _draw_point(ax: Axes, point: RooflinePoint) -> None:
    words = point.name.split()
    style = algorithm_style(words[0])
    ax.plot(
        [point.intensity],
        [point.flops_per_second],
        linestyle="",
        marker=style["marker"],
        markersize=7,
        markeredgewidth=1.6,
        markeredgecolor=style["color"],
        markerfacecolor="none" if "backward" in words else style["color"],
        label=point.name,
    )


def _legend_beside(ax: Axes, handles: Sequence[Any]) -> None:
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, borderaxespad=0)
