"""Directives that make tables and links from the package itself, and mathematics as MathML.

What a directive prints comes from the registry, the hardware table and the claims at build time, so no page repeats
them. MathML is drawn by the browser: neither building nor reading needs the network.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.directives.other import TocTree

import simattn
from simattn.algorithms.algorithm import Algorithm
from simattn.hardware import HARDWARE
from simattn.hardware import table as hardware_table
from simattn.plan import Plan
from simattn.problem import AttentionProblem
from simattn.report import figure_text

MEASUREMENTS = Path(__file__).parent / "measurements"

# Mathematics


def visit_math(translator: Any, node: nodes.math) -> None:
    """Write inline mathematics."""
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def visit_math_block(translator: Any, node: nodes.math_block) -> None:
    """Write displayed mathematics."""
    translator.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


# Tables


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, align: str = "") -> list[str]:
    """Return the lines of a table; ``align`` has a letter, l or r, for each column."""
    rules = ["--:" if letter == "r" else ":--" for letter in align.ljust(len(heads), "l")]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (heads, rules, *rows)]
    return ["| " + " | ".join(row) + " |" for row in cells]


class MarkdownDirective(Directive):
    """A directive that is replaced by Markdown."""

    def lines(self) -> list[str]:
        """Return the Markdown."""
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        """Parse it in place."""
        parent = nodes.Element()
        self.state.nested_parse(StringList(self.lines(), source="generated"), self.content_offset, parent)
        return parent.children


FAMILIES = {
    "dense": "Attention to all keys, under any mask",
    "state": "A state in place of the keys, no softmax",
    "windows": "Keys around the query",
    "sparse": "Blocks of keys that queries choose",
    "decoding": "Decoding steps alone",
}


def family_members(family: str) -> dict[str, Algorithm]:
    """Return the algorithms of a family, by name."""
    return {name: spec for name, spec in simattn.ALGORITHMS.items() if spec.family == family}


class AlgorithmFamilies(MarkdownDirective):
    """The registry as a list of families, its titles linked to pages in the folder that is the argument."""

    required_arguments = 1

    def lines(self) -> list[str]:
        """Return one item per family."""
        folder = self.arguments[0]
        return [
            f"- {title}: " + ", ".join(f"[{spec.title}]({folder}/{name}.md)" for name, spec in found.items())
            for family, title in FAMILIES.items()
            if (found := family_members(family))
        ]


class AlgorithmTable(MarkdownDirective):
    """The registry as a table for each family, its names linked to their pages."""

    def lines(self) -> list[str]:
        """Return one row per algorithm."""
        lines: list[str] = []
        for family, title in FAMILIES.items():
            rows = [
                [f"[`{name}`]({name}.md)", spec.title, ", ".join(spec.directions), spec.summary]
                for name, spec in family_members(family).items()
            ]
            lines += [f"**{title}**", "", *markdown_table(["name", "title", "directions", "what it does"], rows), ""]
        return lines


def measurement(name: str) -> dict[str, Any]:
    """Return a committed measurement."""
    report: dict[str, Any] = json.loads((MEASUREMENTS / f"{name}.json").read_text(encoding="utf-8"))
    return report


def measured_on(report: dict[str, Any]) -> str:
    """Return where a measurement was taken."""
    versions, driver = report["versions"], report["driver"] // 1000
    return f"{report['device']}, driver for CUDA {driver}, {versions['compiler']}, CuPy {versions['cupy']}"


def differences(tally: dict[str, Any]) -> str:
    """Return what a run of the verifier compared and found."""
    return (
        f"{tally['problems']:,} problems, {tally['elements']:,} elements of results, "
        f"{tally['differing_elements']} with other bits; {tally['differing_counts']} other counts; "
        f"{tally['written_outside']} results written beside"
    )


class KernelBits(MarkdownDirective):
    """The measurements that hold the kernels' bits and counts against the simulated machine's."""

    def lines(self) -> list[str]:
        """Return a row per program, and their sum."""
        report, with_cuda_12 = measurement("kernel-bits"), measurement("kernel-bits-cuda12")
        by_kind = report["problems_by_kind"]
        dtypes = list(dict.fromkeys(kind.split()[2] for kind in sorted(by_kind)))
        programs = list(dict.fromkeys(tuple(kind.split()[:2]) for kind in sorted(by_kind)))
        counts = [[by_kind.get(" ".join((*program, dtype)), 0) for dtype in dtypes] for program in programs]
        rows = [
            [*program, *(f"{count:,}" if count else "" for count in found)]
            for program, found in zip(programs, counts, strict=True)
        ]
        return [
            f"{measured_on(report)}: {differences(report['tally'])}.",
            "",
            *markdown_table(
                ["algorithm", "direction", *(f"{dtype} problems" for dtype in dtypes)], rows, align="llrrr"
            ),
            "",
            f"`flash3` alone (`--algorithm flash3`): {differences(measurement('flash3-bits')['tally'])}. The kernels "
            f"on CUDA cores with CUDA 12 ({with_cuda_12['versions']['compiler']}): "
            f"{differences(with_cuda_12['tally'])}.",
        ]


class KernelSanitizer(MarkdownDirective):
    """What compute-sanitizer found."""

    def lines(self) -> list[str]:
        """Return a sentence for all programs, and one for `flash3` alone."""
        report = measurement("kernel-sanitizer")
        return [
            f"{measured_on(report)}, compute-sanitizer {report['compute_sanitizer']}, all programs: "
            f"{self.found(report['tools'])}. `flash3` alone: {self.found(report['flash3_tools'])}."
        ]

    @staticmethod
    def found(tools: dict[str, Any]) -> str:
        """Return the errors of every tool."""
        texts = (f"{name} {tool['errors']} errors on {tool['problems']} problems" for name, tool in tools.items())
        return ", ".join(texts)


class KernelSpeed(MarkdownDirective):
    """The measured speed of the kernels beside other libraries, in one direction and storage format."""

    required_arguments = 2

    def lines(self) -> list[str]:
        """Return one row per problem."""
        wanted = tuple(self.arguments)
        measured = [row for row in measurement("simt-speed")["rows"] if (row["direction"], row["dtype"]) == wanted]
        names = list(dict.fromkeys(row["contender"] for row in measured))
        keys = ("head_dim", "length", "causal")
        cells = {(*(row[key] for key in keys), row["contender"]): row for row in measured}
        rows = []
        for shape in dict.fromkeys(tuple(row[key] for key in keys) for row in measured):
            own = cells[(*shape, "flash2")]
            head_dim, length, causal = shape
            times = [
                f"{cells[(*shape, name)]['milliseconds']:.2f}" if (*shape, name) in cells else "" for name in names
            ]
            fraction = f"{100 * own['fraction_of_fp32_peak']:.1f} %"
            rows.append([str(head_dim), f"{length:,}", "yes" if causal else "no", fraction, *times])
        heads = [
            "head_dim",
            "length",
            "causal",
            "flash2 of peak",
            *(f"{name.replace('_attention', '')}, ms" for name in names),
        ]
        return markdown_table(heads, rows, align="rrl" + "r" * (len(heads) - 3))


CUDNN, FLASH_ATTENTION_3, TORCH_FLASH = "torch cudnn_attention", "FlashAttention-3", "torch flash_attention"
"""Contenders on tensor cores that ours are held against."""

Configuration = tuple[int, int, bool]
"""Head dimension, length, causal."""


def tensor_core_rates() -> dict[Configuration, dict[str, float]]:
    """Return the measured TFLOP/s of every contender, by configuration."""
    rates: dict[Configuration, dict[str, float]] = {}
    for row in measurement("tensor-core-speed")["rows"]:
        configuration = row["head_dim"], row["length"], row["causal"]
        rates.setdefault(configuration, {})[row["contender"]] = row["teraflops_per_second"]
    return rates


def flash3_ratio(rates: Mapping[str, float]) -> float:
    """Return the speed of flash3 over that of the faster of FlashAttention-3 and cuDNN."""
    return rates["flash3"] / max(rates[FLASH_ATTENTION_3], rates[CUDNN])


def flash2_ratio(rates: Mapping[str, float]) -> float:
    """Return the speed of flash2 over that of FlashAttention-2."""
    return rates["flash2"] / rates[TORCH_FLASH]


def configuration_text(configuration: Configuration) -> str:
    """Return a configuration in words."""
    head_dim, length, causal = configuration
    return f"{'causal, ' if causal else ''}d = {head_dim}, {length:,} tokens"


class TensorCoreSpeed(MarkdownDirective):
    """The measured speed on tensor cores beside other libraries."""

    def lines(self) -> list[str]:
        """Return one row per configuration."""
        shown = {
            "flash3": "flash3",
            "flash2": "flash2",
            CUDNN: "cuDNN",
            FLASH_ATTENTION_3: "FlashAttention-3",
            TORCH_FLASH: "FlashAttention-2",
        }
        heads = ["head_dim", "length", "causal", *shown.values(), "flash3 / best", "flash2 / FlashAttention-2"]
        rows = [
            [
                str(head_dim),
                f"{length:,}",
                "yes" if causal else "no",
                *(f"{rates[name]:.0f}" for name in shown),
                f"{flash3_ratio(rates):.3f}",
                f"{flash2_ratio(rates):.3f}",
            ]
            for (head_dim, length, causal), rates in tensor_core_rates().items()
        ]
        return markdown_table(heads, rows, align="rrl" + "r" * (len(heads) - 3))


class TensorCoreSummary(MarkdownDirective):
    """What the measured speed on tensor cores comes to."""

    def lines(self) -> list[str]:
        """Return where and what was measured, and a list of ratios."""
        from cupy_kernels.bench import SHAPES
        from cupy_kernels.verify import sources_digest

        report, rates = measurement("tensor-core-speed"), tensor_core_rates()
        wanted = [(shape.head_dim, shape.length, shape.causal) for shape in SHAPES if shape.dtype == "bfloat16"]
        missing = [configuration_text(one) for one in wanted if one not in rates]
        stopped = f" The run was stopped before {'; '.join(missing)}." if missing else ""
        changed = ", which have changed since" if report["kernel_sources"] != sources_digest() else ""
        return [
            f"{measured_on(report)}, PyTorch {report['versions']['torch']}; medians of {report['rounds']}; "
            f"{len(rates)} of {len(wanted)} configurations.{stopped} Kernel sources `{report['kernel_sources']}`"
            f"{changed}.",
            "",
            *self.ratios("`flash3` over the faster of FlashAttention-3 and cuDNN", flash3_ratio, rates),
            *self.ratios("`flash2` over FlashAttention-2", flash2_ratio, rates),
        ]

    @staticmethod
    def ratios(
        title: str,
        ratio_of: Callable[[Mapping[str, float]], float],
        rates: Mapping[Configuration, Mapping[str, float]],
    ) -> list[str]:
        """Return a list entry with geometric means and the lowest ratio."""
        ratios = {configuration: ratio_of(found) for configuration, found in rates.items()}
        dense, causal = (
            geometric_mean(ratio for (_, _, hidden), ratio in ratios.items() if hidden is wanted)
            for wanted in (False, True)
        )
        lowest = min(ratios, key=ratios.__getitem__)
        return [
            f"- {title}: geometric mean **{geometric_mean(ratios.values()):.3f}** (without a mask {dense:.3f}, causal "
            f"{causal:.3f}), lowest {ratios[lowest]:.3f} ({configuration_text(lowest)}).",
        ]


class HopperModels(MarkdownDirective):
    """What proves the models of Hopper's arithmetic."""

    def lines(self) -> list[str]:
        """Return a list."""
        functions, products = measurement("special-functions"), measurement("tensor-cores")
        lines = [
            f"- `{name}`: {found['differing_inputs']} of {found['inputs']:,} inputs differ; the table fitted to this "
            f"device {'is' if found['as_installed'] else 'is not'} the one that is installed."
            for name, found in functions["functions"].items()
        ]
        wgmma, by_warp = products["wgmma"], products["mma.sync"]
        differing = sum(form["differing_sums"] for form in wgmma["instructions"])
        models = [
            {model for model, differences in form["differing"].items() if not differences}
            for form in by_warp["instructions"]
        ]
        return [
            f"{measured_on(functions)}:",
            "",
            *lines,
            f"- `wgmma`, {len(wgmma['instructions'])} forms: {differing} of {wgmma['sums']:,} sums differ.",
            f"- `mma.sync`, {len(by_warp['instructions'])} forms: no sum of {by_warp['sums']:,} differs from dot-adds "
            f"of {', '.join(sorted(set.intersection(*models)))}, and every other model that was tried differs in some.",
        ]


class KernelHost(MarkdownDirective):
    """What calls and compilation cost the host, by the name of a measurement."""

    required_arguments = 1

    def lines(self) -> list[str]:
        """Return a list."""
        report = measurement(self.arguments[0])
        host, peak = report["host"], report["fp32_peak_flops_per_second"] / 1e12
        slowest = max(host["first_load_seconds"].items(), key=lambda item: item[1])
        launch = host["launch_microseconds"]
        calls = [
            f"{text} {host[f'{name}_microseconds']:.1f} µs"
            for name, text in (
                ("attention", "one of `attention`"),
                ("attention_out", "with `out=`"),
                ("attention_backward", "one of `attention_backward`, four launches,"),
                ("dlpack", "one of `attention` with PyTorch's tensors"),
            )
        ]
        return [
            f"- {measured_on(report)}; measured peak of fp32 {peak:.1f} TFLOP/s.",
            f"- CuPy's launch of an empty kernel takes {launch:.1f} µs; {', '.join(calls)}.",
            f"- First use of a kernel, compilation included: up to {slowest[1]:.1f} s ({slowest[0]}); loading it from "
            f"the cache {host['cached_milliseconds']:.1f} ms.",
        ]


class KernelPlot(Directive):
    """A picture of the measured speed of one measurement with one storage format."""

    required_arguments = 2

    def run(self) -> list[nodes.Node]:
        """Draw it beside the other static files and return the image."""
        from cupy_kernels import bench

        measured, dtype = self.arguments
        document, name = self.state.document.settings.env, f"{measured}-{dtype}.svg"
        target = Path(document.srcdir) / "_build" / "pictures" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        bench.plot(measurement(measured), dtype).savefig(target)
        return [nodes.image(uri=f"/_build/pictures/{name}", alt=f"TFLOP/s against the number of tokens, {dtype}")]


class AlgorithmPages(TocTree):
    """The table of contents of the registry's pages."""

    has_content = False

    def run(self) -> list[nodes.Node]:
        """List a page for every algorithm."""
        self.content = StringList(list(simattn.ALGORITHMS), source="generated")
        return super().run()


class AlgorithmFacts(MarkdownDirective):
    """Name, source and directions of one algorithm."""

    required_arguments = 1

    def lines(self) -> list[str]:
        """Return them as a list."""
        spec = simattn.ALGORITHMS[self.arguments[0]]
        return [
            f"{spec.summary}",
            "",
            f"- name: `{spec.name}`",
            f"- directions: {', '.join(spec.directions)}",
            f"- source: {spec.source}",
        ]


class PlanOptions(MarkdownDirective):
    """The fields of a plan class with defaults, values and meanings; without an argument, those of every plan."""

    optional_arguments = 1

    def lines(self) -> list[str]:
        """Return one row per field that the class adds or whose default it changes."""
        shared = {item.name: item.default for item in dataclasses.fields(Plan)}
        kind = simattn.ALGORITHMS[self.arguments[0]].plan_class if self.arguments else Plan
        hints, meanings = typing.get_type_hints(kind), dict(field_meanings(kind))
        rows = [
            [
                f"`{item.name}`",
                "" if item.default is dataclasses.MISSING else f"`{item.default!r}`",
                ", ".join(values_of(hints[item.name])),
                meanings[item.name],
            ]
            for item in dataclasses.fields(kind)
            if kind is Plan or item.name not in shared or shared[item.name] != item.default
        ]
        if not rows:
            return ["Only the options of [every plan](../plans.md#options-of-every-plan)."]
        return markdown_table(["option", "default", "values", "meaning"], rows)


class ProblemOptions(MarkdownDirective):
    """The fields that an algorithm's problems have besides those of attention, which are arguments of the calls."""

    required_arguments = 1

    def lines(self) -> list[str]:
        """Return one row per field."""
        kind = simattn.ALGORITHMS[self.arguments[0]].problem_class
        shared, meanings = {item.name for item in dataclasses.fields(AttentionProblem)}, dict(field_meanings(kind))
        rows = [
            [f"`{item.name}`", f"`{item.default!r}`", meanings[item.name]]
            for item in dataclasses.fields(kind)
            if item.name not in shared
        ]
        return markdown_table(["argument", "default", "meaning"], rows)


def values_of(hint: Any) -> Iterator[str]:
    """Yield the values that a field may have, as Markdown."""
    if typing.get_origin(hint) is typing.Literal:
        yield from (f"`{value!r}`" for value in typing.get_args(hint))
    elif typing.get_args(hint):
        for part in typing.get_args(hint):
            yield from values_of(part)
    elif hint is type(None):
        yield "`None`"
    elif hint is bool:
        yield from ("`False`", "`True`")
    else:
        yield {int: "a positive integer"}.get(hint, f"`{hint.__name__}`")


def markdown(text: str) -> str:
    """Return a docstring's text with its roles and literals as Markdown has them."""
    return re.sub(r":(\w+):(`[^`]+`)", r"{py:\1}\2", text).replace("``", "`")


def field_meanings(kind: type) -> Iterator[tuple[str, str]]:
    """Yield each field's description in the docstrings of the class and its bases."""
    for base in reversed(kind.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        _, _, attributes = text.partition("Attributes\n----------\n")
        names: list[str] = []
        meaning: list[str] = []
        for line in [*attributes.splitlines(), "end"]:
            if line.startswith(" "):
                meaning.append(line.strip())
            elif line:
                yield from ((name, markdown(" ".join(meaning))) for name in names)
                names, meaning = line.split(", "), []


class HardwareTable(MarkdownDirective):
    """Every figure of every GPU, side by side."""

    def lines(self) -> list[str]:
        """Return one row per figure and one column per GPU."""
        rows = hardware_table()
        figures = list(dict.fromkeys(str(row["figure"]) for row in rows))
        values = {(row["hardware"], row["figure"]): row["value"] for row in rows}
        body = [
            [
                f"`{figure}`",
                *(
                    figure_text(figure, values.get((name, figure))).replace(" ", "\N{NO-BREAK SPACE}")
                    for name in HARDWARE
                ),
            ]
            for figure in figures
        ]
        return markdown_table(["figure", *HARDWARE], body, align="l" + "r" * len(HARDWARE))


class HardwareSources(MarkdownDirective):
    """Where every figure of every GPU was published."""

    def lines(self) -> list[str]:
        """Return, for each GPU, its sources and the figures that come from each."""
        lines: list[str] = []
        for name, row in HARDWARE.items():
            figures: dict[str, list[str]] = {}
            for figure in row.figures():
                figures.setdefault(row.source(figure), []).append(f"`{figure}`")
            body = [[", ".join(items), source] for source, items in figures.items()]
            lines += [f"**{name}**", "", *markdown_table(["figures", "source"], body), ""]
        return lines


class ClaimsTable(MarkdownDirective):
    """Every claim with its verdict."""

    def lines(self) -> list[str]:
        """Return how many came to each verdict, then one row per claim."""
        rows = simattn.claims()
        verdicts = Counter(row.verdict for row in rows)
        summary = "; ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
        body = [
            [
                f"{plain(row.statement)}<br>*{plain(row.source)}*",
                f"{plain(row.counted)}<br>*{plain(row.range_tested)}*",
                f"**{row.verdict}**" + ("" if row.ok else f" (FAILS: expected {row.expected})"),
            ]
            for row in rows
        ]
        heads = ["claim, *source*", "counted, *range tested*", "verdict"]
        return [f"{len(rows)} claims: {summary}.", "", *markdown_table(heads, body)]


def plain(text: str) -> str:
    """Return text with the characters escaped that Markdown would take for its own."""
    return re.sub(r"([\\`*_$<\[])", r"\\\1", text)


DIRECTIVES: Mapping[str, type[Directive]] = {
    "algorithm-families": AlgorithmFamilies,
    "algorithm-table": AlgorithmTable,
    "kernel-bits": KernelBits,
    "kernel-host": KernelHost,
    "kernel-plot": KernelPlot,
    "kernel-sanitizer": KernelSanitizer,
    "kernel-speed": KernelSpeed,
    "tensor-core-speed": TensorCoreSpeed,
    "tensor-core-summary": TensorCoreSummary,
    "hopper-models": HopperModels,
    "algorithm-pages": AlgorithmPages,
    "algorithm-facts": AlgorithmFacts,
    "plan-options": PlanOptions,
    "problem-options": ProblemOptions,
    "claims-table": ClaimsTable,
    "hardware-table": HardwareTable,
    "hardware-sources": HardwareSources,
}


def keep_property_text(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Keep a colon in a property's first line from being taken for the end of a type."""
    if what == "property" and lines:
        lines[0] = lines[0].replace(": ", " – ")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives and the mathematics."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("autodoc-process-docstring", keep_property_text, priority=400)
    for name, directive in DIRECTIVES.items():
        app.add_directive(name, directive)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
