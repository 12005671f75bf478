"""fastgan.Adam is torch.optim.Adam: step by step, schedules, state; and moves a moving average on the way."""

import copy

import pytest
import torch
from checks import BACKENDS
from torch import nn

import fastgan
from fastgan.ops.adam import Numbers, op

SETTINGS = {
    "plain": {},
    "weight decay": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "maximise": {"maximize": True},
    "no momentum": {"betas": (0.0, 0.9), "eps": 1e-5},
}
SHAPES = [(7, 3, 4, 4), (64, 33), (5,), (3, 2, 3, 3), (70_001,)]


def parameters(dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in SHAPES]
    made[3] = made[3].contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(p) for p in made]


def give_gradients(step, *lists):
    for index, same in enumerate(zip(*lists, strict=True)):
        rng = torch.Generator().manual_seed(1000 * step + index)
        g = torch.randn(same[0].shape, generator=rng, dtype=torch.float64) * 10.0 ** (index - 2)
        for p in same:
            p.grad = torch.empty_like(p).copy_(g)


def assert_same(ours, theirs, rtol=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_follows_torch_step_by_step(settings, backend):
    ours, theirs = parameters(), parameters()
    adam, torchs = fastgan.Adam(ours, 0.01, **settings), torch.optim.Adam(theirs, 0.01, fused=True, **settings)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in (adam, torchs)]
    with fastgan.backend(backend):
        for step in range(12):
            give_gradients(step, ours, theirs)
            if step % 3 == 1:  # step counts then differ from parameter to parameter
                ours[2].grad = theirs[2].grad = None
            for optimizer in (adam, torchs, *schedules):
                optimizer.step()
            assert_same(ours, theirs)
    for p, q in zip(ours, theirs, strict=True):
        assert adam.state[p].keys() == torchs.state[q].keys() and adam.state[p]["step"] == torchs.state[q]["step"]
        assert_same(
            [adam.state[p][k] for k in ("exp_avg", "exp_avg_sq")],
            [torchs.state[q][k] for k in ("exp_avg", "exp_avg_sq")],
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_steps_are_exact(backend):
    """beta2 = 0.9999 leaves 1 - beta2^t at 1e-4: taken in float32 from powers it would be good to three digits."""
    exact, ours = parameters(torch.float64), parameters()
    adam, oracle = fastgan.Adam(ours, 0.1, betas=(0.999, 0.9999)), torch.optim.Adam(exact, 0.1, betas=(0.999, 0.9999))
    with fastgan.backend(backend):
        for step in range(3):
            give_gradients(step, ours, exact)
            adam.step(), oracle.step()
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b.detach(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_averages_follow(backend):
    plain, ours = parameters(), parameters()
    adam, alone = fastgan.Adam(ours, 0.01), fastgan.Adam(plain, 0.01)
    averages, want = [torch.zeros_like(p) for p in ours], [torch.zeros_like(p) for p in ours]
    with fastgan.backend(backend):
        for step in range(4):
            give_gradients(step, ours, plain)
            adam.step(averages=(left := dict(zip(ours, averages, strict=True))), weight=0.125), alone.step()
            assert not left
            torch._foreach_lerp_(want, [p.detach() for p in plain], 0.125)
            assert_same(ours, plain, rtol=0)
            assert_same(averages, want, rtol=1e-6)
        give_gradients(5, ours)
        ours[0].grad = None
        left = dict(zip(ours, averages, strict=True))
        adam.step(averages=left, weight=0.5)
        assert list(left) == [ours[0]]
        left = {ours[0]: averages[0]}  # not of all that are updated: left to the caller
        adam.step(averages=left, weight=0.5)
        assert list(left) == [ours[0]]


def test_state_goes_to_torch_and_back():
    ours, theirs = parameters(), parameters()
    adam, torchs = fastgan.Adam(ours, 0.01), torch.optim.Adam(theirs, 0.01)  # not fused: its counts are elsewhere
    for step in range(6):
        give_gradients(step, ours, theirs)
        adam.step(), torchs.step()
        if step == 2:
            states = copy.deepcopy(adam.state_dict()), copy.deepcopy(torchs.state_dict())
            torchs.load_state_dict(states[0]), adam.load_state_dict(states[1])
        assert_same(ours, theirs)
    again = copy.deepcopy(adam)
    assert type(again) is fastgan.Adam and again.param_groups[0]["fused"]


def test_groups_closures_and_rates_of_tensors():
    ours, theirs = parameters(), parameters()
    groups = lambda ps: [{"params": ps[:2], "lr": 0.1}, {"params": ps[2:], "weight_decay": 0.5}]
    adam = fastgan.Adam(groups(ours), torch.tensor(0.01))
    torchs = torch.optim.Adam(groups(theirs), 0.01, fused=True)
    for step in range(3):
        give_gradients(step, ours, theirs)

        def closure():
            assert torch.is_grad_enabled()
            return step  # noqa: B023

        assert adam.step(closure) == step
        torchs.step()
        assert_same(ours, theirs)


def test_other_types_and_layouts_take_the_reference():
    for dtype in (torch.float64, torch.bfloat16):
        ours, theirs = parameters(dtype), parameters(dtype)
        adam, torchs = fastgan.Adam(ours, 0.01), torch.optim.Adam(theirs, 0.01, fused=True)
        give_gradients(0, ours, theirs)
        adam.step(), torchs.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    p = [torch.randn(4, 3, 2, 2)]
    args = (
        p,
        [p[0].contiguous(memory_format=torch.channels_last)],
        p,
        p,
        [torch.zeros(())],
        [],
        Numbers(0.1, 0.9, 0.999, 1e-8, 0.0, False, False),
    )
    assert "one dense layout" in op.backends["native"].declines(*args)
    assert "no gradient scale" in op.backends["native"].declines(*args[:6], args[6]._replace(found_inf=p[0]))


def test_compiled_it_is_torchs():
    ours, theirs = parameters(), parameters()
    adam, torchs = fastgan.Adam(ours, 0.01), torch.optim.Adam(theirs, 0.01, fused=True)
    step = torch.compile(lambda: adam.step(), backend="aot_eager")
    for index in range(2):
        give_gradients(index, ours, theirs)
        step(), torchs.step()
        assert_same(ours, theirs)


def test_gradient_scalers_skip_what_is_not_finite():
    p, averages = [nn.Parameter(torch.ones(3))], [torch.zeros(3)]
    adam, scaler = fastgan.Adam(p, 0.5), torch.amp.GradScaler("cpu", init_scale=4.0)
    for gradient, want in ((4.0, 0.5), (float("inf"), 0.5)):
        p[0].grad = torch.full((3,), gradient)
        scaler.scale(torch.ones(()))
        scaler.step(adam, averages=dict(zip(p, averages, strict=True)), weight=0.5)
        scaler.update()
        torch.testing.assert_close(p[0].detach(), torch.full((3,), want))
    assert adam.state[p[0]]["step"] == 1.0


@pytest.mark.gpu
def test_on_a_gpu():
    ours, theirs = ([nn.Parameter(p.detach().cuda()) for p in parameters()] for _ in range(2))
    adam, torchs = fastgan.Adam(ours, 0.01), torch.optim.Adam(theirs, 0.01, fused=True)
    averages, want = [torch.zeros_like(p) for p in ours], [torch.zeros_like(p) for p in ours]
    for step in range(5):
        give_gradients(step, ours, theirs)
        adam.step(averages=dict(zip(ours, averages, strict=True)), weight=0.25), torchs.step()
        torch._foreach_lerp_(want, [p.detach() for p in theirs], 0.25)
        assert_same([*ours, *averages], [*theirs, *want])


def test_refusals():
    p = nn.Parameter(torch.ones(3))
    adam = fastgan.Adam([p])
    p.grad = torch.sparse_coo_tensor([[1]], [1.0], (3,), check_invariants=True)
    with pytest.raises(RuntimeError, match="gradients must be dense"):
        adam.step()
    adam.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad must be off"):
        adam.step()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_with_an_average_has_the_numbers_of_torchs(precision):
    def trained(make):
        torch.manual_seed(0)
        g, d = fastgan.models.build("dcgan-28", g_width=8, d_width=8)
        step = fastgan.GANStep(
            g,
            d,
            latent=100,
            g_optimizer=make(g.parameters()),
            d_optimizer=make(d.parameters()),
            ema=0.5,
            precision=precision,
        )
        for _ in range(3):
            step(torch.rand(4, 1, 28, 28))
        return [*g.state_dict().values(), *step.ema.state_dict().values()]

    with fastgan.racing(False):
        ours = trained(lambda p: fastgan.Adam(p, 1e-3, betas=(0.5, 0.999), eps=1e-3))
        theirs = trained(lambda p: torch.optim.Adam(p, 1e-3, betas=(0.5, 0.999), eps=1e-3, fused=True))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
