"""Runs Triton kernels on CPU tensors, without a GPU, and raises where a GPU would be wrong.

`with emulation() as record:` sends every launch of a `@triton.jit` kernel, however long ago it was imported, through
Triton's interpreter, and adds to it what the interpreter lacks:

- bfloat16: casts round to nearest even, dots widen, and arithmetic on raw bfloat16 raises (it would add the bits);
- fp32 dots round their operands to TF32 unless the kernel says `input_precision="ieee"`, as a GPU does;
- every argument lies between red zones and is checked byte by byte: an access outside all of them raises;
- programs of a grid run in a seeded random order, and an access that two programs could make in either order raises;
- so does a load of what the same program stored before, without `tl.debug_barrier()`: its threads run apart;
- a store of different values to one address, and a dot smaller than the GPU's minimum, raise;
- lanes that a load masks off without `other` hold NaN, and a launch that loaded any runs twice, with two fillings:
  results that differ depended on them, which raises.

It counts what a kernel moves: see `Launch`. Triton 3.8 and 3.9. On exit Triton compiles again as if nothing had been.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.jit import JITFunction

RED_ZONE = 4096  # bytes on either side of an argument
RED = 0xA5
SECTOR = 32  # bytes: the unit in which a GPU's memory moves
SMALLEST_DOT = {8: 32, 16: 16, 32: 8, 64: 4}  # bits of an operand -> least K; Triton's NVIDIA backend refuses less
NOBODY, MANY = -1, -2  # values of a shadow byte beside the number of a program

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


class CheckError(AssertionError):
    """A kernel did what is undefined, forbidden or a race on a GPU."""


@dataclass
class Launch:
    """What one launch moved and computed; bytes, summed over its programs.

    loaded, stored, atomic              requested by active lanes
    unique_loaded, unique_stored        distinct bytes of the arguments: what DRAM must move at least
    sectors, ideal_sectors              32-byte sectors touched per access, and as few as those bytes fill
    dot_flops                           2 M N K of every tl.dot
    """

    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any] = field(default_factory=dict)  # scalars and constexprs
    loaded: int = 0
    stored: int = 0
    atomic: int = 0
    unique_loaded: int = 0
    unique_stored: int = 0
    sectors: int = 0
    ideal_sectors: int = 0
    dot_flops: int = 0


@dataclass
class Record:
    """The launches of one emulation, in order."""

    launches: list[Launch] = field(default_factory=list)

    def total(self, count: str) -> int:
        """Sum of one of Launch's counts over all launches."""
        return sum(getattr(launch, count) for launch in self.launches)

    @property
    def kernels(self) -> list[str]:
        return [launch.kernel for launch in self.launches]


# ---- number formats --------------------------------------------------------------------------------------------------


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def tf32(values: np.ndarray) -> np.ndarray:
    """float32 with its mantissa rounded to TF32's ten bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded, bits).astype(np.uint32).view(np.float32)


# ---- memory ----------------------------------------------------------------------------------------------------------


class Region:
    """The bytes [low, high) of one argument, with who read, wrote and atomically changed each of them."""

    def __init__(self, name: str, low: int, owned: np.ndarray):
        self.name, self.low, self.high = name, low, low + owned.size
        self.owned = owned  # False: a hole between the rows of a strided view
        self.forget()

    def forget(self) -> None:
        self.readers, self.writers, self.atomics = (np.full(self.owned.size, NOBODY, np.int32) for _ in range(3))
        self.own: list[np.ndarray] = []  # what the running program stored since its last barrier

    def merge(self, other: Region) -> Region:
        """One region for two that overlap: two views of one storage."""
        low, high = min(self.low, other.low), max(self.high, other.high)
        owned = np.zeros(high - low, bool)
        for part in (self, other):
            owned[part.low - low : part.high - low] |= part.owned
        return Region(f"{self.name}|{other.name}", low, owned)

    def touch(self, offsets: np.ndarray, access: str, program: int) -> str:
        """Note an access by `program`; the sentence that says which race it makes, or ""."""

        def others(shadow: np.ndarray) -> bool:
            seen = shadow[offsets]
            return bool(((seen != NOBODY) & (seen != program)).any())

        clash = ""
        if others(self.writers):
            clash = "another program of the launch writes"
        elif access != "reads" and others(self.readers):
            clash = "another program of the launch reads"
        elif access != "changes atomically" and others(self.atomics):
            clash = "another program of the launch changes atomically"
        elif access == "reads" and any(np.isin(offsets, stored).any() for stored in self.own):
            clash = "it stored itself, maybe from another thread, without tl.debug_barrier()"
        if access == "writes":
            self.own.append(offsets)
        shadow = {"reads": self.readers, "writes": self.writers, "changes atomically": self.atomics}[access]
        seen = shadow[offsets]
        shadow[offsets] = np.where((seen == NOBODY) | (seen == program), program, MANY)
        return f"{access} bytes of '{self.name}' that {clash}" if clash else ""


class Memory:
    """A launch's tensor arguments, copied between red zones; `write_back` copies them home."""

    def __init__(self, arguments: dict[str, Any]):
        self.buffers: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}  # storage -> its bytes, buffer, start
        self.regions: list[Region] = []
        self.arguments = {name: self._move(name, value) for name, value in arguments.items()}
        self.regions.sort(key=lambda region: region.low)
        merged: list[Region] = []
        for region in self.regions:
            if merged and region.low < merged[-1].high:
                merged[-1] = merged[-1].merge(region)
            else:
                merged.append(region)
        self.regions = merged

    def _move(self, name: str, value: Any) -> Any:
        if isinstance(value, interpreter.TensorDescriptor):
            rest = [value.shape, value.strides, value.block_shape, value.padding]
            if hasattr(value, "round_f32_to_tf32"):  # Triton 3.9
                rest.append(value.round_f32_to_tf32)
            return interpreter.TensorDescriptor(self._move(name, value.base), *rest)
        if not hasattr(value, "data_ptr"):
            return value
        tensor = interpreter._unwrap_tensor(value)
        storage, width = tensor.untyped_storage(), tensor.element_size()
        buffer, start = self._buffer(storage)
        low = buffer.data_ptr() + start + tensor.storage_offset() * width
        extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        owned = torch.zeros(extent if tensor.numel() else 0, dtype=torch.bool)
        if tensor.numel():
            owned.as_strided(tensor.shape, tensor.stride()).fill_(True)
        self.regions.append(Region(name, low, np.repeat(owned.numpy(), width)))
        moved = torch.empty(0, dtype=tensor.dtype).set_(
            buffer.untyped_storage(), start // width + tensor.storage_offset(), tensor.shape, tensor.stride()
        )
        return interpreter._rewrap_tensor(moved, original_tensor=value)

    def _buffer(self, storage: torch.UntypedStorage) -> tuple[torch.Tensor, int]:
        key = storage.data_ptr()
        if key not in self.buffers:
            size = storage.nbytes()
            buffer = torch.full((size + 2 * RED_ZONE + 256,), RED, dtype=torch.uint8)
            start = RED_ZONE + (-(buffer.data_ptr() + RED_ZONE)) % 256  # aligned as torch's CUDA allocations are
            home = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,), (1,))
            buffer[start : start + size].copy_(home)
            self.buffers[key] = home, buffer, start
        return self.buffers[key][1:]

    def contents(self) -> list[torch.Tensor]:
        return [buffer[start : start + len(home)].clone() for home, buffer, start in self.buffers.values()]

    def reset(self) -> None:
        """As before the launch."""
        for home, buffer, start in self.buffers.values():
            buffer[start : start + len(home)].copy_(home)
        for region in self.regions:
            region.forget()

    def synchronise(self) -> None:
        """A barrier, or the next program."""
        for region in self.regions:
            region.own = []

    def write_back(self) -> None:
        for home, buffer, start in self.buffers.values():
            home.copy_(buffer[start : start + len(home)])

    def red_zones_intact(self) -> bool:
        return all(
            bool((buffer[:start] == RED).all()) and bool((buffer[start + len(home) :] == RED).all())
            for home, buffer, start in self.buffers.values()
        )

    def find(self, addresses: np.ndarray, width: int) -> list[tuple[Region, np.ndarray]] | str:
        """Which bytes of which regions these elements are; or the sentence that says how they miss."""
        parts, found = [], np.zeros(addresses.shape, bool)
        for region in self.regions:
            inside = (addresses >= region.low) & (addresses + width <= region.high)
            if inside.any():
                first = np.unique(addresses[inside] - region.low)
                offsets = (first[:, None] + np.arange(width)).ravel()
                parts.append((region, offsets))
                found[inside] = region.owned[addresses[inside] - region.low]
        if found.all():
            return parts
        stray = int(addresses[~found][0])
        if not self.regions:
            return f"{int((~found).sum())} lanes access memory, and the launch has no tensor argument"
        near = min(self.regions, key=lambda region: min(abs(stray - region.low), abs(stray - region.high)))
        where = f"{stray - near.low:+d} bytes from the start of '{near.name}' ({near.high - near.low} bytes)"
        return f"{int((~found).sum())} lanes are outside every argument, the first {where}"


# ---- running ---------------------------------------------------------------------------------------------------------

FILLINGS = (float("nan"), 0x5A), (-1234.5, 0x25)  # (floating, each byte of an integer) of lanes that were masked off


class Machine:
    """The interpreter with its checks: the state of the launch that runs just now."""

    def __init__(self, seed: int, record: Record):
        self.random, self.record = np.random.default_rng(seed), record
        self.memory: Memory | None = None
        self.count = Launch("", (0, 0, 0))
        self.program, self.filling, self.undefined = 0, FILLINGS[0], False

    def fail(self, what: str) -> None:
        raise CheckError(f"{self.count.kernel}: program {self.program} of {self.count.grid}: {what}")

    def launch(self, kernel: JITFunction, function: Callable, args: tuple, options: dict, grid: Any) -> None:
        """Run all programs of a launch, and once more where it loaded undefined lanes."""
        names = {p.name for p in kernel.params}
        bound = inspect.signature(kernel.fn).bind(*args, **{k: v for k, v in options.items() if k in names})
        bound.apply_defaults()
        for hook in kernel.pre_run_hooks:
            hook(*args, **options)
        dims = grid(dict(bound.arguments)) if callable(grid) else grid
        dims = tuple(int(d) for d in dims) + (1,) * (3 - len(dims))
        plain = {k: v for k, v in bound.arguments.items() if not hasattr(v, "data_ptr")}
        self.memory, self.undefined = Memory(dict(bound.arguments)), False
        order, converted = self.random.permutation(math.prod(dims)), {}
        for p in kernel.params:
            value = self.memory.arguments[p.name]
            converted[p.name] = value if p.is_constexpr else interpreter._implicit_cvt(value)
        try:
            self.count = counted = Launch(kernel.fn.__name__, dims, plain)
            self._run(function, converted, order, FILLINGS[0])
            for region in self.memory.regions:
                changed = region.atomics != NOBODY
                counted.unique_loaded += int(((region.readers != NOBODY) | changed).sum())
                counted.unique_stored += int(((region.writers != NOBODY) | changed).sum())
            if self.undefined:
                self._compare(function, converted, order)
            self.memory.write_back()
            self.record.launches.append(counted)
        finally:
            self.memory = None

    def _run(self, function: Callable, arguments: dict, order: np.ndarray, filling: tuple[float, int]) -> None:
        dims, self.filling = self.count.grid, filling
        interpreter.interpreter_builder.set_grid_dim(*dims)
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # masked lanes may compute 0 / 0
            for program in order:
                self.program = int(program)
                self.memory.synchronise()
                index = np.unravel_index(self.program, dims)
                interpreter.interpreter_builder.set_grid_idx(*(int(i) for i in index))
                function(**arguments)
        if not self.memory.red_zones_intact():
            self.fail("a red zone was overwritten")

    def _compare(self, function: Callable, arguments: dict, order: np.ndarray) -> None:
        """Undefined lanes may be loaded, not used: another filling must give the same bytes."""
        first = self.memory.contents()
        self.memory.reset()
        self.count = Launch(self.count.kernel, self.count.grid)  # not counted
        self._run(function, arguments, order, FILLINGS[1])
        for (home, _, _), a, b in zip(self.memory.buffers.values(), first, self.memory.contents(), strict=True):
            if not torch.equal(a, b):
                names = [r.name for r in self.memory.regions if self._holds(home, r)]
                self.fail(
                    f"what it wrote to '{', '.join(names)}' depends on lanes that a load masked off without `other`"
                )

    def _holds(self, home: torch.Tensor, region: Region) -> bool:
        _, buffer, start = self.memory.buffers[home.data_ptr()]
        return buffer.data_ptr() + start <= region.low < buffer.data_ptr() + start + len(home)

    # ---- accesses

    def access(self, pointers: Handle, mask: np.ndarray, access: str) -> np.ndarray:
        """Check and count the active lanes of one load, store or atomic; their addresses."""
        shape = np.broadcast_shapes(pointers.data.shape, mask.shape)
        active = np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask, shape)].astype(np.int64).ravel()
        width = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        found = self.memory.find(active, width)
        if isinstance(found, str):
            self.fail(f"a {access.partition(' ')[0][:-1]} of {active.size} lanes: {found}")
        for region, offsets in found:
            clash = region.touch(offsets, access, self.program)
            if clash:
                self.fail(f"race: it {clash}")
        distinct = np.unique(active)
        self.count.sectors += np.unique(distinct // SECTOR).size
        self.count.ideal_sectors += -(-distinct.size * width // SECTOR)
        return active

    def masked_load(self, real: Callable) -> Callable:
        def create_masked_load(
            builder: Any, ptrs: Handle, mask: Handle, other: Handle | None, *rest: Any, **named: Any
        ):
            dtype = interpreter._get_np_dtype(ptrs.get_element_ty())
            active = self.access(ptrs, mask.data, "reads")
            self.count.loaded += active.size * dtype.itemsize
            if other is None:
                if active.size < ptrs.data.size:
                    self.undefined = True
                other = Handle(self._fill(ptrs.data.shape, dtype, ptrs.get_element_ty()), ptrs.get_element_ty())
            return real(builder, ptrs, mask, other, *rest, **named)

        return create_masked_load

    def _fill(self, shape: tuple, dtype: np.dtype, element: Any) -> np.ndarray:
        number, byte = self.filling
        if element == tl.bfloat16:
            return np.full(shape, narrow(np.float32(number)), dtype)
        if dtype.kind == "f":
            return np.full(shape, number, dtype)
        filled = np.empty(shape, dtype)
        if dtype.kind == "b":
            filled.fill(bool(byte & 2))
        else:
            filled.reshape(-1).view(np.uint8)[...] = byte
        return filled

    def masked_store(self, real: Callable) -> Callable:
        def create_masked_store(builder: Any, ptrs: Handle, value: Handle, mask: Handle, *rest: Any, **named: Any):
            active = self.access(ptrs, mask.data, "writes")
            self.count.stored += active.size * interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize
            if np.unique(active).size < active.size:
                shape = np.broadcast_shapes(ptrs.data.shape, value.data.shape, mask.data.shape)
                values = np.broadcast_to(value.data, shape)[np.broadcast_to(mask.data, shape)].ravel()
                order = np.argsort(active, kind="stable")
                same = active[order][1:] == active[order][:-1]
                if (same & (values[order][1:] != values[order][:-1])).any():
                    self.fail("one store writes different values to one address")
            return real(builder, ptrs, value, mask, *rest, **named)

        return create_masked_store

    def atomic(self, real: Callable, pointer: int) -> Callable:
        """pointer: which positional argument that is; 1 in a read-modify-write, where value and mask follow it."""

        def create_atomic(builder: Any, *args: Any):
            ptr = args[pointer]
            if ptr.get_element_ty() == tl.bfloat16:
                self.fail("bfloat16 atomics are not emulated: accumulate in float32")
            mask = args[pointer + 2].data if pointer else np.ones(ptr.data.shape, bool)
            active = self.access(ptr, mask, "changes atomically")
            self.count.atomic += active.size * interpreter._get_np_dtype(ptr.get_element_ty()).itemsize
            return real(builder, *args)

        return create_atomic

    def barrier(self, real: Callable) -> Callable:
        def create_barrier(builder: Any):
            self.memory.synchronise()
            return real(builder)

        return create_barrier

    # ---- arithmetic

    def dot(self, real: Callable) -> Callable:
        def create_dot(builder: Any, a: Handle, b: Handle, d: Handle, precision: Any, imprecise: Any):
            *batch, m, k = a.data.shape
            n, bits = b.data.shape[-1], a.dtype.primitive_bitwidth
            self.count.dot_flops += 2 * math.prod(batch) * m * n * k
            if k < SMALLEST_DOT[bits]:
                self.fail(f"tl.dot over K = {k}: with {bits}-bit operands the GPU needs {SMALLEST_DOT[bits]}")
            if bits == 8:
                return real(builder, a, b, d, precision, imprecise)
            operands = [widen(v.data) if v.dtype.scalar == tl.bfloat16 else v.data for v in (a, b)]
            if a.dtype.scalar == tl.float32 and str(precision).endswith("TF32"):
                operands = [tf32(v) for v in operands]
            return Handle(np.matmul(*operands, dtype=d.data.dtype) + d.data, d.dtype.scalar)

        return create_dot

    def cast(self, real: Callable) -> Callable:
        def cast_impl(builder: Any, source: Handle, target: Any):
            before, after = source.dtype.scalar, target.scalar
            if before == after:
                return real(builder, source, target)
            if before == tl.bfloat16:
                return Handle(widen(source.data).astype(interpreter._get_np_dtype(target)), after)
            if after == tl.bfloat16:
                return Handle(narrow(source.data.astype(np.float32)), after)
            return real(builder, source, target)

        return cast_impl

    def convert(self, real: Callable, cast: Callable) -> Callable:
        def create_fp_to_fp(builder: Any, source: Handle, target: Any, rounding: Any):
            types_ = (source.dtype.scalar, target.scalar)
            if tl.bfloat16 in types_ and all(t.primitive_bitwidth != 8 for t in types_):
                return cast(builder, source, target)
            return real(builder, source, target, rounding)

        return create_fp_to_fp

    def arithmetic(self, real: Callable, operands: int) -> Callable:
        """Refuse bfloat16, whose bits numpy would take for integers."""
        bitwise = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.where)

        def compute(builder: Any, *args: Any):
            op = args[operands] if len(args) > operands else "fma"
            raw = any(v.dtype.scalar == tl.bfloat16 for v in args[:operands])
            if raw and op not in bitwise:
                self.fail(f"bfloat16 arithmetic ({getattr(op, '__name__', op)}): cast to float32 first")
            return real(builder, *args)

        return compute

    def reduction(self, real: Callable) -> Callable:
        def check_tensor(interface: Any, inputs: Any):
            if any(isinstance(v, tl.core.tensor) and v.dtype.scalar == tl.bfloat16 for v in inputs):
                self.fail("bfloat16 reduction or scan: cast to float32 first")
            return real(interface, inputs)

        return check_tensor


# ---- switching Triton over -------------------------------------------------------------------------------------------


class Rewriter(interpreter.FunctionRewriter):
    """The interpreter's source rewriting, without leaving its names in the kernel's module."""

    def _compile_and_exec(self, tree: Any) -> Callable:
        names = {k: v for k, v in vars(interpreter).items() if not k.startswith("__")}
        scope, made = {**names, **self.fn.__globals__}, {}
        exec(compile(tree, filename=self.filename, mode="exec"), scope, made)
        return made[self.fn.__name__]


_active = False


@contextlib.contextmanager
def emulation(seed: int = 0) -> Iterator[Record]:
    """Within: every Triton kernel runs here, on CPU tensors, under the checks; yields the record of the launches.

    seed: of the order in which the programs of a launch run.
    Raises CheckError (an AssertionError) at the first fault of a kernel; the tensors are then left as they were.
    """
    global _active
    if _active:
        raise RuntimeError("emulation: must not be nested, got one inside another; use the outer one's record")
    machine = Machine(seed, Record())
    rewritten: dict[Callable, Callable] = {}

    def interpreted(kernel: JITFunction) -> Callable:
        if kernel.fn not in rewritten:
            rewritten[kernel.fn] = Rewriter(kernel.fn).rewrite_ast()
        return rewritten[kernel.fn]

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if not warmup:
            with torch.no_grad():
                machine.launch(kernel, interpreted(kernel), args, options, grid)

    def call(kernel: JITFunction, *args: Any, **options: Any) -> Any:  # a device function: ours, tl.sum, tl.zeros
        return interpreted(kernel)(*args, **options)

    with contextlib.ExitStack() as undo:
        for owner, name, replacement in _patches(machine, run, call):
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        everything = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
        undo.callback(interpreter._patch_lang(everything).restore)
        undo.callback(globals().__setitem__, "_active", False)
        _active = True
        yield machine.record


def _patches(machine: Machine, run: Callable, call: Callable) -> list[tuple[Any, str, Callable]]:
    cast = machine.cast(Builder.cast_impl)
    reductions = interpreter.ReduceScanOpInterface
    return [
        (JITFunction, "run", run),
        (JITFunction, "__call__", call),
        (Builder, "create_masked_load", machine.masked_load(Builder.create_masked_load)),
        (Builder, "create_masked_store", machine.masked_store(Builder.create_masked_store)),
        (Builder, "create_atomic_rmw", machine.atomic(Builder.create_atomic_rmw, 1)),
        (Builder, "create_atomic_cas", machine.atomic(Builder.create_atomic_cas, 0)),
        (Builder, "create_barrier", machine.barrier(Builder.create_barrier)),
        (Builder, "create_dot", machine.dot(Builder.create_dot)),
        (Builder, "cast_impl", cast),
        (Builder, "create_fp_to_fp", machine.convert(Builder.create_fp_to_fp, cast)),
        (Builder, "binary_op", machine.arithmetic(Builder.binary_op, 2)),
        (Builder, "unary_op", machine.arithmetic(Builder.unary_op, 1)),
        (Builder, "ternary_op", machine.arithmetic(Builder.ternary_op, 3)),
        (Builder, "create_fma", machine.arithmetic(Builder.create_fma, 3)),
        (reductions, "check_tensor", machine.reduction(reductions.check_tensor)),
    ]
