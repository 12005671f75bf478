"""The rules of the house, checked on the source."""

import ast
import re
from pathlib import Path

import pytest

import fastgan

ROOT = Path(fastgan.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
HEADINGS = (
    "Formula",
    "Shapes",
    "Dtypes",
    "Layout",
    "Autocast",
    "Derivatives",
    "Saves",
    "Traffic",
    "FLOPs",
    "Determinism",
    "Backends",
    "Source",
)
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


# Imports inside a function that exist only because the module's own import would be a circle. The list may only shrink.
HIDDEN_CIRCLES: set[tuple[str, str]] = set()


def imports(path, names):
    """{module of ours that `path` imports: whether only a function's body imports it}; type checkers' are left out."""
    found = {}

    def note(module, hidden):
        if module in names and module != name_of(path):
            found[module] = found.get(module, True) and hidden

    def visit(node, hidden):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                note(alias.name, hidden)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = name_of(path).split(".")[: None if path.stem == "__init__" else -1]
                module = ".".join([*base[: len(base) - node.level + 1], *filter(None, [module])])
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                note(whole if whole in names else module, hidden)
        elif isinstance(node, ast.Call) and "import_module" in ast.dump(node.func):
            text = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ""
            note(text, hidden)
        inside = hidden or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text()), False)
    return found


def graph_of(paths):
    names = {name_of(p) for p in paths}
    graph = {name_of(p): imports(p, names) for p in paths}
    for name, found in graph.items():  # a package's own modules: importing them is no circle
        for other in [o for o in found if o.startswith(f"{name}.") and name != "fastgan"]:
            del found[other]
    return graph


def reaches(graph, start, goal):
    """Whether importing `start` leads to `goal`, imports inside functions among the ways."""
    seen, left = set(), [start]
    while left:
        node = left.pop()
        if node == goal:
            return True
        if node not in seen:
            seen.add(node)
            left += graph.get(node, ())
    return False


def test_no_import_cycles():
    """Neither among the modules' own imports nor, but for the list, by an import inside a function."""
    graph = graph_of(SOURCES)
    circular = {(a, b): hidden for a, found in graph.items() for b, hidden in found.items() if reaches(graph, b, a)}
    open_ones = {name: [b for b, hidden in found.items() if not hidden] for name, found in graph.items()}
    plain = [(a, b) for a, found in open_ones.items() for b in found if reaches(open_ones, b, a)]
    assert not plain, plain
    assert {edge for edge, hidden in circular.items() if hidden} == HIDDEN_CIRCLES


def test_the_look_for_circles_finds_them(tmp_path):
    """Plain, relative, inside a function, and by import_module."""
    lines = {
        "__init__": "from fastgan import a",
        "a": "from fastgan import b",
        "b": "from . import c",
        "c": "import os\ndef f():\n    import importlib\n    return importlib.import_module('fastgan.a')",
        "d": "def g():\n    import fastgan",
    }
    for stem, text in lines.items():
        (tmp_path / f"{stem}.py").write_text(text)
    before, globals()["ROOT"] = ROOT, tmp_path
    try:
        graph = graph_of(sorted(tmp_path.glob("*.py")))
    finally:
        globals()["ROOT"] = before
    assert graph["fastgan.a"] == {"fastgan.b": False} and graph["fastgan.b"] == {"fastgan.c": False}
    assert graph["fastgan.c"] == {"fastgan.a": True} and reaches(graph, "fastgan.a", "fastgan.c")
    assert graph["fastgan.d"] == {"fastgan": True} and not reaches(graph, "fastgan", "fastgan.d")


def test_assert_is_only_for_tests():
    for p in SOURCES:
        nodes = ast.walk(ast.parse(p.read_text()))
        assert not any(isinstance(n, ast.Assert) for n in nodes), p


def test_no_catch_all_rooms():
    assert not [p for p in SOURCES if p.stem in ("utils", "helpers", "misc", "common")]


# ---- size and layout ------------------------------------------------------------------------------------------------

MOST_LINES = 60  # of a function: a screen
LONGER = {  # why a function is longer
    "fastgan/benchmarking/textbook.py: textbook_step": "the whole textbook loop, in one closure",
    "kernels/conv2d_weight.py: conv2d_weight_kernel": "one kernel's paragraphs share twenty locals",
    "kernels/implicit_gemm.py: gather_gemm": "one kernel's paragraphs share twenty locals",
    "csrc/cpu/conv_compute.cpp: compute_with": "the one chain of cases that picks a convolution's kernel",
    "csrc/cpu/gn_act.cpp: backward": "two sweeps of a group share its statistics and scratch",
    "csrc/cpu/gn_act.cpp: double_backward": "three sweeps of a group share its statistics and scratch",
    "csrc/cuda/sweep.cuh: reduce_rows_kernel": "one kernel's paragraphs share its row's locals",
}
CHECKOUT = ROOT.parent
CONTROL = ("if", "for", "while", "switch", "catch")


def python_functions(text):
    """(name, lines) of every function."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.end_lineno - node.lineno + 1


def cpp_functions(text):
    """(name, lines) of every function body, from the line of its opening brace to that of its closing one."""
    text = re.sub(r'"(\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    text = re.sub(r"__launch_bounds__\(.*?\)", "", text)
    opened, line = [], 1
    for at, letter in enumerate(text):
        line += letter == "\n"
        if letter == "{":
            before = re.split(r"[;{}]", text[:at][-600:])[-1]
            name = re.search(r"(\w+)\s*\([^{}]*\)\s*(?:const\s*|noexcept\s*)*$", before, re.S)
            opened.append((name and name[1] not in CONTROL and re.search(r"(\w+)\s*\(", before)[1], line))
        elif letter == "}" and opened:
            name, begin = opened.pop()
            if name:
                yield name, line - begin + 1


def test_functions_are_within_a_screen_or_say_why_not():
    found = set()
    for folder, suffixes in (("fastgan", (".py",)), ("kernels", (".py",)), ("csrc", (".cpp", ".hpp", ".cu", ".cuh"))):
        for path in (CHECKOUT / folder).rglob("*"):
            if path.suffix in suffixes:
                functions = python_functions if path.suffix == ".py" else cpp_functions
                long = {name for name, lines in functions(path.read_text()) if lines > MOST_LINES}
                found |= {f"{path.relative_to(CHECKOUT).as_posix()}: {name}" for name in long}
    if not (CHECKOUT / "csrc").is_dir():
        pytest.skip("installed without the source tree")
    assert found <= set(LONGER), found - set(LONGER)


def test_long_functions_are_found():
    body = "  x += 1;\n" * 61
    assert dict(cpp_functions(f"template <int N>\nvoid f(int x) {{\n{body}}}\nint g() {{ return 1; }}"))["f"] == 63
    assert dict(cpp_functions(f"struct S {{\n{body}}};\nvoid g() {{\n  for (int i = 0;;) {{\n{body}}}\n}}")) == {
        "g": 65
    }
    assert dict(python_functions("def f():\n" + "    x = 1\n" * 61)) == {"f": 62}


def test_the_formatter_decides_the_layout_or_the_line_says_why_not():
    sources = [p for folder in ("fastgan", "kernels", "tests", "benchmarks") for p in (CHECKOUT / folder).rglob("*.py")]
    for p in [*sources, CHECKOUT / "setup.py"]:
        for number, line in enumerate(p.read_text().splitlines() if p.exists() else (), 1):
            skipped = re.search(r"#\s*fmt:\s*(skip|off)(.*)", line)
            assert not skipped or re.match(r"\s*# \w+", skipped[2]) or "fmt:" in line.split("#")[0], (
                f"{p.name}:{number}"
            )
