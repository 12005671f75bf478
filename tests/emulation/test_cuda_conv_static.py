"""What nvcc makes of the CUDA convolutions: no spills, mma.sync fed by 16-byte copies (sm_80; all: make gpu-static)."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
NVCC = shutil.which("nvcc")
pytestmark = [
    pytest.mark.skipif(not NVCC, reason="nvcc is not on PATH"),
    pytest.mark.skipif(not CSRC.is_dir(), reason="the CUDA sources are not beside the tests"),
]
FAMILY = ("conv2d", "conv_transpose2d", "conv2d_weight")
MMA = {
    "6__half": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "13__nv_bfloat16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "4Tf32": "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
}


def compiled(op, folder):
    """({kernel: its PTX}, {kernel: (registers, spilled bytes)})."""
    command = [NVCC, "-std=c++20", "-O3", "-arch=sm_80", "-Werror", "all-warnings", f"-I{CSRC}", "-cubin"]
    command += ["--keep", "--keep-dir", str(folder), "-Xptxas", "-v", "-o", str(folder / f"{op}.cubin")]
    done = subprocess.run([*command, str(CSRC / "cuda" / f"{op}.cu")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    resources = {
        name: (int(registers), int(stored) + int(loaded))
        for name, stored, loaded, registers in re.findall(
            r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
            done.stderr,
            re.S,
        )
    }
    ptx = (folder / f"{op}.ptx").read_text()
    bodies = re.split(r"\.entry (\w+)", ptx)[1:]
    return dict(zip(bodies[::2], bodies[1::2], strict=True)), resources


def check_resources(resources, op):
    assert sum(f"{op}_kernel" in name for name in resources) >= 8
    for name, (registers, spilled) in resources.items():
        assert spilled == 0, f"{name} spills {spilled} bytes"
        sixteen_bits = "__half" in name or "__nv_bfloat16" in name
        assert registers <= (128 if "5Large" in name and sixteen_bits else 255), name


@pytest.mark.parametrize("op", FAMILY)
def test_it_multiplies_on_tensor_cores_and_copies_16_bytes(op, tmp_path):
    kernels, resources = compiled(op, tmp_path)
    check_resources(resources, op)
    main = {name: body for name, body in kernels.items() if f"{op}_kernel" in name}
    for name, body in main.items():
        assert re.search(r"cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16,", body), name
        operand = next((o for o in MMA if f"I{o}N" in name or f"{o}NS" in name or f"{o}E" in name), None)
        if operand is None:
            assert "fma.rn.f32" in body and "mma.sync" not in body, name
            continue
        assert MMA[operand] in body, name
        if "4Tf32" not in name or op == "conv2d":
            assert "ldmatrix.sync.aligned.m8n8.x4" in body, name
        if "5Large" in name:  # only whole chunks: no operand comes element by element
            assert not re.search(r"ld\.global\.(nc\.)?[bu]16", body), name
    assert sum("mma.sync" in body for body in main.values()) >= 6
