"""CUDA kernels without nvcc: compiled at first launch by NVRTC, kept on disk, launched through the driver.

No GPU: a fake driver writes down what it is asked. What it is asked must be what the emulator launches, whose results
tests/emulation/test_cuda_ops.py checks. Where NVIDIA's NVRTC is installed it compiles the kernels in earnest.
"""

import importlib.util
import re
import sys
import threading
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from fastgan import _native, _nvrtc, testing
from fastgan._op import OPS
from fastgan.ops import adam

spec = importlib.util.spec_from_file_location("fastgan_nvrtc_shim", Path(__file__).with_name("nvrtc_shim.py"))
shim = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = shim
spec.loader.exec_module(shim)


@pytest.fixture(scope="module")
def fake():
    try:
        pytest.importorskip("pybind11", reason="the launchers need pybind11 to be built; install fastgan[dev]")
        shim.load()
        return shim.Fake()
    except RuntimeError as error:
        if "the CUDA emulator needs" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture
def cuda(fake, tmp_path):
    """The launchers over the fake driver, with an empty cache in tmp_path."""
    fake.reset()
    assert prepared(fake, tmp_path) == ""
    with testing.emulate("cuda"), _native.CUDA.emulated(shim.Launchers()):
        yield fake
    fake.reset()


def prepared(fake, folder):
    return shim.load().prepare([fake.path], [fake.path], str(folder / "kernels"))


def stem(kernel):
    return re.search(r"(\w+)(<|\)|$)", kernel.rpartition("::")[2] if "<" not in kernel else kernel)[1]


def arguments(op, dtype, layout):
    """An op's example with its images in one dtype and layout."""
    images = lambda a: isinstance(a, torch.Tensor) and a.dim() == 4
    return [a.to(dtype).contiguous(memory_format=layout) if images(a) else a for a in op.example()]


# ---- what is launched ------------------------------------------------------------------------------------------------

WITH_KERNELS = [name for name, op in OPS.items() if "cuda" in op.backends]
layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_the_launches_are_the_emulators(fake, tmp_path, name, dtype, layout):
    """The same kernels in the same order with the same grids, for every op."""
    given = arguments(OPS[name], dtype, layout)
    if OPS[name].backends["cuda"].declines(*given):
        given = arguments(OPS[name], torch.float32, layout)
    assert_same_launches(OPS[name], given, fake, tmp_path)


def test_the_optimisers_launches_are_the_emulators(fake, tmp_path):
    several = lambda: [torch.ones(1 + index % 7 * 1000) for index in range(40)]
    steps = [torch.zeros(()) for _ in range(40)]
    numbers = adam.Numbers(0.1, 0.9, 0.99, 1e-8, 0.0, False, False)
    assert_same_launches(adam.op, (*(several() for _ in range(4)), steps, several(), numbers), fake, tmp_path)


def assert_same_launches(op, given, fake, tmp_path):
    assert op.backends["cuda"].declines(*given) == ""
    with testing.emulate("cuda") as record:
        op.backends["cuda"].run(*given)
        verbs = {False: "launch", True: "cooperate"}
        emulated = [(verbs[k.cooperative], stem(k.kernel), k.blocks, k.threads, k.shared) for k in record.launches]
        fake.reset()
        assert prepared(fake, tmp_path) == ""
        with _native.CUDA.emulated(shim.Launchers()):
            op.backends["cuda"].run(*given)
    launched = [(verb, stem(name), *map(int, sizes)) for verb, name, *sizes in fake.lines("launch", "cooperate")]
    assert launched == emulated and launched


def test_parameters_arrive_as_the_kernel_declares_them(cuda):
    x, dbias = torch.randn(4, 8, 5, 5), torch.zeros(8)
    cuda.watch("bias_act_dbias", 8, 4, 4, 8)  # const float*, int, int, float*
    workspace = torch.empty(1 << 16)
    shim.load().bias_act_backward(
        0,
        x.data_ptr(),
        x.data_ptr(),
        x.data_ptr(),
        dbias.data_ptr(),
        4,
        8,
        25,
        False,
        0,
        0.0,
        1.0,
        -1.0,
        workspace.data_ptr(),
        0,
    )
    (words,) = [w for w in cuda.lines("launch") if "dbias" in w[1]]
    partials, splits, channels, to = (int(word, 16) for word in words[5:])
    assert (partials, splits, channels, to) == (workspace.data_ptr(), 1, 8, dbias.data_ptr())


def test_shared_memory_beyond_48_kib_is_asked_for_once(cuda):
    for kib in (48, 64, 32, 64, 100):
        shim.load().launch_large(kib << 10)
    asked = [[name, int(which), int(size) >> 10] for _, name, which, size in cuda.lines("attribute")]
    assert asked == [["large_kernel", 8, 64], ["large_kernel", 8, 100]]  # 8: MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert [int(words[4]) >> 10 for words in cuda.lines("launch")] == [48, 64, 32, 64, 100]


def test_blocks_that_wait_for_each_other_are_launched_together(cuda):
    """bn_act in one pass: the counters of the teams are zeroed on the stream, then a cooperative launch."""
    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    mean, var = torch.randn(2, 16), torch.ones(2, 16)
    OPS["bn_act_backward"].backends["cuda"].run(x, x, None, None, mean, var, True, 1e-5, "relu", 0.0)
    zeroed, launched = cuda.lines("memset", "launch", "cooperate")
    assert zeroed == ["memset", "0", "8"] and launched[0] == "cooperate"  # two slices of 8 channels
    assert "resident_kernel<fg::cuda::BnResidentBackward<float>" in launched[1] and launched[2:] == ["4", "256", "1024"]
    for function in ("cuMemsetD8Async", "cuLaunchCooperativeKernel"):
        cuda.fail(function)
        with pytest.raises(RuntimeError, match=f"bn_act_backward: the kernel must launch, got {function}: a planted"):
            OPS["bn_act_backward"].backends["cuda"].run(x, x, None, None, mean, var, True, 1e-5, "relu", 0.0)


def test_a_thread_without_a_context_takes_that_of_device_0(cuda):
    run_bias_act()
    assert len(cuda.lines("retain")) <= 1  # the process's first launch


# ---- the cache -------------------------------------------------------------------------------------------------------


def run_bias_act():
    OPS["bias_act"].backends["cuda"].run(torch.ones(2, 8, 4, 4), None, "relu", 0.0, 1.0, -1.0)


def test_a_kernel_is_compiled_once_for_the_card(cuda):
    run_bias_act()
    run_bias_act()
    (compiled,) = cuda.lines("compile")
    assert compiled[2:] == ["--gpu-architecture=sm_90", "--std=c++20"]
    assert compiled[1] == "apply_rows_kernel<fg::cuda::BiasActForward<float>,_4>"
    assert len(cuda.lines("load")) == 1 and len(cuda.lines("launch")) == 2


def test_the_next_process_reads_it_from_disk(cuda, tmp_path):
    run_bias_act()
    cuda.reset()
    prepared(cuda, tmp_path)
    run_bias_act()
    assert not cuda.lines("compile") and len(cuda.lines("load")) == 1 and len(cuda.lines("launch")) == 1


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "another kernel's"])
def test_a_damaged_file_is_compiled_anew(cuda, tmp_path, damage):
    run_bias_act()
    (file,) = (tmp_path / "kernels").iterdir()
    whole = file.read_bytes()
    other = whole.replace(b"apply_rows", b"other_rows")
    file.write_bytes(
        {"truncated": whole[:-3], "empty": b"", "flipped": whole[:-1] + b"?", "another kernel's": other}[damage]
    )
    cuda.reset()
    prepared(cuda, tmp_path)
    run_bias_act()
    assert len(cuda.lines("compile")) == 1 and len(cuda.lines("launch")) == 1
    assert file.read_bytes() == whole  # and mended


def test_what_the_driver_refuses_is_compiled_anew(cuda, tmp_path):
    run_bias_act()
    (file,) = (tmp_path / "kernels").iterdir()
    whole = file.read_bytes()
    body = b"not:" + whole.split(b"\n", 2)[2][4:]
    hashed = 0xCBF29CE484222325
    for byte in body:
        hashed = (hashed ^ byte) * 0x100000001B3 % 2**64
    first, second, _ = whole.split(b"\n", 2)
    name, size, _ = second.split()
    file.write_bytes(b"\n".join([first, b" ".join([name, size, f"{hashed:016x}".encode()]), body]))
    prepared(cuda, tmp_path)
    cuda.reset()
    run_bias_act()
    assert len(cuda.lines("load")) == 2 and len(cuda.lines("compile")) == 1 and file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_a_compilation(cuda, tmp_path):
    (tmp_path / "a file").write_text("")
    assert shim.load().prepare([cuda.path], [cuda.path], str(tmp_path / "a file" / "kernels")) == ""
    run_bias_act()
    assert len(cuda.lines("compile")) == 1 and len(cuda.lines("launch")) == 1


def test_threads_that_come_together_compile_once(cuda):
    threads = [threading.Thread(target=run_bias_act) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cuda.lines("compile")) == 1 and len(cuda.lines("launch")) == 4


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("nvrtcCompileProgram", r"NVRTC must compile apply_rows.* for sm_90, got: the compiler's own words"),
        ("cuModuleLoadData", "cuModuleLoadData: a planted error"),
        ("cuLaunchKernel", "cuLaunchKernel: a planted error"),
    ],
)
def test_errors_name_the_op(cuda, tmp_path, function, says):
    cuda.fail(function)
    with pytest.raises(RuntimeError, match=f"bias_act_forward: the kernel must launch, got {says}"):
        run_bias_act()
    cuda.reset()
    run_bias_act()  # the next launch is unharmed
    assert len(cuda.lines("launch")) == 1


def test_libraries_that_do_not_load_are_named(fake, tmp_path):
    module = shim.load()
    assert re.match(r"the CUDA driver does not load \(.*libnone.so", module.prepare(["libnone.so"], [fake.path], "x"))
    assert re.match(r"NVRTC does not load \(.*libnone.so", module.prepare([fake.path], ["libnone.so"], "x"))
    with pytest.raises(RuntimeError, match="prepare"), testing.emulate("cuda"), _native.CUDA.emulated(shim.Launchers()):
        run_bias_act()


def test_a_pytorch_without_cuda_says_so(tmp_path):
    if torch.version.cuda is None:
        assert _nvrtc.prepare(None, tmp_path) == "this PyTorch is built without CUDA"
    assert list(_nvrtc.compilers(12))[-1] == "libnvrtc.so.12"


# ---- the compiler itself ---------------------------------------------------------------------------------------------


def real_compiler():
    for major in (13, 12):
        yield from _nvrtc.compilers(major)


def kernels():
    """(includes, name) of the launchers' kernels: without the test's own."""
    return sorted((includes, name) for includes, name in shim.load().kernels() if name != "large_kernel")


def all_kernels():
    """Includes -> the kernels that are compiled with exactly these."""
    found = defaultdict(list)
    for includes, name in kernels():
        found[includes].append(name)
    return found.values()


@pytest.fixture
def compiler(fake, tmp_path):
    """The launchers with NVIDIA's NVRTC."""
    said = shim.load().prepare([fake.path], list(real_compiler()), str(tmp_path))
    if said:
        pytest.skip(f"{said}; pip install 'fastgan[nvrtc]'")
    return shim.load()


@pytest.mark.parametrize("capability", [80, 90])
def test_nvrtc_compiles_a_kernel_of_every_kind(compiler, capability):
    """Of each template and each function one, in bfloat16 where there is a choice, with no header but our own."""
    for names in all_kernels():
        kinds = {}
        for name in sorted(names, key=lambda n: "__nv_bfloat16" not in n):
            kinds.setdefault(name.partition("<")[0], name)
        code, lowered = compiler.compile(list(kinds.values()), capability)
        assert code[:4] == b"\x7fELF" and all(one.encode() in code for one in lowered)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 80, 90])
def test_nvrtc_compiles_every_kernel(compiler, capability):
    for names in all_kernels():
        code, lowered = compiler.compile(names, capability)
        assert all(one.encode() in code for one in lowered)


def test_a_card_that_nvrtc_does_not_know_takes_ptx(compiler):
    code, _ = compiler.compile(["bias_act_dbias_kernel"], 999)
    assert b".target sm_" in code


def test_every_kernel_has_one_name(fake):
    names = [name for _, name in kernels()]
    assert len(names) == len(set(names)) > 200
    assert all(re.fullmatch(r"\w+(<.*>)?", name) for name in names)


def test_a_kernel_is_compiled_with_the_headers_that_its_name_asks_for(fake):
    """Every word of a kernel's expression is defined in a header that it includes, and no header comes for nothing."""
    defined = {
        path.name: set(re.findall(r"^struct (\w+)[^;]*?{", text, re.MULTILINE))
        | set(re.findall(r"(\w+_kernel)\(", text))
        for path in sorted((shim.shim.CSRC / "cuda").glob("*.cuh"))
        for text in [path.read_text()]
    }
    known = {"float", "__half", "__nv_bfloat16", "fg", "cuda", "true", "false"}
    for includes, name in kernels():
        words = set(re.findall(r"\b[A-Za-z_]\w*", name)) - known
        headers = re.findall(r'^#include "cuda/(.*)"$', includes, re.MULTILINE)
        assert len(headers) == includes.count("\n") and headers == sorted(set(headers))
        assert all(words & defined[header] for header in headers), (name, headers)
        assert words <= set().union(*(defined[header] for header in headers)), (name, headers)


def test_the_product_names_the_kernels_that_are_tested(fake):
    """Its launchers are one unit, the tests' a unit each."""
    native = pytest.importorskip("fastgan._C", reason="fastgan is installed without its native core").cuda
    if not hasattr(native, "kernels"):
        pytest.skip("this installation's CUDA kernels are nvcc's")
    assert sorted(map(tuple, native.kernels())) == kernels()
