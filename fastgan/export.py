"""A trained generator for the world outside: ONNX, TorchScript, torch.export's archive, or weights alone.

Generators are plain torch.nn until `fastgan.convert` swaps their classes, and a run's weights load into the plain ones:
what is exported holds torch's ops alone and runs where fastgan is not installed. What was written is read back and
compared with the generator before the file gets its name.
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

# Of the largest value: TorchScript and torch.export run the same kernels, ONNX another program in other orders.
TOLERANCE = {"torchscript": 1e-5, "pt2": 1e-5, "onnx": 1e-3}
BATCHES = (2, 3)  # one to trace with, another to compare with: the size of the batch must be free

Run = Callable[[Tensor], Tensor]


def export(
    generator: nn.Module, path: str | Path, *, format: str, latent: int, facts: dict[str, Any] | None = None
) -> str:
    """Write `generator`, which takes [N, latent] with any N, in eval mode.

    Args:
        generator: plain torch modules, float32, on the CPU.
        path: the file.
        format: "onnx" (needs onnx and onnxscript), "torchscript", "pt2" (torch.export) or "safetensors" (weights alone,
            needs safetensors).
        latent: length of z.
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
    z, other = (torch.randn(n, latent, generator=rng) for n in BATCHES)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporters warn of their own future
        written, run = FORMATS[format](generator, z, facts or {})
        said = _compared(format, generator, run, other)
    with atomic_file(Path(path)) as file:
        file.write(written)
    return said


def _compared(format: str, generator: nn.Module, run: Run | None, z: Tensor) -> str:
    if run is None:
        return "the graph was checked; its numbers were not, which needs onnxruntime"
    want = generator(z)
    got = run(z)
    error, scale = (got - want).abs().max().item(), want.abs().max().item()
    if got.shape != want.shape or not error <= TOLERANCE.get(format, 0.0) * scale:
        raise RuntimeError(
            f"export: {format} must give the generator's numbers, got a largest difference of {error:.3g}"
        )
    return f"read back and compared with the generator on {len(z)} latents: largest difference {error:.1e}"


def _needed(module: str, format: str) -> ModuleType:
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"export: {format} needs the package {module}, which is not installed; pip install {module}")
    return importlib.import_module(module)


# ---- formats: (generator, z, facts) -> the file's bytes, and what reads them back ------------------------------------


def _torchscript(generator: nn.Module, z: Tensor, facts: dict[str, Any]) -> tuple[bytes, Run | None]:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(generator, z), buffer)
    return buffer.getvalue(), torch.jit.load(io.BytesIO(buffer.getvalue()))


def _pt2(generator: nn.Module, z: Tensor, facts: dict[str, Any]) -> tuple[bytes, Run | None]:
    buffer = io.BytesIO()
    torch.export.save(_exported(generator, z), buffer)
    run: Run = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    return buffer.getvalue(), run


def _exported(generator: nn.Module, z: Tensor) -> Any:
    return torch.export.export(generator, (z,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _safetensors(generator: nn.Module, z: Tensor, facts: dict[str, Any]) -> tuple[bytes, Run | None]:
    _needed("safetensors", "safetensors")
    tensors = importlib.import_module("safetensors.torch")
    state = {name: value.contiguous() for name, value in generator.state_dict().items()}
    written: bytes = tensors.save(state, metadata={"fastgan": json.dumps(facts)})

    def run(z: Tensor) -> Tensor:
        images: Tensor = torch.func.functional_call(generator, tensors.load(written), (z,))
        return images

    return written, run


def _onnx(generator: nn.Module, z: Tensor, facts: dict[str, Any]) -> tuple[bytes, Run | None]:
    onnx = _needed("onnx", "onnx")
    _needed("onnxscript", "onnx")
    program = torch.onnx.export(
        _exported(generator, z), dynamo=True, verbose=False, input_names=["z"], output_names=["images"]
    )
    if program is None:
        raise RuntimeError("export: torch.onnx must return a program, got None")
    written: bytes = program.model_proto.SerializeToString()
    onnx.checker.check_model(onnx.load_from_string(written), full_check=True)
    if importlib.util.find_spec("onnxruntime") is None:
        return written, None
    session = importlib.import_module("onnxruntime").InferenceSession(written, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return written, lambda z: torch.from_numpy(session.run(None, {name: z.numpy()})[0])


FORMATS: dict[str, Callable[[nn.Module, Tensor, dict[str, Any]], tuple[bytes, Run | None]]] = {
    "onnx": _onnx,
    "torchscript": _torchscript,
    "safetensors": _safetensors,
    "pt2": _pt2,
}
