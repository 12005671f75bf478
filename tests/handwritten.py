"""Networks as people write them, of four families, for the tests of traced conversion; nothing here knows fastgan."""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm


def old(norm, layer):
    """torch's older spectral or weight norm, a hook."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(nn.utils, norm)(layer)


# ---- residual SNGAN: spectral norm in both forms, a projection of the label -----------------------------------------


class SNBlock(nn.Module):
    def __init__(self, i, o, wrap, down=True):
        super().__init__()
        self.c1, self.c2 = wrap(nn.Conv2d(i, o, 3, padding=1)), wrap(nn.Conv2d(o, o, 3, padding=1))
        self.skip = wrap(nn.Conv2d(i, o, 1)) if down or i != o else None
        self.down = down

    def forward(self, x):
        h = self.c2(F.relu(self.c1(F.relu(x))))
        s = x if self.skip is None else self.skip(x)
        if self.down:
            h, s = F.avg_pool2d(h, 2), F.avg_pool2d(s, 2)
        return h + s


class SNDiscriminator(nn.Module):
    def __init__(self, width=8, wrap=spectral_norm, classes=0):
        super().__init__()
        self.first = wrap(nn.Conv2d(3, width, 3, padding=1))
        self.blocks = nn.ModuleList([SNBlock(width, width, wrap), SNBlock(width, width, wrap, down=False)])
        self.head = wrap(nn.Linear(width, 1))
        self.embed = wrap(nn.Embedding(classes, width)) if classes else None

    def forward(self, x, y=None):
        h = F.leaky_relu(self.first(x), 0.1)
        for block in self.blocks:
            h = block(h)
        h = F.relu(h).sum(dim=(2, 3))
        out = self.head(h)
        if y is not None:
            out = out + (self.embed(y) * h).sum(1, keepdim=True)
        return out


class UpBlock(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.b1, self.b2 = nn.BatchNorm2d(i), nn.BatchNorm2d(o)
        self.c1, self.c2 = nn.Conv2d(i, o, 3, padding=1, bias=False), nn.Conv2d(o, o, 3, padding=1, bias=False)
        self.b3 = nn.BatchNorm2d(o)
        self.skip, self.act = nn.Conv2d(i, o, 1), nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.act(self.b1(x))
        h = self.c1(F.interpolate(h, scale_factor=2))
        h = self.b3(self.c2(self.act(self.b2(h))))
        h += self.skip(F.interpolate(x, scale_factor=2))
        return self.act(h)


class SNGenerator(nn.Module):
    def __init__(self, width=8, latent=16):
        super().__init__()
        self.width = width
        self.dense = nn.Linear(latent, width * 16)
        self.blocks = nn.Sequential(UpBlock(width, width), UpBlock(width, width))
        self.out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z):
        h = self.dense(z).view(-1, self.width, 4, 4)
        return torch.tanh(self.out(self.blocks(h)))


# ---- pix2pix: a U-Net with skips and dropout, a PatchGAN ------------------------------------------------------------


class UNet(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.d1 = nn.Conv2d(3, width, 4, 2, 1)
        self.d2, self.n2 = nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.d3 = nn.Conv2d(2 * width, 2 * width, 4, 2, 1)
        self.u3, self.m3 = nn.ConvTranspose2d(2 * width, 2 * width, 4, 2, 1), nn.BatchNorm2d(2 * width)
        self.u2, self.m2 = nn.ConvTranspose2d(4 * width, width, 4, 2, 1), nn.InstanceNorm2d(width, affine=True)
        self.u1 = nn.ConvTranspose2d(2 * width, 3, 4, 2, 1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        a = self.d1(x)
        b = self.n2(self.d2(F.leaky_relu(a, 0.2)))
        c = self.d3(F.leaky_relu(b, 0.2))
        h = self.dropout(self.m3(self.u3(F.relu(c))))
        h = F.relu(self.m2(self.u2(F.relu(torch.cat([h, b], 1)))))
        return self.u1(torch.cat([h, a], 1)).tanh()


class PatchGAN(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(6, width, 4, 2, 1)
        self.conv2, self.norm2 = nn.Conv2d(width, 2 * width, 4, 2, 1), nn.InstanceNorm2d(2 * width)
        self.conv3, self.norm3 = nn.Conv2d(2 * width, 2 * width, 4, 1, 1), nn.GroupNorm(2, 2 * width)
        self.out = nn.Conv2d(2 * width, 1, 4, 1, 1)

    def forward(self, x, y):
        h = F.leaky_relu(self.conv1(torch.cat([x, y], 1)), 0.2, True)
        h = F.leaky_relu(self.norm2(self.conv2(h)), 0.2, True)
        h = F.leaky_relu(self.norm3(self.conv3(h)), 0.2, True)
        return self.out(h)


# ---- HiFi-GAN: 1-D, weight norm, discriminators by period and by scale, lists of logits and features ----------------


class ResStack(nn.Module):
    def __init__(self, channels, kernel, wrap):
        super().__init__()
        same = lambda d: d * (kernel - 1) // 2
        self.first = nn.ModuleList(
            [wrap(nn.Conv1d(channels, channels, kernel, dilation=d, padding=same(d))) for d in (1, 3, 5)]
        )
        self.second = nn.ModuleList([wrap(nn.Conv1d(channels, channels, kernel, padding=same(1))) for _ in range(3)])

    def forward(self, x):
        for a, b in zip(self.first, self.second, strict=True):
            h = F.leaky_relu(x, 0.1)
            h = F.leaky_relu(a(h), 0.1)
            x = b(h) + x
        return x


class Vocoder(nn.Module):
    def __init__(self, mels=20, width=16, rates=(8, 4), kernels=(3, 7), wrap=weight_norm):
        super().__init__()
        self.pre = wrap(nn.Conv1d(mels, width, 7, padding=3))
        self.ups, self.stacks = nn.ModuleList(), nn.ModuleList()
        for i, rate in enumerate(rates):
            i, o = width >> i, width >> (i + 1)
            self.ups.append(wrap(nn.ConvTranspose1d(i, o, 2 * rate, rate, padding=rate // 2)))
            self.stacks.append(nn.ModuleList([ResStack(o, k, wrap) for k in kernels]))
        self.post = wrap(nn.Conv1d(width >> len(rates), 1, 7, padding=3))

    def forward(self, x):
        x = self.pre(x)
        for up, stacks in zip(self.ups, self.stacks, strict=True):
            x = up(F.leaky_relu(x, 0.1))
            total = None
            for stack in stacks:
                total = stack(x) if total is None else total + stack(x)
            x = total / len(stacks)
        return torch.tanh(self.post(F.leaky_relu(x)))


class PeriodDiscriminator(nn.Module):
    def __init__(self, period, width=8, wrap=weight_norm):
        super().__init__()
        self.period = period
        self.convs = nn.ModuleList(
            [wrap(nn.Conv2d(1, width, (5, 1), (3, 1), (2, 0))), wrap(nn.Conv2d(width, width, (5, 1), 1, (2, 0)))]
        )
        self.post = wrap(nn.Conv2d(width, 1, (3, 1), 1, (1, 0)))

    def forward(self, x):
        features = []
        n, c, t = x.shape
        if t % self.period:
            x = F.pad(x, (0, self.period - t % self.period), "reflect")
            t = x.shape[-1]
        x = x.view(n, c, t // self.period, self.period)
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            features.append(x)
        x = self.post(x)
        features.append(x)
        return torch.flatten(x, 1, -1), features


class ScaleDiscriminator(nn.Module):
    def __init__(self, width=16, wrap=weight_norm):
        super().__init__()
        self.convs = nn.ModuleList(
            [
                wrap(nn.Conv1d(1, width, 15, 1, padding=7)),
                wrap(nn.Conv1d(width, width, 41, 2, groups=4, padding=20)),
                wrap(nn.Conv1d(width, width, 5, 1, padding=2)),
            ]
        )
        self.post = wrap(nn.Conv1d(width, 1, 3, padding=1))

    def forward(self, x):
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            features.append(x)
        return torch.flatten(self.post(x), 1, -1), features


class VocoderDiscriminators(nn.Module):
    def __init__(self, wrap=weight_norm):
        super().__init__()
        self.periods = nn.ModuleList([PeriodDiscriminator(p, wrap=wrap) for p in (2, 3)])
        self.scale = ScaleDiscriminator(wrap=wrap)

    def forward(self, x):
        logits, features = [], []
        for d in (*self.periods, self.scale):
            out, maps = d(x)
            logits.append(out)
            features.append(maps)
        return logits, features


# ---- StyleGAN without custom ops: equalised rates, modulation, noise, minibatch deviation ---------------------------


class EqualConv(nn.Module):
    def __init__(self, i, o, k, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(o, i, k, k))
        self.bias = nn.Parameter(torch.zeros(o)) if bias else None
        self.scale, self.padding = 1 / math.sqrt(i * k * k), k // 2

    def forward(self, x):
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.padding)


class StyleBlock(nn.Module):
    def __init__(self, i, o, latent):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, o, i, 3, 3))
        self.affine = nn.Linear(latent, i)
        self.bias, self.strength = nn.Parameter(torch.zeros(1, o, 1, 1)), nn.Parameter(torch.tensor(0.1))

    def forward(self, x, w):
        n, i, h, width = x.shape
        weight = self.weight * (self.affine(w) + 1).view(n, 1, i, 1, 1)
        weight = weight * torch.rsqrt(weight.pow(2).sum((2, 3, 4), keepdim=True) + 1e-8)
        x = F.conv2d(x.reshape(1, n * i, h, width), weight.flatten(0, 1), padding=1, groups=n)
        x = x.view(n, -1, h, width)
        x = x + torch.randn(n, 1, h, width, dtype=x.dtype) * self.strength
        return F.leaky_relu(x + self.bias, 0.2) * math.sqrt(2)


class StyleGenerator(nn.Module):
    def __init__(self, width=8, latent=12):
        super().__init__()
        self.map1, self.map2 = nn.Linear(latent, latent), nn.Linear(latent, latent)
        self.start = nn.Parameter(torch.randn(1, width, 4, 4))
        self.a, self.b = StyleBlock(width, width, latent), StyleBlock(width, width, latent)
        self.rgb = EqualConv(width, 3, 1)

    def forward(self, z):
        z = z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)
        w = F.leaky_relu(self.map2(F.leaky_relu(self.map1(z), 0.2)), 0.2)
        x = self.a(self.start.expand(len(z), -1, -1, -1), w)
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.rgb(self.b(x, w))


class StyleDiscriminator(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.rgb, self.c1, self.c2 = EqualConv(3, width, 1), EqualConv(width, width, 3), EqualConv(width, width, 3)
        self.skip, self.last = EqualConv(width, width, 1, bias=False), EqualConv(width + 1, width, 3)
        self.out = nn.Linear(width * 16, 1)

    def forward(self, x):
        x = F.leaky_relu(self.rgb(x), 0.2)
        h = F.leaky_relu(self.c2(F.leaky_relu(self.c1(x), 0.2)), 0.2)
        x = (F.avg_pool2d(h, 2) + F.avg_pool2d(self.skip(x), 2)) / math.sqrt(2)
        deviation = x.var(0, unbiased=False).add(1e-8).sqrt().mean().expand(len(x), 1, *x.shape[2:])
        x = F.leaky_relu(self.last(torch.cat([x, deviation], 1)), 0.2)
        return self.out(x.flatten(1))


def images(n=4, size=16):
    return torch.randn(n, 3, size, size, dtype=torch.float64)


# name -> (model, its arguments)
FAMILIES = {
    "sngan d": lambda: (SNDiscriminator(), (images(),)),
    "sngan d, hook": lambda: (SNDiscriminator(wrap=lambda m: old("spectral_norm", m)), (images(),)),
    "sngan d, labels": lambda: (SNDiscriminator(classes=5), (images(), torch.tensor([0, 4, 2, 2]))),
    "sngan g": lambda: (SNGenerator(), (torch.randn(4, 16, dtype=torch.float64),)),
    "unet": lambda: (UNet(), (images(size=32),)),
    "patchgan": lambda: (PatchGAN(), (images(size=32), images(size=32))),
    "vocoder": lambda: (Vocoder(), (torch.randn(2, 20, 9, dtype=torch.float64),)),
    "vocoder, hook": lambda: (
        Vocoder(wrap=lambda m: old("weight_norm", m)),
        (torch.randn(2, 20, 9, dtype=torch.float64),),
    ),
    "vocoder d": lambda: (VocoderDiscriminators(), (torch.randn(2, 1, 250, dtype=torch.float64),)),
    "stylegan g": lambda: (StyleGenerator(), (torch.randn(4, 12, dtype=torch.float64),)),
    "stylegan d": lambda: (StyleDiscriminator(), (images(size=8),)),
}
