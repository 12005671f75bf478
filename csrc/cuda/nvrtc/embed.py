"""Writes device_sources.hpp: the device code as text, which loader.cpp hands to NVRTC. Called by setup.py.

Inside the library the text cannot be missing from an installation, nor be of another version than the launchers, whose
structs are its kernels' parameters.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

# At the beginning of a line, so that neither members nor declarations ahead (`struct From;`) count.
DEFINED = re.compile(
    r"^struct (\w+)[^;{]*\{|^(?:static )?__global__ void(?: __launch_bounds__\([^;{]*?\))?\s+(\w+)\(", re.MULTILINE
)


def definitions(sources: dict[str, str]) -> list[tuple[str, str]]:
    """(structure or kernel, header that defines it): loader.cpp includes those of a kernel's C++ expression."""
    return [(one or other, name) for name, text in sources.items() for one, other in DEFINED.findall(text)]


def device_sources(csrc: Path) -> str:
    """The header's text: names as the sources include them, contents, and a hash of all that decides machine code."""
    room = csrc / "cuda" / "nvrtc"
    sources = {path.relative_to(csrc).as_posix(): path for path in sorted((csrc / "cuda").glob("*.cuh"))}
    shared = ("codes.hpp", "norm_derivatives.hpp", "attention_derivatives.hpp")
    sources |= {f"common/{name}": csrc / "common" / name for name in shared}
    sources |= {path.name: path for path in sorted((room / "toolkit").glob("cuda_?*16.h"))}
    digest = hashlib.sha256((room / "loader.cpp").read_bytes())
    contents = {name: path.read_text() for name, path in sources.items()}
    texts = []
    for name, text in contents.items():
        digest.update(f"{name}\n{text}".encode())
        texts.append(f'R"fastgan({text})fastgan"')
    names = ", ".join(f'"{name}"' for name in contents)
    defined = ", ".join(f'{{"{what}", "{name}"}}' for what, name in definitions(contents))
    digest.update(defined.encode())
    return (
        "// Written by csrc/cuda/nvrtc/embed.py.\n"
        f'#define DEVICE_SOURCES_HASH "{digest.hexdigest()[:32]}"\n'
        f"static const char* const DEVICE_SOURCE_NAMES[] = {{{names}}};\n"
        f"static const char* const DEVICE_SOURCES[] = {{{', '.join(texts)}}};\n"
        f"static const char* const DEVICE_DEFINITIONS[][2] = {{{defined}}};\n"
    )
