"""Every claim of the papers and of popular articles, checked against counts.

A claim is a row: statement, source, range tested, what was counted, verdict. The verdicts and their rules:

holds
    The counts agree: exactly where the claim is a formula, else by the rule that the row states.
holds with constant c
    A Θ claim: counted / bound stays between c_low and c_high with c_high ≤ 3 c_low over the whole range, in which every
    variable spans at least a factor of 16; and far into the limit the exponents fitted to counted / bound are within
    0.05 of 0. "Far into the limit" is the half of the range beyond the geometric middle of M/d² and of Nd/M.
does not hold
    Neither.
timing only, not comparable
    Only a clock could decide. Where a time was published, the bound and the fraction of it achieved are printed.

Every claim has an expected verdict, which for known errors is "does not hold". A row whose verdict is another, or whose
published time is shorter than its bound, is not ok.

M is elements of on-chip memory per thread block. Claims about M take plan="fit", the largest tiles that fit it; the
papers' own formulas take plan="paper", whose tiles exceed M, as a row of its own shows.
"""

from __future__ import annotations

from collections.abc import Iterable

from simattn.claims import (
    arithmetic,
    decoding,
    heads,
    io,
    memory,
    memory_management,
    moba,
    nsa,
    recurrent,
    timing,
    windows,
)
from simattn.claims.model import VERDICTS, Claim, ClaimRow, ClaimTable, Evidence, Verdict, check_claims, claim

__all__ = [
    "CLAIMS",
    "VERDICTS",
    "Claim",
    "ClaimRow",
    "ClaimTable",
    "Evidence",
    "Verdict",
    "claim",
    "claims",
]

CLAIMS: tuple[Claim, ...] = (
    *io.CLAIMS,
    *memory.CLAIMS,
    *arithmetic.CLAIMS,
    *heads.CLAIMS,
    *recurrent.CLAIMS,
    *windows.CLAIMS,
    *nsa.CLAIMS,
    *moba.CLAIMS,
    *memory_management.CLAIMS,
    *decoding.CLAIMS,
    *timing.CLAIMS,
)
"""The table of claims."""


def claims(table: Iterable[Claim] = CLAIMS) -> ClaimTable:
    """Check claims and return their rows; the repr is a table.

    Parameters
    ----------
    table
        Claims to check; default all of :data:`simattn.claims.CLAIMS`.

    Returns
    -------
    ClaimTable
        A tuple of rows, in the order of the claims. ``all_hold`` says whether each came to its expected verdict.

    Raises
    ------
    ValueError
        If two claims have the same identifier.
    """
    return check_claims(table)
