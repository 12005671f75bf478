"""Train the classifier behind fastgan.metrics.features(backbone="small") and write its weights.

    python examples/train_small_backbone.py --out fastgan/metrics/small.npz \
        --fashion-train /usr/share/datasets/fashion-mnist    # Debian's package dataset-fashion-mnist, where present

Without --fashion-train it learns from the bundled 10,000 pictures of clothing. About 10 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgan
from fastgan.metrics import small

BATCH, SHIFT = 128, 3


class Classifier(nn.Module):
    """The convolutions of `small`, each with a batch norm, and a linear layer over the classes."""

    def __init__(self, classes: int):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(i, o, 3, s, 1, bias=False) for i, o, s in small.LAYERS)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _ in small.LAYERS)
        self.head = nn.Linear(small.WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
        return self.head(F.dropout(x.mean((2, 3)), 0.2, self.training))

    def folded(self) -> list[tuple[Tensor, Tensor]]:
        """(weight, bias) of each convolution with its norm folded in."""
        pairs = []
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            pairs.append(
                (
                    (convolution.weight * scale.view(-1, 1, 1, 1)).detach(),
                    (norm.bias - norm.running_mean * scale).detach(),
                )
            )
        return pairs


def load(name: str | Path) -> tuple[Tensor, Tensor]:
    """Pictures, prepared, as bytes, and their labels."""
    data = fastgan.data.load(name)
    chunks = [
        small.prepared(c.float() / 127.5 - 1).mul(127.5).add(127.5).round().byte() for c in data.images.split(1000)
    ]
    return torch.cat(chunks), data.labels.long()


def augmented(x: Tensor) -> Tensor:
    """Mirrored and shifted by up to SHIFT pixels, each picture for itself."""
    n, _, h, w = x.shape
    x = torch.where(torch.rand(n, 1, 1, 1) < 0.5, x, x.flip(3))
    rows, columns = (torch.arange(side) + torch.randint(-SHIFT, SHIFT + 1, (n, 1)) for side in (h, w))
    rows, columns = rows.clamp(0, h - 1), columns.clamp(0, w - 1)
    return x[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = sum(
            (model(a / 127.5 - 1).argmax(1) == b).sum().item() for a, b in zip(x.split(500), y.split(500), strict=True)
        )
    model.train()
    return right / len(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fashion-train", type=Path, help="folder of Fashion-MNIST's train split, idx files")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=24_000, help="of an epoch")
    args = parser.parse_args()
    torch.manual_seed(0)

    emoji, emoji_labels = load("emoji-64")
    test, test_labels = load("fashion-mnist")
    fashion, fashion_labels = test, test_labels
    if args.fashion_train:
        fashion, fashion_labels = load(args.fashion_train / "train-images-idx3-ubyte.gz")
    x = torch.cat([fashion, emoji])
    y = torch.cat([fashion_labels, emoji_labels + 10])
    share = torch.cat([torch.full((len(s),), 1 / len(s)) for s in (fashion, emoji)])
    share[len(fashion) :] *= 0.5  # a third of what is drawn is emoji

    model = Classifier(10 + int(emoji_labels.max()) + 1)
    steps = args.epochs * args.images // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in range(1, steps + 1):
        at = torch.multinomial(share, BATCH)
        loss = F.cross_entropy(model(augmented(x[at] / 127.5 - 1)), y[at], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % (steps // 10) == 0:
            print(
                f"step {step}/{steps}  loss {loss.item():.3f}  clothing {accuracy(model, test, test_labels):.3f}"
                f"  emoji {accuracy(model, emoji, emoji_labels + 10):.3f}",
                flush=True,
            )
    model.eval()
    small.save(model.folded(), args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
