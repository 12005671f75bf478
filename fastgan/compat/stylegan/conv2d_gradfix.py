"""Convolutions that are differentiable to every order, and `no_weight_gradients`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

from torch import Tensor

from fastgan import functional
from fastgan.ops.conv2d import skip_weight_gradients, skips_weight_gradients, without_weight_gradients

__all__ = ["conv2d", "conv_transpose2d", "no_weight_gradients"]

Size2 = int | Sequence[int]

enabled = True  # StyleGAN's training loops set it; fastgan's convolutions need no switch


@contextlib.contextmanager
def no_weight_gradients(disable: bool = True) -> Iterator[None]:
    """Within: a backward pass computes no weight gradient of a convolution, which comes out as None.

    What a backward pass with create_graph records within is differentiated outside as ever: the weight's gradient of
    an R1 penalty is there. Holds in every thread of the process, for every convolution of fastgan.
    """
    with without_weight_gradients(disable):
        yield


class Switched(ModuleType):
    """This module, whose flag is the one that convolutions read, also where a project sets it by hand."""

    @property
    def weight_gradients_disabled(self) -> bool:
        return skips_weight_gradients()

    @weight_gradients_disabled.setter
    def weight_gradients_disabled(self, disabled: bool) -> None:
        skip_weight_gradients(bool(disabled))


sys.modules[__name__].__class__ = Switched


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
    groups: int = 1,
) -> Tensor:
    """`fastgan.functional.conv2d`."""
    return functional.conv2d(input, weight, bias, stride, padding, dilation, groups)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 = 0,
    output_padding: Size2 = 0,
    groups: int = 1,
    dilation: Size2 = 1,
) -> Tensor:
    """`fastgan.functional.conv_transpose2d`."""
    return functional.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
