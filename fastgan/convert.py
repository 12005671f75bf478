"""fastgan.convert and fastgan.explain: a user's own model, on our ops, from the outside unchanged.

The classes of the children of nn.Sequential chains are swapped for subclasses of themselves; containers, keys,
parameters and buffers stay the objects they were, so isinstance, deepcopy, pickling, optimisers and checkpoints do too.
In a chain "norm, activation" the norm computes both and the activation passes its input through, as long as neither has
hooks; both look at that at every call, so a hook added later finds the values it expects.
In a chain "convolution, batch norm" in training on a GPU the convolution computes the batch's statistics with its
output, and the output carries them, as an attribute, to the norm, which then reads it once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastgan import functional
from fastgan.backends import has_kernel, watching
from fastgan.nn.conv import conv_act, conv_statistics, has_hooks
from fastgan.nn.norm import bn_act, gn_act, in_act, ln_act, takes_batch_statistics
from fastgan.training import linearised

ACTIVATIONS = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}


def _epilogue(module: nn.Module) -> tuple[str, float]:
    """The activation that `module` takes over from its successor at this call: (name, slope)."""
    follower = module.__dict__.get("_fused_activation")
    if follower is None or has_hooks(module) or has_hooks(follower):
        return "identity", 0.0
    return follower._fused_name, getattr(follower, "negative_slope", 0.0)


def _convolve(conv: nn.Conv2d | nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """The convolution with the activation that it takes over, or with the statistics that a batch norm will want."""
    norm = conv.__dict__.get("_fused_norm")
    if norm is None or not takes_batch_statistics(norm) or torch.compiler.is_compiling():
        return conv_act(conv, x, *_epilogue(conv))
    y, known = conv_statistics(conv, x, norm.stat_groups)
    if known is not None and not (y.is_inference() or has_hooks(conv) or has_hooks(norm)):
        y._fastgan_statistics = y._version, known  # type: ignore[attr-defined]
    return y


def _carried(x: Tensor, groups: int) -> functional.Statistics:
    """The batch statistics that a convolution left with x, unless x was changed since or is cut into other groups."""
    version, known = getattr(x, "_fastgan_statistics", (-1, None))
    fits = known is not None and version == x._version and len(known[0]) == groups
    return known if fits else None


class FusedConv2d(nn.Conv2d):
    """nn.Conv2d on fastgan's op, with the activation that follows it where there is one."""

    def forward(self, input: Tensor) -> Tensor:
        return _convolve(self, input)


class FusedConvTranspose2d(nn.ConvTranspose2d):
    """nn.ConvTranspose2d on fastgan's op, with the activation that follows it where there is one."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is not None:
            return super().forward(input, output_size)
        return _convolve(self, input)


class FusedBatchNorm1d(nn.BatchNorm1d):
    """nn.BatchNorm1d on fastgan's op, with the activation that follows it where there is one."""

    stat_groups = 1

    def forward(self, input: Tensor) -> Tensor:
        return bn_act(self, input, *_epilogue(self), self.stat_groups)


class FusedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d on fastgan's op, with the activation that follows it where there is one."""

    stat_groups = 1

    def forward(self, input: Tensor) -> Tensor:
        return bn_act(self, input, *_epilogue(self), self.stat_groups, _carried(input, self.stat_groups))


class FusedGroupNorm(nn.GroupNorm):
    """nn.GroupNorm on fastgan's op, with the activation that follows it where there is one."""

    def forward(self, input: Tensor) -> Tensor:
        return gn_act(self, input, *_epilogue(self))


class FusedInstanceNorm2d(nn.InstanceNorm2d):
    """nn.InstanceNorm2d on fastgan's op, with the activation that follows it where there is one."""

    def forward(self, input: Tensor) -> Tensor:
        return in_act(self, input, *_epilogue(self))


class FusedLayerNorm(nn.LayerNorm):
    """nn.LayerNorm on fastgan's op, with the activation that follows it where there is one."""

    def forward(self, input: Tensor) -> Tensor:
        return ln_act(self, input, *_epilogue(self))


class _Absorbed(nn.Module):
    """An activation that its predecessor computes, unless one of the two has hooks."""

    def forward(self, input: Tensor) -> Tensor:
        computed = _epilogue(self.__dict__["_fused_predecessor"])[0] != "identity"
        return input if computed else super().forward(input)


class FusedReLU(_Absorbed, nn.ReLU):
    _fused_name = "relu"


class FusedLeakyReLU(_Absorbed, nn.LeakyReLU):
    _fused_name = "leaky_relu"


class FusedTanh(_Absorbed, nn.Tanh):
    _fused_name = "tanh"


class FusedSigmoid(_Absorbed, nn.Sigmoid):
    _fused_name = "sigmoid"


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: FusedConv2d,
    nn.ConvTranspose2d: FusedConvTranspose2d,
    nn.BatchNorm1d: FusedBatchNorm1d,
    nn.BatchNorm2d: FusedBatchNorm2d,
    nn.GroupNorm: FusedGroupNorm,
    nn.InstanceNorm2d: FusedInstanceNorm2d,
    nn.LayerNorm: FusedLayerNorm,
    nn.ReLU: FusedReLU,
    nn.LeakyReLU: FusedLeakyReLU,
    nn.Tanh: FusedTanh,
    nn.Sigmoid: FusedSigmoid,
}
OPS: dict[type[nn.Module], str] = {  # what explain calls each fused layer
    FusedConv2d: "conv2d",
    FusedConvTranspose2d: "conv_transpose2d",
    FusedBatchNorm1d: "bn_act",
    FusedBatchNorm2d: "bn_act",
    FusedGroupNorm: "gn_act",
    FusedInstanceNorm2d: "in_act",
    FusedLayerNorm: "ln_act",
}
CONVOLUTIONS = (FusedConv2d, FusedConvTranspose2d)


# ---- convert --------------------------------------------------------------------------------------------------------


def convert(model: nn.Module, *, example_input: Any = None, prove: bool = True) -> nn.Module:
    """Put a model's nn.Sequential chains on fastgan's fused ops, in place.

    Fused are convolution and transposed convolution with the activation after them, batch, group, instance and layer
    norm with the (leaky) ReLU after them, and either alone. Everything else is left as it is: hand-written forward
    methods, children with hooks, parametrized or shared children, subclasses; `fastgan.explain(model)` lists each with
    its reason.

    Args:
        model: any module; converted twice is converted once.
        example_input: a tensor or tuple of arguments; with `prove`, the model runs on it before and after, in eval
            mode, and the outputs are compared.
        prove: compare where an example_input is given.

    Returns:
        The same object.

    Raises:
        RuntimeError: the converted model gives other numbers on example_input (the model is then as it was).
    """
    before = _outputs(model, example_input) if prove and example_input is not None else None
    swapped: list[tuple[nn.Module, type[nn.Module]]] = []
    owners = _owners(model)
    for chain in _chains(model):
        children = list(chain)
        for child, following in zip(children, [*children, None][1:], strict=True):
            if not _refusal(child, owners):
                swapped.append((child, type(child)))
                _fuse(child, following, owners, swapped)
    if before is not None:
        error = _difference(before, _outputs(model, example_input))
        if error:
            for module, original in reversed(swapped):
                module.__class__ = original
                for key in ("_fused_activation", "_fused_predecessor", "_fused_norm"):
                    module.__dict__.pop(key, None)
            raise RuntimeError(f"convert: the converted model must give the same numbers, got {error}")
    return model


def _fuse(
    child: nn.Module,
    following: nn.Module | None,
    owners: Counter[int],
    swapped: list[tuple[nn.Module, type[nn.Module]]],
) -> None:
    """Swap the class of a convolution or norm, and of the activation that it absorbs."""
    if type(child) in ACTIVATIONS:
        swapped.pop()  # an activation alone stays torch's own: nothing to fuse it with
        return
    child.__class__ = FUSED[type(child)]
    if following is not None and not _absorption_refusal(child, following, owners):
        swapped.append((following, type(following)))
        following.__class__ = FUSED[type(following)]
        # into __dict__, past nn.Module's registration: state_dict keys and parents stay as they are
        child.__dict__["_fused_activation"] = following
        following.__dict__["_fused_predecessor"] = child
    elif isinstance(child, CONVOLUTIONS) and type(following) is nn.BatchNorm2d and not _refusal(following, owners):
        child.__dict__["_fused_norm"] = following


def _chains(model: nn.Module) -> Iterator[nn.Sequential]:
    for m in model.modules():
        if isinstance(m, nn.Sequential) and type(m).forward is nn.Sequential.forward:
            yield m


def _owners(model: nn.Module) -> Counter[int]:
    """How many times each module object is held, so that shared ones are left alone."""
    return Counter(id(c) for m in model.modules() for c in m._modules.values() if c is not None)


def _refusal(child: nn.Module, owners: Counter[int]) -> str:
    """Why a child of a chain is not fused, or ""."""
    if type(child) not in FUSED:
        if torch.nn.utils.parametrize.is_parametrized(child):
            return "parametrized"
        if any(isinstance(child, t) for t in FUSED):
            return "a subclass of a torch layer"
        return "no fused form of this layer"
    if has_hooks(child):
        return "has hooks"
    if owners[id(child)] > 1:
        return "used in more than one place"
    return ""


def _absorption_refusal(child: nn.Module, following: nn.Module, owners: Counter[int]) -> str:
    """Why an activation is not computed by the layer before it, or ""."""
    if type(following) not in ACTIVATIONS:
        return "not an activation that we fuse"
    if not isinstance(child, CONVOLUTIONS) and ACTIVATIONS[type(following)] not in ("relu", "leaky_relu"):
        return "norms fuse relu and leaky_relu"
    if isinstance(following, nn.LeakyReLU) and following.negative_slope < 0:
        return "negative_slope below 0"
    return _refusal(following, owners)


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """Every output tensor in eval mode; buffers and modes are left as found."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            out = model(*example) if isinstance(example, tuple) else model(example)
    finally:
        for m, training in modes:
            m.training = training
    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]


def _difference(before: list[Tensor], after: list[Tensor]) -> str:
    for b, a in zip(before, after, strict=True):
        b, a = b.double(), a.double()
        limit = 1e-4 * b.norm().item() + 1e-6
        error = (a - b).norm().item()
        if not error <= limit:
            return f"an error of {error:.3g} where {limit:.3g} is allowed"
    return ""


# ---- explain --------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One layer: its name, class, what runs it, and why nothing faster does."""

    name: str
    layer: str
    runs: str
    why: str = ""


@dataclass
class Report:
    """What `explain` found; str() prints a table."""

    rows: list[Row]
    calls: list[tuple[str, str, str]] = field(default_factory=list)  # (op, backend, reason), as they ran
    penalty: str = ""  # a discriminator's route to a gradient penalty: forward ops, or double backward and why

    def __str__(self) -> str:
        table = [("layer", "class", "runs as", "why")]
        table += [(r.name, r.layer, r.runs, r.why) for r in self.rows]
        if self.calls:
            counted = Counter(self.calls)
            table += [("", "", "", ""), ("op", "calls", "backend", "why")]
            table += [(op, str(n), backend, why) for (op, backend, why), n in counted.items()]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join([*lines, "", f"penalty: {self.penalty}"] if self.penalty else lines)


def explain(model: nn.Module, example_input: Any = None) -> Report:
    """Per layer, what is fused and why the rest is not; with an example input, which backend ran each op and why.

    Args:
        model: any module, converted or not.
        example_input: a tensor or tuple of arguments to run the model on once (eval mode, no gradients). A model that
            gives fewer numbers than it takes is looked at as a discriminator too, in the mode that it is in: by which
            route a gradient penalty on it would go.
    """
    owners = _owners(model)
    in_chain = {id(c): chain for chain in _chains(model) for c in chain}
    rows = [
        _row(name, m, in_chain, owners)
        for name, m in model.named_modules()
        if not list(m.children()) or hasattr(m, "stat_groups")
    ]
    report = Report(rows)
    if example_input is not None:
        with watching(lambda op, backend, reason: report.calls.append((op.name, backend, reason))):
            outputs = _outputs(model, example_input)
        x, *labels = example_input if isinstance(example_input, tuple) else (example_input,)
        if len(outputs) == 1 and len(labels) < 2 and outputs[0].numel() < x.numel():
            report.penalty = linearised.route(model, x, *labels)
    return report


def _row(name: str, m: nn.Module, in_chain: dict[int, nn.Sequential], owners: Counter[int]) -> Row:
    row = Row(name or "(model)", type(m).__name__, "torch")
    if type(m) in OPS:
        activation = _epilogue(m)[0]
        row.runs = f"fastgan.{OPS[type(m)]}" + ("" if activation == "identity" else f" + {activation}")
        if "_fused_norm" in m.__dict__ and has_kernel(f"{OPS[type(m)]}_statistics", m.weight.device.type):
            row.runs += " + the norm's statistics in training"
        row.why = "" if activation != "identity" or "_fused_activation" not in m.__dict__ else "hooks: run apart"
    elif isinstance(m, _Absorbed):
        apart = _epilogue(m.__dict__["_fused_predecessor"])[0] == "identity"
        row.runs, row.why = ("torch", "hooks: run apart") if apart else ("in the layer before it", "")
    elif type(m).__module__.startswith("fastgan.nn"):
        row.runs = "fastgan"
    elif type(m) in ACTIVATIONS:
        row.why = "no convolution or norm before it to compute it"
    elif type(m) in FUSED and id(m) not in in_chain:
        row.why = "called from a hand-written forward: left untouched"
    else:
        row.why = _refusal(m, owners) or "not converted: call fastgan.convert(model)"
    return row
