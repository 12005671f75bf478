"""The GPU route of every op and of the step on a device that is not there; run as a program, by test_fake_gpu.py.

A Python backend named "fgpu" under FakeTensorMode has shapes, strides, dtypes, devices, autograd and torch.compile, and
no data: whatever reads a value back or touches the CPU shows itself. Fake tensors on "cuda" would abort a torch without
CUDA at the first autograd node, and the registration cannot be undone, hence a process of its own.

    python fake_gpu.py CHECK    prints one line "name<TAB>result" a case; result is "ok" or what went wrong
"""

import sys
import traceback
import warnings
from contextlib import nullcontext

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("fgpu")
warnings.simplefilter("ignore")

# torch lacks an autocast fallback for such a backend, a list of its autocast dtypes, and a meta kernel of fused Adam
# with its rate in a tensor
META = torch.library.Library("aten", "IMPL", "Meta")
AUTOCAST = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
AUTOCAST.fallback(torch.library.fallthrough_kernel)
META.impl("_fused_adam_.tensor_lr", lambda *args, **options: None)
torch.fgpu.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]

import fastgan  # noqa: E402
from fastgan._op import LIBRARY, OPS, _autocast  # noqa: E402
from fastgan.training.capture import _Rates  # noqa: E402
from fastgan.training.recording import Recording, difference  # noqa: E402

DEVICE = torch.device("fgpu")
FAKE = FakeTensorMode()
for op in OPS.values():
    LIBRARY.impl(op.name, _autocast(op.overload, op.autocast, "fgpu"), "AutocastPrivateUse1")
CONSTANT = ("mean", "var", "norm", "fu", "fd")  # statistics: constants of their x; filters that no op differentiates by


def report(name, check, *args):
    try:
        found = check(*args)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        found = f"{type(error).__name__} at {last.name}: {' '.join(str(error).split())[:200]}"
    print(f"{name}\t{found or 'ok'}", flush=True)


def flat(out):
    return list(out) if isinstance(out, tuple) else [out]


def arguments(op):
    names = [a.name for a in op.overload._schema.arguments]
    learnt = () if op.name.endswith("_double_backward") else [n for n in names if n not in CONSTANT]
    made = []
    for name, a in zip(names, op.example(), strict=True):
        if isinstance(a, torch.Tensor):
            a = torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=DEVICE)
            a.requires_grad_(name in learnt and a.is_floating_point())
        made.append(a)
    return made


def misplaced(tensors, what):
    wrong = [t.device.type for t in tensors if t is not None and t.device.type != "fgpu"]
    return f"{what} is on {wrong[0]}" if wrong else ""


# ---- checks ---------------------------------------------------------------------------------------------------------


def forward_and_derivatives(op):
    """Both orders, on the device, with the reference's shapes and dtypes."""
    with FAKE:
        args = arguments(op)
        outs = flat(op(*args))
        with torch.no_grad():
            want = flat(op.reference(*(a.detach() if isinstance(a, torch.Tensor) else a for a in args)))
    for got, expected in zip(outs, want, strict=True):
        if (got.shape, got.dtype, got.stride()) != (expected.shape, expected.dtype, expected.stride()):
            return f"fake says {got.shape} {got.stride()}, the reference {expected.shape} {expected.stride()}"
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    if not leaves:
        return misplaced(outs, "an output")
    with FAKE:
        args = arguments(op)
        leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
        outs = [o for o in flat(op(*args)) if o.requires_grad]
        first = torch.autograd.grad([o.sum() for o in outs], leaves, create_graph=True, allow_unused=True)
        again = [g for g in first if g is not None and g.requires_grad]
        second = []
        if again and not op.name.endswith("_backward"):
            second = torch.autograd.grad([g.square().sum() for g in again], leaves, allow_unused=True)
        for leaf, g in zip([*leaves, *leaves], [*first, *second], strict=False):
            if g is not None and (g.shape, g.dtype) != (leaf.shape, leaf.dtype):
                return f"a derivative is {tuple(g.shape)} {g.dtype}, its leaf {tuple(leaf.shape)} {leaf.dtype}"
    return misplaced([*outs, *first, *second], "a result")


def compiled(op):
    with FAKE:
        args = arguments(op)
        run = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
        outs = flat(run(*args))
        learnt = [o.sum() for o in outs if o.requires_grad]
        leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
        found = torch.autograd.grad(learnt, leaves, allow_unused=True) if learnt else []
        return misplaced([*outs, *found], "a result")


def autocast(op):
    """The CUDA rule: dispatched on fake CUDA tensors, without gradients (see above)."""
    with FAKE, torch.no_grad():
        args = [torch.empty_like(a, device="cuda") if isinstance(a, torch.Tensor) else a for a in op.example()]
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            got = flat(op.overload(*args))
        finally:
            torch.set_autocast_enabled("cuda", False)
        dtype = {"lower": torch.bfloat16, "float32": torch.float32, "first": None}[op.autocast]
        cast = [a.to(dtype) if dtype and isinstance(a, torch.Tensor) else a for a in args]
        want = flat(op.overload(*cast))
    return "" if [t.dtype for t in got] == [t.dtype for t in want] else f"{[t.dtype for t in got]}"


def networks():
    g = nn.Sequential(
        nn.ConvTranspose2d(5, 8, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 2, 4, 2, 1), nn.Tanh()
    )
    d = nn.Sequential(
        nn.Conv2d(2, 8, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(8, 8, 3, 1, 1),
        nn.BatchNorm2d(8),
        nn.LeakyReLU(0.2),
        nn.Conv2d(8, 1, 4),
        nn.Flatten(0),
    )
    return g, d


def moved(module):
    """The module with fresh tensors on the device: Module.to cannot put fake ones in the place of real ones."""

    def new(t):
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE)

    for m in module.modules():
        m._parameters.update({k: p if p is None else nn.Parameter(new(p)) for k, p in m._parameters.items()})
        m._buffers.update({k: b if b is None else new(b) for k, b in m._buffers.items()})
    return module


def adam(**options):
    return lambda m: torch.optim.Adam(m.parameters(), 1e-3, **options)


def step_of(g, d, optimizer=adam(fused=True), **options):  # noqa: B008
    """A step on the fake device and its images."""
    moved(g), moved(d)
    step = fastgan.GANStep(
        g, d, latent=(5, 1, 1), g_optimizer=optimizer(g), d_optimizer=optimizer(d), **{"ema": 0.9, **options}
    )
    moved(step.ema)  # deepcopy copied the fake mode with the tensors
    return step, torch.randn(6, 2, 8, 8, device=DEVICE)


def recorded(between=None, change=None, rates=True, **options):
    """What stands against capturing the step, by two recorded runs after one to warm up; "" for nothing.

    rates: learning rates are device scalars, as in a warm-up before a capture; between: called from run to run.
    """
    g, d = (fastgan.convert(m) for m in networks())
    if change:
        d.append(change())
    with FAKE:
        step, real = step_of(g, d, **options)
        scalars = _Rates(step)
        due = (step.penalty is not None,)
        runs = []
        for i in range(3):
            try:
                with scalars.on_device() if rates else nullcontext(), Recording(DEVICE) as run:
                    metrics = step.run(due, real, None, None)
            except Exception:
                if not run.violations:
                    raise
                return run.violations[0]  # the fake device itself refuses most of them
            if i:
                runs.append(run)
            if between:
                between(step)
        return difference(*runs) or misplaced(metrics.values(), "a metric")


class ReadsBack(nn.Module):
    def forward(self, x):
        return x * x.sum().item()


class Branches(nn.Module):
    def forward(self, x):
        return x * 2 if (x > 0).all() else x


class GoesToTheCPU(nn.Module):
    def forward(self, x):
        return x + x.detach().cpu().mean().to(x.device)


class TakesFromTheHost(nn.Module):
    def forward(self, x):
        return x + torch.ones(3).to(x.device).sum()


class Counts(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Replaces(nn.Module):
    mean = None

    def forward(self, x):
        self.mean = x.detach().mean() if self.mean is None else self.mean.lerp(x.detach().mean(), 0.1)
        return x - self.mean


def slower(step):
    for group in step.d_optimizer.param_groups:
        group["lr"] = group["lr"] * 0.5


SOUND = {
    **{f"{loss}": dict(loss=loss) for loss in ("bce", "lsgan", "hinge", "wasserstein", "relativistic")},
    **{f"penalty {kind}": dict(penalty=kind) for kind in ("wgan-gp", "dragan", "r1", "r2", "r1r2")},
    "bf16 with r1": dict(precision="bf16", penalty="r1"),
    "capturable Adam": dict(optimizer=adam(capturable=True)),
    "fused Adam": dict(optimizer=adam(fused=True)),
    "our Adam": dict(optimizer=lambda m: fastgan.Adam(m.parameters(), 1e-3)),
    "fp16": dict(precision="fp16"),
    "a schedule": dict(between=slower),
    "two passes": dict(change=lambda: nn.Dropout(0.3)),
}
SEEDED = {
    "item": dict(change=ReadsBack),
    "branch": dict(change=Branches),
    "cpu": dict(change=GoesToTheCPU),
    "host": dict(change=TakesFromTheHost),
    "counter": dict(change=Counts),
    "replaced": dict(change=Replaces),
    "lr": dict(rates=False, between=slower),
}


def main(check):
    checks = {"ops": forward_and_derivatives, "compile": compiled, "autocast": autocast}
    if check in checks:
        for name, op in OPS.items():
            if check != "compile" or not name.endswith("_double_backward"):
                torch._dynamo.reset()
                report(name, checks[check], op)
        return
    for name, options in {"step": SOUND, "seeded": SEEDED}[check].items():
        report(name, lambda options=options: recorded(**options))


if __name__ == "__main__":
    main(sys.argv[1])
