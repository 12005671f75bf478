"""The graph rewriter: which neighbours in a traced graph run as one op of ours.

A graph is what Dynamo makes of a hand-written forward: torch-level calls, in order, with the shapes that it saw.
PATTERNS says which calls can begin a group; a group goes on while the last call's only reader is the next one. Only the
calls of a group are replaced, so that everything else, random numbers and in-place updates of buffers included, happens
as before and in the same order.

Two things forbid a fusion. A value with a second reader must exist by itself. A value that is written to in place later
must not be one that our ops keep for their derivatives: they keep a leaky ReLU's output, where PyTorch keeps its input.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastgan import functional
from fastgan._layout import is_channels_last
from fastgan.choice import has_kernel
from fastgan.functional.multi_head import left_to_torch

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# not a user's source line
INSIDE = tuple(str(Path(file or "").parent) for file in (torch.__file__, functional.__file__, __file__))


# ---- what runs in the place of a group -------------------------------------------------------------------------------


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, **activation: Any) -> Tensor:
    """torch's linear layer of [N, F]; its bias goes with the activation, so that one backward pass makes both."""
    if bias is None or x.dim() != 2:
        return functional.bias_act(F.linear(x, weight, bias), **activation)
    return functional.bias_act(F.linear(x, weight), bias, **activation)


def add_act(a: Tensor, b: Tensor, *, activation: str, negative_slope: float) -> Tensor:
    """activation(a + b), the activation in the sum's own memory: one tensor less to allocate and to fill."""
    total = torch.add(a, b)
    if activation == "leaky_relu":
        return F.leaky_relu_(total, negative_slope)
    return {"relu": torch.relu_, "tanh": torch.tanh_, "sigmoid": torch.sigmoid_}[activation](total)


def attention(x: Tensor, key: Tensor, value: Tensor, *, activation: str | None = None, **options: Any) -> Tensor:
    """torch's scaled_dot_product_attention, which PyTorch's own fused kernels differentiate once only."""
    return functional.scaled_dot_product_attention(x, key, value, **options)


def multi_head(x: Tensor, *, activation: str | None = None, **options: Any) -> tuple[Tensor, Tensor | None]:
    """torch's multi_head_attention_forward around the same."""
    return functional.multi_head_attention_forward(x, **options)


def dropout(x: Tensor, *, activation: str | None = None, **options: Any) -> Tensor:
    """torch's dropout, by the same draws."""
    return functional.dropout(x, **options)


def channel_bias_act(x: Tensor, bias: Tensor, **activation: Any) -> Tensor:
    """activation(x + bias) for a bias of shape [1, C, 1, 1] or, beside [N, C], [C]."""
    return functional.bias_act(x, bias.reshape(-1), **activation)


# ---- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pattern:
    """A call that begins a group.

    parameters: its arguments by position, with their defaults (REQUIRED: none).
    fused: what runs the group, called with the same arguments by name and the activation's.
    activations: those that `fused` computes too.
    alone: whether `fused` replaces the call without an activation as well.
    fits: why a call is left as it is, or "".
    """

    name: str
    parameters: dict[str, Any]
    fused: Callable[..., Any]
    activations: tuple[str, ...]
    alone: bool = True
    fits: Callable[[dict[str, Any]], str] = lambda arguments: ""


REQUIRED = inspect.Parameter.empty
EVERY = ("relu", "leaky_relu", "tanh", "sigmoid")
SIGNED = ("relu", "leaky_relu")  # what norms fuse
CONVOLUTION = {"x": REQUIRED, "weight": REQUIRED, "bias": None, "stride": 1, "padding": 0}


def example(node: Any) -> Any:
    """The tensor, without data, that Dynamo saw there."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def _image(arguments: dict[str, Any]) -> str:
    x, weight = (example(arguments[name]) for name in ("x", "weight"))
    if not isinstance(x, Tensor) or x.dim() != 4:
        return "not a batch of images"
    return "" if x.dtype in FLOATING and isinstance(weight, Tensor) else f"{x.dtype}"


def _signal(arguments: dict[str, Any]) -> str:
    x = example(arguments["x"])
    return "" if isinstance(x, Tensor) and x.dim() == 3 and x.dtype in FLOATING else "not a batch of signals"


def _rows(arguments: dict[str, Any]) -> str:
    x = example(arguments["x"])
    return "" if isinstance(x, Tensor) and x.dim() == 2 and x.dtype in FLOATING else "not [N, F]"


def _attends(arguments: dict[str, Any]) -> str:
    x = example(arguments["x"])
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.dim() < 3:
        return "not [N, ..., L, d]"
    if arguments["dropout_p"] != 0.0:  # a number at each call, or one that is not known yet
        return "its probabilities have a dropout"
    if x.device.type != "cpu" and not has_kernel("attention", x.device.type):
        return f"fastgan has no kernel of attention for {x.device.type}"
    return ""


def _attends_in_heads(arguments: dict[str, Any]) -> str:
    """left_to_torch's word on a call whose tensors are known by their shapes."""
    known = {name: example(value) for name, value in arguments.items()}
    x = known["x"]
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or not isinstance(known["dropout_p"], float | int):
        return "not [L, N, E]"
    if x.device.type != "cpu" and not has_kernel("attention", x.device.type):
        return f"fastgan has no kernel of attention for {x.device.type}"
    return left_to_torch({**known, "query": x})


def _drops(arguments: dict[str, Any]) -> str:
    x = example(arguments["x"])
    if not isinstance(x, Tensor) or x.dtype not in FLOATING:
        return "not floating"
    return "in place" if arguments["inplace"] else ""


def _normable(arguments: dict[str, Any]) -> str:
    x = example(arguments["x"])
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or not 2 <= x.dim() <= 4:
        return "not [N, C], [N, C, L] or [N, C, H, W]"
    if not isinstance(arguments.get("momentum", 0.1), float | int):
        return "its momentum is not a number"
    return ""


def _summed(arguments: dict[str, Any]) -> str:
    a, b = (example(arguments[name]) for name in ("a", "b"))
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or arguments.get("alpha", 1) != 1:
        return "not a sum of tensors"
    return "" if a.dtype == b.dtype and a.dtype in FLOATING and a.shape == b.shape else "not of one shape and dtype"


NORM = {"x": REQUIRED, "running_mean": None, "running_var": None, "weight": None, "bias": None}
SUM = Pattern("add", {"a": REQUIRED, "b": REQUIRED, "alpha": 1}, add_act, EVERY, False, _summed)
HEADS = {
    "x" if name == "query" else name: parameter.default
    for name, parameter in inspect.signature(functional.multi_head_attention_forward).parameters.items()
}
PATTERNS: dict[Any, Pattern] = {
    torch.conv2d: Pattern("conv2d", {**CONVOLUTION, "dilation": 1, "groups": 1}, functional.conv2d, EVERY, fits=_image),
    torch.conv_transpose2d: Pattern(
        "conv_transpose2d",
        {**CONVOLUTION, "output_padding": 0, "groups": 1, "dilation": 1},
        functional.conv_transpose2d,
        EVERY,
        fits=_image,
    ),
    torch.conv1d: Pattern(
        "conv1d", {**CONVOLUTION, "dilation": 1, "groups": 1}, functional.conv1d, EVERY, fits=_signal
    ),
    torch.conv_transpose1d: Pattern(
        "conv_transpose1d",
        {**CONVOLUTION, "output_padding": 0, "groups": 1, "dilation": 1},
        functional.conv_transpose1d,
        EVERY,
        fits=_signal,
    ),
    F.linear: Pattern("linear", {"x": REQUIRED, "weight": REQUIRED, "bias": None}, linear_act, EVERY, False, _rows),
    F.batch_norm: Pattern(
        "bn_act", {**NORM, "training": False, "momentum": 0.1, "eps": 1e-5}, functional.bn_act, SIGNED, fits=_normable
    ),
    F.instance_norm: Pattern(
        "in_act",
        {**NORM, "use_input_stats": True, "momentum": 0.1, "eps": 1e-5},
        functional.in_act,
        SIGNED,
        fits=_normable,
    ),
    F.group_norm: Pattern(
        "gn_act",
        {"x": REQUIRED, "num_groups": REQUIRED, "weight": None, "bias": None, "eps": 1e-5},
        functional.gn_act,
        SIGNED,
        fits=_normable,
    ),
    F.layer_norm: Pattern(
        "ln_act",
        {"x": REQUIRED, "normalized_shape": REQUIRED, "weight": None, "bias": None, "eps": 1e-5},
        functional.ln_act,
        SIGNED,
        fits=_normable,
    ),
    F.scaled_dot_product_attention: Pattern(
        "attention",
        {
            **{"x": REQUIRED, "key": REQUIRED, "value": REQUIRED, "attn_mask": None, "dropout_p": 0.0},
            **{"is_causal": False, "scale": None, "enable_gqa": False},
        },
        attention,
        (),
        fits=_attends,
    ),
    F.dropout: Pattern(
        "dropout", {"x": REQUIRED, "p": 0.5, "training": True, "inplace": False}, dropout, (), fits=_drops
    ),
    F.multi_head_attention_forward: Pattern(
        "multi-head attention",
        HEADS,
        multi_head,
        (),
        fits=_attends_in_heads,
    ),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), SUM),
}
FOLDED: dict[str, Callable[..., Tensor]] = {
    "conv2d": functional.conv2d_bn_act,
    "conv_transpose2d": functional.conv_transpose2d_bn_act,
}

ACTIVATIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), "leaky_relu"),
    **dict.fromkeys((torch.tanh, torch.tanh_, F.tanh, "tanh", "tanh_"), "tanh"),
    **dict.fromkeys((torch.sigmoid, torch.sigmoid_, F.sigmoid, "sigmoid", "sigmoid_"), "sigmoid"),
}
CONTIGUOUS = (functional.in_act, functional.ln_act)  # keep x's layout; the results of torch's norms are contiguous
RELAID = "laid out as in torch"  # marks, in the meta of a node, that it does no more than that
INPLACE = (F.relu_, F.leaky_relu_, torch.relu_, torch.tanh_, torch.sigmoid_, operator.setitem, torch.dropout_)
FRESH = (*PATTERNS, *ACTIVATIONS, operator.mul, torch.mul, F.avg_pool2d)


# ---- reading a graph ------------------------------------------------------------------------------------------------


def _called(node: fx.Node, table: dict[Any, Any]) -> Any:
    """What the table has for the call, or None. Methods stand in it by name, functions by themselves."""
    return table.get(node.target) if node.op in ("call_function", "call_method") else None


def arguments_of(node: fx.Node, parameters: dict[str, Any]) -> dict[str, Any] | None:
    """A call's arguments by our names, or None where it passes others."""
    names, given = list(parameters), {"input": "x", "query": "x", "other": "b", "use_batch_stats": "use_input_stats"}
    arguments = dict(zip(names, node.args, strict=False))
    arguments |= {given.get(name, name): value for name, value in node.kwargs.items()}
    if len(node.args) > len(names) or not set(arguments) <= set(names):
        return None
    filled = {**parameters, **arguments}
    return None if REQUIRED in filled.values() else filled


def _slope(node: fx.Node) -> float | None:
    """The negative slope of an activation that we fuse (0 but for leaky ReLU), None for one that we do not."""
    if ACTIVATIONS[node.target] != "leaky_relu":
        return 0.0
    slope = node.kwargs.get("negative_slope", node.args[1] if len(node.args) > 1 else 0.01)
    return float(slope) if isinstance(slope, float | int) and slope >= 0 else None


def _writes(node: fx.Node) -> Any:
    """The tensor that a call changes in place, or None."""
    if node.op == "call_method":
        changes = str(node.target).endswith("_") and not str(node.target).endswith("__")
    else:
        name = getattr(node.target, "__name__", "")
        changes = node.op == "call_function" and (
            node.target in INPLACE or (name.startswith("i") and getattr(operator, name, None) is node.target)
        )
    if changes or node.kwargs.get("inplace") is True or (True in node.args[1:] and "inplace" in _names(node.target)):
        return node.args[0] if node.args else None
    return node.kwargs.get("out")


def _names(target: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # a builtin
        return ()


def writers(
    graph: fx.Graph, fresh: Callable[[fx.Node], bool] = lambda node: node.target in FRESH
) -> dict[fx.Node, set[fx.Node]]:
    """value -> the calls that change its memory in place; through any call that may return a view of it.

    fresh: whether a call that changes nothing in place returns memory of its own.
    """
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        pending = [_writes(node)]
        seen: set[fx.Node] = set()
        while pending:
            value = pending.pop()
            if not isinstance(value, fx.Node) or value in seen:
                continue
            seen.add(value)
            found.setdefault(value, set()).add(node)
            own = value.op in ("call_function", "call_method") and fresh(value) and _writes(value) is None
            pending += [] if own else value.all_input_nodes
    return found


def _line(node: fx.Node) -> str:
    """The user's source line of a call, "block.py:12", or "" where torch's own code makes it."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [f for f in frames if not f[0].startswith(INSIDE)]
    return f"{Path(own[-1][0]).name}:{own[-1][1]}" if own else ""


def _module(node: fx.Node) -> str:
    """The module whose forward made the call, by its path below the traced one; "" for the traced one itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = re.sub(r"\['?(\w+)'?\]", r".\1", stack[-1][0]) if stack else ""
    while "getattr(" in path:  # torch.fx calls a layer of a chain by its number so
        path, found = re.subn(r"getattr\(([^()]*), '?(\w+)'?\)", r"\1.\2", path)
        if not found:
            break
    return re.sub(r"^L?\.?\w+\.?", "", path.replace("_modules.", ""), count=1)


# ---- groups ---------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Neighbours that run as one call."""

    nodes: list[fx.Node]
    target: Callable[..., Tensor]
    arguments: dict[str, Any]
    names: list[str]  # "conv2d", "batch norm", "leaky_relu"
    where: str = ""
    modules: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.where = _line(self.nodes[0])
        self.modules = [_module(n) for n in self.nodes]

    @property
    def key(self) -> tuple[str, str]:
        """What runs as one, and the source line where it begins."""
        return " + ".join(self.names), self.where


def groups(graph: fx.Graph) -> Iterator[Group]:
    """What of a graph runs as fewer calls, in order."""
    written, taken = writers(graph), set[fx.Node]()
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        pattern = _called(node, PATTERNS)
        if pattern is None or node in taken:
            continue
        group = _group(node, pattern, written, order)
        if group is not None:
            taken |= set(group.nodes)
            yield group


def _group(node: fx.Node, pattern: Pattern, written: dict, order: dict) -> Group | None:
    arguments = arguments_of(node, pattern.parameters)
    if arguments is None:
        return None
    if pattern is SUM:
        return _sum(node, arguments, written)
    if pattern.fits(arguments) or arguments["x"] is None:
        return None
    nodes, names = [node], [pattern.name]
    target = pattern.fused
    activations = pattern.activations
    norm = _following(node, {F.batch_norm: True}) if pattern.name in FOLDED else None
    if norm is not None and not _written_by_others(node, [norm], written):
        folded = _folded(node, norm, order)
        if folded is not None:
            nodes, names, target = [node, norm], [pattern.name, "batch norm"], FOLDED[pattern.name]
            arguments, activations = arguments | folded, SIGNED
    last = nodes[-1]
    following = _following(last, ACTIVATIONS)
    absorbed = following is not None and _absorbed(last, following, activations, written)
    if following is not None and absorbed:
        nodes.append(following)
        names.append(ACTIVATIONS[following.target])
        arguments |= {"activation": names[-1], "negative_slope": _slope(following)}
    elif pattern.alone:
        arguments |= {"activation": None}
    else:
        return None
    return Group(nodes, target, arguments, names)


def _following(node: fx.Node, table: dict[Any, Any]) -> fx.Node | None:
    """The only reader of a value, if it is a call in the table that takes the value first and nowhere else."""
    if len(node.users) != 1:
        return None
    reader = next(iter(node.users))
    first = reader.args[0] if reader.args else reader.kwargs.get("input")
    alone = first is node and reader.all_input_nodes.count(node) == 1
    return reader if alone and _called(reader, table) is not None else None


def _absorbed(node: fx.Node, activation: fx.Node, allowed: tuple[str, ...], written: dict) -> bool:
    """Whether a call may compute the activation after it, which may itself write in place: nobody sees that."""
    if ACTIVATIONS[activation.target] not in allowed or _slope(activation) is None or "out" in activation.kwargs:
        return False
    if _writes(activation) is not None and _keeps_odd_strides(example(activation)):
        return False
    return not _written_by_others(node, [activation], written) and not _written_by_others(activation, [], written)


def _keeps_odd_strides(y: Any) -> bool:
    """Whether y is both layouts in memory and NCHW by its strides no more: an activation in place leaves them so, where
    our ops, like an activation that is not in place, give NCHW's."""
    return isinstance(y, Tensor) and y.dim() == 4 and y.is_contiguous() and is_channels_last(y)


def _written_by_others(node: fx.Node, own: list[fx.Node], written: dict) -> bool:
    return bool(written.get(node, set()) - set(own))


def _folded(conv: fx.Node, norm: fx.Node, order: dict) -> dict[str, Any] | None:
    """The arguments of a batch norm beside its convolution's, where all of them exist before the convolution."""
    pattern = PATTERNS[F.batch_norm]
    found = arguments_of(norm, pattern.parameters)
    if found is None or pattern.fits(found):
        return None
    early = all(order[n] < order[conv] for n in norm.all_input_nodes if n is not conv)
    renamed = {"weight": "bn_weight", "bias": "bn_bias"}
    return {renamed.get(k, k): v for k, v in found.items() if k != "x"} if early else None


def _sum(node: fx.Node, arguments: dict[str, Any], written: dict) -> Group | None:
    """A residual sum, or a bias along the channels, with the activation after it."""
    following = _following(node, ACTIVATIONS)
    if following is None or not _absorbed(node, following, EVERY, _without(written, node)):
        return None
    a, b = arguments["a"], arguments["b"]
    target = _writes(node)
    if target is not None and (target.target not in FRESH or len(target.users) > 1):
        return None  # someone else may look at what is written to
    activation = {"activation": ACTIVATIONS[following.target], "negative_slope": _slope(following)}
    nodes, names = [node, following], ["add", ACTIVATIONS[following.target]]
    for x, bias in ((a, b), (b, a)):
        if _is_bias(example(x), example(bias)) and arguments.get("alpha", 1) == 1:
            arguments = {"x": x, "bias": bias, **activation}
            return Group(nodes, channel_bias_act, arguments, ["bias", names[1]])
    if _summed(arguments):
        return None
    return Group(nodes, add_act, {"a": a, "b": b, **activation}, names)


def _without(written: dict, node: fx.Node) -> dict:
    """`written` without what this call writes: it is going to write to memory of its own."""
    return {value: calls - {node} for value, calls in written.items()}


def _is_bias(x: Any, bias: Any) -> bool:
    """Whether `bias` is a vector along x's channels, shaped [1, C, 1, 1], or [C] beside [N, C]."""
    if not (isinstance(x, Tensor) and isinstance(bias, Tensor)) or x.dtype not in FLOATING or x.dtype != bias.dtype:
        return False
    if not 2 <= x.dim() <= 4 or bias.numel() != x.shape[1] or x.shape == bias.shape:
        return False
    shape = tuple(bias.shape)
    return shape == (1, x.shape[1], *(1,) * (x.dim() - 2)) or (x.dim() == 2 and shape == (x.shape[1],))


# ---- rewriting ------------------------------------------------------------------------------------------------------


class Programs(Protocol):
    """What runs several groups as one (`fastgan.trace.straight.Straight`)."""

    @staticmethod
    def stretches(graph: fx.Graph, groups: list[Group], written: dict[fx.Node, set[fx.Node]]) -> list[list[Group]]:
        """The groups in order, those together that run as one."""

    def __call__(self, groups: list[Group]) -> Any:
        """A module that runs them: forward(x, *tensors), and `arguments(groups)`, the nodes of those tensors."""


def rewritten(
    module: fx.GraphModule, left: Collection[tuple[str, str]], program: Programs | None = None
) -> tuple[fx.GraphModule, list[Group]]:
    """A copy of a graph whose groups run on our ops, and those groups.

    left: keys of groups that stay as they are. program: what runs several of them as one; None: each runs by itself.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    found = [group for group in groups(module.graph) if group.key not in left]
    programs: dict[str, Any] = {}
    for stretch in program.stretches(module.graph, found, writers(module.graph)) if program else [[g] for g in found]:
        nodes = [node for group in stretch for node in group.nodes]
        with graph.inserting_before(copies[stretch[-1].nodes[0]]):
            if program is not None and len(stretch) > 1:
                name = f"straight_{len(programs)}"
                programs[name] = program(stretch)
                arguments = [stretch[0].arguments["x"], *programs[name].arguments(stretch)]
                call = graph.call_module(name, tuple(n and copies[n] for n in arguments))
            else:
                call = _call(graph, stretch[0], copies)
        last = copies[nodes[-1]]
        call.meta = {**last.meta, **call.meta}
        last.replace_all_uses_with(call)
        for node in reversed(nodes):
            graph.erase_node(copies[node])
            copies[node] = call
    graph.lint()
    kept = [n.target for n in graph.nodes if n.op in ("get_attr", "call_module") and n.target not in programs]
    return fx.GraphModule({**{name: operator.attrgetter(name)(module) for name in kept}, **programs}, graph), found


def _call(graph: fx.Graph, group: Group, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """The call of a group's op, with its result laid out as in torch."""
    call = graph.call_function(group.target, (), fx.map_arg(dict(group.arguments), lambda n: copies[n]))
    if group.target in CONTIGUOUS and is_channels_last(example(group.arguments["x"])):
        call.meta = dict(copies[group.nodes[-1]].meta)
        call = graph.call_method("contiguous", (call,))
        call.meta = {RELAID: True}
    return call
