"""The first step of every recipe in a fresh process with a cold cache, beside PyTorch's first and warm step.

    python benchmarks/first_step.py                      # this machine's own instructions
    python benchmarks/first_step.py --table avx2         # both held to AVX2
    python benchmarks/first_step.py --table avx2 --recipes dcgan-64 --precisions bf16

Each figure is of a process of its own. Ours builds and converts the networks, then runs three steps on random samples;
PyTorch's is the textbook step of the same recipe in channels_last. A step of PyTorch beyond LIMIT is not repeated:
its first step stands for its warm one, and the row says so. The bound is 1.5 warm steps of PyTorch and 2 s.
Results go into one JSON a machine and table in benchmarks/results, row by row, so that the work can be done in parts;
benchmarks/report.py makes the page docs/evidence/first-step.md of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import facts
from report import cells_of_first_step as cells

from fastgan.training.recipes import recipes

LIMIT = 10.0  # seconds of a step of PyTorch beyond which it is not repeated
FORCED = {"avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}}  # PyTorch held to the same set

CHILD = """
import json, sys, time
import torch
import fastgan
from fastgan import models
from fastgan.benchmarking.textbook import textbook_step
from fastgan.choice import STATE, native
from fastgan.domains import domain_of
from fastgan.training.sampling import build_models
from fastgan.training.assembly import assemble

who, name, precision, table, limit = sys.argv[1:]
if table:
    native()[0].use_table(table)
recipe = fastgan.recipes()[name].replace(precision=precision)
domain = domain_of(recipe)
given = domain.inputs([domain.probe("cpu")] * recipe.d_steps)
if who == "ours":
    step = assemble(recipe, torch.device("cpu"))[2]
    run = lambda: step(*given)
else:
    torch.manual_seed(0)
    g, d = (m.to(memory_format=torch.channels_last) for m in build_models(recipe))
    rates = (g, recipe.g_lr), (d, recipe.d_lr)
    adams = [torch.optim.Adam(m.parameters(), lr=lr, betas=recipe.betas, fused=True) for m, lr in rates]
    step = textbook_step(recipe, g, d, *adams)
    run = lambda: step(*given)
times = []
while len(times) < 4 and (len(times) < 1 or sum(times) < float(limit)):
    begin = time.perf_counter()
    float(run()["g_loss"])
    times.append(time.perf_counter() - begin)
found = {"first_s": times[0], "warm_s": min(times[1:] or times), "steps": len(times)}
if who == "ours":
    found |= {"choosing_s": STATE.account.spent, "open": len(STATE.open), "verdicts": len(STATE.verdicts)}
found["table"] = native()[0].table()
print(json.dumps(found))
"""


def measured(who: str, recipe: str, precision: str, table: str) -> dict[str, Any]:
    """One process's figures, in seconds."""
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, **FORCED.get(table, {}), "FASTGAN_CACHE": cache}
        call = [sys.executable, "-W", "ignore", "-c", CHILD, who, recipe, precision, table, str(LIMIT)]
        done = subprocess.run(call, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"first_step: {who} {recipe} {precision} must run, got\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def row_of(recipe: str, precision: str, table: str) -> dict[str, Any]:
    """Ours beside PyTorch, and the bound."""
    theirs, ours = (measured(who, recipe, precision, table) for who in ("theirs", "ours"))
    bound = 1.5 * theirs["warm_s"] + 2
    row = {"recipe": recipe, "precision": precision, "ours": ours, "torch": theirs, "bound_s": bound}
    return {**row, "holds": ours["first_s"] <= bound}


def main() -> None:
    """Measure the rows asked for and put them into the machine's file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--table", default="", help="hold both to this table: avx2, avx512, portable")
    parser.add_argument("--recipes", nargs="*", default=list(recipes()))
    parser.add_argument("--precisions", nargs="*", default=["fp32", "bf16"])
    args = parser.parse_args()
    machine = facts.gather("python " + " ".join(sys.argv))
    machine["kernels"] = args.table or machine["kernels"]
    path = facts.ROOT / "benchmarks" / "results" / f"first-step-{facts.slug(machine)}.json"
    rows = json.loads(path.read_text())["first_steps"] if path.exists() else []
    found = {(row["recipe"], row["precision"]): row for row in rows}
    for recipe in args.recipes:
        for precision in args.precisions:
            found[recipe, precision] = row = row_of(recipe, precision, args.table)
            print(*cells(row), sep="  ", flush=True)
            results = {"machine": {**machine, "load_after": facts.load()}, "first_steps": list(found.values())}
            path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
