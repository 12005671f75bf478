"""The configurations of the Triton convolutions: what the cost model prefers, how a race ends and is kept; no GPU."""

import json
import sys

import pytest
import torch

pytest.importorskip("triton", "3.8", reason="triton 3.8 or newer is needed to import the kernels")
import fastgan
from fastgan._op import OPS
from fastgan.choice import STATE, availability, cache, may_race, winners
from fastgan.kernels import configs
from fastgan.kernels.configs import CARDS, Product
from fastgan.kernels.launching import recorded

BF16 = torch.bfloat16
LAYER = Product(32768, 256, 2048, 1, 128, "k", "ieee")  # DCGAN-64, 128 to 256 channels at batch 128


# ---- the model -------------------------------------------------------------------------------------------------------


def test_what_cannot_launch_is_no_candidate():
    for name, card in CARDS.items():
        for dtype, rounding in ((BF16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")):
            for channels in (3, 128):
                found = configs.candidates(LAYER._replace(precision=rounding, channels=channels), dtype, card)
                assert found, name
                assert all(configs.shared_bytes(c, dtype) <= card.shared_program for c in found)
                assert all(c.block_k >= 32 // dtype.itemsize for c in found)  # the least that tensor cores take
                if channels == 3:
                    assert all(c.block_k * dtype.itemsize <= configs.GATHERED_BYTES for c in found)


def test_no_part_of_a_split_sum_is_empty():
    for k in (1, 16, 64, 200, 4096):
        for c in configs.candidates(LAYER._replace(k=k), BF16, CARDS["sm_90"]):
            assert c.splits == 1 or -(-k // c.block_k) >= 2 * c.splits


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_large_products_take_large_tiles_and_small_ones_fill_the_card(card):
    large = configs.ranked(LAYER._replace(m=2**20), BF16, card)[0]
    assert large.block_m * large.block_n >= 64 * 128 and large.splits == 1
    gradient = configs.ranked(Product(256, 2048, 32768, 1, 128, "n", "ieee"), BF16, card)[0]
    programs = -(-256 // gradient.block_m) * -(-2048 // gradient.block_n) * gradient.splits
    assert gradient.splits > 1 and programs >= card.multiprocessors // 2
    narrow = configs.ranked(Product(131072, 3, 256, 4, 64, "k", "ieee"), BF16, card)[0]
    assert narrow.block_n == 16


def test_more_of_anything_is_never_slower_and_more_work_never_faster():
    card = CARDS["sm_80"]
    for config in configs.candidates(LAYER, BF16, card):
        time = configs.seconds(config, LAYER, BF16, card)
        assert configs.seconds(config, LAYER._replace(k=4096), BF16, card) > time
        assert configs.seconds(config, LAYER._replace(batch=4), BF16, card) > time
        assert configs.seconds(config, LAYER, BF16, card._replace(flops_16=1e15, bytes=1e13)) <= time


def test_an_unlisted_card_counts_as_the_nearest_older_one():
    with configs.assumed("sm_103"):
        assert configs.card(torch.device("cpu")) == CARDS["sm_100"]
    with configs.assumed("gfx950"):
        assert configs.card(torch.device("cpu")) == CARDS["gfx942"]
    assert configs.card(torch.device("cpu")) == CARDS["sm_80"]


# ---- the race --------------------------------------------------------------------------------------------------------


class Bench:
    """A GPU that takes as long as it is told: `speeds` per configuration, `compiling` seconds for each new one."""

    def __init__(self, speed, compiling=0.0):
        self.now, self.speed, self.compiling, self.compiled, self.last = 0.0, speed, compiling, [], None

    def run(self, config):
        if config not in self.compiled:
            self.compiled.append(config)
            self.now += self.compiling
        self.last = config
        return config

    def measure(self, run):
        run()
        self.now += self.speed(self.last)
        return self.speed(self.last)


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """A fresh process with an empty cache, in which races may run, on a Bench."""
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path))

    def start(speed, compiling=0.0, may_race=True):
        bench = Bench(speed, compiling)
        monkeypatch.setattr(STATE, "cache", cache.Cache())
        STATE.begin_run({})
        for name, value in {
            "_first": {},
            "_raced": {},
            "_spent": 0.0,
            "_told": False,
            "_clock": lambda: bench.now,
            "_measure": bench.measure,
            "may_race": lambda device: may_race,
        }.items():
            monkeypatch.setattr(configs, name, value)
        return bench

    start.file = tmp_path / "winners.json"
    return start


def call(bench, product=LAYER, case=("a layer",)):
    return configs.tuned("conv2d", torch.empty(1, dtype=BF16), product, case, bench.run)


def third(config):
    return 1e-3 if config == configs.ranked(LAYER, BF16, CARDS["sm_80"])[2] else 2e-3


def test_the_fastest_of_the_models_best_wins_and_is_kept_on_disk(bench):
    best = configs.ranked(LAYER, BF16, CARDS["sm_80"])
    first = bench(third)
    assert call(first) == best[2]
    assert first.compiled == best[: configs.RACED]
    again = bench(third)  # another process
    assert call(again) == best[2] and again.compiled == [best[2]]
    assert winners()  # a checkpoint carries it
    call(again, case=("another layer",))
    assert again.compiled == [best[2], *(c for c in best[: configs.RACED] if c != best[2])]


def test_another_gpu_or_version_races_anew(bench, monkeypatch):
    call(bench(third))
    monkeypatch.setattr(cache, "fingerprint", lambda: "another GPU")
    again = bench(third)
    call(again)
    assert len(again.compiled) == configs.RACED


def test_a_crash_half_way_leaves_the_cache_whole(bench):
    call(bench(third))
    kept = bench.file.read_text()
    crashing = bench(third)

    def crash(config):
        if len(crashing.compiled) == 2:
            raise KeyboardInterrupt
        return crashing.run(config)

    with pytest.raises(KeyboardInterrupt):
        configs.tuned("conv2d", torch.empty(1, dtype=BF16), LAYER, ("third layer",), crash)
    assert bench.file.read_text() == kept and json.loads(kept)
    bench.file.write_text(kept[: len(kept) // 2])  # a full disk, say
    again = bench(third)
    assert call(again) == call(again) and len(again.compiled) == configs.RACED
    assert all(v.startswith("config ") for v in json.loads(bench.file.read_text()).values())


def test_an_entry_that_names_no_candidate_is_raced_again(bench):
    call(bench(third))
    bench.file.write_text(json.dumps(dict.fromkeys(json.loads(bench.file.read_text()), "config 1 2 3 4 5 6")))
    again = bench(third)
    call(again)
    assert len(again.compiled) == configs.RACED


def test_configurations_that_fail_are_out(bench):
    best = configs.ranked(LAYER, BF16, CARDS["sm_80"])
    runner = bench(lambda config: 1e-3 * (1 + best.index(config)))

    def fail(config):
        if config in failing:
            raise RuntimeError("out of resource: shared memory")
        return runner.run(config)

    failing = best[:1]
    assert configs.tuned("conv2d", torch.empty(1, dtype=BF16), LAYER, ("a",), fail) == best[1]
    failing = best
    with pytest.raises(RuntimeError, match="out of resource"):
        configs.tuned("conv2d", torch.empty(1, dtype=BF16), LAYER, ("b",), fail)


def test_time_is_bounded_and_said_once(bench, capsys):
    slow = bench(third, compiling=4.0)
    call(slow)
    assert len(slow.compiled) == 2  # the second is begun within CASE_SECONDS, the third is not
    for layer in range(100):
        slow.compiled.clear()
        call(slow, case=(layer,))
    assert configs._spent < configs.PROCESS_SECONDS + 2 * configs.CASE_SECONDS
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("fastgan: racing Triton configurations") and "doctor" in said
    quick = bench(lambda config: 1e-4, compiling=0.1)
    call(quick)
    assert capsys.readouterr().err == ""


def test_nothing_is_raced_where_nothing_may_be(bench):
    """Racing off, a graph being captured, no GPU: the model's first choice, and no trace of it."""
    best = configs.ranked(LAYER, BF16, CARDS["sm_80"])
    still = bench(third, may_race=False)
    assert call(still) == best[0] and still.compiled == [best[0]] and not bench.file.exists()
    configs.may_race = lambda device: True  # the capture is over (monkeypatch puts the real one back)
    assert call(still) == best[2]


def test_may_race_only_on_a_gpu_that_records_nothing(monkeypatch):
    gpu, capturing = torch.device("cuda"), False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert may_race(gpu) and not may_race(torch.device("cpu"))
    capturing = True
    assert not may_race(gpu)
    capturing = False
    with fastgan.racing(False):
        assert not may_race(gpu)


def test_doctor_races_a_dcgan_ahead(monkeypatch):
    """On the emulator the calls are checked by type alone (meta tensors, recorded launches); prove_all makes them."""
    state, asked = sys.modules["fastgan.doctor"], []
    for module in (state, availability):
        monkeypatch.setattr(module, "absent", lambda name: "" if name == "triton" else "not here")
    monkeypatch.setattr(configs, "race_ahead", asked.append)
    monkeypatch.setattr(state, "proof_error", lambda *args: "")
    monkeypatch.setattr(state, "_example", lambda a, *rest: a)
    assert state.prove_all() and asked == [torch.device("cuda")]
    calls = list(configs.dcgan_calls(2, BF16, torch.device("meta")))
    launched = recorded(lambda op=op, args=args: OPS[op].backends["triton"].run(*args) for op, args in calls)
    assert len(calls) == 25 and {case[0].fn.__name__ for case in launched} >= {"conv2d_kernel", "conv2d_weight_kernel"}
    assert [op for op, _ in calls].count("conv2d_statistics") == 3


@pytest.mark.parametrize("apart", [5e-4, 3e-3])
def test_a_fused_kernel_is_raced_against_its_parts(bench, apart):
    """The parts' own races run before, off the clock; the better of the two ways wins and is kept."""
    best = configs.ranked(LAYER, BF16, CARDS["sm_80"])
    speed = lambda config: apart if config == configs.APART else 1e-3 * (1 + best.index(config))
    runner = bench(speed, compiling=4.0)  # the second candidate is begun within CASE_SECONDS, the third is not
    run = lambda: configs.tuned("x", torch.empty(1, dtype=BF16), LAYER, ("case",), runner.run, (configs.APART,))
    want = configs.APART if apart < 1e-3 else best[0]
    assert run() == want and runner.compiled == [configs.APART, best[0], best[1]]
    again = bench(speed)  # another process
    run = lambda: configs.tuned("x", torch.empty(1, dtype=BF16), LAYER, ("case",), again.run, (configs.APART,))
    assert run() == want and again.compiled == [want]
    still = bench(speed, may_race=False)
    assert configs.tuned("x", torch.empty(1, dtype=BF16), LAYER, ("b",), still.run, (configs.APART,)) == best[0]
