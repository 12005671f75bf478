"""The ops of StyleGAN2-ADA and StyleGAN3 (`torch_utils.ops`) under their signatures, without nvcc.

`install()` puts them in the place of a project's own modules: its networks, its training loop and pickled networks
that carry their source then run on fastgan's ops. Each op is differentiable to every order that the project uses, and
runs on every device. Signatures and behaviour follow the projects' public documentation (Karras et al., 2020 and 2021);
the code is fastgan's.
"""

from fastgan.compat.stylegan import (
    bias_act,
    conv2d_gradfix,
    conv2d_resample,
    filtered_lrelu,
    fma,
    grid_sample_gradfix,
    upfirdn2d,
)
from fastgan.compat.stylegan.installation import Installation, install

__all__ = [
    "Installation",
    "bias_act",
    "conv2d_gradfix",
    "conv2d_resample",
    "filtered_lrelu",
    "fma",
    "grid_sample_gradfix",
    "install",
    "upfirdn2d",
]
