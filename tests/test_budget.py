"""Proofs and races have a budget: on a fake clock, with fake kernels, nothing is left to the machine's mood."""

import json
import os
import platform
import subprocess
import sys
import time

import pytest
import torch

import fastgan
from fastgan import functional
from fastgan._op import OPS
from fastgan.choice import (
    STATE,
    Backend,
    Routine,
    budget,
    cache_dir,
    hardware,
    proof_error,
    race,
    settle,
    watching,
    winners,
)
from fastgan.choice.budget import HELD, RATE, Account
from fastgan.choice.routine import REGISTERED
from fastgan.choice.state import State
from fastgan.cli import main
from fastgan.training.assembly import assemble
from fastgan.training.recipes import recipes


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Fake(Routine):
    """Doubles x; a call of a backend takes what `seconds` says, given the elements of x."""

    def __init__(self, clock, ours, theirs):
        self.clock, self.calls = clock, []
        run = {"native": self.timed("native", ours), "reference": self.timed("reference", theirs)}

        def reference(x):
            return run["reference"](x)

        super().__init__("doubled", reference, {"native": Backend(run["native"])})
        del REGISTERED["doubled"]

    def timed(self, name, seconds):
        def run(x):
            self.calls.append(name)
            self.clock.now += seconds(x.numel()) if callable(seconds) else seconds
            return x * 2

        return run

    def drawn(self, args):
        return (torch.randn(args[0].shape),)


@pytest.fixture
def state(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path))
    for name, value in vars(State()).items():
        monkeypatch.setattr(STATE, name, value)
    return STATE


def decide(state, op, elements, account):
    return race.race(state, op, (torch.empty(elements),), ["native", "reference"], account)


SIZE = 100_000  # elements: a bound of 22 us, above TINY


@pytest.mark.parametrize("per_bound", [0.5, 3.0, 20.0, 59.0])
@pytest.mark.parametrize("behind", [0.5, 1.0, 2.0])
def test_a_step_of_many_cases_stays_within_the_budget(state, per_bound, behind):
    """200 layers of a random size; whatever a kernel takes of what is assumed of it, the bound on the step holds."""
    clock = Clock()
    account = Account(clock)
    scale = lambda factor: lambda n: factor * per_bound * (2e-6 + 4 * n / budget.CPU_BYTES)
    op = Fake(clock, scale(1.0), scale(behind))
    own, generator = 0.0, torch.Generator().manual_seed(0)
    for size in torch.randint(10_000, 5_000_000, (200,), generator=generator).tolist():
        decide(state, op, size, account)
        took = per_bound * (2e-6 + 4 * size / budget.CPU_BYTES)  # the step's own call
        clock.now += took
        own += took
    assert clock.now == pytest.approx(own + account.spent)
    assert account.spent <= HELD + RATE * clock.now + 1e-9
    assert clock.now <= (own + HELD) / (1 - RATE) + 1e-9


def test_the_account_never_holds_more_than_it_started_with(state):
    clock = Clock()
    account = Account(clock)
    with account.paying():
        clock.now += 0.8
    assert account.balance == pytest.approx(HELD - 0.8)  # full before, so what it regained meanwhile was over the top
    clock.now += 1.0
    assert account.balance == pytest.approx(HELD - 0.8 + RATE)
    clock.now += 3600.0  # a night in a notebook
    assert account.balance == HELD


def test_a_short_first_call_does_not_make_long_ones_look_dear():
    account = Account(Clock())
    account.took("kind", 2e-6, 1e-3)  # 500 bounds of set-up
    assert account.expected("kind", 0.04) == pytest.approx(0.04 * budget.UNKNOWN)
    account.took("kind", 0.04, 0.08)
    assert account.expected("kind", 0.04) == pytest.approx(0.08) and account.known("kind")


def test_what_the_account_cannot_pay_is_open_and_runs_on_ours(state):
    clock = Clock()
    account = Account(clock, held=1e-6)
    op = Fake(clock, 0.01, 0.001)
    verdict = decide(state, op, SIZE, account)
    assert verdict.winner == "native" and not verdict.settled and "budget" in verdict.why and op.calls == []


def test_three_times_behind_is_cut_off_after_one_call(state):
    for ours, theirs, winner in ((0.01, 0.031, "native"), (0.031, 0.01, "reference")):
        clock = Clock()
        op = Fake(clock, ours, theirs)
        verdict = decide(state, op, SIZE, Account(clock, held=100.0))
        state.families.clear()
        assert verdict.winner == winner and verdict.settled and verdict.ahead == pytest.approx(3.1)
        assert op.calls == ["native", "reference"]  # the proof's calls, ours first


def test_a_slow_first_call_below_a_millisecond_decides_nothing(state):
    """oneDNN builds its primitive then."""
    clock = Clock()
    first = []

    def theirs(n):
        first.append(n)
        return 0.0009 if len(first) == 1 else 0.0001

    op = Fake(clock, 0.0002, theirs)
    assert decide(state, op, SIZE, Account(clock, held=100.0)).winner == "reference"


def test_too_small_to_race_is_proved_and_not_raced(state):
    clock = Clock()
    op = Fake(clock, 30e-6, 20e-6)
    verdict = decide(state, op, 100, Account(clock))
    assert verdict.winner == "native" and verdict.settled and op.calls == ["native", "reference"]


def test_neighbours_share_a_clear_verdict(state):
    clock = Clock()
    op = Fake(clock, 0.004, 0.006)
    account = Account(clock, held=100.0)
    shape = lambda n: (torch.empty(n, 1000),)
    able = ["native", "reference"]
    assert race.race(state, op, shape(100), able, account).ahead == pytest.approx(1.5)
    raced = len(op.calls)
    again = race.race(state, op, shape(200), able, account)
    assert again.winner == "native" and again.settled and len(op.calls) == raced
    race.race(state, op, shape(1000), able, account)  # ten times the bound: raced
    assert len(op.calls) > raced


def test_a_race_under_load_is_not_remembered(state):
    """Times that lie further apart than the lead say nothing."""
    clock = Clock()
    moods = iter([1.0, 1.0, 3.0, 1.8, 1.0, 3.0, 1.5, 1.2, 3.0, 3.0, 2.2, 3.0])
    noisy = lambda n: 0.002 * next(moods)
    op = Fake(clock, noisy, noisy)
    verdict = decide(state, op, SIZE, Account(clock, held=100.0))
    assert not verdict.settled and verdict.winner == "native" and verdict.spread > verdict.ahead


def test_what_is_open_is_written_down_and_settled_later(state):
    """The verdict of the run stays; the next run takes the new one."""
    state.account = Account(held=1e-9)
    x = torch.randn(64, 8, 32, 32)
    told = []
    with watching(lambda op, name, why: told.append((name, why))):
        functional.bias_act(x)
    assert told[0][0] == "native" and "open" in told[0][1] and len(state.open) == 1
    (case,) = state.open
    assert json.loads((cache_dir() / "open.json").read_text())[case]["op"] == "bias_act"
    before = dict(winners())
    for _ in range(20):  # a busy machine leaves it open now and then
        if settle():
            break
    assert winners() == before and not state.open and state.cache.winner(case)
    assert json.loads((cache_dir() / "open.json").read_text()) == {}


def test_adam_is_settled_like_any_other(state):
    state.account = Account(held=1e-9)
    weight = torch.nn.Parameter(torch.randn(500, 400))
    weight.grad = torch.randn_like(weight)
    fastgan.Adam([weight], lr=0.1).step()
    assert [found["op"] for found in state.open.values()] == ["adam"]
    assert any(settle() for _ in range(20))


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d", "conv2d_weight"])
def test_the_reference_never_multiplies_a_dtype_that_the_cpu_lacks(state, monkeypatch, name):
    """Not in the proof, not in the race: on AVX2 PyTorch takes 3 times float32's time and more for it."""
    monkeypatch.setattr(hardware, "torch_multiplies_bfloat16", lambda: False)
    op = OPS[name]
    args = tuple(a.bfloat16() if isinstance(a, torch.Tensor) else a for a in op.example())
    seen = []
    spy = lambda *a: (seen.append(op.first(a).dtype), original(*a))[1]
    original = op.reference
    monkeypatch.setattr(op, "reference", spy)
    monkeypatch.setitem(op.backends, "reference", Backend(spy))
    told = []
    with watching(lambda op, run, why: told.append((run, why))):
        op(*args)
    assert seen == [torch.float32]
    assert told[0][0] == "native"


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.products and "native" in op.backends])
def test_kernels_pass_their_proof_where_the_cpu_lacks_the_dtype(state, monkeypatch, name):
    """What is float32 beside bfloat16, as attention's row sums, is held against float32."""
    monkeypatch.setattr(hardware, "torch_multiplies_bfloat16", lambda: False)
    op = OPS[name]
    args = tuple(a.bfloat16() if isinstance(a, torch.Tensor) else a for a in op.drawn(op.example()))
    assert proof_error(op, "native", args) == ""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variable names an instruction set of x86")
def test_the_predicate_follows_the_set_that_torch_is_held_to():
    code = "from fastgan.choice.hardware import torch_multiplies_bfloat16 as f; print(f())"
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


def test_doctor_races_what_other_processes_left_open(state, capsys):
    state.account = Account(held=1e-9)
    functional.bias_act(torch.randn(64, 8, 32, 32))
    assert len(state.cache.open_cases()) == 1
    for name, value in vars(State()).items():  # another process
        setattr(state, name, value)
    for _ in range(20):
        assert main(["doctor", "--race", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        if not found["races"]["open"]:
            break
    assert found["races"]["open"] == 0 and set(found["races"].values()) & {"native", "reference"}
    assert state.cache.open_cases() == {} and len(state.cache.winners) == 1


@pytest.mark.slow
@pytest.mark.threads(2)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_step_of_dcgan_64_keeps_to_the_budget(state, precision):
    """Real kernels and the real clock; benchmarks/first_step.py compares the whole step with PyTorch's."""
    recipe = recipes()["dcgan-64"].replace(batch_size=16, precision=precision)
    step = assemble(recipe, torch.device("cpu"))[2]
    images = torch.rand(16, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    state.account = Account()
    begin = time.perf_counter()
    step(images)
    took = time.perf_counter() - begin
    assert len(state.verdicts) > 5  # a choice for each chain and mode, and for what runs beside the chains
    # The last proof or race may take longer than expected: a tenth of a second on a quiet machine.
    assert state.account.spent <= HELD + RATE * took + 0.5
    before = dict(state.verdicts)
    step(images)
    assert before.items() <= state.verdicts.items()  # a verdict never changes within a run
