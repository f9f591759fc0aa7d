"""What the pages of the algorithms call the sizes of a problem and a plan, counted tile by tile or on whole masks."""

from __future__ import annotations

import math

import numpy as np

import simattn
from simattn.algorithms.dilated_window import DilatedWindowProblem
from simattn.algorithms.moba import MobaProblem
from simattn.algorithms.nsa import NsaProblem
from simattn.algorithms.overlapped_window import OverlappedWindowProblem
from simattn.algorithms.sliding_window import SlidingWindowProblem


def symbols_of(problem, plan):
    """Return what the pages call the sizes of a problem and its plan; the visits are counted tile by tile."""
    q_tiles, kv_tiles = (
        [min(tile, length - start) for start in range(0, length, tile)]
        for length, tile in ((problem.q_len, plan.tiles.q), (problem.kv_len, plan.tiles.kv))
    )
    visited = [(i, j) for i in range(len(q_tiles)) for j in range(len(kv_tiles)) if is_visited(problem, plan, i, j)]
    looped = plan.grouped_gradients == "loop" and not plan.repeat_kv
    own = OWN_SYMBOLS.get(type(problem), lambda problem, plan: {})(problem, plan)
    depth = plan.tiles.depth or max(problem.head_dim, problem.value_dim)
    passes = getattr(plan, "passes", None) or getattr(plan, "softmax_passes", None) or 1
    return {
        "b": problem.batch,
        "h": problem.heads,
        "g": problem.kv_heads,
        "g'": problem.kv_heads if looped else problem.heads,
        "g_a": problem.kv_heads if plan.grouped_gradients == "reduce" else problem.heads,
        "s": problem.item_bytes,
        "s_o": 2 if problem.is_float8 else problem.item_bytes,
        "N_q": problem.q_len,
        "N_k": problem.kv_len,
        "N": max(problem.q_len, problem.kv_len),
        "d": problem.head_dim,
        "d_v": problem.value_dim,
        "T_r": len(q_tiles),
        "T_c": len(kv_tiles),
        "T_d": math.ceil(problem.head_dim / min(depth, problem.head_dim)),
        "T_v": math.ceil(problem.value_dim / min(depth, problem.value_dim)),
        "V_k": sum(kv_tiles[j] for _, j in visited),
        "V_q": sum(q_tiles[i] for i, _ in visited),
        "p": passes,
        "p'": min(passes, 2),
        "p_v": min(passes, 2),
        "g_s": problem.heads if plan.grouped_gradients == "expand" else problem.kv_heads,
        **decoding_symbols(problem, plan),
    } | own


def visits_of(problem, plan):
    """Return V_k and V_q, tile by tile."""
    symbols = symbols_of(problem, plan)
    return symbols["V_k"], symbols["V_q"]


def tiled(length, tile):
    return [(start, min(start + tile, length)) for start in range(0, length, tile)]


def sliding_window_symbols(problem, plan):
    packed = getattr(plan, "packed_heads", None) or problem.group_size
    filled = sum(slot < (problem.total_tokens or 0) for slot in range(problem.kv_len))
    return {"F": filled, "T_h": problem.heads // packed * len(tiled(packed, plan.tiles.q))}


def placed_visits(queries, keys, causal, plan):
    """Return the key rows that tiles of queries at some positions load, and the query rows that tiles of keys load."""
    by_queries = by_keys = 0
    for start, stop in tiled(len(queries), plan.tiles.q):
        for first, end in tiled(len(keys), plan.tiles.kv):
            if not causal or keys[first] <= queries[stop - 1]:
                by_queries, by_keys = by_queries + end - first, by_keys + stop - start
    return by_queries, by_keys


def dilated_window_symbols(problem, plan):
    """Return what is loaded of windows and global keys, head by head, class by class and tile by tile."""
    length, shift = problem.kv_len, problem.kv_len - problem.q_len
    tokens = problem.global_tokens
    tokens = list(range(tokens)) if isinstance(tokens, int) else list(tokens)
    beginning = [token for index, token in enumerate(tokens) if index == token]
    later = tokens[len(beginning) :]
    local = list(range(max(shift, len(beginning)), length))
    handed = 1 if plan.grouped_gradients == "loop" else problem.group_size
    packed = plan.packed_heads or problem.group_size
    loaded = queries_loaded = handed_in = seen_by_last = 0
    for dilation in [problem.dilation] * problem.kv_heads if isinstance(problem.dilation, int) else problem.dilation:
        for rest in range(min(dilation, length)):
            queries = [position for position in local if position % dilation == rest]
            keys = range(rest, length, dilation)
            band = simattn.AttentionProblem(
                q_len=len(queries), kv_len=len(keys), window=problem.window, causal=problem.causal
            )
            visits = [visits_of(band, plan)] if queries else [(0, 0)]
            visits.append((placed_visits(queries, beginning, problem.causal, plan)[0], 0))
            visits.append((placed_visits(queries, later, problem.causal, plan)[0], 0))
            loaded += problem.group_size * sum(one for one, _ in visits)
            queries_loaded += problem.group_size * sum(two for _, two in visits)
            handed_in += handed * len(keys) * bool(queries)
        for keys in (beginning, later):
            queries_loaded += problem.group_size * placed_visits(local, keys, problem.causal, plan)[1]
            handed_in += handed * len(keys) * bool(local)
        near = {length - 1 - step * dilation for step in range(problem.window[0] + 1)}
        keys = {key for key in near if key >= 0} | set(tokens)
        seen_by_last += length if length - 1 in tokens else len(keys)
    parts = [([token for token in some if token >= shift], some is beginning) for some in (beginning, later)]
    global_keys = global_queries = global_handed = 0
    for rows, is_beginning in parts:
        if rows:
            keys = range(len(beginning) if is_beginning and problem.causal else length)
            one, two = placed_visits(rows, keys, problem.causal, plan)
            global_keys, global_queries = global_keys + one, global_queries + two
            global_handed += len(keys)
    return {
        "R": len(local), "G": sum(len(rows) for rows, _ in parts),
        "L_k": loaded, "L_q": queries_loaded, "E": handed_in,
        "G_k": global_keys, "G_q": global_queries, "G_e": global_handed,
        "S": seen_by_last * (problem.group_size // packed) * len(tiled(packed, plan.tiles.q)),
    }  # fmt: skip


def overlapped_window_symbols(problem, plan):
    """Return what the pieces of all windows load, window by window, and what the merge loads, tile by tile."""
    length, step = problem.q_len, problem.window_len - problem.overlap
    starts = [0] if length else []
    while starts and starts[-1] + problem.window_len < length:
        starts.append(starts[-1] + step)
    windows = [range(start, min(start + problem.window_len, length)) for start in starts]
    rows = keys = loaded = queries_loaded = 0
    for index, tokens in enumerate(windows):
        shared = problem.overlap if index and problem.pairs == "once" else 0
        pieces = [(tokens[shared:], tokens, problem.causal)]
        if shared and not problem.causal:
            pieces.append((tokens[:shared], tokens[shared:], False))
        for queries, seen, causal in pieces:
            one, two = placed_visits(queries, seen, causal, plan)
            rows, keys = rows + len(queries), keys + len(seen)
            loaded, queries_loaded = loaded + one, queries_loaded + two
    merges = len(windows) > 1 and problem.overlap and not (problem.causal and problem.pairs == "once")
    merged = sum(
        (stop - start) * sum(tokens[0] < stop and tokens[-1] >= start for tokens in windows)
        for start, stop in tiled(length, plan.tiles.q)
    )
    handed = problem.kv_heads if plan.grouped_gradients == "loop" else problem.heads
    return {
        "P": rows, "P_m": rows if merges else 0, "M_r": merged if merges else 0, "P_k": keys, "E": handed * keys,
        "V_k": loaded, "V_q": queries_loaded,
    }  # fmt: skip


def chosen_blocks(problem, plan):
    """Return the sizes of a choice of blocks, counted row by row and tile by tile."""
    rows = range(problem.kv_len - problem.q_len, problem.kv_len)
    blocks, size = math.ceil(problem.kv_len / problem.block_size), problem.block_size
    choices = max(0, min(problem.top_k, blocks) - 1)
    inside_keys = inside_queries = 0
    for start in range(0, problem.kv_len, size):
        length = min(size, problem.kv_len - start)
        for first in range(0, length, plan.tiles.q):
            last = min(first + plan.tiles.q, length)
            for key in range(0, last, plan.tiles.kv):
                inside_keys += min(plan.tiles.kv, length - key)
                inside_queries += last - first
    means = 0
    for first in range(0, problem.kv_len, plan.tiles.q):
        seen = (min(first + plan.tiles.q, problem.kv_len) - 1) // size
        means += sum(min(plan.tiles.kv, blocks - 1 - mean) for mean in range(0, seen, plan.tiles.kv))
    late = [row for row in rows if row >= size and choices]
    counts = problem.histogram.counts.ravel().tolist() if problem.q_len == problem.kv_len else []
    return {
        "B": size,
        "m": max(0, blocks - 1),
        "c": choices,
        "C": sum(min(choices, row // size) for row in rows),
        "L": sum(math.ceil(count / plan.tiles.q) for count in counts),
        "I_k": inside_keys,
        "I_q": inside_queries,
        "V_m": means,
        "T_b": math.ceil(size / plan.tiles.kv),
        "g_m": problem.heads if plan.repeat_kv else problem.kv_heads,
        "D": sum(min(choices, row // size) * size + row % size + 1 for row in rows),
        "E": sum(row // size for row in late),
        "P": len(late),
    }


def nsa_symbols(problem, plan):
    """Return what the page on Native Sparse Attention calls the sizes of one KV head, counted on whole masks."""
    group, stride, block = problem.group_size, problem.compression_stride, problem.selection_block
    position = np.arange(problem.kv_len - problem.q_len, problem.kv_len)[:, None]
    blocks = [
        first for first in range(0, problem.kv_len, stride) if first + problem.compression_block <= problem.kv_len
    ]
    new = [first for first in blocks if first + problem.compression_block > problem.kv_len - problem.q_len]
    keys = np.arange(problem.kv_len)
    ratio = block // stride
    masks = {
        "c": (
            np.array(blocks, int) + problem.compression_block - 1 <= position,
            max(ratio, plan.tiles.kv // ratio * ratio),
        ),
        "w": ((keys <= position) & (keys > position - problem.window_keys), plan.tiles.kv),
    }
    symbols = {"l": problem.compression_block, "n": problem.selected_blocks, "e": problem.compression_hidden or 0}
    for name, (seen, tile) in masks.items():
        tiles = [
            (min(plan.tiles.q, seen.shape[0] - row), min(tile, seen.shape[1] - column))
            for row in range(0, seen.shape[0], plan.tiles.q)
            for column in range(0, seen.shape[1], tile)
            if seen[row : row + plan.tiles.q, column : column + tile].any()
        ]
        symbols |= {f"V_{name}": sum(size for _, size in tiles), f"W_{name}": group * sum(rows for rows, _ in tiles)}
    starts = range(0, problem.kv_len, block)
    seen_blocks = [[start for start in starts if start <= at][-problem.selected_blocks :] for at in position[:, 0]]
    symbols["V_s"] = sum(min(block, problem.kv_len - start) for row in seen_blocks for start in row)
    symbols["P_s"] = sum(map(len, seen_blocks))
    symbols |= {"W_s": group * symbols["P_s"], "N_s": len(starts), "N_c": len(blocks), "N_c'": len(new)}
    tile = plan.compressed_rows or max(1, plan.tiles.kv // stride)
    for prime, compressed in (("", blocks), ("'", new)):
        parts = [compressed[first : first + tile] for first in range(0, len(compressed), tile)]
        symbols[f"T_m{prime}"] = len(parts)
        symbols[f"R{prime}"] = sum(part[-1] - part[0] + problem.compression_block for part in parts)
    return symbols


OWN_SYMBOLS = {
    SlidingWindowProblem: sliding_window_symbols,
    DilatedWindowProblem: dilated_window_symbols,
    OverlappedWindowProblem: overlapped_window_symbols,
    MobaProblem: chosen_blocks,
    NsaProblem: nsa_symbols,
}
"""What the pages of algorithms with problems of their own call sizes besides."""


def decoding_symbols(problem, plan):
    """Return what the pages call the sizes of a decoding step; its keys and entries are counted key by key."""
    if not hasattr(plan, "query_heads"):
        return {}
    packed = problem.group_size if plan.query_heads == "packed" else 1
    rows, tile = problem.q_len * packed, plan.tiles.kv
    lengths = getattr(problem, "lengths", (problem.kv_len,) * problem.batch)
    left, right = problem.window or (None, None)
    right = 0 if problem.causal else right
    keys = entries = 0
    several = [parts_of(length, plan) for length in lengths if parts_of(length, plan) > 1]
    for length in lengths:
        for first in range(0, rows, plan.tiles.q):
            last = min(first + plan.tiles.q, rows) - 1
            low, high = (row // packed + length - problem.q_len for row in (first, last))
            low, high = 0 if left is None else low - left, length - 1 if right is None else high + right
            tiles = {key // tile for key in range(max(0, low), min(length - 1, high) + 1)}
            loaded = [range(index * tile, min(length, (index + 1) * tile)) for index in tiles]
            keys += sum(map(len, loaded))
            entries += sum(len({key // getattr(problem, "page_size", 1) for key in part}) for part in loaded)
    return {
        "h'": problem.heads // packed,
        "W_k": keys,
        "E": entries,
        "S": sum(parts_of(length, plan) for length in lengths),
        "S'": sum(several),
    }


def parts_of(length, plan):
    """Return how many parts the keys of a sequence are cut into."""
    if plan.splits != "v2":
        return plan.splits
    rows = math.ceil(512 / plan.tiles.kv) * plan.tiles.kv
    return max(1, math.ceil(length / rows))


def is_visited(problem, plan, i, j):
    """Say by the rule on the page on counting whether a tile is visited: band and stored blocks, no sum of floors."""
    left, right = problem.window or (None, None)
    right = 0 if problem.causal else right
    first, last = i * plan.tiles.q, min((i + 1) * plan.tiles.q, problem.q_len) - 1
    start, end = j * plan.tiles.kv, min((j + 1) * plan.tiles.kv, problem.kv_len) - 1
    shift = problem.kv_len - problem.q_len
    low = 0 if left is None else max(0, first + shift - left)
    high = problem.kv_len - 1 if right is None else min(problem.kv_len - 1, last + shift + right)
    if low > high or end < low or start > high:
        return False
    mask = problem.block_mask
    return mask is None or bool(mask.to_array()[first // mask.q_block, start // mask.kv_block])
