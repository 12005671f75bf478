"""Your loop, and the same loop with fastgan: run `python examples/gan_step.py` and compare the losses.

Any generator and discriminator will do. Here: `dcgan-28` at a fourth of its width on Fashion-MNIST.
"""

import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce

import fastgan

BATCH, STEPS = 64, 20


def setup():
    torch.manual_seed(0)
    generator, discriminator = fastgan.models.build("dcgan-28", g_width=16, d_width=16, dropout=0.0)
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True)
    images = fastgan.data.load("fashion-mnist", image_size=28, channels=1, device="cpu")
    batches = images.batches(BATCH, generator=torch.Generator().manual_seed(0))
    return generator, discriminator, g_optimizer, d_optimizer, batches


def textbook():
    generator, discriminator, g_optimizer, d_optimizer, batches = setup()
    ones, zeros = torch.ones(BATCH), torch.zeros(BATCH)
    for _ in range(STEPS):
        real, _ = next(batches)
        fake = generator(torch.randn(BATCH, 100))

        d_optimizer.zero_grad()
        d_loss = bce(discriminator(real), ones) + bce(discriminator(fake.detach()), zeros)
        d_loss.backward()
        d_optimizer.step()

        g_optimizer.zero_grad()
        g_loss = bce(discriminator(fake), ones)
        g_loss.backward()
        g_optimizer.step()
    return d_loss.item(), g_loss.item()


def drop_in():
    generator, discriminator, g_optimizer, d_optimizer, batches = setup()
    step = fastgan.GANStep(
        fastgan.convert(generator),
        fastgan.convert(discriminator),
        latent=100,
        g_optimizer=g_optimizer,
        d_optimizer=d_optimizer,
    )
    for _ in range(STEPS):
        real, _ = next(batches)
        metrics = step(real)  # lazy: nothing waits for the device until a value is read
    return metrics["d_loss"].item(), metrics["g_loss"].item()


if __name__ == "__main__":
    print("textbook loop:   D loss {:.6f}  G loss {:.6f}".format(*textbook()))
    print("fastgan.GANStep: D loss {:.6f}  G loss {:.6f}".format(*drop_in()))
