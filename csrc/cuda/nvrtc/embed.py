"""Writes device_sources.hpp: the device code as text, which loader.cpp hands to NVRTC. Called by setup.py.

Inside the library the text cannot be missing from an installation, nor be of another version than the launchers, whose
structs are its kernels' parameters.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def launchers_header(csrc: Path) -> str:
    """cuda/launchers.cuh: the device code of all launchers.

    A kernel's header has the stem of the unit that launches it (loader.hpp), and setup.py compiles all launchers as the
    unit launchers.cpp. The kernels that are no templates come with every other one: 1.4 s more of NVRTC 13.5 (a busy
    Zen 1) and 130 KB more on disk than by the header of an op's own.
    """
    stems = [path.stem for path in sorted((csrc / "cuda").glob("*.cu")) if path.with_suffix(".cuh").exists()]
    return "".join(f'#include "cuda/{stem}.cuh"\n' for stem in stems)


def device_sources(csrc: Path) -> str:
    """The header's text: names as the sources include them, contents, and a hash of all that decides machine code."""
    room = csrc / "cuda" / "nvrtc"
    sources = {path.relative_to(csrc).as_posix(): path for path in sorted((csrc / "cuda").glob("*.cuh"))}
    shared = ("codes.hpp", "norm_derivatives.hpp", "attention_derivatives.hpp")
    sources |= {f"common/{name}": csrc / "common" / name for name in shared}
    sources |= {path.name: path for path in sorted((room / "toolkit").glob("cuda_?*16.h"))}
    digest = hashlib.sha256((room / "loader.cpp").read_bytes())
    contents = {name: path.read_text() for name, path in sources.items()}
    contents["cuda/launchers.cuh"] = launchers_header(csrc)
    texts = []
    for name, text in contents.items():
        digest.update(f"{name}\n{text}".encode())
        texts.append(f'R"fastgan({text})fastgan"')
    names = ", ".join(f'"{name}"' for name in contents)
    return (
        "// Written by csrc/cuda/nvrtc/embed.py.\n"
        f'#define DEVICE_SOURCES_HASH "{digest.hexdigest()[:32]}"\n'
        f"static const char* const DEVICE_SOURCE_NAMES[] = {{{names}}};\n"
        f"static const char* const DEVICE_SOURCES[] = {{{', '.join(texts)}}};\n"
    )
