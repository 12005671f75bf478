"""Programs on a GPU: the ops' launches around one autograd node. Here they run on CPU tensors, with any backend."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from test_program import KINDS, LAYOUTS, assert_same, both, chain, outcome
from torch import nn

import fastgan
from fastgan import program
from fastgan._native import Core
from fastgan.choice import STATE
from fastgan.program import launches, run
from fastgan.program.launches import Launches, Update
from fastgan.program.tape import Tape

op_by_op = program.switched_off
WITH_NORMS = ["conv+bn+act", "discriminator", "generator", "linear head"]


@pytest.fixture(autouse=True)
def ran(monkeypatch):
    """A CPU's tensors take a GPU's programs; the number of their forward passes, in a list."""
    found, forward = [], Launches.run
    monkeypatch.setattr(STATE, "emulated", {"a GPU without kernels"})
    monkeypatch.setattr(Launches, "run", lambda self, *args: (found.append(self), forward(self, *args))[1])
    with fastgan.racing(False):
        yield found


def inputs(layout, batch=4, dtype=torch.float32):
    x = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    return x.contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_launches_give_the_ops_numbers(bias, kind, layout, ran):
    """A last layer's bias gradient is summed in channels_last, the op's in the order of its cotangent."""
    one, other = both(chain(kind, bias=bias))
    for _ in range(2):
        x = inputs(layout)
        got = outcome(one, x)
        with op_by_op():
            want = outcome(other, x.contiguous(memory_format=torch.channels_last))
        assert_same((got[0], *one.buffers()), (want[0], *other.buffers()))
        assert_same(got[1], want[1], exact=not bias)
        with op_by_op():
            assert got[0].stride() == outcome(fastgan.convert(chain(kind)), x)[0].stride()
    assert len(ran) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_input(kind, ran):
    one, other = both(chain(kind, bias=False))
    found = []
    for model, way in ((one, contextlib.nullcontext), (other, op_by_op)):
        x = inputs(torch.channels_last).requires_grad_()
        with way():
            y = model(x * 1.0)
            found.append((y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])))
    assert_same(*found)
    assert len(ran) == 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("kind", WITH_NORMS)
def test_eval_mode_folds_as_the_ops_do(kind, layout, ran):
    one, other = both(chain(kind))
    for _ in range(2):
        one(inputs(layout)), other(inputs(layout))
    x = inputs(layout)
    with torch.no_grad():
        got = one.eval()(x)
        other.load_state_dict(one.state_dict())
        with op_by_op():
            want = other.eval()(x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(got, want)
    assert len(ran) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, ran):
    one, other = both(chain(kind))
    found = []
    for model, way in ((one, contextlib.nullcontext), (other, op_by_op)):
        with way():
            with torch.autocast("cpu", torch.bfloat16):
                y = model(inputs(torch.channels_last))
            found.append((y, *torch.autograd.grad(y.float().square().sum(), [*model.parameters()])))
    if kind == "norm first":  # it computes in its input's type: the ops' business
        assert not ran
    else:
        assert ran and found[0][0].dtype == torch.bfloat16
    assert_same(*found)


@pytest.mark.parametrize("momentum", [0.1, 0.3])
@pytest.mark.parametrize("groups", [1, 2])
def test_running_statistics_of_parts_of_the_batch(groups, momentum, ran):
    one, other = both(chain("generator"))
    for model in (one, other):
        norms = [m for m in model if isinstance(m, nn.BatchNorm2d)]
        norms[-1].momentum = momentum  # unlike the first's, or like it: then both follow in the same launches
        for norm in norms:
            norm.stat_groups = groups
    got = outcome(one, inputs(torch.channels_last))
    with op_by_op():
        want = outcome(other, inputs(torch.channels_last))
    assert_same((got[0], *got[1], *one.buffers()), (want[0], *want[1], *other.buffers()))
    assert [int(n) for name, n in one.named_buffers() if "batches" in name] == [groups] * 2


def test_statistics_of_a_norm_that_runs_twice_follow_one_after_the_other():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    buffers = norm.running_mean, norm.running_var, norm.num_batches_tracked
    moved = [Update(*buffers, mean, mean.square() + 1, 8, 0.5) for mean in torch.randn(2, 1, 3)]
    mean = torch.zeros(3)
    for update in moved:
        mean = mean.lerp(update.mean[0], 0.5)
    launches._apply(moved)
    assert torch.equal(norm.running_mean, mean) and int(norm.num_batches_tracked) == 2


def test_second_derivatives_and_second_passes_are_the_ops(ran):
    one, other = both(chain("discriminator"))

    def second(model):
        x = inputs(torch.channels_last).requires_grad_()
        y = model(x * 1.0)
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, *model.parameters()], allow_unused=True)

    def twice(model):
        y = model(inputs(torch.channels_last)).sum()
        parameters = [*model.parameters()]
        return torch.autograd.grad(y, parameters, retain_graph=True), torch.autograd.grad(y, parameters)

    got = second(one), *twice(one)
    with op_by_op():
        want = second(other), *twice(other)
    for ours, theirs in zip(got, want, strict=True):
        assert [g is None for g in ours] == [g is None for g in theirs]
        assert_same(*([g for g in found if g is not None] for found in (ours, theirs)), exact=False)
    assert ran


def test_only_the_gradients_asked_for_are_made(monkeypatch):
    model = fastgan.convert(chain("discriminator"))
    made = []
    op = fastgan._op.OPS["conv2d_weight"]
    monkeypatch.setattr(op, "run", lambda *args, run=op.run: (made.append(1), run(*args))[1])
    x = inputs(torch.channels_last).requires_grad_()
    torch.autograd.grad(model(x * 1.0).sum(), x)
    assert not made
    for p in model.parameters():
        p.requires_grad_(False)
    model[0].weight.requires_grad_()
    model(x * 1.0).sum().backward()
    assert len(made) == 1 and model[0].weight.grad is not None


@pytest.mark.parametrize("what", ["parameter", "input", "output"])
def test_a_tensor_written_to_before_backward_is_an_error(what):
    model = fastgan.convert(chain("conv+act"))
    x = inputs(torch.channels_last).requires_grad_() * 1.0
    y = model(x)
    with torch.no_grad():
        {"parameter": model[0].weight, "input": x, "output": y}[what].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_a_pass_kept_goes_with_its_result():
    """The last activation's derivative reads the result, which must not keep itself alive."""
    model = fastgan.convert(chain("conv+act"))
    gc.collect()
    gc.disable()
    try:
        y = model(inputs(torch.channels_last))
        tape = weakref.ref(y.grad_fn.tape)
        assert isinstance(tape(), Tape)
        del y
        assert tape() is None
    finally:
        gc.enable()


def test_wrong_shapes_get_the_ops_sentences(ran):
    model = fastgan.convert(chain("generator"))
    with pytest.raises(ValueError, match="must have weight"):
        model(torch.randn(4, 5, 8, 8))
    with pytest.raises(ValueError, match="stat_groups must divide"):
        model[1].stat_groups = 3
        model(inputs(torch.channels_last))
    assert not ran


@pytest.mark.parametrize("case", ["checkpointed", "reference", "leaf", "float64", "watched"])
def test_what_runs_op_by_op(case, ran):
    model, x = fastgan.convert(chain("discriminator")), inputs(torch.channels_last)
    around = contextlib.nullcontext()
    if case == "checkpointed":
        around = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    elif case == "reference":
        around = fastgan.backend("reference")
    elif case == "leaf":
        x.requires_grad_()
    elif case == "float64":
        model, x = model.double(), x.double()
    elif case == "watched":
        around = fastgan.choice.watching(lambda *found: None)
    with around:
        model(x)
    assert not ran


def test_a_capture_takes_what_ran_before_it(ran, monkeypatch):
    """Nothing is chosen while a CUDA graph is captured, and nothing of that stays."""
    model = fastgan.convert(chain("discriminator"))
    model(inputs(torch.channels_last))
    monkeypatch.setattr(run, "capturing", lambda: True)
    model(inputs(torch.channels_last))
    model(inputs(torch.channels_last, batch=2))
    assert len(ran) == 2
    monkeypatch.setattr(run, "capturing", lambda: False)
    model(inputs(torch.channels_last, batch=2))
    assert len(ran) == 3


@pytest.fixture(params=["triton", "cuda"])
def emulator(request, monkeypatch):
    """A GPU's own kernels on the CPU; skips where no Triton or no pybind11 is installed, which the emulators need."""
    monkeypatch.setattr(STATE, "emulated", set())
    if request.param == "triton":
        pytest.importorskip("triton", "3.8", reason="triton 3.8 or newer is needed to emulate Triton kernels")
    try:
        with fastgan.testing.emulate(request.param):
            yield
    except RuntimeError as error:
        if "the CUDA emulator needs" not in str(error):
            raise
        pytest.skip(str(error))


def test_emulated_kernels(emulator):
    """Statistics from the convolution's epilogue included."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3, 2, 1, bias=False)
    )
    one, other = both(model)
    x = torch.randn(9, 3, 8, 8).contiguous(memory_format=torch.channels_last)  # 576 pixels: the epilogue pays
    got = outcome(one, x)
    assert any(isinstance(way, Launches) for s in one.forward._current() for way in s.run.ways.values())
    with op_by_op():
        want = outcome(other, x)
    assert_same((got[0], *got[1], *one.buffers()), (want[0], *want[1], *other.buffers()))


def launched(model, x, monkeypatch):
    """How many kernels of ours a forward and backward pass runs."""
    kernels, call = [], Core.call
    with monkeypatch.context() as patched:
        patched.setattr(
            Core, "call", lambda self, kernel, *args: (kernels.append(kernel), call(self, kernel, *args))[1]
        )
        y = model(x)
        y.backward(torch.ones_like(y))
    return len(kernels)


@pytest.mark.parametrize(
    "layout, programs, ops", [(LAYOUTS[0], 22, 46), (LAYOUTS[1], 21, 21)], ids=["nchw", "channels_last"]
)
def test_an_activation_in_nchw_is_not_turned_at_each_op(layout, programs, ops, monkeypatch):
    """Kernels of a discriminator's pass forward and back; the rest of the 46 are turns of activations."""
    model = fastgan.models.build("dcgan-64", d_width=8)[1].to(memory_format=layout)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=layout)
    with fastgan.backend("native"):
        assert launched(fastgan.convert(model), x, monkeypatch) == programs
        with op_by_op():
            assert launched(fastgan.convert(copy.deepcopy(model)), x, monkeypatch) == ops


def test_statistics_follow_in_as_many_launches_as_one(monkeypatch):
    model = fastgan.convert(chain("generator"))
    done = []
    monkeypatch.setattr(launches, "update_running", lambda *args: done.append(args))
    model(inputs(torch.channels_last))
    assert not done and all(int(n) == 1 for name, n in model.named_buffers() if "batches" in name)
