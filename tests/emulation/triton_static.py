"""Compiles every Triton kernel, with the configurations that users launch, for every card; checks what came out.

No GPU takes part. From each compiled kernel: registers and spilled bytes, shared memory, the instructions that its dots
became, the widths of its loads, and how many programs fit a multiprocessor. `make gpu-static` sweeps everything and
writes the tables in docs/evidence/gpu-compiled.md; `make test` takes a few kernels on three cards. Triton keeps what it
compiled in its own cache, so a second sweep takes a fraction of the first.

Ahead-of-time compilation does not refuse what cannot launch: shared memory is compared with the card's limit here.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fastgan.kernels
from fastgan import ops
from fastgan.kernels.configs import CARDS, Card, assumed
from fastgan.kernels.launching import Case, meta

DOCUMENT = Path(__file__).parents[2] / "docs" / "evidence" / "gpu-compiled.md"
BEGIN, END = "<!-- gpu-static: written by `make gpu-static` -->", "<!-- gpu-static: end -->"
TENSOR_CORE = r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma_\w+)"


@dataclass(frozen=True)
class Compiled:
    """One kernel for one card. Bytes, but for registers (of a thread); loads: bytes a thread loads at once, sorted."""

    kernel: str
    kind: str
    constants: str
    card: str
    registers: int
    spilled: int
    shared: int
    threads: int
    dots: int
    scalar_dots: int  # dots that became FMAs
    loads: tuple[int, ...]

    def programs_together(self, card: Card) -> int:
        """Programs that a multiprocessor holds at once."""
        if card.warp == 64:  # 512 vector registers a lane and SIMD, in steps of 8; four SIMDs
            waves = 4 * (512 // max(8, -(-self.registers // 8) * 8))
            by_registers = min(waves, 32) * 64 // self.threads
        else:  # 65,536 a multiprocessor, given to a warp in steps of 256
            by_registers = 65536 // (-(-self.registers * 32 // 256) * 256) * 32 // self.threads
        reserved = 1024 if card.warp == 32 else 0
        by_shared = card.shared // (self.shared + reserved) if self.shared + reserved else 32
        return min(by_registers, by_shared, card.threads // self.threads, 32)

    def faults(self, card: Card) -> list[str]:
        """What makes this kernel unfit for the card."""
        what = []
        if self.spilled:
            what.append(f"spills {self.spilled} bytes a thread")
        if self.shared > card.shared_program:
            what.append(f"needs {self.shared} bytes of shared memory of {card.shared_program}")
        if self.scalar_dots and not (self.kind == "fp32 ieee" and card.warp == 32):
            what.append(f"{self.scalar_dots} of {self.dots} dots became scalar FMA")
        if "FLAT=False" in self.constants and not self.kind.startswith("fp32") and max(self.loads, default=0) < 8:
            what.append(f"loads {max(self.loads, default=0)} bytes at once")
        if not self.programs_together(card):
            what.append("does not fit a multiprocessor")
        return what


# ---- compiling -------------------------------------------------------------------------------------------------------


def cases(card: str) -> list[Case]:
    """What all kernel modules launch on a card, without doubles."""
    found: dict[str, Case] = {}
    with assumed(card):
        for module in pkgutil.iter_modules(fastgan.kernels.__path__):
            offered = getattr(importlib.import_module(f"fastgan.kernels.{module.name}"), "static_cases", None)
            for case in offered() if offered else ():
                found.setdefault(repr((case[0].fn, *case[1:])), case)
    return list(found.values())


def compiled(case: Case, card: str) -> Any:
    """Triton's compiled kernel of a recorded launch."""
    kernel, signature, constants, options = case
    types, fixed, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            types[name], fixed[(index,)] = "constexpr", constants[name]
        else:
            types[name], _, multiple = signature[name].partition(":")
            if multiple:
                attributes[(index,)] = [["tt.divisibility", int(multiple)]]
    hip = card.startswith("gfx")
    target = GPUTarget("hip", card, CARDS[card].warp) if hip else GPUTarget("cuda", int(card[3:]), 32)
    source = ASTSource(fn=kernel, signature=types, constexprs=fixed, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def inspect(case: Case, card: str) -> Compiled:
    """Compile a case for a card and read what came out."""
    kernel, signature, constants, options = case
    result = compiled(case, card)
    is_dot = re.compile(r"= tt\.dot |warp_group_dot |tc_gen5_mma ")
    dots = [line for line in result.asm["ttgir"].splitlines() if is_dot.search(line)]
    scalar = sum("= tt.dot " in line and "#blocked" in line.rpartition("->")[2] for line in dots)
    assembly = result.asm.get("ptx") or result.asm["amdgcn"]
    if len(dots) > scalar and not re.search(TENSOR_CORE, assembly):
        scalar = len(dots)
    registers, spilled = _amd_usage(assembly) if "amdgcn" in result.asm else _nvidia_usage(result.asm["cubin"])
    return Compiled(
        kernel=kernel.fn.__name__,
        kind=_kind(signature, constants),
        constants=", ".join(f"{name}={value}" for name, value in constants.items() if name.isupper()),
        card=card,
        registers=registers,
        spilled=spilled,
        shared=result.metadata.shared,
        threads=options["num_warps"] * CARDS[card].warp,
        dots=len(dots),
        scalar_dots=scalar,
        loads=tuple(sorted(_load_widths(assembly))),
    )


def _kind(signature: dict[str, str], constants: dict[str, Any]) -> str:
    """The type of the first tensor, and how its dots may round."""
    first = next((t.strip("*").partition(":")[0] for t in signature.values() if t.startswith("*")), "")
    return f"{first} {constants['PRECISION']}" if first == "fp32" and "PRECISION" in constants else first


def cuobjdump() -> str:
    """NVIDIA's tool that reads a cubin: the one that comes with Triton, or a toolkit's."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(tool) if tool.exists() else shutil.which("cuobjdump")
    if not found:
        raise RuntimeError(
            "triton_static: cuobjdump must be beside Triton or on PATH, got neither; install a CUDA toolkit"
        )
    return found


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory): these kernels have neither but for spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    counts = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return counts["REG"], counts["STACK"] + counts["LOCAL"]


def _amd_usage(assembly: str) -> tuple[int, int]:
    counts = {
        n: int(v) for n, v in re.findall(r"\.((?:vgpr|agpr)_count|private_segment_fixed_size):\s*(\d+)", assembly)
    }
    return counts["vgpr_count"], counts["private_segment_fixed_size"]  # vgpr_count includes the agprs on gfx90a, gfx942


def _load_widths(assembly: str) -> set[int]:
    """Bytes that one thread loads at once, over all loads from global memory."""
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global\s*\[.*?\],\s*\[.*?\],\s*(\w+)", assembly)
    widths = {int(size, 0) for size in copies}
    for vector, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[busf](\d+)", assembly):
        widths.add(int(vector or 1) * int(bits) // 8)
    words = {"ubyte": 1, "ushort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
    for word in re.findall(r"(?:global|buffer)_load_(dwordx\d|dword|u?short|ubyte)", assembly):
        widths.add(words[word])
    return widths


# ---- the tables ------------------------------------------------------------------------------------------------------


def resources(found: list[Compiled], kept: list[str]) -> list[str]:
    """A row a kernel and type, a column a card; kept: lines of the table as it is, of kernels that are not in found."""
    cards = list(CARDS)
    head = [f"| kernel | type | loads | {' | '.join(cards)} |", f"|---|---|---|{'---|' * len(cards)}"]
    swept = {c.kernel for c in found}
    rows = [line for line in kept if (name := re.match(r"\| `(\w+)`", line)) and name[1] not in swept]
    for kernel, kind in sorted({(c.kernel, c.kind) for c in found}):
        cells = []
        for name in cards:
            ours = [c for c in found if (c.kernel, c.kind, c.card) == (kernel, kind, name)]
            if not ours:
                cells.append("")
                continue
            together = [c.programs_together(CARDS[name]) for c in ours]
            shared = _range([c.shared / 1024 for c in ours])
            cells.append(f"{_range([c.registers for c in ours])} · {shared} · {_range(together)}")
        widest = _range([max(c.loads) for c in found if (c.kernel, c.kind) == (kernel, kind) and c.loads])
        rows.append(f"| `{kernel}` | {kind} | {widest} | {' | '.join(cells)} |")
    return [*head, *sorted(rows)]


def _range(values: list[float]) -> str:
    low, high = (round(edge(values, default=0)) for edge in (min, max))
    return f"{low}" if low == high else f"{low}-{high}"


def workloads() -> dict[str, dict[str, int]]:
    """cost() of each op on the DCGAN-64 layer that does most of its work: batch 128, bfloat16, channels_last."""
    x = lambda *shape: meta(shape, torch.bfloat16)
    image, small, large = x(128, 3, 64, 64), x(128, 256, 16, 16), x(128, 128, 32, 32)
    weight, two, one = x(256, 128, 4, 4), (2, 2), (1, 1)
    return {
        "conv2d, 128 to 256 channels, 32x32 to 16x16, k4 s2": ops.conv2d.cost(large, weight, two, one, one),
        "conv_transpose2d, 256 to 128, 16x16 to 32x32": ops.conv_transpose2d.cost(
            small, weight, two, one, (0, 0), 1, one
        ),
        "conv2d_weight of either": ops.conv2d_weight.cost(large, small, (4, 4), 1),
        "conv2d, 3 to 64, 64x64 to 32x32": ops.conv2d.cost(image, x(64, 3, 4, 4), two, one, one),
        "conv_transpose2d, 64 to 3, 32x32 to 64x64": ops.conv_transpose2d.cost(
            x(128, 64, 32, 32), x(64, 3, 4, 4), two, one, (0, 0), 1, one
        ),
        "conv2d_statistics, 128 to 256 channels, two groups": ops.conv2d.cost_statistics(
            large, weight, two, one, one, 2
        ),
        "conv_transpose2d_statistics, 256 to 128": ops.conv_transpose2d.cost_statistics(
            small, weight, two, one, (0, 0), 1, one, 1
        ),
        "bn_act, 128 channels, 32x32": ops.bn_act.cost(large),
        "bn_act, statistics given": ops.bn_act.cost(large, True, x(2, 128)),
        "bn_act_backward": ops.bn_act.cost_backward(large),
        "gn_act": ops.gn_act.cost(large),
        "gn_act_backward": ops.gn_act.cost_backward(large),
        "bias_act": ops.bias_act.cost(large),
        "bias_act_backward": ops.bias_act.cost_backward(large),
        "interpolate, 3 channels, 64x64": ops.interpolate.cost(image),
        "grad_norm_penalty, 3 channels, 64x64": ops.grad_norm_penalty.cost(image),
        "gan_loss, two batches of 128 logits": ops.gan_loss.cost(x(128), x(128)),
    }


def bounds() -> list[str]:
    """A row an op, a column a card: microseconds that no kernel can beat there, and what binds."""
    rows = [f"| op | FLOPs a byte | {' | '.join(CARDS)} |", f"|---|---|{'---|' * len(CARDS)}"]
    for what, cost in workloads().items():
        cells = []
        for card in CARDS.values():
            memory, compute = cost["bytes"] / card.bytes * 1e6, cost["flops"] / card.flops_16 * 1e6
            cells.append(f"{max(memory, compute):.3g} {'m' if memory >= compute else 'c'}")
        rows.append(f"| {what} | {cost['flops'] / cost['bytes']:.3g} | {' | '.join(cells)} |")
    return rows


def document(found: list[Compiled], kept: list[str]) -> str:
    """The generated section of docs/evidence/gpu-compiled.md; kept: its lines as they are."""
    names = ", ".join(f"{key} {card.name}" for key, card in CARDS.items())
    return "\n".join(
        [
            BEGIN,
            f"Compiled with Triton {triton.__version__}: no spilled register, dots on tensor",
            "cores but for float32 at full precision on NVIDIA cards, shared memory within each card's limit. From the",
            "binaries (cuobjdump for cubins, the assembler's metadata for AMD), from the least to the most over the",
            "configurations: registers a thread · shared memory a program in KiB · programs that a multiprocessor",
            "holds. Loads: the widest that a thread makes, in bytes. A kernel's rows are of its last sweep:",
            "",
            *resources(found, kept),
            "",
            "**Bounds, not speeds.** Microseconds below which no kernel can go: `cost()` of the op over the vendor's",
            "peak figures (m: memory's rate binds, c: the tensor cores' does). Nothing here was timed. Cards:",
            f"{names}.",
            "The peak figures and their sources are in `kernels/configs.py`. DCGAN-64 layers, batch 128, bfloat16:",
            "",
            *bounds(),
            END,
        ]
    )


def write(found: list[Compiled]) -> None:
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(BEGIN)
    kept, _, after = rest.partition(END)
    DOCUMENT.write_text(before + document(found, kept.splitlines()) + after)


def sweep(cards: list[str], kernels: list[str]) -> Iterator[Compiled]:
    for card in cards:
        for case in cases(card):
            if not kernels or any(word in case[0].fn.__name__ for word in kernels):
                yield inspect(case, card)


def main(words: list[str]) -> int:
    """Sweep the cards that are named, or all, and the kernels whose names hold one of the other words, or all; write
    their rows after a sweep of all cards in which nothing is wrong."""
    cards = [word for word in words if word in CARDS] or list(CARDS)
    found, wrong = [], []
    for result in sweep(cards, [word for word in words if word not in CARDS]):
        found.append(result)
        for fault in result.faults(CARDS[result.card]):
            wrong.append(fault)
            print(f"{result.card} {result.kernel} {result.kind} ({result.constants}): {fault}", flush=True)
    print(f"{len(found)} kernels compiled, {len(wrong)} faults")
    if not wrong and len(cards) == len(CARDS):
        write(found)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
