"""Benchmarks under pytest: one test a row, the rows of a case timed interleaved, tables and JSON at the end.

pytest-benchmark times one test after another, which is what an interleaved comparison must not do. So the first test of
a case times all of its rows in turns; each row's test then replays its samples through the `benchmark` fixture (a timer
that reads a clock which the samples advance), so that --benchmark-json, --benchmark-compare and --benchmark-group-by
work on the real numbers. Our own tables replace pytest-benchmark's, which --benchmark-verbose brings back.
"""

import json
import os
import shlex
import sys
import tempfile
from pathlib import Path

os.environ["FASTGAN_CACHE"] = tempfile.mkdtemp(prefix="fastgan-benchmarks-")  # races are run anew, for this build
os.environ.pop("FASTGAN_BACKEND", None)
sys.path.insert(0, str(Path(__file__).parent))  # pytest runs with --import-mode=importlib, which adds no folder

import ceilings
import facts
import pytest
import report
import torch

from fastgan.benchmarking import comparison, table
from fastgan.training import precision

# As errors these would fail rows, or lose the results of a run that is interrupted.
HARMLESS_WARNINGS = (
    ".torch.jit.script_method. is deprecated:DeprecationWarning",  # importing inductor defines such a class
    "The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning",  # dynamo looks at D's input, G's output
    "Benchmark fixture was not used at all",  # by a row that has no samples
)


def pytest_addoption(parser):
    group = parser.getgroup("fastgan")
    group.addoption(
        "--fastgan-json",
        metavar="FILE",
        help="write all rows as JSON; a folder gets a file named after the machine and the commit. "
        "To a file of the same machine and commit the cases are added: a long run can be taken in pieces",
    )
    group.addoption(
        "--fastgan-effort",
        metavar="FACTOR",
        type=float,
        default=1.0,
        help="multiplies the seconds given to each case; 0.1 for a quick look",
    )
    group.addoption(
        "--table",
        metavar="TABLE",
        help="hold fastgan and PyTorch to one instruction set: portable, avx2, avx512, avx512_bf16 or amx",
    )
    group.addoption(
        "--bf16",
        action="store_true",
        help="rows in bfloat16 on a CPU without instructions for it, too; there each takes 3 times float32's time",
    )


def command(arguments):
    """The command of this run as it may be repeated from the checkout, whose own place is not in it."""
    return shlex.join(["pytest", *(str(a).replace(f"{facts.ROOT}/", "") for a in arguments)])


def pytest_configure(config):
    wanted = config.getoption("--table")
    if wanted:
        try:
            table.hold(wanted, config.pluginmanager.getplugin("capturemanager").suspend_global_capture)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error
    config.option.benchmark_quiet = True
    config.addinivalue_line("python_files", "bench_*.py")
    for warning in HARMLESS_WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:{warning}")
    config.stash[RESULTS] = {"cases": []}


def pytest_collection_modifyitems(items):
    for item in items:
        if "compare" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK.read))


RESULTS = pytest.StashKey[dict]()


class ReplayClock:
    """A clock that only samples advance."""

    def __init__(self):
        self.now = 0.0

    def read(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


CLOCK = ReplayClock()


@pytest.fixture(scope="session")
def session_facts(request):
    """Measures the ceilings and notes what the numbers depend on, before the first case."""
    results = request.config.stash[RESULTS]
    results["machine"] = facts.gather(command(request.config.invocation_params.args))
    try:
        found = ceilings.measure(torch.get_num_threads(), request.config.getoption("--table"))
        results["ceilings"] = found.raw
    except ceilings.Unavailable as error:
        found, results["ceilings"] = None, {"unavailable": str(error)}
    yield found
    results["machine"]["load_after"] = facts.load()


@pytest.fixture
def compare(request, benchmark, session_facts):
    """compare(case, row, runners): time the case's rows (once), then report this row's samples.

    case: a `comparison.Case`. runners: case -> {row: Runner}. Rows that no selected test asks for are not run.
    """

    # On a Cascade Lake the step of DCGAN-64 with its rows in bfloat16 had not ended after four minutes.
    lacking = "" if request.config.getoption("--bf16") else precision.lacks_bf16()
    slow = lambda case, row: lacking and (case.dtype == "bfloat16" or row.endswith("-bf16"))

    def run(case, row, runners, seconds=0.8):
        if slow(case, row):
            pytest.skip(f"{lacking}; --bf16 times it all the same")
        function = request.node.function
        key = case.op, str(case)
        results = request.config.stash[RESULTS]["cases"]
        found = next((c for c in results if (c["op"], c["id"]) == key), None)
        if found is None:
            asked = [item.callspec.params["row"] for item in request.session.items if same_case(item, function, case)]
            torch.manual_seed(0)
            found = {
                "op": case.op,
                "id": str(case),
                "shape": case.shape,
                "direction": case.direction,
                "dtype": case.dtype,
                "rows": comparison.measure(
                    comparison.wanted(runners(case), [name for name in asked if not slow(case, name)]),
                    seconds=seconds * request.config.getoption("--fastgan-effort"),
                    ceilings=session_facts,
                ),
            }
            results.append(found)
        replay(benchmark, f"{case.op} {case}", next(r for r in found["rows"] if r["row"] == row))

    return run


def same_case(item, function, case):
    return getattr(item, "function", None) is function and item.callspec.params["case"] == case


def replay(benchmark, group, row):
    """Hand a row's samples to pytest-benchmark; one without fails (ours) or is skipped (PyTorch's), with its reason."""
    if row["failed"]:
        (pytest.fail if row["ours"] else pytest.skip)(f"{row['row']}: {row['failed']}")
    benchmark.group = group
    benchmark.extra_info.update({k: v for k, v in row.items() if k not in ("samples_s", "failed")})
    samples = iter(row["samples_s"])
    benchmark.pedantic(lambda: CLOCK.advance(next(samples)), rounds=len(row["samples_s"]))


def pytest_terminal_summary(terminalreporter, config):
    results = config.stash[RESULTS]
    if not results["cases"]:
        return
    terminalreporter.section("fastgan against PyTorch")
    for line in report.text(results):
        terminalreporter.write_line(line)
    path = config.getoption("--fastgan-json")
    if path:
        path = destination(Path(path), results["machine"])
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            results = together(json.loads(path.read_text()), results)
        path.write_text(json.dumps(results, indent=1) + "\n")
        terminalreporter.write_line(f"written: {path}")


def together(before, now):
    """The results of two runs: the later one's facts, and its rows of a case that both have.

    Raises ValueError where the two are of different machines or commits, which no file may mix.
    """
    old, new = ((facts.slug(r["machine"]), r["machine"]["commit"]) for r in (before, now))
    if old != new:
        raise ValueError(f"--fastgan-json: a file is added to by the machine and commit of its rows {old}, got {new}")
    taken = {(case["op"], case["id"]) for case in now["cases"]}
    cases = [case for case in before["cases"] if (case["op"], case["id"]) not in taken]
    machine = {**now["machine"], "command": f"{before['machine']['command']}; {now['machine']['command']}"}
    loads = [r["machine"]["load_before"] for r in (before, now)]
    machine["load_before"] = max((load for load in loads if load is not None), default=None)
    return {**now, "machine": machine, "cases": [*cases, *now["cases"]]}


def destination(path, found):
    """The file itself, or <machine>-<commit>.json in a folder."""
    if path.suffix == ".json" and not path.is_dir():
        return path
    return path / facts.file_name(found)
