"""Writes device_sources.hpp: the device code as text, which loader.cpp hands to NVRTC. Called by setup.py.

Inside the library the text cannot be missing from an installation, nor be of another version than the launchers, whose
structs are its kernels' parameters.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def device_sources(csrc: Path) -> str:
    """The header's text: names as the sources include them, contents, and a hash of all that decides machine code."""
    room = csrc / "cuda" / "nvrtc"
    sources = {path.relative_to(csrc).as_posix(): path for path in sorted((csrc / "cuda").glob("*.cuh"))}
    shared = ("codes.hpp", "norm_derivatives.hpp", "attention_derivatives.hpp")
    sources |= {f"common/{name}": csrc / "common" / name for name in shared}
    sources |= {path.name: path for path in sorted((room / "toolkit").glob("cuda_?*16.h"))}
    digest = hashlib.sha256((room / "loader.cpp").read_bytes())
    texts = []
    for name, path in sources.items():
        digest.update(f"{name}\n".encode() + path.read_bytes())
        texts.append(f'R"fastgan({path.read_text()})fastgan"')
    names = ", ".join(f'"{name}"' for name in sources)
    return (
        "// Written by csrc/cuda/nvrtc/embed.py.\n"
        f'#define DEVICE_SOURCES_HASH "{digest.hexdigest()[:32]}"\n'
        f"static const char* const DEVICE_SOURCE_NAMES[] = {{{names}}};\n"
        f"static const char* const DEVICE_SOURCES[] = {{{', '.join(texts)}}};\n"
    )
