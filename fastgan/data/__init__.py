"""Image sets: bundled ones, folders, zips, idx and NumPy files, held as bytes on the training device; other samples as
floats."""

from fastgan.data.catalogue import available
from fastgan.data.fingerprint import fingerprint
from fastgan.data.grid import make_grid, save_grid, to_uint8
from fastgan.data.imageset import Batches, ImageSet, Samples
from fastgan.data.inspection import Inspection, all_grey, inspect
from fastgan.data.loading import absolute, load, prepare
from fastgan.data.memory import require
from fastgan.data.tensorset import TensorSet

__all__ = [
    "Batches",
    "ImageSet",
    "Inspection",
    "Samples",
    "TensorSet",
    "absolute",
    "all_grey",
    "available",
    "fingerprint",
    "inspect",
    "load",
    "make_grid",
    "prepare",
    "require",
    "save_grid",
    "to_uint8",
]
