"""Writes what a run of all tests came to as a page: `python scripts/test_report.py RESULTS.xml docs/test-all.md`.

RESULTS.xml is pytest's own report (`--junit-xml`). The page has the date, the commit, the machine, a line a file, and a
line for every drill and slow test, for what failed and for what was skipped, with the reason.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from rlfseg.pipeline.bench import machine

LONG = 30.0  # seconds from which a test has a line of its own


def outcome(case: ElementTree.Element) -> tuple[str, str]:
    """`passed`, `failed` or `skipped`, and why in a line."""
    for tag, name in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(tag)
        if found is not None:
            return name, (found.get("message") or "").strip().split("\n")[0][:200].replace("|", "\\|")
    return "passed", ""


def page(results: Path) -> str:
    """The page as Markdown."""
    [suite] = ElementTree.parse(results).getroot().iter("testsuite")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    counts: dict[str, Counter[str]] = {}
    lines = []
    for case in suite.iter("testcase"):
        file, (status, why) = (case.get("classname") or "").replace(".", "/"), outcome(case)
        counts.setdefault(file, Counter())[status] += 1
        seconds = float(case.get("time") or 0)
        if status != "passed" or seconds >= LONG or "/drills/" in file:
            lines.append(f"| `{file}` | `{case.get('name')}` | {status} | {seconds:.0f} | {why} |")
    total = sum(counts.values(), Counter())
    head = [
        "# All tests",
        "",
        f"`make test-all`, {(suite.get('timestamp') or '')[:16].replace('T', ' ')}, commit `{commit.stdout.strip()}`: "
        + ", ".join(f"{n} {status}" for status, n in sorted(total.items()))
        + f" in {float(suite.get('time') or 0) / 60:.0f} minutes.",
        "",
        *(f"- {key}: {value}" for key, value in machine().items()),
        "",
        "| file | passed | failed | skipped |",
        "|---|---|---|---|",
        *(f"| `{f}` | {c['passed']} | {c['failed']} | {c['skipped']} |" for f, c in sorted(counts.items())),
    ]
    table = ["", f"Drills, tests of {LONG:.0f} s and more, and what did not pass:", ""]
    return "\n".join([*head, *table, "| file | test | | s | |", "|---|---|---|---|---|", *lines, ""])


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(page(Path(sys.argv[1])), encoding="utf-8")
