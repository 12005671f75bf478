"""The ops: one file each, with its card, cost, reference, native launcher and derivatives."""

from fastgan.ops import (
    adam,
    attention,
    bias_act,
    bn_act,
    conv2d,
    conv2d_weight,
    conv_transpose2d,
    filtered_lrelu,
    gan_loss,
    gn_act,
    grad_norm_penalty,
    interpolate,
    sample_dot,
    upfirdn2d,
)

__all__ = [
    "adam",
    "attention",
    "bias_act",
    "bn_act",
    "conv2d",
    "conv2d_weight",
    "conv_transpose2d",
    "filtered_lrelu",
    "gan_loss",
    "gn_act",
    "grad_norm_penalty",
    "interpolate",
    "sample_dot",
    "upfirdn2d",
]
