"""What the native launchers share: the compiled module, dtype codes, float32 vectors, and why a case is declined."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgan.backends import native

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


def core() -> Any:
    """fastgan._C, or a RuntimeError with the reason why it is absent."""
    module, reason = native()
    if module is None:
        raise RuntimeError(f"native: the compiled core must be present, got none: {reason}")
    return module


def float_vectors(*vectors: Tensor | None) -> list[Tensor | None]:
    """Dense float32 copies of per-channel vectors (themselves where they are that already); None stays None."""
    return [None if v is None else v.detach().to(torch.float32).contiguous() for v in vectors]


def address(t: Tensor | None) -> int:
    """What the kernels take for a tensor: its address, 0 for None. The caller keeps the tensor alive."""
    return 0 if t is None else t.data_ptr()


def declines(first: Tensor, *rest: Tensor | None) -> str:
    """Why the kernels leave these activations to the reference, or ""."""
    if first.dtype not in DTYPE_CODES:
        return f"native kernels compute in float32 and bfloat16, got {first.dtype}"
    if any(t is not None and (t.dtype != first.dtype or t.device != first.device) for t in rest):
        return "native kernels take activations of one dtype and one device"
    return "an empty tensor" if any(t is not None and t.numel() == 0 for t in (first, *rest)) else ""
