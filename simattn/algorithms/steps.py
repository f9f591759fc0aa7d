"""The arithmetic of one tile, which several algorithms share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from simattn.algorithms.kernels import ForwardArrays
from simattn.arithmetic.floating import HiddenElements
from simattn.machine import Array, Machine, Place, Tile
from simattn.masks import Rows


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
            row_sum=machine.full("row_sum", query_rows, 1, 0.0, place=place),
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
) -> tuple[Tile, HiddenElements]:
    """Return scale · q kᵀ with hidden elements at −inf, and which those are."""
    scores = machine.scores(q, k, place=place, descales=descales)
    hidden = machine.hidden_elements(query_rows, key_rows)
    machine.hide(scores, hidden, -math.inf)
    return scores, hidden


def update_softmax(
    machine: Machine, state: SoftmaxState, scores: Tile, v: Tile, hidden: HiddenElements
) -> None:
    """Take one tile of scores into the running softmax (Milakov & Gimelshein 2018; FlashAttention-2, Alg. 1)."""
    correction = machine.update_row_max(state.row_max, scores)
    machine.exponential(scores, state.row_max)
    machine.update_row_sum(state.row_sum, scores, correction=correction)
    machine.rescale(state.out, correction)
    machine.matmul(scores, v, place=state.out.place, hidden=hidden, into=state.out)


def finish_softmax(
    machine: Machine,
    state: SoftmaxState,
    arrays: ForwardArrays,
    query_rows: Rows,
    descales: tuple[Tile, ...] = (),
) -> None:
    """Normalise the output and store it with its log-sum-exp."""
    machine.normalise(state.out, state.row_sum)
    for descale in descales:
        machine.scale(state.out, descale)
    machine.store(state.out, arrays.out, query_rows)
    machine.store(machine.log_sum_exp(state.row_max, state.row_sum), arrays.lse, query_rows)


def load_statistics(machine: Machine, delta: Array, query_rows: Rows) -> tuple[Tile, Tile]:
    """Load the log-sum-exp and delta of some query rows."""
    lse = machine.load(machine.arrays["lse"], query_rows, place="registers")
    return lse, machine.load(delta, query_rows, place="registers")


def score_gradients(
    machine: Machine,
    q: Tile,
    k: Tile,
    v: Tile,
    dout: Tile,
    statistics: tuple[Tile, Tile],
    query_rows: Rows,
    key_rows: Rows,
    *,
    place: Place,
) -> tuple[Tile, Tile, HiddenElements]:
    """Recompute P = exp(S − LSE) and return it, dS = P ∘ (dO Vᵀ − delta) without the scale, and what is hidden."""
    lse, delta = statistics
    probabilities, hidden = masked_scores(machine, q, k, query_rows, key_rows, place=place)
    machine.probabilities(probabilities, lse)
    dscores = machine.matmul(dout, v, place=place, name="dscores", transpose_b=True)
    machine.softmax_gradient(probabilities, dscores, delta)
    machine.hide(dscores, hidden, 0.0)
    return probabilities, dscores, hidden
