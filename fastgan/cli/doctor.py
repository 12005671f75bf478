"""``fastgan doctor``: what this installation can do, and why not where it cannot."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from fastgan.doctor import doctor

from .arguments import Commands


def add(commands: Commands) -> argparse.ArgumentParser:
    """Register the command."""
    parser = commands.add_parser(
        "doctor",
        help="report what works here and why not",
        description="Report what this installation can do, and where it cannot, why not.",
    )
    parser.add_argument("--prove", action="store_true", help="run every backend of every op against its reference")
    parser.add_argument("--race", action="store_true", help="race the kernels that earlier runs had no time for")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 if a proof failed."""
    found = doctor(prove=args.prove, race=args.race)
    if args.json:
        print(json.dumps(found, indent=2, default=str))
    else:
        _print(found)
    proofs = found.get("proofs", [])
    return int("error" in proofs or any(row["error"] for row in proofs))


def _print(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for topic in ("versions", "machine", "cuda", "cache", "data"):
        console.print(_facts(topic, found[topic]))
    native = found["native"]
    facts = {k: v for k, v in native.items() if k not in ("tables", "build")}
    console.print(_facts("native core", facts | dict(native.get("build", {}))))
    if "tables" in native:
        console.print(_facts("instruction sets of the native core", native["tables"]))
    console.print(_facts("optional packages", {k: _extra(v) for k, v in found["extras"].items()}))
    backends = found["backends"]
    if "error" in backends:
        console.print(_facts("backends", backends))
        return
    table = Table(title="backends", title_justify="left", title_style="bold", box=None)
    names = list(next(iter(backends.values()), {}))
    for column in ("op", *names):
        table.add_column(column)
    for op, states in backends.items():
        table.add_row(op, *("[green]yes[/]" if states[n]["available"] else "[dim]no[/]" for n in names))
    console.print(table)
    reasons = {
        f"{op}, {name}": state["reason"]
        for op, states in backends.items()
        for name, state in states.items()
        if state["reason"]
    }
    console.print(_facts("why not", _joined(reasons)))
    if "races" in found:
        console.print(_facts("races", found["races"]))
    if "proofs" in found:
        _print_proofs(console, found["proofs"])


def _joined(reasons: Mapping[str, str]) -> dict[str, str]:
    """Reasons that several ops share, once for each backend."""
    shared: dict[tuple[str, str], list[str]] = {}
    for key, reason in reasons.items():
        op, _, name = key.partition(", ")
        shared.setdefault((name, reason.replace(op, "the op")), []).append(op)
    return {f"{name} ({', '.join(ops)})": reason for (name, reason), ops in shared.items()}


def _extra(state: Mapping[str, Any]) -> str:
    if state["available"]:
        return f"{state['version'] or 'installed'} ({state['for']})"
    return f"missing: {state['for']}; {state['reason']}"


def _facts(title: str, facts: Any) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    rows = facts.items() if isinstance(facts, Mapping) else enumerate(facts)
    for key, value in rows:
        table.add_row(str(key), Text("" if value is None else str(value)))
    return table


def _print_proofs(console: Any, proofs: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    if "error" in proofs:
        console.print(_facts("proofs", proofs))
        return
    table = Table(title="proofs against the reference", title_justify="left", title_style="bold", box=None)
    columns = ("op", "backend", "dtype", "layout")
    for column in (*columns, "result"):
        table.add_column(column)
    for row in proofs:
        result = Text(row["error"], style="red") if row["error"] else Text("agrees", style="green")
        table.add_row(*(row[column] for column in columns), result)
    console.print(table)
