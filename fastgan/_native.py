"""What the launchers of compiled kernels share: the two cores, dtype codes, float32 vectors, why a case is declined.

A core is a set of C++ kernels behind one set of function names: `CPU` is fastgan._C, `CUDA` is fastgan._C.cuda or,
under `fastgan.testing.emulate("cuda")`, the same sources compiled for the CPU. An op has one launcher that takes the
core, and `backends(launch, activations)` registers it for both.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan._layout import CHANNELS_LAST, laid_out
from fastgan.choice import Backend, native

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TF32 = 3  # float32 tensors multiplied in TF32: CUDA's convolutions only


class Core:
    """The CPU's kernels: fastgan._C."""

    name = "native"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)

    def module(self) -> Any:
        """The functions, or a RuntimeError with the reason why they are absent."""
        module, reason = native()
        if module is None:
            raise RuntimeError(f"native: the compiled core must be present, got none: {reason}")
        return module

    def address(self, t: Tensor | None) -> int:
        """What the kernels take for a tensor: its address, 0 for None. The caller keeps the tensor alive."""
        return 0 if t is None else t.data_ptr()

    def addresses(self, tensors: Sequence[Tensor]) -> list[int]:
        """`address` of many tensors, without a call for each."""
        return [t.data_ptr() for t in tensors]

    def call(self, kernel: str, x: Tensor, *args: Any) -> None:
        """module().<kernel>(*args) on x's device; the kernel asks a tensor among args for its address."""
        getattr(self.module(), kernel)(*args, torch.get_num_threads())

    def pixels(self, x: Tensor) -> Tensor:
        """An image [N, C, H, W] as convolutions read it: dense channels_last, x itself where it is that already.

        By the kernel with which programs change layouts: 0.03 ms for [8, 64, 32, 32] in float32, PyTorch's copy took
        0.44 ms (2 cores of AMD EPYC Zen 5, AVX-512).
        """
        if x.dtype not in self.dtypes or not x.is_contiguous() or x.is_contiguous(memory_format=CHANNELS_LAST):
            return x.contiguous(memory_format=CHANNELS_LAST)
        n, c, h, w = x.shape
        return self._turned(x, torch.empty_like(x, memory_format=CHANNELS_LAST), n, c, h * w)

    def image(self, y: Tensor, channels_last: bool, elementwise: bool) -> Tensor:
        """A dense channels_last image in the layout asked for, with torch's own strides (`laid_out`)."""
        n, c, h, w = y.shape
        if channels_last or c == 1 or h * w == 1:
            return laid_out(y, channels_last, elementwise)
        return self._turned(y, torch.empty_like(y, memory_format=torch.contiguous_format), n, h * w, c)

    def _turned(self, x: Tensor, y: Tensor, n: int, rows: int, columns: int) -> Tensor:
        """y [n][columns][rows] of x [n][rows][columns]."""
        code = DTYPE_CODES[x.dtype]
        self.call("relayout", x, code, code, x, y, n, rows, columns)
        return y

    def declines(self, first: Tensor, *rest: Tensor | None, also: tuple[torch.dtype, ...] = ()) -> str:
        """Why the kernels leave these activations to the reference, or ""; also: dtypes that a launcher converts."""
        dtypes = (*self.dtypes, *also)
        if first.dtype not in dtypes:
            names = [str(d).partition(".")[2] for d in dtypes]
            return f"{self.name} kernels compute in {', '.join(names[:-1])} and {names[-1]}, got {first.dtype}"
        if any(t is not None and (t.dtype != first.dtype or t.device != first.device) for t in rest):
            return f"{self.name} kernels take activations of one dtype and one device"
        return "an empty tensor" if any(t is not None and t.numel() == 0 for t in (first, *rest)) else ""


class CudaCore(Core):
    """The CUDA kernels: fastgan._C.cuda on the current stream of x's device."""

    name = "cuda"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    emulator: Any = None  # tests/emulation/cuda_shim.py's stand-in for the module

    def module(self) -> Any:
        return self.emulator or super().module().cuda

    def pixels(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=CHANNELS_LAST)

    def image(self, y: Tensor, channels_last: bool, elementwise: bool) -> Tensor:
        return laid_out(y, channels_last, elementwise)

    def address(self, t: Tensor | None) -> int:
        if self.emulator is not None and t is not None:
            self.emulator.declare(t)
        return super().address(t)

    def addresses(self, tensors: Sequence[Tensor]) -> list[int]:
        return super().addresses(tensors) if self.emulator is None else [self.address(t) for t in tensors]

    def call(self, kernel: str, x: Tensor, *args: Any) -> None:
        """As Core.call. A kernel that answers with a number of bytes wants that much device memory as well.

        The memory comes from torch's caching allocator and is given back at once: what the allocator gives out next on
        this stream is used after the kernel, and a captured graph keeps its own.
        """
        function, plain = getattr(self.module(), kernel), self._declared(args)
        with self._device(x) if self.emulator is None else self.emulator.running(kernel):
            stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
            wanted = function(*plain, 0, stream)
            if wanted:
                workspace = torch.empty(wanted, dtype=torch.uint8, device=x.device)
                function(*plain, self.address(workspace), stream)

    def _declared(self, args: tuple) -> tuple:
        """args, after an emulator has been told of the tensors among them."""
        if self.emulator is not None:
            for a in args:
                self.address(a) if isinstance(a, Tensor) else None
        return args

    def _device(self, x: Tensor) -> contextlib.AbstractContextManager:
        """x's device as the current one: a stream belongs to a device."""
        if not x.is_cuda or x.get_device() == torch.cuda.current_device():
            return contextlib.nullcontext()
        return torch.cuda.device(x.device)

    @contextlib.contextmanager
    def emulated(self, emulator: Any) -> Iterator[None]:
        """Within: the emulator's kernels, on CPU tensors."""
        before, self.emulator = self.emulator, emulator
        try:
            yield
        finally:
            self.emulator = before


CPU, CUDA = Core(), CudaCore()


def backends(
    launch: Callable[..., Any], activations: Callable[..., tuple], cuda_declines: Callable[..., str] = lambda *args: ""
) -> dict[str, Backend]:
    """{"cuda": ..., "native": ...} of one launcher launch(core, *args).

    activations(*args) gives the tensors that must be of one dtype and one device, the first of them not None;
    cuda_declines(*args) what else the CUDA kernels leave to the reference.
    """
    return {"cuda": backend(CUDA, launch, activations, cuda_declines), "native": backend(CPU, launch, activations)}


def backend(
    core: Core,
    launch: Callable[..., Any],
    activations: Callable[..., tuple],
    also: Callable[..., str] = lambda *args: "",
) -> Backend:
    return Backend(functools.partial(launch, core), lambda *args: core.declines(*activations(*args)) or also(*args))


def float_vectors(*vectors: Tensor | None) -> list[Tensor | None]:
    """Dense float32 copies of per-channel vectors (themselves where they are that already); None stays None."""
    return [
        v
        if v is None or (v.dtype == torch.float32 and v.is_contiguous())  # 0.2 us, three calls of torch take 1
        else v.detach().to(torch.float32).contiguous()
        for v in vectors
    ]
