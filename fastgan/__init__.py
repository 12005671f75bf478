"""fastgan: GAN training with fused kernels behind torch's own module and function signatures."""

import os as _os
import warnings as _warnings

import torch as _torch  # noqa: F401  first: its OpenMP runtime is the one that fastgan._C binds to

from fastgan import compat, data, functional, models, nn, ops, testing
from fastgan._version import __version__ as __version__
from fastgan.choice import backend, backends, racing
from fastgan.convert import convert, explain, revert
from fastgan.doctor import doctor
from fastgan.frozen import freeze
from fastgan.training.adam import Adam
from fastgan.training.recipes import Recipe, recipes
from fastgan.training.step import GANStep
from fastgan.training.trainer import Trainer

__all__ = [
    "Adam",
    "GANStep",
    "Recipe",
    "Trainer",
    "backend",
    "backends",
    "compat",
    "convert",
    "data",
    "doctor",
    "explain",
    "freeze",
    "functional",
    "models",
    "nn",
    "ops",
    "racing",
    "recipes",
    "revert",
    "testing",
]

if _os.environ.get("FASTGAN_BACKEND"):
    try:
        backend(_os.environ["FASTGAN_BACKEND"])
    except (ValueError, RuntimeError) as _error:  # importing never fails; the choice is then "auto"
        _warnings.warn(f"fastgan: FASTGAN_BACKEND is ignored: {_error}", RuntimeWarning, stacklevel=2)
