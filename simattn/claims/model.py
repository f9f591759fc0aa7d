"""What a claim is, and the table of claims with what was counted."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from simattn.plan import check_choice
from simattn.tables import text_table

Verdict = Literal["holds", "holds with constant c", "does not hold", "timing only, not comparable"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
HOLDS, HOLDS_WITH_CONSTANT, DOES_NOT_HOLD, TIMING_ONLY = VERDICTS


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was counted for a claim.

    Attributes
    ----------
    range_tested
        Arguments, plan, and M in elements per thread block where it matters.
    counted
        The result in a sentence.
    verdict
        What the result says about the claim.
    numbers
        The results as JSON values, by name with the unit in it.
    respects_bound
        Whether a published time is no shorter than its bound; True where no time is involved.
    """

    range_tested: str
    counted: str
    verdict: Verdict
    numbers: Mapping[str, Any]
    respects_bound: bool = True


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement about attention algorithms and how it is checked.

    Attributes
    ----------
    identifier
        Short name, unique in a table.
    statement
        What is claimed, in one sentence.
    source
        Who claims it, and where.
    expected
        The verdict that a correct count must come to; "does not hold" for statements known to be wrong.
    evidence
        Counts, and judges by a stated rule.

    Raises
    ------
    ValueError
        If a text is empty or the expected verdict is unknown.
    """

    identifier: str
    statement: str
    source: str
    expected: Verdict
    evidence: Callable[[], Evidence] = field(repr=False)

    def __post_init__(self) -> None:
        for name in ("identifier", "statement", "source"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a non-empty string")
        check_choice("expected", self.expected, VERDICTS)

    def check(self) -> ClaimRow:
        """Count the evidence and return the finished row."""
        evidence = self.evidence()
        check_choice("verdict", evidence.verdict, VERDICTS)
        return ClaimRow(
            identifier=self.identifier,
            statement=self.statement,
            source=self.source,
            range_tested=evidence.range_tested,
            counted=evidence.counted,
            numbers=dict(evidence.numbers),
            verdict=evidence.verdict,
            expected=self.expected,
            ok=evidence.verdict == self.expected and evidence.respects_bound,
        )


def claim(
    identifier: str, *, statement: str, source: str, expected: Verdict
) -> Callable[[Callable[[], Evidence]], Claim]:
    """Turn a function that counts the evidence into a :class:`Claim`."""

    def decorate(evidence: Callable[[], Evidence]) -> Claim:
        return Claim(identifier=identifier, statement=statement, source=source, expected=expected, evidence=evidence)

    return decorate


@dataclass(frozen=True, kw_only=True)
class ClaimRow:
    """A checked claim.

    Attributes
    ----------
    identifier, statement, source
        The claim.
    range_tested, counted, numbers
        Its evidence.
    verdict, expected
        What the count says, and what a correct count must say.
    ok
        Whether the two agree and no published time is below its bound.
    """

    identifier: str
    statement: str
    source: str
    range_tested: str
    counted: str
    numbers: dict[str, Any] = field(repr=False)
    verdict: Verdict
    expected: Verdict
    ok: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the row for JSON, its numbers nested."""
        return dict(vars(self))

    def row(self) -> dict[str, str | bool]:
        """Return the row for CSV and tables: flat, without the numbers, which ``counted`` has in words."""
        return {name: value for name, value in vars(self).items() if name != "numbers"}


class ClaimTable(tuple[ClaimRow, ...]):
    """Checked claims; the repr is a table."""

    __slots__ = ()

    @property
    def all_hold(self) -> bool:
        """Whether every row came to its expected verdict."""
        return all(row.ok for row in self)

    @property
    def failures(self) -> ClaimTable:
        """The rows that did not."""
        return ClaimTable(row for row in self if not row.ok)

    def __repr__(self) -> str:
        heads = ("claim", "range tested", "counted", "verdict")
        widths = (46, 34, 52, 22)
        body: list[list[str]] = []
        for row in self:
            verdict = row.verdict if row.ok else f"FAILS: {row.verdict}; expected: {row.expected}"
            cells = (f"{row.statement} [{row.source}]", row.range_tested, row.counted, verdict)
            wrapped = [textwrap.wrap(cell, width) for cell, width in zip(cells, widths, strict=True)]
            height = max(map(len, wrapped))
            if body:
                body.append([""] * len(heads))
            body += [[lines[index] if index < len(lines) else "" for lines in wrapped] for index in range(height)]
        failing = f"{len(self.failures)} fail" if self.failures else "all as expected"
        return f"ClaimTable, {len(self)} claims, {failing}\n" + text_table(heads, body, numeric=False)


def check_claims(claims: Iterable[Claim]) -> ClaimTable:
    """Check claims in order.

    Raises
    ------
    ValueError
        If two claims have the same identifier.
    """
    claims = tuple(claims)
    names = [entry.identifier for entry in claims]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"claims has the identifiers {sorted(repeated)} more than once: expected unique ones")
    return ClaimTable(entry.check() for entry in claims)
