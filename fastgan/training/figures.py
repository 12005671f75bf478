"""Pieces of a report's page that hold a file: a picture, a sound, a text, each with its caption."""

from __future__ import annotations

import base64
import html
from pathlib import Path

__all__ = ["figure", "picture"]


def figure(content: str, caption: str, kind: str = "") -> str:
    """HTML `content` with a caption. kind: the figure's class."""
    return f'<figure class="{kind}">{content}<figcaption>{html.escape(caption)}</figcaption></figure>'


def picture(path: Path, caption: str, kind: str = "") -> str:
    """A PNG inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{html.escape(caption)}">'
    return figure(image, caption, kind)
