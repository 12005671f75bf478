"""A rewritten graph whose images run in channels_last inside, while what goes in and out keeps its layout.

The kernels work in channels_last and turn every NCHW image on its way in and out. Where a whole graph is turned once,
its layers find images as they want them. Numbers do not change; what depends on strides gets those of plain PyTorch:
the outputs, the gradients of the inputs, and random numbers, which are drawn in the order of memory.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fastgan import functional
from fastgan._layout import dense, is_channels_last, laid_out, memory_format
from fastgan.trace.rewrite import RELAID, example, writers

CONVOLUTIONS = (
    functional.conv1d,
    functional.conv_transpose1d,
    functional.conv2d,
    functional.conv_transpose2d,
    functional.conv2d_bn_act,
    functional.conv_transpose2d_bn_act,
)
LOOKS_AT_STRIDES = ("as_strided", "stride", "is_contiguous", "data_ptr", "storage", "untyped_storage", "set", "numpy")
# Calls by name, as functions, methods or operators and in place or not, that give the same numbers whatever the strides
# of what they read: views that every layout has, and calls whose result is memory of its own. Any other call finds the
# strides of plain PyTorch: it may draw random numbers in their order, refuse them (view_as), return a view of one
# layout and a copy of the other (reshape), or make a tensor like its input, which is then filled in their order.
VIEWS = """
    __get__ bfloat16 chunk detach dim double expand expand_as float getattr getitem half movedim narrow ndimension numel
    permute select setitem size split squeeze swapaxes to transpose type type_as unbind unsqueeze
"""
FRESH = """
    abs adaptive_avg_pool2d adaptive_max_pool2d add addcdiv addcmul amax amin avg_pool1d avg_pool2d batch_norm bmm cat
    ceil celu clamp clamp_max clamp_min clip clone concat conv1d conv2d conv_transpose1d conv_transpose2d cos cumsum div
    einsum elu eq erf exp flip floor floordiv ge gelu glu grid_sample group_norm gt hardsigmoid hardswish hardtanh
    interpolate layer_norm le leaky_relu lerp linear log log1p log_softmax logical_and logical_not
    logical_or logsigmoid lt masked_fill matmul max_pool1d max_pool2d maximum mean minimum mish mod mul nan_to_num ne
    neg norm normalize pad pixel_shuffle pixel_unshuffle pow prelu reciprocal relu relu6 roll round rsqrt rsub selu
    sigmoid sign silu sin softmax softplus sqrt square stack std sub sum tan tanh truediv upsample var where
"""
OWN_BUT = ("dropout", "attention", "multi_head")  # ours that do not belong to those: they draw, or reshape


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


class Ordered(torch.autograd.Function):
    """x with its dimensions in that order in memory, the outermost first; its gradient comes back in x's own order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: tuple[int, ...]) -> Tensor:
        ctx.before = order_of(x)
        inverse = sorted(range(x.dim()), key=order.__getitem__)
        return x.permute(order).contiguous().permute(inverse)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return Ordered.apply(gradient, ctx.before), None


def order_of(x: Tensor) -> tuple[int, ...]:
    """The dimensions of x as they lie in memory, the outermost first."""
    strides = x.stride()
    return tuple(sorted(range(x.dim()), key=lambda d: (-strides[d], d)))


def ordered(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """x itself where it lies in that order already."""
    if order == (0, 1, 2):
        image = x.unsqueeze(2)
        found = ordered(image, (0, 1, 2, 3))
        return x if found is image else found.squeeze(2)
    if x.permute(order).is_contiguous():
        return laid_out(x, False) if order == (0, 1, 2, 3) else x
    result: Tensor = Ordered.apply(x, order)
    return result


def in_channels_last(module: fx.GraphModule) -> fx.GraphModule | None:
    """A copy of a graph in channels_last, or None where that could change a number.

    None, too, where it has no NCHW convolution or looks at strides itself. What goes out, and what calls read that are
    not known to give the same numbers in every layout, has the strides of plain PyTorch.
    """
    if not any(_is_convolution_of_nchw(node) for node in module.graph.nodes) or _looks_at_strides(module.graph):
        return None
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    changed = writers(graph, lambda node: _is_fresh(node) or _name(node).endswith("_like"))
    moved: set[fx.Node] = set()  # values whose strides may not be those of plain PyTorch
    for node in list(graph.nodes):
        images = [image for image in node.all_input_nodes if image in moved]
        if node.meta.get(RELAID):  # an edge that needs it is turned by itself
            moved.add(node.args[0])
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif _is_convolution_of_nchw(node):
            _insert(graph, node, node.kwargs["x"], turned, True)
            moved.add(node)
        elif node.op != "output" and (_is_view(node) or _is_fresh(node)):
            moved |= {node} if images else set()
        elif not all(_is_restored(graph, node, image, changed) for image in images):
            return None
    graph.lint()
    return fx.GraphModule(module, graph)


def _is_restored(graph: fx.Graph, reader: fx.Node, image: fx.Node, changed: dict[fx.Node, set[fx.Node]]) -> bool:
    """Whether the reader now finds the strides of plain PyTorch, by a copy where it needs one.

    Not where the reader, or one behind it, changes the image through what it reads: it would change the copy.
    """
    value = example(image)
    if not isinstance(value, Tensor):
        return not isinstance(value, tuple | list)
    if image in changed and (reader in changed or reader in changed[image]):
        return False
    if any(stride == 0 and size != 1 for stride, size in zip(value.stride(), value.shape, strict=True)):
        return reader.op == "output"
    if not is_channels_last(value if value.dim() != 3 else value.unsqueeze(2)):  # those are in channels_last anyway
        _insert(graph, reader, image, ordered, order_of(value))
    return True


def _insert(graph: fx.Graph, reader: fx.Node, image: fx.Node, call: Any, layout: Any) -> None:
    with graph.inserting_before(reader):
        inserted = graph.call_function(call, (image, layout))
    inserted.meta = dict(image.meta)
    reader.replace_input_with(image, inserted)


def _is_nchw(node: Any) -> bool:
    value = example(node) if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor) or value.dim() not in (3, 4):
        return False
    return not is_channels_last(value if value.dim() == 4 else value.unsqueeze(2))


def _is_convolution_of_nchw(node: fx.Node) -> bool:
    return node.target in CONVOLUTIONS and _is_nchw(node.kwargs.get("x"))


def _is_view(node: fx.Node) -> bool:
    return node.op.startswith("call") and _name(node) in VIEWS.split()


def _is_fresh(node: fx.Node) -> bool:
    if not node.op.startswith("call"):
        return False
    if getattr(node.target, "__module__", "").partition(".")[0] == "fastgan":
        return _name(node) not in OWN_BUT
    return _name(node) in FRESH.split()


def _name(node: fx.Node) -> str:
    """What is called: "add" for torch.add, Tensor.add_, the operators + and +=."""
    name = str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", ""))
    if name.startswith("i") and getattr(operator, name, None) is node.target:
        return name[1:]
    return name if name.startswith("_") else name.removesuffix("_")


def _looks_at_strides(graph: fx.Graph) -> bool:
    return any(node.op.startswith("call") and _name(node) in LOOKS_AT_STRIDES for node in graph.nodes)
