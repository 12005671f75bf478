"""The plain PyTorch that fastgan is compared with: training steps and gradient penalties as their sources write them.

No kernel of fastgan runs here: networks that call its functions run on their PyTorch formulas (`plainly`). The step
takes any recipe and does the mathematics of `GANStep`: PyTorch's DCGAN example where the recipe has nothing more, with
the penalties, critic steps and averaged generator of those that have.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan._logits import logits_of
from fastgan.choice import backend
from fastgan.domains import domain_of
from fastgan.ops.gan_loss import formula
from fastgan.penalties.gradient import APPROXIMATE
from fastgan.training.ema import EMA
from fastgan.training.outputs import Outputs
from fastgan.training.recipes import Recipe
from fastgan.training.schedules import average_decay
from fastgan.training.step import PENALTY_WEIGHTS, PRECISIONS

SLOPE = 0.2
# Of fp16 losses. With torch's 65536 the first update of DCGAN-64's G overflows, and a skipped update is less work.
SCALE = 1024.0
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda t: t,
    "relu": lambda t: torch.relu_(t),
    "leaky_relu": lambda t: F.leaky_relu_(t, SLOPE),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
# D's loss is a mean over real logits plus one over fake ones; each goes backward by itself, as in the DCGAN example
TERMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "bce": (lambda r: F.softplus(-r), F.softplus),
    "minimax": (lambda r: F.softplus(-r), F.softplus),
    "lsgan": (lambda r: 0.5 * (r - 1).square(), lambda f: 0.5 * f.square()),
    "hinge": (lambda r: F.relu(1 - r), lambda f: F.relu(1 + f)),
    "wasserstein": (lambda r: -r, lambda f: f),
}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile at the first call, so that a machine where it fails has a failed row; static shapes, as tuned."""
    made: list[Callable[..., Any]] = []

    def call(*arguments: Any) -> Any:
        if not made:
            made.append(torch.compile(function, dynamic=False))
        return made[0](*arguments)

    return call


def compiled_double_backward(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a function that calls autograd.grad, which torch 2.13 learnt to trace."""
    call = compiled(function)

    def traced(*arguments: Any) -> Any:
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            return call(*arguments)

    return traced


def plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function; fastgan's ops that a network calls run on the backend "reference", which is PyTorch's ops."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        with backend("reference"):
            return function(*arguments)

    return run


# ---- penalties ------------------------------------------------------------------------------------------------------


def logits_and_norms(d: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, squared norms of each sample's gradient), by double backward."""
    x = x.detach().requires_grad_(True)
    logits = d(x)
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return logits, gradient.float().flatten(1).square().sum(1)


def penalty_weight(recipe: Recipe) -> float:
    return PENALTY_WEIGHTS[recipe.penalty or ""] if recipe.penalty_weight is None else recipe.penalty_weight


def penalty_noise(kind: str, real: Tensor) -> Tensor | None:
    """What a penalty draws; apart from it, since compiled code has random numbers of its own."""
    if kind in APPROXIMATE:
        return torch.randn_like(real)
    shape = {"wgan-gp": (len(real), *[1] * (real.dim() - 1)), "dragan": real.shape}.get(kind)
    return None if shape is None else torch.rand(shape, device=real.device)


def penalty(
    d: nn.Module, real: Tensor, fake: Tensor, noise: Tensor | None, kind: str, weight: float, sigma: float
) -> Tensor:
    """The penalty of that kind (`functional.gradient_penalty`), differentiable."""
    if noise is None:
        at = {"r1": [real], "r2": [fake], "r1r2": [real, fake]}[kind]
        return weight / 2 * torch.stack([logits_and_norms(d, x)[1].mean() for x in at]).sum()
    if kind in APPROXIMATE:
        x = fake.to(real.dtype) if kind == "r2-approximate" else real
        moved, here = (d(y).float().reshape(len(y), -1).sum(1) for y in (x + sigma * noise, x))
        return weight / 2 * ((moved - here) / sigma).square().mean()
    points = torch.lerp(fake.to(real.dtype), real, noise) if kind == "wgan-gp" else real + 0.5 * real.std() * noise
    return weight * (logits_and_norms(d, points)[1].sqrt() - 1).square().mean()


# ---- the step -------------------------------------------------------------------------------------------------------


def textbook_step(
    recipe: Recipe,
    g: nn.Module,
    d: nn.Module,
    g_adam: torch.optim.Optimizer,
    d_adam: torch.optim.Optimizer,
    *,
    compile: bool = False,
) -> Callable[..., dict[str, Tensor]]:
    """The loop body of a recipe: what `fastgan.GANStep` is called with -> losses by name. They are float32.

    real, labels and z are sequences of d_steps, or real is one batch that serves all updates. labels: what both
    networks are given. z: None draws it.
    compile: the networks' forward passes, with their backward, are torch.compile's; a penalty's double backward is not.
    """
    device, dtype = next(g.parameters()).device, PRECISIONS[recipe.precision]
    g_forward, d_forward = (compiled(g), compiled(d)) if compile else (g, d)
    scaling: Any = dict(init_scale=SCALE, enabled=recipe.precision == "fp16")
    g_scaler, d_scaler = (torch.amp.GradScaler(device.type, **scaling) for _ in range(2))
    decay = average_decay(recipe, 1 << 30)  # that of a run without end: the ramp changes numbers, not the work
    average = None if decay is None else EMA(g, decay)
    updates, g_updates, every = itertools.count(), itertools.count(), recipe.penalty_every

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype, enabled=dtype is not None)

    own = domain_of(recipe).step(g, d)
    extra, extra_every = own.get("extra_g_loss"), own.get("extra_g_every", 1)
    history = own.get("history") or (lambda images: images)
    for name in getattr(extra, "calls", ()) if compile else ():
        getattr(g, name).compile(dynamic=False)

    def outputs(images: Tensor, told: tuple[Tensor, ...]) -> Any:
        with autocast():
            return d_forward(images, *told)

    def floats(output: Any) -> list[Tensor]:
        return [t.float() for t in logits_of(output)]

    def logits(images: Tensor, told: tuple[Tensor, ...]) -> list[Tensor]:
        return floats(outputs(images, told))

    def total(term: Callable[..., Tensor], *scales: list[Tensor]) -> Tensor:
        values = [term(*scale) for scale in zip(*scales, strict=True)]
        return values[0] if len(values) == 1 else torch.stack(values).sum()

    def generated(n: int, z: Any, told: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        z = torch.randn(n, recipe.latent, device=device) if z is None else z
        inputs = z if isinstance(z, tuple) else (z,)
        with autocast():
            images: Tensor = g_forward(*inputs, *told)
        return images, inputs

    def backward(loss: Tensor, scaler: torch.amp.GradScaler) -> Tensor:
        scaler.scale(loss).backward()
        return loss.detach()

    def update_d(
        real: Tensor, told: tuple[Tensor, ...], z: Any, last: bool
    ) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor]]:
        """One update; the fake images carry their graph where G's update follows. Their latents come along."""
        d_adam.zero_grad()
        terms = TERMS.get(recipe.loss)
        side = lambda f, x: backward(total(lambda t: f(t).mean(), logits(x, told)), d_scaler)
        loss = side(terms[0], real) if terms else torch.zeros((), device=device)
        with torch.set_grad_enabled(last):
            fake, z = generated(len(real), z, told)
        judged = history(fake.detach())
        if terms:
            loss = loss + side(terms[1], judged)
        else:
            on_real = logits(real, told)
            pairs = logits(judged, told), on_real
            loss = backward(total(lambda f, r: formula(f, r, recipe.loss, "d", 0.0), *pairs), d_scaler)
        metrics = {"d_loss": loss}
        if recipe.penalty and next(updates) % every == 0:
            noise = penalty_noise(recipe.penalty, real)
            with autocast():
                value = penalty(
                    d, real, judged, noise, recipe.penalty, every * penalty_weight(recipe), recipe.penalty_sigma
                )
            metrics["penalty"] = backward(value, d_scaler)
        d_scaler.step(d_adam)
        d_scaler.update()
        return fake, z, metrics

    def step(
        real: Tensor | Sequence[Tensor], labels: Sequence[Tensor] | None = None, z: Any = None
    ) -> dict[str, Tensor]:
        real = [real] * recipe.d_steps if isinstance(real, Tensor) else real
        for i in range(recipe.d_steps):
            told, given = () if labels is None else (labels[i],), None if z is None else z[i]
            fake, drawn, metrics = update_d(real[i], told, given, last=i == recipe.d_steps - 1)
        g_adam.zero_grad()
        d_real = None
        if recipe.loss == "relativistic" or (extra is not None and getattr(extra, "reads_d_real", True)):
            with torch.no_grad():
                d_real = outputs(real[-1], told)
        d_fake = outputs(fake, told)
        scales = (floats(d_fake), floats(d_real)) if recipe.loss == "relativistic" else (floats(d_fake),)
        loss = total(lambda f, r=None: formula(f, r, recipe.loss, "g", 0.0), *scales)
        metrics["g_loss"] = loss.detach()
        if extra is not None and next(g_updates) % extra_every == 0:
            latents = drawn[0] if len(drawn) == 1 else drawn
            with autocast():
                value = extra(Outputs(real[-1], fake, d_real, d_fake, told[0] if told else None, latents))
            loss = loss + extra_every * value
        backward(loss, g_scaler)
        g_scaler.step(g_adam)
        g_scaler.update()
        if average is not None:
            average.update(g)
        return metrics

    return plainly(step)
