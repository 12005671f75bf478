"""A rewritten graph whose images run in channels_last inside, while what goes in and out keeps its layout.

The kernels work in channels_last and turn every NCHW image on its way in and out. Where a whole graph is turned once,
its layers find images as they want them. Numbers do not change; what depends on strides gets those of plain PyTorch:
the outputs, the gradients of the inputs, and random numbers, which are drawn in the order of memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fastgan import functional
from fastgan._layout import dense, is_channels_last, laid_out, memory_format
from fastgan.trace.rewrite import RELAID, writers

CONVOLUTIONS = (
    functional.conv1d,
    functional.conv_transpose1d,
    functional.conv2d,
    functional.conv_transpose2d,
    functional.conv2d_bn_act,
    functional.conv_transpose2d_bn_act,
)
RANDOM = ("rand", "dropout", "bernoulli", "normal", "poisson", "multinomial", "rrelu", "gumbel", "exponential")
LOOKS_AT_STRIDES = ("as_strided", "stride", "is_contiguous", "data_ptr", "storage", "untyped_storage", "set_", "numpy")


class Turned(torch.autograd.Function):
    """x in the layout asked for; its gradient comes back in x's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, channels_last: bool) -> Tensor:
        ctx.before = is_channels_last(x)
        return dense(x, channels_last)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return Turned.apply(gradient, ctx.before), None


def turned(x: Tensor, channels_last: bool) -> Tensor:
    """x itself where it has the layout already; [N, C, L] counts as an image one pixel high."""
    if x.dim() == 3:
        image = x.unsqueeze(2)
        found = turned(image, channels_last)
        return x if found is image else found.squeeze(2)
    if x.dim() != 4 or is_channels_last(x) == channels_last:
        return x
    if x.is_contiguous(memory_format=memory_format(channels_last)):  # one channel or one pixel: the same memory
        return laid_out(x, channels_last)
    result: Tensor = Turned.apply(x, channels_last)
    return result


def in_channels_last(module: fx.GraphModule) -> fx.GraphModule | None:
    """A copy of a graph in channels_last, or None where it has no NCHW convolution or looks at strides itself."""
    if not any(_is_convolution_of_nchw(node) for node in module.graph.nodes) or _looks_at_strides(module.graph):
        return None
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    for node in list(graph.nodes):
        if node.meta.get(RELAID):  # an edge that needs it is turned by itself
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif _is_convolution_of_nchw(node):
            _turn(graph, node, [node.kwargs["x"]], True)
        elif node.op == "output" or _is_random(node):
            _turn(graph, node, [n for n in node.all_input_nodes if _is_nchw(n)], False)
        elif node.op == "call_method" and node.target == "view":
            node.target = "reshape"
    graph.lint()
    return fx.GraphModule(module, graph)


def _turn(graph: fx.Graph, reader: fx.Node, images: list[Any], channels_last: bool) -> None:
    for image in images:
        with graph.inserting_before(reader):
            call = graph.call_function(turned, (image, channels_last))
        call.meta = dict(image.meta)
        reader.replace_input_with(image, call)


def _is_nchw(node: Any) -> bool:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor) or value.dim() not in (3, 4):
        return False
    return not is_channels_last(value if value.dim() == 4 else value.unsqueeze(2))


def _is_convolution_of_nchw(node: fx.Node) -> bool:
    return node.target in CONVOLUTIONS and _is_nchw(node.kwargs.get("x"))


def _is_random(node: fx.Node) -> bool:
    return node.op.startswith("call") and any(word in _name(node) for word in RANDOM)


def _name(node: fx.Node) -> str:
    return str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", ""))


def _looks_at_strides(graph: fx.Graph) -> bool:
    changed = writers(graph)
    return any(
        _name(node) in LOOKS_AT_STRIDES or (node.target == "view" and node in changed)
        for node in graph.nodes
        if node.op.startswith("call")
    )
