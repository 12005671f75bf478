"""precision="auto": by the machine's instructions and by a measured layer; a run keeps what it resolved to."""

import json
import types

import pytest
import torch

import fastgan
from fastgan.choice import STATE, native
from fastgan.choice.state import State
from fastgan.cli import main
from fastgan.training import precision
from fastgan.training.assembly import precision_of
from fastgan.training.precision import resolve

CPU = torch.device("cpu")


@pytest.fixture
def table(monkeypatch, tmp_path):
    """The native core on a table of a name, in a process with an empty cache, where bf16's gain is a given number."""
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path / "cache"))
    for name, value in vars(State()).items():
        monkeypatch.setattr(STATE, name, value)

    def force(name, gain=2.0):
        measured = []
        fake = types.SimpleNamespace(table=lambda: name)
        monkeypatch.setattr(precision, "native", lambda: (fake, "") if name else (None, "no core here"))
        monkeypatch.setattr(precision, "bf16_gain", lambda layer: measured.append(layer) or gain)
        precision.warn.cache_clear()
        return measured

    return force


@pytest.mark.parametrize(
    ("name", "gain", "want"),
    [("avx512_bf16", 1.7, "bf16"), ("amx", 3.0, "bf16"), ("avx512_bf16", 0.9, "fp32"), ("avx512", 9.0, "fp32"),
     ("avx2", 9.0, "fp32"), ("portable", 9.0, "fp32"), ("", 9.0, "fp32")],
)  # fmt: skip  # a table
def test_auto_goes_by_instructions_and_then_by_a_measurement(table, name, gain, want):
    measured = table(name, gain)
    found = resolve("auto", CPU, ())
    assert found.name == want and found.why.startswith("auto: ")
    assert len(measured) == (name in precision.FAST_TABLES)
    assert resolve("auto", CPU, ()) == found and len(measured) <= 1  # the cache remembers
    assert not STATE.verdicts  # a fact about the machine is no choice of a run


@pytest.mark.parametrize(("capability", "want"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_on_a_gpu_goes_by_its_tensor_cores(monkeypatch, capability, want):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = resolve("auto", torch.device("cuda"), ())
    assert found.name == want and f"sm_{capability[0]}{capability[1]}" in found.why


def test_bf16_by_name_runs_with_one_line_where_it_is_slower(table, capsys):
    table("avx2")

    def step():
        g, d = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)
        adam = lambda m: torch.optim.Adam(m.parameters())
        return fastgan.GANStep(g, d, latent=2, g_optimizer=adam(g), d_optimizer=adam(d), precision="bf16")

    assert step().precision == step().precision == "bf16"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "slower than fp32 here" in said[0] and "avx2" in said[0]
    table("avx512_bf16")
    assert step().precision == "bf16" and not capsys.readouterr().err


def test_a_step_resolves_auto_and_says_why(table):
    table("avx512_bf16", 1.7)
    g, d = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)
    adam = lambda m: torch.optim.Adam(m.parameters())
    step = fastgan.GANStep(g, d, latent=2, g_optimizer=adam(g), d_optimizer=adam(d), precision="auto")
    assert step.precision == "bf16" and "bf16 (auto: AVX-512 BF16" in step.explain() and "1.7 times" in step.explain()


def test_a_run_records_what_auto_was_and_a_resumed_one_keeps_it(table, tmp_path, capsys):
    table("avx512_bf16", 1.7)
    small = ["--batch-size", "4", "--set", "model_options.g_width=8", "--set", "model_options.d_width=8"]
    run = ["train", "--recipe", "dcgan-28", "--data", "shapes", "--out", str(tmp_path / "run"), *small]
    run = [word if word != "shapes" else "fashion-mnist" for word in run]
    assert main([*run, "--steps", "1", "--dry-run"]) == 0
    assert "bf16 (auto: AVX-512 BF16" in capsys.readouterr().out
    assert main([*run, "--steps", "1"]) == 0
    shown = capsys.readouterr()
    assert "bf16 (auto: AVX-512 BF16" in shown.out + shown.err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]["precision"] == "bf16"
    table("avx2")  # the run moves to a machine that would choose otherwise
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "2", "--quiet"]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]["precision"] == "bf16"


@pytest.mark.parametrize(
    ("recipe", "layer"),
    [("chargan", "conv1d"), ("wavegan", "conv1d"), ("hifigan-small", "conv1d"), ("dcgan-64", "conv2d"),
     ("clip-32", "conv2d"), ("mlp-28", "linear")],
)  # fmt: skip  # a table
def test_auto_goes_by_the_layers_that_a_recipe_has(table, recipe, layer):
    measured = table("avx512_bf16", 1.7)
    found = precision_of(fastgan.recipes()[recipe].replace(precision="auto"), CPU)
    assert found.name == "bf16" and measured == [layer] and precision.LAYERS[layer].words in found.why
    networks = fastgan.models.build(recipe)
    assert precision_of(fastgan.recipes()[recipe].replace(precision="auto"), CPU, networks) == found
    assert measured == [layer]  # the cache remembers


def test_each_kind_of_layer_is_remembered_by_itself(table):
    measured = table("avx512_bf16", 1.7)
    for network in (torch.nn.Linear(2, 2), torch.nn.Conv1d(2, 2, 1), torch.nn.Conv2d(2, 2, 1)) * 2:
        resolve("auto", CPU, [network])
    assert measured == ["linear", "conv1d", "conv2d"]


@pytest.mark.skipif(native()[0] is None, reason="no native core here")
@pytest.mark.parametrize("layer", precision.LAYERS)
def test_the_measured_layer_is_a_real_one(layer):
    assert 0.02 < precision.bf16_gain(layer, rounds=2) < 50
