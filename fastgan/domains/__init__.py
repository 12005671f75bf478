"""Domains: what kinds of samples a run can be about; one file a kind.

class Rows(fastgan.domains.Domain): ...
fastgan.domains.register(Rows)                     # recipes may now say domain="rows"
"""

from __future__ import annotations

from fastgan.training.recipes import Recipe

from .clips import Clips
from .domain import Domain, Given, Looks, Stream
from .images import Images
from .pairs import Pairs
from .sound import Sound
from .text import Text
from .unpaired import Unpaired
from .vocoder import Vocoder

__all__ = [
    "Clips",
    "Domain",
    "Given",
    "Images",
    "Looks",
    "Pairs",
    "Sound",
    "Stream",
    "Text",
    "Unpaired",
    "Vocoder",
    "domain_of",
    "domains",
    "register",
]

_DOMAINS: dict[str, type[Domain]] = {kind.name: kind for kind in (Images, Pairs, Sound, Vocoder, Text, Clips, Unpaired)}


def domains() -> dict[str, type[Domain]]:
    """Those known, by name."""
    return dict(_DOMAINS)


def register(kind: type[Domain]) -> type[Domain]:
    """Make `kind` known by its name, in place of one that had it; returns it, so that it can decorate a class."""
    _DOMAINS[kind.name] = kind
    return kind


def domain_of(recipe: Recipe) -> Domain:
    """The domain of a recipe's run. Raises ValueError for a name that none has, and for options that it lacks."""
    if recipe.domain not in _DOMAINS:
        raise ValueError(
            f"recipe: domain must be one of {', '.join(_DOMAINS)}, got {recipe.domain!r}; fastgan.domains.register "
            "makes another one known"
        )
    return _DOMAINS[recipe.domain](recipe)
