"""One step of Adam over many tensors and, on the way, of the moving average that follows them.

Formula      t <- t + 1; g <- -g where maximising; L2: g <- g + d p, decoupled: p <- (1 - lr d) p, of weight decay d;
             m <- m + (1 - beta1) (g - m); v <- beta2 v + (1 - beta2) g^2;
             p <- p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps); a <- a + weight (p - a)
Shapes       lists of tensors p, g, m, v [*], t [] and a [*] (or an empty list); all but g are written in place
Dtypes       float32; the reference takes what PyTorch's fused Adam takes
Layout       contiguous or channels_last, the same for the tensors of a parameter
Autocast     none: an optimiser sees tensors as they are
Derivatives  none
Saves        nothing
Traffic      7 accesses an element, 9 with the average; PyTorch's fused Adam and its lerp: 7 and 10
FLOPs        16 an element, a root and a division among them; 19 with the average
Determinism  bit-equal for any number of threads
Backends     cuda, native, reference
Source       Kingma and Ba, arXiv:1412.6980; Loshchilov and Hutter, arXiv:1711.05101
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam
from torch.optim.adamw import adamw as torch_adamw

from fastgan import _native
from fastgan._op import Chosen, is_traced
from fastgan.choice import Backend


class Numbers(NamedTuple):
    """What a step takes beside tensors; any of them may change from step to step.

    lr: a number, or a 0-dim float32 tensor on the parameters' device; weight: 1 - decay of the average; grad_scale and
    found_inf: what torch.amp.GradScaler gives a fused optimiser, for the reference alone.
    """

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool
    weight: float = 0.0
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class Adam(Chosen):
    """adam(parameters, gradients, exp_avgs, exp_avg_sqs, steps, averages, numbers); returns what it has written."""

    def first(self, args):
        return args[0][0]

    def run(self, *args):
        """Runs PyTorch's own where something traces or records, which could not see a kernel on lists of addresses."""
        return reference(*args) if is_traced() else super().run(*args)

    def case(self, args):
        """Elements and layouts, not numbers: a schedule changes those at every step."""
        tensors = tuple(
            (p.shape, p.stride(), g.stride(), m.stride(), v.stride(), p.dtype, m.dtype, v.dtype)
            for p, g, m, v in zip(*args[:4], strict=True)
        )
        averages = tuple((a.stride(), a.dtype) for a in args[5])
        return str(self.first(args).device), tensors, averages, args[6].found_inf is None

    def drawn(self, args):
        rng = torch.Generator(self.first(args).device).manual_seed(0)
        draw = lambda t: torch.empty_like(t, requires_grad=False).normal_(generator=rng)
        noise = [[draw(t) for t in column] for column in args[:6]]
        torch._foreach_abs_([*noise[3], *noise[4]])  # squares, counts
        return *noise, args[6]

    def restored(self, args):
        return *args[:6], Numbers(*args[6])

    def copies(self, args):
        return *([t.clone() for t in column] for column in args[:6]), args[6]


def cost(parameters: list[Tensor], averages: list[Tensor]) -> dict[str, int]:
    """Bytes and FLOPs that a perfect kernel needs."""
    elements = sum(p.numel() for p in parameters)
    return {"bytes": (9 if averages else 7) * 4 * elements, "flops": (19 if averages else 16) * elements}


def reference(parameters, gradients, exp_avgs, exp_avg_sqs, steps, averages, numbers):
    n = numbers
    rates = dict(lr=n.lr, beta1=n.beta1, beta2=n.beta2, eps=n.eps, maximize=n.maximize)
    scale = dict(grad_scale=n.grad_scale, found_inf=n.found_inf)
    options = dict(fused=True, amsgrad=False, weight_decay=n.weight_decay, **rates, **scale)
    step = torch_adamw if n.decoupled else torch_adam
    step(parameters, gradients, exp_avgs, exp_avg_sqs, [], steps, **options)
    if averages:
        torch._foreach_lerp_(averages, parameters, numbers.weight)
    return (*parameters, *exp_avgs, *exp_avg_sqs, *averages)


def launch(core, parameters, gradients, exp_avgs, exp_avg_sqs, steps, averages, numbers):
    torch._foreach_add_(steps, 1)
    columns = [core.addresses(column) for column in (parameters, gradients, exp_avgs, exp_avg_sqs, averages, steps)]
    columns[4] = columns[4] or [0] * len(parameters)
    tensors = list(zip(*columns, [p.numel() for p in parameters], strict=True))
    lr, beta1, beta2, *rest = numbers[:8]
    there, lr = (lr, 0.0) if isinstance(lr, Tensor) else (None, lr)
    # 1 - beta^t is -expm1(t ln beta): exact to rounding also at the first steps, where it is near zero
    logarithms = [math.log(beta) if beta else -math.inf for beta in (beta1, beta2)]
    core.call("adam", parameters[0], tensors, there, lr, beta1, beta2, *logarithms, *rest)
    return (*parameters, *exp_avgs, *exp_avg_sqs, *averages)


def declines(core, parameters, gradients, exp_avgs, exp_avg_sqs, steps, averages, numbers):
    """Why a core's kernel leaves a step to the reference, or ""."""
    if numbers.found_inf is not None:
        return f"{core.name}'s adam takes no gradient scale"
    tensors = (parameters, gradients, exp_avgs, exp_avg_sqs, *([averages] if averages else []))
    for row in zip(*tensors, strict=True):
        if any(t.dtype != torch.float32 or t.device != row[0].device for t in (*row, *steps)):
            return f"{core.name}'s adam takes float32 tensors on one device, got {', '.join(str(t.dtype) for t in row)}"
        if not any(all(t.is_contiguous(memory_format=layout) for t in row) for layout in _layouts(row[0])):
            return f"{core.name}'s adam takes a parameter, its gradient and its state in one dense layout"
        if not row[0].numel():
            return "an empty tensor"
    return ""


def _layouts(t):
    return (torch.contiguous_format, *((torch.channels_last,) if t.dim() == 4 else ()))


op = Adam(
    "adam",
    reference,
    {core.name: Backend(partial(launch, core), partial(declines, core)) for core in (_native.CUDA, _native.CPU)},
)
