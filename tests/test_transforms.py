"""Converted networks under torch.func, forward mode, batches of cotangents and derivatives beyond the second."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch.autograd import functional as AF

import fastgan


class Traced(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(2, 3, 3, padding=1), nn.InstanceNorm2d(3), nn.Conv2d(3, 1, 4)

    def forward(self, x):
        return self.last(F.leaky_relu(self.norm(self.conv(x)), 0.2)).flatten(1)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.dropout, self.last = nn.MultiheadAttention(8, 2), nn.Dropout(0.5), nn.Linear(8, 1)

    def forward(self, x):
        x = x.flatten(1).view(-1, 4, 8)
        return self.last(self.dropout(self.attention(x, x, x, need_weights=False)[0]).mean(1))


def chain(*layers):
    return nn.Sequential(*layers, nn.Flatten())


NETWORKS = {
    "convolutions": lambda: chain(nn.Conv2d(2, 3, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(3, 1, 4)),
    "group norm": lambda: chain(
        *(nn.Conv2d(2, 4, 3, 2, 1), nn.GroupNorm(2, 4), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 2), nn.Tanh())
    ),
    "batch norm": lambda: chain(
        *(nn.ConvTranspose2d(2, 3, 4, 2, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 1, 8), nn.Sigmoid())
    ).eval(),
    "traced": Traced,
    "attention": lambda: Attending().eval(),
}
N = 3
X = torch.randn(N, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def pair(name, dtype):
    torch.manual_seed(0)
    plain = NETWORKS[name]().to(dtype)
    ours = fastgan.convert(copy.deepcopy(plain))
    for _ in range(3):  # programs and traces are there
        ours(X.to(dtype))
        ours(X.to(dtype).requires_grad_()).sum().backward()
    ours.zero_grad()
    return plain, ours


def jvp(model, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.cos()))).tangent


def hessian_product(model, x):
    """Forward over reverse."""
    with forward_ad.dual_level():
        x = forward_ad.make_dual(x.clone().requires_grad_(), x.cos())
        (gradient,) = torch.autograd.grad(model(x).pow(3).sum(), x)
        return forward_ad.unpack_dual(gradient).tangent


def cubes(model):
    return lambda x: model(x).pow(3).sum()


def of_parameters(model, x):
    call = lambda p: torch.func.functional_call(model, p, (x,)).pow(3).sum()
    return list(torch.func.grad(call)(dict(model.named_parameters())).values())


TRANSFORMS = {
    "grad": lambda model, x: torch.func.grad(cubes(model))(x),
    "grad of parameters": of_parameters,
    "vmap of grad": lambda model, x: torch.func.vmap(torch.func.grad(lambda x: cubes(model)(x[None])))(x),
    "jacrev of jacrev": lambda model, x: torch.func.jacrev(torch.func.jacrev(cubes(model)))(x),
    "hessian": lambda model, x: torch.func.hessian(cubes(model))(x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x.cos(),))[1],
    "forward mode": jvp,
    "forward over reverse": hessian_product,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.*torch.jit.script:DeprecationWarning")
def test_transforms_find_plain_pytorch(name, transform):
    """To the bit: they run torch's own ops. What PyTorch has no rule for raises as it does there."""
    plain, ours = pair(name, torch.float64)
    run = TRANSFORMS[transform]
    try:
        expected = run(plain, X.double())
    except (RuntimeError, NotImplementedError) as error:
        assert (name, transform) == ("group norm", "forward over reverse") or name == "attention"
        with pytest.raises(type(error)) as ours_too:
            run(ours, X.double())
        assert str(ours_too.value) == str(error)
        return
    torch.testing.assert_close(run(ours, X.double()), expected, rtol=0, atol=0)


def test_a_batch_norm_in_groups_refuses_transforms():
    """Torch's own has one group: its numbers would be others."""
    ours = fastgan.convert(chain(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU()))
    ours[1].stat_groups = N
    with pytest.raises(NotImplementedError, match=r"bn_act: torch\.func transforms"):
        torch.func.vjp(ours, X)


def batched(model, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(
        model(x), [x, *model.parameters()], torch.eye(N, dtype=x.dtype).unsqueeze(-1), is_grads_batched=True
    )


BATCHES = {
    "gradients": batched,
    "jacobian": lambda model, x: AF.jacobian(model, x, vectorize=True),
    "hessian": lambda model, x: AF.hessian(cubes(model), x, vectorize=True),
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batches_of_cotangents_go_through_the_ops_one_by_one(name, batch, backend):
    """Kernels would read a batch as one cotangent."""
    with fastgan.backend(backend):
        plain, ours = pair(name, torch.float32)
        found = BATCHES[batch](ours, X)
        exact = plain.double()
        one_by_one = {
            "gradients": lambda: [
                torch.stack(g)
                for g in zip(
                    *(torch.autograd.grad(y, [x, *exact.parameters()], retain_graph=True) for y in exact(x)),
                    strict=True,
                )
            ],
            "jacobian": lambda: AF.jacobian(exact, x),
            "hessian": lambda: AF.hessian(cubes(exact), x),
        }
        x = X.double().requires_grad_()
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            expected = one_by_one[batch]()
    for a, b in zip(*(t if isinstance(t, list | tuple) else [t] for t in (found, expected)), strict=True):
        torch.testing.assert_close(a.double(), b.detach(), rtol=1e-4, atol=1e-5)


def penalties_gradient(model, x):
    """The third derivative: of an R1 penalty's gradient."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(3).sum(), x, create_graph=True)
    return torch.autograd.grad(second.square().sum(), [x, *model.parameters()], allow_unused=True)


def penalty_of_a_jacobian(model, x):
    x = x.clone().requires_grad_()

    def penalty(x):
        (gradient,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
        return gradient.square().flatten(1).sum(1)

    jacobian = AF.jacobian(penalty, x, create_graph=True)
    return torch.autograd.grad(jacobian.square().sum(), x)


@pytest.mark.parametrize("third", [penalties_gradient, penalty_of_a_jacobian])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_third_derivative_is_exact_or_one_sentence(name, third):
    with fastgan.backend("reference"):
        plain, ours = pair(name, torch.float64)
        if name in ("group norm", "traced", "attention"):
            with pytest.raises(
                NotImplementedError, match=r"^\w+_double_backward: derivatives of this order are not .*"
            ):
                third(ours, X.double())
            return
        for a, b in zip(third(ours, X.double()), third(plain, X.double()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
