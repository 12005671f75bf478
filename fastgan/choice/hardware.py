"""What the CPU has instructions for, by torch's own predicate: known before anything runs."""

from __future__ import annotations

import functools

import torch

from fastgan.choice.routine import Routine


@functools.cache
def torch_multiplies_bfloat16() -> bool:
    """Whether oneDNN has vector instructions for PyTorch's bfloat16 convolutions and products (AVX-512 on x86).

    Held to AVX2, two convolutions of DCGAN-64 take 2.9 and 3.7 times float32's time here (2 cores of AMD EPYC Zen 5);
    on a Zen 3 a whole step in bfloat16 was seen to take 26 s instead of 0.56 s.
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def lacks_products(op: Routine, args: tuple) -> str:
    """Why PyTorch's own op must not run this case, not even in a race or a proof, or ""."""
    first = op.first(args)
    if op.products and first.device.type == "cpu" and first.dtype == torch.bfloat16 and not torch_multiplies_bfloat16():
        return "PyTorch multiplies bfloat16 without vector instructions on this CPU"
    return ""
