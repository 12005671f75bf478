"""fastgan.freeze: eval mode's numbers, from weights that are folded and packed once."""

import concurrent.futures
import copy
import pickle
import sys

import handwritten
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import fastgan
from fastgan import _native
from fastgan.program.layer import are_constant
from fastgan.program.run import MAX_KEPT

native = pytest.mark.skipif(not fastgan.backends()["conv2d"]["native"][0], reason="fastgan._C is not built here")


@pytest.fixture(autouse=True)
def _no_race():
    with fastgan.racing(False):
        yield


def settled(network: nn.Module, *inputs: torch.Tensor) -> nn.Module:
    """In eval mode, with running statistics and affine parameters that are not those of a new norm."""
    with torch.no_grad():
        for m in network.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.5, 2)
                m.weight.uniform_(0.5, 2)
                m.bias.normal_(0, 0.3)
        network(*inputs)
    return network.eval()


def generator() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.ConvTranspose2d(12, 48, 4), nn.BatchNorm2d(48), nn.ReLU()]
    layers += [nn.ConvTranspose2d(48, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.LeakyReLU(0.2)]
    layers += [nn.Conv2d(32, 32, 3, padding=1, groups=4), nn.BatchNorm2d(32), nn.ReLU()]
    layers += [nn.ConvTranspose2d(32, 16, 4, 2, 1, groups=2), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh())


def networks():
    torch.manual_seed(0)
    image, z = torch.randn(2, 3, 16, 16), torch.randn(2, 12, 1, 1)
    yield "chain", generator(), z
    yield "channels_last", generator().to(memory_format=torch.channels_last), z
    mlp = nn.Sequential(nn.Linear(12, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 48), nn.Tanh())
    yield "mlp", mlp, z.flatten(1)
    wide = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))
    yield "minimal", wide, torch.randn(8, 3, 32, 32)
    yield "spectral", nn.Sequential(spectral_norm(nn.Conv2d(3, 32, 3)), nn.LeakyReLU(0.2), nn.Conv2d(32, 8, 3)), image
    for old in ("weight_norm", "spectral_norm"):
        yield old, nn.Sequential(handwritten.old(old, nn.Conv2d(3, 32, 3)), nn.LeakyReLU(0.2)), image
    yield "hand-written", handwritten.UNet(), image


NAMES = [name for name, _, _ in networks()]


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A new network and its input."""
    return next((network, x) for its, network, x in networks() if its == name)


def far(y, want):
    return ((y - want).norm() / want.norm()).item()


@native
@pytest.mark.parametrize("name", NAMES)
def test_eval_numbers_at_every_call(name):
    network, x = made(name)
    settled(network, x)
    frozen = fastgan.freeze(network)
    for part in (x[:1], x, x[:1]):
        with torch.no_grad():
            want = network(part)
        first, second = frozen(part), frozen(part)
        assert far(first, want) < 2e-6 and not first.requires_grad
        assert torch.equal(first, second) and first.stride() == want.stride()


@native
def test_batches_in_parts():
    network, z = settled(generator(), torch.randn(2, 12, 1, 1)), torch.randn(64, 12, 1, 1)
    frozen = fastgan.freeze(network)
    with torch.no_grad():
        want = network(z)
    assert far(frozen(z), want) < 2e-6 and torch.equal(frozen(z), frozen(z))


@native
@pytest.mark.parametrize("name", ["chain", "mlp", "minimal", "hand-written"])
def test_bfloat16_is_autocast(name):
    network, x = made(name)
    settled(network, x)
    with torch.no_grad():
        want = network(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(x)
    y = fastgan.freeze(network, dtype=torch.bfloat16)(x)
    assert y.dtype == rounded.dtype and far(y.float(), want) < 1.5 * max(far(rounded.float(), want), 2**-8)


@native
def test_what_is_packed_once_stays():
    """A write that no version counter sees changes nothing: the weights were packed before it."""
    network, z = settled(generator(), torch.randn(2, 12, 1, 1)), torch.randn(2, 12, 1, 1)
    frozen = fastgan.freeze(network)
    before = frozen(z)
    for p in network.parameters():  # another network's
        p.data.zero_()
    assert torch.equal(frozen(z), before)
    (inside,) = frozen._inside
    for m in inside:
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
            m.weight.data.zero_()
    assert torch.equal(frozen(z), before)
    with torch.no_grad():
        inside[-2].bias.add_(1.0)  # a version counter sees this one
    assert torch.equal(frozen(z), torch.tanh(torch.ones_like(before) + generator()[-2].bias.view(1, 3, 1, 1)))


@native
def test_another_instruction_set_packs_anew():
    core = _native.CPU.module()
    network, z = settled(generator(), torch.randn(2, 12, 1, 1)), torch.randn(2, 12, 1, 1)
    frozen, own = fastgan.freeze(network), core.table()
    with torch.no_grad():
        want = network(z)
    first = frozen(z)
    usable = [name for name, why in core.tables().items() if not why]
    try:
        for table in (*usable, own):
            core.use_table(table)
            assert far(frozen(z), want) < 2e-6, table
        assert torch.equal(frozen(z), first)
    finally:
        core.use_table(own)


@native
def test_shapes_that_are_kept_are_few():
    network = settled(generator(), torch.randn(2, 12, 1, 1))
    frozen = fastgan.freeze(network)
    for n in (*range(1, 12), 1, 11):
        z = torch.randn(n, 12, 1, 1)
        with torch.no_grad():
            assert far(frozen(z), network(z)) < 2e-6
    (inside,) = frozen._inside
    (stretch,) = inside.forward._current()
    assert len(stretch.run.packed) == MAX_KEPT
    assert sum(way.kept is not None for way in stretch.run.ways.values()) == MAX_KEPT


@native
def test_threads_with_many_shapes():
    network = settled(generator(), torch.randn(2, 12, 1, 1))
    frozen, draws = fastgan.freeze(network), [torch.randn(n, 12, 1, 1) for n in range(1, 90)]
    with torch.no_grad():
        wanted = [network(z) for z in draws]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = list(pool.map(frozen, draws * 2))
    finally:
        sys.setswitchinterval(interval)
    assert all(far(y, want) < 2e-6 for y, want in zip(found, wanted * 2, strict=True))


@native
def test_threads_share_a_first_call():
    network, z = settled(generator(), torch.randn(2, 12, 1, 1)), torch.randn(2, 12, 1, 1)
    want = fastgan.freeze(network)(z)
    for _ in range(10):
        frozen = fastgan.freeze(network)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = list(pool.map(frozen, [z] * 8))
        assert all(torch.equal(y, want) for y in found)


@native
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_frozen_too(copied):
    network, z = settled(generator(), torch.randn(2, 12, 1, 1)), torch.randn(2, 12, 1, 1)
    frozen = fastgan.freeze(network)
    want = frozen(z)
    again = copied(frozen)
    assert torch.equal(again(z), want) and are_constant(again._inside[0].parameters())


def test_nothing_is_left_to_train_or_load():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    frozen = fastgan.freeze(network)
    assert not [*frozen.parameters(), *frozen.buffers()] and not frozen.state_dict() and network.training
    assert frozen.eval() is frozen and "Sequential, torch.float32" in repr(frozen)
    whole = nn.Sequential(frozen, nn.Dropout()).train()
    assert whole[1].training and not frozen.training
    with pytest.raises(RuntimeError, match="move or cast the network itself"):
        frozen.double()
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="inputs must not require any"):
        frozen(x)
    with torch.no_grad():
        assert frozen(x).shape == (1, 4, 6, 6)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        frozen.load_state_dict(network.state_dict())


def test_what_cannot_be_frozen_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(ValueError, match=r"dtype must be torch\.float32 or torch\.bfloat16, got torch\.float16"):
        fastgan.freeze(network, dtype=torch.float16)
    with pytest.raises(
        ValueError, match=r"parameters must be float32 on the CPU, got torch.float64 on cpu \(0.weight\)"
    ):
        fastgan.freeze(network.double())
