"""The emulator and the sanitizers pass the CUDA kernels as they are, and catch faults planted in copies of them.

Each runs in its own process: a sanitizer's runtime must be the program's.
"""

import shutil

import pytest

from fastgan.testing import _emulator

try:
    shim = _emulator("cuda")
    MISSING = "" if shutil.which("g++") else "g++ was not found: the thread sanitizer is gcc's here"
except (RuntimeError, ImportError) as error:
    MISSING = str(error)

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING or "-")


def sources(*stems):
    return [p for p in shim.LAUNCHERS if p.stem in stems]


def report(program, *arguments):
    try:
        return shim.run_sanitized(program, *arguments)
    except RuntimeError as error:
        pytest.skip(str(error))


# ---- the kernels as they are -----------------------------------------------------------------------------------------


def test_address_and_undefined_behaviour_on_two_ops():
    program = shim.sanitized("address", sources("bias_act", "gan_loss"), "address-some")
    assert report(program, 0) == ""
    assert report(program, 3) == ""


def test_races_on_two_ops():
    program = shim.sanitized("thread", sources("bias_act", "gan_loss"), "thread-some")
    assert report(program, 1, "within", "gan_loss") == ""
    assert report(program, 1, "between", "gan_loss") == ""


MEMORY_BOUND = (
    "adam",
    "bias_act",
    "bn_act",
    "filtered_lrelu",
    "gan_loss",
    "gn_act",
    "gn_rows",
    "grad_norm_penalty",
    "interpolate",
    "norm",
    "sample_dot",
    "upfirdn2d",
)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("sanitizer", "race"), [("address", "within"), ("thread", "within"), ("thread", "between")])
def test_every_memory_bound_kernel(sanitizer, race, seed):
    assert report(shim.sanitized(sanitizer, sources(*MEMORY_BOUND)), seed, race) == ""


# ---- faults ----------------------------------------------------------------------------------------------------------

LAST_WRITE = "    for (int k = 0; k < Acc::WORDS; ++k) part[k][threadIdx.x / WARP][column] = acc.word[k];\n"
BARRIER = f"{LAST_WRITE}  __syncthreads();\n"
FAULTS = {  # name -> (file, text, its replacement, op's sources, function, how it shows)
    "missing barrier": (
        "prelude.cuh",
        BARRIER,
        BARRIER.replace("  __syncthreads();\n", ""),
        ("gan_loss",),
        "gan_loss",
        ("thread", "within"),
        "data race",
    ),
    "lost update between blocks": (
        "gan_loss.cuh",
        "store(partials + k * gridDim.x + blockIdx.x, s.word[k]);",
        "store(partials + k * gridDim.x, load(partials + k * gridDim.x) + s.word[k]);",
        ("gan_loss",),
        "gan_loss",
        ("thread", "between"),
        "data race",
    ),
    "off by one": (
        "gan_loss.cuh",
        "i < a.n_fake; i += step) {\n    const float f = to_float(load(a.fake + i));\n    const float slope",
        "i <= a.n_fake; i += step) {\n    const float f = to_float(load(a.fake + i));\n    const float slope",
        ("gan_loss",),
        "gan_loss",
        ("address", "within"),
        "heap-buffer-overflow",
    ),
    "a tensor's last block runs on into the next": (
        "adam.cuh",
        "begin + ADAM_BLOCK < t.count ? begin + ADAM_BLOCK : t.count",
        "begin + ADAM_BLOCK",
        ("adam",),
        "adam",
        ("address", "within"),
        "heap-buffer-overflow",
    ),
    "missing mask": (
        "sweep.cuh",
        "if (begin + local >= total) break;",
        "",
        ("bias_act",),
        "bias_act",
        ("address", "within"),
        "heap-buffer-overflow",
    ),
    "the padding is read": (
        "upfirdn2d.cuh",
        "if (ix < 0 || ix >= u.x.in) continue;",
        "",
        ("upfirdn2d",),
        "upfirdn2d",
        ("address", "within"),
        "heap-buffer-overflow",
    ),
    "rows slide before they were read": (
        "filtered_lrelu.cuh",
        "if (step >= 0) finish(begin + step * f.rows);\n      __syncthreads();",
        "if (step >= 0) finish(begin + step * f.rows);",
        ("filtered_lrelu",),
        "filtered_lrelu",
        ("thread", "within"),
        "data race",
    ),
    "signs past a row's last word": (
        "filtered_lrelu.cuh",
        "at < own_word_end",
        "at <= own_word_end",
        ("filtered_lrelu",),
        "filtered_lrelu",
        ("address", "within"),
        "heap-buffer-overflow",
    ),
    "signs of the next strip too": (
        "filtered_lrelu.cuh",
        "at < own_word_end",
        "at <= own_word_end",
        ("filtered_lrelu",),
        "filtered_lrelu",
        ("thread", "between"),
        "data race",
    ),
    "a row of x past the last": (
        "filtered_lrelu.cuh",
        "i < f.up_y.in && j >= 0",
        "i <= f.up_y.in && j >= 0",
        ("filtered_lrelu",),
        "filtered_lrelu",
        ("address", "within"),
        "heap-buffer-overflow",
    ),
    "a vote after some lanes left": (
        "filtered_lrelu.cuh",
        "      if (rows < 1) return;",
        "      if (rows < 1 || c >= f.fine_columns) return;",
        ("filtered_lrelu",),
        "filtered_lrelu",
        ("address", "within"),
        "simt: deadlock",
    ),
    "a shuffle after some lanes left": (
        "gan_loss.cuh",
        "  merge_block<LOSS_THREADS>(s);\n  if (threadIdx.x != 0) return;",
        "  if (threadIdx.x >= a.n_fake) return;\n  merge_block<LOSS_THREADS>(s);\n  if (threadIdx.x != 0) return;",
        ("gan_loss",),
        "gan_loss",
        ("address", "within"),
        "simt: warp",
    ),
    "a barrier that some threads skip": (
        "prelude.cuh",
        BARRIER,
        BARRIER.replace("  __syncthreads();", "  if (threadIdx.x < 32) __syncthreads();"),
        ("gan_loss",),
        "gan_loss",
        ("address", "within"),
        "simt: barrier",
    ),
    "blocks that do not wait for each other": (
        "resident.cuh",
        "while (atomicAdd(arrived, 0u) < blocks) __nanosleep(32);",
        "",
        ("bn_act", "norm"),
        "bn_act",
        ("thread", "between"),
        "data race",
    ),
}


# Each is a build of its own, of 10 to 30 s: one for each way in which a fault shows, the others are slow.
SHOWN = (
    "missing barrier",
    "blocks that do not wait for each other",
    "off by one",
    "a vote after some lanes left",
)


@pytest.mark.parametrize("fault", [f if f in SHOWN else pytest.param(f, marks=pytest.mark.slow) for f in FAULTS])
def test_a_planted_fault_is_caught(tmp_path, fault):
    name, text, replacement, stems, function, (sanitizer, race), words = FAULTS[fault]
    original = (shim.CSRC / "cuda" / name).read_text()
    assert original.count(text) == 1, f"{name} has changed: plant the fault anew"
    copy = tmp_path / "cuda"
    copy.mkdir()
    for p in (shim.CSRC / "cuda").glob("*.*"):  # "cuda/..." resolves to the copies first
        shutil.copy(p, copy / p.name)
    (copy / name).write_text(original.replace(text, replacement))
    launchers = [copy / f"{stem}.cu" for stem in stems]
    program = shim.sanitized(sanitizer, launchers, f"planted-{fault.replace(' ', '-')}", (tmp_path,))
    reports = [report(program, seed, race, function) for seed in (0, 1)]
    assert any(words in r for r in reports), reports
