"""Every op's Triton kernels on a real GPU: values, derivatives, races, proofs, graphs; skipped where there is none.

The comparisons are those of the emulated tests; float32 runs at full precision, so that PyTorch's own error can judge.
"""

import pytest
import test_conv2d
import test_conv_transpose2d
import torch
from checks import LAYOUTS, assert_close, distance, leaves, orders
from test_op import flat, gradients, sample

import fastgan
from fastgan import functional
from fastgan._op import OPS
from fastgan.choice import STATE, proof_error, refusal, winners
from fastgan.choice.proof import TOLERANCE
from fastgan.doctor import prove_all

pytestmark = pytest.mark.gpu
GPU = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRITON = [name for name, op in OPS.items() if "triton" in op.backends]


@pytest.fixture(autouse=True)
def full_precision():
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def on_gpu(args, dtype, layout, op):
    """An op's sample there; ops of mixed types ("first") keep their per-channel vectors in float32."""

    def move(a):
        if not isinstance(a, torch.Tensor):
            return a
        kept = op.autocast == "first" and a.dim() < 4
        moved = a.detach().to(GPU, a.dtype if kept else dtype)
        moved = moved.contiguous(memory_format=layout) if a.dim() == 4 else moved
        return moved.requires_grad_(a.requires_grad)

    return tuple(move(a) for a in args)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TRITON)
def test_every_op_and_its_gradient_equal_the_reference(name, dtype, layout):
    op = OPS[name]
    args = on_gpu(sample(name), dtype, layout, op)
    assert not refusal(STATE, op, "triton", args)
    wide = tuple(
        a.detach().double().cpu().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args
    )
    with fastgan.backend("triton"):
        got = op(*args)
        on_cpu = tuple(o.cpu() for o in flat(got))
        found = gradients(on_cpu, args) if any(o.requires_grad for o in on_cpu) else []
    with fastgan.backend("reference"):
        want = op(*wide)
        expected = gradients(want, wide) if found else []
    for g, w in zip([*flat(got), *found], [*flat(want), *expected], strict=True):
        assert distance(g.detach().cpu(), w.detach()) <= TOLERANCE[dtype], name


LAYERS = [(128, 64, 32, 32), (64, 512, 4, 4), (33, 65, 17, 15), (2, 3, 257, 129)]


def per_channel(*groups):
    return torch.rand(*groups) + 0.5


def layers(x):
    """Arguments of every memory-bound op for activations x [N, C, H, W]."""
    n, c = x.shape[:2]
    norm_groups = 1 if c % 5 else 5
    bn = (per_channel(c), per_channel(c), per_channel(1, c), per_channel(1, c), True, 1e-5, "leaky_relu", 0.2)
    gn = (per_channel(c), per_channel(c), per_channel(n, norm_groups), per_channel(n, norm_groups), 1e-5, "relu", 0.0)
    return {
        "bias_act": (x, per_channel(c), "tanh", 0.0, 1.4, 0.9),
        "bias_act_backward": (x, x, "leaky_relu", 0.2, 1.4, 2.0, True),
        "bn_act": (x, per_channel(c), per_channel(c), None, None, True, 1e-5, "leaky_relu", 0.2, 1),
        "bn_act_backward": (x, x, *bn),
        "bn_act_double_backward": (x, x, per_channel(c), per_channel(c), x, *bn),
        "gn_act": (x, per_channel(c), per_channel(c), norm_groups, 1e-5, "relu", 0.0),
        "gn_act_backward": (x, x, *gn),
        "gn_act_double_backward": (x, x, per_channel(c), per_channel(c), x, *gn),
        "gan_loss": (x, x, "bce", "d", 0.1, True),
        "gan_loss_backward": (torch.ones((), dtype=x.dtype), x, x, "hinge", "d", 0.0),
        "gan_loss_double_backward": (x, x, torch.ones((), dtype=x.dtype), x, x, "bce", "d", 0.1),
        "sample_dot": (x, x),
        "upfirdn2d": (x, torch.randn(4, 3), [2, 1], [1, 2], [2, 1, 1, 1], False, 1.5),
        "filtered_lrelu": (x, per_channel(c), *[torch.rand(12) / 6] * 2, 2, 2, [10, 11] * 2, False, 1.4, 0.2, 0.9),
        "interpolate": (x, x, torch.rand(n), None),
        "grad_norm_penalty": (x, 1.0),
        "grad_norm_penalty_backward": (per_channel(n), x, per_channel(n), 1.0),
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LAYERS, ids=str)
@pytest.mark.parametrize("name", layers(torch.zeros(1, 1, 1, 1)))
def test_a_layer_equals_the_reference(name, shape, dtype, layout):
    x = torch.empty(shape, dtype=dtype, device=GPU, memory_format=layout)
    args = tuple(a.to(GPU) if isinstance(a, torch.Tensor) else a for a in layers(x)[name])
    declined = refusal(OPS[name], "triton", args)
    if declined:
        pytest.skip(declined)
    assert proof_error(OPS[name], "triton", OPS[name].drawn(args)) == ""


CONVOLUTIONS = [(test_conv2d, shape) for shape in test_conv2d.SAMPLES]
CONVOLUTIONS += [(test_conv_transpose2d, shape) for shape in test_conv_transpose2d.SAMPLES]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda case: f"{case[0].__name__}{case[1]}")
def test_convolutions_to_second_order(case, dtype, layout):
    module, shape = case
    inputs = module.inputs(shape)
    rounded = [None if t is None else t.to(dtype).double() for t in inputs]
    there = lambda: [None if t is None else t.to(GPU) for t in rounded]
    want = orders(module.plain(shape), leaves(rounded, torch.float64, LAYOUTS[0]))
    theirs = orders(module.plain(shape), leaves(there(), dtype, layout))
    with fastgan.backend("triton"):
        got = orders(module.ours(shape), leaves(there(), dtype, layout))
    for i, (g, w, t) in enumerate(zip(got, want, theirs, strict=True)):
        assert_close(g.cpu(), w, dtype, distance(t.cpu(), w), f"result {i}")


def layer(dtype=torch.bfloat16):
    x = torch.randn(32, 64, 32, 32, device=GPU, dtype=dtype).contiguous(memory_format=torch.channels_last)
    w = torch.randn(128, 64, 4, 4, device=GPU, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(), w.requires_grad_()


def test_results_are_the_same_at_every_run():
    x, w = layer()
    with fastgan.backend("triton"):
        runs = [torch.autograd.grad(functional.conv2d(x, w, None, 2, 1).square().sum(), (x, w)) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_a_race_is_run_once_and_kept():
    x, w = layer()
    functional.conv2d(x, w, None, 2, 1)
    known = dict(winners())
    functional.conv2d(x, w, None, 2, 1)
    assert known and winners() == known


def test_a_captured_graph_replays_the_kernels():
    x, w = layer()
    with fastgan.backend("triton"), torch.no_grad():
        functional.conv2d(x, w, None, 2, 1)  # proved, raced and compiled before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = functional.conv2d(x, w, None, 2, 1)
        x.copy_(torch.randn_like(x))
        graph.replay()
    assert distance(y.cpu(), torch.nn.functional.conv2d(x.double(), w.double(), None, 2, 1).detach().cpu()) < 1e-2


def test_offsets_past_32_bits():
    if torch.cuda.get_device_properties(0).total_memory < 24e9:
        pytest.skip("needs a GPU with 24 GB: the tensors hold 2^31 elements")
    shape = 2**31 // 2**15 + 8, 32, 32, 32
    x = torch.empty(shape, device=GPU, dtype=torch.bfloat16, memory_format=LAYOUTS[1]).normal_()
    w = torch.randn(16, 32, 2, 2, device=GPU, dtype=torch.bfloat16)
    with fastgan.backend("triton"), torch.no_grad():
        y = OPS["conv2d"].backends["triton"].run(x, w, None, [2, 2], [0, 0], [1, 1], 1, "identity", 0.0)
    want = torch.nn.functional.conv2d(x[-8:].double(), w.double(), None, 2)
    assert distance(y[-8:].cpu(), want.cpu()) < 1e-2


def test_doctor_proves_every_kernel():
    rows = [row for row in prove_all() if row["backend"] == "triton"]
    assert {row["op"] for row in rows} == set(TRITON)
    assert not [row for row in rows if row["error"]]
