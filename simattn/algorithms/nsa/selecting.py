"""The kernel that selects blocks by the scores of the compressed branch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from simattn.algorithms.nsa.plan import NsaPlan, Sizes
from simattn.algorithms.nsa.problem import NsaProblem, Values
from simattn.machine import Machine
from simattn.masks import Rows, Windows


def select(machine: Machine, problem: NsaProblem, plan: NsaPlan) -> None:
    """Each thread block recomputes the probabilities of its positions, sums them by blocks and keeps the best.

    A compressed block that begins in one block of the selection may end in the next: what falls to the first block of
    the next tile is carried on.
    """
    sizes, group, count, place = Sizes.of(problem, plan), problem.group_size, problem.selected_blocks, plan.accumulators
    branch = replace(problem.compressed_branch, q_len=problem.q_len, packed_heads=1)
    inner = machine.inside(branch, {})
    blocks = sizes.compressed // problem.stride_ratio
    width = group * max(sizes.compressed, problem.head_dim)
    for positions in inner.thread_blocks(problem.q_len, sizes.positions, per="kv", width=width):
        selecting = Selecting(inner, problem, positions, blocks)
        query_rows = Windows(positions, group, group)
        # load
        q = inner.load(machine.arrays["q"], query_rows)
        lse = inner.load(machine.arrays["lse_compressed"], query_rows, place="registers")
        best = inner.full("best_blocks", positions, 2 * count, -np.inf, place=place)
        carry = inner.full("carried_scores", positions, 1, 0.0, place=place)
        for key_rows in inner.tiles(branch.visible_keys(positions), sizes.compressed):
            # load
            k = inner.load(machine.arrays["k_compressed"], key_rows)
            # compute
            scores = inner.scores(q, k, place=place)
            hidden = inner.hidden_elements(positions, key_rows)
            hidden = {member: np.repeat(elements, group, axis=0) for member, elements in hidden.items()}
            inner.hide(scores, hidden, -np.inf)
            inner.probabilities(scores, lse)
            inner.hide(scores, hidden, 0.0)
            capacity = (positions.tile, blocks + 1)
            sums = inner.allocate("block_scores", positions.size, blocks + 1, place=place, capacity=capacity)
            operations = scores.rows * scores.columns + 2 * positions.size * blocks * len(problem.overlaps)
            inner.transform((scores, carry), sums, selecting.block_scores, vector_flops=operations)
            inner.transform((sums,), carry, lambda values: values[..., -1:], vector_flops=0)
            merge = selecting.merging(key_rows.first)
            inner.transform((best, sums), best, merge, vector_flops=positions.size * blocks * count)
        # finish
        inner.transform((best, carry), best, selecting.with_carried, vector_flops=positions.size * count)
        chosen = inner.allocate("indices", positions.size, count, place=place, capacity=(positions.tile, count))
        inner.transform((best,), chosen, selecting.indices, vector_flops=0)
        inner.store(chosen, machine.arrays["indices"], positions)
    machine.take_over(inner)


@dataclass
class Selecting:
    """What the thread blocks at a run of tiles of positions compute.

    The best blocks of a position are a row of their ranks, then of their indices, in ascending order of the indices.
    A rank is a score, ∞ for a block that is always selected, −1 for NaN, and −∞ for no block.

    Attributes
    ----------
    machine, problem
        The machine of the kernel, and the problem.
    rows
        The tiles of positions.
    blocks
        Blocks of the selection that a tile of compressed blocks begins in.
    """

    machine: Machine
    problem: NsaProblem
    rows: Rows
    blocks: int

    def block_scores(self, probabilities: Values, carry: Values) -> Values:
        """Return the scores of the blocks that a tile of compressed blocks begins in, and what falls to the next.

        Sums run over the heads in ascending order, then over the compressed blocks in ascending order.
        """
        problem, ratio = self.problem, self.problem.stride_ratio
        *others, rows, columns = probabilities.shape
        summed = probabilities.reshape(*others, rows // problem.group_size, problem.group_size, columns).sum(axis=-2)
        whole = np.zeros((*summed.shape[:-1], self.blocks * ratio), dtype=summed.dtype)
        whole[..., :columns] = summed
        scores = np.zeros((*summed.shape[:-1], self.blocks + 1), dtype=summed.dtype)
        scores[..., :1] = carry
        for offset in problem.overlaps:
            part = summed.dtype.type(problem.overlaps[offset]) * whole[..., offset % ratio :: ratio]
            if offset < 0:
                scores[..., 1:] += part
            else:
                scores[..., :-1] += part
        return scores

    def merging(self, tile: int) -> Callable[[Values, Values], Values]:
        """Return what takes the scores of a tile's blocks into the best ones."""

        def merge(best: Values, scores: Values) -> Values:
            return self._merged(best, scores[..., :-1], tile * self.blocks + np.arange(self.blocks))

        return merge

    def with_carried(self, best: Values, carry: Values) -> Values:
        """Take the block after those of all tiles in: the last that a position can be in."""
        problem = self.problem
        last = np.minimum((self.machine.present(self.rows) + 1) * self.rows.tile, problem.q_len)
        keys = last + problem.kv_len - problem.q_len
        complete = np.maximum(0, (keys - problem.compression_block) // problem.compression_stride + 1)
        tiles = -(-complete // (self.blocks * problem.stride_ratio))
        return self._merged(best, carry, (tiles * self.blocks)[:, None, None, None])

    def _merged(self, best: Values, scores: Values, blocks: npt.NDArray[np.int64]) -> Values:
        problem, count = self.problem, self.problem.selected_blocks
        rows = self.machine.present(self.rows)[:, None] * self.rows.tile + np.arange(self.rows.size)
        own = ((rows + problem.kv_len - problem.q_len) // problem.selection_block)[:, None, :, None]
        ranks = np.where(np.isnan(scores), -1, scores)
        ranks = np.where(problem.is_forced(blocks, own), np.inf, ranks)
        ranks = np.where(blocks <= own, ranks, -np.inf)
        all_ranks = np.concatenate([best[..., :count], ranks], axis=-1)
        all_blocks = np.concatenate([best[..., count:], np.broadcast_to(blocks, ranks.shape)], axis=-1)
        # Stable, so that of equal ranks the lower indices, which come first, are kept.
        order = np.argsort(-all_ranks, axis=-1, kind="stable")[..., :count]
        order.sort(axis=-1)
        return np.concatenate([np.take_along_axis(values, order, -1) for values in (all_ranks, all_blocks)], axis=-1)

    def indices(self, best: Values) -> Values:
        """Return the indices of the best blocks, ascending, then −1."""
        ranks, blocks = np.split(best, 2, axis=-1)
        found = np.sort(np.where(ranks == -np.inf, np.inf, blocks), axis=-1)
        return np.where(found == np.inf, -1, found)
