"""The registry: one table of algorithms, which drives the exports, the command line, the docs and the tests."""

from __future__ import annotations

from simattn.algorithms import (
    dilated_window,
    flash1,
    flash2,
    flash3,
    lightning2,
    linear,
    moba,
    nsa,
    online_softmax,
    overlapped_window,
    paged,
    sliding_window,
    small_cache,
    split_kv,
    standard,
)
from simattn.algorithms.algorithm import Algorithm

ALGORITHMS: dict[str, Algorithm] = {
    module.ALGORITHM.name: module.ALGORITHM
    for module in (
        standard,
        online_softmax,
        flash1,
        flash2,
        flash3,
        small_cache,
        linear,
        lightning2,
        sliding_window,
        dilated_window,
        overlapped_window,
        nsa,
        moba,
        split_kv,
        paged,
    )
}
"""Every algorithm, by name."""


def get_algorithm(name: str) -> Algorithm:
    """Return an algorithm by name.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm={name!r} is unknown; expected one of {list(ALGORITHMS)}")
    return ALGORITHMS[name]
