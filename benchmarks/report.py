"""Tables of results: for the terminal, and for the documentation's evidence pages.

    python benchmarks/report.py RESULTS.json    # prints the tables of one file
    python benchmarks/report.py                 # writes docs/evidence from the newest file of each kind and machine

The second form makes each page from one committed file of benchmarks/results, so that no number is typed: also the
table and the picture of the rows in HEADLINES, for the README and for docs/performance.md, and README's table of the
time to the same quality.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import facts

from fastgan.benchmarking.comparison import digits, milliseconds, versus

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "evidence"
README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"  # tables between two marker lines
HEADER = ("row", "median ms", "quartiles", "min ms", "rate", "of bound", "peak MB", "vs best PyTorch", "backends")
GROUPS = {  # the order of the tables
    "step": "Whole training step",
    "penalty": "Gradient penalties",
    "sample": "Generation",
    "conv2d": "conv2d",
    "conv_transpose2d": "conv_transpose2d",
    "conv2d_weight": "conv2d_weight",
    "bn_act": "bn_act",
    "bias_act": "bias_act",
    "gan_loss": "gan_loss",
    "adam": "adam",
}
HEADLINES = {  # (op, shape, direction, row) -> what it is in a newcomer's words
    ("step", "dcgan-64", "batch64", "fastgan"): "training step of DCGAN-64, float32",
    ("step", "dcgan-64", "batch64", "fastgan-bf16"): "training step of DCGAN-64, bfloat16",
    ("step", "dcgan-28", "batch64", "fastgan"): "training step of DCGAN-28, float32",
    ("step", "dcgan-28", "batch64", "fastgan-bf16"): "training step of DCGAN-28, bfloat16",
    ("step", "r1-dcgan-64", "batch64", "fastgan"): "training step of DCGAN-64 with R1 and no norms in D, float32",
    ("penalty", "wgan-gp", "batch64", "fastgan"): "WGAN-GP penalty of a critic, float32",
    ("penalty", "d-wgan-gp", "batch64", "fastgan"): "critic's update with WGAN-GP, float32",
    ("penalty", "d-r1", "batch64", "fastgan"): "discriminator's update with R1, float32",
    ("sample", "dcgan-64", "batch64", "fastgan"): "drawing images with DCGAN-64, float32",
    ("sample", "dcgan-64", "batch64", "fastgan-bf16"): "drawing images with DCGAN-64, bfloat16",
    ("sample", "dcgan-64", "batch1", "fastgan-bf16"): "drawing one image with DCGAN-64, bfloat16",
    ("sample", "dcgan-64", "batch1", "fastgan-frozen"): "drawing one image with DCGAN-64, frozen, float32",
    ("sample", "dcgan-64", "batch1", "fastgan-frozen-bf16"): "drawing one image with DCGAN-64, frozen, bfloat16",
}
HEADLINE_MARKERS = "<!-- headlines: written by `make evidence` -->", "<!-- headlines: end -->"
TIMES = "<!-- time to quality: written by `make evidence` -->", "<!-- time to quality: end -->"


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row of a table, in HEADER's order; a failed row has its reason, "-" is what was not measured."""
    if row["failed"]:
        return (row["row"], "failed", *["-"] * (len(HEADER) - 3), row["failed"])
    share, peak = row["share_of_bound"], row["peak_bytes"]
    return (
        row["row"],
        milliseconds(row["median_s"]),
        f"{milliseconds(row['q1_s'])} to {milliseconds(row['q3_s'])}",
        milliseconds(row["min_s"]),
        rate(row),
        "-" if share is None else f"{100 * share:.0f} %" if share >= 0.005 else "<1 %",
        "-" if peak is None else digits(peak / 1e6),
        versus(row),
        row["backends"],
    )


def rate(row: dict[str, Any]) -> str:
    """The work's own measure: GFLOP/s where arithmetic prevails (10 FLOPs a byte and more), GB/s elsewhere."""
    if not row["bytes"]:
        return "-"
    if row["flops"] > 10 * row["bytes"]:
        return f"{row['flops'] / row['median_s'] / 1e9:.0f} GFLOP/s"
    return f"{digits(row['bytes'] / row['median_s'] / 1e9)} GB/s"


def title(case: dict[str, Any]) -> str:
    return " ".join(part for part in (case["op"], case["shape"], case["direction"], case["dtype"]) if part)


def bound(case: dict[str, Any]) -> str:
    """The bounds of a case, one a dtype."""
    bounds = {row["dtype"]: row["bound_s"] for row in case["rows"] if row["bound_s"] is not None}
    return ", ".join(f"{dtype} bound {milliseconds(seconds)} ms" for dtype, seconds in bounds.items())


def summary(cases: list[dict[str, Any]]) -> list[str]:
    """How many of fastgan's rows win, lose and fail, by the row's name; losses are counted, never averaged away."""
    rows = [(case, row) for case in cases for row in case["rows"] if row["ours"]]
    lines = []
    for name in dict.fromkeys(row["row"] for _, row in rows):
        speedups = [row["speedup"] for _, row in rows if row["row"] == name and row["speedup"] is not None]
        slower = sum(s < 1 for s in speedups)
        if not speedups:
            continue
        lines += [
            f"{name}: {len(speedups) - slower} of {len(speedups)} at least as fast as PyTorch's best row of the dtype "
            f"(in either layout, compiled or not), {slower} slower"
        ]
    return lines + [f"failed: {title(case)} {row['row']}: {row['failed']}" for case, row in rows if row["failed"]]


# ---- the terminal ---------------------------------------------------------------------------------------------------


def text(results: dict[str, Any]) -> list[str]:
    """Lines for a terminal: the machine, then a table a case."""
    lines = [*machine_lines(results), ""]
    for case in results["cases"]:
        table = [HEADER, *map(cells, case["rows"])]
        widths = [max(len(line[i]) for line in table) for i in range(len(HEADER))]
        lines += [f"{title(case)}  [{bound(case) or 'no bound'}]"]
        for line in table:
            padded = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:-1], widths[1:-1], strict=True))]
            lines += ["  ".join(["", *padded, line[-1]]).rstrip()]
        lines += [""]
    return [*lines, *summary(results["cases"])]


def machine_lines(results: dict[str, Any]) -> list[str]:
    """What the numbers depend on."""
    machine, ceilings = results["machine"], results.get("ceilings")
    dirty = " with uncommitted changes" if machine["dirty"] else ""
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores, device {machine['device']}, "
        f"kernels {machine['kernels']}",
        f"torch {machine['torch']}, fastgan {machine['fastgan']} at commit {machine['commit']}{dirty}, "
        f"python {machine['python']}, {machine['os']}",
        f"command: {machine['command']}",
        f"{machine['date']}, load average {machine['load_before']} before and {machine['load_after']} after",
    ]
    if ceilings is None:  # results that state no bound
        return lines
    if "unavailable" in ceilings:
        return [*lines, f"no bounds: {ceilings['unavailable']}"]
    arithmetic = [f"{k.removesuffix('_gflops')} {v:.0f} GFLOP/s" for k, v in ceilings.items() if k.endswith("_gflops")]
    memory = [f"{r['mib']} MiB {max(r['copy_gbs'], r['triad_gbs']):.0f}" for r in ceilings["memory"]]
    return [*lines, f"ceilings: {', '.join(arithmetic)}; GB/s by footprint: {', '.join(memory)}"]


# ---- the pages ------------------------------------------------------------------------------------------------------


def ops_page(results: dict[str, Any]) -> list[str]:
    """Every case of `make bench`: a section an op, a table a case."""
    lines = [*(f"- {line}" for line in summary(results["cases"])), ""]
    lines += ["The [Performance](../performance.md#what-the-columns-mean) page explains rows and columns.", ""]
    names = [*GROUPS, *sorted({case["op"] for case in results["cases"]} - set(GROUPS))]
    for name in names:
        cases = [case for case in results["cases"] if case["op"] == name]
        if cases:
            lines += [f"## {GROUPS.get(name, name)}", ""]
        for case in cases:
            rows = (cells(row) for row in case["rows"])
            lines += [f"**{title(case)}** ({bound(case) or 'no bound'})", "", *table(HEADER, rows, text_last=True), ""]
    return lines


def stylegan_page(results: dict[str, Any]) -> list[str]:
    """StyleGAN's ops and a step of stylegan2-small in CPU time."""
    rows = []
    for row in results["stylegan"]:
        ms = row["ms"]
        composition = digits(ms["composition"]) if "composition" in ms else "-"
        figures = digits(ms["fastgan"]), digits(ms["torch"]), f"{ms['torch'] / ms['fastgan']:.2f}", composition
        rows.append((row["what"], *figures))
    return [
        "Milliseconds of CPU time of one thread in float32, the least of several rounds in turns, which leaves out the "
        "time in which others had the core. PyTorch's are the formulas that the projects fall back to "
        "(`benchmarks/resampling.py`), in the step those of fastgan's references. The composition is fastgan's own ops "
        "one after another.",
        "",
        *table(("", "fastgan", "PyTorch", "ratio", "composition"), rows),
        "",
    ]


def scaling_page(results: dict[str, Any]) -> list[str]:
    """Images a second at every point of `make scaling`, with the ratio of the rows of one precision."""
    header = ("threads", "image side", "batch", "PyTorch", "fastgan", "ratio", "PyTorch bf16", "fastgan bf16", "ratio")
    lines = ["Images a second of the whole DCGAN training step; PyTorch in channels_last with fused Adam.", ""]
    rows = []
    for point in sorted(results["points"], key=lambda p: (-p["threads"], p["size"], p["batch"])):
        speed = point["images_per_second"]
        numbers: list[str] = []
        for theirs, ours in (("PyTorch", "fastgan"), ("PyTorch bf16", "fastgan bf16")):
            ratio = f"{speed[ours] / speed[theirs]:.2f}" if theirs in speed and ours in speed else "-"
            numbers += [digits(speed[row]) if row in speed else "failed" for row in (theirs, ours)] + [ratio]
        rows.append((str(point["threads"]), str(point["size"]), str(point["batch"]), *numbers))
    lines += [*table(header, rows), ""]
    lines += [
        f"- {cliff}" for cliff in results["cliffs"] or ["No batch is a quarter slower an image than a smaller one."]
    ]
    lines += [f"- not measured for want of time: {point}" for point in results["left_out"]]
    picture = f"../images/scaling-{facts.slug(results['machine'])}.png"
    return [*lines, "", f"![Images a second]({picture})", ""]


def quality_page(results: dict[str, Any]) -> list[str]:
    """Fréchet distances of `make quality`: a row an arm, a column a seed."""
    header = ("", *(f"seed {seed}" for seed in results["seeds"]), "mean")
    rows = [
        (arm, *(f"{value:.1f}" for value in values), f"{sum(values) / len(values):.1f}")
        for arm, values in results["frechet"].items()
    ]
    return [
        f"Recipe dcgan-28 at width {results['width']}, {results['steps']:,} steps at batch {results['batch']} on the "
        "bundled Fashion-MNIST images. Both arms start from the same weights and see the same images in one order.",
        "Fréchet distance (Heusel et al. 2017) of 10,000 pictures over the features of a small classifier that is "
        f"trained for this ({100 * results['classifier_accuracy']:.1f} % of held-out images right). Two halves of the "
        f"real images are {results['halves_of_the_real_images']:.2f} apart, an untrained generator "
        f"{results['untrained']:,.0f}.",
        "",
        *table(header, rows),
        "",
        f"{results['verdict']['sentence']}",
        "",
        "![64 pictures from the same latents: float32 PyTorch left, bf16 fastgan right, seed 0](../images/quality.png)",
        "",
    ]


FIRST_STEP = ("recipe", "precision", "first step", "choosing", "open", "warm", "PyTorch first", "its warm", "bound", "")


def cells_of_first_step(row: dict[str, Any]) -> tuple[str, ...]:
    """One row of benchmarks/first_step.py, in FIRST_STEP's order; seconds."""
    ours, theirs = row["ours"], row["torch"]
    seconds = ours["first_s"], ours["choosing_s"], ours["warm_s"], theirs["first_s"], theirs["warm_s"], row["bound_s"]
    first, choosing, *rest = (f"{s:.2f}" for s in seconds)
    counted = f"{ours['open']} of {ours['verdicts']}"
    return row["recipe"], row["precision"], first, choosing, counted, *rest, "holds" if row["holds"] else "exceeded"


def first_step_page(results: dict[str, Any]) -> list[str]:
    """Every recipe's first step in a fresh process with a cold cache."""
    rows = results["first_steps"]
    return [
        "Seconds. Each row is two fresh processes, ours with an empty cache. `choosing` is what proofs, races and "
        "traces took in the first step. `open` counts the cases that had no time left and are settled after a run, of "
        "all cases. PyTorch runs the same recipe in channels_last. The bound is 1.5 times its warm step plus 2 s. "
        "Where a step of PyTorch takes over 10 s it ran once, and counts as its warm one.",
        "",
        f"{sum(row['holds'] for row in rows)} of {len(rows)} first steps are within the bound.",
        "",
        *table(FIRST_STEP, map(cells_of_first_step, rows), text_last=True),
        "",
    ]


def chains_page(results: dict[str, Any]) -> list[str]:
    """Chains of layers, each against PyTorch's better layout."""
    rows, ratios = [], []
    for row in results["chains"]:
        plain, *ours = (row["seconds"][name] for name in ("torch NCHW", "fastgan NCHW", "fastgan channels_last"))
        plain = min(plain, row["seconds"]["torch channels_last"])
        ratios += [plain / seconds for seconds in ours]
        sizes = (str(row[name]) for name in ("channels", "side", "batch", "layers"))
        mode = "forward + backward" if row["training"] else "eval"
        rows.append((mode, *sizes, *(f"{1e6 * s:.0f}" for s in (plain, *ours)), *(f"{plain / s:.2f}" for s in ours)))
    header = "", "channels", "pixels", "batch", "layers", "PyTorch", "NCHW", "channels_last", "ratio", "ratio"
    return [
        "Microseconds, minima, one thread. A layer is convolution 3 x 3, batch norm, LeakyReLU. PyTorch's figure is "
        "that of its better layout; fastgan's are the converted chain's in either, and the ratios theirs to PyTorch's.",
        "",
        f"{sum(r >= 1 for r in ratios)} of {len(ratios)} ratios are 1 or more; the least is {min(ratios):.2f}, the "
        f"median {sorted(ratios)[len(ratios) // 2]:.2f}.",
        "",
        *table(header, rows),
        "",
    ]


def recipes_page(results: dict[str, Any]) -> list[str]:
    """Steps of recipes beyond single images: a table a recipe, from a command of its own."""
    ours = [row for one in results["recipes"] for row in one["case"]["rows"] if row["ours"]]
    ahead = sum((row["speedup"] or 0) >= 1 for row in ours)
    lines = [
        f"{ahead} of {len(ours)} steps take fastgan no longer than PyTorch's better eager row. `torch.compile` and "
        "rows in 16 bits were not compared. Other programs of the machine were halted while a recipe was measured; "
        "load averages are those of the minutes before.",
        "",
    ]
    lines += ["The [Performance](../performance.md#what-the-columns-mean) page explains rows and columns.", ""]
    for row in results["recipes"]:
        case, machine = row["case"], row["machine"]
        lines += [f"## {case['shape']}, {case['direction']}", "", f"`{machine['command']}`", ""]
        lines += [f"{machine['date']}, commit {machine['commit']}, load average {machine['load_before']} before and "]
        lines[-1] += f"{machine['load_after']} after."
        lines += ["", *table(HEADER, map(cells, case["rows"]), text_last=True), ""]
    return lines


def models_page(results: dict[str, Any]) -> list[str]:
    """Other people's networks, each against PyTorch's better layout."""
    rows, best = [], {}
    for row in results["models"]:
        seconds = row["seconds"]["median"]
        theirs, ours = (
            [seconds[f"{who} {layout}"] for layout in ("NCHW", "channels_last")] for who in ("torch", "fastgan")
        )
        best[row["name"]] = min(theirs) / min(ours)
        ratios = (*(a / b for a, b in zip(theirs, ours, strict=True)), best[row["name"]])
        figures = (*map(milliseconds, (*theirs, *ours)), *(f"{r:.2f}" for r in ratios), f"{row['target']:g}")
        rows.append((row["what"], str(row["batch"]), *figures))
    reached = sum(best[row["name"]] >= row["target"] for row in results["models"])
    layouts = "NCHW", "channels_last"
    header = "", "batch", *(f"{who} {layout}" for who in ("PyTorch", "fastgan") for layout in layouts)
    return [
        "Milliseconds, medians. Every arm runs the same loop; fastgan's networks went through `fastgan.convert`. The "
        "first two ratios compare one layout in both, the third PyTorch's better layout with fastgan's better one. The "
        "steps are those of `examples/`, the other rows the networks of `tests/handwritten.py`. Races are over before "
        "the clock starts.",
        "",
        f"{reached} of {len(rows)} rows reach their target; the least ratio of better layouts is "
        f"{min(best.values()):.2f}.",
        "",
        *table((*header, *layouts, "better", "target"), rows),
        "",
    ]


def times_page(results: dict[str, Any]) -> list[str]:
    """`make time-to-quality`: seconds to the target, a row a seed, two columns an arm."""
    recipe, shares = results["recipe"], [run["share of evaluation"] for run in results["times"]]
    auto = f" `fastgan auto` chose {results['auto']}." if "auto" in results else ""
    return [
        f"Recipe dcgan-28 at width {recipe['model_options']['g_width']}, batch {recipe['batch_size']}, rates "
        f"{recipe['g_lr']:g}, in float32 on the bundled Fashion-MNIST images.{auto} PyTorch runs channels_last with "
        "fused Adam. All arms begin with the same weights and see the same images; their noise differs, and with it "
        "the number of steps that they need. Seconds of wall time from the built networks on: first steps, proofs, "
        f"races and evaluations count ({100 * min(shares):.0f} to {100 * max(shares):.0f} % are evaluation).",
        "",
        f"The target is a kernel distance of {results['target']:g} between {results['images_compared']} pictures of "
        f"the averaged generator and as many images, on features of the backbone `{results['backbone']}`. Two halves "
        f"of the images are {results['between_halves_of_the_images']:.4f} apart.",
        "",
        *times_table(results),
        "",
        f"{results['verdict'][0].upper()}{results['verdict'][1:]}.",
        "",
        "![Kernel distance over seconds, a line a run](../images/time-to-quality.png)",
        "",
    ]


def times_table(results: dict[str, Any]) -> list[str]:
    """Seconds to the target and steps of each arm, a row a seed."""
    runs = results["times"]
    arms = sorted(dict.fromkeys(run["arm"] for run in runs), key=lambda arm: (arm != "PyTorch", len(arm)))
    rows = []
    for seed in dict.fromkeys(run["seed"] for run in runs):
        cells_of_seed: list[str] = [str(seed)]
        for arm in arms:
            run = next(run for run in runs if (run["seed"], run["arm"]) == (seed, arm))
            seconds = run["seconds to the target"]
            took = f"above {results['limit']:g}" if seconds is None else f"{seconds:.1f}"
            cells_of_seed += [took, f"{run['steps']:,}"]
        rows.append(tuple(cells_of_seed))
    return table(("seed", *(head for arm in arms for head in (f"{arm}, s", "steps"))), rows)


KINDS = {  # kind -> (the key that only its files have, title, body)
    "bench": ("cases", "Every op and step", ops_page),
    "stylegan": ("stylegan", "StyleGAN's ops", stylegan_page),
    "scaling": ("points", "The step over batch, image side and threads", scaling_page),
    "first-step": ("first_steps", "The first step, cold", first_step_page),
    "chains": ("chains", "Chains of layers as programs", chains_page),
    "recipes": ("recipes", "Steps beyond single images", recipes_page),
    "models": ("models", "Other people's networks", models_page),
    "quality": ("frechet", "Quality over seeds", quality_page),
    "time-to-quality": ("times", "Time to the same quality", times_page),
}


def newest(folder: Path) -> dict[tuple[str, str], tuple[Path, dict[str, Any]]]:
    """(kind, machine) -> the file and contents of its newest results."""
    found: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text())
        for kind, (key, _, _) in KINDS.items():
            if key in results and "machine" in results:
                name = kind, facts.slug(results["machine"])
                if name not in found or found[name][1]["machine"]["date"] < results["machine"]["date"]:
                    found[name] = path, results
    return found


def pages(folder: Path = RESULTS) -> dict[str, str]:
    """File name -> text of every page: one for each kind and machine."""
    return {f"{kind}-{slug}.md": page(kind, *found) for (kind, slug), found in newest(folder).items()}


def page(kind: str, path: Path, results: dict[str, Any]) -> str:
    """One page: its title, the machine, the body."""
    _, heading, body = KINDS[kind]
    machine = results["machine"]
    lines = [
        f"# {heading}: {machine['cpu']}, {machine['cores']} cores, {machine['kernels']}",
        "",
        f"<!-- Written by `make evidence` from benchmarks/results/{path.name}. Do not edit. -->",
        "",
        *(f"- {line}" for line in machine_lines(results)),
        f"- made from `benchmarks/results/{path.name}` by `make evidence`",
        "",
        *body(results),
    ]
    return "\n".join(lines).rstrip() + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, text_last: bool = False) -> list[str]:
    """A Markdown table: the first column is text, the others are numbers (the last too unless `text_last`)."""
    aligned = ["---", *["---:"] * (len(header) - 1 - text_last), *["---"] * text_last]
    return [_line(header), _line(aligned), *map(_line, rows)]


def _line(parts: Iterable[str]) -> str:
    return "| " + " | ".join(part.replace("|", "\\|") for part in parts) + " |"


# ---- the headlines --------------------------------------------------------------------------------------------------


def measured(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The newest results of `make bench` of each machine."""
    return [results for (kind, _), (_, results) in newest(folder).items() if kind == "bench"]


def headline_rows(results: dict[str, Any]) -> dict[str, tuple[float, dict[str, Any]]]:
    """What -> (seconds of PyTorch's best row, fastgan's row) for those of HEADLINES that were measured."""
    found = {}
    for case in results["cases"]:
        seconds = {row["row"]: row["median_s"] for row in case["rows"]}
        for row in case["rows"]:
            what = HEADLINES.get((case["op"], case["shape"], case["direction"], row["row"]))
            if what and row["speedup"] is not None:
                found[what] = seconds[row["best_pytorch"]], row
    return {what: found[what] for what in HEADLINES.values() if what in found}


def headlines(all_results: list[dict[str, Any]]) -> list[str]:
    """A table a machine, its instruction sets side by side, at batch 64 unless it is one image.

    A cell is how many times as fast as PyTorch's best row fastgan is, and the milliseconds of both. A machine on which
    no row of HEADLINES was measured has no table.
    """
    lines = []
    for cores, cpu in dict.fromkeys((r["machine"]["cores"], r["machine"]["cpu"]) for r in all_results):
        here = [r for r in all_results if (r["machine"]["cores"], r["machine"]["cpu"]) == (cores, cpu)]
        sets = {r["machine"]["kernels"]: headline_rows(r) for r in sorted(here, key=order) if headline_rows(r)}
        rows = [what for what in HEADLINES.values() if any(what in found for found in sets.values())]
        if not rows:
            continue
        header = (f"{cores} cores of {cpu}: times as fast (PyTorch's best, fastgan, ms)", *sets)
        lines += [*table(header, ((what, *(headline(s.get(what)) for s in sets.values())) for what in rows)), ""]
        refused = {k: v for r in here for k, v in r["machine"].get("tables", {}).items() if v}
        for why in dict.fromkeys(refused.values()):
            names = ", ".join(name for name, reason in refused.items() if reason == why)
            lines += [f"No column for {names}, not found on this machine: {why}.\n"]
    return lines


def overview(all_results: list[dict[str, Any]]) -> list[str]:
    """The headlines in one table: a column a machine, with the newest of its instruction sets; ratios alone."""
    newest_set: dict[tuple[int, str], dict[str, Any]] = {}
    for results in sorted(all_results, key=order):
        if headline_rows(results):
            newest_set[results["machine"]["cores"], results["machine"]["cpu"]] = results
    columns = [newest_set[machine] for machine in sorted(newest_set, key=lambda machine: machine[1])]
    if not columns:
        return []
    found = [headline_rows(results) for results in columns]
    shown = [what for what in HEADLINES.values() if any(what in rows for rows in found)]
    ratio = lambda rows, what: f"{rows[what][1]['speedup']:.2f}" if what in rows else "-"
    names = [f"{r['machine']['cores']} cores of {r['machine']['cpu']}, {r['machine']['kernels']}" for r in columns]
    header = ("times as fast as PyTorch's best", *names)
    return [*table(header, ((what, *(ratio(rows, what) for rows in found)) for what in shown)), ""]


def newest_times(folder: Path = RESULTS) -> list[str]:
    """`times_table` of the machine that was measured last: the picture beside it is of that one, too."""
    found = [results for (kind, _), (_, results) in newest(folder).items() if kind == "time-to-quality"]
    return times_table(max(found, key=lambda results: results["machine"]["date"])) if found else []


def showing() -> dict[Path, str]:
    """The texts of the pages that show tables of several results."""
    found = measured()
    readme = put(put(README.read_text(), overview(found)), newest_times(), TIMES)
    return {README: readme, PERFORMANCE: put(PERFORMANCE.read_text(), headlines(found))}


def order(results: dict[str, Any]) -> int:
    """From the oldest instruction set to the newest, as the kernels' tables are listed."""
    names = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]
    return names.index(results["machine"]["kernels"]) if results["machine"]["kernels"] in names else len(names)


def headline(found: tuple[float, dict[str, Any]] | None) -> str:
    """A cell of the headlines; "-" is what was not measured with these kernels."""
    if found is None:
        return "-"
    theirs, ours = found
    return f"{ours['speedup']:.2f} ({milliseconds(theirs)}, {milliseconds(ours['median_s'])})"


def put(text_of_page: str, lines: list[str], markers: tuple[str, str] = HEADLINE_MARKERS) -> str:
    """A page's text with `lines` between two marker lines. Raises ValueError where it does not have both once."""
    begin, end = markers
    if text_of_page.count(begin) != 1 or text_of_page.count(end) != 1:
        raise ValueError(f"report: the page must have the line {begin!r} once and then {end!r} once; add them")
    before, _, rest = text_of_page.partition(begin)
    return "\n".join([before + begin, *lines]).rstrip() + "\n" + end + rest.partition(end)[2]


def draw(results: dict[str, Any], path: Path) -> None:
    """Bars of the headlines' ratios. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = list(headline_rows(results).items())[::-1]
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(rows) + 1), layout="constrained")
    ratios = [ours["speedup"] for _, (_, ours) in rows]
    bars = axes.barh([what for what, _ in rows], ratios, color=["#3f6fb5" if r >= 1 else "#c0504d" for r in ratios])
    axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=3)
    axes.axvline(1, color="black", linewidth=1)
    machine = results["machine"]
    axes.set_xlabel(
        f"times as fast as PyTorch's best\n{machine['cores']} cores of {machine['cpu']}, {machine['kernels']}"
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, bbox_inches="tight")  # a CPU's name may be longer than the axis
    pyplot.close(figure)


def main(arguments: list[str]) -> int:
    if len(arguments) > 1:
        print(f"usage: {Path(__file__).name} [RESULTS.json]", file=sys.stderr)
        return 2
    if arguments:
        print("\n".join(text(json.loads(Path(arguments[0]).read_text()))))
        return 0
    written = {PAGES / name: text_of_page for name, text_of_page in pages().items()}
    written |= showing()
    for page, text_of_page in written.items():
        page.write_text(text_of_page)
        print(f"written: {page.relative_to(ROOT)}")
    for results in measured():
        if headline_rows(results):
            draw(results, ROOT / "docs" / "images" / f"speed-{facts.slug(results['machine'])}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
