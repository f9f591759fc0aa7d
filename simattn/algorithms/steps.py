"""The arithmetic of one tile, which several algorithms share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from simattn.algorithms.kernels import ForwardArrays
from simattn.arithmetic.floating import HiddenElements
from simattn.machine import Array, Machine, Place, Tile
from simattn.masks import Rows, Visibility


@dataclass
class SoftmaxState:
    """Running softmax of the query rows of a block: unnormalised output, row maximum and row sum."""

    out: Tile
    row_max: Tile
    row_sum: Tile

    @classmethod
    def empty(cls, machine: Machine, query_rows: Rows, value_columns: int, place: Place) -> SoftmaxState:
        """Return the state before any key was seen."""
        return cls(
            out=machine.full("out", query_rows, value_columns, 0.0, place=place),
            row_max=machine.full("row_max", query_rows, 1, -math.inf, place=place),
            row_sum=machine.empty_row_sum(query_rows, place=place),
        )


def masked_scores(
    machine: Machine,
    q: Tile,
    k: Tile,
    query_rows: Rows,
    key_rows: Rows,
    *,
    place: Place,
    descales: tuple[Tile, ...] = (),
    seen: Visibility | None = None,
) -> tuple[Tile, HiddenElements]:
    """Return scale · q kᵀ with hidden elements at −inf, and which those are, by ``seen`` or else the problem's mask."""
    scores = machine.scores(q, k, place=place, descales=descales)
    hidden = machine.hidden_elements(query_rows, key_rows, seen)
    machine.hide(scores, hidden, -math.inf)
    return scores, hidden


def update_softmax(
    machine: Machine,
    state: SoftmaxState,
    scores: Tile,
    v: Tile,
    hidden: HiddenElements,
    *,
    value_descales: tuple[Tile, ...] = (),
    staged_as: str | None = None,
) -> None:
    """Take one tile of scores into the running softmax (Milakov & Gimelshein 2018; FlashAttention-2, Alg. 1).

    ``value_descales`` scale the probabilities where the output is not scaled once at the end; ``staged_as`` names the
    storage format in which the probabilities pass through SRAM, if they do.
    """
    correction = machine.update_row_max(state.row_max, scores)
    machine.exponential(scores, state.row_max)
    machine.update_row_sum(state.row_sum, scores, correction=correction)
    machine.rescale(state.out, correction)
    for descale in value_descales:
        machine.scale(scores, descale)
    if staged_as is not None:
        scores = machine.stage(scores, "probabilities", dtype=staged_as)
    machine.matmul(scores, v, place=state.out.place, hidden=hidden, into=state.out)


def take_partial(machine: Machine, state: SoftmaxState, out: Tile, lse: Tile) -> None:
    """Take the normalised output of some keys and its log-sum-exp into the running softmax, and overwrite both.

    O = Σ_s e^(L_s − L) O_s with L = log Σ_s e^(L_s), of parts s that share no key.
    """
    correction = machine.update_row_max(state.row_max, lse)
    machine.exponential(lse, state.row_max)
    machine.update_row_sum(state.row_sum, lse, correction=correction)
    machine.rescale(state.out, correction)
    machine.rescale(out, lse)
    machine.add(state.out, out)


def finish_softmax(
    machine: Machine,
    state: SoftmaxState,
    arrays: ForwardArrays,
    query_rows: Rows,
    *,
    descales: tuple[Tile, ...] = (),
    staged: bool = False,
) -> None:
    """Normalise the output and store it, through SRAM if ``staged``, with its log-sum-exp."""
    machine.normalise(state.out, state.row_sum)
    for descale in descales:
        machine.scale(state.out, descale)
    out = machine.stage(state.out, "out", dtype=arrays.out.dtype) if staged else state.out
    machine.store(out, arrays.out, query_rows)
    machine.store(machine.log_sum_exp(state.row_max, state.row_sum), arrays.lse, query_rows)


@dataclass
class SavedStatistics:
    """What the forward pass saved about each query row, on chip, with delta = rowsum(dO ∘ O).

    Either the log-sum-exp or the row maximum and row sum.
    """

    delta: Tile
    lse: Tile | None = None
    row_max: Tile | None = None
    row_sum: Tile | None = None

    def probabilities(self, machine: Machine, scores: Tile) -> None:
        """Replace scores by their softmax."""
        if self.lse is not None:
            machine.probabilities(scores, self.lse)
        else:
            assert self.row_max is not None
            assert self.row_sum is not None
            machine.exponential(scores, self.row_max)
            machine.normalise(scores, self.row_sum)


def load_statistics(machine: Machine, delta: Array, query_rows: Rows) -> SavedStatistics:
    """Load the log-sum-exp and delta of some query rows."""
    lse = machine.load(machine.arrays["lse"], query_rows, place="registers")
    return SavedStatistics(delta=machine.load(delta, query_rows, place="registers"), lse=lse)


def score_gradients(
    machine: Machine,
    q: Tile,
    k: Tile,
    v: Tile,
    dout: Tile,
    statistics: SavedStatistics,
    query_rows: Rows,
    key_rows: Rows,
    *,
    place: Place,
) -> tuple[Tile, Tile, HiddenElements]:
    """Recompute P and return it, dS = P ∘ (dO Vᵀ − delta) without the scale, and which elements are hidden."""
    probabilities, hidden = masked_scores(machine, q, k, query_rows, key_rows, place=place)
    statistics.probabilities(machine, probabilities)
    machine.hide(probabilities, hidden, 0.0)  # in a row of NaN they are NaN
    dscores = machine.matmul(dout, v, place=place, name="dscores", transpose_b=True)
    machine.softmax_gradient(probabilities, dscores, statistics.delta)
    machine.hide(dscores, hidden, 0.0)
    return probabilities, dscores, hidden
