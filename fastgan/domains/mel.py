"""Mel spectrograms, as vocoders are given them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MelSpectrogram"]

WINDOWS = 4  # hops a window
FINEST = 64  # times the bands: the filters of 40 of them take 84 MB then
FLOOR = 1e-5  # of a band, before its logarithm, as in the code of Kong et al. 2020


class MelSpectrogram:
    """Sounds [N, 1, L] to natural logarithms of mel bands [N, bands, L / hop], differentiable; L a multiple of hop.

    Magnitudes of Hann windows of 4 hops, reflected at both ends as in the code of Kong et al. 2020 (arXiv:2010.05646).
    The bands are triangles that are evenly spaced in mel(f) = 2595 log10(1 + f / 700) from 0 to half of the rate.

    Args:
        rate: of the sounds, in Hz.
        bands: of a spectrum.
        hop: samples between two windows.
        floor: what quieter bands are raised to. A full-scale sine has 37 to 173 where 40 bands share 4 kHz and the hop
            is 64: 0.01 is 71 to 85 dB below.
    """

    def __init__(self, rate: int, *, bands: int, hop: int, floor: float = FLOOR):
        self.rate, self.floor = rate, floor
        self.hop, self.window = hop, torch.hann_window(WINDOWS * hop)
        top = 2595 * torch.log10(torch.tensor(1 + rate / 2 / 700, dtype=torch.float64))
        edges = 700 * (10 ** (torch.linspace(0, 1, bands + 2, dtype=torch.float64) * top / 2595) - 1)
        frequencies = torch.linspace(0, rate / 2, WINDOWS * hop // 2 + 1, dtype=torch.float64)
        low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
        rising, falling = (frequencies - low) / (centre - low), (high - frequencies) / (high - centre)
        # one area for all, so that a wide band of noise is not louder than a narrow one
        self.bands = (torch.minimum(rising, falling).clamp_min(0) * 2 / (high - low) * 100).float()

    @property
    def reflected(self) -> int:
        """Samples at either end that are reflected; a sound must have more."""
        return (len(self.window) - self.hop) // 2

    def with_windows(self, share: float) -> MelSpectrogram:
        """Windows of `share` of these, with hops and bands in proportion; a tone is as far above the floor.

        Raises ValueError where a hop or the bands would not be a whole number from 1 on.
        """
        hop, bands = share * self.hop, share * len(self.bands)
        if share > FINEST:
            raise ValueError(f"mel: a resolution must be at most {FINEST}, got {share}")
        if min(hop, bands) < 1 or hop % 1 or bands % 1:
            raise ValueError(
                f"mel: a resolution must leave whole numbers of hop {self.hop} and {len(self.bands)} bands, got {share}"
            )
        # a tone's magnitude grows as the window, and the weight of the narrower bands once more
        return MelSpectrogram(self.rate, bands=int(bands), hop=int(hop), floor=self.floor * share**2)

    def __call__(self, sounds: Tensor) -> Tensor:
        size, hop = len(self.window), self.hop
        padded = F.pad(sounds.float(), (self.reflected, self.reflected), "reflect").squeeze(1)
        window = self.window.to(sounds.device)
        spectra = torch.stft(padded, size, hop, window=window, center=False, return_complex=True)
        # the small number keeps the derivative of a magnitude of zero finite
        magnitudes = (spectra.real.square() + spectra.imag.square() + 1e-9).sqrt()
        # a product in 16 bits moves its logarithm by 0.004; the meta device has no autocast
        kind = "cpu" if sounds.is_meta else sounds.device.type
        with torch.autocast(kind, enabled=False):
            bands = self.bands.to(sounds.device) @ magnitudes
        return bands.clamp_min(self.floor).log()
