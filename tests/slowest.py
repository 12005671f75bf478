"""Writes docs/evidence/tests.md: what `make test` took, and its twenty slowest tests, from the report that it left.

    make test && make slowest

A test's time is the sum over its parameters, preparation included; the reason is the first line of its docstring or,
where it has none, of its file's.
"""

from __future__ import annotations

import ast
import os
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

from fastgan.doctor import machine

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "evidence" / "tests.md"


def first_line(node: ast.AST) -> str:
    return (ast.get_docstring(node) or "").partition("\n")[0]


def what_for(path: Path, function: str) -> str:
    tree = ast.parse(path.read_text())
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function]
    return (first_line(found[0]) if found else "") or first_line(tree)


def rows(report: Path) -> tuple[list[tuple[float, int, Path, str]], ElementTree.Element]:
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    taken: dict[tuple[Path, str], list[float]] = defaultdict(list)
    for case in suite.iter("testcase"):
        path = ROOT / (case.get("classname", "").replace(".", "/") + ".py")
        taken[path, case.get("name", "").partition("[")[0]].append(float(case.get("time", 0)))
    slowest = sorted(((sum(t), len(t), *key) for key, t in taken.items()), reverse=True)[:20]
    return slowest, suite


def main() -> int:
    report = ROOT / "build" / "tests.xml"
    if not report.exists():
        print(f"slowest: {report} must be there, got none; run make test first", file=sys.stderr)
        return 1
    slowest, suite = rows(report)
    numbers = {name: int(suite.get(name, 0)) for name in ("tests", "skipped", "failures", "errors")}
    lines = [
        "# The tests' time",
        "",
        "`make test && make slowest` writes this page.",
        "",
        f"{numbers['tests']} tests, {numbers['skipped']} of them skipped, took {float(suite.get('time', 0)):.0f} s on"
        f" {os.cpu_count()} cores of {machine()['cpu']}. What is marked `slow` runs in `make slow` alone.",
        "",
        "| seconds | cases | test | what takes the time |",
        "|---|---|---|---|",
    ]
    for seconds, cases, path, function in slowest:
        lines.append(f"| {seconds:.0f} | {cases} | `{path.stem}::{function}` | {what_for(path, function)} |")
    PAGE.write_text("\n".join(lines) + "\n")
    print(f"slowest: wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
