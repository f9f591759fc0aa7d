"""The definition of Native Sparse Attention: whole matrices, one KV head at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from simattn.algorithms.nsa.problem import BRANCHES, LEARNED, NsaProblem
from simattn.definition import Rounding, exact, seen_product
from simattn.selection import Indices

Values = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


def reference(problem: NsaProblem, inputs: Mapping[str, Values], rounded: Rounding = exact) -> dict[str, Values]:
    """Compute the three branches as the definition has them.

    Parameters
    ----------
    problem
        The problem; with a ``selection`` its blocks are attended to, without one those of the highest scores.
    inputs
        The arrays of the problem, by name, in the precision to compute in: float64 for the oracle.
    rounded
        What compressed rows, probabilities, outputs and gradients go through, such as a rounding to a storage format.

    Returns
    -------
    dict
        ``out``; with ``dout`` the gradients of all inputs; of a decoding step ``k_compressed`` and ``v_compressed``
        with the blocks that it completes.
    """
    precision = inputs["q"].dtype
    results = {"out": np.zeros((problem.batch, problem.q_len, problem.heads, problem.value_dim), dtype=precision)}
    is_decode = "k_compressed" in inputs
    if is_decode:
        results |= {name: inputs[name].copy() for name in ("k_compressed", "v_compressed")}
    if "dout" in inputs:
        results |= {f"d{name}": np.zeros_like(array) for name, array in inputs.items() if name != "dout"}
    with np.errstate(all="ignore"):  # NaN and Inf are propagated as IEEE says, not reported
        for batch in range(problem.batch):
            for head in range(problem.kv_heads):
                stream = _Stream(problem, inputs, batch, head, rounded)
                results["out"][batch][:, stream.queries] = stream.out()
                if is_decode:
                    for name in ("k_compressed", "v_compressed"):
                        results[name][batch, :, head] = stream.keys_and_values[name]
                if "dout" in inputs:
                    stream.add_gradients(results)
    return results


def selected_indices(problem: NsaProblem, inputs: Mapping[str, Values]) -> Indices:
    """Return the blocks that the inputs select, (batch, kv_heads, q_len, selected_blocks)."""
    indices = np.zeros((problem.batch, problem.kv_heads, problem.q_len, problem.selected_blocks), dtype=np.int32)
    with np.errstate(all="ignore"):
        for batch in range(problem.batch):
            for head in range(problem.kv_heads):
                indices[batch, head] = _Stream(problem, inputs, batch, head, exact).select()
    return indices


class _Stream:
    """One KV head of one batch entry, and the query heads of its group."""

    def __init__(
        self, problem: NsaProblem, inputs: Mapping[str, Values], batch: int, head: int, rounded: Rounding
    ) -> None:
        self.problem, self.inputs, self.batch, self.head, self.rounded = problem, inputs, batch, head, rounded
        group = problem.group_size
        self.queries = slice(head * group, (head + 1) * group)
        self.q, self.gates = (np.moveaxis(inputs[name][batch][:, self.queries], 1, 0) for name in ("q", "gates"))
        self.compressions = {
            name: Compression(problem, inputs, name, inputs[name][batch, :, head], rounded) for name in "kv"
        }
        self.keys_and_values = {
            f"{name}_{branch}": inputs[f"{name}_{branch}"][batch, :, head]
            for branch in ("selected", "window")
            for name in "kv"
        }
        for name, compression in self.compressions.items():
            rows = compression.rows
            if f"{name}_compressed" in inputs:
                old = problem.compressed_len - problem.new_blocks
                rows = np.concatenate([inputs[f"{name}_compressed"][batch, :old, head], rows[old:]])
            self.keys_and_values[f"{name}_compressed"] = rows

    @cached_property
    def seen(self) -> dict[str, Mask]:
        """Which rows of a branch each query sees, (q_len, rows)."""
        return {branch: self._seen(branch) for branch in BRANCHES}

    @cached_property
    def probabilities(self) -> dict[str, Values]:
        """The softmax of a branch, (group, q_len, rows), 0 where nothing is seen."""
        return {branch: self._probabilities(branch, self.seen[branch]) for branch in BRANCHES}

    @cached_property
    def branch_outs(self) -> dict[str, Values]:
        """The output of a branch, (group, q_len, value_dim)."""
        return {
            branch: self.rounded(
                seen_product(self.probabilities[branch], self.keys_and_values[f"v_{branch}"], self.seen[branch])
            )
            for branch in BRANCHES
        }

    def _seen(self, branch: str) -> Mask:
        problem = self.problem
        position = problem.positions[:, None]
        if branch == "compressed":
            last = np.arange(problem.compressed_len) * problem.compression_stride + problem.compression_block - 1
            return np.asarray(last <= position)
        keys = np.arange(problem.kv_len)
        if branch == "window":
            return np.asarray((keys <= position) & (keys > position - problem.window_keys))
        own_blocks = self.select()[:, :, None] == keys // problem.selection_block
        return np.asarray(own_blocks.any(axis=1) & (keys <= position))

    def _probabilities(self, branch: str, seen: Mask) -> Values:
        keys = self.keys_and_values[f"k_{branch}"]
        scale = self.q.dtype.type(self.problem.scale)
        scores = np.where(seen, scale * self.rounded(self.q @ keys.T), -np.inf)
        highest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
        weights = np.where(seen, np.exp(scores - np.where(highest == -np.inf, 0, highest)), 0)
        total = weights.sum(axis=-1, keepdims=True)
        return self.rounded((weights / np.where(total == 0, 1, total)).astype(self.q.dtype))

    def select(self) -> Indices:
        """Return the blocks of each query, (q_len, selected_blocks)."""
        problem = self.problem
        if problem.selection is not None:
            given: Indices = problem.selection.indices[self.batch, self.head]
            return given
        blocks = problem.selection_blocks
        probabilities = self._probabilities("compressed", self._seen("compressed")).sum(axis=0)
        first = np.arange(problem.compressed_len)[:, None] * problem.compression_stride
        start = np.arange(blocks) * problem.selection_block
        overlap = np.minimum(first + problem.compression_block, start + problem.selection_block) - np.maximum(
            first, start
        )
        # Blocks are added one by one, so that equal blocks have equal sums.
        scores = np.zeros((problem.q_len, blocks), dtype=self.q.dtype)
        for row, weights in enumerate(np.maximum(overlap, 0) / problem.compression_stride):
            seen = weights != 0
            scores[:, seen] += (weights[seen] * probabilities[:, row, None]).astype(scores.dtype)
        return problem.choose(scores)

    def out(self) -> Values:
        """Return the gated sum of the branches, (q_len, group, value_dim)."""
        total = sum(self.gates[..., [number]] * self.branch_outs[branch] for number, branch in enumerate(BRANCHES))
        return np.moveaxis(self.rounded(np.asarray(total)), 0, 1)

    def add_gradients(self, results: dict[str, Values]) -> None:
        """Set the gradients of this stream, and add to those of what all streams share."""
        batch, head, scale = self.batch, self.head, self.q.dtype.type(self.problem.scale)
        dout = np.moveaxis(self.inputs["dout"][batch][:, self.queries], 1, 0)
        dq = np.zeros_like(self.q)
        gradients: dict[str, Values] = {}
        for number, branch in enumerate(BRANCHES):
            seen, probabilities, out = (found[branch] for found in (self.seen, self.probabilities, self.branch_outs))
            keys, values = (self.keys_and_values[f"{name}_{branch}"] for name in "kv")
            results["dgates"][batch][:, self.queries, number] = (dout * out).sum(axis=-1).T
            gradient = self.gates[..., [number]] * dout
            dprobabilities = self.rounded(gradient @ values.T)
            delta = (gradient * out).sum(axis=-1, keepdims=True)
            dscores = self.rounded(np.where(seen, probabilities * (dprobabilities - delta), 0))
            dq += scale * seen_product(dscores, keys, seen)
            transposed = (np.moveaxis(array, 2, 1) for array in (dscores, probabilities))
            dkeys, dvalues = (
                seen_product(weights, rows, seen.T).sum(axis=0)
                for weights, rows in zip(transposed, (self.q, gradient), strict=True)
            )
            gradients |= {f"k_{branch}": scale * dkeys, f"v_{branch}": dvalues}
        results["dq"][batch][:, self.queries] = np.moveaxis(dq, 0, 1)
        for name, compression in self.compressions.items():
            gradients |= compression.gradients(gradients.pop(f"{name}_compressed"))
        for name, values in gradients.items():
            if results[f"d{name}"].ndim == 2:
                results[f"d{name}"] += values
            else:
                results[f"d{name}"][batch, :, head] = values


@dataclass
class Compression:
    """The compression of the keys or values of one KV head.

    Attributes
    ----------
    problem, inputs, name
        The problem, its inputs, and "k" or "v".
    source
        What is compressed, (kv_len, columns).
    rounded
        What compressed rows go through.
    """

    problem: NsaProblem
    inputs: Mapping[str, Values]
    name: str
    source: Values
    rounded: Rounding

    @property
    def keys_of_blocks(self) -> npt.NDArray[np.int64]:
        """The rows that each block is made of, (blocks, compression_block)."""
        first = np.arange(self.problem.compressed_len)[:, None] * self.problem.compression_stride
        return first + np.arange(self.problem.compression_block)

    @property
    def learned(self) -> tuple[Values, Values, Values]:
        """Positions, hidden weights and output weights."""
        positions, hidden, output = (self.inputs[f"{self.name}_{learned}"] for learned in LEARNED)
        return positions, hidden, output

    @property
    def rows(self) -> Values:
        """The compressed rows, (blocks, columns)."""
        blocks = self.source[self.keys_of_blocks]
        if self.problem.compression == "mean":
            return self.rounded(blocks.sum(axis=1) / self.source.dtype.type(self.problem.compression_block))
        positions, hidden, output = self.learned
        sides = (blocks + positions).reshape(len(blocks), positions.size)
        return self.rounded(np.maximum(sides @ hidden, 0) @ output)

    def gradients(self, drows: Values) -> dict[str, Values]:
        """Return the gradients of the source and of what was learned, from those of the compressed rows."""
        problem, blocks = self.problem, self.source[self.keys_of_blocks]
        found = {}
        if problem.compression == "mean":
            dblocks = np.repeat(drows[:, None] / problem.compression_block, problem.compression_block, axis=1)
        else:
            positions, hidden, output = self.learned
            sides = (blocks + positions).reshape(len(blocks), positions.size)
            before = sides @ hidden
            dbefore = (drows @ output.T) * (before > 0)
            dblocks = (dbefore @ hidden.T).reshape(blocks.shape)
            gradients = (dblocks.sum(axis=0), sides.T @ dbefore, np.maximum(before, 0).T @ drows)
            found = {f"{self.name}_{learned}": value for learned, value in zip(LEARNED, gradients, strict=True)}
        dsource = np.zeros_like(self.source)
        np.add.at(dsource, self.keys_of_blocks, dblocks)
        return {self.name: dsource, **found}
