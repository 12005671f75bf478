"""report.html of a run, and of several side by side: one file, readable offline, from the runs' own files."""

from __future__ import annotations

import contextlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgan._writing import write
from fastgan.domains import Domain, domain_of

from .charts import STROKES, curves
from .figures import picture
from .progress import duration
from .recipes import Recipe
from .rundir import RunDirectory, read_log

__all__ = ["comparison", "page", "write_report"]

_MAX_GRIDS = 16  # pictures of the way there; each is a few hundred kB at 64 images of 64x64
_LARGEST = 1e30  # beyond it a curve is no picture

_STYLE = """
:root { --ink: #1c1e21; --soft: #6b7178; --line: #d9dce0; --paper: #fff; --a: #1f6feb; --b: #d1571b; --c: #2a8f5b;
  --d: #8b5cf6; --e: #b7791f; --f: #0e7490; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --soft: #9aa1a9; --line: #3a3f45; --paper: #15181b; --a: #6ea8fe; --b: #f0956a; --c: #6cc79b;
    --d: #b79bfa; --e: #e0b15c; --f: #5cc3dc; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
.soft { color: var(--soft); } .facts { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1rem 0; }
.facts b { display: block; font-size: 1.3rem; } img { image-rendering: pixelated; max-width: 100%; }
.pair { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); align-items: start; }
.pair img, .way img { width: 100%; } .way { max-width: 34rem; } .way input { width: 100%; accent-color: var(--a); }
.way figure:not(.now) { display: none; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: .85rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
@media (max-width: 40rem) { svg text { font-size: 20px; } }
svg .axis { stroke: var(--line); } svg polyline { fill: none; stroke-width: 1.5; stroke-linejoin: round; }
table { border-collapse: collapse; } td, th { padding: .1rem 1.2rem .1rem 0; vertical-align: top; text-align: left; }
td:first-child { color: var(--soft); white-space: nowrap; } td + td { overflow-wrap: anywhere; }
pre { overflow-x: auto; font-size: .8rem; }
""" + "".join(f".{s} {{ stroke: var(--{s}); }} .key-{s} {{ color: var(--{s}); }}\n" for s in STROKES)

_SLIDER = """<script>
for (const way of document.querySelectorAll(".way")) {
  const figures = way.querySelectorAll("figure"), slider = way.querySelector("input");
  slider.addEventListener("input", () => figures.forEach((f, i) => f.classList.toggle("now", i == slider.value)));
}
</script>"""


# ---- one run --------------------------------------------------------------------------------------------------------


def write_report(
    folder: str | Path | RunDirectory, *, status: str, notes: Iterable[str] = (), explanation: str = ""
) -> Path:
    """Write ``report.html`` from the run directory's own files and return its path.

    `status`: how the run ended, in a few words. `notes`: warnings it gave. `explanation`: the text of
    `fastgan.explain` for both networks. They are kept in ending.json, for `fastgan report`.
    """
    run = folder if isinstance(folder, RunDirectory) else RunDirectory(folder)
    ending = {"status": status, "notes": list(notes), "explanation": explanation}
    write(run.report, page(run, ending=ending))
    write(run.ending, json.dumps(ending, indent=1) + "\n")  # last: where it is, the run came to its end
    return run.report


def page(run: RunDirectory, *, ending: Mapping[str, Any] | None = None, refresh: int = 0) -> str:
    """The report of a run, also of one under way, as HTML.

    ending: None reads ending.json. refresh: seconds after which a browser asks again; 0: never.
    """
    ending = ending or run.read_ending()
    body = "\n".join(_sections(run, **ending))
    return _document(run.path.resolve().name, body, refresh)


def _document(title: str, body: str, refresh: int = 0) -> str:
    again = f"<meta http-equiv='refresh' content='{refresh}'>" if refresh else ""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<meta name='viewport' content='width=device-width'>{again}"
        f"<title>fastgan: {html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n{_SLIDER}</body></html>\n"
    )


def _sections(run: RunDirectory, status: str, notes: Iterable[str], explanation: str) -> Iterable[str]:
    config, records = run.read_config(), read_log(run.log)
    recipe = config["recipe"]
    yield f"<h1>{html.escape(recipe['name'])} on {html.escape(str(recipe['data']))}</h1>"
    made = f"fastgan {config.get('fastgan')}, {config['started']}"
    yield f"<p class='soft'>{html.escape(made)}</p>"
    yield f"<div class='facts'>{_facts(records, status)}</div>"
    domain = domain_of(Recipe.from_dict(recipe))
    yield from _pictures(run, domain, config.get("classes"))
    for note in notes:
        yield f"<p><b>Note:</b> {html.escape(note)}</p>"
    yield from _charts(records, domain)
    yield "<h2>Recipe</h2>" + _table(recipe)
    yield "<h2>Machine</h2>" + _table(config.get("machine", {}))
    if explanation:
        yield f"<h2>Layers</h2><pre>{html.escape(explanation)}</pre>"


def _pictures(run: RunDirectory, domain: Domain, classes: Sequence[str] | None) -> Iterable[str]:
    grids = _choose(sorted(run.samples.glob("step-*.png")), _MAX_GRIDS)
    if grids:
        rows = f"; from above: {', '.join(classes[:12])}" if classes else ""
        latest = domain.show(grids[-1], f"samples from fixed noise, {_step(grids[-1])}{rows}")
        real = run.pictures / "real.png"
        beside = domain.show(real, f"{domain.noun} of the training set") if real.exists() else ""
        yield f"<div class='pair'>{latest}{beside}</div>"
    if len(grids) > 1:
        figures = []
        for path in grids:
            with contextlib.suppress(FileNotFoundError):  # a run under way has thinned its grids out just now
                figures.append(domain.show(path, _step(path), "now" if path is grids[-1] else ""))
        now = len(figures) - 1
        slider = f"<input type='range' min='0' max='{now}' value='{now}' aria-label='samples over time'>"
        yield f"<h2>Samples over time</h2><div class='way'>{slider}{''.join(figures)}</div>"
    if (nearest := run.pictures / "nearest.png").exists():
        caption = "samples above, below each the training image whose features are nearest"
        yield "<h2>Nearest training images</h2>" + picture(nearest, caption)


def _charts(records: Sequence[Mapping[str, Any]], domain: Domain) -> Iterable[str]:
    def chart(
        title: str, keys: Mapping[str, str], span: tuple[float, float] | None = None, always: bool = False
    ) -> str:
        found = {name: _series(records, key) for key, name in keys.items()}
        shown = {name: points for name, points in found.items() if len(points) > 1}
        return f"<h2>{title}</h2>{curves(shown or found, span)}" if shown or always else ""

    for title, keys in domain.charts.items():
        yield chart(title, keys)
    yield chart("Losses", {"d_loss": "discriminator", "g_loss": "generator"}, always=True)
    yield chart("Mean scores", {"d_real": "D(x)", "d_fake": "D(G(z))"}, (0.0, 1.0), always=True)
    watched = {"diversity": "variety beside the data's", "coverage": "coverage", "overfit": "overfitting of D"}
    yield chart("Health", watched)
    yield chart("Gradient norms", {"d_grad": "discriminator", "g_grad": "generator"})
    yield chart("Penalty", {"penalty": "penalty"})
    yield chart("Augmentation", {"augment_p": "probability of each change"})
    yield f"<h2>Speed</h2>{curves({'images/s': _series(records[1:], 'images_per_second')})}"


# ---- several runs ---------------------------------------------------------------------------------------------------


COMPARED = (  # of all runs: title, key, and what it is where the title does not say it
    ("Discriminator's loss", "d_loss", None),
    ("Images/s", "images_per_second", None),
)


def comparison(runs: Sequence[RunDirectory]) -> str:
    """Runs side by side as HTML: what differs in their recipes, how far they came, their curves and last samples."""
    names = _names(runs)
    configs = [run.read_config() for run in runs]
    logs = [read_log(run.log) for run in runs]
    domains = [domain_of(Recipe.from_dict(config["recipe"])) for config in configs]
    rows = [_standing(*one) for one in zip(names, runs, logs, domains, strict=True)]
    body = [f"<h1>{len(runs)} runs</h1>", _rows(rows), "<h2>What differs</h2>", _rows(_differences(names, configs))]
    measured = [_measure(domain) for domain in domains]
    wanted = [(measure, over) for measure in dict.fromkeys(measured) for over in ("step", "seconds")]
    wanted += [(measure, "step") for measure in COMPARED]
    for (title, key, words), over in wanted:
        # what two kinds of samples call by one name is two measures
        same = [True if words is None else one == (title, key, words) for one in measured]
        series = {name: _series(log, key, over) for name, log, is_so in zip(names, logs, same, strict=True) if is_so}
        shown = {name: points for name, points in series.items() if len(points) > 1}
        said = f"<p class='soft'>{html.escape(words)}</p>" if words else ""
        drawn = curves(shown, over="steps" if over == "step" else over)
        body.append(f"<h2>{html.escape(title)}</h2>{said}{drawn}" if shown else "")
    pictures = []
    for name, run, domain in zip(names, runs, domains, strict=True):
        if grids := sorted(run.samples.glob("step-*.png")):
            pictures.append(domain.show(grids[-1], f"{name}, {_step(grids[-1])}"))
    body.append(f"<h2>Samples</h2><div class='pair'>{''.join(pictures)}</div>")
    return _document(", ".join(names), "\n".join(body))


def _names(runs: Sequence[RunDirectory]) -> list[str]:
    """The directories' own names where they differ, else their paths."""
    short = [run.path.resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.path) for run in runs]


def _measure(domain: Domain) -> tuple[str, str, str | None]:
    """(title, key, words) of the score that chooses a run's best generator."""
    key = next(iter(domain.metrics), "")
    title, keys = next(((title, keys) for title, keys in domain.charts.items() if key in keys), (key, {}))
    return title, key, keys.get(key, "")


def _standing(name: str, run: RunDirectory, log: Sequence[Mapping[str, Any]], domain: Domain) -> dict[str, str]:
    _, key, _ = _measure(domain)
    last = log[-1] if log else {}
    return {
        "run": name,
        "ended": str(run.read_ending()["status"]),
        "steps": f"{last.get('step', 0):,}",
        "time": duration(_number(last, "seconds") or 0.0),
        "best score": _best(log, key, domain.noun),
        "images/s": _median_speed(log),
    }


def _best(log: Sequence[Mapping[str, Any]], key: str, noun: str) -> str:
    """The least score, where it was reached and how many samples it is of: scores of other numbers do not compare."""
    scored = [(value, r) for r in log if (value := _number(r, key)) is not None]
    if not scored:
        return "none"
    value, record = min(scored, key=lambda one: one[0])
    count = _number(record, "eval_images")
    of = "" if count is None else f", {count:,.0f} {noun}"
    return f"{key} {value:.4f} at step {record['step']:,}{of}"


def _differences(names: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row for each recipe field, device or version that is not the same in all runs."""
    flat = [{**c["recipe"], "device": c.get("device"), "fastgan": c.get("fastgan")} for c in configs]
    keys = [key for key in dict.fromkeys(k for f in flat for k in f) if key != "source"]
    differing = [key for key in keys if len({json.dumps(f.get(key)) for f in flat}) > 1]
    return [{"field": key} | {n: _word(f.get(key)) for n, f in zip(names, flat, strict=True)} for key in differing]


# ---- pieces ---------------------------------------------------------------------------------------------------------


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


def _series(records: Sequence[Mapping[str, Any]], key: str, over: str = "step") -> list[tuple[float, float]]:
    found = [(_number(r, over), _number(r, key)) for r in records]
    return [(x, y) for x, y in found if x is not None and y is not None]


def _word(value: Any) -> str:
    """A value as --set reads it."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _table(rows: Mapping[str, Any]) -> str:
    cells = "".join(f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(_word(v))}</td></tr>" for k, v in rows.items())
    return f"<table>{cells}</table>"


def _rows(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return "<p class='soft'>nothing</p>"
    head = "".join(f"<th>{html.escape(key)}</th>" for key in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(v)}</td>" for v in row.values()) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _median_speed(records: Sequence[Mapping[str, Any]]) -> str:
    # The first record holds warm-up: proofs, races and lazy initialisation.
    speeds = sorted(y for _, y in _series(records[1:] or records, "images_per_second"))
    return f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "none"


def _facts(records: Sequence[Mapping[str, Any]], status: str) -> str:
    last = records[-1] if records else {}
    facts = {
        "ended": status,
        "steps": f"{last.get('step', 0):,}",
        "images seen": f"{_number(last, 'images') or 0:,.0f}",
        "training time": duration(_number(last, "seconds") or 0.0),
        "images/s (median)": _median_speed(records),
        "memory": f"{_number(last, 'memory_mb') or 0:,.0f} MB",
    }
    return "".join(f"<div><span class='soft'>{k}</span><b>{html.escape(v)}</b></div>" for k, v in facts.items())


def _choose(paths: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of `paths`, evenly spread, the first and the last among them."""
    if len(paths) <= count:
        return list(paths)
    return [paths[round(k * (len(paths) - 1) / (count - 1))] for k in range(count)]
