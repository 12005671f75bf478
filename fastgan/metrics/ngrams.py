"""How far generated lines of text are from real ones, by the frequencies of their n-grams of characters.

Source: Gulrajani et al. 2017 (arXiv:1704.00028), section 5.3. It sees which letters follow each other, up to n of them.
It does not see words, grammar or sense beyond that, and it rewards a generator that has learnt its lines by heart.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

END = "\n"  # closes every line, so that the lengths of lines count


def ngram_divergence(a: Iterable[str], b: Iterable[str], n: int = 4) -> float:
    """The Jensen-Shannon divergence in bits between the n-grams of two sets of lines: 0 for the same frequencies, 1 for
    no n-gram in common.

    Args:
        a, b: lines; each is taken to end in a newline, which is a character as any other.
        n: the length of the n-grams, at least 1; a shorter line, its newline included, has no n-gram.

    Of few lines it is biased upwards: compare it with what as many other real lines have.

    Raises:
        ValueError: n below 1, or a set without a single n-gram.
    """
    if n < 1:
        raise ValueError(f"ngram_divergence: n must be at least 1, got {n}")
    p, q = (_frequencies(lines, n) for lines in (a, b))
    mean = {gram: (p.get(gram, 0.0) + q.get(gram, 0.0)) / 2 for gram in p.keys() | q.keys()}
    terms = (share * math.log2(share / mean[gram]) for side in (p, q) for gram, share in side.items())
    return max(0.0, math.fsum(terms) / 2)


def _frequencies(lines: Iterable[str], n: int) -> dict[str, float]:
    counts: Counter[str] = Counter()
    for line in lines:
        whole = line + END
        counts.update(whole[i : i + n] for i in range(len(whole) - n + 1))
    total = counts.total()
    if not total:
        raise ValueError(f"ngram_divergence: both sets must have a line of {n} characters, its end included, got none")
    return {gram: count / total for gram, count in counts.items()}
