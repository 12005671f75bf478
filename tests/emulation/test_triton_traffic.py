"""What the Triton kernels move, counted by the checker, is what the cards say: unique bytes within 10 % of `cost`."""

import pytest
import torch

pytest.importorskip("triton", "3.8", reason="triton 3.8 or newer is needed to emulate Triton kernels")
from checks import LAYOUTS

import fastgan
from fastgan import testing
from fastgan._op import OPS
from fastgan.ops.filtered_lrelu import adjoint_pads

N, C, H, W = 4, 32, 12, 12  # 18,432 elements: partial sums are small beside them, as in real layers


def images(n=1, dtype=torch.bfloat16, layout=torch.channels_last):
    return [torch.randn(N, C, H, W).to(dtype).contiguous(memory_format=layout) for _ in range(n)]


def vectors(*sizes):
    return [torch.rand(s) + 0.5 for s in sizes]


def launches(name, *args):
    with testing.emulate("triton") as record:
        OPS[name](*args)
    return record.launches


def moved(launches):
    return sum(launch.unique_loaded + launch.unique_stored for launch in launches)


def close(got, want):
    return abs(got - want) <= 0.1 * want


ELEMENTWISE = {
    "bias_act": lambda x: (x, *vectors(C), "tanh", 0.0, 1.4, 1.0),
    "bias_act_backward": lambda x: (x, x.clone(), "leaky_relu", 0.2, 1.4, 1.0, True),
    "interpolate": lambda x: (x, x.clone(), *vectors(N), None),
    "sample_dot": lambda x: (x, x.clone()),
    "grad_norm_penalty": lambda x: (x, 1.0),
    "grad_norm_penalty_backward": lambda x: (vectors(N)[0], x, *vectors(N), 1.0),
}


def cost_of(name, *args):
    """The card's bytes: `cost`, `cost_backward` or `cost_double_backward` of the op's file."""
    stem = name.removesuffix("_double_backward").removesuffix("_backward")
    return getattr(getattr(fastgan.ops, stem), "cost" + name.removeprefix(stem))(*args)["bytes"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_one_pass_ops_move_what_the_card_says(name, dtype, layout):
    (x,) = images(dtype=dtype, layout=layout)
    ran = launches(name, *ELEMENTWISE[name](x))
    assert close(moved(ran), cost_of(name, x))
    assert sum(launch.sectors for launch in ran) <= 1.1 * sum(launch.ideal_sectors for launch in ran)


@pytest.mark.parametrize("name", ["gan_loss", "gan_loss_backward", "gan_loss_double_backward"])
def test_the_loss_reads_each_logit_once(name):
    f, r = torch.randn(4, 1, 30, 30), torch.randn(4, 1, 30, 30)
    ahead = {"_backward": [torch.ones(())], "_double_backward": [f.clone(), r.clone(), torch.ones(())]}
    behind = [True] if name == "gan_loss" else []
    ran = launches(name, *ahead.get(name.removeprefix("gan_loss"), []), f, r, "bce", "d", 0.0, *behind)
    assert len(ran) == 1 and close(moved(ran), cost_of(name, f, r))


NORMS = {
    "bn_act": lambda x: (x, *vectors(C, C), None, None, True, 1e-5, "leaky_relu", 0.2, 2),
    "bn_act_backward": lambda x: (x, x.clone(), *vectors(C, C, (2, C), (2, C)), True, 1e-5, "relu", 0.0),
    "bn_act_double_backward": lambda x: (
        x,
        x.clone(),
        *vectors(C, C),
        x.clone(),
        *vectors(C, C, (2, C), (2, C)),
        True,
        1e-5,
        "relu",
        0.0,
    ),
    "gn_act": lambda x: (x, *vectors(C, C), 2, 1e-5, "leaky_relu", 0.2),
    "gn_act_backward": lambda x: (x, x.clone(), *vectors(C, C, (N, 2), (N, 2)), 1e-5, "relu", 0.0),
    "gn_act_double_backward": lambda x: (
        x,
        x.clone(),
        *vectors(C, C),
        x.clone(),
        *vectors(C, C, (N, 2), (N, 2)),
        1e-5,
        "relu",
        0.0,
    ),
}
ACCESSES = {"": (2, 3), "_backward": (3, 5), "_double_backward": (5, 8)}  # (resident, streamed)


@pytest.mark.parametrize("route", ["resident", "streamed"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", NORMS)
def test_norms_move_their_accesses(name, layout, route, monkeypatch):
    """Resident and streamed kernels each make the number of accesses an element that the card's Traffic line has."""
    from fastgan.kernels import normalisation

    if route == "streamed":
        monkeypatch.setattr(normalisation, "RESIDENT", 1)
    (x,) = images(dtype=torch.float32, layout=layout)  # float32: partial sums weigh half of what they do beside bf16
    ran = launches(name, *NORMS[name](x))
    assert (route == "resident") == any(launch.kernel.startswith("resident") for launch in ran)
    accesses = ACCESSES[name.removeprefix(name[:6])][route == "streamed"]
    large = [launch for launch in ran if "merge" not in launch.kernel and "column" not in launch.kernel]
    assert close(moved(large), accesses * x.numel() * x.element_size())
    assert moved(ran) - moved(large) < 0.1 * moved(large)
    if cost_of(name, x) == accesses * x.numel() * x.element_size():
        assert close(moved(ran), cost_of(name, x))
    assert sum(launch.sectors for launch in ran) <= 1.1 * sum(launch.ideal_sectors for launch in ran)


def test_eval_mode_makes_two_accesses():
    (x,) = images(dtype=torch.float32)
    ran = launches("bn_act", x, *vectors(C, C, C, C), False, 1e-5, "relu", 0.0, 1)
    assert [launch.kernel for launch in ran] == ["norm_act_kernel"] and close(moved(ran), 2 * 4 * x.numel())


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("up", "down"), [(2, 1), (1, 2)])
def test_upfirdn2d_moves_each_tensor_once(up, down, layout):
    (x,) = images(dtype=torch.float32, layout=layout)
    args = x, torch.rand(4, 4), [up, up], [down, down], [2, 1, 2, 1]
    assert close(moved(launches("upfirdn2d", *args, False, 1.0)), cost_of("upfirdn2d", *args))


def test_filtered_lrelu_moves_x_y_and_the_signs_once():
    """The upsampled image stays in registers: x of [1, 1, 36, 36], 82 x 82 of it, in 4 x 2 tiles."""
    x, f = torch.randn(1, 1, 36, 36), torch.rand(12)
    args = f, f, 2, 2, [11, 10, 11, 10]
    pads = adjoint_pads((36, 36), (82, 82), (36, 36), (f, f), 2, 2, args[-1], [0] * 4)
    ran = launches("filtered_lrelu", x, None, *args, False, 1.4, 0.2, 0.9)
    assert len(ran) == 1 and close(moved(ran), cost_of("filtered_lrelu", x, *args, 0.9))
    signs = OPS["filtered_lrelu"].reference(x, None, *args, False, 1.4, 0.2, 0.9)[1]
    back = launches("filtered_lrelu_backward", x, signs, f, f, 2, 2, *pads, True, 5.6, 0.2, 0.9, None)
    assert len(back) == 1 and close(moved(back), cost_of("filtered_lrelu", x, *args, 0.9))
