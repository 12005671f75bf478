import functools
import itertools
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastgan
from fastgan import functional
from fastgan._op import OPS
from fastgan.choice import (
    NAMES,
    STATE,
    Backend,
    availability,
    cache,
    cache_dir,
    choosing,
    missing,
    proof,
    watching,
    winners,
)
from fastgan.choice.choosing import begin_run
from fastgan.choice.state import State

CORE = pytest.mark.skipif(bool(missing("native")), reason=f"no native core here: {missing('native')}")


@pytest.fixture
def forget(monkeypatch):
    """A process that has decided nothing yet."""
    for name, value in vars(State()).items():
        monkeypatch.setattr(STATE, name, value)


@pytest.fixture
def quiet(forget):
    """Such a process on a machine where all runs take equal times: no race is left open because of other work."""
    STATE.account.clock = functools.partial(next, itertools.count(time.perf_counter(), 200e-6))


def call(n=2):
    return functional.bias_act(torch.randn(n, 3, 4, 4), clamp=99.0)


def test_table_has_a_reason_for_everything_missing():
    table = fastgan.backends()
    assert set(table) >= {"conv2d", "conv_transpose2d", "conv2d_weight", "bn_act", "bias_act", "gan_loss"}
    for row in table.values():
        assert set(row) == {"cuda", "triton", "native", "reference"} and row["reference"] == (True, "")
        assert all(available != bool(reason) for available, reason in row.values())


def test_backend_nests_and_is_a_plain_call():
    with fastgan.backend("reference"):
        with fastgan.backend("auto"):
            assert STATE.forced == "auto"
        assert STATE.forced == "reference"
    assert STATE.forced == "auto"
    fastgan.backend("reference")
    assert STATE.forced == "reference"
    fastgan.backend("auto")


def test_unknown_or_missing_backends_say_so():
    with pytest.raises(ValueError, match="backend: name must be one of auto"):
        fastgan.backend("cudnn")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="backend: cuda must be available, got none: "):
            fastgan.backend("cuda")


@CORE
def test_a_declined_case_runs_on_the_reference():
    calls = []
    with fastgan.backend("native"), watching(lambda *c: calls.append(c[1:])):
        call()
        functional.bias_act(torch.randn(2, 3).double(), clamp=99.0)
    assert calls[0][0] == "native" and calls[1][0] == "reference" and "float64" in calls[1][1]


@CORE
def test_winners_are_remembered_and_travel(quiet):
    call()
    stored = json.loads((cache_dir() / "winners.json").read_text())
    assert len(winners()) > 0 and set(winners()) <= set(stored)
    digest = next(iter(winners()))
    begin_run({digest: "reference"})
    calls = []
    with watching(lambda op, name, why: calls.append(name)):
        call()
    assert calls == ["reference"]


@CORE
@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '{"a": 3}', '{"a": "gone"}'])
def test_a_damaged_cache_counts_as_empty(quiet, content):
    path = cache_dir() / "winners.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    call()
    assert all(v["winner"] in NAMES for v in json.loads(path.read_text()).values())


@CORE
def test_a_cache_file_cut_short_anywhere_counts_as_empty(quiet, monkeypatch):
    call()
    path = cache_dir() / "winners.json"
    whole = path.read_bytes()
    for length in (1, len(whole) // 3, len(whole) - 1):
        path.write_bytes(whole[:length])
        begin_run()
        STATE.cache = cache.Cache()
        call()
        assert json.loads(path.read_text()) and not winners().keys() - json.loads(path.read_text()).keys()


CRASH = """
import functools, itertools, os, sys, tempfile, time, torch, fastgan
from fastgan import functional
from fastgan.choice import STATE
STATE.account.clock = functools.partial(next, itertools.count(time.perf_counter(), 200e-6))  # as `quiet`
functional.bias_act(torch.randn(2, 3, 4, 4), clamp=99.0)
before = open(os.path.join(os.environ["FASTGAN_CACHE"], "winners.json")).read()
where = sys.argv[1]
if where == "writing":
    created = tempfile.NamedTemporaryFile
    def half_written(*args, **options):
        file = created(*args, **options)
        def write(text, whole=file.write):
            whole(text[: len(text) // 2]); file.flush(); os._exit(9)
        file.write = write
        return file
    tempfile.NamedTemporaryFile = half_written
else:
    os.replace = lambda *names: os._exit(9)
functional.bias_act(torch.randn(3, 3, 4, 4), clamp=99.0)
"""


@CORE
@pytest.mark.parametrize("where", ["writing", "replacing"])
def test_a_process_that_dies_while_it_writes_the_cache_leaves_it_whole(quiet, monkeypatch, tmp_path, where):
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", CRASH, where], capture_output=True, text=True, timeout=120)
    assert done.returncode == 9, done.stderr
    stored = json.loads((tmp_path / "winners.json").read_text())
    assert len(stored) == 1  # the first verdict; what the crash left beside it is not read
    call(3)
    assert len(json.loads((tmp_path / "winners.json").read_text())) == 2


@CORE
@pytest.mark.parametrize("changed", ["cpu", "torch", "fastgan"])
def test_winners_of_another_machine_or_version_are_not_taken(quiet, monkeypatch, changed):
    call(5)
    known = dict(STATE.cache.winners)
    before = cache.fingerprint()
    if changed == "cpu":
        monkeypatch.setattr(cache, "cpu_name", lambda: "another CPU")
    else:
        monkeypatch.setattr({"torch": torch, "fastgan": cache}[changed], "__version__", "99.0")
    fresh = functools.cache(cache.fingerprint.__wrapped__)
    monkeypatch.setattr(cache, "fingerprint", fresh)
    assert fresh() != before
    STATE.chosen.clear()
    call(5)
    assert len(STATE.cache.winners) == len(known) + 1  # raced again, under a key of its own


@pytest.mark.parametrize(
    "text, name",
    [
        (
            "processor\t: 0\ncpu family\t: 23\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n",
            "AMD EPYC (family 23, model 1)",
        ),
        ("processor\t: 0\nmodel name\t: ARMv8 Processor rev 4 (v8l)\n", "ARMv8 Processor rev 4 (v8l)"),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", platform.processor() or platform.machine()),
    ],
)
def test_generations_of_a_cpu_have_different_names(monkeypatch, text, name):
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert cache.cpu_name() == name


@CORE
def test_a_kernel_that_fails_its_proof_is_switched_off(forget, monkeypatch):
    op = OPS["bias_act"]
    wrong = Backend(lambda x, *rest: op.reference(x, *rest) * 1.01)
    monkeypatch.setitem(op.backends, "native", wrong)
    x = torch.randn(5, 7, 3, 3)
    with pytest.warns(RuntimeWarning, match="bias_act on native is switched off: output 0 must be within"):
        y = functional.bias_act(x, clamp=99.0)
    torch.testing.assert_close(y, torch.nn.functional.leaky_relu(x, 0.2))
    assert fastgan.backends()["bias_act"]["native"][0] is False


@CORE
def test_racing_can_be_switched_off(forget):
    with fastgan.racing(False):
        calls = []
        with watching(lambda op, name, why: calls.append(name)):
            call(7)
    assert calls == ["native"]


@CORE
def test_the_slow_backend_loses(forget, monkeypatch):
    op = OPS["bias_act"]
    monkeypatch.setitem(op.backends, "native", Backend(lambda *a: (time.sleep(0.02), op.reference(*a))[1]))
    calls = []
    with watching(lambda op, name, why: calls.append((name, why))):
        call(11)
    assert calls == [("reference", "PyTorch's own op won the race")]


# ---- the proof at first use, where a device asks for one ------------------------------------------------------------


@pytest.fixture
def asked(forget, monkeypatch):
    """A process in which the CPU asks for proofs as a GPU does, and nothing has been proved."""
    monkeypatch.setattr(proof, "PROVED_ON", {"cpu"})
    STATE.emulated.add("triton")


def kernel(change=lambda y: y, calls=None):
    """A Triton backend of bias_act that computes by PyTorch and then changes its output."""

    def run(x, *rest):
        if calls is not None:
            calls.append(x)
        return change(OPS["bias_act"].reference(x, *rest))

    return Backend(run)


def leaves_its_corner(y):
    out = torch.empty_like(y)
    out.flatten()[1:] = y.flatten()[1:]
    return out


def fails(y):
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize("mode", ["forced", "raceless"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: y * 1.01, "output 0 must be within"),
        (leaves_its_corner, "got an error of nan"),
        (lambda y: y.double(), "output 0 must be .* torch.float32, got .* torch.float64"),
        (fails, "it raised RuntimeError: no kernel image"),
    ],
)
def test_a_wrong_gpu_kernel_is_switched_off_at_its_first_use(asked, monkeypatch, mode, change, words):
    monkeypatch.setitem(OPS["bias_act"].backends, "triton", kernel(change))
    x, calls = torch.randn(5, 7, 3, 3), []
    with fastgan.backend("triton" if mode == "forced" else "auto"), fastgan.racing(False):
        with pytest.warns(RuntimeWarning, match=f"bias_act on triton is switched off: .*{words}") as warned:
            y = functional.bias_act(x, clamp=99.0)
        with watching(lambda op, name, why: calls.append((name, why))):
            functional.bias_act(x[:2], clamp=99.0)
    torch.testing.assert_close(y, torch.nn.functional.leaky_relu(x, 0.2))
    assert len(warned) == 1 and not fastgan.backends()["bias_act"]["triton"][0]
    assert calls[0][0] != "triton" and re.search(words, calls[0][1])


def test_a_right_gpu_kernel_is_proved_once_a_case(asked, monkeypatch):
    calls = []
    monkeypatch.setitem(OPS["bias_act"].backends, "triton", kernel(calls=calls))
    x = torch.arange(48.0).view(4, 3, 2, 2)
    with fastgan.backend("triton"):
        for n in (4, 4, 2, 2, 4):
            functional.bias_act(x[:n], clamp=99.0)
    assert len(calls) == 5 + 2  # two cases
    assert not torch.equal(calls[0], x) and torch.equal(calls[1], x)  # random numbers prove, not x


def test_nothing_is_proved_or_raced_during_capture(asked, monkeypatch):
    calls, ran, x = [], [], torch.randn(3, 3, 2, 2)
    monkeypatch.setitem(OPS["bias_act"].backends, "triton", kernel(calls=calls))
    monkeypatch.setattr(choosing, "capturing", lambda: True)
    with watching(lambda op, name, why: ran.append((name, why))):
        functional.bias_act(x, clamp=99.0)
        with fastgan.backend("triton"):
            functional.bias_act(x, clamp=99.0)
    assert calls == [] and all(name == "reference" and "captured" in why for name, why in ran)
    monkeypatch.setattr(choosing, "capturing", lambda: False)
    with fastgan.backend("triton"):
        functional.bias_act(x, clamp=99.0)
    assert len(calls) == 2  # the proof and the call


def test_too_little_memory_for_a_proof_is_no_fault_of_the_kernel(asked, monkeypatch):
    def full(y):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(OPS["bias_act"].backends, "triton", kernel(full))
    ran = []
    for mode in ("triton", "auto"):
        with fastgan.backend(mode), watching(lambda op, name, why: ran.append((name, why))):
            functional.bias_act(torch.randn(3, 3, 2, 2), clamp=99.0)
    assert all(name == "reference" and "too little memory" in why for name, why in ran) and len(ran) == 2
    assert fastgan.backends()["bias_act"]["triton"][0]


def test_environment_variable_forces_and_never_breaks_the_import():
    code = "import fastgan.choice; print(fastgan.choice.STATE.forced)"
    for value, want in [("reference", "reference"), ("nonsense", "auto")]:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            env={**__import__("os").environ, "FASTGAN_BACKEND": value},
        )
        assert done.returncode == 0 and done.stdout.strip() == want, done.stderr


def test_a_fused_op_has_a_kernel_only_where_one_may_run(monkeypatch):
    """Elsewhere its parts run one by one, as if it did not exist."""
    has = availability.has_kernel
    assert not has("conv2d_statistics", "cpu")
    monkeypatch.setattr(availability, "absent", lambda name: "" if name == "triton" else "not here")
    assert has("conv2d_statistics", "cuda") and not has("conv2d_statistics", "cpu")
    monkeypatch.setattr(STATE, "forced", "cuda")
    assert not has("conv2d_statistics", "cuda")
    monkeypatch.setattr(STATE, "forced", "triton")
    assert has("conv2d_statistics", "cuda")
    monkeypatch.setattr(STATE, "disabled", {("conv2d_statistics", "triton"): "it failed its proof"})
    assert not has("conv2d_statistics", "cuda") and has("conv_transpose2d_statistics", "cuda")
    monkeypatch.setattr(availability, "absent", lambda name: "" if name == "cuda" else "not here")
    assert not has("conv2d_statistics", "cuda")  # Triton alone is asked for
    monkeypatch.setattr(STATE, "forced", "auto")
    assert has("conv2d_statistics", "cuda")


@pytest.mark.parametrize(
    ("bits", "said"), [(1, ""), (2, "output 1 must be within 1.58 of the reference, got an error of 2")]
)
def test_a_proof_lets_a_sample_fall_on_the_other_side_of_an_edge(monkeypatch, bits, said):
    """Signs are bits of comparisons: of 576 bytes one may differ by a rounding, two are too many."""
    op = OPS["filtered_lrelu"]

    def run(*args):
        y, signs, tie = op.reference(*args)
        signs.view(-1)[:bits] ^= 64
        return y, signs, tie

    monkeypatch.setitem(op.backends, "native", Backend(run))
    assert proof.proof_error(op, "native", op.drawn(op.example())) == said


@CORE
def test_a_sum_that_cancels_out_is_proved_against_float32(monkeypatch):
    """The bfloat16 reference rounds each element before it sums them; a kernel that does not was refused for it."""
    op, draws = OPS["bias_act_backward"], torch.Generator().manual_seed(0)
    y = torch.randn(64, 4, 32, 32, generator=draws).bfloat16()
    slope = torch.where(y > 0, 1.0, 0.2)
    dx = torch.randn(y.shape, generator=draws) * slope
    args = ((dx - dx.mean((0, 2, 3), keepdim=True)) / slope).bfloat16(), y, "leaky_relu", 0.2, 1.0, -1.0, True
    exact = (args[0].double() * slope).sum((0, 2, 3))
    far = [(run(*op.copies(args))[1].double() - exact).norm() for run in (op.reference, op.backends["native"].run)]
    assert far[0] > 0.1 * exact.norm() > 100 * far[1]
    assert proof.proof_error(op, "native", args) == ""

    wrong = Backend(lambda *args: (op.reference(*args)[0], 1.05 * exact.float()))
    monkeypatch.setitem(op.backends, "native", wrong)
    assert "output 1 must be within" in proof.proof_error(op, "native", args)
