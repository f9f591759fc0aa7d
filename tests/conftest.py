"""Hypothesis profiles, and the count of property-test examples that ends every run.

``HYPOTHESIS_PROFILE=explore`` draws ten times as many examples, other ones every time.
"""

from __future__ import annotations

import functools
import os

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("explore", settings.get_profile("ci"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

counted = {"tests": 0, "examples": 0}


def pytest_collection_finish(session):
    """Count the examples that reach the end of a property test's body: neither rejected nor failed."""
    handles = [getattr(getattr(item, "obj", None), "hypothesis", None) for item in session.items]
    handles = [handle for handle in handles if handle is not None]
    counted["tests"] = len(handles)
    for handle in {id(handle): handle for handle in handles}.values():
        handle.inner_test = _counting(handle.inner_test)


def _counting(test):
    @functools.wraps(test)
    def run(*args, **kwargs):
        test(*args, **kwargs)
        counted["examples"] += 1

    return run


def pytest_sessionfinish(session):
    """Hand what a process of several has counted to the one that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["counted"] = counted


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Add the examples that another process has counted; each collects all tests."""
    found = getattr(node, "workeroutput", {}).get("counted")
    if found is not None:  # else it was lost
        counted["tests"] = found["tests"]
        counted["examples"] += found["examples"]


def pytest_terminal_summary(terminalreporter):
    if counted["examples"]:
        terminalreporter.write_line(
            f"hypothesis: {counted['examples']:,} examples passed in {counted['tests']} property tests"
        )
