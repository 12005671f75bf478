"""What the CPU has instructions for, by its flags and torch's own predicates: known before anything runs."""

from __future__ import annotations

import functools
import platform

import torch

from fastgan.choice.routine import Routine


@functools.cache
def torch_multiplies_bfloat16() -> bool:
    """Whether PyTorch's bfloat16 convolutions and products run on vector instructions of this CPU.

    oneDNN needs AVX-512 for them on x86. On AVX2 it falls back to scalar code: 40 times the time of float32 in a
    convolution of DCGAN-64. `get_cpu_capability` knows of ATEN_CPU_CAPABILITY, the predicate of oneDNN does not.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not x86 or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def lacks_products(op: Routine, args: tuple) -> str:
    """Why PyTorch's own op must not run this case, not even in a race or a proof, or ""."""
    first = op.first(args)
    if op.products and first.device.type == "cpu" and first.dtype == torch.bfloat16 and not torch_multiplies_bfloat16():
        return "PyTorch multiplies bfloat16 without vector instructions on this CPU"
    return ""
