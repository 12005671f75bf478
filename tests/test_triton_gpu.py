"""The Triton kernels on a real card: every op that has one against its reference, from examples to whole layers."""

import pytest
import torch

import fastgan
from fastgan._op import OPS
from fastgan.backends import _random, missing, proof_error, prove_all, refusal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(missing("triton")), reason=f"no Triton backend here: {missing('triton')}"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
SHAPES = [(128, 64, 32, 32), (64, 512, 4, 4), (33, 65, 17, 15), (2, 3, 257, 129)]


def channels(*groups):
    return torch.rand(*groups) + 0.5


def cases(x):
    """Arguments of every memory-bound op for activations x [N, C, H, W]."""
    n, c = x.shape[:2]
    norm_groups = 1 if c % 5 else 5
    bn = (channels(c), channels(c), channels(1, c), channels(1, c), True, 1e-5, "leaky_relu", 0.2)
    gn = (channels(c), channels(c), channels(n, norm_groups), channels(n, norm_groups), 1e-5, "relu", 0.0)
    return {
        "bias_act": (x, channels(c), "tanh", 0.0),
        "bias_act_backward": (x, x, "leaky_relu", 0.2, True),
        "bn_act": (x, channels(c), channels(c), None, None, True, 1e-5, "leaky_relu", 0.2, 1),
        "bn_act_backward": (x, x, *bn),
        "bn_act_double_backward": (x, x, channels(c), channels(c), x, *bn),
        "gn_act": (x, channels(c), channels(c), norm_groups, 1e-5, "relu", 0.0),
        "gn_act_backward": (x, x, *gn),
        "gn_act_double_backward": (x, x, channels(c), channels(c), x, *gn),
        "gan_loss": (x, x, "bce", "d", 0.1),
        "gan_loss_backward": (torch.ones((), dtype=x.dtype), x, x, "hinge", "d", 0.0),
        "interpolate": (x, x, torch.rand(n)),
        "grad_norm_penalty": (x, 1.0),
        "grad_norm_penalty_backward": (channels(n), x, channels(n), 1.0),
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", cases(torch.zeros(1, 1, 1, 1)))
def test_a_layer_equals_the_reference(name, shape, dtype, layout):
    x = torch.empty(shape, dtype=dtype, device="cuda", memory_format=layout)
    args = tuple(a.cuda() if isinstance(a, torch.Tensor) else a for a in cases(x)[name])
    declined = refusal(OPS[name], "triton", args)
    if declined:
        pytest.skip(declined)
    assert proof_error(OPS[name], "triton", _random(OPS[name], args)) == ""


def test_every_example_of_every_op_proves_itself():
    rows = [row for row in prove_all() if row["backend"] == "triton"]
    assert rows and [row for row in rows if row["error"]] == []


@pytest.mark.parametrize("name", ["bn_act", "bias_act", "gn_act"])
def test_first_use_proves_and_captures(name):
    """A case runs on Triton after its proof, in a CUDA graph too, and gives there what it gives outside."""
    x = torch.randn(16, 32, 16, 16, device="cuda")
    args = tuple(a.cuda() if isinstance(a, torch.Tensor) else a for a in cases(x)[name])
    with fastgan.backend("triton"), torch.no_grad():
        want = OPS[name](*args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = OPS[name](*args)
        graph.replay()
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
    assert all(torch.equal(g, w) for g, w in pairs)
