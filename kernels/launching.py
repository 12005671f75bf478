"""How the launchers launch: tile sizes, the compiled kernel looked up once a case, and launches recorded, not run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES |= {torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8"}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDE_FROM = 2**31  # elements: from here on an offset needs 64 bits; monkeypatched by the tests
LONGEST = 2**30  # samples and pixels: counted in 32 bits, rounded up to whole tiles and chunks
TILE = 2048  # elements a program holds of each tensor: 16 a thread at 4 warps, two 16-byte loads in a 16-bit type
PROGRAMS = 512  # aimed at by a reduction: about four a multiprocessor of the largest cards, the same on every card,
# since the order of a sum, and so its rounding, follows it

Case = tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]

_compiled: dict[tuple, Any] = {}
_recording: list[Case] | None = None


def power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (max(n, 1) - 1).bit_length()


def tile(rows: int, channels: int, pixels: int, channels_last: bool) -> tuple[int, int]:
    """(BLOCK_S, BLOCK_C): a tile of at most TILE elements, its memory in runs of 128 bytes or more where it can be.

    channels_last: 64 channels of a pixel lie together. NCHW: the pixels of a plane do, and those of its neighbours
    where a plane is small; four planes at least, so that finding a pixel's place is paid once for four elements.
    """
    together = 64 if channels_last else max(4, 256 // power_of_2(pixels))
    block_c = min(power_of_2(channels), together)
    return min(power_of_2(rows), TILE // block_c), block_c


def chunks_of(rows: int, block: int, programs: int) -> tuple[int, int]:
    """(chunks, rows in each): into how many parts `programs` programs should each split a sum over rows."""
    tiles = triton.cdiv(rows, block)
    chunks = min(power_of_2(triton.cdiv(PROGRAMS, programs)), power_of_2(tiles), 64)
    return chunks, triton.cdiv(tiles, chunks) * block


def declines(first: Tensor, *rest: Tensor | None) -> str:
    """Why the Triton kernels leave these activations to the reference, or ""."""
    if first.dtype not in FLOATS:
        return f"triton kernels compute in float32, bfloat16 and float16, got {first.dtype}"
    if any(t is not None and (t.dtype != first.dtype or t.device != first.device) for t in rest):
        return "triton kernels take activations of one dtype and one device"
    if first.numel() // max(first.shape[1] if first.dim() > 1 else 1, 1) > LONGEST:
        return f"triton kernels count samples and pixels in 32 bits, got more than {LONGEST}"
    return "an empty tensor" if any(t is not None and t.numel() == 0 for t in (first, *rest)) else ""


def contiguous(*vectors: Tensor | None) -> list[Tensor | None]:
    """Per-channel vectors as the kernels read them; None stays None."""
    return [None if v is None else v.contiguous() for v in vectors]


def wide(*tensors: Tensor | None) -> bool:
    """Whether an offset into one of these may pass 32 bits."""
    return any(t is not None and t.numel() >= WIDE_FROM for t in tensors)


def launch(
    kernel: Any, programs: int, *args: Any, num_warps: int = 4, num_stages: int | None = None, **constants: Any
) -> None:
    """kernel[(programs,)](*args, **constants) on the stream of args[0]'s device.

    Triton's own front door binds, specialises and looks up at every call. Here the compiled kernel is kept under what
    it was specialised for: dtypes, 16-byte alignment of pointers, integers that are 1 or multiples of 16, constants.
    A kernel's parameters are its arguments first and then its constants, in the order in which they come here.
    """
    # fusing a*b+c is torch's own habit; said explicitly, since Triton is about to change its default
    options = {"num_warps": num_warps, "enable_fp_fusion": True} | ({"num_stages": num_stages} if num_stages else {})
    if _recording is not None:
        _recording.append(_case(kernel, args, constants, options))
        return
    device = args[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, programs, *args, num_warps=num_warps, num_stages=num_stages, **constants)
    key = (kernel.fn, device, num_warps, num_stages, *constants.values(), *map(_specialised, args))
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(programs, 1, 1)](*args, *constants.values())
        return
    compiled = kernel[(programs,)](*args, **constants, **options)
    if compiled is not None:  # None: emulated
        _compiled[key] = compiled


def _specialised(a: Any) -> Any:
    if isinstance(a, Tensor):
        return a.dtype, a.data_ptr() % 16 == 0
    if isinstance(a, int):
        return a == 1, a % 16 == 0, -(2**31) <= a < 2**31
    return type(a)


# ---- for ahead-of-time compilation -----------------------------------------------------------------------------------


def recorded(runs: Iterator[Callable[[], Any]]) -> list[Case]:
    """The launches that these calls would make, on tensors of the "meta" device: (kernel, signature, constexprs,
    options), without doubles. What the compile checks compile is so what users launch, at sizes no test could hold.
    Sizes are named S, C, P, CG, rows (multiples of 16 where the layer's are); other integers are counts."""
    with _recorder() as cases:
        for run in runs:
            run()
    unique = {repr((kernel.fn, *rest)): (kernel, *rest) for kernel, *rest in cases}
    return list(unique.values())


def meta(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    """A tensor without memory, for `recorded`."""
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.contiguous(memory_format=torch.channels_last) if channels_last else t


@contextlib.contextmanager
def _recorder() -> Iterator[list[Case]]:
    global _recording
    before, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = before


def _case(kernel: Any, args: tuple, constants: dict[str, Any], options: dict[str, Any]) -> Case:
    """A launch in the words of Triton's own ahead-of-time compiler: `None` and integers of 1 are constants, and ":16"
    marks what is a multiple of 16 (pointers too), without which loads come out scalar."""
    names = [p.name for p in kernel.params]
    given = dict(zip(names, args, strict=False))
    fixed = {name: a for name, a in given.items() if a is None or (isinstance(a, int) and a == 1)}
    signature = {name: _type(a) for name, a in given.items() if name not in fixed}
    return kernel, signature, {**fixed, **constants}, options


def _type(a: Any) -> str:
    if isinstance(a, Tensor):
        return f"*{DTYPES[a.dtype]}:16"
    if isinstance(a, int):
        return ("i32" if -(2**31) <= a < 2**31 else "i64") + (":16" if a % 16 == 0 else "")
    return "fp32"
