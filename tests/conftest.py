"""Hypothesis profiles, and the count of property-test examples that ends every run."""

from __future__ import annotations

import functools
import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("explore", settings.get_profile("ci"), derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

examples = {"tests": 0, "examples": 0}


def pytest_itemcollected(item):
    """Count the examples that reach the end of a property test's body: neither rejected nor failed."""
    handle = getattr(getattr(item, "obj", None), "hypothesis", None)
    if handle is None:
        return
    examples["tests"] += 1
    inner = handle.inner_test
    if getattr(inner, "counts_examples", False):
        return

    @functools.wraps(inner)
    def counted(*args, **kwargs):
        result = inner(*args, **kwargs)
        examples["examples"] += 1
        return result

    counted.counts_examples = True
    handle.inner_test = counted


def pytest_terminal_summary(terminalreporter):
    if examples["examples"]:
        terminalreporter.write_line(
            f"hypothesis: {examples['examples']:,} examples passed in {examples['tests']} property tests"
        )
