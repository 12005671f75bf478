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
from fastgan._layout import image, is_channels_last, laid_out
from fastgan.trace.rewrite import RELAID, example, writers

CONVOLUTIONS = (
    functional.conv1d,
    functional.conv_transpose1d,
    functional.conv2d,
    functional.conv_transpose2d,
    functional.conv2d_bn_act,
    functional.conv_transpose2d_bn_act,
)
OF_SIGNALS = (functional.conv1d, functional.conv_transpose1d)  # contiguous, as torch's, whatever x lies like
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
NCHW, NHWC = LAYOUTS = (0, 1, 2, 3), (0, 2, 3, 1)  # orders of dimensions in memory, the outermost first
SIGNALS = {(0, 1, 2): NCHW, (0, 2, 1): NHWC}  # those of [N, C, L] as images
OWN_BUT = ("dropout", "attention", "multi_head")  # ours that do not belong to those: they draw, or reshape


class Ordered(torch.autograd.Function):
    """x with its dimensions in that order in memory, the outermost first; its gradient comes back in x's own order.

    That of an image turned to channels_last comes back in NCHW, where plain PyTorch's convolution leaves it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: tuple[int, ...]) -> Tensor:
        ctx.before = NCHW if order == NHWC else order_of(x)
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
    """x itself where it lies in that order already; [N, C, L] counts as an image one pixel high."""
    if order in SIGNALS:
        high = image(x)
        found = ordered(high, SIGNALS[order])
        return x if found is high else found.squeeze(2)
    if order == NHWC and is_channels_last(x):
        return x
    if x.permute(order).is_contiguous():  # for one channel or one pixel both of LAYOUTS are the same memory
        return laid_out(x, order == NHWC) if order in LAYOUTS else x
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
        read = [value for value in node.all_input_nodes if value in moved]
        if node.meta.get(RELAID):  # an edge that needs it is turned by itself
            moved.add(node.args[0])
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif _is_convolution_of_nchw(node):
            x = node.kwargs["x"]
            _insert(graph, node, x, NHWC if example(x).dim() == 4 else (0, 2, 1))
            if node.target in OF_SIGNALS:
                node.kwargs = {**node.kwargs, "layout": "x"}
            moved.add(node)
        elif node.op != "output" and (_is_view(node) or _is_fresh(node)):
            moved |= {node} if read else set()
        elif not all(_is_restored(graph, node, value, changed) for value in read):
            return None
    graph.lint()
    return fx.GraphModule(module, graph)


def _is_restored(graph: fx.Graph, reader: fx.Node, read: fx.Node, changed: dict[fx.Node, set[fx.Node]]) -> bool:
    """Whether the reader now finds the strides of plain PyTorch, by a copy where it needs one.

    Not where the reader, or one behind it, changes the value through what it reads: it would change the copy.
    """
    value = example(read)
    if not isinstance(value, Tensor):
        return not isinstance(value, tuple | list)
    if read in changed and (reader in changed or reader in changed[read]):
        return False
    if any(stride == 0 and size != 1 for stride, size in zip(value.stride(), value.shape, strict=True)):
        return reader.op == "output"
    if not is_channels_last(image(value)):  # those are in channels_last anyway
        _insert(graph, reader, read, order_of(value))
    return True


def _insert(graph: fx.Graph, reader: fx.Node, read: fx.Node, order: tuple[int, ...]) -> None:
    with graph.inserting_before(reader):
        inserted = graph.call_function(ordered, (read, order))
    inserted.meta = dict(read.meta)
    reader.replace_input_with(read, inserted)


def _is_nchw(node: Any) -> bool:
    value = example(node) if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor) or value.dim() not in (3, 4):
        return False
    return not is_channels_last(image(value))


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
