"""Tile configurations of the convolution kernels: a short list, a cost model that orders it, a short race that decides.

The model needs no GPU: it counts the programs a configuration makes, how many fit a multiprocessor by shared memory,
registers and warps, how many waves that gives, and what a wave costs in the tensor cores and in memory traffic. On a
GPU the best few are raced once per case, and the winner is kept on disk beside those of the backends. Where nothing may
be raced (racing switched off, a graph being captured, an emulated run) the model's first choice runs.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastgan._op import OPS
from fastgan.choice import may_race, remember, remembered, timing
from fastgan.kernels.launching import Case, recorded

RACED = 4  # configurations raced a case: each may cost a compilation of 1 to 2 s the first time
CASE_SECONDS = 6.0  # after which no further configuration of a case is begun
PROCESS_SECONDS = 120.0  # of racing in one process; later cases take the model's first choice
QUIET_SECONDS = 2.0  # after which one line says what takes so long
ROUNDS = 5


Result = TypeVar("Result")


class Config(NamedTuple):
    """A tile, how it is computed, and into how many parts the inner index is split."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# Not a tile: what a fused kernel is raced against, the op without its extra and the extra as a pass of its own.
APART = Config(0, 0, 0, 0, 0, 0)


class Product(NamedTuple):
    """A convolution as `batch` products of [m, k] and [k, n].

    channels   how many elements of x's index (`gathered`: "k" the inner one, "n" the columns) belong to one tap
    precision  of float32 dots
    statistics whether the epilogue makes moments
    """

    m: int
    n: int
    k: int
    batch: int
    channels: int
    gathered: str
    precision: str
    statistics: bool = False

    def flat(self, config: Config) -> bool:
        """Whether a tile holds elements of several taps."""
        return self.channels < (config.block_k if self.gathered == "k" else config.block_n)


class Card(NamedTuple):
    """What the model needs to know of a GPU. Per multiprocessor: shared memory, threads, registers; per program: the
    most shared memory. flops: dense, by kind of dot, and bytes: of its memory, a second (vendor's peak figures)."""

    name: str
    multiprocessors: int
    shared: int
    shared_program: int
    threads: int
    flops_16: float
    flops_tf32: float
    flops_ieee: float
    bytes: float
    warp: int = 32


# Peak figures of the vendors' data sheets (dense, boost clock): NVIDIA A100 80GB SXM, RTX A6000 / RTX 3090 (GA102
# whitepaper), L40S / RTX 4090 (Ada whitepaper), H100 SXM, B200 (HGX), RTX 5090 (Blackwell whitepaper); AMD MI250X (one
# of its two dies), MI300X. Shared memory and threads: CUDA C++ Programming Guide, compute capabilities; AMD: CDNA ISA.
CARDS = {
    "sm_80": Card("A100 80GB SXM", 108, 167936, 166912, 2048, 312e12, 156e12, 19.5e12, 2.04e12),
    "sm_86": Card("RTX 3090", 82, 102400, 101376, 1536, 71e12, 35.6e12, 35.6e12, 0.936e12),
    "sm_89": Card("RTX 4090", 128, 102400, 101376, 1536, 165e12, 82.6e12, 82.6e12, 1.008e12),
    "sm_90": Card("H100 SXM", 132, 233472, 232448, 2048, 989e12, 495e12, 67e12, 3.35e12),
    "sm_100": Card("B200", 148, 233472, 232448, 2048, 2250e12, 1100e12, 75e12, 8.0e12),
    "sm_120": Card("RTX 5090", 170, 102400, 101376, 1536, 209e12, 104.8e12, 104.8e12, 1.792e12),
    "gfx90a": Card("MI250X, one die", 110, 65536, 65536, 2048, 191.5e12, 47.9e12, 47.9e12, 1.6e12, 64),
    "gfx942": Card("MI300X", 304, 65536, 65536, 2048, 1307e12, 653.7e12, 163.4e12, 5.3e12, 64),
}
DEFAULT = "sm_80"  # for CPU tensors: emulated launches
REGISTERS = 65536  # 32-bit ones of a multiprocessor (NVIDIA); a gfx9 one has twice that
LATENCY = 2e-6  # seconds before a program's first dot and after its last: loads from memory, launch
STEP_LATENCY = 4e-7  # seconds of one step with nothing to hide behind; num_stages - 1 steps hide each other

# (block_m, block_n, block_k, warps). 16-bit: 64 inner elements are 128 bytes, a whole cache line.
TILES_16 = [
    *((128, 128, 64, 8), (128, 64, 64, 8), (64, 128, 64, 4), (64, 64, 64, 4), (128, 16, 64, 4), (32, 64, 64, 4)),
    *((16, 64, 64, 4), (32, 32, 64, 4), (128, 64, 32, 8), (64, 64, 32, 4), (64, 16, 32, 4), (32, 32, 32, 4)),
    (16, 16, 32, 2),
]
TILES_TF32 = [
    *((128, 64, 32, 8), (64, 64, 32, 4), (128, 16, 32, 4), (32, 64, 32, 4), (16, 64, 32, 4), (32, 32, 32, 4)),
    *((64, 64, 16, 8), (64, 16, 16, 4), (32, 32, 16, 2), (16, 16, 16, 2)),
]
# Scalar FMA: a thread holds its rows and columns of a whole step in registers, so steps are short and tiles small
# (64 x 64 spills on sm_86 and sm_120, 64 x 32 in its split form on sm_90 or sm_100).
TILES_IEEE = [(32, 64, 16, 4), (32, 32, 16, 4), (64, 16, 16, 4), (16, 64, 16, 4), (16, 16, 16, 2)]
GATHERED_MOMENTS = 32  # rows and columns of a gathered float32 tile with moments: (64, 16) and (32, 64) spill on sm_86
GATHERED_BYTES = 64  # of a step whose taps differ from element to element: an address and a mask each, so registers
SPLITS = (1, 2, 4, 8, 16, 32)


def capability(device: torch.device) -> str:
    """`sm_90`, `gfx942`: what a card is for the model and for the cache. For CPU and meta tensors the assumed one."""
    if device.type != "cuda":
        return _assumed
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def card(device: torch.device) -> Card:
    return _card(device, capability(device))


@functools.cache
def _card(device: torch.device, name: str) -> Card:
    """The table's card of this capability (where it is not listed the nearest older one), with the device's counts."""
    known = CARDS.get(name) or CARDS[max((c for c in CARDS if _order(c) <= _order(name)), key=_order, default=DEFAULT)]
    if device.type != "cuda":
        return known
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", known.shared_program)
    return known._replace(multiprocessors=found.multi_processor_count, shared_program=min(known.shared_program, shared))


def _order(name: str) -> tuple[str, int]:
    family, _, number = name.partition("_") if name.startswith("sm_") else (name[:4], "", name[4:])
    return family, int(number, 16)


def precision(x: Tensor) -> str:
    """How a dot of float32 operands may round them: as torch's own convolutions on that device are allowed to."""
    if _every is not None:
        return _every
    if x.dtype != torch.float32 or x.device.type != "cuda" or torch.version.hip:
        return "ieee"
    cudnn = torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # torch 2.9 and newer; follows allow_tf32 too
        return "tf32" if cudnn.conv.fp32_precision == "tf32" else "ieee"
    return "tf32" if cudnn.allow_tf32 else "ieee"


# ---- the model ------------------------------------------------------------------------------------------------------


def candidates(product: Product, dtype: torch.dtype, card: Card) -> list[Config]:
    """The configurations that can launch on a card, with the splits that leave each part at least two steps."""
    tiles = TILES_16 if dtype.itemsize == 2 else TILES_TF32 if product.precision == "tf32" else TILES_IEEE
    found = []
    for m, n, k, warps in tiles:
        stages = 2 if card.warp == 64 else 3
        config = Config(m, n, k, warps, stages)
        if product.flat(config) and (m, n, dtype.itemsize) == (64, 64, 4):
            config = config._replace(num_stages=2)  # with 3 the split weight gradient spilled 8 bytes on sm_120
        too_wide = product.flat(config) and k * dtype.itemsize > GATHERED_BYTES
        if product.flat(config) and product.statistics and dtype.itemsize == 4:
            too_wide = too_wide or max(m, n) > GATHERED_MOMENTS
        if too_wide or shared_bytes(config, dtype) > card.shared_program:
            continue
        steps = math.ceil(product.k / k)
        found += [config._replace(splits=s) for s in SPLITS if s == 1 or steps >= 2 * s]
    return found


def shared_bytes(config: Config, dtype: torch.dtype) -> int:
    """Shared memory of a program: the tiles of its steps in flight."""
    return (config.block_m + config.block_n) * config.block_k * dtype.itemsize * config.num_stages


def programs_together(config: Config, dtype: torch.dtype, card: Card) -> int:
    """Programs that one multiprocessor holds at once, by shared memory, registers and threads."""
    threads = config.num_warps * card.warp
    registers = 40 + 3 * config.block_m * config.block_n // (2 * threads)  # addresses and masks, accumulators
    by_registers = REGISTERS * (card.warp // 32) // (min(registers, 255) * threads)
    return max(1, min(card.shared // shared_bytes(config, dtype), by_registers, card.threads // threads, 16))


def seconds(config: Config, product: Product, dtype: torch.dtype, card: Card) -> float:
    """The model's time of a product under a configuration; only its order means anything."""
    m, n, k, batch = product.m, product.n, product.k, product.batch
    programs = math.ceil(m / config.block_m) * math.ceil(n / config.block_n) * batch * config.splits
    steps = math.ceil(math.ceil(k / config.block_k) / config.splits)
    together = programs_together(config, dtype, card)
    waves = programs / (card.multiprocessors * together)
    waves = math.ceil(waves) if waves < 8 else waves  # programs end at different times once there are many
    busy = min(together, math.ceil(programs / card.multiprocessors))
    peak = card.flops_16 if dtype.itemsize == 2 else getattr(card, f"flops_{product.precision}")
    # a tensor core instruction needs 64 rows and 4 warps to run at its rate: smaller tiles feed it less
    fed = min(1.0, config.block_m / 64) ** 0.5 * min(1.0, config.block_n / 64) ** 0.5
    flops = 2 * config.block_m * config.block_n * config.block_k * busy / (peak / card.multiprocessors * fed)
    # operands come mostly from the L2 cache: about three times the memory's rate
    loaded = (config.block_m + config.block_n) * config.block_k * dtype.itemsize * busy
    moved = loaded / (3 * card.bytes / card.multiprocessors)
    step = max(flops, moved, STEP_LATENCY / (config.num_stages - 1))
    parts = 0.0 if config.splits == 1 else LATENCY + 8 * config.splits * m * n * batch / card.bytes
    return waves * (steps * step + LATENCY) + parts


def ranked(product: Product, dtype: torch.dtype, card: Card) -> list[Config]:
    """The configurations, the model's best first."""

    def order(c: Config) -> tuple:
        return seconds(c, product, dtype, card), -c.block_m * c.block_n, c

    return sorted(candidates(product, dtype, card), key=order)


# ---- the race -------------------------------------------------------------------------------------------------------

_assumed = DEFAULT
_every: str | None = None  # the precision at which `tuned` runs every candidate, for the compile checks
_first: dict[tuple, list[Config]] = {}  # case -> ranking
_raced: dict[tuple, Config] = {}
_spent = 0.0
_told = False


def tuned(
    op: str, x: Tensor, product: Product, case: tuple, run: Callable[[Config], Result], also: tuple[Config, ...] = ()
) -> Result:
    """run(config) with the configuration for this case, raced if it is new and may be raced.

    case: whatever the launch depends on beside x's dtype and device, printable.
    also: configurations that the model does not rank; they run only where they won the race.
    """
    if _every is not None:
        return _run_every(product, x, run)
    key = (op, str(x.dtype), capability(x.device), product, case)
    config = _raced.get(key)
    if config is None:
        if key not in _first:
            _first[key] = ranked(product, x.dtype, card(x.device))
        config = _first[key][0]
        if may_race(x.device):
            config = _raced[key] = _winner(key, run, also)
    return run(config)


def _winner(key: tuple, run: Callable[[Config], Any], also: tuple[Config, ...]) -> Config:
    """From the cache, or from a race of the model's best, which is then kept."""
    known = remembered(("config", *key))
    config = Config(*map(int, known.split()[1:])) if known else None
    if config in (*_first[key], *also):
        return config
    if _spent > PROCESS_SECONDS:
        return _first[key][0]
    with timing():
        for config in also:  # the races of the ops that it runs are not on this one's time
            run(config)
        first, *others = _first[key][:RACED]
        config = race([first, *also, *others], run, f"{key[0]} {key[1]}")
    remember(("config", *key), "config " + " ".join(map(str, config)))
    return config


def race(configs: list[Config], run: Callable[[Config], Any], what: str = "") -> Config:
    """The fastest of these by the best of ROUNDS runs; one that fails to compile or to launch is out.

    Raises what the first of them raised if all fail.
    """
    global _spent, _told
    begin, best, errors = _clock(), {}, []
    for config in configs:
        if best and _clock() - begin > CASE_SECONDS:
            break
        try:
            run(config)  # compiles
            best[config] = min(_measure(lambda: run(config)) for _ in range(ROUNDS))  # noqa: B023 (called at once)
        except Exception as error:  # out of shared memory or registers, a compiler's refusal
            errors.append(error)
        if not _told and _spent + _clock() - begin > QUIET_SECONDS:
            _told = True
            line = f"fastgan: racing Triton configurations ({what} and others), once a case and GPU"
            print(f"{line}; `fastgan doctor --prove` does it ahead", file=sys.stderr, flush=True)
    _spent += _clock() - begin
    if not best:
        raise errors[0]
    return min(best, key=best.__getitem__)


def race_ahead(device: torch.device) -> None:
    """Race the convolutions of a DCGAN-64 (batches of 64 and 128, channels_last, every dtype), so that training need
    not: what `fastgan doctor --prove` does beside its proofs. A minute or two where Triton has compiled nothing yet."""
    for batch in (64, 128):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for op, args in dcgan_calls(batch, dtype, device):
                OPS[op].backends["triton"].run(*args)


def dcgan_calls(batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, tuple]]:
    """(op, arguments) of every convolution that a training step of a DCGAN-64 runs, on random data."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)

    layers = [(3, 64, 64, 2, 1), (64, 128, 32, 2, 1), (128, 256, 16, 2, 1), (256, 512, 8, 2, 1)]
    layers += [(512, 1, 4, 1, 0), (512, 100, 4, 1, 0)]  # the discriminator's last and the generator's first one
    for c, k, size, stride, padding in layers:
        out = (size + 2 * padding - 4) // stride + 1
        x, y, weight = draw(batch, c, size, size), draw(batch, k, out, out), draw(k, c, 4, 4)
        s, p, one = [stride] * 2, [padding] * 2, [1, 1]
        yield "conv2d", (x, weight, None, s, p, one, 1, "identity", 0.0)
        yield "conv_transpose2d", (y, weight, None, s, p, [0, 0], 1, one, "identity", 0.0)
        yield "conv2d_weight", (x, y, [4, 4], s, p, one, 1, True)
        if c > 3 and stride == 2:  # a batch norm follows: of each half in the discriminator
            yield "conv2d_statistics", (x, weight, None, s, p, one, 1, 2)
        if c > 3 and k > 1:
            yield "conv_transpose2d_statistics", (y, weight, None, s, p, [0, 0], 1, one, 1)


_clock = time.perf_counter


def _measure(run: Callable[[], Any]) -> float:
    """Seconds of one run on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


# ---- for ahead-of-time compilation ----------------------------------------------------------------------------------


@contextlib.contextmanager
def assumed(capability: str) -> Iterator[None]:
    """Within: launches on CPU and meta tensors are configured for a card of this capability."""
    global _assumed
    before, _assumed = _assumed, capability
    try:
        yield
    finally:
        _assumed = before


def every_candidate(run: Callable[[tuple[int, int], torch.dtype], Any], layers: list[tuple[int, int]]) -> list[Case]:
    """The launches of a convolution with every configuration that could be raced on the assumed card.

    run(channels, dtype) calls the launcher on meta tensors of a layer.
    """
    kinds = [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "ieee")]
    kinds += [] if _assumed.startswith("gfx") else [(torch.float32, "tf32")]
    cases: list[Case] = []
    for dtype, rounding in kinds:
        with _running_every(rounding):
            cases += recorded(functools.partial(run, channels, dtype) for channels in layers)
    return cases


@contextlib.contextmanager
def _running_every(rounding: str) -> Iterator[None]:
    global _every
    _every = rounding
    try:
        yield
    finally:
        _every = None


def _run_every(product: Product, x: Tensor, run: Callable[[Config], Result]) -> Result:
    """All tiles unsplit, and the first one split; float16 differs from bfloat16 in one type: its first tile will do."""
    found = candidates(product, x.dtype, card(x.device))
    tiles = [c for c in found if c.splits == 1][: 1 if x.dtype == torch.float16 else None]
    for config in [*tiles, *(c for c in found if c.splits == 2)][: len(tiles) + 1]:
        y = run(config)
    return y
