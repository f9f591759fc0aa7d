"""The command line: ``simattn report``, ``claims``, ``count``, ``layer``, ``compare``, ``sweep`` and others.

Data goes to standard output and progress to standard error, the latter only when that is a terminal. The exit
code is 0, 1 when a claim that should hold does not or a count contradicts its closed form, 2 for a mistake in the
arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from simattn.comparison import Comparison, Phase

OK, FAILED, WRONG_ARGUMENTS = 0, 1, 2
INTERRUPTED, CLOSED_PIPE = 130, 141  # as a shell reports SIGINT and SIGPIPE

_SUFFIXES = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_NUMBERS = "Integers may have underscores and the suffixes k, M, G and T, powers of 1024: 128k is 131072."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Parameters
    ----------
    argv
        Arguments without the program's name; default those of the process.

    Returns
    -------
    int
        0; 1 when a claim that should hold does not, or a count contradicts its closed form; 2 for wrong
        arguments.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # Θ and × where the terminal has no UTF-8
    try:
        arguments = _parser().parse_args(argv)
        code: int = arguments.command(arguments)
        sys.stdout.flush()
    except _WrongArgumentsError as error:
        print(f"simattn: error: {error}", file=sys.stderr)
        return WRONG_ARGUMENTS
    except SystemExit as finished:  # --help and --version
        return finished.code if isinstance(finished.code, int) else OK
    except KeyboardInterrupt:
        print("simattn: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has left, as `head` does; the interpreter would fail again on flushing what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    return code


class _WrongArgumentsError(Exception):
    """A mistake of the user: one line, no traceback."""


@contextlib.contextmanager
def _wrong_arguments() -> Iterator[None]:
    """Turn the errors that a call raises for its arguments into one line each."""
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        raise _WrongArgumentsError(" ".join(f"{error}{notes}".split())) from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _WrongArgumentsError(f"{message}; see {self.prog} --help")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        print(f"simattn {version('simattn')}")
        parser.exit()


# Arguments


def _integer(text: str) -> int:
    digits, factor = text, 1
    if text and text[-1].lower() in _SUFFIXES:
        digits, factor = text[:-1], _SUFFIXES[text[-1].lower()]
    try:
        return int(digits) * factor
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer such as 4096, 1_000_000 or 128k") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number") from None


def _window(text: str) -> tuple[int | None, int | None]:
    sides = text.split(",")
    if len(sides) != 2:
        raise argparse.ArgumentTypeError(f"{text!r}: expected LEFT,RIGHT, each an integer or 'none'")
    left, right = (None if side.lower() in ("none", "-") else _integer(side) for side in sides)
    return left, right


def _integers(form: str, counts: tuple[int, ...]) -> Callable[[str], tuple[int, ...]]:
    def parse(text: str) -> tuple[int, ...]:
        parts = text.split(",")
        if len(parts) not in counts:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {form}")
        return tuple(map(_integer, parts))

    return parse


def _flag(text: str) -> bool:
    choices = {"true": True, "yes": True, "false": False, "no": False}
    if text.lower() not in choices:
        raise argparse.ArgumentTypeError(f"{text!r}: expected true or false")
    return choices[text.lower()]


def _plan_value(text: str) -> Any:
    for parse in (_integer, _flag, _numbers):
        with contextlib.suppress(argparse.ArgumentTypeError):
            return parse(text)
    return text


def _numbers(text: str) -> list[int] | list[float]:
    """Return numbers separated by commas, of which there is at least one, if only at the end: integers if all are."""
    parts = text.removesuffix(",").split(",")
    if "," in text:
        with contextlib.suppress(argparse.ArgumentTypeError):
            return [_integer(part) for part in parts]
        with contextlib.suppress(ValueError):
            return [float(part) for part in parts]
    raise argparse.ArgumentTypeError(f"{text!r}: expected numbers separated by commas")


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=VALUE")
    return name, value


def _axis(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse_all(text: str) -> list[Any]:
        return [parse(part) for part in text.split(",")]

    return parse_all


@dataclasses.dataclass(frozen=True)
class _Argument:
    """An argument with one value; those of :func:`simattn.count` have in a sweep several, separated by commas."""

    name: str
    parse: Callable[[str], Any]
    metavar: str
    help: str


_SCALARS = (
    _Argument("q_len", _integer, "ROWS", "rows of the queries"),
    _Argument("kv_len", _integer, "ROWS", "rows of the keys and values (default: q_len)"),
    _Argument("batch", _integer, "COUNT", "sequences (default: 1)"),
    _Argument("heads", _integer, "COUNT", "query heads of each sequence (default: 1)"),
    _Argument("kv_heads", _integer, "COUNT", "key/value heads; must divide heads (default: heads)"),
    _Argument("head_dim", _integer, "COLUMNS", "columns of queries and keys (default: 64)"),
    _Argument("value_dim", _integer, "COLUMNS", "columns of the values (default: head_dim)"),
    _Argument("dtype", str, "NAME", "storage format, e.g. float32, bfloat16, float8_e4m3fn (default: bfloat16)"),
    _Argument("scale", _number, "FACTOR", "factor of the scores (default: 1/√head_dim)"),
    _Argument("direction", str, "NAME", "forward, backward without its forward, or decode (default: forward)"),
    _Argument("plan", str, "KIND", "gpu, fit or paper (default: gpu; fit if sram_bytes is given)"),
    _Argument("hardware", str, "GPU", "row of `simattn hardware` (default: H100-SXM)"),
    _Argument("sram_bytes", _integer, "BYTES", "SRAM of a thread block, in place of the GPU's"),
)
_WINDOW_HELP = "keys seen left and right of the query's position, both ends included, 'none' for no limit"
_TILES_HELP = "rows of the query and key tiles, and columns handled at a time"
_OPTION_HELP = "a field of the algorithm's plan or problem, e.g. dq=deterministic; may be repeated"


_LAYER = (
    _Argument("model_width", _integer, "COLUMNS", "columns of x and of the output"),
    _Argument("heads", _integer, "COUNT", "query heads"),
    _Argument("kv_heads", _integer, "COUNT", "key/value heads; must divide heads (default: heads)"),
    _Argument("head_dim", _integer, "COLUMNS", "columns of a head's queries and keys (default: model_width / heads)"),
    _Argument("value_dim", _integer, "COLUMNS", "columns of a head's values (default: head_dim)"),
    _Argument("context_width", _integer, "COLUMNS", "columns of the context; given, it is cross-attention"),
    _Argument("dtype", str, "NAME", "storage format: float32, float16 or bfloat16 (default: bfloat16)"),
    _Argument("window", _window, "LEFT,RIGHT", _WINDOW_HELP),
)
_LAYER_WORK = (
    _Argument("length", _integer, "ROWS", "rows of x in each sequence; in decoding the new ones (default there: 1)"),
    _Argument("cache_length", _integer, "ROWS", "rows of the cache before a decoding step of self-attention"),
    _Argument("context_length", _integer, "ROWS", "rows of the context in cross-attention"),
    _Argument("batch", _integer, "COUNT", "sequences (default: 1)"),
    _Argument("algorithm", str, "NAME", "program of the attention (default: flash2)"),
    _Argument("plan", str, "KIND", "of the attention: gpu, fit or paper (default: gpu; fit if sram_bytes is given)"),
    _Argument("hardware", str, "GPU", "row of `simattn hardware` (default: H100-SXM)"),
    _Argument("sram_bytes", _integer, "BYTES", "SRAM of a thread block, in place of the GPU's"),
    _Argument(
        "projection_tiles",
        _integers("ROWS,COLUMNS,DEPTH", (3,)),
        "ROWS,COLUMNS,DEPTH",
        "tiles of the projections (default: 128,128,64, halved until they fit)",
    ),
    _Argument("tiles", _integers("Q,KV or Q,KV,DEPTH", (2, 3)), "Q,KV[,DEPTH]", _TILES_HELP),
)


def _add_problem(parser: argparse.ArgumentParser, *, axes: bool) -> None:
    """Add the arguments of a count; with ``axes`` each takes several values."""
    several = " (commas separate the values of an axis)" if axes else ""
    group = parser.add_argument_group("problem and plan" + several)
    for argument in _SCALARS:
        parse = _axis(argument.parse) if axes else argument.parse
        metavar = f"{argument.metavar}[,…]" if axes else argument.metavar
        group.add_argument(_flag_name(argument.name), type=parse, metavar=metavar, help=argument.help)
    pairs: dict[str, Any] = {"action": "append"} if axes else {}
    again = "; repeat it for an axis" if axes else ""
    if axes:
        group.add_argument(
            "--causal", type=_axis(_flag), nargs="?", const=[True], metavar="BOOL[,…]", help="hide later keys"
        )
    else:
        group.add_argument("--causal", action="store_true", default=None, help="hide later keys")
    group.add_argument("--window", type=_window, metavar="LEFT,RIGHT", help=_WINDOW_HELP + again, **pairs)
    parse_tiles = _integers("Q,KV or Q,KV,DEPTH", (2, 3))
    group.add_argument("--tiles", type=parse_tiles, metavar="Q,KV[,DEPTH]", help=_TILES_HELP + again, **pairs)
    _add_option(group, "NAME=VALUE" + "[,…]" * axes)
    group.add_argument(
        "--block-mask", metavar="FILE.npy", help="boolean array (q_blocks, kv_blocks): a block-sparse mask"
    )
    parse_block = _integers("Q,KV", (2,))
    group.add_argument(
        "--block-size", type=parse_block, metavar="Q,KV", help="rows and columns of a block of that mask"
    )


def _add_layer(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a layer and of its work."""
    for title, entries in (("layer", _LAYER), ("work and plan", _LAYER_WORK)):
        group = parser.add_argument_group(title)
        _add_each(group, entries)
        if entries is _LAYER:
            group.add_argument("--biases", action="store_true", default=None, help="add a row to every projection")
            group.add_argument("--causal", action="store_true", default=None, help="hide later keys")
        else:
            _add_option(group)


def _add_option(group: argparse._ArgumentGroup, metavar: str = "NAME=VALUE") -> None:
    group.add_argument("--option", type=_option, action="append", default=[], metavar=metavar, help=_OPTION_HELP)


def _flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_each(group: argparse._ArgumentGroup, arguments: Sequence[_Argument]) -> None:
    """Add arguments that have one value."""
    for argument in arguments:
        group.add_argument(_flag_name(argument.name), type=argument.parse, metavar=argument.metavar, help=argument.help)


def _given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of these names that were given."""
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _problem(arguments: argparse.Namespace, *, axes: bool) -> dict[str, Any]:
    """Return the arguments that were given, by the names that :func:`simattn.count` takes."""
    names = [*(argument.name for argument in _SCALARS), "causal", "window", "tiles"]
    given = _given(arguments, names)
    _add_plan_options(given, arguments.option, _axis(_plan_value) if axes else _plan_value)
    if (arguments.block_mask is None) != (arguments.block_size is None):
        raise _WrongArgumentsError("--block-mask FILE.npy and --block-size Q,KV: expected both or neither")
    if arguments.block_mask is not None:
        given["block_mask"] = _block_mask(arguments.block_mask, *arguments.block_size)
    if "q_len" not in given:
        raise _WrongArgumentsError("--q-len is missing: expected the rows of the queries")
    return given


def _add_plan_options(given: dict[str, Any], options: Sequence[tuple[str, str]], parse: Callable[[str], Any]) -> None:
    for name, text in options:
        if name in given:
            raise _WrongArgumentsError(f"--option {name}={text}: {name} is given already")
        given[name] = parse(text)


def _block_mask(path: str, q_block: int, kv_block: int) -> Any:
    import numpy as np

    from simattn.masks import BlockMask

    with _wrong_arguments():
        return BlockMask.from_array(np.load(path), q_block=q_block, kv_block=kv_block)


def _add_formats(parser: argparse.ArgumentParser, *, csv: bool = True) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="print JSON")
    if csv:
        group.add_argument("--csv", action="store_true", help="print comma-separated values")


def _add_closed_form(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--closed-form", action="store_true", help="evaluate the formula instead; it has no SRAM traffic"
    )


_SHAPE = (
    _Argument("layers", _integer, "COUNT", "layers with attention"),
    _Argument("kv_heads", _integer, "COUNT", "key/value heads of a layer"),
    _Argument("key_dim", _integer, "COLUMNS", "columns of a key"),
    _Argument("value_dim", _integer, "COLUMNS", "columns of a value (default: key_dim)"),
    _Argument("dtype", str, "NAME", "storage format"),
)


def _add_kv_cache(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the KV cache's simulation."""
    shape = parser.add_argument_group("model; each size replaces the model's")
    shape.add_argument("--model", metavar="NAME", default="OPT-13B", help="a published shape (default: %(default)s)")
    _add_each(shape, _SHAPE)
    shape.add_argument("--max-tokens", type=_integer, metavar="COUNT", help="longest sequence (default: 2048)")
    pool = parser.add_argument_group("pool and allocators")
    sizes = pool.add_mutually_exclusive_group()
    sizes.add_argument("--pool-bytes", type=_integer, metavar="BYTES", help="size of the pool (default: 12G)")
    sizes.add_argument("--pool-tokens", type=_integer, metavar="COUNT", help="the same in tokens")
    pool.add_argument(
        "--allocator",
        type=_axis(str),
        metavar="NAME[,…]",
        help="reserve, buddy-max, buddy-pow2, buddy-pow2-uncapped, buddy-oracle, paged, paged-unshared (default: "
        "reserve,buddy-max,buddy-pow2,buddy-oracle,paged)",
    )
    pool.add_argument("--page-tokens", type=_integer, metavar="COUNT", help="tokens of a page (default: 16)")
    pool.add_argument(
        "--watermark-pages", type=_integer, metavar="COUNT", help="pages kept free at admissions (default: 0)"
    )
    requests = parser.add_argument_group("requests, drawn or from a trace")
    requests.add_argument("--requests", type=_integer, metavar="COUNT", help="how many are drawn (default: 2000)")
    lengths = "constant:TOKENS, uniform:LOW,HIGH, geometric:MEAN or lognormal:MEAN[,VARIATION]"
    requests.add_argument("--prompt", metavar="LENGTHS", help=f"{lengths} (default: geometric:161)")
    requests.add_argument("--output", metavar="LENGTHS", help="the same for outputs (default: geometric:338)")
    requests.add_argument(
        "--poisson", type=_number, metavar="RATE", help="arrivals a step (default: all arrive in step 0)"
    )
    requests.add_argument("--samples", type=_integer, metavar="COUNT", help="samples of each request (default: 1)")
    requests.add_argument("--seed", type=_integer, metavar="NUMBER", help="seed of the drawn requests (default: 0)")
    requests.add_argument(
        "--trace", metavar="FILE.csv", help="columns arrival_step, prompt_tokens, output_tokens, optionally samples"
    )


_MODEL = (
    _Argument("layers", _integer, "COUNT", "layers with attention (default: 1)"),
    _Argument("heads", _integer, "COUNT", "query heads"),
    _Argument("kv_heads", _integer, "COUNT", "key/value heads (default: heads)"),
    _Argument("head_dim", _integer, "COLUMNS", "columns of queries and keys (default: 128)"),
    _Argument("value_dim", _integer, "COLUMNS", "columns of values (default: head_dim)"),
    _Argument("dtype", str, "NAME", "storage format (default: bfloat16)"),
)


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a comparison."""
    parser.add_argument("--seq", dest="length", type=_integer, required=True, metavar="TOKENS", help="of a sequence")
    parser.add_argument("--batch", type=_integer, default=1, metavar="COUNT", help="sequences (default: %(default)s)")
    parser.add_argument("--hardware", metavar="GPU", help="row of `simattn hardware` (default: H100-SXM)")
    parser.add_argument("--phase", type=_axis(str), metavar="NAME[,…]", help="prefill, decode (default: both)")
    parser.add_argument("--algorithm", type=_axis(str), metavar="NAME[,…]", help="what is counted (default: all)")
    parser.add_argument("--plot", metavar="FILE", help="also draw a picture; its ending says in which format")
    shape = parser.add_argument_group("model; each size replaces the model's")
    shape.add_argument("--model", metavar="NAME", help="a published shape; without it --heads is needed")
    _add_each(shape, _MODEL)
    shape.add_argument("--window", type=_window, metavar="LEFT,RIGHT", help="keys seen left and right of a query")


def _parser() -> argparse.ArgumentParser:
    from simattn import __doc__ as description
    from simattn.algorithms import ALGORITHMS
    from simattn.models import MODELS

    parser = _Parser(prog="simattn", description=description)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str, command: Callable[[argparse.Namespace], int], text: str, epilog: str = ""
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=epilog)
        added.set_defaults(command=command)
        return added

    algorithms = f"Algorithms: {', '.join(ALGORITHMS)}. {_NUMBERS}"
    report = add("report", _report, "count every algorithm, check every claim, write a page with plots and tables")
    report.add_argument("--output", default="simattn-report", metavar="FOLDER", help="default: %(default)s")
    report.add_argument("--hardware", metavar="GPU", help="GPU whose tiles are counted (default: H100-SXM)")
    _add_formats(report, csv=False)
    claims = add("claims", _claims, "check every claim of the papers")
    _add_formats(claims)
    count = add("count", _count, "count the bytes that one program moves", algorithms)
    count.add_argument("algorithm", metavar="ALGORITHM")
    _add_problem(count, axes=False)
    _add_closed_form(count)
    _add_formats(count)
    in_layers = ", ".join(name for name, spec in ALGORITHMS.items() if spec.takes_any_mask)
    layer = add(
        "layer",
        _layer,
        "count the bytes that a whole attention layer moves, with its projections",
        f"Algorithms: {in_layers}. {_NUMBERS}",
    )
    layer.add_argument("phase", metavar="PHASE", help="prefill, decode, backward (without its forward) or train")
    _add_layer(layer)
    _add_closed_form(layer)
    _add_formats(layer)
    sweep = add("sweep", _sweep, "count every point of a grid, resumable from its output file", algorithms)
    sweep.add_argument("algorithm", type=_axis(str), metavar="ALGORITHM[,…]")
    _add_problem(sweep, axes=True)
    sweep.add_argument(
        "--output", metavar="FILE.jsonl", help="receives each row as it is finished; resumed if it exists"
    )
    sweep.add_argument("--workers", type=_integer, metavar="COUNT", help="processes that count (default: this one)")
    sweep.add_argument(
        "--errors",
        choices=("raise", "row"),
        default="raise",
        help="stop at a point that cannot be counted, or keep its message",
    )
    _add_formats(sweep)
    compare = add(
        "compare",
        _compare,
        "count every algorithm on one model's attention: bytes, operations and the least time",
        f"Models: {', '.join(MODELS)}. {algorithms}",
    )
    _add_comparison(compare)
    _add_formats(compare)
    kv_cache = add(
        "kv-cache",
        _kv_cache,
        "serve requests from a KV cache, and print how much of it is used",
        f"Models: {', '.join(MODELS)}. {_NUMBERS}",
    )
    _add_kv_cache(kv_cache)
    _add_formats(kv_cache)
    hardware = add("hardware", _hardware, "print every figure of every GPU with its source")
    hardware.add_argument("name", nargs="*", metavar="GPU", help="default: all")
    _add_formats(hardware)
    return parser


# Commands


def _report(arguments: argparse.Namespace) -> int:
    from simattn import report
    from simattn.hardware import get_hardware
    from simattn.planning import DEFAULT_HARDWARE
    from simattn.tables import json_text

    with _wrong_arguments():
        gpu = get_hardware(arguments.hardware or DEFAULT_HARDWARE)
        Path(arguments.output).mkdir(parents=True, exist_ok=True)
    built = report.build_report(hardware=gpu)
    page = built.write(arguments.output)
    print(
        json_text({**built.tables, "ok": built.ok, "page": str(page)}) if arguments.json else f"{built}\nPage: {page}"
    )
    return OK if built.ok else FAILED


def _claims(arguments: argparse.Namespace) -> int:
    from simattn import report

    rows = report.claim_rows()
    _print_rows(arguments, report.flat_rows(rows) if arguments.csv else rows, lambda: report.claims_text(rows))
    return OK if all(row["ok"] for row in rows) else FAILED


def _count(arguments: argparse.Namespace) -> int:
    from simattn.api import closed_form, profile

    given = _problem(arguments, axes=False)
    with _wrong_arguments():
        run = profile(arguments.algorithm, **given)
        traffic = closed_form(arguments.algorithm, **given) if arguments.closed_form else run.traffic
    if arguments.json:
        from simattn.tables import json_text

        counted = {} if arguments.closed_form else _counted(run)
        print(json_text({**_described(run), **counted, "traffic": list(traffic.rows())}))
    else:
        _print_rows(arguments, list(traffic.rows()), lambda: repr(traffic if arguments.closed_form else run))
    return OK


def _described(run: Any) -> dict[str, Any]:
    return {
        "algorithm": run.algorithm,
        "direction": run.direction,
        "problem": _problem_fields(run.problem),
        "plan": dataclasses.asdict(run.plan),
    }


def _problem_fields(problem: Any) -> dict[str, Any]:
    found = {field.name: getattr(problem, field.name) for field in dataclasses.fields(problem)}
    if problem.block_mask is not None:
        found["block_mask"] = problem.block_mask.fingerprint()
    return found


def _counted(run: Any) -> dict[str, Any]:
    return {
        "operations": dataclasses.asdict(run.operations),
        "peak_sram_bytes": run.peak_sram_bytes,
        "peak_register_bytes": run.peak_register_bytes,
        "hbm_bytes_by_role": run.hbm_bytes_by_role,
    }


def _layer(arguments: argparse.Namespace) -> int:
    from simattn.layers import AttentionLayer
    from simattn.tables import json_text

    shape = _given(arguments, [*(entry.name for entry in _LAYER), "biases", "causal"])
    work = _given(arguments, [entry.name for entry in _LAYER_WORK])
    _add_plan_options(work, arguments.option, _plan_value)
    for name in ("model_width", "heads"):
        if name not in shape:
            raise _WrongArgumentsError(f"{_flag_name(name)} is missing: expected it for the shape of the layer")
    with _wrong_arguments():
        layer = AttentionLayer(**shape)
        run = layer.profile(arguments.phase, **work)
        formula = layer.closed_form(arguments.phase, **work) if arguments.closed_form else None
    if arguments.json:
        described = {
            "phase": run.phase,
            "layer": dataclasses.asdict(layer),
            "parameters": layer.parameters_by_array,
            "problem": _problem_fields(run.problem),
            "algorithm": run.algorithm,
            "projection_tiles": dataclasses.asdict(run.projection_tiles),
        }
        counted = {} if formula is not None else {"parts": list(run.rows())}
        print(
            json_text({**described, **counted, "traffic": list((run.traffic if formula is None else formula).rows())})
        )
    elif formula is not None:
        _print_rows(arguments, list(formula.rows()), lambda: repr(formula))
    else:
        _print_rows(arguments, list(run.rows()), lambda: repr(run))
    return OK


def _sweep(arguments: argparse.Namespace) -> int:
    from concurrent.futures import ProcessPoolExecutor

    from simattn.sweep import sweep

    given = _problem(arguments, axes=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_wrong_arguments())
        executor = None
        if arguments.workers is not None:
            executor = stack.enter_context(ProcessPoolExecutor(max_workers=arguments.workers))
        rows = sweep(arguments.algorithm, output=arguments.output, executor=executor, errors=arguments.errors, **given)
    _print_rows(arguments, rows, lambda: repr(rows))
    return OK


def _compare(arguments: argparse.Namespace) -> int:
    from simattn.comparison import PHASES, compare
    from simattn.models import MODELS, ModelShape
    from simattn.plan import check_choice

    given = _given(arguments, [*(argument.name for argument in _MODEL), "window"])
    if arguments.model is None and "heads" not in given:
        raise _WrongArgumentsError("--model or --heads is missing: expected the name of a model or a shape")
    chosen = {"hardware": arguments.hardware, "algorithms": arguments.algorithm, "phases": arguments.phase}
    with _wrong_arguments():
        if arguments.model is None:
            shape = ModelShape(**given)
        else:
            check_choice("model", arguments.model, tuple(MODELS))
            shape = MODELS[arguments.model]
            if given:
                # What follows from another size is not the model's any more.
                unset = {"kv_heads": None} if "heads" in given else {}
                unset |= {"value_dim": None} if "head_dim" in given else {}
                shape = dataclasses.replace(shape, name=f"like {shape.name}", **{**unset, **given})
        compared = compare(
            arguments.length,
            shape,
            batch=arguments.batch,
            **{name: value for name, value in chosen.items() if value is not None},
        )
    if arguments.plot is not None:
        _draw_comparison(compared, [phase for phase in PHASES if phase in (arguments.phase or PHASES)], arguments.plot)
    _print_rows(arguments, list(compared.as_rows()), lambda: repr(compared))
    return OK


def _draw_comparison(compared: Comparison, phases: Sequence[Phase], path: str) -> None:
    from matplotlib.figure import Figure

    from simattn import plots

    shown = [phase for phase in phases if any(row.refusal is None for row in compared.of_phase(phase))]
    with _wrong_arguments():
        if not shown:
            raise ValueError(f"--plot {path}: expected an algorithm that was counted, there is none")
        heights = [1.4 + 0.34 * sum(row.refusal is None for row in compared.of_phase(phase)) for phase in shown]
        figure = Figure(figsize=(9.0, sum(heights)), layout="constrained")
        grid = figure.subplots(len(shown), 3, sharey="row", squeeze=False, height_ratios=heights)
        for phase, axes in zip(shown, grid, strict=True):
            axes[1].set_title(phase)
            plots.comparison(compared, phase, axes=list(axes))
        try:
            figure.savefig(path, dpi=150)
        except ValueError as error:  # an ending that names no format
            raise ValueError(f"--plot {path}: {error}") from None


def _kv_cache(arguments: argparse.Namespace) -> int:
    from simattn.kv_cache import DEFAULT_MAX_TOKENS, compare_allocators
    from simattn.models import MODELS
    from simattn.plan import check_choice
    from simattn.tables import byte_text, json_text

    max_tokens = DEFAULT_MAX_TOKENS if arguments.max_tokens is None else arguments.max_tokens
    with _wrong_arguments():
        check_choice("model", arguments.model, tuple(MODELS))
        given = _given(arguments, [argument.name for argument in _SHAPE])
        if "key_dim" in given:
            given.setdefault("value_dim", given["key_dim"])
        shape = dataclasses.replace(MODELS[arguments.model].cache, **given)
        pool_tokens = arguments.pool_tokens
        if pool_tokens is None:
            pool_tokens = shape.tokens_in(12 << 30 if arguments.pool_bytes is None else arguments.pool_bytes)
        workload = _workload(arguments, max_tokens)
        runs = compare_allocators(workload, _allocators(arguments), pool_tokens=pool_tokens, max_tokens=max_tokens)
    rows = [run.row() for run in runs]
    if arguments.json:
        described = {**dataclasses.asdict(shape), "bytes_per_token": shape.bytes_per_token, "max_tokens": max_tokens}
        print(json_text({"shape": described, "pool_tokens": pool_tokens, "runs": rows}))
    else:
        size = (
            f"{shape.layers} layers × {shape.kv_heads} KV heads × ({shape.key_dim} + {shape.value_dim}) columns in "
            f"{shape.dtype}: {shape.bytes_per_token:,} bytes a token, "
            f"{byte_text(shape.bytes(length=max_tokens))} a sequence of {max_tokens:,}"
        )
        _print_rows(arguments, rows, lambda: f"{size}\n{runs!r}")
    return OK


def _workload(arguments: argparse.Namespace, max_tokens: int) -> Any:
    """Return the requests of the trace, or those that the other arguments draw."""
    from simattn.kv_cache import Poisson, generate_workload, parse_lengths, read_trace

    given = _given(arguments, ["requests", "prompt", "output", "poisson", "samples", "seed"])
    if arguments.trace is not None:
        if given:
            raise ValueError(f"--trace gives the requests: expected no {', '.join(map(_flag_name, given))} beside it")
        return read_trace(arguments.trace)
    return generate_workload(
        given.get("requests", 2000),
        prompt=parse_lengths(given.get("prompt", "geometric:161"), name="--prompt"),
        output=parse_lengths(given.get("output", "geometric:338"), name="--output"),
        arrivals=Poisson(given["poisson"]) if "poisson" in given else None,
        samples=given.get("samples", 1),
        max_tokens=max_tokens,
        seed=given.get("seed", 0),
    )


def _allocators(arguments: argparse.Namespace) -> list[Any]:
    """Return the allocators, those with pages as the arguments say."""
    from simattn.kv_cache import DEFAULT_ALLOCATORS, Paged, get_allocator

    pages = _given(arguments, ["page_tokens", "watermark_pages"])
    chosen = [get_allocator(name) for name in arguments.allocator or DEFAULT_ALLOCATORS]
    if pages and not any(isinstance(allocator, Paged) for allocator in chosen):
        raise ValueError(
            f"{_flag_name(next(iter(pages)))} without an allocator that has pages: expected paged among them"
        )
    return [
        dataclasses.replace(allocator, **pages) if isinstance(allocator, Paged) else allocator for allocator in chosen
    ]


def _hardware(arguments: argparse.Namespace) -> int:
    from simattn import report
    from simattn.hardware import get_hardware, table

    with _wrong_arguments():
        names = [get_hardware(name).name for name in arguments.name]
    rows = [row for row in table() if not names or row["hardware"] in names]
    _print_rows(arguments, rows, lambda: report.hardware_text(rows))
    return OK


def _print_rows(arguments: argparse.Namespace, rows: Sequence[dict[str, Any]], text: Callable[[], str]) -> None:
    from simattn.tables import csv_text, json_text

    if arguments.json:
        print(json_text(rows))
    elif arguments.csv:
        print(csv_text(rows), end="")
    else:
        print(text())
