"""A few Triton kernels compiled for three cards, and the checks on what the compiler made of them.

`make gpu-static` compiles all of them for all cards. What was compiled once is read from Triton's own cache.
"""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", "3.8", reason="triton 3.8 or newer is needed to compile Triton kernels")
from fastgan.kernels import configs, conv2d
from fastgan.kernels.configs import CARDS, Config
from fastgan.kernels.launching import recorded

path = Path(__file__).with_name("triton_static.py")
spec = importlib.util.spec_from_file_location("triton_static", path)
static = sys.modules["triton_static"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(static)


def few(card):
    """The first configuration (the largest tile) of every kernel and type."""
    chosen = {}
    for case in static.cases(card):
        chosen.setdefault((case[0].fn.__name__, static._kind(case[1], case[2])), case)
    return chosen


@pytest.mark.parametrize("card", ["sm_80", pytest.param("sm_90", marks=pytest.mark.slow), "gfx942"])
def test_kernels_compile_into_what_the_card_can_run(card):
    found = few(card)
    names = {name for name, _ in found}
    assert names >= {"conv2d_kernel", "conv_transpose2d_kernel", "conv2d_weight_kernel", "merge_splits_kernel"}
    kinds = ("bf16", "fp32 tf32") if card == "sm_90" else ("bf16",)  # `make gpu-static` takes the rest
    for (_, kind), case in found.items():
        if kind in kinds:
            result = static.inspect(case, card)
            assert not result.faults(CARDS[card]), result
            if "FLAT=False" in result.constants:
                assert result.dots and not result.scalar_dots, result
                assert 16 in result.loads or kind != "bf16", result


def test_moments_are_made_from_rounded_numbers_without_spills():
    """No compiler may take the rounding of y and the way back for nothing: the tile's 64 numbers a thread come back."""
    chosen = {}
    for case in static.cases("sm_80"):
        name, kind = case[0].fn.__name__, static._kind(case[1], case[2])
        if name in ("finish_moments_kernel", "merge_splits_moments_kernel"):
            chosen.setdefault((name, True), case)
        elif name.startswith("conv") and kind == "bf16" and "FLAT" in case[2] and "G" in case[2]:
            chosen.setdefault((name, "moments" in case[1]), case)
    assert len(chosen) == 6, chosen.keys()
    widened = {}
    for (name, moments), case in chosen.items():
        if moments:
            result = static.inspect(case, "sm_80")
            assert not result.faults(CARDS["sm_80"]), result
        if name.startswith("conv"):
            widened[name, moments] = static.compiled(case, "sm_80").asm["ptx"].count("cvt.f32.bf16")
    for name in ("conv2d_kernel", "conv_transpose2d_kernel"):
        assert widened[name, True] - widened[name, False] == 128 * 128 // 256, widened


def test_faults_are_found():
    """A tile too large for its warps spills, one too deep for the card does not fit, a dot must not become FMA."""
    with configs.assumed("sm_80"):
        run = lambda config: recorded([lambda: launch(config)])[0]

        def launch(config):
            real, conv2d.tuned = conv2d.tuned, lambda op, x, product, case, run: run(config)
            try:
                conv2d.conv2d(*conv2d._arguments(128, 256, static.torch.bfloat16))
            finally:
                conv2d.tuned = real

        spilling = static.inspect(run(Config(64, 128, 64, 2, 3)), "sm_80")
        deep = static.inspect(run(Config(128, 128, 64, 8, 4)), "sm_86")
    assert any("spills" in fault for fault in spilling.faults(CARDS["sm_80"])), spilling
    assert any("shared memory" in fault for fault in dataclasses.replace(deep, shared=131072).faults(CARDS["sm_86"]))
    scalar = dataclasses.replace(deep, scalar_dots=1)
    assert scalar.faults(CARDS["sm_86"]) == ["1 of 4 dots became scalar FMA"]
    assert not dataclasses.replace(scalar, kind="fp32 ieee").faults(CARDS["sm_86"])


def test_occupancy_is_bound_by_what_runs_out_first():
    one = static.Compiled("k", "bf16", "", "sm_80", 64, 0, 16384, 128, 1, 0, (16,))
    assert one.programs_together(CARDS["sm_80"]) == 8  # registers: 65536 / (64 x 128)
    assert dataclasses.replace(one, shared=49152).programs_together(CARDS["sm_80"]) == 3
    assert dataclasses.replace(one, registers=16, shared=0).programs_together(CARDS["sm_80"]) == 16  # 2048 threads
    assert dataclasses.replace(one, threads=256).programs_together(CARDS["gfx942"]) == 4  # 64 KiB of shared memory


def test_tables_carry_a_row_a_kernel_and_bounds_named_so():
    one = static.Compiled("k", "bf16", "", "sm_80", 64, 0, 16384, 128, 1, 0, (16,))
    kept = ["| kernel | type |", "| `k` | fp32 | of an earlier sweep |", "| `other` | bf16 | stays |", "text"]
    text = static.document([one, dataclasses.replace(one, registers=80)], kept)
    assert "| `k` | bf16 | 16 | 64-80 · 16 · 6-8 |" in text and "**Bounds, not speeds.**" in text
    assert "| `other` | bf16 | stays |" in text and "earlier sweep" not in text
    assert text.startswith(static.BEGIN) and text.endswith(static.END)
    marks = static.DOCUMENT.read_text()
    assert marks.count(static.BEGIN) == marks.count(static.END) == 1
