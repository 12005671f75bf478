"""The public functions: torch.nn.functional's arguments in its order, ours keyword-only after them.

Every function is differentiable twice or more, runs on the best backend (see `fastgan.backends`), and returns tensors
of x's dtype and layout. Forward-mode AD and torch.func transforms raise NotImplementedError.
"""

from fastgan.functional.attention import l2_attention, scaled_dot_product_attention
from fastgan.functional.blocks import conv2d_bias_act, conv2d_bn_act, conv_transpose2d_bn_act
from fastgan.functional.convolution import (
    conv1d,
    conv2d,
    conv2d_statistics,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose2d_statistics,
)
from fastgan.functional.dropout import dropout
from fastgan.functional.elementwise import bias_act
from fastgan.functional.losses import adaptive_weight, gan_loss, gan_loss_statistics, lecam_regularization
from fastgan.functional.modulation import modulated_conv2d
from fastgan.functional.multi_head import multi_head_attention_forward
from fastgan.functional.norm import bn_act, gn_act, in_act, ln_act
from fastgan.functional.penalties import grad_norm_penalty, interpolate
from fastgan.functional.resampling import conv2d_resample, filtered_lrelu, upfirdn2d
from fastgan.functional.transformer import glu, layer_norm, linear_act, rms_norm
from fastgan.penalties import gradient_penalty, path_lengths

__all__ = [
    "adaptive_weight",
    "bias_act",
    "bn_act",
    "conv1d",
    "conv2d",
    "conv2d_bias_act",
    "conv2d_bn_act",
    "conv2d_resample",
    "conv2d_statistics",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose2d_bn_act",
    "conv_transpose2d_statistics",
    "dropout",
    "filtered_lrelu",
    "gan_loss",
    "gan_loss_statistics",
    "glu",
    "gn_act",
    "grad_norm_penalty",
    "gradient_penalty",
    "in_act",
    "interpolate",
    "l2_attention",
    "layer_norm",
    "lecam_regularization",
    "linear_act",
    "ln_act",
    "modulated_conv2d",
    "multi_head_attention_forward",
    "path_lengths",
    "rms_norm",
    "scaled_dot_product_attention",
    "upfirdn2d",
]
