"""fastgan export: files that hold torch's ops alone and give the generator's numbers."""

import importlib.util
import io
import json
import re

import pytest
import torch

import fastgan
from fastgan import export as exporting
from fastgan.cli import main
from fastgan.training.recipes import recipes
from fastgan.training.sampling import build_models

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # that format's own
SMALL = {"dcgan-64": {"g_width": 2, "d_width": 2}, "dcgan-28": {"g_width": 2, "d_width": 2}}
SMALL["stylegan2-small"] = {"g_width": 4, "d_width": 4}
FORMATS = ("torchscript", "pt2", "safetensors", "onnx")


def generator(name="dcgan-28"):
    recipe = recipes()[name]
    recipe = recipe.replace(model_options=SMALL.get(name, {}))
    made, _ = build_models(recipe)
    for m in made.modules():  # batch norms that have seen something
        if hasattr(m, "running_mean") and m.running_mean is not None:
            m.running_mean.normal_(std=0.1)
            m.running_var.uniform_(0.5, 2.0)
    return made.eval(), recipe.latent


def needs(format):
    for package in {"safetensors": ["safetensors"], "onnx": ["onnx", "onnxscript"]}.get(format, []):
        pytest.importorskip(package, reason=f"{package} is not installed; {format} needs it")


@pytest.mark.parametrize("name", ["dcgan-28", "dcgan-64", "mlp-28"])
@pytest.mark.parametrize("format", FORMATS)
def test_numbers_and_ops(name, format, tmp_path):
    needs(format)
    made, latent = generator(name)
    path = tmp_path / "generator"
    exporting.export(made, path, format=format, latent=latent, facts={"name": name})
    z = torch.randn(5, latent)
    with torch.no_grad():
        want = made(z)
    got, graph = read(path.read_bytes(), format, made, z)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert "fastgan" not in graph
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("format", ["torchscript", "pt2"])
def test_networks_of_our_functions_hold_torchs_ops(format, tmp_path):
    """Their batch stays free too: what is written takes another one than it was traced with."""
    made, latent = generator("stylegan2-small")
    exporting.export(made, tmp_path / "generator", format=format, latent=latent)
    z = torch.randn(5, latent)
    got, graph = read((tmp_path / "generator").read_bytes(), format, made, z)
    with torch.no_grad():
        torch.testing.assert_close(got, made(z), rtol=1e-4, atol=1e-5)
    assert "fastgan::" not in graph and "fastgan." not in graph


def read(written, format, made, z):
    """(images, the graph as text)."""
    if format == "torchscript":
        loaded = torch.jit.load(io.BytesIO(written))
        graph = re.sub(r" # /.*", "", str(loaded.inlined_graph))  # the place of a line: any folder has any name
        return loaded(z), graph.replace("fastgan.models", "")
    if format == "pt2":
        loaded = torch.export.load(io.BytesIO(written))
        return loaded.module()(z), "\n".join(str(node.target) for node in loaded.graph.nodes)
    if format == "safetensors":
        from safetensors.torch import load

        state = load(written)
        assert state.keys() == made.state_dict().keys()
        length = int.from_bytes(written[:8], "little")
        facts = json.loads(json.loads(written[8 : 8 + length])["__metadata__"]["fastgan"])
        assert facts["name"] in recipes()
        return torch.func.functional_call(made, state, (z,)), ""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load_from_string(written)
    found = ReferenceEvaluator(model).run(None, {"z": z.numpy()})[0]
    return torch.from_numpy(found), "\n".join(f"{node.domain}.{node.op_type}" for node in model.graph.node)


def test_converted_modules_are_refused(tmp_path):
    made, latent = generator()
    with pytest.raises(ValueError, match=r"must be plain torch.nn, got .* export it unconverted"):
        exporting.export(fastgan.convert(made), tmp_path / "x", format="pt2", latent=latent)
    with pytest.raises(ValueError, match="format must be one of onnx, torchscript, safetensors, pt2, got 'tflite'"):
        exporting.export(made, tmp_path / "x", format="tflite", latent=latent)
    assert not list(tmp_path.iterdir())


def test_wrong_numbers_leave_no_file(tmp_path, monkeypatch):
    made, latent = generator()
    monkeypatch.setitem(exporting.FORMATS, "pt2", lambda g, z, facts: (b"", lambda z: g(z) + 1e-3))
    with pytest.raises(RuntimeError, match=r"pt2 must give the generator's numbers, got .* 0\.001"):
        exporting.export(made, tmp_path / "x", format="pt2", latent=latent)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format, package", [("onnx", "onnx"), ("onnx", "onnxscript"), ("safetensors", "safetensors")])
def test_absent_packages_are_named(format, package, tmp_path, monkeypatch):
    made, latent = generator()
    real = importlib.util.find_spec
    known = lambda name, *rest: None if name == package else real("json" if name in ("onnx", "onnxscript") else name)
    monkeypatch.setattr(importlib.util, "find_spec", known)
    if package == "onnxscript":
        needs("onnx")
    with pytest.raises(
        ImportError, match=f"needs the package {package}, which is not installed; pip install {package}"
    ):
        exporting.export(made, tmp_path / "x", format=format, latent=latent)


def test_the_command(tmp_path, capsys):
    run = tmp_path / "run"
    small = ["--set=model_options.g_width=2", "--set=model_options.d_width=2", "--batch-size=4", "--backend=reference"]
    assert main(["train", "--recipe=dcgan-28", f"--out={run}", "--steps=1", "--quiet", "--device=cpu", *small]) == 0
    capsys.readouterr()
    out = tmp_path / "exported" / "generator.pt"
    assert main(["export", f"--run={run}", "--format=torchscript", f"--out={out}"]) == 0
    assert "compared with the generator on 3 latents: largest difference" in capsys.readouterr().out
    assert torch.jit.load(out)(torch.randn(2, 100)).shape == (2, 1, 28, 28)
    assert main(["export", f"--run={tmp_path}", "--format=pt2", f"--out={out}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["export", f"--run={run}", "--format=tflite", f"--out={out}"]) == 2
