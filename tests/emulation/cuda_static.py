"""What nvcc makes of csrc/cuda, without a GPU: every kernel for every card, warnings as errors, spills refused.

`python tests/emulation/cuda_static.py [WORD ...]` writes the rows of the sources whose names hold a word, or of all,
between the markers in docs/evidence/gpu-compiled.md.
Registers and shared memory are ptxas's; occupancy is what NVIDIA's cuda_occupancy.h computes from them, not a
measurement.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
SOURCES = sorted(p for p in (CSRC / "cuda").glob("*.cu") if p.stem not in ("device", "table"))
CARDS = {75: "T4", 80: "A100", 86: "RTX 3090", 89: "RTX 4090", 90: "H100", 100: "B200", 120: "RTX 5090"}
BEGIN, END = "<!-- cuda-static: written by `make gpu-static` -->", "<!-- cuda-static: end -->"


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    threads: int
    shared: int
    spilled: int


def run(*command: str, text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout + done.stderr


def toolkit() -> Path:
    """Where nvcc's toolkit lies: nvcc may be a wrapper script whose own path says nothing."""
    top = re.search(r"^#\$ TOP=(.+)$", run("nvcc", "--dryrun", "x.cu"), re.MULTILINE)
    if not top:
        raise RuntimeError("nvcc does not say where its toolkit lies")
    return Path(top[1].strip()).resolve()


def compile_kernels(source: Path, arch: int) -> list[Kernel]:
    """The kernels of one source for one architecture; RuntimeError on a warning or an error."""
    with tempfile.TemporaryDirectory() as folder:
        said = run(
            "nvcc",
            "-std=c++20",
            "-O3",
            "-cubin",
            f"-arch=sm_{arch}",
            "-Werror",
            "all-warnings",
            f"-I{CSRC}",
            "-Xptxas",
            "-v",
            "--keep",
            "--keep-dir",
            folder,
            str(source),
            "-o",
            f"{folder}/out.cubin",
        )
        ptx = next(Path(folder).glob("*.ptx")).read_text()
    threads = {name: int(n) for name, n in re.findall(r"\.entry (\w+)\([^{]*?\.maxntid (\d+)", ptx)}
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)"
    )
    kernels = []
    for name, stores, loads, registers, rest in re.findall(pattern, said, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels.append(
            Kernel(name, int(registers), threads[name], int(shared[1]) if shared else 0, int(stores) + int(loads))
        )
    return kernels


def occupancy(arch: int, kernels: list[Kernel]) -> list[float]:
    """Share of a multiprocessor's threads that each kernel keeps resident, static shared memory counted."""
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/occupancy"
        run(
            "g++",
            "-std=c++20",
            f"-I{toolkit() / 'include'}",
            str(Path(__file__).with_name("occupancy.cpp")),
            "-o",
            program,
        )
        asked = "".join(f"{arch} {k.registers} {k.threads} {k.shared}\n" for k in kernels)
        return [float(line) for line in run(program, text=asked).split()]


def table(sources: list[Path], kept: list[str]) -> str:
    """Markdown: a row a source, a column a card, the rows `kept` among them; RuntimeError where a kernel spills."""
    head = [
        "| source | kernels | " + " | ".join(f"sm_{arch} ({card})" for arch, card in CARDS.items()) + " |",
        "|---|---|" + "---|" * len(CARDS),
    ]
    lines = [line for line in kept if re.match(r"\| \w+\.cu ", line)]
    for source in sources:
        lines = [line for line in lines if not line.startswith(f"| {source.name} ")]
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda arch, s=source: compile_kernels(s, arch), CARDS))
        cells = []
        for arch, kernels in zip(CARDS, found, strict=True):
            if spilling := [k.name for k in kernels if k.spilled]:
                raise RuntimeError(f"{source.name} for sm_{arch}: no kernel may spill, got {', '.join(spilling)}")
            registers, shared = max(k.registers for k in kernels), max(k.shared for k in kernels)
            cells.append(f"{registers} · {shared / 1024:.1f} · {100 * min(occupancy(arch, kernels)):.0f} %")
        lines.append(f"| {source.name} | {len(found[0])} | " + " | ".join(cells) + " |")
    return "\n".join([*head, *sorted(lines)])


def main(words: list[str]) -> int:
    """Compile the sources whose names hold one of the words, or all, and write their rows of the table."""
    if not shutil.which("nvcc"):
        print(
            "cuda_static: nvcc was not found; docs/evidence/gpu-compiled.md keeps the table that it has",
            file=sys.stderr,
        )
        return 0
    page = ROOT / "docs" / "evidence" / "gpu-compiled.md"
    text = page.read_text()
    before, rest = text.split(BEGIN)
    kept, after = rest.split(END)
    sources = [s for s in SOURCES if not words or any(word in s.name for word in words)]
    page.write_text(before + BEGIN + "\n" + table(sources, kept.splitlines()) + "\n" + END + after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
