"""Your own model on fastgan's kernels: run `python examples/convert_your_model.py`.

`fastgan.convert` changes neither parameters nor state_dict keys nor results, so optimisers and checkpoints
made before or after it fit. `fastgan.explain` says per layer what was fused, and why not where it was not.
"""

import copy

import torch
from torch import nn

import fastgan

generator = nn.Sequential(
    nn.ConvTranspose2d(64, 128, 4, 1, 0, bias=False),
    nn.BatchNorm2d(128),
    nn.ReLU(inplace=True),
    nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False),
    nn.BatchNorm2d(64),
    nn.ReLU(inplace=True),
    nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=False),
    nn.Tanh(),
).to(memory_format=torch.channels_last)

original = copy.deepcopy(generator)
fast = fastgan.convert(generator)
z = torch.randn(16, 64, 1, 1)

print(fastgan.explain(fast, z))
print("same keys:         ", list(fast.state_dict()) == list(original.state_dict()))
print("largest difference:", (fast(z) - original(z)).abs().max().item())
