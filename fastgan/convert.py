"""fastgan.convert and fastgan.explain: a user's own model, on our ops, from the outside unchanged.

Convolutions and norms of nn.Sequential chains get subclasses of themselves, which compute what they computed on our
ops, each for itself; the chain gets a forward of its own (`Chain`) that runs "convolution, norm, activation" as fewer
ops. Containers, keys, parameters and buffers stay the objects they were, so isinstance, deepcopy, pickling, optimisers
and checkpoints do too. A chain looks at its children at every call: what is replaced, hooked or switched to eval later
runs as it then is, and a slice of a chain, or a child called alone, gives plain PyTorch's numbers.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from fastgan import functional, program
from fastgan._forward import Forward, is_exported, is_symbolic, written_call
from fastgan._hooks import has_global_hooks, has_hooks
from fastgan._layout import is_channels_last, laid_out
from fastgan._op import is_retold, is_transformed
from fastgan._parametrized import StandIn, plain_class
from fastgan._ranks import Sync
from fastgan.choice import has_kernel, watching
from fastgan.models.attention import DotProductAttention
from fastgan.nn.conv import conv_act, conv_bn_act
from fastgan.nn.norm import bn_act, gn_act, in_act, ln_act, takes_batch_statistics
from fastgan.penalties import linearised
from fastgan.trace import Part, Proof, missing, parts

ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}


# ---- layers: each does its own work, and through `fused` that of its followers ---------------------------------------


class _Convolution(nn.Module):
    def fused(self: Any, input: Tensor, norm: FusedBatchNorm2d | None, activation: str, slope: float) -> Tensor:
        if norm is not None:
            return conv_bn_act(self, norm, input, activation, slope, norm.stat_groups, norm.sync)
        return conv_act(self, input, activation, slope)

    def forward(self: Any, input: Tensor) -> Any:
        if isinstance(input, Proxy):
            return written_call(self, input)
        return conv_act(self, input, "identity", 0.0)


class FusedConv1d(_Convolution, nn.Conv1d):
    """nn.Conv1d on fastgan's op."""

    op = "conv1d"


class FusedConv2d(_Convolution, nn.Conv2d):
    """nn.Conv2d on fastgan's op."""

    op = "conv2d"


class _TransposedConvolution(_Convolution):
    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Any:
        if isinstance(input, Proxy):
            return written_call(self, input, *(() if output_size is None else (output_size,)))
        if output_size is not None:
            return super(_Convolution, self).forward(input, output_size)  # torch's own
        return conv_act(self, input, "identity", 0.0)


class FusedConvTranspose1d(_TransposedConvolution, nn.ConvTranspose1d):
    """nn.ConvTranspose1d on fastgan's op."""

    op = "conv_transpose1d"


class FusedConvTranspose2d(_TransposedConvolution, nn.ConvTranspose2d):
    """nn.ConvTranspose2d on fastgan's op."""

    op = "conv_transpose2d"


class _Norm(nn.Module):
    run: Callable[..., Tensor]  # self.run(input, activation, slope)

    def fused(self, input: Tensor, norm: None, activation: str, slope: float) -> Tensor:
        return self.run(input, activation, slope)

    def forward(self, input: Tensor) -> Any:
        if isinstance(input, Proxy):
            return written_call(self, input)
        return self.run(input, "identity", 0.0)


class _ContiguousNorm(_Norm):
    """A norm whose result is contiguous in torch; on our op it keeps its input's layout (`Group.reader`)."""

    def forward(self, input: Tensor) -> Any:
        y = super().forward(input)
        return y if isinstance(y, Proxy) else y.contiguous()


def _bn_act(bn: Any, input: Tensor, activation: str, slope: float) -> Tensor:
    return bn_act(bn, input, activation, slope, bn.stat_groups, bn.sync)


class FusedBatchNorm1d(_Norm, nn.BatchNorm1d):
    op, run, stat_groups, sync = "bn_act", _bn_act, 1, False


class FusedBatchNorm2d(_Norm, nn.BatchNorm2d):
    op, run, stat_groups, sync = "bn_act", _bn_act, 1, False


class FusedGroupNorm(_Norm, nn.GroupNorm):
    op, run = "gn_act", gn_act


class FusedInstanceNorm2d(_ContiguousNorm, nn.InstanceNorm2d):
    op, run = "in_act", in_act


class FusedLayerNorm(_ContiguousNorm, nn.LayerNorm):
    op, run = "ln_act", ln_act


FUSED: dict[type[nn.Module], Any] = {  # what takes a layer's place; its `op` is what explain calls it
    nn.Conv1d: FusedConv1d,
    nn.Conv2d: FusedConv2d,
    nn.ConvTranspose1d: FusedConvTranspose1d,
    nn.ConvTranspose2d: FusedConvTranspose2d,
    nn.BatchNorm1d: FusedBatchNorm1d,
    nn.BatchNorm2d: FusedBatchNorm2d,
    nn.GroupNorm: FusedGroupNorm,
    nn.InstanceNorm2d: FusedInstanceNorm2d,
    nn.LayerNorm: FusedLayerNorm,
}
CONVOLUTIONS_2D = (FusedConv2d, FusedConvTranspose2d)
CONVOLUTIONS = (FusedConv1d, FusedConvTranspose1d, *CONVOLUTIONS_2D)


class FusedDropout(nn.Dropout):
    """nn.Dropout by the same draws."""

    op = "dropout"

    def forward(self, input: Tensor) -> Any:
        if isinstance(input, Proxy):
            return written_call(self, input)
        if is_transformed():
            return super().forward(input)
        return functional.dropout(input, self.p, self.training, self.inplace)


class FusedDotProductAttention(DotProductAttention):
    op = "attention"

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if is_exported() or is_transformed() or is_symbolic(q, k, v):
            return super().forward(q, k, v)
        return functional.scaled_dot_product_attention(q, k, v, scale=self.scale)


class FusedMultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention around the op `attention`; without gradients torch's own, which has a path of its own."""

    op = "attention"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Any:
        options = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        if is_symbolic(query, key, value, *options):
            return written_call(self, query, key, value, *options)
        if is_exported() or is_transformed() or not torch.is_grad_enabled() or query.is_nested:
            return super().forward(query, key, value, *options)
        turned = self.batch_first and query.dim() == 3
        if turned:  # an object that comes in twice goes on as one
            sides = {id(t): t.transpose(0, 1) for t in (query, key, value)}
            query, key, value = sides[id(query)], sides[id(key)], sides[id(value)]
        y, weights = functional.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=not self._qkv_same_embed_dim,
            q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return y.transpose(0, 1) if turned else y, weights


CORES: dict[type[nn.Module], Any] = {  # wherever they are called from
    DotProductAttention: FusedDotProductAttention,
    nn.MultiheadAttention: FusedMultiheadAttention,
    nn.Dropout: FusedDropout,
}
KINDS_OF_CORES = {*CORES, *CORES.values()}
# Forward and backward of a 3 x 3 x 3 layer of 16, 32 and 64 channels took 18.0, 11.2 and 9.4 ms in PyTorch, and 44.4,
# 11.0 and 15.3 ms as three of our 2-D convolutions over the depth (one thread of AMD EPYC Zen 5, AVX-512, some load).
DEPTH = "3-D: a loop of our 2-D convolutions over the depth is no faster"
DECLINED: dict[type[nn.Module], str] = {nn.Conv3d: DEPTH, nn.ConvTranspose3d: DEPTH}
# What may stand between a norm and the convolution that reads it: by its numbers no layout can be told from another.
BLIND_TO_LAYOUT = (
    *(nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ZeroPad2d, nn.ConstantPad2d, nn.Identity),
    *(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.PixelShuffle, nn.AvgPool2d, nn.MaxPool2d),
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.SiLU, nn.GELU, nn.ELU, nn.Tanh, nn.Sigmoid),
)


# ---- chains ---------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Neighbours that run as one call of `layer`: a convolution or norm, a convolution's batch norm, an activation."""

    layer: Any
    norm: Any = None
    activation: Any = None
    stands_in: StandIn | None = None  # its module is `layer`
    reader: Any = None  # the convolution that reads a norm's result, where nothing between them sees the layout

    def __call__(self, input: Any) -> Any:
        layer, norm = self.layer, self.norm
        if norm is not None and (not isinstance(input, Tensor) or input.dim() != 4):
            input, layer, norm = layer(input), norm, None  # nn.BatchNorm2d refuses [C, H, W]: let it
        y = layer.fused(input, norm, self.act, getattr(self.activation, "negative_slope", 0.0))
        if isinstance(layer, _ContiguousNorm):  # a channels_last convolution makes channels_last of either
            return y if self.reader is not None and is_channels_last(self.reader.weight) else y.contiguous()
        return y if norm is not None or not getattr(self.activation, "inplace", False) else _in_place(layer, input, y)

    @property
    def act(self) -> str:
        """The activation's name."""
        return "identity" if self.activation is None else ACTIVATIONS[type(self.activation)]

    def program_layer(self) -> program.Layer:
        conv, norm = (self.layer, self.norm) if isinstance(self.layer, CONVOLUTIONS) else (None, self.layer)
        return program.Layer(conv, norm, self.act, self.activation)


def _in_place(layer: Any, input: Tensor, y: Tensor) -> Tensor:
    """y with the strides that an activation in place leaves as the layer made them."""
    if y.dim() != 4 or (y.shape[1] > 1 and y.shape[2] * y.shape[3] > 1) or isinstance(layer, _BatchNorm):
        return y
    return laid_out(y, is_channels_last(input) or (isinstance(layer, CONVOLUTIONS) and is_channels_last(layer.weight)))


def _groups(chain: nn.Module, stand_ins: bool = False) -> Iterator[Group | nn.Module]:
    """The children of a converted chain in order, as they run now: together, or as the modules they are.

    stand_ins: whether a parametrized convolution is one of a group, by a stand-in.
    """
    children: list[Any] = list(chain._modules.values())
    at = 0
    while at < len(children):
        child = children[at]
        at += 1
        group = _begun(child, stand_ins)
        if group is None:
            yield child
            continue
        layer = group.layer
        if at < len(children) and _normed(layer, children[at]):
            group.norm = children[at]
            at += 1
        if at < len(children) and not _absorption_refusal(group.norm or layer, children[at]):
            group.activation = children[at]
            at += 1
        if isinstance(layer, _ContiguousNorm):
            group.reader = _reader(children[at:])
        alone = not (group.norm or group.activation or group.stands_in or group.reader)
        yield layer if alone else group


def _reader(children: Sequence[nn.Module]) -> nn.Module | None:
    """The convolution that reads what goes into these children, or None where another may look at it before."""
    first = next((c for c in children if not _plain(c, BLIND_TO_LAYOUT)), None)
    return first if _plain(first, CONVOLUTIONS) else None


def _begun(child: nn.Module, stand_ins: bool) -> Group | None:
    """A group that begins with this child, or None where none does."""
    kind = plain_class(child) if stand_ins else None
    fused = FUSED.get(kind, kind) if kind is not None else None
    if fused in CONVOLUTIONS and _plain(child, (type(child),)):
        stand_in = StandIn(child, fused)
        return Group(stand_in.module, stands_in=stand_in)
    return Group(child) if _plain(child, tuple(FUSED.values())) else None


def _plain(m: Any, kinds: Collection[type[nn.Module]]) -> bool:
    """Whether m is of exactly one of these classes and calling it does no more than its forward."""
    return type(m) in kinds and not has_hooks(m) and m._compiled_call_impl is None


def _normed(conv: Any, norm: Any) -> bool:
    """Whether a batch norm runs with the convolution before it: folded in eval mode, else over its batch statistics."""
    return (
        isinstance(conv, CONVOLUTIONS_2D)
        and _plain(norm, (FusedBatchNorm2d,))
        and norm.num_features == conv.out_channels
        and (norm.running_mean is None) == (norm.running_var is None)
    )


class Stretch:
    """Neighbouring parts that run as one program where that is known to be the same, else one after the other."""

    def __init__(self, parts: list[Any], layers: list[program.Layer]):
        self.parts, self.run = parts, program.Run(layers)

    def __call__(self, input: Any) -> Any:
        if program.applies(input):
            found = self.run(input)
            if found is not None:
                return found
        for part in self.parts:
            input = part(input)
        return input


class MakingStretch(Stretch):
    """A stretch with parametrized layers: their weights are made first, in order, whatever runs then.

    Threads that share a model take turns here: the weights belong to one call.
    """

    def __init__(self, parts: list[Any], layers: list[program.Layer]):
        super().__init__(parts, layers)
        self.stand_ins = [part.stands_in for part in parts if isinstance(part, Group) and part.stands_in]
        self.turn = threading.Lock()

    def __call__(self, input: Any) -> Any:
        with self.turn:
            try:
                for stand_in in self.stand_ins:
                    stand_in.make()
                return super().__call__(input)
            finally:
                for stand_in in self.stand_ins:
                    stand_in.drop()


def _stretches(parts: Sequence[Group | nn.Module]) -> list[Stretch | Group | nn.Module]:
    """The parts of a chain with neighbours that a program can take put together."""
    found: list[Any] = []
    at = 0
    while at < len(parts):
        taken, layers = _stretch(parts[at:])
        # a linear layer alone is one call of torch's: nothing to gain
        if layers and not (len(layers) == 1 and isinstance(layers[0].conv, nn.Linear)):
            those = list(parts[at : at + taken])
            makes = any(isinstance(part, Group) and part.stands_in for part in those)
            found.append((MakingStretch if makes else Stretch)(those, layers))
        else:
            taken = max(taken, 1)
            found += parts[at : at + taken]
        at += taken
    return found


def _stretch(parts: Sequence[Group | nn.Module]) -> tuple[int, list[program.Layer]]:
    """(how many of the first parts a program can take, their layers); it begins with a layer that has parameters."""
    layers: list[program.Layer] = []
    at = 0
    while at < len(parts):
        part = parts[at]
        flat = bool(layers) and _flattens(part) and at + 1 < len(parts) and _plain(parts[at + 1], (nn.Linear,))
        layer = program.Layer(parts[at + 1], None, "identity", None, True) if flat else _program_layer(part)
        if layer is None or not (layers or layer.parameters()):
            break
        layers.append(layer)
        at += 2 if flat else 1
    return at, layers


def _program_layer(part: Any) -> program.Layer | None:
    """A part of a chain as a layer of a program, or None where a program has no kernels for it."""
    group = part if isinstance(part, Group) else Group(part)
    if _plain(group.layer, tuple(FUSED.values())):
        return None if _stands_alone(group.layer) else group.program_layer()
    if _plain(part, (nn.Linear,)):
        return program.Layer(part, None, "identity", None)
    if _plain(part, ACTIVATIONS) and getattr(part, "negative_slope", 0.0) >= 0:
        return program.Layer(None, None, ACTIVATIONS[type(part)], part)
    return None


def _stands_alone(norm: Any) -> bool:
    """Whether a norm is of a kind that programs do not know: they would refuse its neighbours with it."""
    if isinstance(norm, nn.LayerNorm):
        return len(norm.normalized_shape) != 1
    return isinstance(norm, nn.InstanceNorm2d) and norm.running_mean is not None


def _flattens(part: Any) -> bool:
    """Whether part makes a row of each sample."""
    return _plain(part, (nn.Flatten,)) and (part.start_dim, part.end_dim) == (1, -1)


class Chain(Forward):
    """The forward of a converted nn.Sequential.

    What it keeps besides its owner belongs to this process: copies and pickles start without.
    """

    seen: tuple = ()  # what `parts` were made from
    parts: Sequence[Any] = ()
    is_replica = False  # of nn.DataParallel: its parameters are attributes that no program looks at

    def __call__(self, input: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        if is_retold(compiling):
            for child in self.owner.children():
                input = _plain_call(child, input)
            return input
        proxy = type(input) is not Tensor and isinstance(input, Proxy)
        if proxy or has_global_hooks():  # fx, and who calls such hooks, calls every child as a module
            return nn.Sequential.forward(self.owner, input)  # type: ignore[arg-type]
        for part in _groups(self.owner) if compiling else self._current():
            input = part(input)
        return input

    def _current(self) -> Sequence[Any]:
        """The parts, made anew where a child was replaced, hooked or compiled since."""
        children: Any = self.owner._modules.values()
        seen = (*children, *((type(m), has_hooks(m), m._compiled_call_impl) for m in children))
        if seen != self.seen:
            groups = list(_groups(self.owner, stand_ins=not self.is_replica))
            self.seen, self.parts = seen, groups if self.is_replica else _stretches(groups)
        return self.parts

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": self.owner}

    def replicate(self) -> nn.Module:
        """nn.DataParallel's copy of the container, which gets other children: a forward for it."""
        replica = super().replicate()
        chain = Chain(replica)
        chain.is_replica = True
        chain.install()
        return replica


def _plain_call(child: nn.Module, input: Any) -> Any:
    """A child as torch runs it, for those who write its ops down or transform them."""
    own = getattr(child, "stat_groups", 1) > 1 or getattr(child, "sync", False)  # statistics that torch's has not
    for plain, fused in FUSED.items():
        if type(child) is fused and not has_hooks(child) and not own:
            return plain.forward(child, input)
    return child(input)


# ---- convert --------------------------------------------------------------------------------------------------------


def convert(
    model: nn.Module, *, example_input: Any = None, prove: bool = True, trace: str = "auto", sync: Sync = False
) -> nn.Module:
    """Put a model on fastgan's fused ops, in place.

    nn.Sequential chains run as fewer ops: convolution and transposed convolution with the activation after them, batch,
    group, instance and layer norm with the (leaky) ReLU after them, and either alone. A parametrized convolution
    (spectral norm, weight norm) takes part: torch makes its weight. A module whose forward is written by hand, or whose
    weights are made by torch's older hooks, is traced at its first call (`fastgan.trace`): its classes stay what they
    are, and what it does runs on the same ops. `fastgan.explain(model)` lists every layer with what runs it or why
    nothing faster does.

    Args:
        model: any module; converted twice is converted once.
        example_input: a tensor or tuple of arguments; with `prove`, the model runs on it before and after, and outputs,
            gradients and R1 gradients are compared.
        prove: compare where an example_input is given.
        trace: "auto" traces what chains do not show, where torch has Dynamo; "off" leaves it as it is.
        sync: batch norms in training take their statistics over all processes of torch.distributed (True) or over a
            process group, to second order (`synchronise`).

    Returns:
        The same object.

    Raises:
        ValueError: trace is neither "auto" nor "off"; with sync, a batch norm that cannot be synchronised.
        RuntimeError: the converted model gives other numbers on example_input (the model is then as it was). A traced
            group that alone is at fault is left to PyTorch instead, with a warning.
    """
    if trace not in ("auto", "off"):
        raise ValueError(f'convert: trace must be "auto" or "off", got {trace!r}')
    check = Proof(model, example_input) if prove and example_input is not None else None
    found = list(parts(model)) if trace == "auto" else []
    traced = [] if found and missing() else [Part(m) for m in found]
    inside = {id(m) for part in traced for m in part.owner.modules()}
    swapped: list[tuple[nn.Module, type[nn.Module]]] = []
    owners = _owners(model)
    chains = [Chain(m) for m in _chains(model) if not _converted(m) and id(m) not in inside]
    for chain in chains:
        for child in chain.owner.children():
            if not _refusal(child, owners):
                swapped.append((child, type(child)))
                child.__class__ = FUSED[type(child)]
        chain.install()
    for core in _cores(model, inside):
        swapped.append((core, type(core)))
        core.__class__ = CORES[type(core)]
    for part in traced:
        part.install()
    if check is not None:
        error = check.difference(traced)
        if error:
            for module, original in swapped:
                module.__class__ = original
            for chain in chains:
                chain.remove()
            for part in traced:
                part.remove()
            raise RuntimeError(f"convert: the converted model must give the same numbers, got {error}")
    return model if sync is False else synchronise(model, sync)


def synchronise(model: nn.Module, sync: Sync = True) -> nn.Module:
    """Let every batch norm of a model, in training, take its statistics over several processes; in place.

    A `fastgan.models.MinibatchDeviation` takes the groups that one process makes of their whole batch.

    Args:
        model: converted or not; it is converted afterwards. A hand-written forward with a batch norm stays untraced.
        sync: True for all processes of torch.distributed, a process group, or False to undo it.

    Returns:
        The same object.

    Raises:
        ValueError: a batch norm is neither nn.BatchNorm1d, nn.BatchNorm2d nor ours; nothing was changed then.
    """
    norms: dict[str, Any] = dict(model.named_modules())
    norms = {name: m for name, m in norms.items() if isinstance(m, _BatchNorm) and not hasattr(m, "sync")}
    for name, m in norms.items():
        if type(m) not in FUSED:
            raise ValueError(
                f"synchronise: batch norms must be nn.BatchNorm1d or nn.BatchNorm2d, got {type(m).__name__} at "
                f"{name or 'the model itself'}"
            )
    for owner in model.modules():
        forward = owner.__dict__.get("forward")
        if isinstance(forward, Part) and any(isinstance(part, _BatchNorm) for part in owner.modules()):
            forward.remove()
    for m in norms.values():
        m.__class__ = FUSED[type(m)]
    convert(model, trace="off")
    for ours in model.modules():
        if hasattr(ours, "sync"):
            ours.sync = sync
    return model


def revert(model: nn.Module) -> nn.Module:
    """Take a converted model back to plain PyTorch, in place: classes, forwards and nothing else.

    Args:
        model: any module, converted or not.

    Returns:
        The same object.
    """
    for m in model.modules():
        forward = m.__dict__.get("forward")
        if isinstance(forward, Chain | Part):
            forward.remove()
        for plain, fused in (FUSED | CORES).items():
            if type(m) is fused:
                for name in ("stat_groups", "sync"):
                    m.__dict__.pop(name, None)
                m.__class__ = plain
    return model


def _cores(model: nn.Module, traced: Collection[int]) -> Iterator[nn.Module]:
    """The modules of CORES; of a dropout in a traced part the trace finds the function that it calls."""
    for m in model.modules():
        if type(m) in CORES and not has_hooks(m) and not (isinstance(m, nn.Dropout) and id(m) in traced):
            yield m


def _converted(m: nn.Module) -> bool:
    return isinstance(m.__dict__.get("forward"), Chain)


def _chains(model: nn.Module) -> Iterator[nn.Module]:
    for m in model.modules():
        ordinary = isinstance(m, nn.Sequential) and type(m).forward is nn.Sequential.forward
        if ordinary and ("forward" not in m.__dict__ or _converted(m)):  # a forward that someone put there stays
            yield m


def _owners(model: nn.Module) -> Counter[int]:
    """How many times each module object is held, so that shared ones are left alone."""
    return Counter(id(c) for m in model.modules() for c in m._modules.values() if c is not None)


def _refusal(child: nn.Module, owners: Counter[int]) -> str:
    """Why a child of a chain is not fused, or ""."""
    if type(child) not in FUSED:
        if plain_class(child) is not None:
            return "parametrized"
        if any(isinstance(child, t) for t in FUSED):
            return "a subclass of a torch layer"
        return DECLINED.get(type(child), "no fused form of this layer")
    if has_hooks(child):
        return "has hooks"
    if owners[id(child)] > 1:
        return "used in more than one place"
    return ""


def _absorption_refusal(layer: nn.Module, activation: Any) -> str:
    """Why an activation is not computed by the layer before it, or ""."""
    if type(activation) not in ACTIVATIONS:
        return "not an activation that we fuse"
    if not isinstance(layer, CONVOLUTIONS) and ACTIVATIONS[type(activation)] not in ("relu", "leaky_relu"):
        return "norms fuse relu and leaky_relu"
    if isinstance(activation, nn.LeakyReLU) and activation.negative_slope < 0:
        return "negative_slope below 0"
    return "" if _plain(activation, ACTIVATIONS) else "hooks: run apart"


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


# ---- explain --------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One layer: its name, class, what runs it, and why nothing faster does."""

    name: str
    layer: str
    runs: str
    why: str = ""
    where: str = ""  # the source line of a traced layer


@dataclass
class Report:
    """What `explain` found; str() prints a table."""

    rows: list[Row]
    calls: list[tuple[str, str, str]] = field(default_factory=list)  # (op, backend, reason), as they ran
    penalty: str = ""  # a discriminator's route to a gradient penalty: forward ops, or double backward and why

    def __str__(self) -> str:
        table = [("layer", "class", "runs as", "line", "why")]
        table += [(r.name, r.layer, r.runs, r.where, r.why) for r in self.rows]
        if self.calls:
            counted = Counter(self.calls)
            table += [("",) * 5, ("op", "calls", "backend", "", "why")]
            table += [(op, str(n), backend, "", why) for (op, backend, why), n in counted.items()]
        widths = [max(len(row[i]) for row in table) for i in range(5)]
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
    outputs, calls = _watched(model, example_input)
    owners = _owners(model)
    chains = list(_chains(model))
    in_chain = {id(c) for chain in chains for c in chain.children()}
    converted = [chain for chain in chains if _converted(chain)]
    chained = {id(c) for chain in converted for c in chain.children()}
    runs = {key: row for chain in converted for key, row in _running(chain).items()}
    traced = {name: m.forward for name, m in model.named_modules() if isinstance(m.__dict__.get("forward"), Part)}
    rows: list[Row] = []
    for name, m in model.named_modules():
        within = [root for root in traced if not root or name == root or name.startswith(f"{root}.")]
        if within and id(m) not in chained:
            rows += _traced_rows(name, m, within[-1], traced[within[-1]])
        elif (
            not list(m.children())
            or type(m) in KINDS_OF_CORES
            or hasattr(m, "stat_groups")
            or (id(m) in in_chain and plain_class(m))
        ):
            rows.append(_row(name, m, runs.get(id(m)), in_chain, owners))
    report = Report(rows, calls)
    if example_input is not None:
        x, *labels = example_input if isinstance(example_input, tuple) else (example_input,)
        if len(outputs) == 1 and len(labels) < 2 and outputs[0].numel() < x.numel():
            report.penalty = linearised.route(model, x, *labels)
    return report


def _watched(model: nn.Module, example: Any) -> tuple[list[Tensor], list[tuple[str, str, str]]]:
    """The model's outputs on an example, and (op, backend, reason) of every op that ran; nothing where it is None."""
    calls: list[tuple[str, str, str]] = []
    if example is None:
        return [], calls
    with watching(lambda op, backend, reason: calls.append((op.name, backend, reason))):
        return _outputs(model, example), calls


def _traced_rows(name: str, m: nn.Module, root: str, part: Part) -> list[Row]:
    """What runs a module of a traced part, a row for each line that calls it; leaves that nothing fuses, too."""
    kind = type(m).__name__
    if type(m) in CORES.values():
        return [Row(name or "(model)", kind, f"fastgan.{m.op}")]
    if type(m) in FUSED.values():
        why = "converted before, as a layer of a chain: by itself; call fastgan.revert first"
        return [Row(name or "(model)", kind, f"fastgan.{m.op}", why)]
    refusal = part.refusal()
    found = [Row(name or "(model)", kind, *told) for told in part.told(name[len(root) :].lstrip(".")) if not refusal]
    is_leaf = not list(m.children())
    if found or not is_leaf:
        return found
    return [Row(name or "(model)", kind, "torch", refusal or DECLINED.get(type(m)) or part.unfused())]


def _running(chain: nn.Module) -> dict[int, tuple[str, str]]:
    """id of a child -> (what runs it, why nothing faster does), for those that run together in the mode they are in."""
    found: dict[int, tuple[str, str]] = {}
    device = next((p.device.type for p in chain.parameters()), "cpu")
    for part in _groups(chain, stand_ins=True):
        if not isinstance(part, Group):
            continue
        layer, norm = part.stands_in.layer if part.stands_in else part.layer, part.norm
        op = part.layer.op
        names = [f"fastgan.{op}"]
        last = layer  # what computes the activation
        if norm is not None and takes_batch_statistics(norm):
            found[id(layer)] = names[0] + " + statistics" * has_kernel(f"{op}_statistics", device), ""
            names, last = ["fastgan.bn_act"], norm
        elif norm is not None:
            names.append("batch norm")
            found[id(norm)] = "in the layer before it", "folded into its weight where the output is larger"
        if part.activation is not None:
            names.append(ACTIVATIONS[type(part.activation)])
            found[id(part.activation)] = "in the layer before it", ""
        found[id(last)] = " + ".join(names), ""
    for stretch in (part for part in chain.forward._current() if isinstance(part, Stretch)):  # type: ignore[attr-defined]
        rest = (part for part in stretch.parts if type(part) is nn.Linear or type(part) in ACTIVATIONS)
        found |= {id(part): stretch.run.runs() for part in rest}
    return found


def _row(name: str, m: nn.Module, runs: tuple[str, str] | None, in_chain: set[int], owners: Counter[int]) -> Row:
    row = Row(name or "(model)", type(m).__name__, "torch")
    if runs is not None:
        row.runs, row.why = runs
    elif type(m) in (FUSED | CORES).values():
        row.runs = f"fastgan.{m.op}"
        row.why = "hooks: run apart" if has_hooks(m) else ""
    elif type(m).__module__.startswith("fastgan.nn"):
        row.runs = "fastgan"
    elif type(m) in CORES:
        row.why = "has hooks" if has_hooks(m) else "not converted: call fastgan.convert(model)"
    elif type(m) in ACTIVATIONS:
        row.why = "hooks: run apart" if has_hooks(m) else "no convolution or norm before it to compute it"
    elif type(m) in FUSED and id(m) not in in_chain:
        row.why = f"called from a hand-written forward: {missing() or 'left untouched (trace is off)'}"
    else:
        row.why = _refusal(m, owners) or "not converted: call fastgan.convert(model)"
    return row
