"""A run of layers as native steps: which kernels, on what, in which order, forward and backward.

The steps call the kernels that the ops of the same layers call one by one (fastgan/ops), with the same arguments, so
the numbers are theirs to the bit. What a program saves is the rest: a Python call, a dispatch, an autograd node, a
layout conversion and an allocation for every layer.

Inside, every activation is dense channels_last, as the kernels want it; a matrix [N, C] is an image of one pixel, a
signal [N, C, L] one that is one pixel high.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastgan import _activation, _native
from fastgan._layout import image, is_channels_last
from fastgan.ops import conv2d as _conv2d
from fastgan.ops import conv_transpose2d as _conv_transpose2d
from fastgan.program.layer import TRANSPOSED, Geometry, Layer
from fastgan.program.memory import ALIGNMENT, ARENA, BACKWARD, Place, arrange
from fastgan.program.product import PRODUCTS, Native, Product, Steps

FLOAT32 = _native.DTYPE_CODES[torch.float32]
IDENTITY = _activation.CODES["identity"], 0.0
COTANGENT = -1  # what stands for it beside the indices of gradients
PLAIN = 1.0, -1.0  # gain and clamp of bias_act: none
Shape = tuple[int, ...]  # N, C, H, W


def plain_order(shape: Shape) -> bool:
    """Whether NCHW and channels_last are the same order of elements."""
    return shape[1] == 1 or shape[2] * shape[3] == 1


@dataclass
class _Pass:
    """What the backward of a layer needs to know of its forward."""

    layer: Layer
    x: Place
    x_shape: Shape
    y: Place
    y_shape: Shape
    epilogue: tuple[int, float]  # activation code, slope
    parameters: dict[str, Place | None]
    gradients: dict[str, Place | None]
    first: int  # index of its first parameter among the gradients of the plan
    conv: Any = None  # the packed ConvShape
    weight_strides: tuple[int, ...] = ()
    t: Place | None = None  # the norm's input
    statistics: tuple[Place, ...] = ()  # mean, var of the batch, or of each sample's groups
    norm: str = ""  # its kernels: "bn_act" or "gn_act"
    norm_shape: tuple = field(default=())
    image: Shape | None = None  # what x was before it was flattened


def strides(shape: Shape, channels_last: bool) -> Shape:
    """Those that torch gives a new tensor."""
    _, c, h, w = shape
    return (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)


def outer(shape: Shape, rank: int) -> Shape:
    """The sizes, or strides, of an image as those of the tensor that it stands for: [N, C], [N, C, L] or itself."""
    return {2: shape[:2], 3: (*shape[:2], *shape[3:]), 4: shape}[rank]


class Unfit(ValueError):
    """Shapes that do not fit the layers."""


class Plan:
    """Steps for one run of layers and one kind of input.

    layers: none of which refuses; x: an input like those to come; dtype: what the layers compute in, float32 or, under
    autocast, bfloat16; wanted: what gets a gradient: x first, then every parameter of every layer, absent ones
    included. Parameters, their gradients and statistics are float32.

    constant: parameters and buffers stay as they are (`fastgan.freeze`). Every batch norm that can be is then folded
    into the convolution before it, by `setup`, steps that run once and write to the slot `constants`; the weights that
    the first run packs serve all later ones.

    asked: those of `wanted` whose steps a backward pass can do without. turned_cotangent: where the cotangent is turned
    to, a step that COTANGENT leaves out, or None.

    The slots of a run are: the arena, x, y, the arena's blocks of one pass, parameters, buffers, constants or the
    cotangent of y, and the wanted gradients.
    """

    MADE_AGAIN = 1 << 20  # bytes from which a norm's output does not wait for backward
    PART_BYTES, PART_PIXELS = 512 * 1024, 2048
    WORTH_ASKING = 400_000  # multiplications, 8 us at 50 a nanosecond

    def __init__(
        self, layers: Sequence[Layer], x: Tensor, dtype: torch.dtype, wanted: Sequence[bool], constant: bool = False
    ):
        self.core, self.constant = _native.CPU.module(), constant
        self.dtype, self.code, self.input_code = dtype, _native.DTYPE_CODES[dtype], _native.DTYPE_CODES[x.dtype]
        self.layers, self.places, self.slots = layers, [Place(ARENA)], 1
        self.steps: list[tuple[str, tuple, int | None]] = []  # kernel, fields, the one gradient that it is for
        self.input, self.output = self._slot(), self._slot()
        self.slots = BACKWARD + 1
        parameters = [[self._slot() for _ in layer.parameters()] for layer in layers]
        self.buffers = [[self._slot() for _ in layer.buffers()] for layer in layers]
        self.cotangent = self.constants = self._slot()
        self.setup: list[tuple[str, tuple, int | None]] = []
        self.constant_bytes = 0
        self.gradients = {i: self._slot() for i, wants in enumerate(wanted) if wants}
        self.asked = {0} & self.gradients.keys()  # whose steps are left out where their gradient is not asked for
        self.input_channels_last = self.output_channels_last = is_channels_last(image(x))
        self.passes: list[_Pass] = []

        self.rank = x.dim()  # dimensions of the tensor at hand: 2 for [N, C], 3 for [N, C, L], 4 for images
        shape = (*x.shape, 1, 1) if self.rank == 2 else tuple(image(x).shape)
        h = self._enter(self.input, shape, self.input_channels_last, self.input_code)
        first = 1  # index of a layer's first parameter among `wanted`
        for i in range(len(layers)):
            h, shape = self._layer(i, h, shape, parameters[i], first)
            first += len(parameters[i])
        self._leave(h, self.output, shape, self.output_channels_last, self.code)
        self.forward_steps = len(self.steps)
        plain = plain_order(shape) and layers[-1].makes_strides_plain()
        self.shape = outer(shape, self.rank)  # of y
        self.strides = outer(strides(shape, self.output_channels_last and not plain), self.rank)
        final = self.passes[-1]
        self.reads_output = final.y is self.output and final.t is None and final.epilogue[0] != IDENTITY[0]
        if self.gradients:
            self._backward(shape)
        self.blocks = arrange(self.places, self.forward_steps)
        self.arena_bytes = sum(self.blocks.values())

    def program(self, first: int, last: int, unwanted: frozenset[int] = frozenset()) -> Steps:
        """The steps [first, last), without those that serve unwanted gradients alone."""
        return self._program(self.steps[first:last], unwanted)

    def setup_program(self) -> Steps:
        """The steps that write the constants."""
        return self._program(self.setup)

    def _program(self, steps: Sequence[tuple[str, tuple, int | None]], unwanted: Collection[int] = ()) -> Steps:
        parts: list[Native | Product] = []
        for kernel, fields, only in steps:
            if only is not None and only in unwanted:
                continue
            if kernel in PRODUCTS:
                parts.append(Product(kernel, fields))
                continue
            native = parts[-1] if parts else None
            if not isinstance(native, Native):
                native = Native(self.core.Program())
                parts.append(native)
                if self.constant:
                    native.program.keep_weights()
            native.program.append(kernel, *(f.pointer() if isinstance(f, Place) else f for f in fields))
        return Steps(parts)

    def useful_parts(self) -> int:
        """In how many parts of the batch to run a plan without gradients or batch statistics; 1: as a whole.

        Parts whose arena fits the second-level cache: what a step writes, the next one reads from there. Each part
        packs the weights anew, 1 to 2 % of the time of its products where a layer has PART_PIXELS outputs.
        """
        native = not any(kernel in PRODUCTS for kernel, _, _ in self.steps)
        if not native or any(layer.is_batch_norm() and layer.norm.training for layer in self.layers):
            return 1
        n = self.shape[0]
        pixels = min(p.y_shape[2] * p.y_shape[3] for p in self.passes)
        counts = [k for k in range(1, n + 1) if n % k == 0 and n // k * pixels >= self.PART_PIXELS]
        return next((k for k in counts if self.arena_bytes <= k * self.PART_BYTES), counts[-1] if counts else 1)

    def bytes(self) -> int:
        """Of y."""
        return math.prod(self.shape) * self.dtype.itemsize

    # ---- building ---------------------------------------------------------------------------------------------------

    def _slot(self) -> Place:
        self.slots += 1
        return Place(self.slots - 1)

    def _arena(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Place:
        place = Place(ARENA, dtype.itemsize * math.prod(sizes))
        self.places.append(place)
        return place

    def _image(self, shape: Shape) -> Place:
        return self._arena(*shape, dtype=self.dtype)

    def _lasting(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Place:
        """Memory for what `_prepare` makes of parameters: a constant's, or the arena's."""
        if not self.constant:
            return self._arena(*sizes, dtype=dtype)
        place = Place(self.constants.slot, dtype.itemsize * math.prod(sizes))
        place.offset = self.constant_bytes
        self.constant_bytes += -(-place.bytes // ALIGNMENT) * ALIGNMENT
        return place

    def _prepare(self, kernel: str, *fields: Any) -> None:
        """A step that reads parameters and buffers alone."""
        if self.constant:
            self.setup.append((kernel, fields, None))
        else:
            self._step(kernel, *fields)

    def _step(self, kernel: str, *fields: Any, only: int | None = None) -> None:
        for value in fields:
            if isinstance(value, Place):
                value.touch(len(self.steps))
        self.steps.append((kernel, fields, only))

    def _product(self, kernel: str, *matrices: tuple[Place | None, tuple[int, int]], only: int | None = None) -> None:
        """A step on matrices, each a place and its shape."""
        for place, _ in matrices:
            if place is not None:
                place.touch(len(self.steps))
        operands = tuple(place and (place, shape, self.dtype) for place, shape in matrices)
        self.steps.append((kernel, operands, only))

    def _enter(self, place: Place, shape: Shape, channels_last: bool, code: int, **only: Any) -> Place:
        """The outer tensor as the kernels want it: itself, or its copy in the arena."""
        n, c, h, w = shape
        same_order = channels_last or plain_order(shape)
        if same_order and code == self.code:
            return place
        inside = self._image(shape)
        sizes = (1, 1, math.prod(shape)) if same_order else (n, c, h * w)
        self._step("relayout", code, self.code, place, inside, *sizes, **only)
        return inside

    def _edge(self, place: Place, shape: Shape, channels_last: bool, code: int) -> Place:
        """Where the step before `_leave` writes."""
        return place if (channels_last or plain_order(shape)) and code == self.code else self._image(shape)

    def _leave(self, inside: Place, place: Place, shape: Shape, channels_last: bool, code: int, **only: Any) -> None:
        """To the outer tensor, unless the last step wrote there itself."""
        if inside is place:
            return
        n, c, h, w = shape
        sizes = (1, 1, math.prod(shape)) if channels_last or plain_order(shape) else (n, h * w, c)
        self._step("relayout", self.code, code, inside, place, *sizes, **only)

    # ---- forward ----------------------------------------------------------------------------------------------------

    def _layer(self, i: int, x: Place, shape: Shape, slots: list[Place], first: int) -> tuple[Place, Shape]:
        layer, last = self.layers[i], i == len(self.layers) - 1
        names = [*(("weight", "bias") if layer.conv is not None else ())]
        names += ["gamma", "beta"] if layer.norm is not None else []
        before = shape if layer.flatten else None
        if layer.flatten:
            x, shape = self._flattened(x, shape)
        tensors = dict(zip(names, layer.parameters(), strict=True))
        epilogue = _activation.CODES[layer.activation], layer.slope
        present = {name: slot if tensors[name] is not None else None for name, slot in zip(names, slots, strict=True)}
        gradients = {name: self.gradients.get(first + j) for j, name in enumerate(names)}
        found = _Pass(layer, x, shape, x, shape, epilogue, present, gradients, first)
        found.image = before
        self.passes.append(found)
        if layer.conv is not None and self.rank != _rank(layer.conv):
            raise Unfit
        if isinstance(layer.conv, nn.Linear):
            if shape[1] != layer.conv.in_features:
                raise Unfit
            found.y_shape = shape[0], layer.conv.out_features, 1, 1
        elif layer.conv is not None:
            weight: Any = image(tensors["weight"])
            # torch makes signals contiguous first: there the weight alone decides
            self.output_channels_last = (self.output_channels_last and self.rank == 4) or is_channels_last(weight)
            found.weight_strides = weight.stride()
            found.conv, found.y_shape = self._geometry(layer.conv, weight, shape)
        if isinstance(layer.norm, nn.InstanceNorm2d):  # contiguous in torch, whatever it takes
            self.output_channels_last = False
        out = found.y_shape
        found.y = self._edge(self.output, out, self.output_channels_last, self.code) if last else self._image(out)
        if layer.norm is None:
            self._compute(found)
        elif not layer.is_batch_norm():
            self._normalise_samples(found)
        elif (self.rank < 4) != isinstance(layer.norm, nn.BatchNorm1d) or layer.norm.num_features != out[1]:
            raise Unfit
        elif layer.norm.training:
            self._normalise(i, found)
        else:
            self._normalise_in_eval(i, found, tensors)
        return found.y, found.y_shape

    def _flattened(self, x: Place, shape: Shape) -> tuple[Place, Shape]:
        """The image as nn.Flatten leaves it: a row in NCHW order."""
        n, c, h, w = shape
        if self.rank == 2:
            raise Unfit
        self.rank, row = 2, (n, c * h * w, 1, 1)
        if plain_order(shape):
            return x, row
        flat = self._image(row)
        self._step("relayout", self.code, self.code, x, flat, n, h * w, c)
        return flat, row

    def _compute(self, p: _Pass) -> None:
        """A layer without a norm: a convolution with its epilogue, a linear layer or an activation alone."""
        if isinstance(p.layer.conv, nn.Linear):
            if p.epilogue != IDENTITY:
                raise Unfit
            self._multiply(p, p.y)
        elif p.layer.conv is not None:
            self._convolve(p, p.parameters["weight"], p.parameters["bias"], p.y, p.epilogue)
        else:
            n, c, h, w = p.y_shape
            self._step("bias_act_forward", self.code, p.x, None, p.y, n, c, h * w, True, *p.epilogue, *PLAIN)

    def _multiply(self, p: _Pass, y: Place) -> None:
        n, c, k = p.x_shape[0], p.x_shape[1], p.y_shape[1]
        weight, bias = p.parameters["weight"], p.parameters["bias"]
        self._product("linear", (p.x, (n, c)), (weight, (k, c)), (bias, (1, k)), (y, (n, k)))

    def _geometry(self, conv: Any, weight: Tensor, shape: Shape) -> tuple[Any, Shape]:
        like, g = torch.empty(shape, device="meta"), Geometry.of(conv)
        small: Shape
        large: Shape
        if isinstance(conv, TRANSPOSED):
            numbers = g.stride, g.padding, g.output_padding, conv.groups, g.dilation
            out = tuple(_conv_transpose2d.output_shape(like, weight, *numbers))
            small, large, channels = shape, out, weight.shape[0]
        else:
            out = tuple(_conv2d.output_shape(like, weight, g.stride, g.padding, g.dilation))
            small, large, channels = out, shape, weight.shape[1] * conv.groups
        if shape[1] != channels or min(out) < 1:
            raise Unfit
        geometry = tuple(weight.shape[2:]), g.stride, g.padding, g.dilation, conv.groups
        return _conv2d.plan(self.core, large, small, *geometry), out

    def _convolve(self, p: _Pass, weight: Any, bias: Any, y: Place, epilogue: tuple) -> None:
        kernel = "conv_transpose2d" if isinstance(p.layer.conv, TRANSPOSED) else "conv2d"
        fields = p.x, weight, FLOAT32, p.weight_strides, self._rounded(bias, p.y_shape[1]), y
        self._step(kernel, p.conv, self.code, *fields, *epilogue)

    def _rounded(self, bias: Place | None, channels: int) -> Place | None:
        """A bias as autocast's cast leaves it."""
        if bias is None or self.code == FLOAT32:
            return bias
        narrow, wide = self._lasting(channels, dtype=self.dtype), self._lasting(channels)
        self._prepare("relayout", FLOAT32, self.code, bias, narrow, 1, 1, channels)
        self._prepare("relayout", self.code, FLOAT32, narrow, wide, 1, 1, channels)
        return wide

    def _norm_input(self, p: _Pass) -> Place:
        """The norm's input: the layer's, or its convolution's output."""
        if p.layer.conv is None:
            return p.x
        t = self._image(p.y_shape)
        if isinstance(p.layer.conv, nn.Linear):
            self._multiply(p, t)
        else:
            self._convolve(p, p.parameters["weight"], p.parameters["bias"], t, IDENTITY)
        return t

    def _norm_fields(self, p: _Pass, groups: int, training: bool) -> tuple:
        n, c, h, w = p.y_shape
        return n, c, h * w, groups, True, training, float(p.layer.norm.eps), *p.epilogue

    def _normalise(self, i: int, p: _Pass) -> None:
        norm, (n, c, h, w) = p.layer.norm, p.y_shape
        groups = norm.stat_groups
        if groups < 1 or n % groups or n // groups * h * w < 2:
            raise Unfit
        p.t = self._norm_input(p)
        p.statistics = self._arena(groups, c), self._arena(groups, c)
        p.norm, p.norm_shape = "bn_act", self._norm_fields(p, groups, True)
        vectors = p.parameters["gamma"], p.parameters["beta"], *p.statistics
        self._step("bn_act_forward", self.code, p.t, *vectors, p.y, *p.norm_shape)
        if norm.track_running_stats and norm.running_mean is not None:
            count = n // groups * h * w
            self._step("bn_update", *p.statistics, *self.buffers[i], groups, c, count, float(norm.momentum))

    def _normalise_samples(self, p: _Pass) -> None:
        """Group, instance and layer norm: groups of a sample's channels have statistics of their own."""
        norm, (n, c, h, w) = p.layer.norm, p.y_shape
        if isinstance(norm, nn.LayerNorm):
            groups, fits = 1, self.rank == 2 and tuple(norm.normalized_shape) == (c,)
        elif isinstance(norm, nn.GroupNorm):
            groups, fits = norm.num_groups, c == norm.num_channels and n * c * h * w > norm.num_groups
        else:
            groups, fits = c, self.rank == 4 and c == norm.num_features and h * w > 1
        if not fits:
            raise Unfit
        p.t = self._norm_input(p)
        p.statistics = self._arena(n, groups), self._arena(n, groups)
        p.norm, p.norm_shape = "gn_act", (n, c, h * w, groups, True, float(norm.eps), *p.epilogue)
        vectors = p.parameters["gamma"], p.parameters["beta"], *p.statistics
        self._step("gn_act_forward", self.code, p.t, *vectors, p.y, *p.norm_shape)

    def _normalise_in_eval(self, i: int, p: _Pass, tensors: dict[str, Any]) -> None:
        layer, (mean, var, _) = p.layer, self.buffers[i]
        vectors = p.parameters["gamma"], p.parameters["beta"], mean, var
        can = isinstance(layer.conv, nn.Conv2d | nn.ConvTranspose2d)
        if not can or not folds(layer.conv, tensors["weight"], p.x_shape, self.constant):
            t = self._norm_input(p)
            self._step("bn_act_forward", self.code, t, *vectors, p.y, *self._norm_fields(p, 1, False))
            return
        weight = tensors["weight"]
        folded, shift = self._lasting(weight.numel()), self._lasting(p.y_shape[1])
        sizes = _channel_axis(layer.conv, weight)
        self._prepare(
            "bn_fold",
            p.parameters["weight"],
            p.parameters["bias"],
            *vectors,
            folded,
            shift,
            *sizes,
            float(layer.norm.eps),
        )
        self._convolve(p, folded, shift, p.y, p.epilogue)

    # ---- backward ---------------------------------------------------------------------------------------------------

    def _backward(self, shape: Shape) -> None:
        bottom = 0 if 0 in self.gradients else self._lowest()
        dy = self._enter(self.cotangent, shape, self.output_channels_last, self.code, only=COTANGENT)
        self.turned_cotangent = None if dy is self.cotangent else dy
        for i in range(len(self.passes) - 1, bottom - 1, -1):
            p = self.passes[i]
            dx: Place | None = None
            if i > bottom or (p.image is not None and 0 in self.gradients):
                dx = self._image(p.x_shape)
            elif 0 in self.gradients:
                dx = self._edge(self.gradients[0], p.x_shape, self.input_channels_last, self.input_code)
            through = dx if p.layer.conv is None else None
            dt = self._epilogue_backward(p, dy, through)
            if isinstance(p.layer.conv, nn.Linear):
                self._product_backward(i, dt, dx, 0 if i == bottom else None)
            elif p.layer.conv is not None:
                self._convolution_backward(i, dt, dx, 0 if i == bottom else None)
            if dx is not None:
                dy = self._unflattened(dx, p.image) if p.image is not None else dx
        if 0 in self.gradients:
            edge = self.passes[0].image or self.passes[0].x_shape, self.input_channels_last, self.input_code
            self._leave(dy, self.gradients[0], *edge, only=0)

    def _unflattened(self, row: Place, shape: Shape) -> Place:
        n, c, h, w = shape
        if plain_order(shape):
            return row
        image = self._image(shape)
        self._step("relayout", self.code, self.code, row, image, n, c, h * w)
        return image

    def _lowest(self) -> int:
        """The first layer that learns: nothing below it is differentiated."""
        return next(i for i, p in enumerate(self.passes) if any(g is not None for g in p.gradients.values()))

    def _epilogue_backward(self, p: _Pass, dy: Place, out: Place | None) -> Place:
        """The gradient of what the convolution wrote, or of a lone norm's input, at `out` where that is given."""
        n, c, h, w = p.y_shape
        shape: tuple = n, c, h * w, True
        dbias = p.gradients.get("bias")
        if p.t is None:
            if plain_order(p.y_shape) and p.layer.makes_strides_plain():
                shape = n, c, h * w, False  # sums in the order in which the op takes an output of those strides
            if p.epilogue[0] == IDENTITY[0]:
                dt = dy
                fields: tuple[Place | None, ...] = dy, dy, None
            else:
                dt = self._in_place_of(dy, p, out)
                fields = dy, p.y, dt
            if dbias is not None or p.epilogue[0] != IDENTITY[0]:
                self._step("bias_act_backward", self.code, *fields, dbias, *shape, *p.epilogue, *PLAIN)
            return dt
        dt = self._in_place_of(dy, p, out)
        vectors = p.parameters["gamma"], p.parameters["beta"], *p.statistics
        found = p.gradients["gamma"], p.gradients["beta"]
        self._step(f"{p.norm}_backward", self.code, dy, p.t, *vectors, dt, *found, *p.norm_shape)
        if dbias is not None:
            self._step("bias_act_backward", self.code, dt, dt, None, dbias, *shape, *IDENTITY, *PLAIN)
        return dt

    def _in_place_of(self, dy: Place, p: _Pass, out: Place | None) -> Place:
        """`out`, or where dy lies, which nothing reads again; a cotangent stays as it is."""
        return out or (dy if dy.slot == ARENA else self._image(p.y_shape))

    def _input(self, i: int, only: int | None) -> Place:
        """The input of layer i for its weight's gradient.

        It waits since forward, or it is a large output of a batch norm: that is made again from the norm's input, which
        waits anyway, by the pass that made it first and so to the bit.
        """
        p, before = self.passes[i], self.passes[i - 1]
        if i == 0 or p.x is not before.y or before.norm != "bn_act" or p.x.bytes < self.MADE_AGAIN:
            return p.x
        x = self._image(p.x_shape)
        vectors = before.parameters["gamma"], before.parameters["beta"], *before.statistics
        shape = self._norm_fields(before, before.layer.norm.stat_groups, False)
        self._step("bn_act_forward", self.code, before.t, *vectors, x, *shape, only=only)
        return x

    def _weight_only(self, p: _Pass, pixels: int) -> int | None:
        """The weight's index, where making its gradient for nothing costs more than to ask for it: asking for a leaf
        under torch.autograd.grad takes 8 us, an exception of torch's own."""
        if pixels * p.layer.conv.weight.numel() < self.WORTH_ASKING:
            return None
        self.asked.add(p.first)
        return p.first

    def _product_backward(self, i: int, dt: Place, dx: Place | None, input_only: int | None) -> None:
        p = self.passes[i]
        n, c, k = p.x_shape[0], p.x_shape[1], p.y_shape[1]
        if (dw := p.gradients["weight"]) is not None:
            only = self._weight_only(p, n)
            self._product("linear_weight", (dt, (n, k)), (self._input(i, only), (n, c)), (dw, (k, c)), only=only)
        if dx is not None:
            weight = p.parameters["weight"], (k, c)
            self._product("linear_input", (dt, (n, k)), weight, (dx, (n, c)), only=input_only)

    def _convolution_backward(self, i: int, dt: Place, dx: Place | None, input_only: int | None) -> None:
        p = self.passes[i]
        transposed = isinstance(p.layer.conv, TRANSPOSED)
        if (dw := p.gradients["weight"]) is not None:
            n, _, h, w = p.x_shape if transposed else p.y_shape
            only = self._weight_only(p, n * h * w)
            x = self._input(i, only)
            images = (dt, x) if transposed else (x, dt)
            self._step("conv2d_weight", p.conv, self.code, *images, dw, FLOAT32, p.weight_strides, only=only)
        if dx is not None:
            weight = p.parameters["weight"], FLOAT32, p.weight_strides
            kernel = "conv2d" if transposed else "conv_transpose2d"
            self._step(kernel, p.conv, self.code, dt, *weight, None, dx, *IDENTITY, only=input_only)


def _rank(product: Any) -> int:
    """Dimensions of what a convolution or linear layer takes."""
    return 2 if isinstance(product, nn.Linear) else 2 + len(product.kernel_size)


def folds(conv: Any, weight: Tensor, shape: Shape, constant: bool) -> bool:
    """Whether `functional.conv2d_bn_act` and its sibling fold the norm in eval mode for an input of this shape, or, of
    constants, whether they can."""
    if constant:
        return conv.groups == 1 or not isinstance(conv, nn.ConvTranspose2d)
    pixels, strides = shape[0] * shape[2] * shape[3], math.prod(conv.stride)
    if isinstance(conv, nn.ConvTranspose2d):
        return conv.groups == 1 and pixels * strides >= weight[:, 0].numel()
    return pixels >= weight[0].numel() * strides


def _channel_axis(conv: Any, weight: Tensor) -> tuple[int, int, int]:
    """(outer, channels, inner): the weight in memory, seen as [outer, output channels, inner]."""
    c, k, r, s = weight.shape
    if not isinstance(conv, nn.ConvTranspose2d):
        return 1, c, k * r * s
    return (c, k, r * s) if weight.is_contiguous() else (c * r * s, k, 1)
