"""Image sets: bundled ones, folders, zips, idx and NumPy files, held as bytes on the training device."""

from fastgan.data.catalogue import available
from fastgan.data.fingerprint import fingerprint
from fastgan.data.grid import make_grid, save_grid, to_uint8
from fastgan.data.imageset import Batches, ImageSet
from fastgan.data.inspection import Inspection, inspect
from fastgan.data.loading import absolute, load, prepare

__all__ = [
    "Batches",
    "ImageSet",
    "Inspection",
    "absolute",
    "available",
    "fingerprint",
    "inspect",
    "load",
    "make_grid",
    "prepare",
    "save_grid",
    "to_uint8",
]
