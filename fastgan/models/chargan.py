"""`chargan`: lines of text as one-hot letters, by one-dimensional residual networks.

Source: Gulrajani et al. 2017 (arXiv:1704.00028), section 5.3 and appendix C; every layer begins as the convolutions of
the authors' code, after He et al. 2015 (arXiv:1502.01852), biases at 0. By torch's own initialisation a block's branch
is 4 to 5 % of what it is added to, by this one 20 to 31 %. A critic of the former is all but linear in the letters: it
sees how often each stands at each place, and not which follow each other. Departures: `width`, `blocks` and `length`
are a fraction of the paper's 512, 5 and 32. Parameter counts at the defaults: 282,140 and 85,569.
"""

from __future__ import annotations

from torch import Tensor, nn

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz"  # where none is given
KERNEL = 5
RESIDUAL = 0.3  # what a block adds of its branch; the paper's code has the number, its text does not


class ResidualBlock1d(nn.Module):
    """[N, C, L] -> the same shape: x + 0.3 conv(relu(conv(relu(x)))), kernels of 5."""

    per_sample = True

    def __init__(self, width: int):
        super().__init__()
        convolution = lambda: nn.Conv1d(width, width, KERNEL, padding=KERNEL // 2)
        self.branch = nn.Sequential(nn.ReLU(), convolution(), nn.ReLU(), convolution())

    def forward(self, x: Tensor) -> Tensor:
        return x + RESIDUAL * self.branch(x)


class CharGenerator(nn.Module):
    """z [N, latent] to lines [N, symbols, length]: at each place a softmax over the symbols."""

    per_sample = True

    def __init__(self, *, symbols: int, length: int, latent: int, width: int, blocks: int):
        super().__init__()
        self.latent, self.symbols, self.length, self.width = latent, symbols, length, width
        self.dense = nn.Linear(latent, width * length)
        self.blocks = nn.Sequential(*(ResidualBlock1d(width) for _ in range(blocks)))
        self.last = nn.Conv1d(width, symbols, 1)

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.last(self.blocks(self.dense(z).view(-1, self.width, self.length)))
        return logits.softmax(1)


class CharDiscriminator(nn.Module):
    """Lines [N, symbols, length], one-hot or softmaxes, to logits [N]."""

    per_sample = True

    def __init__(self, *, symbols: int, length: int, width: int, blocks: int):
        super().__init__()
        self.symbols, self.length = symbols, length
        self.first = nn.Conv1d(symbols, width, 1)
        self.blocks = nn.Sequential(*(ResidualBlock1d(width) for _ in range(blocks)))
        self.dense = nn.Linear(width * length, 1)

    def forward(self, lines: Tensor) -> Tensor:
        logits: Tensor = self.dense(self.blocks(self.first(lines)).flatten(1))
        return logits.flatten()


def build_chargan(
    *, alphabet: str = ALPHABET, length: int = 24, latent: int = 128, width: int = 64, blocks: int = 2
) -> tuple[nn.Module, nn.Module]:
    """Both networks of `chargan`, for lines of `length` characters of `alphabet` ("" takes `ALPHABET`).

    Raises ValueError for sizes below 1 (blocks: below 0).
    """
    for name, value in (("length", length), ("latent", latent), ("width", width), ("blocks", blocks)):
        least = 0 if name == "blocks" else 1
        if not isinstance(value, int) or value < least:
            raise ValueError(f"chargan: {name} must be a whole number of at least {least}, got {value!r}")
    sizes = dict(symbols=len(alphabet or ALPHABET), length=length, width=width, blocks=blocks)
    generator, discriminator = CharGenerator(latent=latent, **sizes), CharDiscriminator(**sizes)
    for parameter in (*generator.parameters(), *discriminator.parameters()):
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        else:
            nn.init.zeros_(parameter)
    return generator, discriminator
