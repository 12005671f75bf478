"""Both routes to an op give the same numbers; tracing, autocast and refusals work for every op."""

import pytest
import torch
from checks import BACKENDS, distance
from torch import nn

import fastgan
from fastgan import _native, functional
from fastgan._op import OPS, PERIOD


def sample(name):
    """The op's example, with gradients asked of every tensor but statistics (constants of their x), masks and the
    filters that an op refuses to learn."""
    op = OPS[name]
    constant = ("mean", "var", "signs", "fu", "fd")
    leaves = [] if name.endswith("_double_backward") else [n for n in op.names if n not in constant]
    return tuple(
        a.requires_grad_() if isinstance(a, torch.Tensor) and n in leaves else a
        for n, a in zip(op.names, op.example(), strict=True)
    )


def flat(out):
    return list(out) if isinstance(out, tuple) else [out]


def gradients(out, args):
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    total = sum((o * torch.arange(1, o.numel() + 1).view(o.shape).sin()).sum() for o in flat(out) if o.requires_grad)
    if not leaves:
        return []
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_thin_route_equals_library_route(name, backend):
    args, op = sample(name), OPS[name]
    with fastgan.backend(backend):
        thin, library = op(*args), op.overload(*args)
        for a, b in zip(flat(thin), flat(library), strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()
        for a, b in zip(gradients(thin, args), gradients(library, args), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPS)
def test_meta_tensors_have_shapes(name):
    """`fastgan train` counts a recipe's memory so; torch.is_autocast_enabled raises for this device."""
    args = sample(name)
    want = flat(OPS[name](*args))
    got = flat(OPS[name](*(a.detach().to("meta") if isinstance(a, torch.Tensor) else a for a in args)))
    assert all(a.is_meta and a.shape == b.shape and a.dtype == b.dtype for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, channels_last):
    args = [
        a.detach().contiguous(memory_format=torch.channels_last).requires_grad_(a.requires_grad)
        if channels_last and isinstance(a, torch.Tensor) and a.dim() == 4
        else a
        for a in sample(name)
    ]
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    with fastgan.backend("reference"):
        torch.library.opcheck(OPS[name].overload, tuple(args), test_utils=tests)


@pytest.mark.parametrize("name", [n for n in OPS if not n.endswith("_double_backward")])
def test_compiles_without_graph_breaks(name):
    args, op = sample(name), OPS[name]
    leaves = [a for a in args if isinstance(a, torch.Tensor)]

    def run(*tensors):
        it = iter(tensors)
        return op(*(next(it) if isinstance(a, torch.Tensor) else a for a in args))

    torch._dynamo.reset()  # one code object, many ops: its recompile limit is 8
    with fastgan.backend("reference"):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
        eager = run(*leaves)
    for a, b in zip(flat(compiled), flat(eager), strict=True):
        assert distance(a.detach(), b.detach()) < 1e-6
    for a, b in zip(gradients(compiled, args), gradients(eager, args), strict=True):
        assert distance(a, b) < 1e-5


def test_native_layouts_match_the_fake():
    """What torch.compile believes about strides is what kernels return, for both layouts."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for name in OPS:
        for layout in (torch.contiguous_format, torch.channels_last):
            args = [
                a.detach().contiguous(memory_format=layout)
                if isinstance(a, torch.Tensor) and a.dim() == 4
                else a.detach()
                if isinstance(a, torch.Tensor)
                else a
                for a in sample(name)
            ]
            real = flat(OPS[name](*args))
            with FakeTensorMode(allow_non_fake_inputs=False) as mode:
                fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
                for r, f in zip(real, flat(OPS[name](*fakes)), strict=True):
                    assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype), name


class Cut(torch.autograd.Function):
    """The identity, which gives its input no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


@pytest.mark.parametrize("name", ["bn_act", "gn_act", "gan_loss", "attention"])
def test_an_output_without_cotangent_gives_none(name):
    op, args = OPS[name], [a.detach() if isinstance(a, torch.Tensor) else a for a in sample(name)]
    x = args[0].requires_grad_()
    (Cut.apply(op(*args)[0]).sum() + x.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_follows_torch(backend):
    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    bn = torch.nn.BatchNorm2d(4)
    with fastgan.backend(backend), torch.autocast("cpu", torch.bfloat16):
        y = functional.conv2d(x, w)
        z = functional.bn_act(y, None, None, bn.weight, bn.bias, training=True)
        loss = functional.gan_loss(z, z, kind="bce", side="d")
        assert (y.dtype, z.dtype, loss.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        assert y.dtype == torch.nn.functional.conv2d(x, w).dtype and bn(y).dtype == z.dtype
    assert distance(y, torch.nn.functional.conv2d(x, w)) < 1e-2


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", ["conv2d", "bn_act", "gn_act", "bias_act", "gan_loss", "interpolate"])
def test_forward_mode_and_functorch_raise(name):
    op, args = OPS[name], [a.detach() if isinstance(a, torch.Tensor) else a for a in sample(name)]
    run = lambda x: flat(op(x, *args[1:]))[0].sum()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(args[0], torch.ones_like(args[0]))
        with pytest.raises(NotImplementedError, match=f"{name}: forward-mode"):
            run(dual)
    with pytest.raises(NotImplementedError, match=f"{name}: torch.func"):
        torch.func.grad(run)(args[0])
    with pytest.raises(NotImplementedError, match=f"{name}: torch.func"):
        torch.func.jvp(run, (args[0],), (args[0],))


def test_outputs_are_written_completely(monkeypatch):
    """Native kernels write every element: outputs start as NaN."""
    if "native" not in BACKENDS:
        pytest.skip("fastgan._C is not built here")
    real_empty, real_like, real_new = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poison(t):
        return t.fill_(float("nan")) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(real_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(real_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(real_new(*a, **k)))
    with fastgan.backend("native"), torch.no_grad():
        for name in OPS:
            for out in flat(OPS[name](*sample(name))):
                assert out.isfinite().all(), name


@pytest.mark.parametrize("name", sorted(OPS))
def test_tensors_of_two_devices_are_refused(name):
    args = OPS[name].example()
    tensors = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
    for i in tensors if len(tensors) > 1 else ():
        moved = [a.to("meta") if j == i else a for j, a in enumerate(args)]
        with pytest.raises(
            ValueError, match=rf"{name}: \w+ must be on (cpu|meta), as \w+ is, got (cpu|meta); move one"
        ):
            OPS[name](*moved)


@pytest.mark.parametrize("place", [(0, "weight"), (0, "bias"), (1, "weight"), (1, "running_mean")])
@pytest.mark.parametrize("training", [True, False])
def test_a_chain_whose_tensors_were_moved_apart_is_refused(place, training):
    """Its kernels would read another device's memory at this one's addresses."""
    index, name = place
    chain = fastgan.convert(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(0.2))).train(training)
    x = torch.randn(2, 4, 8, 8)
    with fastgan.backend("native"), torch.no_grad():
        chain(x)
        t = getattr(chain[index], name)
        moved = t.detach().to("meta")
        setattr(chain[index], name, nn.Parameter(moved) if isinstance(t, nn.Parameter) else moved)
        with pytest.raises((ValueError, RuntimeError), match=r"must be on|have shape .* on cpu|expected device"):
            chain(x)


def test_the_native_core_takes_no_address_of_another_device():
    core, x, moved = _native.CPU.module(), torch.randn(6), torch.randn(6, device="meta")
    with pytest.raises(ValueError, match="relayout: x must be on the CPU, as the others are, got meta; move it"):
        core.relayout(0, 0, moved, x, 1, 2, 3, 1)
    program = core.Program()
    with pytest.raises(ValueError, match=r"a converted chain: every tensor must be on the CPU.*got meta"):
        program.run(1, x, moved)


def test_drawn_arguments_keep_layouts_and_repeat_long_noise():
    """What proofs and races run on: normal, of the call's shapes and strides, each argument other numbers."""
    x = torch.empty(3, 50, 40, 30, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.empty(7, 50, 3, 3), torch.empty(1).expand(120_000)
    options = [1, 1], [0, 0], [1, 1], 1, "relu", 0.0
    drawn = OPS["conv2d"].drawn((x, weight, bias, *options))
    assert drawn[3:] == options and drawn[0].stride() == x.stride() and drawn[2].is_contiguous()
    for found, given in zip(drawn[:3], (x, weight, bias), strict=True):
        assert (found.shape, found.dtype) == (given.shape, given.dtype)
        assert abs(found.float().mean()) < 0.1 and abs(found.float().std() - 1) < 0.05
    memory = drawn[0].as_strided((x.numel(),), (1,))
    assert torch.equal(memory[PERIOD:], memory[:-PERIOD]) and not torch.equal(memory[1000:2000], memory[:1000])
    assert not torch.equal(drawn[2][:1000].bfloat16(), memory[:1000])
    assert torch.equal(OPS["conv2d"].drawn((x, weight, None, *options))[0], drawn[0])  # the same each time
