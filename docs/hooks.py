"""Hooks of mkdocs: the reference follows the source, and the search answers from the guides.

`::names MODULE` in a page becomes a reference entry for each name of the module's `__all__`, and `::cards MODULE` the
card of each op in it. The evidence pages hold thousands of table rows, which
filled the first places of every search; they are left out of it and linked from the guides.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

# What a question is answered from first; without it "resume a run" found the page on adding an op.
BOOST = {"troubleshooting.md": 4, "penalties.md": 2, "train-on-a-folder.md": 2, "api/": 0.5, "add-an-op.md": 0.3}
ROOT = Path(__file__).resolve().parent.parent


def on_config(config: Any) -> Any:
    """mkdocs calls this first. Evidence pages that nav does not name, such as those of another machine, are added."""
    for section in config.nav:
        pages = section.get("Evidence", [])
        listed = {path for page in pages for path in ([page] if isinstance(page, str) else page.values())}
        for path in sorted((ROOT / "docs" / "evidence").glob("*.md")) if pages else ():
            if f"evidence/{path.name}" not in listed:
                pages.append({path.read_text().partition("\n")[0].lstrip("# "): f"evidence/{path.name}"})
    return config


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """mkdocs calls this for every page before it is rendered."""
    source = page.file.src_uri
    if source.startswith("evidence/") and source != "evidence/index.md":
        page.meta["search"] = {"exclude": True}
    for start, boost in BOOST.items():
        if source.startswith(start):
            page.meta["search"] = {"boost": boost}
    return re.sub(r"^::(names|cards) ([\w.]+)$", _expand, markdown, flags=re.MULTILINE)


def _expand(found: re.Match[str]) -> str:
    make = {"names": entry, "cards": card}[found[1]]
    return "\n".join(make(found[2], name) for name in public(found[2]))


def public(module: str) -> list[str]:
    """The names of a module's `__all__`, without its modules that have a page of their own."""
    folder = ROOT.joinpath(*module.split("."))
    source = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if not (ROOT / "docs/api" / f"{name}.md").exists()]
    raise ValueError(f"docs: {module} must have __all__, it has none")


def entry(module: str, name: str) -> str:
    """What mkdocstrings makes an entry of."""
    return f"::: {module}.{name}\n"


def card(module: str, name: str) -> str:
    """A heading, the card's first sentence, its formula as it stands in the source, and a table of the other lines."""
    text = ast.get_docstring(ast.parse(ROOT.joinpath(*module.split("."), f"{name}.py").read_text())) or ""
    sentence, _, rest = text.partition("\n\n")
    lines = re.split(r"^(\w+) +", rest.strip() + "\n", flags=re.MULTILINE)[1:]
    entries = dict(zip(lines[::2], lines[1::2], strict=True))
    formula = "\n".join(line.removeprefix(" " * 13) for line in entries.pop("Formula").splitlines())
    rows = [f"| {heading} | {_cell(entry)} |" for heading, entry in entries.items()]
    head = [f"## {name} {{ #{module}.{name} }}", sentence, f"```text\n{formula}\n```"]
    return "\n\n".join([*head, "\n".join(["| | |", "|---|---|", *rows])]) + "\n"


def _cell(entry: str) -> str:
    """One line, without what Markdown would take for markup."""
    return re.sub(r"([*_<>|\[\]`])", r"\\\1", " ".join(entry.split()))
