"""fastgan profile: its numbers are consistent with each other, with cost() and with the wall clock."""

import json

import numpy as np
import pytest
import torch

import fastgan
from fastgan import _op
from fastgan._op import OPS, around
from fastgan.cli import main
from fastgan.ops import bn_act, conv2d
from fastgan.profiling import ceilings, cost_of, gaps, op_ranges, profile

SMALL = ["--set=model_options.g_width=2", "--set=model_options.d_width=2", "--batch-size=4", "--device=cpu"]
LIMITS = {"bytes_per_second": 1e9, "flops_per_second": 1e9, "how": "given"}


@pytest.fixture(autouse=True)
def reference():
    with fastgan.backend("reference"):
        yield


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(profile, its trace) of three small steps."""
    trace = tmp_path_factory.mktemp("profile") / "trace.json"
    recipe = fastgan.recipes()["dcgan-28"].replace(batch_size=4, model_options={"g_width": 2, "d_width": 2})
    with fastgan.backend("reference"):
        return profile(recipe, steps=3, trace=trace, limits=LIMITS), trace


def test_rows_part_the_wall_time(found):
    result, _ = found
    total = sum(row["ms"] for row in result["rows"])
    assert 0 < total <= result["wall_ms"]
    assert result["other_ms"] == pytest.approx(result["wall_ms"] - total)
    assert len({row["name"] for row in result["rows"]}) == len(result["rows"])
    assert result["images_per_second"] == pytest.approx(4 / result["step_ms"] * 1e3)


def test_bytes_and_flops_are_those_of_cost(found):
    result, _ = found
    rows = {row["name"]: row for row in result["rows"]}
    row = rows["fastgan::bn_act"]
    assert row["calls"] == 3 * 3 and row["backends"] == {"reference": 9}
    want = [bn_act.cost(torch.empty(shape)) for shape in bn_shapes()]
    assert row["bytes"] == 3 * sum(c["bytes"] for c in want) and row["flops"] == 3 * sum(c["flops"] for c in want)
    assert row["bound_ms"] == pytest.approx(max(row["bytes"], row["flops"]) / 1e9 * 1e3)
    assert row["share_of_roofline"] == pytest.approx(row["bound_ms"] / row["ms"])


def bn_shapes():
    """What the generator normalises in one pass, the only one of a step."""
    seen = []
    generator, _ = fastgan.models.build("dcgan-28", g_width=2, d_width=2)
    for m in generator.modules():
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
            m.register_forward_hook(lambda m, inputs, y: seen.append(y.shape))
    generator(torch.randn(4, 100))
    return seen


def test_the_trace_names_our_ops(found):
    _, trace = found
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"fastgan::conv2d", "fastgan::bn_act_backward", "data"} <= names


@pytest.mark.parametrize("name", OPS)
def test_every_cost_takes_its_ops_arguments(name):
    needed = cost_of(OPS[name], OPS[name].example())
    assert needed is None or (needed["bytes"] > 0 and needed["flops"] > 0)
    assert needed is not None or "backward" in name


def test_counts_equal_cost_on_both_routes():
    x, w = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3)
    want = conv2d.cost(x, w, [1, 1], [0, 0], [1, 1])
    with op_ranges() as counts:
        fastgan.functional.conv2d(x, w)
        OPS["conv2d"].overload(x, w, None, [1, 1], [0, 0], [1, 1], 1, "identity", 0.0)
    row = counts.ops["conv2d"]
    assert row["calls"] == 2 and row["bytes"] == 2 * want["bytes"] and row["flops"] == 2 * want["flops"]
    with op_ranges() as after:
        pass
    fastgan.functional.conv2d(x, w)
    assert not after.ops  # nothing is counted outside


def test_around_ends_also_after_an_error():
    with pytest.raises(KeyError), around(lambda op, run: run):
        raise KeyError
    assert _op._around is None


def test_ceilings_say_how_they_were_measured():
    limits = ceilings(torch.device("cpu"), torch.float32, copy_bytes=1 << 20, matmul_size=64)
    assert limits["bytes_per_second"] > 0 and limits["flops_per_second"] > 0
    assert limits["how"] == "copy of 1 MiB and 64x64 matmul in float32, measured here"


def test_gaps_between_kernels():
    assert gaps([]) == {"count": 0, "ms": 0.0, "longest_us": 0.0}
    assert gaps([(0, 10), (10, 20), (25, 30), (26, 28), (40, 41)]) == {"count": 2, "ms": 0.015, "longest_us": 10}


def test_the_command_prints_json_of_given_data(tmp_path, capfd):
    data = tmp_path / "noise.npy"
    np.save(data, np.random.default_rng(0).integers(0, 256, (10, 28, 28), dtype=np.uint8))
    trace = tmp_path / "trace.json"
    code = main(["profile", "--recipe=dcgan-28", "--steps=1", "--json", f"--data={data}", f"--trace={trace}", *SMALL])
    result = json.loads(capfd.readouterr().out)
    assert code == 0 and result["steps"] == 1 and result["batch_size"] == 4 and trace.exists()
    assert any(row["name"] == "data" for row in result["rows"])


def test_the_command_prints_a_table(capsys):
    assert main(["profile", "--recipe=wgan-gp-28", "--steps=1", *SMALL, "--set=model_options.dropout=0.0"]) == 0
    shown = capsys.readouterr().out
    assert "images/s" in shown and "fastgan::conv2d" in shown and "outside ops" in shown and "measured here" in shown


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--recipe=stylegan"], "there is no recipe 'stylegan', choose one of"),
        (["--recipe=dcgan-28", "--trace=/nowhere/at/all.json"], "the directory of --trace must exist"),
        (["--recipe=dcgan-28", "--steps=0"], "must be a whole number of at least 1"),
        (["--recipe=dcgan-28", "--device=tpu"], "it must be auto, cpu or cuda"),
        ([], "required: --recipe"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, words, capsys):
    assert main(["profile", *arguments]) == 2
    shown = capsys.readouterr()
    assert words in shown.err and shown.err.count("\n") == 1 and shown.out == ""
