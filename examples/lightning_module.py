"""A GAN as a Lightning module: `pip install -e '.[lightning]'`, then `python examples/lightning_module.py`.

Lightning holds the loop, the two optimisers and the checkpoints; the networks are plain torch.nn. What changes: the
two lines with `fastgan.convert`, which may stand wherever the networks are made, and the losses, which are calls of
`fastgan.functional`. Checkpoints fit with and without them. With --plain PyTorch's own losses and networks run.
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import nn

import fastgan

try:
    import pytorch_lightning as lightning
except ImportError as error:
    sys.exit(f"examples/lightning_module.py needs Lightning ({error}); pip install -e '.[lightning]'")

LATENT = 64


def networks(width):
    generator = nn.Sequential(
        nn.ConvTranspose2d(LATENT, 2 * width, 7, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.ConvTranspose2d(width, 1, 4, 2, 1),
        nn.Tanh(),
    )
    discriminator = nn.Sequential(
        nn.Conv2d(1, width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 1, 7),
        nn.Flatten(0),
    )
    return generator, discriminator


def textbook_losses(discriminator, real, fake):
    """D's binary cross entropy, from logits, and 5 mean |gradient|^2 on real images."""
    points = real.clone().requires_grad_()
    logits = discriminator(points)
    (gradient,) = torch.autograd.grad(logits.sum(), points, create_graph=True)
    bce = F.softplus(-logits).mean() + F.softplus(discriminator(fake)).mean()
    return bce + 5.0 * gradient.flatten(1).square().sum(1).mean()


def fast_losses(discriminator, real, fake):
    bce = fastgan.functional.gan_loss(discriminator(fake), discriminator(real), kind="bce", side="d")
    return bce + fastgan.functional.gradient_penalty(discriminator, real, kind="r1", weight=10.0)


class GAN(lightning.LightningModule):
    def __init__(self, width=16, plain=False):
        super().__init__()
        self.automatic_optimization = False  # two optimisers
        self.generator, self.discriminator = networks(width)
        self.d_losses = textbook_losses
        if not plain:
            fastgan.convert(self.generator)
            fastgan.convert(self.discriminator)
            self.d_losses = fast_losses

    def configure_optimizers(self):
        return [torch.optim.Adam(m.parameters(), 2e-4, betas=(0.5, 0.99)) for m in (self.generator, self.discriminator)]

    def training_step(self, batch, i):
        g_adam, d_adam = self.optimizers()
        (real,) = batch
        fake = self.generator(torch.randn(len(real), LATENT, 1, 1, device=self.device))
        d_loss = self.d_losses(self.discriminator, real, fake.detach())
        d_adam.zero_grad()
        self.manual_backward(d_loss)
        d_adam.step()
        g_loss = F.softplus(-self.discriminator(fake)).mean()
        g_adam.zero_grad()
        self.manual_backward(g_loss)
        g_adam.step()
        print(f"step {i + 1}: D {d_loss:.4f}  G {g_loss:.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--plain", action="store_true", help="PyTorch alone")
    args = parser.parse_args()
    torch.manual_seed(0)
    batches = fastgan.data.load("fashion-mnist", image_size=28, channels=1).batches(
        32, generator=torch.Generator().manual_seed(0)
    )
    images = torch.cat([next(batches)[0] for _ in range(args.steps)])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), 32)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=2 * args.steps, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(GAN(args.width, args.plain), loader)


if __name__ == "__main__":
    main()
