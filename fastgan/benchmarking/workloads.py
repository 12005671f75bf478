"""What ``fastgan bench`` times: a training step, a gradient penalty, generation, an op; each by every row.

A workload's `build(row)` gives two callables: `run` does the work once, `answer` does it from a fixed seed and returns
tensors by name, which must be those of eager float32 before the row is timed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_map_only

import fastgan
from fastgan import functional
from fastgan.benchmarking import textbook
from fastgan.benchmarking.comparison import Case, Runner, checked, measure
from fastgan.benchmarking.textbook import ACTIVATIONS, SCALE, SLOPE
from fastgan.domains import domain_of
from fastgan.models.wavegan import PhaseShuffle
from fastgan.training.assembly import assemble
from fastgan.training.recipes import Recipe
from fastgan.training.sampling import build_models, latents
from fastgan.training.step import PRECISIONS

SEED = 1
WARM_UP = {"cpu": 2, "cuda": 6}  # calls before the clock: a step is captured as a graph in its fourth
SETTLING = 10  # training forwards after which a fresh generator's running statistics are about those of its activations
OP_SHAPES = (  # DCGAN-64 at batch 64: D's layers, G's, two norms, the loss
    *("conv2d:64x3x64x64:64,4,2,1:leaky_relu", "conv2d:64x64x32x32:128,4,2,1", "conv2d:64x128x16x16:256,4,2,1"),
    *("conv2d:64x256x8x8:512,4,2,1", "conv2d:64x512x4x4:1,4", "conv_transpose2d:64x100x1x1:512,4"),
    *("conv_transpose2d:64x512x4x4:256,4,2,1", "conv_transpose2d:64x256x8x8:128,4,2,1"),
    *("conv_transpose2d:64x128x16x16:64,4,2,1", "conv_transpose2d:64x64x32x32:3,4,2,1:tanh"),
    *("bn_act:64x256x8x8:leaky_relu", "bn_act:64x64x32x32:relu", "gan_loss:64"),
)


@dataclass(frozen=True)
class Row:
    """One way to do the work; the defaults are those of tuned PyTorch."""

    name: str
    precision: str = "fp32"
    channels_last: bool = True
    compile: bool = False
    ours: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision] or torch.float32

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, PRECISIONS[self.precision], enabled=self.precision != "fp32")

    def place(self, value: Any, device: torch.device) -> Any:
        """A copy of a module or tensor in the row's layout; a tensor without 4 dimensions stays contiguous."""
        layered = not isinstance(value, Tensor) or value.dim() == 4
        layout = torch.channels_last if self.channels_last and layered else torch.contiguous_format
        return copy.deepcopy(value).to(device).to(memory_format=layout)


PLAIN = Row("eager", channels_last=False)
Build = Callable[[Row], tuple[Callable[[], object], Callable[[], dict[str, Tensor]]]]


def rows(precisions: Sequence[str]) -> list[Row]:
    """Every row of these precisions: PyTorch's, then fastgan's."""
    found = []
    for p in precisions:
        ending = "" if p == "fp32" else f"-{p}"
        found += [PLAIN, Row("eager-channels_last")] if p == "fp32" else [Row(p, p)]
        found += [Row(f"compile{ending}", p, compile=True), Row(f"fastgan{ending}", p, ours=True)]
    return sorted(found, key=lambda row: row.ours)


@dataclass(frozen=True)
class Workload:
    """What is timed; a result may differ by `tolerances` of its norm, in float32 and in 16 bits."""

    case: Case
    build: Build
    tolerances: tuple[float, float]
    layouts: bool = True  # whether channels_last is another layout


def compare(
    workload: Workload, rows: Sequence[Row], *, seconds: float, device: torch.device, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Check every row, time those that agree in turns: the case as JSON holds it, with a record a row."""
    if any(row.compile for row in rows):
        torch._dynamo.reset()  # or the workloads would be recompilations of one function, of which 8 are allowed
    progress("eager float32, the reference")
    want = workload.build(PLAIN)[1]()
    runners = {}
    for row in rows:
        if row.name == "eager-channels_last" and not workload.layouts:
            continue
        run, answer = workload.build(row)
        call = checked(run, want, workload.tolerances[row.precision != "fp32"], answer)
        runners[row.name] = Runner(call, dtype=str(row.dtype).removeprefix("torch."), ours=row.ours)
    case = workload.case
    place: dict[str, Any] = {"device": device.type, "warmup": WARM_UP[device.type]}
    found = measure(runners, seconds=seconds, ceilings=None, progress=progress, **place)
    return {"op": case.op, "id": str(case), "shape": case.shape, "direction": case.direction, "rows": found}


# ---- networks -------------------------------------------------------------------------------------------------------


def step(recipe: Recipe, device: torch.device) -> Workload:
    """A whole step of a recipe on random samples: GANStep as ``fastgan train`` runs it, and the textbook's.

    The answer is a first step at learning rate 0: its losses, and its gradients, which are in Adam's first moments.
    """
    networks, domain = build_models(recipe), domain_of(recipe)
    inputs = domain.inputs([domain.probe("cpu")] * recipe.d_steps)

    def build(row: Row) -> Any:
        one: Any
        mine = recipe.replace(precision=row.precision)
        g, d = (row.place(m, device) for m in networks)
        given = tree_map_only(Tensor, lambda x: row.place(x, device) if x.dim() == 4 else x.to(device), inputs)
        if row.ours:
            one = assemble(mine, device, networks=(g, d))[2]
            adams = [one.g_optimizer, one.d_optimizer]
            if row.precision == "fp16":
                scaled = {f"{name}_scaler": one.state_dict()[f"{name}_scaler"] | {"scale": SCALE} for name in "gd"}
                one.load_state_dict(one.state_dict() | scaled)
        else:
            options: Any = dict(betas=mine.betas, eps=mine.adam_eps, fused=row.channels_last or None)
            adams = [torch.optim.Adam(m.parameters(), lr, **options) for m, lr in ((g, mine.g_lr), (d, mine.d_lr))]
            one = textbook.textbook_step(mine, g, d, *adams, compile=row.compile)

        def answer() -> dict[str, Tensor]:
            with _still((g, d), adams):
                torch.manual_seed(SEED)
                found = one(*given)
            losses = [found[name].float() for name in ("d_loss", "g_loss", "penalty") if name in found]
            gradients = {f"{name}'s gradient": _moments(adam) for name, adam in zip("GD", adams, strict=True)}
            return {"the losses": torch.stack(losses), **gradients}

        return lambda: one(*given), answer

    # PyTorch's own bf16 is 0.15 off in G's gradient of DCGAN-64; one turned ReLU of a tiny network gave 4e-3 in float32
    return Workload(Case("step", recipe.name, _sizes(recipe)), build, (2e-2, 0.3))


def penalty(recipe: Recipe, device: torch.device) -> Workload:
    """The recipe's gradient penalty on its critic, alone, with its gradients for all parameters."""
    if recipe.penalty is None:
        raise ValueError(f"bench: penalty needs a recipe that has one, got {recipe.name}")
    kind, weight, sigma = recipe.penalty, textbook.penalty_weight(recipe), recipe.penalty_sigma
    critic, both = build_models(recipe)[1], [_images(recipe) for _ in range(2)]

    def build(row: Row) -> Any:
        d = row.place(critic, device)
        real, fake = (row.place(x, device) for x in both)
        function: Any = lambda real, fake, noise: textbook.penalty(d, real, fake, noise, kind, weight, sigma)
        if row.compile:
            function = textbook.compiled_double_backward(function)
        if row.ours:
            fastgan.convert(d)
            options: Any = dict(kind=kind, weight=weight, sigma=sigma)
            function = lambda real, fake, _: functional.gradient_penalty(d, real, fake, **options)

        def run() -> Tensor:
            d.zero_grad()
            noise = None if row.ours else textbook.penalty_noise(kind, real)
            with row.autocast(device):
                value: Tensor = function(real, fake, noise)
            value.backward()
            return value.detach()

        run = run if row.ours else textbook.plainly(run)

        def answer() -> dict[str, Tensor]:
            with _still([d]):
                torch.manual_seed(SEED)
                value = run()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in d.parameters()]
            return {"the penalty": value, "its gradient": torch.cat([g.flatten() for g in gradients])}

        return run, answer

    return Workload(Case("penalty", f"{kind} of {recipe.name}", _sizes(recipe)), build, (1e-3, 0.1))


def sample(recipe: Recipe, device: torch.device) -> Workload:
    """Generation in eval mode, latents to images."""
    domain_of(recipe).require_latents("bench: sample")
    generator, _ = build_models(recipe)
    with torch.no_grad():
        for _ in range(SETTLING):
            generator(torch.randn(16, recipe.latent))
    z = latents(recipe.batch_size, recipe.latent, seed=SEED).to(device)

    def build(row: Row) -> Any:
        network = row.place(generator, device).eval()
        network = fastgan.convert(network) if row.ours else textbook.compiled(network) if row.compile else network

        def run() -> Tensor:
            with torch.no_grad(), row.autocast(device):
                images: Tensor = network(z)
            return images

        run = run if row.ours else textbook.plainly(run)
        return run, lambda: {"the images": run()}

    return Workload(Case("sample", recipe.name, _sizes(recipe)), build, (1e-3, 5e-2))


@contextlib.contextmanager
def _still(networks: Sequence[nn.Module], adams: Sequence[torch.optim.Optimizer] = ()) -> Iterator[None]:
    """Within: no dropout, whose masks depend on the layout, no phase shuffle, which draws at every forward, and no
    learning: Adam's first step is the gradient's sign, which rounding turns where the gradient is near 0."""
    modules = [m for network in networks for m in network.modules()]
    dropouts = [(m, m.p) for m in modules if isinstance(m, _DropoutNd)]
    shuffles = [(m, m.n) for m in modules if isinstance(m, PhaseShuffle)]
    groups = [(group, group["lr"]) for adam in adams for group in adam.param_groups]
    for m, _ in dropouts:
        m.p = 0.0
    for shuffle, _ in shuffles:
        shuffle.n = 0
    for group, _ in groups:
        group["lr"] = 0.0
    yield
    for m, p in dropouts:
        m.p = p
    for shuffle, n in shuffles:
        shuffle.n = n
    for group, rate in groups:
        group["lr"] = rate


def _moments(adam: torch.optim.Optimizer) -> Tensor:
    """The first moments of all parameters in one vector, 0 where there was no gradient."""
    parameters = [p for group in adam.param_groups for p in group["params"]]
    return torch.cat([adam.state.get(p, {}).get("exp_avg", torch.zeros_like(p)).flatten() for p in parameters]).detach()


def _images(recipe: Recipe) -> Tensor:
    samples: Tensor = domain_of(recipe).probe("cpu")[0]
    return samples


def _sizes(recipe: Recipe) -> str:
    return "x".join(map(str, (recipe.batch_size, *domain_of(recipe).shape)))


# ---- single ops -----------------------------------------------------------------------------------------------------


def op(spec: str, device: torch.device) -> Workload:
    """One op, forward and backward, on tensors of the row's dtype; spec as in OP_SHAPES."""
    name, inputs, leaves, plain, ours = _parsed(spec)
    try:
        with torch.no_grad():
            like = plain(*(t.to("meta") for t in inputs))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"bench: --shape {spec} must be a case that PyTorch runs, got: {error}") from error
    cotangent = torch.randn(like.shape)

    def build(row: Row) -> Any:
        def moved(t: Tensor) -> Tensor:  # a norm's vectors are float32 beside 16-bit maps, as under autocast
            moved = row.place(t, device) if t.dim() == 4 else t.to(device, copy=True)
            return moved if name == "bn_act" and t.dim() == 1 else moved.to(row.dtype)

        arguments, dy = [moved(t) for t in inputs], moved(cotangent)
        wanted = [t.requires_grad_() for t in arguments[:leaves]]
        function = ours if row.ours else textbook.compiled(plain) if row.compile else plain

        def answer() -> dict[str, Tensor]:
            y = function(*arguments)
            gradients = torch.autograd.grad(y, wanted, dy)
            return {"the output": y.detach(), **{f"gradient {i}": g for i, g in enumerate(gradients)}}

        return lambda: torch.autograd.grad(function(*arguments), wanted, dy), answer

    return Workload(Case("op", spec, "forward+backward"), build, (1e-3, 5e-2), layouts=inputs[0].dim() == 4)


def _parsed(spec: str) -> tuple[str, list[Tensor], int, Callable[..., Tensor], Callable[..., Tensor]]:
    """(op, inputs, how many of them want gradients, PyTorch's function, fastgan's)."""
    name, *parts = spec.split(":")
    activation = parts.pop() if parts and parts[-1] in ACTIVATIONS else "identity"
    fused: dict[str, Any] = dict(activation=activation, negative_slope=SLOPE)
    act = ACTIVATIONS[activation]
    torch_op: Callable[..., Tensor]
    our_op: Callable[..., Tensor]
    with contextlib.suppress(ValueError, RuntimeError, IndexError, ZeroDivisionError):  # the text is none of these
        sizes, *numbers = [[int(v) for v in part.replace("x", ",").split(",")] for part in parts]
        x = torch.randn(sizes)
        if name in ("conv2d", "conv_transpose2d"):
            ((out, kernel, *further),), (_, channels, _, _) = numbers, sizes
            groups = further[3] if len(further) > 3 else 1  # torch's fourth argument after the bias, of either op
            pair = (out, channels // groups) if name == "conv2d" else (channels, out // groups)
            theirs, mine = getattr(F, name), getattr(functional, name)
            torch_op = lambda x, w: act(theirs(x, w, None, *further))
            our_op = lambda x, w: mine(x, w, None, *further, **fused)
            return name, [x, torch.randn(*pair, kernel, kernel) * 0.02], 2, torch_op, our_op
        if name == "bn_act" and not numbers:
            ones, zeros = torch.ones(sizes[1]), torch.zeros(sizes[1])
            torch_op = lambda x, w, b, mean, var: act(F.batch_norm(x, mean, var, w, b, training=True))
            our_op = lambda x, w, b, mean, var: functional.bn_act(x, mean, var, w, b, training=True, **fused)
            return name, [x, ones, zeros, zeros, ones], 3, torch_op, our_op
        if name == "gan_loss" and not numbers:
            torch_op = lambda fake, real: F.softplus(-real).mean() + F.softplus(fake).mean()
            our_op = lambda fake, real: functional.gan_loss(fake, real, kind="bce", side="d")
            return name, [x, torch.randn(sizes)], 2, torch_op, our_op
    raise ValueError(
        "bench: --shape of op must read conv2d:NxCxHxW:OUT,KERNEL[,STRIDE,PADDING,...][:ACTIVATION], the same of "
        f"conv_transpose2d, bn_act:NxCxHxW[:ACTIVATION] or gan_loss:N, with an activation of {', '.join(ACTIVATIONS)}; "
        f"got {spec!r}"
    )
