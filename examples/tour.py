"""A tour in cells: `python examples/tour.py` trains a small GAN on garments in about a minute and leaves pictures.

Run it as a script, or cell by cell in an editor that knows `# %%`. The pictures lie in `--out` (default runs/tour),
numbered in the order of the cells.
"""

# %% What is asked for
import argparse
from pathlib import Path

import torch

import fastgan
from fastgan import data, metrics

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("runs/tour"))
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--data", default="fashion-mnist", help="a bundled set, or a folder of images of yours")
options = parser.parse_args()
options.out.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)

# %% 1. The images: held as bytes, given as batches in [-1, 1]
images = data.load(options.data, image_size=28, channels=1, device="cpu")
batches = images.batches(32, generator=torch.Generator().manual_seed(0))
real, _ = next(batches)
data.save_grid(real, options.out / "1-real.png", columns=8)
print(f"{len(images)} images of {images.image_size}; a batch is {tuple(real.shape)}")

# %% 2. The networks: plain torch.nn, converted in place
generator, discriminator = fastgan.models.build("dcgan-28", g_width=16, d_width=16, dropout=0.0)
fastgan.convert(generator)
fastgan.convert(discriminator)
z = torch.randn(64, 100)
print(fastgan.explain(discriminator, real))

# %% 3. Before training: noise
with torch.no_grad():
    data.save_grid(generator(z), options.out / "3-untrained.png", columns=8)

# %% 4. Training: one call is one update of D and one of G
step = fastgan.GANStep(
    generator,
    discriminator,
    latent=100,
    g_optimizer=fastgan.Adam(generator.parameters(), 5e-4, betas=(0.5, 0.999)),
    d_optimizer=fastgan.Adam(discriminator.parameters(), 5e-4, betas=(0.5, 0.999)),
    ema=0.98,
)
for number in range(1, options.steps + 1):
    values = step(next(batches)[0])
    if number % max(1, options.steps // 6) == 0:  # reading a metric waits for the device: not at every step
        print(f"step {number}: D {values['d_loss'].item():.3f}  G {values['g_loss'].item():.3f}")
        generator.eval()
        with torch.no_grad():
            data.save_grid(generator(z), options.out / f"4-step-{number:05}.png", columns=8)
        generator.train()

# %% 5. The averaged generator: the same latents, calmer pictures
average = step.ema.eval()
with torch.no_grad():
    pictures = average(z)
data.save_grid(pictures, options.out / "5-average.png", columns=8)

# %% 6. A walk through the latent space: eight walks from left to right
start, end = torch.randn(8, 1, 100), torch.randn(8, 1, 100)
share = torch.linspace(0, 1, 10).view(1, 10, 1)
with torch.no_grad():
    walk = average(torch.lerp(start, end, share).flatten(0, 1))
data.save_grid(walk, options.out / "6-walk.png", columns=10)

# %% 7. How far from the real images? Beside it the distance between two batches of real images
distance = metrics.sliced_wasserstein(real, pictures[:32])
floor = metrics.sliced_wasserstein(real, next(batches)[0])
for side in distance:
    print(
        f"sliced Wasserstein distance at {side} x {side}: {distance[side]:.1f}, between real batches {floor[side]:.1f}"
    )

# %% 8. A gradient penalty, differentiated exactly; `explain` names the route
penalty = fastgan.functional.gradient_penalty(discriminator, real, pictures[:32], kind="r1", weight=10.0)
penalty.backward()
print(f"R1 penalty {penalty.item():.3f}; {str(fastgan.explain(discriminator, real)).splitlines()[-1]}")
print(f"the pictures are in {options.out}")
