"""The documentation is true: every block of code runs, every command exists, every link leads somewhere.

A page's blocks run in the page's order, in one temporary folder, on the reference backend. Python blocks share their
names. Of a shell block each command is checked against its parser, and the quick commands of `fastgan` run with tiny
settings. A comment before a block changes that:

    <!-- test: needs a gpu -->       the block is only compiled or parsed
    <!-- test: output -->            the block is what the Python block before it prints
    <!-- test: not run: REASON -->   the block is not touched
    <!-- test: first                 code that runs before the next Python block, for names that a reader has
    CODE -->
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

import fastgan
import fastgan.domains
import fastgan.metrics
import fastgan.profiling
from fastgan._op import OPS
from fastgan.choice import REGISTERED
from fastgan.cli import build_parser, main

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- test: (?P<mark>(?:(?!-->).)*?)\s*-->\n+)?^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n"
    r"(?P<code>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
LANGUAGES = {"python", "sh", "text", "json", "html", "cpp", "make", "dockerfile", "yaml"}
TINY = ["--steps=2", "--batch-size=4", "--device=cpu", "--backend=reference", "--quiet"]
TINY += ["--set=sample_count=4", "--set=log_every=1"]
NARROW = ["--set=model_options.g_width=2", "--set=model_options.d_width=2"]
SMALL = {  # of recipes whose models have other options
    "chargan": ["--set=model_options.width=2"],
    "hifigan-small": ["--set=model_options.g_width=8", "--set=model_options.d_width=4", "--set=held_out=8"],
    "wavegan": [*NARROW, "--set=domain_options.length=256", "--set=d_steps=1"],
}
QUICK = {  # what runs, and with which further arguments
    "sample": ["--n=4"],
    "interpolate": ["--frames=2", "--stops=2", "--walks=1"],
    "evaluate": ["--n=8"],
    "data": [],
}
PROGRAMS = {"git", "cd", "docker", "nvidia-smi", "torchrun"}  # other people's, whose arguments are not checked

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="installed without the source tree")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    code: str
    mark: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in BLOCK.finditer(text):
        indent = match["indent"]
        code = "".join(line.removeprefix(indent) for line in match["code"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(match["language"], code, match["mark"] or "", line))
    return found


def commands(code: str) -> list[list[str]]:
    """The commands of a shell block as words, without comments and variables set in front."""
    lines = re.sub(r"\\\n\s*", " ", code).splitlines()
    found = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    for words in found:
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            del words[0]
    return [words for words in found if words]


# ---- what a block does ----------------------------------------------------------------------------------------------


def run_python(block: Block, page: Path, names: dict[str, object]) -> None:
    code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")  # errors then name the page's own line
    if block.mark == "needs a gpu":
        return
    exec(code, names)  # the block is ours, and to run it is the purpose


def run_command(words: list[str]) -> None:
    """Check one command of a shell block, and run it where that takes no time."""
    program, *arguments = words
    if program == "fastgan" or words[:3] == ["python", "-m", "fastgan.cli"]:
        run_fastgan(arguments if program == "fastgan" else words[3:])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        wanted = [word for word in arguments if "=" not in word]
        assert wanted and set(wanted) <= set(targets), f"make {arguments}: there is no such target"
    elif program in ("python", "pytest"):
        if arguments[:2] == ["-m", "pytest"]:
            arguments = arguments[2:]
        paths = [word for word in arguments if re.match(r"(tests|examples|benchmarks)/", word)]
        assert paths or arguments[0].startswith("-"), f"{words}: no file of ours"
        for path in paths:
            assert list(ROOT.glob(path.rstrip("/"))) or path.startswith("benchmarks/results"), f"{path} does not exist"
    elif program == "pip":
        extras = {name for word in arguments for found in re.findall(r"\[(.*?)\]", word) for name in found.split(",")}
        known = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.S)
        assert extras <= set(re.findall(r"^(\w+) =", known[1], re.MULTILINE)), f"{words}: there is no such extra"
        assert arguments[0] in ("install", "download")
    else:
        assert program in PROGRAMS, f"{program} is no program that the documentation may take for granted"


def run_fastgan(arguments: list[str]) -> None:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        if "--help" in arguments:
            return
        try:
            parsed = build_parser().parse_args(arguments)
        except SystemExit as stop:
            raise AssertionError(f"fastgan {shlex.join(arguments)}: {said.getvalue()}") from stop
        command = parsed.command
        code = 0
        if command == "train":
            code = main([*arguments, *tiny(parsed)])
        elif command in QUICK:
            code = main([*arguments, *QUICK[command]])
    assert code == 0, f"fastgan {shlex.join(arguments)}: {said.getvalue()}"


def tiny(parsed: object) -> list[str]:
    """What makes a training command take a second."""
    if parsed.resume:
        config = Path(parsed.resume) / "config.json"
        return [f"--steps={json.loads(config.read_text())['recipe']['steps'] + 1}", "--quiet"]
    small = [*TINY, *SMALL.get(parsed.recipe, NARROW), "--overwrite"]
    return small if parsed.dry_run else [*small, "--set=checkpoint_every=0", "--set=sample_every=0"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with what the pages speak of: a folder of pictures, one of two classes, a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("fastgan.domains._DOMAINS", fastgan.domains.domains())  # a page registers one of its own
    for number in range(12):
        shape = (40, 30) if number % 2 else (32, 32)
        for name in ("pictures", f"animals/{'cats' if number % 2 else 'dogs'}"):
            Path(name).mkdir(parents=True, exist_ok=True)
            colour = (20 * number, 255 - 20 * number, 100)
            Image.new("RGB", shape, colour).save(f"{name}/{number}.png")
    shutil.make_archive("pictures", "zip", "pictures")
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run `runs/garments` that pages take for granted before they train one themselves."""
    out = tmp_path_factory.mktemp("trained") / "garments"
    assert main(["train", "--recipe=dcgan-28", "--data=fashion-mnist", f"--out={out}", *TINY, *NARROW]) == 0
    return out


WITH_CODE = [page for page in PAGES if blocks(page)]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_block_runs(page, folder, trained, capsys):
    shutil.copytree(trained, "runs/garments")
    names: dict[str, object] = {"__name__": "__main__"}
    torch.manual_seed(0)
    registered = set(OPS)
    with fastgan.backend("reference"), torch.random.fork_rng():
        for block in blocks(page):
            assert block.language in LANGUAGES, f"{page.name}:{block.line}: language {block.language!r}"
            if block.mark.startswith("not run:"):
                continue
            try:
                if block.mark.startswith("first"):
                    exec(block.mark.removeprefix("first"), names)
                if block.language == "python":
                    capsys.readouterr()
                    run_python(block, page, names)
                elif block.mark == "output":
                    assert capsys.readouterr().out == block.code
                elif block.language == "sh":
                    for words in commands(block.code):
                        if block.mark == "needs a gpu" and words[0] == "fastgan":
                            build_parser().parse_args(words[1:])
                        else:
                            run_command(words)
            except Exception as error:
                raise AssertionError(f"{page.relative_to(ROOT)}, the block at line {block.line}: {error!r}") from error
    capsys.readouterr()
    for name in set(OPS) - registered:  # the op that docs/add-an-op.md adds
        del OPS[name], REGISTERED[name]


def test_marks_are_known():
    for page in PAGES:
        for mark in re.findall(r"<!-- test: (.*?)(?:-->|\n)", page.read_text()):
            assert re.match(r"needs a gpu|output|not run: \w+|first", mark), f"{page.name}: {mark}"


@pytest.mark.parametrize(
    "command",
    [
        "fastgan train --recipe dcgan-28 --no-such-option",
        "fastgan train --recipe no-such-recipe --data pictures --out runs/x",
        "fastgan evaluate --run runs/nowhere",
        "make no-such-target",
        "pip install -e '.[no-such-extra]'",
        "python examples/no_such_file.py",
        "no-such-program",
    ],
)
def test_a_wrong_command_is_found(command, folder):
    with pytest.raises(AssertionError):
        run_command(commands(command)[0])


def test_blocks_and_their_marks_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- test: needs a gpu -->\n```python\n1 / 0\n```\n\n- a\n\n    ```python\n    1 / 0\n    ```\n")
    marked, indented = blocks(page)
    assert (marked.mark, marked.line, indented.code, indented.mark) == ("needs a gpu", 3, "1 / 0\n", "")
    run_python(marked, page, {})
    with pytest.raises(ZeroDivisionError):
        run_python(indented, page, {})
    assert commands("A=1 fastgan train \\\n  --steps 2  # why\n# only a comment\n") == [
        ["fastgan", "train", "--steps", "2"]
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Files; mkdocs checks headings too. Repository files are reached from the README and CONTRIBUTING alone."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"(https?:|mailto:|#)", target):
            continue
        assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


# ---- the site -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The whole site, built strictly."""
    pytest.importorskip("material", reason="the site needs mkdocs-material (pip install -e '.[dev]')")
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def test_every_public_name_is_in_the_reference(site):
    shown = set(re.findall(r'id="(fastgan[\w.]*)"', "".join(p.read_text() for p in (site / "api").glob("*.html"))))
    modules = {f"fastgan.{name}" for name in ("compat", "data", "functional", "models", "nn", "ops", "testing")}
    wanted = {f"fastgan.{name}" for name in fastgan.__all__} - modules
    for module in ("data", "functional", "metrics", "models", "nn", "ops", "profiling"):
        found = sys.modules[f"fastgan.{module}"]
        wanted |= {f"fastgan.{module}.{name}" for name in found.__all__}
    wanted |= {"fastgan.testing.assert_penalty_complete", "fastgan.testing.emulate"}
    assert wanted <= shown, f"not in docs/api: {sorted(wanted - shown)}"


def test_the_site_asks_no_other_host_for_anything(site):
    for path in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?(https?://[^\s\">]+)", path.read_text())
        loaded += re.findall(
            r"<link[^>]+rel=\"?(?:stylesheet|preconnect|icon)[^>]+href=\"?(https?://[^\s\">]+)", path.read_text()
        )
        assert not loaded, f"{path.name}: {loaded}"
