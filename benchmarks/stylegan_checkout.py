"""A StyleGAN checkout's networks in float64, its formulas and our ops: python benchmarks/stylegan_checkout.py PATH"""

import importlib
import pickle
import sys
from pathlib import Path

import torch
from torch.autograd import grad

import fastgan

SMALL = {"channel_base": 512, "channel_max": 16, "num_fp16_res": 0, "conv_clamp": 256}
# StyleGAN3's t and r, whose sources import scipy and pkg_resources; PyTorch's depthwise double backward takes long.
FORMS = {"networks_stylegan3": [{"channel_max": 4, "conv_kernel": k, "use_radial_filters": k == 1} for k in (3, 1)]}


class Wide:  # in the place of torch in the networks' sources, which name float32
    __getattr__ = staticmethod(lambda name: getattr(torch, "float64" if name == "float32" else name))


def widened(net):
    sys.modules[type(net).__module__].torch = Wide()
    for name, buffer in net.named_buffers():
        buffer.data = buffer.float() if "filter" in name else buffer  # the checkouts ask for float32
    return net


def networks(name):
    module = importlib.import_module(f"training.{name}")
    module.torch = Wide()
    for form in FORMS.get(name, [{}]):
        options = {"synthesis_kwargs": SMALL} if name == "networks" else SMALL | form
        yield widened(module.Generator(16, 2, 16, 32, 3, **options))
    for architecture in ("orig", "skip", "resnet") if hasattr(module, "Discriminator") else ():
        yield widened(module.Discriminator(2, 32, 3, architecture, **SMALL))


def results(net):
    torch.manual_seed(1)
    labels, leaves = torch.eye(2).repeat(2, 1), list(net.parameters())
    makes = hasattr(net, "synthesis")
    x = net.mapping(torch.randn(4, 16), labels) if makes else torch.randn(4, 3, 32, 32, requires_grad=True)
    y = net.synthesis(x, noise_mode="const") if makes else net(x, labels)
    (dx,) = grad((y * torch.randn_like(y)).sum(), x, create_graph=True)
    found = [grad(loss, leaves, retain_graph=True, allow_unused=True) for loss in (y.sin().sum(), dx.square().sum())]
    return [y, dx, *[torch.zeros(1) if g is None else g for g in found[0] + found[1]]]


torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
sys.path.insert(0, sys.argv[1])
nets = [net for p in sorted(Path(sys.argv[1], "training").glob("networks*.py")) for net in networks(p.stem)]
plain = [t for net in nets for t in results(net)]
fastgan.compat.stylegan.install()
for what, again in {"on fastgan": nets, "pickled": [widened(pickle.loads(pickle.dumps(net))) for net in nets]}.items():
    ours = [t for net in again for t in results(net)]
    pairs = zip(ours, plain, strict=True)
    print(what, len(nets), len(ours), max(((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs))
