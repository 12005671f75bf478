"""Straight stretches of a traced graph as programs: groups that follow each other, each read by the next one alone.

A program (`fastgan.program`) takes layers as modules and reads their tensors out of them. Here stand-ins take the
tensors of a call for as long as it lasts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastgan import functional, program
from fastgan.program.layer import TRANSPOSED
from fastgan.trace.rewrite import CONTIGUOUS, PATTERNS, Group, arguments_of, example, linear_act

CONVOLUTIONS: dict[Callable[..., Any], type[nn.Module]] = {
    functional.conv1d: nn.Conv1d,
    functional.conv_transpose1d: nn.ConvTranspose1d,
    functional.conv2d: nn.Conv2d,
    functional.conv2d_bn_act: nn.Conv2d,
    functional.conv_transpose2d: nn.ConvTranspose2d,
    functional.conv_transpose2d_bn_act: nn.ConvTranspose2d,
}
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
Places = list[tuple[dict[str, Any], str, str]]  # where a tensor goes, by the name of the group's argument


class Straight(nn.Module):
    """Groups as one program, or one after the other where none applies: forward(x, *tensors) -> y.

    Threads that share it take turns: the stand-ins' tensors belong to one call.
    """

    def __init__(self, groups: Sequence[Group]):
        super().__init__()
        made = [_layers(group) or ([], []) for group in groups]
        self.run = program.Run([layer for layers, _ in made for layer in layers])
        self.places = [(owner, name) for _, places in made for owner, name, _ in places]
        self.names = [[argument for _, _, argument in places] for _, places in made]
        self.calls = [
            (group.target, {k: v for k, v in group.arguments.items() if k != "x" and k not in names})
            for group, names in zip(groups, self.names, strict=True)
        ]
        self.turn = threading.Lock()

    @staticmethod
    def stretches(graph: fx.Graph, groups: list[Group], written: dict[fx.Node, set[fx.Node]]) -> list[list[Group]]:
        """The groups in order, those together that run as one program; linear layers without a group join them."""
        return _stretches(graph, groups, written)

    def arguments(self, groups: Sequence[Group]) -> list[Any]:
        """The nodes whose values `forward` takes behind x."""
        return [group.arguments[name] for group, names in zip(groups, self.names, strict=True) for name in names]

    def forward(self, x: Tensor, *tensors: Tensor | None) -> Tensor:
        if program.applies(x):
            with self.turn:
                try:
                    for (owner, name), tensor in zip(self.places, tensors, strict=True):
                        owner[name] = tensor
                    y = self.run(x)
                finally:
                    for owner, name in self.places:
                        owner[name] = None
            if y is not None:
                return y
        rest = iter(tensors)
        for (target, constants), names in zip(self.calls, self.names, strict=True):
            x = target(x=x, **dict(zip(names, rest)), **constants)  # noqa: B905 (takes its own)
            x = x.contiguous() if target in CONTIGUOUS else x
        return x


# ---- a group as layers ----------------------------------------------------------------------------------------------


def _layers(group: Group) -> tuple[list[program.Layer], Places] | None:
    """Stand-ins for a group, and where its tensors go; None where programs have no kernels for it."""
    if any(isinstance(a, fx.Node) and not isinstance(example(a), Tensor) for a in group.arguments.values()):
        return None  # a number that each call brings, such as an eps of which Dynamo has seen two
    found, activation = group.arguments, group.arguments.get("activation") or "identity"
    slope = float(found.get("negative_slope") or 0.0)
    act = nn.LeakyReLU(slope) if activation == "leaky_relu" else ACTIVATIONS.get(activation, lambda: None)()
    if group.target is linear_act:
        linear, places = _linear(found)
        after = [] if act is None else [program.Layer(None, None, activation, act)]
        return [program.Layer(linear, None, "identity", None), *after], places
    if group.target in CONVOLUTIONS:
        conv, places = _convolution(CONVOLUTIONS[group.target], found)
        if conv is None:
            return None
        if "bn_weight" not in found:
            return [program.Layer(conv, None, activation, act)], places
        channels = conv.out_channels
        norm, others = _batch_norm(nn.BatchNorm2d, channels, found, ("bn_weight", "bn_bias"))
        return [program.Layer(conv, norm, activation, act)], places + others
    norm, places = _norm(group.target, found)
    return None if norm is None else ([program.Layer(None, norm, activation, act)], places)


def _learned(m: Any, weight: str = "weight", bias: str = "bias") -> Places:
    return [(m._parameters, "weight", weight), (m._parameters, "bias", bias)]


def _linear(found: dict[str, Any]) -> tuple[nn.Module, Places]:
    outputs, inputs = example(found["weight"]).shape
    linear = nn.Linear(inputs, outputs, found["bias"] is not None, device="meta")
    return linear, _learned(linear)


def _convolution(kind: Any, found: dict[str, Any]) -> tuple[Any, Places]:
    names = [name for name in ("stride", "padding", "output_padding", "groups", "dilation") if name in found]
    settings = {name: found[name] for name in names}
    numbers = [n for v in settings.values() for n in (v if isinstance(v, list | tuple) else (v,))]
    if not all(type(n) is int for n in numbers):  # "same", or a size that is left open
        return None, []
    first, second, *kernel = example(found["weight"]).shape
    channels = (first, second * found["groups"])
    inputs, outputs = channels if kind in TRANSPOSED else channels[::-1]
    settings = {name: tuple(v) if isinstance(v, list | tuple) and len(v) > 1 else v for name, v in settings.items()}
    conv = kind(inputs, outputs, tuple(kernel), **settings, bias=found["bias"] is not None, device="meta")
    return conv, _learned(conv)


def _batch_norm(kind: Any, channels: int, found: dict[str, Any], names: tuple[str, str]) -> tuple[Any, Places]:
    tracks = found["running_mean"] is not None
    norm = kind(channels, found["eps"], found["momentum"], True, tracks, device="meta").train(found["training"])
    norm.stat_groups, norm.sync = 1, False
    if tracks:
        norm._buffers["num_batches_tracked"] = torch.zeros((), dtype=torch.int64)  # the graph counts for itself
    running = [(norm._buffers, name, name) for name in ("running_mean", "running_var")]
    return norm, _learned(norm, *names) + running


def _norm(target: Callable[..., Any], found: dict[str, Any]) -> tuple[Any, Places]:
    if target not in (functional.bn_act, functional.gn_act, functional.in_act):
        return None, []
    x = example(found["x"])
    if target is functional.bn_act:
        kind = nn.BatchNorm2d if x.dim() == 4 else nn.BatchNorm1d
        return _batch_norm(kind, x.shape[1], found, ("weight", "bias"))
    norm: Any = None
    if target is functional.gn_act and x.dim() > 2:
        norm = nn.GroupNorm(found["num_groups"], x.shape[1], found["eps"], device="meta")
    if target is functional.in_act and x.dim() == 4 and found["running_mean"] is None and found["use_input_stats"]:
        norm = nn.InstanceNorm2d(x.shape[1], found["eps"], affine=True, device="meta")
    return norm, [] if norm is None else _learned(norm)


# ---- which groups follow each other ---------------------------------------------------------------------------------


def _stretches(graph: fx.Graph, groups: list[Group], written: dict) -> list[list[Group]]:
    order = {node: i for i, node in enumerate(graph.nodes)}
    taken = {node for group in groups for node in group.nodes}
    alone = [linear for node in graph.nodes if node not in taken and (linear := _lone_linear(node)) is not None]
    ends: dict[Any, list[Group]] = {}  # stretches that may go on, by the value that they make
    found: list[list[Group]] = []
    for group in sorted([*groups, *alone], key=lambda group: order[group.nodes[0]]):
        known, stretch = _layers(group) is not None, ends.pop(group.arguments.get("x"), None)
        if known and stretch is not None and _follows(stretch, group, order, written):
            stretch.append(group)
        else:
            stretch = [group]
            found.append(stretch)
        if known:
            ends[group.nodes[-1]] = stretch
    kept = [stretch for stretch in found if len(stretch) > 1 or stretch[0].nodes[0] in taken]
    return sorted(kept, key=lambda stretch: order[stretch[-1].nodes[0]])


def _lone_linear(node: fx.Node) -> Group | None:
    pattern = PATTERNS[F.linear]
    arguments = arguments_of(node, pattern.parameters) if node.target is F.linear else None
    if arguments is None or pattern.fits(arguments):
        return None
    return Group([node], linear_act, {**arguments, "activation": None}, ["linear"])


def _follows(stretch: list[Group], group: Group, order: dict, written: dict) -> bool:
    """Whether nobody else reads what the stretch makes, and nothing that it reads changes before the group runs."""
    last = stretch[-1].nodes[-1]
    if len(last.users) != 1:
        return False
    own = {node for g in (*stretch, group) for node in g.nodes}
    between = range(order[stretch[0].nodes[0]], order[group.nodes[-1]])
    values = {value for node in own for value in node.all_input_nodes}
    # a norm changes its running statistics, which the graph does not show
    norms = {user for value in values for user in value.users if user.target in (F.batch_norm, F.instance_norm)}
    others = {writer for value in values for writer in written.get(value, ())} | norms
    return not any(order[node] in between for node in others - own)
