"""Launching: tile sizes, the compiled kernel kept per case, and the list for ahead-of-time compilation."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", "3.8", reason="triton 3.8 or newer is needed for the Triton kernels")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgan.kernels import (
    attention,
    bias_act,
    filtered_lrelu,
    gan_loss,
    grad_norm_penalty,
    interpolate,
    launching,
    normalisation,
    sample_dot,
    upfirdn2d,
)

MODULES = [attention, bias_act, normalisation, gan_loss, interpolate, grad_norm_penalty, sample_dot, upfirdn2d]
MODULES += [filtered_lrelu]
SINGLE = (interpolate, upfirdn2d, filtered_lrelu)  # of one kernel


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 64, 1000])
@pytest.mark.parametrize(("rows", "pixels"), [(1, 1), (7, 7), (48, 16), (4096, 1024), (2**30, 2**20)])
def test_tiles_are_powers_of_two_of_bounded_size(rows, pixels, channels, channels_last):
    s, c = launching.tile(rows, channels, pixels, channels_last)
    assert s * c <= launching.TILE and s & (s - 1) == 0 and c & (c - 1) == 0 and min(s, c) >= 1
    chunks, each = launching.chunks_of(rows, s, triton.cdiv(channels, c))
    assert chunks & (chunks - 1) == 0 and chunks * each >= rows and each % s == 0


def test_the_compiled_kernel_is_looked_up_per_case(monkeypatch):
    """Triton's front door is passed once for each dtype, alignment, kind of integer and constant; not again."""
    compiles, runs = [], []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *args: runs.append((grid, args))

    class Kernel:
        fn = "the kernel"

        def __getitem__(self, grid):
            return lambda *args, **constants: (compiles.append(constants), Compiled())[1]

    monkeypatch.setattr(launching, "_compiled", {})
    x, kernel = torch.randn(64), Kernel()
    for n in (32, 48, 33, 1):
        launching.launch(kernel, 3, x, n, BLOCK=8)
        launching.launch(kernel, 3, x, n, BLOCK=8)
    assert len(compiles) == 3 and len(runs) == 5  # 48 is of 32's kind
    assert runs[0] == ((3, 1, 1), (x, 32, 8))  # arguments, then constants, in the kernel's order
    assert compiles[0] == {"BLOCK": 8, "num_warps": 4, "enable_fp_fusion": True}
    for other in (x[1:], x.bfloat16(), x.to(torch.float64)):
        launching.launch(kernel, 3, other, 32, BLOCK=8)
    launching.launch(kernel, 3, x, 32, BLOCK=16)
    launching.launch(kernel, 3, x, 32, BLOCK=8, num_warps=8)
    launching.launch(kernel, 3, x, 2**31, BLOCK=8)
    assert len(compiles) == 3 + 6


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rpartition(".")[2])
def test_static_cases_are_what_would_be_launched(module):
    cases = module.static_cases()
    assert cases and len({c[0].fn.__name__ for c in cases}) >= (1 if module in SINGLE else 2)
    for kernel, signature, constants, options in cases:
        assert {*signature, *constants} == {p.name for p in kernel.params}
        fixed = [p.name for p in kernel.params if p.is_constexpr]
        assert [name for name in constants if name in fixed] == fixed  # `launch` passes them in this order
        assert options["num_warps"] in (1, 2, 4, 8, 16) and options["enable_fp_fusion"] is True
    if module not in (gan_loss, attention):  # logits are few, heads have 64-bit offsets; the rest has both variants
        assert {c[2]["WIDE"] for c in cases if "WIDE" in c[2]} == ({False, True} if module is not bias_act else {False})


def test_recording_runs_nothing_and_ends():
    ran = launching.recorded(
        iter([lambda: bias_act._forward(launching.meta((2, 3, 4, 4), torch.float32), None, "relu", 0.0, 1.0, -1.0)])
    )
    assert len(ran) == 1 and ran[0][2]["bias"] is None and launching._recording is None


def usage(cubin, folder):
    """Registers, stack and so on of a compiled kernel, by the cuobjdump that Triton brings."""
    (folder / "kernel.cubin").write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("arch", [80, 90])
def test_a_kernel_of_each_kind_compiles_without_spills(arch, tmp_path):
    """A sample for every test run, without a GPU."""
    wanted = {"bias_act_kernel", "resident_kernel", "gan_loss_kernel", "grad_norm_penalty_backward_kernel"}
    done = set()
    for module in MODULES:
        for kernel, signature, constants, options in module.static_cases():
            if kernel.fn.__name__ in wanted - done:
                done.add(kernel.fn.__name__)
                names = [p.name for p in kernel.params]
                aligned = {(names.index(k),): [["tt.divisibility", 16]] for k, v in signature.items() if v[0] == "*"}
                fixed = {(names.index(k),): v for k, v in constants.items()}
                types = {n: signature.get(n, "constexpr").partition(":")[0] for n in names}
                source = ASTSource(kernel, types, fixed, attrs=aligned)
                compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
                assert re.search(r"STACK:0 .*LOCAL:0 ", usage(compiled.asm["cubin"], tmp_path)), kernel.fn.__name__
    assert done == wanted
