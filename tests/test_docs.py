"""The documentation: its examples run, its formulas are the closed forms, and no algorithm lacks a page."""

import contextlib
import doctest
import io
import math
import re
import shlex
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import simattn
from simattn.algorithms.dilated_window import DilatedWindowProblem
from simattn.algorithms.nsa import NsaProblem
from simattn.algorithms.overlapped_window import OverlappedWindowProblem
from simattn.algorithms.sliding_window import SlidingWindowProblem
from simattn.cli import main
from simattn.testing import plan_options, problems_of, tiles_for

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts and "gallery" not in path.parts)
TEXTS = [ROOT / "README.md", *PAGES]
ALGORITHMS = DOCS / "algorithms"
PROGRAMS = [(name, direction) for name, spec in simattn.ALGORITHMS.items() for direction in spec.directions]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(path, language):
    """Return the code blocks of one language, each after as many blank lines as make its line numbers the file's."""
    found, start = [], None
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if line.startswith("```"):
            if start is not None and lines[start - 1] == f"```{language}":
                found.append("\n" * start + "\n".join(lines[start:number]) + "\n")
            start = number + 1 if start is None else None
    return found


def id_of(path):
    return str(path.relative_to(ROOT))


# Examples


@pytest.mark.parametrize("path", [path for path in TEXTS if blocks(path, "python")], ids=id_of)
def test_python_examples(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, report = {"__name__": "example"}, io.StringIO()
    with mock.patch.dict(simattn.ALGORITHMS):
        for text in blocks(path, "python"):
            if ">>>" in text:
                examples = doctest.DocTestParser().get_doctest(text, names, path.name, str(path), 0)
                runner = doctest.DocTestRunner(optionflags=FLAGS)
                results = runner.run(examples, out=report.write, clear_globs=False)
                names = examples.globs
                assert results.attempted > 0
                assert results.failed == 0, report.getvalue()
            else:
                exec(compile(text, path, "exec"), names)


@pytest.mark.parametrize("path", [path for path in TEXTS if "$ simattn" in str(blocks(path, "console"))], ids=id_of)
def test_console_examples(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in blocks(path, "console"):
        for session in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command, _, expected = session.replace("\\\n", "").partition("\n")
            words = shlex.split(command)
            if words[0] != "simattn":
                continue
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                main(words[1:])
            assert doctest.OutputChecker().check_output(expected, printed.getvalue(), FLAGS), (
                f"$ {command}\nprinted\n{printed.getvalue()}\nexpected\n{expected}"
            )


# Pages


def test_every_algorithm_has_a_page_and_every_page_an_algorithm():
    assert {path.stem for path in ALGORITHMS.glob("*.md")} == {*simattn.ALGORITHMS, "index"}


def test_every_page_is_in_the_table_of_contents():
    listed = {"index"} | {f"algorithms/{name}" for name in simattn.ALGORITHMS}
    for path in PAGES:
        for entries in re.findall(r"```\{toctree\}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            names = [line for line in entries.splitlines() if line and not line.startswith(":")]
            listed |= {str((path.parent / name).relative_to(DOCS)) for name in names}
    assert {str(path.relative_to(DOCS).with_suffix("")) for path in PAGES} <= listed


# Formulas


def value_of(latex, symbols):
    """Evaluate a formula of sums, products and powers, where a space is a product."""
    tokens = re.findall(r"[A-Za-z](?:_[A-Za-z])?'?|\d+|[()+^-]", re.sub(r"\\(,|left|right)", " ", latex))
    assert "".join(tokens) == re.sub(r"\\(,|left|right)|\s", "", latex), f"unexpected notation in {latex!r}"
    code, operand = [], False
    for token in tokens:
        if operand and token not in ")+^-":
            code.append("*")
        code.append({"^": "**"}.get(token) or (str(symbols[token]) if token[0].isalpha() else token))
        operand = token not in "(+^-"
    return eval("".join(code))


def test_value_of_a_formula():
    assert value_of(r"2 N^2 d + (T_r - 1)\,N\,g'", {"N": 3, "d": 5, "T_r": 4, "g'": 7}) == 153
    with pytest.raises(AssertionError, match="unexpected notation"):
        value_of(r"\frac{N}{d}", {"N": 3, "d": 5})


@cache
def formulas():
    """Return the tables and the element counts that the algorithms' pages mark, by name."""
    tables, elements = {}, {}
    for path in sorted(ALGORITHMS.glob("*.md")):
        names = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if found := re.match(r"% table: (\w+ \w+|\w+)(?: ([+=]) (.*))?$", line):
                name, relation, other = found.groups()
                tables[name] = {"rows": [], "same_as": None, "with": None}
                names = [name]
                if relation:
                    tables[name]["same_as" if relation == "=" else "with"] = other
            elif found := re.match(r"\| `(\w+)` \| (read|written|reduced) \| \$(.*?)\$ \| (?:`(.*?)` )?\|$", line):
                tables[names[0]]["rows"].append(found.groups())
            elif found := re.match(r"% elements: (.*)$", line):
                names = [*(name for name in names if name in elements), found[1]]
                elements[found[1]] = None
            elif names and names[-1] in elements and line and line != "$$":
                for name in names:
                    elements[name] = elements[name] or line
                names = []
    return tables, elements


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
        "N": problem.q_len,
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


def bytes_of_table(name, problem, plan, direction, symbols):
    """Return the bytes that a page's tables give, by array and direction of the copy."""
    tables, _ = formulas()
    table = tables[tables[name]["same_as"] or name]
    stored = problem.output_dtype if direction == "forward" else problem.dtype
    grouped = plan.grouped_gradients if problem.group_size > 1 or plan.repeat_kv else "loop"
    facts = asdict(plan) | {
        "float8": problem.is_float8,
        "apart": getattr(plan, "hbm_accumulator", "float32") == "float32" and stored != "float32",
        "grouped_gradients": grouped,
        "divides": getattr(problem, "divides", True),
        "own": getattr(problem, "has_own_projections", False),
        "mlp": getattr(problem, "compression", None) == "mlp",
        "selects": getattr(problem, "selection", None) is None,
        "maps": hasattr(problem, "map") and problem.map.name != "identity",
    }
    total = {}

    def add(rows, rename=lambda array: array, **changed):
        for array, moved, latex, condition in rows:
            if condition is None or eval(condition, {}, facts):
                key = (
                    rename(array),
                    {"read": "hbm_read_bytes", "written": "hbm_write_bytes"}.get(moved, "hbm_reduce_bytes"),
                )
                total[key] = total.get(key, 0) + value_of(latex, symbols | changed)

    copied = {"k": "k_repeated", "v": "v_repeated"} if plan.repeat_kv and direction != "decode" else {}
    add(table["rows"], lambda array: copied.get(array, array))
    if plan.repeat_kv and direction == "forward":
        add(tables["repeat_kv"]["rows"])
    if table["with"]:
        add(tables[table["with"]]["rows"])
        add(tables[table["with"]]["rows"], lambda array: array.replace("dk", "dv"), d=problem.value_dim)
    return {key: count for key, count in total.items() if count}


def arguments_of(problem):
    return {item.name: getattr(problem, item.name) for item in fields(problem) if item.name != "scale"}


@pytest.mark.parametrize(("algorithm", "direction"), PROGRAMS)
@given(data=st.data())
def test_tables_are_the_closed_forms(algorithm, direction, data):
    spec = simattn.ALGORITHMS[algorithm]
    dtypes = ["float32", "bfloat16", *(["float8_e4m3fn"] if direction == "forward" and spec.takes_any_mask else [])]
    problem = data.draw(problems_of(spec, direction, dtypes=dtypes))
    tiles = data.draw(tiles_for(problem, with_depth=simattn.ALGORITHMS[algorithm].chunks_columns))
    options = data.draw(plan_options(simattn.ALGORITHMS[algorithm]))
    given_plan = {**options, "tiles": tiles, "enforce_capacity": False, "direction": direction}
    plan = simattn.default_plan(algorithm, **arguments_of(problem), **given_plan)
    traffic = simattn.closed_form(algorithm, **arguments_of(problem), **given_plan)
    expected = {
        (array, counter): count
        for array, counters in traffic.by_array.items()
        for counter, count in asdict(counters).items()
        if count
    }
    symbols = symbols_of(problem, plan)
    assert bytes_of_table(f"{algorithm} {direction}", problem, plan, direction, symbols) == expected


@pytest.mark.parametrize("name", formulas()[1])
@pytest.mark.parametrize(
    ("length", "head_dim", "tiles"), [(512, 64, (64, 64)), (1000, 48, (96, 40)), (96, 80, (1, 7, 30))]
)
def test_elements_are_the_closed_forms(name, length, head_dim, tiles):
    algorithm, direction, *settings = name.split()
    options = {key: int(value) if value.isdigit() else value for key, value in (item.split("=") for item in settings)}
    spec = simattn.ALGORITHMS[algorithm]
    sizes = {"q_len": length, "head_dim": head_dim, "dtype": "float32"}
    sizes |= spec.problem_class.needed_arguments(direction)
    problem = spec.problem_class(**sizes)
    tiles = (tiles[0], problem.key_tile(tiles[1]), *(tiles[2:] if spec.chunks_columns else ()))
    shape = {**sizes, "tiles": tiles, "direction": direction}
    traffic = simattn.closed_form(algorithm, **shape, **options, enforce_capacity=False)
    plan = simattn.default_plan(algorithm, **shape, **options, enforce_capacity=False)
    problem = simattn.ALGORITHMS[algorithm].problem_class(q_len=length, head_dim=head_dim, dtype="float32")
    assert 4 * value_of(formulas()[1][name], symbols_of(problem, plan)) == traffic.hbm_bytes


def test_every_program_has_a_table_and_an_element_count():
    tables, elements = formulas()
    assert {tuple(name.split()) for name in tables if " " in name} == set(PROGRAMS)
    assert {tuple(name.split()[:2]) for name in elements} == set(PROGRAMS)
    assert all(elements.values())
    assert all(table["rows"] or table["same_as"] for table in tables.values())
