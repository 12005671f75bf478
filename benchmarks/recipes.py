"""Training steps of recipes beyond single images, each beside PyTorch's eager rows, in one file of results.

    fastgan bench step --recipe chargan --against eager,eager-channels_last --seconds 8 --json chargan.json
    python benchmarks/recipes.py chargan.json wavegan.json    # those files into one of benchmarks/results

The page is made from it by `make evidence`. Recipes that the file has already and that are not given again stay.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import facts

RESULTS = Path(__file__).resolve().parent / "results"


def main(paths: list[str]) -> None:
    """Merge the files of `fastgan bench --json`; the commit is the one that is checked out now. Folders' names go."""
    found = [json.loads(re.sub(r"--json [^ \"]*/", "--json ", Path(path).read_text())) for path in paths]
    files = " ".join(Path(path).name for path in paths)
    machine = found[-1]["machine"] | facts.source() | {"command": f"python benchmarks/recipes.py {files}"}
    out = RESULTS / f"recipes-{facts.slug(machine)}.json"
    kept = json.loads(out.read_text())["recipes"] if out.exists() else []
    new = [{"machine": one["machine"] | facts.source(), "case": case} for one in found for case in one["cases"]]
    names = {row["case"]["id"] for row in new}
    rows = sorted((*(row for row in kept if row["case"]["id"] not in names), *new), key=lambda row: row["case"]["id"])
    out.write_text(json.dumps({"machine": machine, "recipes": rows}, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main(sys.argv[1:])
