"""Programs: a run of layers as one native call. The ops of the layers, one by one, are the specification."""

import contextlib
import copy
import itertools
import pickle
import random
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import fastgan
from fastgan import program
from fastgan._native import DTYPE_CODES
from fastgan.choice import STATE, begin_run, settle, whole, winners
from fastgan.choice.budget import Account
from fastgan.choice.hardware import torch_multiplies_bfloat16
from fastgan.choice.state import State
from fastgan.program import memory
from fastgan.program.memory import ARENA, BACKWARD, FORWARD, Place, arrange
from fastgan.program.plan import Plan
from fastgan.program.run import Compiled

native = pytest.mark.skipif(not fastgan.backends()["conv2d"]["native"][0], reason="fastgan._C is not built here")
pytestmark = native


@pytest.fixture(autouse=True)
def _no_race():
    with fastgan.racing(False):
        yield


def chain(kind: str, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = {
        "conv": [nn.Conv2d(3, 5, 3, 1, 1, bias=bias)],
        "conv+act": [nn.Conv2d(3, 5, 4, 2, 1, bias=bias), nn.LeakyReLU(0.2), nn.Conv2d(5, 1, 3), nn.Tanh()],
        "conv+bn+act": [
            nn.Conv2d(3, 8, 4, 2, 1, bias=bias), nn.BatchNorm2d(8), nn.LeakyReLU(0.2),
            nn.Conv2d(8, 4, 3, 1, 1, bias=bias, groups=2), nn.BatchNorm2d(4), nn.ReLU(),
        ],
        "discriminator": [
            nn.Conv2d(3, 8, 4, 2, 1, bias=bias), nn.LeakyReLU(0.2),
            nn.Conv2d(8, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2),
            nn.Conv2d(16, 1, 2), nn.Sigmoid(),
        ],
        "generator": [
            nn.ConvTranspose2d(3, 8, 4, 1, 0, bias=bias), nn.BatchNorm2d(8), nn.ReLU(),
            nn.ConvTranspose2d(8, 4, 3, 2, 1, 1, bias=bias), nn.BatchNorm2d(4, affine=False), nn.ReLU(),
            nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.Tanh(),
        ],
        "norm first": [
            nn.BatchNorm2d(3), nn.ReLU(),
            nn.Conv2d(3, 4, 1, bias=bias), nn.BatchNorm2d(4, track_running_stats=False),
        ],
        "sample norms": [
            nn.Conv2d(3, 8, 3, 1, 1, bias=bias), nn.GroupNorm(2, 8), nn.LeakyReLU(0.2),
            nn.Conv2d(8, 6, 3, 1, 1, bias=bias), nn.InstanceNorm2d(6, affine=True), nn.ReLU(),
            nn.Conv2d(6, 4, 3, bias=bias), nn.GroupNorm(1, 4, affine=False), nn.Conv2d(4, 2, 1, bias=bias),
        ],
        "linear head": [
            nn.Conv2d(3, 5, 4, 2, 1, bias=bias), nn.LeakyReLU(0.2), nn.Flatten(),
            nn.Linear(80, 7, bias=bias), nn.BatchNorm1d(7), nn.ReLU(),
            nn.Linear(7, 6, bias=bias), nn.LayerNorm(6), nn.LeakyReLU(0.1),
            nn.Linear(6, 5, bias=bias), nn.LeakyReLU(0.2), nn.Linear(5, 1, bias=bias),
        ],
    }  # fmt: skip  # a layer of a network a line
    return nn.Sequential(*layers[kind])


KINDS = ["conv", "conv+act", "conv+bn+act", "discriminator", "generator", "norm first", "sample norms", "linear head"]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def both(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The converted model twice: as programs, and op by op, in channels_last throughout as a program is inside."""
    one, other = (fastgan.convert(copy.deepcopy(model)) for _ in range(2))
    return one, other.to(memory_format=torch.channels_last)


op_by_op = program.switched_off


@pytest.fixture
def ran(monkeypatch):
    """The programs that ran, in a list."""
    found, run = [], Compiled.run
    monkeypatch.setattr(Compiled, "run", lambda self, *args: (found.append(self), run(self, *args))[1])
    return found


@pytest.fixture
def core_on():
    """The core, held to a table by its name; skips where this CPU lacks it."""
    from fastgan import _C

    def hold(table):
        if _C.tables().get(table, "not built"):
            pytest.skip(f"no {table} here")
        _C.use_table(table)
        return _C

    yield hold
    _C.use_table(None)


def outcome(model, x, weights=None):
    y = model(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) if weights is None else weights
    inputs = [*(t for t in (x,) if t.requires_grad), *(p for p in model.parameters() if p.requires_grad)]
    return y, torch.autograd.grad((y * weights).sum(), inputs) if inputs else ()


def assert_same(got, want, exact=True):
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype
        if exact:
            assert torch.equal(g, w)
        else:
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5 * w.abs().max().item() + 1e-7)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_program_gives_the_ops_numbers(kind, layout, ran):
    model = chain(kind, bias=False)
    a, b = both(model)
    x = torch.randn(4, 3, 8, 8).to(memory_format=layout)
    for _ in range(2):
        ran.clear()
        y, grads = outcome(a, x)
        assert len(ran) == 1
        with op_by_op():  # in the layout that a program has inside: the kernels of the other one sum in another order
            want, want_grads = outcome(b, x.to(memory_format=torch.channels_last))
        assert torch.equal(y, want) and y.stride() == model(x).stride()
        assert_same(grads, want_grads)
        assert_same(a.state_dict().values(), b.state_dict().values(), exact=False)
    b.load_state_dict(a.state_dict())  # running statistics are equal but for their last bit
    a.eval(), b.eval()
    if kind == "norm first":  # its last norm has no running statistics, so the ops run, in the layout of x
        return
    with torch.no_grad():
        y = a(x)
        with op_by_op():
            assert torch.equal(y, b(x.to(memory_format=torch.channels_last)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_gives_plain_torchs_numbers(kind):
    model = chain(kind).double()
    a = fastgan.convert(copy.deepcopy(model).float())
    x = torch.randn(6, 3, 8 if kind == "linear head" else 9, 8)
    y, grads = outcome(a, x)
    want, want_grads = outcome(
        model, x.double(), torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double()
    )
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-5)
    largest = max(g.abs().max().item() for g in want_grads)
    for g, w in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-3, atol=1e-5 * largest)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(a.state_dict()[name].to(value.dtype), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["conv+bn+act", "discriminator", "generator", "sample norms", "linear head"])
def test_gradients_of_the_input_and_of_some_parameters(kind):
    a, b = both(chain(kind, bias=False))
    for model in (a, b):
        for i, p in enumerate(model.parameters()):
            p.requires_grad_(i % 2 == 0)
    leaf = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    y, grads = outcome(a, leaf * 1)  # no leaf: what a generator gives
    with op_by_op():
        want, want_grads = outcome(b, leaf * 1)
    assert_same([y, *grads], [want, *want_grads])


@pytest.mark.parametrize("kind", ["conv+act", "discriminator", "generator", "sample norms", "linear head"])
def test_second_derivatives_are_the_ops(kind, ran):
    a, b = both(chain(kind, bias=False))
    x = torch.randn(4, 3, 8, 8)

    def second(model):
        h = x.clone().requires_grad_() * 1  # no leaf, so that the program runs
        y = model(h)
        (g,) = torch.autograd.grad(y.square().sum(), h, create_graph=True)
        return torch.autograd.grad(g.square().sum(), list(model.parameters()), allow_unused=True)

    got = second(a)
    assert ran
    with op_by_op():
        want = second(b)
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5 * w.abs().max().item() + 1e-9)


# ---- what a chain may meet between two calls ------------------------------------------------------------------------


def test_what_changes_between_calls_is_seen(ran):
    model = chain("discriminator")
    a = fastgan.convert(copy.deepcopy(model))
    x = torch.randn(4, 3, 8, 8)

    def agree():
        a.load_state_dict(model.state_dict())
        torch.testing.assert_close(a(x), model(x), rtol=1e-4, atol=1e-5)

    agree()
    with torch.no_grad():
        for m in (a, model):
            m[0].weight.mul_(1.5)
            m[3].running_mean.add_(1)
    agree()
    for m in (a, model):
        m.eval()
    agree()
    for m in (a, model):
        m.train()
        m[1].negative_slope = 0.5
        m[3].eps, m[3].momentum = 0.1, 0.7
        m[5].stride = (1, 2)
    agree()
    for m in (a, model):
        m[2].register_forward_hook(lambda module, args, y: y * 2)
    agree()
    replacement = nn.Conv2d(3, 8, 4, 2, 1)
    for m in (a, model):
        m[0] = copy.deepcopy(replacement)
    agree()
    assert len(ran) > 4


def test_copies_and_pickles_start_without_programs(ran):
    a = fastgan.convert(chain("generator"))
    x = torch.randn(4, 3, 8, 8)
    y = a(x)
    for again in (copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
        again.load_state_dict(a.state_dict())
        ran.clear()
        torch.testing.assert_close(again.train()(x), y)
        assert len(ran) == 1 and all(mine is not theirs for mine, theirs in zip(a, again, strict=True))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_statistics_of_parts_of_the_batch(groups, ran):
    model = chain("conv+bn+act")
    a = fastgan.convert(copy.deepcopy(model))
    x = torch.randn(8, 3, 8, 8)
    with fastgan.nn.norm.stat_groups(a, groups):
        y = a(x)
    want = torch.cat([model(part) for part in x.chunk(groups)])
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(a.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert len(ran) == 1


@pytest.mark.parametrize("kind", ["conv+act", "discriminator", "generator", "sample norms", "linear head"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
def test_autocast(kind, layout, ran):
    a, b = both(chain(kind, bias=False))
    x = torch.randn(4, 3, 8, 8).to(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16):
        y = a(x)
        with op_by_op():
            want = b(x.to(memory_format=torch.channels_last))
    assert len(ran) == 1 and y.dtype == want.dtype == torch.bfloat16 and torch.equal(y, want)
    y.float().square().sum().backward()
    with op_by_op():
        want.float().square().sum().backward()
    for g, w in zip(a.parameters(), b.parameters(), strict=True):
        # the ops round a weight's gradient to bfloat16 before autograd widens it; the program writes float32
        got = g.grad.bfloat16().float() if g.dim() == 4 else g.grad
        assert g.grad.dtype == torch.float32
        torch.testing.assert_close(got, w.grad, rtol=1e-2, atol=2e-3 * w.grad.abs().max().item())


def test_second_derivatives_see_the_layers_as_the_forward_did(ran):
    model = chain("discriminator", bias=False)
    a, b = both(model)
    found = []
    for net, context in ((a, contextlib.nullcontext), (b, op_by_op)):
        h = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_() * 1
        with context():
            with fastgan.nn.norm.stat_groups(net, 4):
                y = net(h)
            net[1].negative_slope, net[3].eps = 0.9, 0.5  # too late to matter
            (g,) = torch.autograd.grad(y.square().sum(), h, create_graph=True)
            found.append(torch.autograd.grad(g.square().sum(), [net[0].weight, net[2].weight]))
    assert len(ran) == 1
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_inference_mode(ran):
    model = chain("conv+bn+act")
    a = fastgan.convert(copy.deepcopy(model))
    x = torch.randn(4, 3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(a(x), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert len(ran) == 2


def test_a_second_backward_over_one_forward(ran):
    a, b = both(chain("discriminator", bias=False))
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    for model, context in ((a, contextlib.nullcontext), (b, op_by_op)):
        with context():
            y = model(x).square().sum()
            y.backward(retain_graph=True)
            y.backward()
    assert_same([p.grad for p in a.parameters()], [p.grad for p in b.parameters()], exact=False)


def test_only_the_gradients_asked_for(ran, monkeypatch):
    monkeypatch.setattr(Plan, "WORTH_ASKING", 0)
    a, b = both(chain("discriminator", bias=False))
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    for wanted in ([0], [1], [0, 3], [2]):
        got, want = [], []
        for model, found, context in ((a, got, contextlib.nullcontext), (b, want, op_by_op)):
            with context():
                parameters = list(model.parameters())
                found.extend(torch.autograd.grad(model(x).sum(), [parameters[i] for i in wanted]))
        assert_same(got, want)
    compiled = ran[0]
    assert len(compiled.backwards) == 3  # a program for each pattern of weights; vectors are made on the way


def test_a_graph_outlives_its_model():
    a = fastgan.convert(chain("discriminator"))
    weight = a[0].weight
    y = a(torch.randn(2, 3, 8, 8)).sum()
    del a
    y.backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_a_parameter_changed_before_backward_is_an_error():
    a = fastgan.convert(chain("conv+act"))
    y = a(torch.randn(2, 3, 8, 8)).sum()
    with torch.no_grad():
        a[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_buffers_tell_autograd_what_pytorchs_tell():
    """PyTorch's batch norm has saved its running statistics: were their versions counted, its backward would refuse."""
    a, x = chain("conv+bn+act"), torch.randn(4, 3, 8, 8)
    b = fastgan.convert(copy.deepcopy(a))
    for m in (a, b):
        m(x)
    assert [s._version for s in a.buffers()] == [s._version for s in b.buffers()]
    for shared in (fastgan.convert(copy.deepcopy(a)), b):
        shared[1].running_mean, shared[1].running_var = a[1].running_mean, a[1].running_var
        with fastgan.backend("native" if shared is b else "reference"):
            (a(x).square().sum() + shared(x).square().sum()).backward()
    torch.testing.assert_close(b[0].weight.grad, a[0].weight.grad / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "case", ["leaf", "unbatched", "double", "reflect", "cumulative", "frozen norm", "no pixels", "reference"]
)
def test_what_a_program_does_not_know_runs_on_the_ops(case, ran):
    model = chain("conv+bn+act")
    x = torch.randn(4, 3, 8, 8)
    context = contextlib.nullcontext()
    if case == "leaf":
        x.requires_grad_()
    elif case == "unbatched":
        model, x = model[3:4], torch.randn(8, 5, 5)
    elif case == "double":
        model, x = model.double(), x.double()
    elif case == "reflect":
        model[0] = nn.Conv2d(3, 8, 4, 2, 1, padding_mode="reflect")
    elif case == "cumulative":
        model[1].momentum = None
    elif case == "frozen norm":
        model[1].eval()
    elif case == "no pixels":
        x = x[:0]
    else:
        context = fastgan.backend("reference")
    a = fastgan.convert(copy.deepcopy(model))
    with context:
        y = a(x)
    if case in ("leaf", "unbatched", "double", "no pixels", "reference", "reflect", "frozen norm", "cumulative"):
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
    assert not ran or case in ("reflect", "cumulative", "frozen norm")  # a neighbour may run as a program


def test_wrong_shapes_get_the_ops_sentences():
    a = fastgan.convert(chain("discriminator"))
    with pytest.raises(ValueError, match="conv2d: "):
        a(torch.randn(2, 4, 8, 8))
    with pytest.raises(ValueError, match="conv2d: the kernel must fit"):
        a(torch.randn(2, 3, 2, 2))
    b = fastgan.convert(nn.Sequential(nn.Conv2d(3, 4, 4), nn.BatchNorm2d(4)))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        b(torch.randn(1, 3, 4, 4))


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 3])
def test_tensors_that_live_at_once_do_not_overlap(blocks, monkeypatch):
    monkeypatch.setattr(memory, "WHOLE", -1 if blocks == 3 else 1 << 30)
    rng = random.Random(0)
    backward = 20
    for _ in range(200):
        places = []
        for _ in range(rng.randrange(1, 30)):
            place = Place(ARENA, rng.choice([1, 64, 100, 4096, 70000]))
            first = rng.randrange(40)
            place.touch(first)
            place.touch(first + rng.randrange(10))
            places.append(place)
        sizes = arrange(places, backward)
        for i, a in enumerate(places):
            assert a.offset % 64 == 0 and a.offset + a.bytes <= sizes[a.slot]
            assert a.slot != FORWARD or a.last < backward
            assert a.slot != BACKWARD or a.first >= backward
            for b in places[:i]:
                apart = a.slot != b.slot or a.offset + a.bytes <= b.offset or b.offset + b.bytes <= a.offset
                assert apart or not a.meets(b)


def planned(batch):
    """The plan of a discriminator's three layers, forward and backward; the bytes of each norm's input."""
    torch.manual_seed(0)
    layers = []
    for c, k in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(c, k, 4, 2, 1, bias=False), nn.BatchNorm2d(k), nn.LeakyReLU(0.2)]
    a = fastgan.convert(nn.Sequential(*layers))
    a(torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last))
    (compiled,) = next(iter(a.__dict__["forward"].parts)).run.ways.values()
    return compiled.plan, [4 * batch * k * (32 // s) ** 2 for k, s in ((32, 2), (64, 4), (128, 8))]


def test_gradients_lie_where_activations_lay():
    """A small arena of forward and backward together is little more than what forward must keep."""
    plan, (one, two, three) = planned(4)
    kept = 2 * one + 2 * two + three
    first_gradient = three  # when it is written, everything kept is still needed
    assert kept + first_gradient < plan.arena_bytes < 1.01 * (kept + first_gradient)


def test_a_large_output_of_a_norm_does_not_wait_for_backward():
    """The norms' inputs wait; an output is made again for the weight's gradient, and its own gradient lies there."""
    plan, (one, two, three) = planned(64)
    statistics = 8192
    assert one + two + three < plan.blocks[ARENA] < one + two + three + one // 4 + statistics
    assert plan.blocks[FORWARD] == one and plan.blocks[BACKWARD] == two


# ---- the change of layout at the edges ------------------------------------------------------------------------------


SIDES = [(1, 5), (3, 1000), (15, 17), (16, 128), (29, 130), (300, 40), (257, 3), (7, 7)]


@pytest.mark.parametrize("table", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("rows, columns", SIDES)
def test_relayout_moves_every_bit(rows, columns, table, core_on):
    core = core_on(table)
    x = torch.randint(0, 1 << 16, (3, rows, columns), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    for source, target in (("float", "float"), ("bf16", "bf16"), ("bf16", "float"), ("float", "bf16")):
        types = {"float": torch.float32, "bf16": torch.bfloat16}
        moved = (x % 32000).to(torch.int16).view(torch.bfloat16) if source == "bf16" else (x - 30000).float() / 7
        y = torch.full((3, columns, rows), float("nan"), dtype=types[target])
        codes = [DTYPE_CODES[moved.dtype], DTYPE_CODES[y.dtype]]
        core.relayout(*codes, moved.data_ptr(), y.data_ptr(), 3, rows, columns, 2)
        assert torch.equal(y, moved.transpose(1, 2).to(y.dtype))


@pytest.mark.parametrize("kind", ["conv+act", "conv+bn+act", "generator"])
def test_one_number_as_cotangent(kind, ran):
    """sum() hands back one number, expanded: it has every layout at once."""
    a, b = both(chain(kind, bias=False))
    x = torch.randn(4, 3, 8, 8)
    for loss in (torch.sum, torch.mean):
        got = torch.autograd.grad(loss(a(x)), list(a.parameters()))
        with op_by_op():
            want = torch.autograd.grad(loss(b(x.to(memory_format=torch.channels_last))), list(b.parameters()))
        assert_same(got, want)
    assert len(ran) == 2


@pytest.mark.parametrize("kind", ["conv", "conv+bn+act", "generator", "sample norms"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
def test_a_batch_in_parts_has_the_same_bits(kind, layout, ran, monkeypatch):
    a = fastgan.convert(chain(kind)).eval()
    x = torch.randn(12, 3, 16, 14).to(memory_format=layout)
    monkeypatch.setattr(Plan, "PART_PIXELS", 200)
    found = {}
    for size in (1 << 30, -1):
        monkeypatch.setattr(Plan, "PART_BYTES", size)
        next(iter(a.__dict__["forward"]._current())).run.ways.clear()
        next(iter(a.__dict__["forward"]._current())).run.last = (), None
        with torch.no_grad():
            found[size] = a(x), ran[-1].parts
    (whole, one), (parts, several) = found.values()
    assert one == 1 and several > 1
    assert torch.equal(whole, parts) and whole.stride() == parts.stride()


# ---- linear layers --------------------------------------------------------------------------------------------------


def perceptron(norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    sizes = (5, 9, 7, 3)
    layers = [[nn.Linear(a, b), norm(b), nn.LeakyReLU(0.2, inplace=True)] for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*itertools.chain(*layers), nn.Linear(3, 1), nn.Sigmoid())


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm, lambda b: nn.GroupNorm(1, b)])
def test_a_perceptron_is_one_program(norm, ran):
    model = perceptron(norm)
    a = fastgan.convert(copy.deepcopy(model))
    double = copy.deepcopy(model).double()
    for training in (True, False):
        a.train(training), double.train(training)
        x = torch.randn(6, 5)
        for _ in range(3):
            ran.clear()
            with torch.set_grad_enabled(training):  # a norm in eval mode under gradients is the ops'
                y, want = a(x), double(x.double())
            assert len(ran) == 1 and y.stride() == want.stride()
            torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-6)
        if training:
            y.square().sum().backward(), want.square().sum().backward()
            for p, q in zip(a.parameters(), double.parameters(), strict=True):
                torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=1e-6)


def test_spare_memory_serves_one_run_at_a_time(ran):
    """Two forwards before either backward, and inference mode between them."""
    a, b = both(perceptron())
    xs = [torch.randn(6, 5, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    for _ in range(2):
        with torch.inference_mode():
            a(xs[3])
        losses = [a(x).square().sum() for x in xs[:3]]
        got = [torch.autograd.grad(loss, list(a.parameters())) for loss in reversed(losses)]
        with op_by_op():
            losses = [b(x).square().sum() for x in xs[:3]]
            want = [torch.autograd.grad(loss, list(b.parameters())) for loss in reversed(losses)]
        for mine, theirs in zip(got, want, strict=True):
            assert_same(mine, theirs, exact=False)
    assert len(ran) == 8


def test_a_linear_layer_alone_and_an_activation_in_place_stay_torchs(ran):
    a = fastgan.convert(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3), nn.Flatten(), nn.Dropout(0.0)))
    x = torch.randn(2, 4)
    kept = x.clone()
    a(x)
    assert not ran and torch.equal(x, kept.relu())
    y = fastgan.convert(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))(x)
    y.mul_(2)  # a last layer without activation needs no y for its backward
    y.sum().backward()
    assert len(ran) == 1


# ---- layers whose weight is made at each call ------------------------------------------------------------------------


def normalised(late: bool) -> tuple[nn.Module, nn.Module]:
    """A plain discriminator with spectral and weight norm and its converted twin, parametrized before or after."""
    made = []
    for convert in (lambda m: m, fastgan.convert):
        model = chain("discriminator")
        model = convert(model) if late else model
        torch.manual_seed(3)
        for i, wrap in ((0, spectral_norm), (2, spectral_norm), (5, weight_norm)):
            wrap(model[i])
        made.append(model if late else convert(model))
    return made[0], made[1]


@pytest.mark.parametrize("late", [False, True], ids=["before convert", "after convert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parametrized_layers_are_part_of_a_program(late, dtype, ran):
    """Weights are made once a call, so that the power iterations stay torch's; first, and R1's, derivatives as well."""
    plain, ours = (m.to(dtype) for m in normalised(late))
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    for training in (True, True, False):
        plain.train(training), ours.train(training)
        x = torch.randn(4, 3, 8, 8, dtype=dtype)
        found = []
        for model in (ours, plain):
            leaves = list(model.parameters())
            y = model(x)
            first = torch.autograd.grad(y.square().sum(), leaves)
            z = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(model(z).sum(), z, create_graph=True)
            second = torch.autograd.grad(slope.square().sum(), leaves, allow_unused=True, materialize_grads=True)
            with torch.no_grad():
                found.append([y, *first, *second, model(x), *model.buffers()])
        torch.testing.assert_close(found[0], found[1], **close)
        assert found[0][0].stride() == found[1][0].stride()
    assert len(ran) == (dtype == torch.float32) * 5  # none for the penalty's image, and for gradients in eval mode
    (part,) = ours.forward.parts
    assert [s.tensors for s in part.stand_ins] == [{"weight": None, "bias": None}] * 3  # nothing is kept
    rows = {row.name: row.runs for row in fastgan.explain(ours).rows}
    assert rows["0"] == "fastgan.conv2d + leaky_relu" and "batch norm" in rows["2"]


def test_parametrized_layers_follow_what_is_done_to_them(ran):
    plain, ours = normalised(late=False)
    x = torch.randn(4, 3, 8, 8)
    same = lambda: torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-5)
    same()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(ours.state_dict())))
    assert twin.keys() == plain.state_dict().keys()
    for model in (plain, ours):
        model[2].padding = (2, 2)
        model[5].stride = (2, 2)
    same()
    for model in (plain, ours):
        nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    same()
    for model in (plain, ours):
        model[2].register_forward_hook(lambda m, args, out: out * 2)
    same()
    with nn.utils.parametrize.cached():
        assert torch.equal(ours(x), ours(x))
    fastgan.revert(ours)
    same()
    assert len(ran) > 3


# ---- races that the budget cuts short -------------------------------------------------------------------------------


@pytest.fixture
def slow_program(monkeypatch, tmp_path):
    """Racing is on, the account is empty, and a fake clock says that programs take longer than plain PyTorch."""
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path))
    for name, value in vars(State()).items():
        monkeypatch.setattr(STATE, name, value)
    clock = lambda: clock.now
    clock.now = 0.0

    def seconds(run, arguments, device):
        way = run.__kwdefaults__["w"]
        took = 0.4 if isinstance(way, Compiled) else 0.3 if way.func is program.plain else 0.5
        clock.now += took
        return took

    monkeypatch.setattr(whole, "_seconds", seconds)
    monkeypatch.setattr(STATE, "account", Account(clock, held=1e-9))
    with fastgan.racing(True):
        yield clock


def takes_a_program(model, x, training=True):
    """Whether a copy of the model, in train or eval mode, runs this call as a program."""
    a = fastgan.convert(copy.deepcopy(model)).train(training)
    with torch.set_grad_enabled(training):
        a(x)
    (run,) = (part.run for part in a.__dict__["forward"].parts)
    return isinstance(run.last[1], Compiled)


MODES = [(kind, training) for kind in KINDS for training in (True, False) if kind != "norm first" or training]


@pytest.mark.parametrize("kind, training", MODES)  # a norm without running statistics has no program in eval mode
def test_an_open_race_is_settled_at_the_end_of_its_run(kind, training, slow_program):
    # Without instructions for products of bfloat16 nothing races in it.
    model, lowered = chain(kind), kind in ("conv+act", "linear head") and torch_multiplies_bfloat16()
    x = torch.randn(4, 3, 8, 8).to(memory_format=LAYOUTS[training])
    with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
        assert takes_a_program(model, x, training) and len(STATE.open) == 1
        (case,) = STATE.open
        slow_program.now += 3600.0  # the account is full again
        assert takes_a_program(model, x, training), "a verdict changed within a run"
    found = None if training else STATE.cache.open_cases()  # of the run, or as another process reads them
    assert settle(found) == {case: "plain"} and not STATE.open and not STATE.cache.open_cases()
    with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
        assert takes_a_program(model, x, training), "a verdict changed within a run"
        begin_run(dict(winners()))
        assert takes_a_program(model, x, training), "a resumed run takes other kernels"
        begin_run()
        assert not takes_a_program(model, x, training)


def test_a_race_under_load_stays_open(slow_program, monkeypatch):
    moods = itertools.cycle([1.0, 3.0, 1.7, 2.2, 1.4])
    monkeypatch.setattr(whole, "_seconds", lambda *call: next(moods))
    model, x = chain("conv"), torch.randn(4, 3, 8, 8)
    STATE.account.charge(1.0)
    assert takes_a_program(model, x) and len(STATE.open) == 1
    assert settle() == {} and len(STATE.open) == 1
    (found,) = STATE.open.values()
    assert program.race("another case", found["args"]) is None  # as after a change of what is written


# ---- what a call costs ----------------------------------------------------------------------------------------------


def python_calls(run):
    """Calls that Python's profiler sees, of Python functions and of C functions; the same at every run."""
    run(), run()
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("kind, eval_calls, training_calls", [("conv+bn+act", 80, 195), ("linear head", 155, 385)])
def test_calls_of_a_chain_have_a_ceiling(kind, eval_calls, training_calls, ran):
    a = fastgan.convert(chain(kind))
    x = torch.randn(4, 3, 8, 8)
    assert python_calls(lambda: a(x).sum().backward()) <= training_calls
    a.eval()
    with torch.no_grad():
        assert python_calls(lambda: a(x)) <= eval_calls
    assert len(ran) == 6


def test_calls_of_small_ops_have_a_ceiling():
    """A convolution or norm pays for such calls too: an op's way from the function to its kernel."""
    t, bias = torch.randn(1, 64), torch.randn(64)
    fake, real = (torch.randn(64, requires_grad=True) for _ in range(2))
    loss = lambda: fastgan.functional.gan_loss(fake, real, kind="bce", side="d").backward()
    with fastgan.backend("native"):
        assert python_calls(lambda: fastgan.functional.bias_act(t, bias)) <= 63
        # 6 of them let results be changed in place and spare the zeros of outputs without a gradient, 15 us of 180; 1
        # looks for a batch of cotangents
        assert python_calls(loss) <= 182
    with fastgan.racing(True):  # PyTorch's two ops
        assert python_calls(lambda: fastgan.functional.bias_act(t, bias)) <= 32


def test_calls_of_a_step_have_a_ceiling(ran):
    """Both updates of a small DCGAN, metrics included, whose networks are a program each."""
    torch.manual_seed(0)
    g = nn.Sequential(nn.ConvTranspose2d(6, 4, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 3, 4, 2, 1))
    d = nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 4))
    g, d = fastgan.convert(g), fastgan.convert(d)
    adams = [fastgan.Adam(m.parameters(), 2e-4) for m in (g, d)]
    step = fastgan.GANStep(g, d, latent=(6, 1, 1), g_optimizer=adams[0], d_optimizer=adams[1])
    real = torch.randn(4, 3, 8, 8)
    # 16 of them ask at each chain and node whether torch.fx, torch.func or a batch of cotangents looks on, about 1 us.
    assert python_calls(lambda: step(real)) <= 1516
    assert len(ran) == 9  # G, D of both, D of fake: programs, three times


# ---- signals: [N, C, L] as images one pixel high ---------------------------------------------------------------------

SIGNALS = {
    "conv": lambda: [nn.Conv1d(3, 5, 5, padding=2, bias=False)],
    "critic": lambda: [
        nn.Conv1d(3, 4, 9, 2, 4), nn.LeakyReLU(0.2), nn.Conv1d(4, 8, 3, padding=2, dilation=2, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 1),
    ],
    "generator": lambda: [
        nn.Conv1d(3, 6, 3, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.GroupNorm(2, 6),
        nn.ConvTranspose1d(6, 4, 5, 2, 2, 1), nn.LeakyReLU(0.1), nn.ConvTranspose1d(4, 1, 4, 2, 1), nn.Tanh(),
    ],
}  # fmt: skip  # a layer of a network a line


def innermost(x: torch.Tensor) -> torch.Tensor:
    """A signal with its channels innermost."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def cotangent(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """In the layout of a program's inside, since sums of another one have another order."""
    with torch.no_grad():
        shape = copy.deepcopy(model)(x).shape
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return innermost(drawn) if drawn.dim() == 3 else drawn


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, innermost], ids=["ncl", "innermost"])
@pytest.mark.parametrize("kind", SIGNALS)
def test_signals_get_the_ops_numbers_and_pytorchs(kind, layout, ran):
    torch.manual_seed(0)
    model = nn.Sequential(*SIGNALS[kind]())
    a, b = both(model)
    x = torch.randn(4, 3, 16)
    for training in (True, False):
        for m in (model, a, b):
            m.train(training)
        ran.clear()
        with contextlib.nullcontext() if training else torch.no_grad():
            weights = cotangent(model, x)
            y, grads = outcome(a, layout(x), weights) if training else (a(layout(x)), ())
            assert len(ran) == 1
            with op_by_op():
                want, want_grads = outcome(b, innermost(x), weights) if training else (b(innermost(x)), ())
            plain, plain_grads = outcome(model, x, weights) if training else (model(x), ())
        assert y.stride() == plain.stride()  # contiguous, whatever x lies like
        # what stands between two of these ops is contiguous [N, C, L], and they sum in its order
        assert_same((y, *grads), (want, *want_grads), exact=kind not in ("generator", "critic"))
        assert_same((y, *grads), (plain, *plain_grads), exact=False)
    assert_same(dict(a.named_buffers()).values(), dict(model.named_buffers()).values(), exact=False)


@pytest.mark.parametrize("kind", SIGNALS)
def test_second_derivatives_of_signals(kind, ran):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Tanh(), *SIGNALS[kind]())  # its input is no leaf of the program
    ours, x = fastgan.convert(copy.deepcopy(model)), torch.randn(4, 3, 16)
    found = []
    for m in (ours, model):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(m(leaf).square().sum(), leaf, create_graph=True)
        gradient.square().sum().backward()
        found.append([gradient, leaf.grad, *(p.grad for p in m.parameters() if p.grad is not None)])
    assert ran
    assert_same(*found, exact=False)


def test_signals_under_autocast(ran):
    torch.manual_seed(0)
    model = nn.Sequential(*SIGNALS["critic"]())
    (a, b), x = both(model), torch.randn(4, 3, 16)
    weights = cotangent(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        y, grads = outcome(a, x, weights)
        with op_by_op():
            want, want_grads = outcome(b, innermost(x), weights)
    assert len(ran) == 1 and y.dtype == torch.bfloat16 and torch.equal(y, want)
    for got, g in zip(grads, want_grads, strict=True):  # the ops round it to bfloat16 before autograd widens it
        torch.testing.assert_close(got, g, rtol=1e-2, atol=2e-3 * g.abs().max().item())


def test_an_unbatched_signal_gets_no_program(ran):
    model = nn.Sequential(nn.Conv1d(3, 5, 3), nn.Tanh())
    x = torch.randn(3, 9)
    want = model(x)
    torch.testing.assert_close(fastgan.convert(model)(x), want)
    assert not ran


@pytest.mark.parametrize("kind", SIGNALS)
def test_an_open_race_of_signals_is_settled_at_the_end_of_its_run(kind, slow_program):
    model, x = nn.Sequential(*SIGNALS[kind]()), torch.randn(4, 3, 16)
    assert takes_a_program(model, x) and len(STATE.open) == 1
    (case,) = STATE.open
    assert settle() == {case: "plain"} and not STATE.open


# ---- what a module may become between calls --------------------------------------------------------------------------


@pytest.fixture(params=["cpu", "gpu"])
def device_kind(request, monkeypatch):
    """Programs of a CPU, and those of a GPU on its tensors."""
    if request.param == "gpu":
        monkeypatch.setattr(STATE, "emulated", {"a GPU without kernels"})


def test_a_layer_that_is_applied_to_its_own_result_has_its_gradient_once(device_kind):
    """create_graph=True: the inner pass must not walk on through x into the parameter that made it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1), nn.LeakyReLU(0.2))
    ours, x = fastgan.convert(copy.deepcopy(model)), torch.randn(2, 3, 6, 6)
    found = []
    for m in (ours, model):
        real = x.clone().requires_grad_()
        first = torch.autograd.grad(m(m(real * 1.0)).square().sum(), [real, *m.parameters()], create_graph=True)
        second = torch.autograd.grad(first[0].square().sum() + first[1].sum(), [*m.parameters()])
        found.append((*first, *second))
    assert_same(*found, exact=False)


@pytest.mark.parametrize("where", ["norm", "bias"])
@pytest.mark.parametrize("after", [False, True])
def test_vectors_of_another_length_are_refused_as_by_the_ops(after, where, device_kind):
    model = fastgan.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(0.2)))
    x = torch.randn(2, 3, 6, 6)
    if after:
        model(x)
    module, name = (model[1], "weight") if where == "norm" else (model[0], "bias")
    setattr(module, name, nn.Parameter(torch.ones(4)))
    with pytest.raises(ValueError, match=r"must have shape \(8,\)"):
        model(x)


def test_a_layer_that_has_grown_is_seen(device_kind):
    model = fastgan.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(0.2)))
    x = torch.randn(2, 3, 6, 6)
    model(x)
    for name, t in nn.Conv2d(3, 12, 3).named_parameters():
        setattr(model[0], name, t)
    model[1].weight, model[1].bias = nn.Parameter(torch.ones(12)), nn.Parameter(torch.zeros(12))
    model[1].num_features, model[1].running_mean, model[1].running_var = 12, torch.zeros(12), torch.ones(12)
    assert model(x).shape == (2, 12, 4, 4)


def test_an_output_padding_that_has_changed_is_seen(device_kind):
    model = fastgan.convert(nn.Sequential(nn.ConvTranspose2d(3, 8, 3, 2), nn.LeakyReLU(0.2)))
    x = torch.randn(2, 3, 8, 8)
    assert model(x).shape[2:] == (17, 17)
    model[0].output_padding = (1, 1)
    assert model(x).shape[2:] == (18, 18)


def test_an_input_of_autocast_is_refused_without_it(device_kind):
    model, x = fastgan.convert(chain("conv+act")), torch.randn(2, 3, 8, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    with pytest.raises(TypeError, match="must have x's dtype"):
        model(x)


def test_a_second_order_pass_makes_what_it_is_asked_for(device_kind, monkeypatch):
    model, x = fastgan.convert(chain("conv+act")), torch.randn(2, 3, 8, 8, requires_grad=True)
    made = []
    op = fastgan._op.OPS["conv2d_weight"]
    monkeypatch.setattr(op, "run", lambda *args, run=op.run: (made.append(1), run(*args))[1])
    torch.autograd.grad(model(x * 1.0).sum(), x, create_graph=True)
    assert not made
