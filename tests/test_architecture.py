"""The rules of the house, checked on the source."""

import ast
import re
from pathlib import Path

import pytest

import fastgan

ROOT = Path(fastgan.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
HEADINGS = (
    "Formula", "Shapes", "Dtypes", "Layout", "Autocast", "Derivatives", "Saves", "Traffic", "FLOPs", "Determinism",
    "Backends", "Source",
)  # fmt: skip
OPS = [p for p in (ROOT / "ops").glob("*.py") if p.stem != "__init__"]


def name_of(path):
    parts = ("fastgan", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", OPS, ids=lambda p: p.stem)
def test_every_op_has_its_card_cost_and_test(path):
    card = ast.get_docstring(ast.parse(path.read_text()))
    for heading in HEADINGS:
        assert re.search(rf"^{heading}\s", card, re.M), f"{path.name}: {heading}"
    assert callable(getattr(fastgan.ops, path.stem).cost)
    assert (Path(__file__).parent / f"test_{path.stem}.py").exists()


def test_only_op_py_talks_to_torch_library():
    users = [name_of(p) for p in SOURCES if "torch.library" in re.sub(r'""".*?"""', "", p.read_text(), flags=re.S)]
    assert users == ["fastgan._op"]


def test_the_native_core_includes_no_torch():
    sources = [p for p in (ROOT.parent / "csrc").rglob("*") if p.suffix in (".cpp", ".hpp", ".cu", ".cuh")]
    if not sources:
        pytest.skip("installed without the source tree")
    for p in sources:
        assert not re.search(r'#include\s*[<"](torch|ATen|c10)/', p.read_text()), p


def imports(path, names):
    """Modules of ours that `path` imports when it is itself imported (function bodies are left out)."""
    found = set()

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and child.module and child.module.startswith("fastgan"):
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    found.add(whole if whole in names else child.module)
            visit(child)

    visit(ast.parse(path.read_text()))
    return found & names


def test_no_import_cycles():
    names = {name_of(p) for p in SOURCES}
    graph = {name_of(p): imports(p, names) - {"fastgan"} for p in SOURCES if name_of(p) != "fastgan"}
    done, path = set(), []

    def walk(node):
        assert node not in path, " -> ".join([*path[path.index(node) :], node])
        if node in done:
            return
        path.append(node)
        for other in sorted(graph.get(node, ())):
            if not other.startswith(f"{node}.") and other != node:
                walk(other)
        path.pop()
        done.add(node)

    for node in sorted(graph):
        walk(node)


def test_assert_is_only_for_tests():
    for p in SOURCES:
        nodes = ast.walk(ast.parse(p.read_text()))
        assert not any(isinstance(n, ast.Assert) for n in nodes), p


def test_no_catch_all_rooms():
    assert not [p for p in SOURCES if p.stem in ("utils", "helpers", "misc", "common")]
