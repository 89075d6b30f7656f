"""Writes what all tests came to as a page: `python scripts/test_report.py RESULTS.xml... docs/test-all.md`.

RESULTS.xml is pytest's own report (`--junit-xml`); of several, for a run in parts, a test's last result counts. The
page has dates and commits, the machine, a line a file, and a line for every drill and slow test, for what failed and
for what was skipped, with the reason and, of a run in parts, the commit.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from rlfseg.pipeline.bench import machine

LONG = 30.0  # seconds from which a test has a line of its own


def outcome(case: ElementTree.Element) -> tuple[str, str]:
    """`passed`, `failed` or `skipped`, and why in a line, or what a test that passed has counted."""
    for tag, name in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(tag)
        if found is not None:
            return name, (found.get("message") or "").strip().split("\n")[0][:200].replace("|", "\\|")
    return "passed", ", ".join(f"{p.get('name')}: {p.get('value')}" for p in case.iter("property"))


def page(results: list[Path]) -> str:
    """The page as Markdown; results in the order in which they were run."""
    suites = [suite for path in results for suite in ElementTree.parse(path).getroot().iter("testsuite")]
    cases = {
        (case.get("classname"), case.get("name")): (case, commit(suite))
        for suite in suites
        for case in suite.iter("testcase")
    }
    counts: dict[str, Counter[str]] = {}
    lines = []
    for (place, name), (case, version) in cases.items():
        file, (status, why) = (place or "").replace(".", "/"), outcome(case)
        counts.setdefault(file, Counter())[status] += 1
        seconds = float(case.get("time") or 0)
        if status != "passed" or seconds >= LONG or "/drills/" in file:
            lines.append(f"| `{file}` | `{name}` | {status} | {seconds:.0f} | {version} | {why} |")
    total = sum(counts.values(), Counter())
    whole = any(path.name == "test-all.xml" for path in results)
    what = "`make test-all`" if whole else "In parts, not all of `make test-all`"
    head = [
        "# All tests",
        "",
        f"{what}: {', '.join(f'{n} {status}' for status, n in sorted(total.items()))}.",
        "",
        *map(ran, suites),
        *(f"- {key}: {value}" for key, value in machine().items()),
        "",
        "| file | passed | failed | skipped |",
        "|---|---|---|---|",
        *(f"| `{f}` | {c['passed']} | {c['failed']} | {c['skipped']} |" for f, c in sorted(counts.items())),
    ]
    table = ["", f"Drills, tests of {LONG:.0f} s and more, and what did not pass:", ""]
    return "\n".join([*head, *table, "| file | test | | s | commit | |", "|---|---|---|---|---|---|", *lines, ""])


def commit(suite: ElementTree.Element) -> str:
    """What was tested."""
    return next((p.get("value") or "" for p in suite.iter("property") if p.get("name") == "commit"), "unknown")


def ran(suite: ElementTree.Element) -> str:
    """When, on which commit and for how long."""
    minutes = float(suite.get("time") or 0) / 60
    when = (suite.get("timestamp") or "")[:16].replace("T", " ")
    return f"- {when}, commit `{commit(suite)}`: {suite.get('tests')} tests in {minutes:.0f} minutes"


if __name__ == "__main__":
    *parts, written = map(Path, sys.argv[1:])
    written.write_text(page(parts), encoding="utf-8")
