"""Attention and the norms of csrc/cpu under the thread sanitizer, and races planted in copies of them."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPENMP = ROOT / "tests" / "emulation" / "openmp"
SOURCES = [ROOT / "csrc" / "cpu" / f"{stem}.cpp" for stem in ("attention", "gn_act")]
SOURCES += [OPENMP / "races.cpp", OPENMP / "runtime.cpp"]
FLAGS = ("-std=c++20", "-O1", "-g1", "-fsanitize=thread", "-DISA=portable", "-fno-math-errno", "-Wno-psabi")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="no g++: runtime.cpp has what gcc makes of OpenMP"),
]


def compiled(source, folder):
    made = folder / f"{source.stem}.o"
    subprocess.run(["g++", *FLAGS, "-fopenmp", f"-I{ROOT / 'csrc'}", "-c", source, "-o", made], check=True)
    return made


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """{stem: object file} of the kernels as they are, and of what runs them."""
    folder = tmp_path_factory.mktemp("objects")
    return {source.stem: compiled(source, folder) for source in SOURCES}


def report(objects, program):
    """What the thread sanitizer says of these objects, linked without libgomp."""
    subprocess.run(["g++", "-fsanitize=thread", "-pthread", *objects.values(), "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, env={"TSAN_OPTIONS": "exitcode=66"}, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer needs fewer random bits of addresses than this kernel uses")
    return "" if done.returncode == 0 else f"status {done.returncode}: {done.stdout}{done.stderr[-4000:]}"


def test_nothing_is_reported(objects, tmp_path):
    assert report(objects, tmp_path / "races") == ""


FAULTS = {  # what is wrong: (kernel, its text, what stands in its place)
    "one scratch for the forwards of all threads": (
        "attention",
        "Cutter mine{scratch.data + thread_index() * count.used};\n    const ForwardMemory",
        "Cutter mine{scratch.data};\n    const ForwardMemory",
    ),
    "parts of a head add to the same sums": (
        "attention",
        "* p_.parts + job % p_.parts : thread_index();",
        "* p_.parts : thread_index();",
    ),
    "parts are added before they are complete": (
        "attention",
        "#pragma omp for schedule(dynamic)\n    for (int64_t job",
        "#pragma omp for schedule(dynamic) nowait\n    for (int64_t job",
    ),
    "parameters' gradients of all threads in one place": (
        "gn_act",
        "total(totals + thread * COUNT * cut.C)",
        "total(totals)",
    ),
    "parameters' gradients are not waited for": (
        "gn_act",
        "    gradients.flush();\n#pragma omp barrier\n",
        "    gradients.flush();\n",
    ),
    "the passes over a shared sample do not wait": (
        "gn_act",
        "    if (shared) {\n#pragma omp barrier\n    }\n",
        "",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_race_is_reported(objects, tmp_path, fault):
    kernel, right, wrong = FAULTS[fault]
    text = (ROOT / "csrc" / "cpu" / f"{kernel}.cpp").read_text()
    assert text.count(right) == 1, f"{kernel}.cpp has changed: plant the fault anew"
    copy = tmp_path / f"{kernel}.cpp"
    copy.write_text(text.replace(right, wrong))
    assert "data race" in report({**objects, kernel: compiled(copy, tmp_path)}, tmp_path / "races")
