"""What widths, counts and image sides must be."""

from __future__ import annotations


def check_positive(name: str, **sizes: int) -> None:
    """Raise ValueError unless each of the network's `sizes` is a positive integer."""
    for key, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: {key} must be a positive integer, got {value!r}")


def doublings(name: str, image_size: int) -> int:
    """How many times a 4x4 map is doubled to reach `image_size`; ValueError unless a whole number from 2 on."""
    if not isinstance(image_size, int) or image_size < 16 or image_size & (image_size - 1):
        raise ValueError(f"{name}: image_size must be a power of two of at least 16, got {image_size!r}")
    return image_size.bit_length() - 3
