"""report.html of a run: pictures, curves, configuration and machine in one file, readable offline."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgan._writing import write

from .progress import duration
from .rundir import RunDirectory, read_log

__all__ = ["write_report"]

_MAX_GRIDS = 8  # pictures of the way there; each is a few hundred kB at 64 images of 64x64
_LARGEST = 1e30  # beyond it a curve is no picture
_MAX_POINTS = 600  # points a curve: more than pixels help nobody

_STYLE = """
:root { --ink: #1c1e21; --soft: #6b7178; --line: #d9dce0; --paper: #fff; --a: #1f6feb; --b: #d1571b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --soft: #9aa1a9; --line: #3a3f45; --paper: #15181b; --a: #6ea8fe; --b: #f0956a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
.soft { color: var(--soft); } .facts { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1rem 0; }
.facts b { display: block; font-size: 1.3rem; } img { image-rendering: pixelated; max-width: 100%; }
.hero { width: min(100%, 34rem); } .way { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)); }
.way img { width: 100%; } figure { margin: 0; } figcaption { color: var(--soft); font-size: .85rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
svg .axis { stroke: var(--line); } svg polyline { fill: none; stroke-width: 1.5; stroke-linejoin: round; }
.a { stroke: var(--a); } .b { stroke: var(--b); } .key-a { color: var(--a); } .key-b { color: var(--b); }
table { border-collapse: collapse; } td { padding: .1rem 1.2rem .1rem 0; vertical-align: top; }
td:first-child { color: var(--soft); } pre { overflow-x: auto; font-size: .8rem; }
"""


def _step(grid: Path) -> str:
    """step-0001500.png -> "step 1,500"."""
    number = grid.stem.removeprefix("step-")
    return f"step {int(number):,}" if number.isdecimal() else grid.stem


def _number(record: Mapping[str, Any], key: str) -> float | None:
    """A finite number of a record, or None: a log may hold anything."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < _LARGEST else None  # false for NaN


def _picture(path: Path, kind: str, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    caption = html.escape(caption)
    return (
        f'<figure><img class="{kind}" src="data:image/png;base64,{data}" alt="{caption}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers between `low` and `high`; one where they are the same."""
    if not high > low:
        return [low]
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    unit = next(u * power for u in (1, 2, 2.5, 5, 10) if u * power >= raw)
    first = math.ceil(low / unit)
    return [unit * k for k in range(first, math.floor(high / unit) + 1)]


def _curves(
    records: Sequence[Mapping[str, Any]], keys: Mapping[str, str], span: tuple[float, float] | None = None
) -> str:
    """An SVG of up to two values over the steps; `keys` maps record keys to titles, `span` fixes the axis."""
    read = [(r["step"], [_number(r, key) for key in keys]) for r in records]
    rows = [(step, [v for v in found if v is not None]) for step, found in read if None not in found]
    rows = rows[:: max(1, math.ceil(len(rows) / _MAX_POINTS))]
    if len(rows) < 2:
        return '<p class="soft">fewer than two logged steps</p>'
    steps = [step for step, _ in rows]
    values = [value for _, found in rows for value in found]
    low, high = span or (min(values), max(values))
    if high - low <= 1e-9 * max(abs(low), abs(high), 1.0):
        low, high = low - max(0.5, abs(low) / 2), high + max(0.5, abs(high) / 2)
    width, height, left, bottom = 860.0, 220.0, 48.0, 24.0

    def x(step: float) -> float:
        return left + (width - left - 8) * (step - steps[0]) / max(1, steps[-1] - steps[0])

    def y(value: float) -> float:
        return 8 + (height - bottom - 8) * (1 - (value - low) / (high - low))

    parts = [f'<svg viewBox="0 0 {width:g} {height:g}" role="img">']
    for tick in _ticks(low, high):
        parts.append(f'<line class="axis" x1="{left:g}" x2="{width - 8:g}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{left - 6:g}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in _ticks(steps[0], steps[-1]):
        parts.append(f'<text x="{x(tick):.1f}" y="{height - 6:g}" text-anchor="middle">{tick:.6g}</text>')
    for index, stroke in enumerate("ab"[: len(keys)]):
        points = " ".join(f"{x(step):.1f},{y(found[index]):.1f}" for step, found in rows)
        parts.append(f'<polyline class="{stroke}" points="{points}"/>')
    legend = " &nbsp; ".join(
        f'<span class="key-{stroke}">&#9632; {html.escape(title)}</span>'
        for stroke, title in zip("ab", keys.values(), strict=False)
    )
    return f"<p>{legend} <span class='soft'>over steps</span></p>" + "".join(parts) + "</svg>"


def _table(rows: Mapping[str, Any]) -> str:
    cells = "".join(
        f"<tr><td>{html.escape(str(k))}</td><td>{html.escape('none' if v is None else str(v))}</td></tr>"
        for k, v in rows.items()
    )
    return f"<table>{cells}</table>"


def _facts(records: Sequence[Mapping[str, Any]], status: str) -> str:
    last = records[-1] if records else {}
    # The first record holds warm-up: proofs, races and lazy initialisation.
    found = [_number(r, "images_per_second") for r in (records[1:] or records)]
    speeds = sorted(speed for speed in found if speed is not None)
    facts = {
        "ended": status,
        "steps": f"{last.get('step', 0):,}",
        "images seen": f"{_number(last, 'images') or 0:,.0f}",
        "training time": duration(_number(last, "seconds") or 0.0),
        "images/s (median)": f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "none",
        "memory": f"{_number(last, 'memory_mb') or 0:,.0f} MB",
    }
    return "".join(f"<div><span class='soft'>{k}</span><b>{html.escape(v)}</b></div>" for k, v in facts.items())


def _choose(paths: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of `paths`, evenly spread, the first and the last among them."""
    if len(paths) <= count:
        return list(paths)
    return [paths[round(k * (len(paths) - 1) / (count - 1))] for k in range(count)]


def _sections(run: RunDirectory, status: str, notes: Iterable[str], explanation: str) -> Iterable[str]:
    config, records = run.read_config(), read_log(run.log)
    recipe = config["recipe"]
    grids = sorted(run.samples.glob("step-*.png"))

    yield f"<h1>{html.escape(recipe['name'])} on {html.escape(str(recipe['data']))}</h1>"
    made = f"fastgan {config.get('fastgan')}, {config['started']}"
    yield f"<p class='soft'>{html.escape(made)}</p>"
    yield f"<div class='facts'>{_facts(records, status)}</div>"
    if grids:
        yield _picture(grids[-1], "hero", f"samples from fixed noise, {_step(grids[-1])}")
    for note in notes:
        yield f"<p><b>Note:</b> {html.escape(note)}</p>"
    yield "<h2>Losses</h2>" + _curves(records, {"d_loss": "discriminator", "g_loss": "generator"})
    yield "<h2>Mean scores</h2>" + _curves(records, {"d_real": "D(x)", "d_fake": "D(G(z))"}, (0.0, 1.0))
    if any(_number(r, "kcd") is not None for r in records):
        yield "<h2>Kernel distance</h2>" + _curves(
            [r for r in records if "kcd" in r], {"kcd": "kcd, features of small; lower is nearer"}
        )
    if any(_number(r, "penalty") for r in records):
        yield "<h2>Penalty</h2>" + _curves(records, {"penalty": "penalty"})
    yield "<h2>Speed</h2>" + _curves(records[1:], {"images_per_second": "images/s"})
    if len(grids) > 1:
        way = "".join(_picture(p, "", _step(p)) for p in _choose(grids[:-1], _MAX_GRIDS))
        yield f"<h2>The way there</h2><div class='way'>{way}</div>"
    yield "<h2>Recipe</h2>" + _table(recipe)
    yield "<h2>Machine</h2>" + _table(config.get("machine", {}))
    if explanation:
        yield f"<h2>Layers</h2><pre>{html.escape(explanation)}</pre>"


def write_report(
    folder: str | Path | RunDirectory, *, status: str, notes: Iterable[str] = (), explanation: str = ""
) -> Path:
    """Write ``report.html`` from the run directory's own files and return its path.

    `status`: how the run ended, in a few words. `notes`: warnings it gave. `explanation`: the text of
    `fastgan.explain` for both networks.
    """
    run = folder if isinstance(folder, RunDirectory) else RunDirectory(folder)
    body = "\n".join(_sections(run, status, notes, explanation))
    page = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>fastgan: {html.escape(run.path.resolve().name)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )
    write(run.report, page)
    return run.report
