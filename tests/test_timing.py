"""The benchmarks' runner, records and tables, on a stopwatch that does not wait."""

import json
import sys
from pathlib import Path

import pytest
import torch

import fastgan
from fastgan.benchmarking import comparison, timing

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
WHY = "installed without the source tree's benchmarks"
ceilings = pytest.importorskip("ceilings", reason=WHY)
quality = pytest.importorskip("quality", reason=WHY)
report = pytest.importorskip("report", reason=WHY)
scaling = pytest.importorskip("scaling", reason=WHY)


class Watch:
    """Answers with the seconds a call that a runner names, and remembers who was called."""

    def __init__(self, **seconds):
        self.seconds, self.calls = seconds, []

    def runners(self):
        return {name: (lambda name=name: name) for name in self.seconds}

    def __call__(self, run, iterations):
        name = run()
        self.calls.append((name, iterations))
        value = self.seconds[name]
        if isinstance(value, list):
            value = value.pop(0) if len(value) > 1 else value[0]
        return value * iterations


def test_rounds_take_turns_and_each_starts_with_another():
    watch = Watch(a=0.1, b=0.2, c=0.3)
    timings = timing.interleave(watch.runners(), seconds=3.5, stopwatch=watch)
    order = [name for name, _ in watch.calls][6:]  # after two warm-up calls each
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(rounds) == 6  # of 0.6 s
    assert rounds[:4] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
    assert [len(t.samples) for t in timings.values()] == [6, 6, 6]


def test_rounds_are_bounded_on_both_sides():
    assert len(timing.interleave(Watch(a=9.0).runners(), seconds=1, stopwatch=Watch(a=9.0))["a"].samples) == 5
    watch = Watch(a=0.02)
    assert len(timing.interleave(watch.runners(), seconds=1e3, stopwatch=watch)["a"].samples) == timing.MAX_ROUNDS


def test_quick_calls_are_sampled_many_at_a_time():
    watch = Watch(quick=1e-4, slow=0.5)
    timings = timing.interleave(watch.runners(), seconds=1, stopwatch=watch)
    assert timings["quick"].iterations == 100 and timings["slow"].iterations == 1
    assert timings["quick"].median == pytest.approx(1e-4)


def test_the_first_call_is_kept_apart():
    watch = Watch(compiled=[7.0, 0.1])
    t = timing.interleave(watch.runners(), stopwatch=watch)["compiled"]
    assert t.first_call == 7.0 and t.median == pytest.approx(0.1)


def test_statistics():
    t = timing.Timing(samples=[5.0, 1.0, 2.0, 4.0, 3.0])
    assert (t.median, t.min, t.quartiles) == (3.0, 1.0, (2.0, 4.0))
    assert timing.Timing(samples=[2.0]).quartiles == (2.0, 2.0)


def test_ratios_are_the_baseline_over_each():
    timings = {n: timing.Timing(samples=[s]) for n, s in (("base", 2.0), ("fast", 1.0), ("slow", 4.0))}
    timings["broken"] = timing.Timing(failed="no")
    assert timing.ratios(timings, "base") == {"base": 1.0, "fast": 2.0, "slow": 0.5, "broken": None}
    assert set(timing.ratios(timings, "broken").values()) == {None}


def fail_at(call):
    calls = iter(range(1000))

    def run():
        if next(calls) >= call:
            raise ValueError("\nno such kernel\nat line 3")

    return run


@pytest.mark.parametrize("call", [0, 4], ids=["first call", "in a round"])
def test_a_failing_runner_is_reported_and_the_others_go_on(call):
    watch = Watch(good=0.1)
    runners = {"bad": fail_at(call), "good": lambda: "good"}

    def stopwatch(run, iterations):
        return watch(run, iterations) if run is runners["good"] else run() or 0.1

    timings = timing.interleave(runners, seconds=2, stopwatch=stopwatch)
    assert list(timings) == ["bad", "good"]
    assert timings["bad"].failed == "ValueError: no such kernel" and not timings["bad"].samples
    assert len(timings["good"].samples) >= 5 and not timings["good"].failed


def test_the_highest_running_sum():
    assert timing.highest(iter([4, -4, 3, 2, -5])) == 5
    assert timing.highest(iter([-4, 2])) == 0


def test_peak_memory_counts_what_is_live_at_once():
    def run():
        a = torch.empty(1000, dtype=torch.float32)
        del a
        return torch.empty(500, dtype=torch.float32) + torch.empty(500, dtype=torch.float32)

    assert timing.peak_memory(run) == 6000


RAW = {
    "fp32_gflops": 100.0,
    "bf16_avx512_gflops": 200.0,
    "memory": [
        {"mib": 1, "copy_gbs": 80.0, "triad_gbs": 70.0},
        {"mib": 64, "copy_gbs": 20.0, "triad_gbs": 25.0},
        {"mib": 256, "copy_gbs": 26.0, "triad_gbs": 10.0},
    ],
}
CEILINGS = ceilings.read({"2": RAW}, 2)


def test_ceilings_are_optimistic_between_footprints():
    assert CEILINGS.gflops == {"float32": 100.0, "bfloat16": 200.0}
    assert CEILINGS.bytes_per_second(1000) == 80e9
    assert CEILINGS.bytes_per_second(63 << 20) == 80e9
    assert CEILINGS.bytes_per_second(64 << 20) == 26e9  # a larger footprint was quicker: noise, and still reachable


def test_a_bound_is_the_greater_of_arithmetic_and_memory_piece_by_piece():
    work = [{"flops": 10**9, "bytes": 8}, {"flops": 1, "bytes": 8 * 10**5}]
    assert CEILINGS.bound(work, "float32") == pytest.approx(1e-2 + 1e-5)
    assert CEILINGS.bound(work, "bfloat16") == pytest.approx(5e-3 + 1e-5)


def test_without_a_compiler_the_ceilings_say_so(monkeypatch):
    monkeypatch.setattr(ceilings.shutil, "which", lambda name: None)
    with pytest.raises(ceilings.Unavailable, match=r"a C\+\+ compiler must be on PATH, got none"):
        ceilings.measure(1)


def test_ceilings_refuse_an_unknown_table():
    with pytest.raises(ceilings.Unavailable, match=r"table must be portable, avx2, .* got sse9"):
        ceilings.measure(1, "sse9")


def records(**seconds):
    watch = Watch(**seconds)
    work = [{"flops": 10**9, "bytes": 1000}]
    runners = {
        name: comparison.Runner(
            run, work, "bfloat16" if "bf16" in name else "float32", ours="fastgan" in name, pytorch="other" not in name
        )
        for name, run in watch.runners().items()
    }
    runners["compile"] = comparison.Runner(fail_at(0), work)

    def stopwatch(run, iterations):
        return run() if run is runners["compile"].run else watch(run, iterations)

    return comparison.measure(runners, seconds=1, ceilings=CEILINGS, stopwatch=stopwatch, peak=lambda run, device: 42)


def test_records_compare_within_a_dtype_and_keep_losing_and_failing_rows():
    rows = {r["row"]: r for r in records(eager=0.4, tuned=0.2, tuned_bf16=0.1, fastgan=0.25, fastgan_bf16=0.05)}
    assert list(rows) == ["eager", "tuned", "tuned_bf16", "fastgan", "fastgan_bf16", "compile"]
    assert rows["fastgan"]["best_pytorch"] == "tuned" and rows["fastgan"]["speedup"] == pytest.approx(0.8)
    assert rows["fastgan_bf16"]["best_pytorch"] == "tuned_bf16" and rows["fastgan_bf16"]["speedup"] == pytest.approx(2)
    assert rows["eager"]["share_of_bound"] == pytest.approx(0.01 / 0.4) and rows["eager"]["peak_bytes"] == 42
    assert rows["compile"]["failed"] == "ValueError: no such kernel" and rows["compile"]["median_s"] is None
    keys = {"row", "ours", "dtype", "failed", "rounds", "median_s", "min_s", "q1_s", "q3_s", "samples_s", "peak_bytes"}
    keys |= {"flops", "bytes", "bound_s", "share_of_bound", "best_pytorch", "speedup", "backends", "first_call_s"}
    assert all(keys <= set(row) for row in rows.values())
    json.dumps(list(rows.values()))


def test_another_library_is_compared_with_pytorch_and_is_not_its_best_row():
    rows = {r["row"]: r for r in records(eager=0.2, other=0.1, fastgan=0.05)}
    assert rows["fastgan"]["best_pytorch"] == rows["other"]["best_pytorch"] == "eager"
    assert rows["other"]["speedup"] == pytest.approx(2) and rows["other"]["peak_bytes"] is None
    assert report.versus(rows["other"]) == "2.00" and report.cells(rows["other"])[6] == "-"


def test_a_row_without_a_runner_is_refused():
    with pytest.raises(KeyError, match="got none for fastgan"):
        comparison.wanted({"eager": comparison.Runner(int)}, ["eager", "fastgan"])


def results():
    machine = dict(cpu="C", threads=2, cores=2, device="cpu", kernels="k", torch="t", fastgan="f", commit="abc")
    machine |= dict(dirty=True, python="3", os="o", date="d", load_before=0.1, load_after=0.2, command="pytest")
    case = dict(op="conv2d", id="i", shape="s", direction="forward", dtype="float32")
    return {"machine": machine, "ceilings": RAW, "cases": [{**case, "rows": records(eager=0.2, fastgan=0.25)}]}


def test_tables_show_losses_failures_and_the_machine():
    lines = "\n".join(report.text(results()))
    assert "0.80 (slower)" in lines and "ValueError: no such kernel" in lines
    assert "commit abc with uncommitted changes" in lines and "bf16_avx512 200 GFLOP/s" in lines
    assert "fastgan: 0 of 1 at least as fast" in lines
    page = report.page("bench", report.RESULTS / "r.json", results())
    assert "| fastgan | 250 |" in page and "(slower)" in page and "ValueError: no such kernel" in page


def test_the_evidence_pages_are_what_the_committed_results_make():
    """`make evidence` was run after the last measurement, and nobody typed a number."""
    for name, text in report.pages().items():
        assert (report.PAGES / name).read_text() == text, f"docs/evidence/{name} is old: make evidence"
    for page, text in report.showing().items():
        assert page.read_text() == text, f"{page} is old: make evidence"


def test_a_machine_without_a_headline_has_no_lines():
    facts = {"cores": 2, "cpu": "C", "kernels": "avx2", "tables": {"amx": "the CPU has no AMX"}}
    for lines in (report.headlines, report.overview):
        assert lines([{"machine": facts, "cases": []}]) == []


def test_the_overview_has_each_machine_with_its_newest_instructions():
    found = []
    for cpu, kernels, speedup in (("B", "avx512", 2.0), ("A", "avx2", 1.5), ("B", "avx2", 1.0), ("C", "avx512", None)):
        rows = [{"row": "eager", "median_s": 1.0}, {"row": "fastgan", "median_s": 0.5, "speedup": speedup}]
        case = {"op": "step", "shape": "dcgan-64", "direction": "batch64", "best_pytorch": "eager"}
        for row in rows:
            row |= {"best_pytorch": "eager", "speedup": row.get("speedup")}
        found.append({"machine": {"cores": 2, "cpu": cpu, "kernels": kernels}, "cases": [case | {"rows": rows}]})
    header, _, row, *_ = report.overview(found)
    assert "| 2 cores of A, avx2 | 2 cores of B, avx512 |" in header and "cores of C" not in header
    assert row.startswith("| training step of DCGAN-64, float32 | 1.50 | 2.00 |")


@pytest.mark.parametrize("markers", [report.HEADLINE_MARKERS, report.TIMES])
def test_tables_need_their_markers(markers):
    begin, end = markers
    new = report.put(f"# T\n\n{begin}\nold\n{end}\n\nafter\n", ["| new |", ""], markers)
    assert new == f"# T\n\n{begin}\n| new |\n{end}\n\nafter\n"
    with pytest.raises(ValueError, match=r"the page must have the line '<!-- "):
        report.put("# T\n", [], markers)


def test_readme_has_the_newest_time_to_quality(tmp_path):
    assert report.newest_times(tmp_path) == []
    for machine, date, seconds in (("a", "2026-01-02", 9.0), ("b", "2026-01-01", 8.0)):
        runs = [
            {"arm": arm, "seed": 0, "seconds to the target": s, "steps": 1000, "share of evaluation": 0.1}
            for arm, s in (("fastgan", seconds), ("PyTorch", None))
        ]
        machine = {"cpu": machine, "cores": 2, "threads": 2, "kernels": "avx2", "date": date}
        (tmp_path / f"{date}.json").write_text(json.dumps({"times": runs, "limit": 60, "machine": machine}))
    assert report.newest_times(tmp_path) == [
        "| seed | PyTorch, s | steps | fastgan, s | steps |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| 0 | above 60 | 1,000 | 9.0 | 1,000 |",
    ]


def test_the_newest_results_of_a_machine_make_its_page(tmp_path):
    for day, speed in (("2026-01-02", 0.1), ("2026-01-01", 0.4)):
        newer = results()
        newer["machine"]["date"] = day
        newer["cases"][0]["rows"] = records(eager=0.2, fastgan=speed)
        (tmp_path / f"{day}.json").write_text(json.dumps(newer))
    pages = report.pages(tmp_path)
    assert list(pages) == ["bench-c-k-x2.md"] and "2026-01-02.json" in pages["bench-c-k-x2.md"]
    assert "| fastgan | 100 |" in pages["bench-c-k-x2.md"]


def test_stylegans_ops_have_a_page_of_their_own(tmp_path):
    found = {"machine": results()["machine"], "stylegan": [{"what": "w", "ms": {"fastgan": 2.0, "torch": 3.0}}]}
    (tmp_path / "all.json").write_text(json.dumps(results()))
    (tmp_path / "some.json").write_text(json.dumps(found))
    pages = report.pages(tmp_path)
    assert list(pages) == ["bench-c-k-x2.md", "stylegan-c-k-x2.md"]
    assert "| w | 2 | 3 | 1.50 | - |" in pages["stylegan-c-k-x2.md"]


def test_results_without_ceilings_say_why():
    without = results() | {"ceilings": {"unavailable": "no compiler"}}
    assert "no bounds: no compiler" in "\n".join(report.text(without))


# ---- scaling --------------------------------------------------------------------------------------------------------


def point(batch, rate, threads=2, size=64, **rows):
    rates = dict.fromkeys(scaling.ROWS, rate) | rows
    samples = {name: [batch / r] * 3 if r else [] for name, r in rates.items()}
    coordinates = {"threads": threads, "size": size, "batch": batch}
    return coordinates | {"images_per_second": rates, "samples_s": samples}


def test_a_cliff_is_a_drop_of_more_than_a_quarter_against_the_next_smaller_batch():
    points = [
        point(64, 74.0),
        point(1, 10.0),
        point(16, 90.0, fastgan=100.0),
        point(32, 75.0),
        point(16, 9.0, threads=1),
    ]
    points[3]["images_per_second"]["PyTorch"] = None  # it failed: its neighbours are 16 and 64
    assert scaling.cliffs([*points, point(64, 1.0, size=32)]) == []
    points[0]["images_per_second"] |= {"fastgan": 56.0, "PyTorch": 50.0}
    assert scaling.cliffs(points) == [
        "PyTorch, 2 threads: batch 64 is 44 % slower an image than batch 16",
        "fastgan, 2 threads: batch 64 is 25 % slower an image than batch 32",
    ]
    assert scaling.curve(points, "fastgan", "batch", threads=2, size=64)[0] == (1, 10.0)


def test_points_that_do_not_fit_are_foreseen_and_all_are_asked_for():
    assert scaling.expected([], 2, 64, 512) == 0
    assert scaling.expected([point(64, 100.0)], 1, 64, 128) == pytest.approx(4 * 1.28 * 2 * (scaling.ROUNDS + 2))
    assert {b for threads, size, b in scaling.points() if (threads, size) == (2, 64)} == {2**i for i in range(10)}
    assert {(t, size) for t, size, _ in scaling.points()} == {(t, size) for t in (1, 2) for size in (32, 64, 128)}


def test_the_picture_is_drawn_from_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install matplotlib)")
    facts = {"cpu": "C", "cores": 2, "torch": "t", "commit": "abc"}
    points = [point(b, 10.0 * b, threads=t, size=s) for b in (1, 64) for t in (1, 2) for s in (32, 64)]
    points[0]["images_per_second"]["fastgan"] = None
    scaling.draw({"machine": facts, "points": points}, tmp_path / "new" / "scaling.png")
    assert (tmp_path / "new" / "scaling.png").read_bytes().startswith(b"\x89PNG")


# ---- quality --------------------------------------------------------------------------------------------------------


def test_the_frechet_distance_of_two_gaussians():
    diagonal = [torch.diag(torch.tensor(v, dtype=torch.float64)) for v in ([1.0, 4.0, 0.0], [9.0, 1.0, 0.0])]
    a, b = (torch.zeros(3).double(), diagonal[0]), (torch.tensor([0.0, 3.0, 4.0]).double(), diagonal[1])
    assert quality.frechet(a, b) == pytest.approx(25 + (1 - 3) ** 2 + (2 - 1) ** 2)
    assert quality.frechet(a, a) == pytest.approx(0, abs=1e-9)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    turned = [(turn @ mean, turn @ cov @ turn.T) for mean, cov in (a, b)]
    assert quality.frechet(*turned) == pytest.approx(30)


def test_the_permutation_test_counts_splits():
    assert quality.permutation_p([1.0, 2.0, 3.0], [11.0, 12.0, 13.0]) == pytest.approx(2 / 20)
    assert quality.permutation_p([1.0, 1.0], [1.0, 1.0]) == 1
    apart = quality.verdict({"a": [1.0, 1.1, 1.2, 1.3, 1.4], "b": [2.0, 2.1, 2.2, 2.3, 2.4]})
    assert not apart["within_spread"] and "NOT within" in apart["sentence"] and apart["difference"] == pytest.approx(1)
    mixed = quality.verdict({"a": [1.0, 1.2, 1.4, 1.6, 1.8], "b": [1.1, 1.3, 1.5, 1.7, 1.9]})
    assert mixed["within_spread"] and mixed["by_seed"] == pytest.approx([0.1] * 5)


def test_both_arms_train_plain_generators(tmp_path):
    images = fastgan.data.ImageSet(torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8))
    with fastgan.racing(False):
        made = [train(images, 0, 1) for train in quality.ARMS.values()]
    assert all(type(m).__module__.startswith(("torch", "fastgan.models")) for g in made for m in g.modules())
    weights = [g.main[0].weight for g in made]  # one step from the same start
    assert (weights[0] - weights[1]).norm() < 0.05 * weights[0].norm()
    quality.side_by_side([torch.zeros(64, 1, 28, 28), torch.ones(64, 1, 28, 28)], tmp_path / "q.png")
    assert (tmp_path / "q.png").exists()
