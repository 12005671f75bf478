"""Which records of a run stay where there is room for so many, evenly over its steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = ["kept"]


def kept(weights: Mapping[int, int], most: int, spare: Iterable[int] = ()) -> set[int]:
    """At most `most` >= 1 of the steps in `weights`: the last one, those of `spare`, and one from each part of the run.

    Parts are of one length, a power of two, so that they only merge as a run goes on; of each the step of the greatest
    weight stays, the first of several. They are at most most / 2, so that the next thinning is some steps away. Of
    `spare` what there is room for stays.
    """
    if len(weights) <= most:
        return set(weights)
    chosen, last, length = set(weights), max(weights), 1
    while len(chosen) > max(1, most // 2):
        length *= 2
        best: dict[int, int] = {}
        for step in sorted(weights):
            part = step // length
            if part not in best or weights[step] > weights[best[part]]:
                best[part] = step
        chosen = set(best.values())
    chosen = chosen if most > 1 else set()
    for step in (last, *spare):
        if step in weights and len(chosen) < most:
            chosen.add(step)
    return chosen
