"""The documentation: its examples run, its formulas are the closed forms, and no algorithm lacks a page."""

import contextlib
import doctest
import importlib
import io
import re
import shlex
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Literal, get_args, get_origin
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_symbols import symbols_of

import simattn
from simattn.algorithms.algorithm import Family
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


def test_the_readme_says_which_directions_algorithms_have():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [found for line in lines if (found := re.match(r"\| \[`(\w+)`\]\((.*?)\) \|.*\| (.*) \|$", line))]
    assert len(rows) >= 15
    for row in rows:
        name, page, directions = row.groups()
        assert page == f"docs/algorithms/{name}.md"
        assert directions == ", ".join(simattn.ALGORITHMS[name].directions)


def test_a_family_of_its_own_is_for_decoding_steps_and_for_any_mask():
    for spec in simattn.ALGORITHMS.values():
        assert spec.family in get_args(Family)
        assert (spec.family == "dense") == spec.takes_any_mask
        assert (spec.family == "decoding") == (spec.directions == ("decode",))


@pytest.mark.parametrize("name", ["", ".claims", ".kv_cache", ".plots", ".report", ".testing"])
def test_every_public_name_is_in_the_reference(name):
    module = importlib.import_module(f"simattn{name}")
    text = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    if f"automodule:: {module.__name__}\n   :members:\n" in text:
        return
    named = set(re.findall(r"(?:::|\.) ?(\w+)$", text, re.MULTILINE))
    public = {item for item in module.__all__ if get_origin(getattr(module, item)) not in (Literal, UnionType)}
    assert public - named == set()


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
        "full_attention": getattr(problem, "full_attention", False),
        "chooses": not getattr(problem, "full_attention", True) and problem.history > 0,
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
    sizes = {"head_dim": head_dim, "dtype": "float32", **spec.problem_class.usual_arguments(direction, length)}
    own = {item.name: options[item.name] for item in fields(spec.problem_class) if item.name in options}
    problem = spec.problem_class(**sizes, **own)
    tiles = (tiles[0], problem.key_tile(tiles[1]), *(tiles[2:] if spec.chunks_columns else ()))
    shape = {**sizes, "tiles": tiles, "direction": direction}
    traffic = simattn.closed_form(algorithm, **shape, **options, enforce_capacity=False)
    plan = simattn.default_plan(algorithm, **shape, **options, enforce_capacity=False)
    assert 4 * value_of(formulas()[1][name], symbols_of(problem, plan)) == traffic.hbm_bytes


def test_every_program_has_a_table_and_an_element_count():
    tables, elements = formulas()
    assert {tuple(name.split()) for name in tables if " " in name} == set(PROGRAMS)
    assert {tuple(name.split()[:2]) for name in elements} == set(PROGRAMS)
    assert all(elements.values())
    assert all(table["rows"] or table["same_as"] for table in tables.values())
