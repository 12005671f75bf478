"""A trained generator for the world outside: ONNX, TorchScript, torch.export's archive, or weights alone.

Generators are plain torch.nn until `fastgan.convert` swaps their classes, and a run's weights load into the plain ones:
an exported file holds only torch's ops and runs where fastgan is not installed. The file is read back and compared
with the generator before it gets its name.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastgan._writing import atomic_file

__all__ = ["FORMATS", "export"]

# As a share of the largest value. TorchScript and torch.export run the same kernels; ONNX adds in another order.
TOLERANCE = {"torchscript": 1e-5, "pt2": 1e-5, "onnx": 1e-3}
BATCHES = (2, 3)  # one to trace with, another to compare with: the size of the batch must be free

Run = Callable[..., Tensor]
Inputs = tuple[Tensor, ...]  # z, and labels of a conditional generator


def export(
    generator: nn.Module,
    path: str | Path,
    *,
    format: str,
    latent: int,
    classes: int = 0,
    facts: dict[str, Any] | None = None,
) -> str:
    """Write `generator`, which takes [N, latent] with any N (and labels [N] if it has classes), in eval mode.

    Args:
        generator: plain torch modules, float32, on the CPU.
        path: the file.
        format: "onnx" (needs onnx and onnxscript), "torchscript", "pt2" (torch.export) or "safetensors" (weights alone,
            needs safetensors).
        latent: length of z.
        classes: of a conditional generator, else 0.
        facts: put beside the weights where the format has room for it (safetensors).

    Returns:
        what was compared with what, in one line.

    Raises:
        ValueError: an unknown format, or modules that are not plain torch.
        ImportError: the format's package is absent; says which.
        RuntimeError: what was written does not give the generator's numbers. No file is left then.
    """
    if format not in FORMATS:
        raise ValueError(f"export: format must be one of {', '.join(FORMATS)}, got {format!r}")
    for name, m in generator.named_modules():
        if type(m).__module__.startswith(("fastgan.nn", "fastgan.convert")):
            kind = type(m).__name__
            raise ValueError(
                f"export: the generator must be plain torch.nn, got {name} ({kind}); export it unconverted"
            )
    generator = generator.eval()
    rng = torch.Generator().manual_seed(0)
    inputs, other = (
        (torch.randn(n, latent, generator=rng), *([torch.arange(n) % classes] if classes else [])) for n in BATCHES
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporters warn of their own future
        written, run = FORMATS[format](generator, inputs, facts or {})
        said = _compared(format, generator, run, other)
    with atomic_file(Path(path)) as file:
        file.write(written)
    return said


def _compared(format: str, generator: nn.Module, run: Run | None, inputs: Inputs) -> str:
    if run is None:
        return "the graph was checked; its numbers were not, which needs onnxruntime"
    want = generator(*inputs)
    got = run(*inputs)
    error, scale = (got - want).abs().max().item(), want.abs().max().item()
    if got.shape != want.shape or not error <= TOLERANCE.get(format, 0.0) * scale:
        raise RuntimeError(
            f"export: {format} must give the generator's numbers, got a largest difference of {error:.3g}"
        )
    return f"read back and compared with the generator on {len(inputs[0])} latents: largest difference {error:.1e}"


def _needed(module: str, format: str) -> ModuleType:
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"export: {format} needs the package {module}, which is not installed; pip install {module}")
    return importlib.import_module(module)


# ---- formats: (generator, inputs, facts) -> the file's bytes, and what reads them back -------------------------------


def _torchscript(generator: nn.Module, inputs: Inputs, facts: dict[str, Any]) -> tuple[bytes, Run | None]:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(generator, inputs), buffer)
    return buffer.getvalue(), torch.jit.load(io.BytesIO(buffer.getvalue()))


def _pt2(generator: nn.Module, inputs: Inputs, facts: dict[str, Any]) -> tuple[bytes, Run | None]:
    buffer = io.BytesIO()
    torch.export.save(_exported(generator, inputs), buffer)
    run: Run = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    return buffer.getvalue(), run


def _exported(generator: nn.Module, inputs: Inputs) -> Any:
    batch = torch.export.Dim("batch")
    return torch.export.export(generator, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))


def _safetensors(generator: nn.Module, inputs: Inputs, facts: dict[str, Any]) -> tuple[bytes, Run | None]:
    _needed("safetensors", "safetensors")
    tensors = importlib.import_module("safetensors.torch")
    state = {name: value.contiguous() for name, value in generator.state_dict().items()}
    written: bytes = tensors.save(state, metadata={"fastgan": json.dumps(facts)})

    def run(*inputs: Tensor) -> Tensor:
        images: Tensor = torch.func.functional_call(generator, tensors.load(written), inputs)
        return images

    return written, run


def _onnx(generator: nn.Module, inputs: Inputs, facts: dict[str, Any]) -> tuple[bytes, Run | None]:
    onnx = _needed("onnx", "onnx")
    _needed("onnxscript", "onnx")
    program = torch.onnx.export(
        _exported(generator, inputs),
        dynamo=True,
        verbose=False,
        input_names=["z", "labels"][: len(inputs)],
        output_names=["images"],
    )
    if program is None:
        raise RuntimeError("export: torch.onnx must return a program, got None")
    written: bytes = program.model_proto.SerializeToString()
    onnx.checker.check_model(onnx.load_from_string(written), full_check=True)
    if importlib.util.find_spec("onnxruntime") is None:
        return written, None
    session = importlib.import_module("onnxruntime").InferenceSession(written, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    feed = lambda tensors: {name: t.numpy() for name, t in zip(names, tensors, strict=True)}
    return written, lambda *tensors: torch.from_numpy(session.run(None, feed(tensors))[0])


FORMATS: dict[str, Callable[[nn.Module, Inputs, dict[str, Any]], tuple[bytes, Run | None]]] = {
    "onnx": _onnx,
    "torchscript": _torchscript,
    "safetensors": _safetensors,
    "pt2": _pt2,
}
