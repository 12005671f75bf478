"""A hook of mkdocs: `::card NAME` in a page becomes the card of fastgan/ops/NAME.py, as it stands in the source."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

OPS = Path(__file__).resolve().parent.parent / "fastgan" / "ops"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this for every page before it is rendered."""
    return re.sub(r"^::card (\w+)$", lambda found: card(found[1]), markdown, flags=re.MULTILINE)


def card(name: str) -> str:
    """A heading, the card's first sentence, and its table as preformatted text."""
    text = ast.get_docstring(ast.parse((OPS / f"{name}.py").read_text())) or ""
    sentence, _, rest = text.partition("\n\n")
    return f"## {name} {{ #fastgan.ops.{name} }}\n\n{sentence}\n\n```text\n{rest}\n```\n"
