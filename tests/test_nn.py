import copy
import io
import pickle

import pytest
import torch
from checks import BACKENDS, distance
from torch import nn

import fastgan
from fastgan.training.step import mixes_samples

X = (4, 6, 9, 7)
BLOCKS = [
    (fastgan.nn.Conv2dBNAct, nn.Conv2d, (6, 8, 3), dict(stride=2, padding=1)),
    (fastgan.nn.Conv2dBNAct, nn.Conv2d, (6, 8, (3, 2)), dict(groups=2, bias=False, dilation=2)),
    (fastgan.nn.Conv2dBNAct, nn.Conv2d, (6, 8, 3), dict(padding=1, padding_mode="reflect")),
    (fastgan.nn.Conv2dBNAct, nn.Conv2d, (6, 8, 3), dict(padding="same")),
    (fastgan.nn.ConvTranspose2dBNAct, nn.ConvTranspose2d, (6, 8, 4), dict(stride=2, padding=1)),
    (
        fastgan.nn.ConvTranspose2dBNAct,
        nn.ConvTranspose2d,
        (6, 4, 3),
        dict(stride=2, output_padding=1, groups=2, bias=False),
    ),
    (fastgan.nn.Conv2dBiasAct, nn.Conv2d, (6, 8, 5), dict(stride=2, padding=2)),
    (
        fastgan.nn.ConvTranspose2dBiasAct,
        nn.ConvTranspose2d,
        (6, 3, 5),
        dict(stride=2, padding=2, output_padding=1),
    ),
]


def pair(case, activation="leaky_relu", **norm):
    """Our block and the torch modules that it replaces, with equal parameters."""
    ours_class, conv_class, args, kwargs = case
    ours = ours_class(*args, **kwargs, activation=activation, **norm)
    conv = conv_class(*args, **kwargs)
    conv.load_state_dict(ours.conv.state_dict())
    layers = [conv]
    if hasattr(ours, "bn"):
        layers.append(nn.BatchNorm2d(conv.out_channels, **norm))
        layers[-1].load_state_dict(ours.bn.state_dict())
    layers.append(
        {"leaky_relu": nn.LeakyReLU(0.2), "relu": nn.ReLU(), None: nn.Identity(), "tanh": nn.Tanh()}[activation]
    )
    return ours, nn.Sequential(*layers)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["leaky_relu", "relu", None])
@pytest.mark.parametrize("case", BLOCKS, ids=lambda c: f"{c[0].__name__}-{c[3]}")
def test_blocks_equal_torch_in_train_and_eval(case, activation, backend):
    ours, theirs = pair(case, activation)
    with fastgan.backend(backend):
        for training in (True, True, False):
            ours.train(training), theirs.train(training)
            x = torch.randn(X)
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            ya, yb = ours(a), theirs(b)
            dy = torch.randn_like(yb)
            ga = torch.autograd.grad(ya, [a, *ours.parameters()], dy)
            gb = torch.autograd.grad(yb, [b, *theirs.parameters()], dy)
            assert distance(ya, yb) < 1e-5
            for g, (name, _), h in zip(ga, [("x", 0), *ours.named_parameters()], gb, strict=True):
                # a bias before a training norm has a gradient of zero: compare with the weight's size
                scale = 1e-4 * max(v.norm() for v in gb) if name == "conv.bias" else 1e-4 * h.norm() + 1e-6
                assert (g - h).norm() <= scale, name
        for p, q in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_bookkeeping_equals_torch(momentum, track, affine):
    ours = fastgan.nn.BatchNormAct2d(5, momentum=momentum, affine=affine, track_running_stats=track, activation=None)
    theirs = nn.BatchNorm2d(5, momentum=momentum, affine=affine, track_running_stats=track)
    for training in (True, False, True, True, False):
        ours.train(training), theirs.train(training)
        x = torch.randn(4, 5, 3, 3) * 2 + 1
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_stat_groups_equal_two_passes(momentum):
    ours = fastgan.nn.BatchNormAct2d(5, momentum=momentum, activation="relu")
    theirs = nn.BatchNorm2d(5, momentum=momentum)
    for _ in range(3):
        x = torch.randn(8, 5, 3, 3)
        with fastgan.nn.stat_groups(ours, 2):
            y = ours(x)
        want = torch.cat([theirs(h).relu() for h in x.chunk(2)])
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    assert ours.stat_groups == 1 and ours.num_batches_tracked == 6
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_linear_block_and_1d():
    ours = fastgan.nn.LinearBNAct(7, 5, activation="relu")
    theirs = nn.Sequential(ours.linear, nn.BatchNorm1d(5), nn.ReLU())
    x = torch.randn(6, 7)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    norm = fastgan.nn.BatchNormAct1d(5)
    assert norm(torch.randn(3, 5)).shape == (3, 5) and norm(torch.randn(3, 5, 4)).shape == (3, 5, 4)
    with pytest.raises(ValueError, match="expected 4D input"):
        fastgan.nn.BatchNormAct2d(5)(torch.randn(3, 5))


PER_SAMPLE_NORMS = [
    (fastgan.nn.GroupNormAct, nn.GroupNorm, (3, 6), {}),
    (fastgan.nn.GroupNormAct, nn.GroupNorm, (2, 6, 1e-3, False), {}),
    (fastgan.nn.InstanceNormAct2d, nn.InstanceNorm2d, (6,), {}),
    (fastgan.nn.InstanceNormAct2d, nn.InstanceNorm2d, (6,), dict(affine=True, track_running_stats=True, momentum=0.3)),
    (fastgan.nn.InstanceNormAct2d, nn.InstanceNorm2d, (6, 1e-3, None, True, True), {}),
    (fastgan.nn.LayerNormAct, nn.LayerNorm, ((6, 9, 7),), {}),
    (fastgan.nn.LayerNormAct, nn.LayerNorm, (7, 1e-3), dict(bias=False)),
    (fastgan.nn.LayerNormAct, nn.LayerNorm, ([9, 7],), dict(elementwise_affine=False)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", PER_SAMPLE_NORMS, ids=lambda c: f"{c[0].__name__}-{c[2]}-{c[3]}")
def test_per_sample_norms_equal_torch_in_train_and_eval(case, backend):
    ours_class, theirs_class, args, kwargs = case
    ours, theirs = ours_class(*args, **kwargs, activation="relu"), theirs_class(*args, **kwargs)
    for p in ours.parameters():
        nn.init.normal_(p)
    theirs.load_state_dict(ours.state_dict())
    assert "activation=relu" in repr(ours) and isinstance(ours, theirs_class)
    for training in (True, True, False):
        ours.train(training), theirs.train(training)
        x = torch.randn(X)
        with fastgan.backend(backend):
            torch.testing.assert_close(ours(x), theirs(x).relu(), rtol=1e-4, atol=1e-5)
            if theirs_class is nn.InstanceNorm2d:
                torch.testing.assert_close(ours(x[0]), theirs(x[0]).relu(), rtol=1e-4, atol=1e-5)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert torch.equal(copy.deepcopy(ours).eval()(x), ours(x))


def test_per_sample_norms_count_as_per_sample():
    per_sample = [c[0](*c[2], **c[3]) for c in PER_SAMPLE_NORMS]
    tracks = ["running statistics" in mixes_samples(m) for m in per_sample]
    assert tracks == [False, False, False, True, True, False, False, False]
    assert all(mixes_samples(m) == "" for m, t in zip(per_sample, tracks, strict=True) if not t)


@pytest.mark.parametrize("old", [False, True], ids=["parametrization", "hook"])
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.spectral_norm.*:FutureWarning")
def test_spectral_norm_on_the_inner_convolution(old):
    ours, theirs = pair(BLOCKS[6])
    wrap = torch.nn.utils.spectral_norm if old else torch.nn.utils.parametrizations.spectral_norm
    torch.manual_seed(1)
    wrap(ours.conv)
    torch.manual_seed(1)
    wrap(theirs[0])
    for _ in range(3):
        x = torch.randn(X)
        assert distance(ours(x).detach(), theirs(x).detach()) < 1e-5


def test_copy_pickle_repr_device_dtype():
    block = fastgan.nn.ConvTranspose2dBNAct(3, 4, 4, 2, 1, device="cpu", dtype=torch.float64, negative_slope=0.1)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    block.eval()
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        torch.testing.assert_close(twin(x), block(x))
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    block.load_state_dict(torch.load(file, weights_only=True))
    assert block.conv.weight.dtype == block.bn.weight.dtype == torch.float64
    assert "activation=leaky_relu, negative_slope=0.1" in repr(block)
    assert fastgan.nn.Conv2dBNAct(3, 4, 3, device="meta").conv.weight.is_meta


def test_hooks_on_inner_modules_run():
    block = fastgan.nn.Conv2dBNAct(6, 8, 3)
    seen = []
    block.conv.register_forward_hook(lambda m, i, o: seen.append("conv"))
    block.bn.register_forward_hook(lambda m, i, o: seen.append("bn"))
    block(torch.randn(X))
    assert seen == ["conv", "bn"]


def test_module_compiles_whole_in_training():
    block = fastgan.nn.Conv2dBNAct(6, 8, 3, stride=2, padding=1)
    twin = copy.deepcopy(block)
    x = torch.randn(X)
    y = torch.compile(twin, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, block(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(twin.bn.running_var, block.bn.running_var, rtol=1e-4, atol=1e-5)


def test_bad_arguments_are_one_sentence():
    with pytest.raises(ValueError, match="Conv2dBNAct: activation must be None or one of"):
        fastgan.nn.Conv2dBNAct(3, 4, 3, activation="gelu")
    with pytest.raises(ValueError, match="negative_slope must be >= 0"):
        fastgan.nn.Conv2dBiasAct(3, 4, 3, negative_slope=-0.1)
    with pytest.raises(ValueError, match="GroupNormAct: activation must be None or one of"):
        fastgan.nn.GroupNormAct(1, 4, activation="tanh")
    with pytest.raises(ValueError, match=r"in_act: x must be \[N, C, H, W\] or \[C, H, W\]"):
        fastgan.nn.InstanceNormAct2d(4)(torch.randn(3, 4))


@pytest.mark.parametrize("size", [8, 2], ids=["folded", "normed"])  # at 2 x 2 pixels folding does not pay
@pytest.mark.parametrize("op", ["conv2d_bn_act", "conv_transpose2d_bn_act"])
def test_an_image_without_a_batch_dimension_is_a_batch_of_one(op, size):
    """Output height equals the channels here, so a norm over the wrong dimension would raise nothing."""
    function = getattr(fastgan.functional, op)
    x, weight = torch.randn(4, size, size), torch.randn((size, 4, 3, 3) if op == "conv2d_bn_act" else (4, size, 3, 3))
    bn_weight, bn_bias, mean = torch.randn(3, size)
    for training in (False, True):
        stats = [{"running_mean": mean.clone(), "running_var": torch.arange(1.0, size + 1)} for _ in range(2)]
        rest = dict(padding=1, bn_weight=bn_weight, bn_bias=bn_bias, training=training)
        ours = function(x, weight, **rest, **stats[0])
        theirs = function(x[None], weight, **rest, **stats[1])[0]
        assert ours.shape == theirs.shape == (size, size, size)
        assert distance(ours, theirs) < 1e-6
        assert all(torch.equal(stats[0][name], stats[1][name]) for name in stats[0])


def test_a_block_refuses_an_image_without_a_batch_dimension_as_torch_does():
    block = fastgan.nn.Conv2dBNAct(3, 8, 3, padding=1)
    for training in (True, False):
        with pytest.raises(ValueError, match="expected 4D input"):
            block.train(training)(torch.randn(3, 8, 8))
