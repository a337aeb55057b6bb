"""What diffusers asserts of its inpainting pipeline, asserted of three: stock, ours with the solver off and on.

    python -m pytest tests/conformance

prints a table, fact by pipeline. A fact is a test's docstring. Facts that stock fails are marked `stock_fails(reason)`:
strictly expected there, and asserted of ours.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from pathlib import Path

import pytest
import tiny
from subjects import SUBJECTS, Subject

HERE = Path(__file__).parent


@pytest.fixture(params=SUBJECTS, ids=[subject.name for subject in SUBJECTS])
def subject(request) -> Subject:
    return request.param


@pytest.fixture(scope="session")
def originals() -> dict:
    return tiny.components()


@pytest.fixture
def parts(originals) -> dict:
    """Components that a test may change, all but the tokenizer."""
    return copy.deepcopy({**originals, "tokenizer": None}) | {"tokenizer": originals["tokenizer"]}


@pytest.fixture
def pipe(subject, parts):
    return subject.make(parts)


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        marker = item.get_closest_marker("stock_fails")
        if marker is not None and item.callspec.params["subject"].name == "stock":
            item.add_marker(pytest.mark.xfail(strict=True, reason=marker.args[0]))


def pytest_runtest_makereport(item, call):
    if call.when == "setup" and HERE in item.path.parents and "subject" in getattr(item, "fixturenames", ()):
        doc = (item.function.__doc__ or item.function.__name__).strip().splitlines()[0]
        item.user_properties.append(("fact", (f"{item.path.stem[5:]}: {doc}", item.callspec.params["subject"].name)))


def pytest_terminal_summary(terminalreporter) -> None:
    """The table, if nothing but conformance was run."""
    outcomes, reasons = defaultdict(dict), {}
    words = {"skipped": "-", "passed": "ok", "xfailed": "fails", "failed": "FAILS", "error": "FAILS"}  # the last wins
    for kind, word in words.items():
        for report in terminalreporter.stats.get(kind, []):
            if HERE.name not in report.nodeid.split("::")[0].split("/"):
                return
            fact = dict(report.user_properties).get("fact")
            if fact is None:
                continue
            outcomes[fact[0]][fact[1]] = word
            if kind == "xfailed":
                reasons[fact[0]] = report.wasxfail
    if not outcomes:
        return
    write = terminalreporter.write_line
    names = [subject.name for subject in SUBJECTS]
    width = max(map(len, outcomes))
    write("")
    write("fact".ljust(width) + "".join(name.rjust(8) for name in names))
    for fact in sorted(outcomes):
        write(fact.ljust(width) + "".join(outcomes[fact].get(name, "").rjust(8) for name in names))
    differ = [fact for fact, row in outcomes.items() if len(set(row.values())) > 1]
    write(f"\n{len(outcomes)} facts; what differs: {len(differ)}")
    for fact in sorted(differ):
        row = ", ".join(f"{name} {word}" for name, word in outcomes[fact].items())
        write(f"  {fact} ({row})" + (f": {reasons[fact]}" if fact in reasons else ""))
