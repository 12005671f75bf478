"""Lines of text: from files, held as numbers of characters, one-hot to the networks."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from fastgan.data.files import fingerprint_of, plural
from fastgan.data.folders import files_below
from fastgan.data.memory import require
from fastgan.data.remarks import Remarks, tell
from fastgan.data.sharing import Read, read_once
from fastgan.data.tensorset import Held

__all__ = ["DEMONSTRATION", "END", "LineSet", "load_lines"]

DEMONSTRATION = "sentences"  # what the recipe trains on where no file is given
END = "\n"  # fills a line up; the first character of every alphabet
MOST = 96  # characters of an alphabet that the data decide; one-hot lines grow with it
LARGEST = 256  # of one that is given: numbers of characters are bytes
# The first bytes of a file, and what they mean; UTF-32's mark begins with that of UTF-16.
MARKS = (
    *((mark, "utf-32") for mark in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
    *((mark, "utf-16") for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
)

# Every combination: 2 x 12 x 16 x 12 = 4,608 sentences of at most 22 characters.
ARTICLES = ("the", "one")
QUALITIES = ("red", "old", "shy", "big", "sad", "wet", "kind", "tall", "calm", "fast", "grey", "young")
NOUNS = (
    "fox",
    "owl",
    "cat",
    "hen",
    "dog",
    "bee",
    "crow",
    "hare",
    "lamb",
    "frog",
    "goat",
    "wolf",
    "mouse",
    "horse",
    "sheep",
    "snail",
)
VERBS = ("eats", "runs", "sits", "naps", "sings", "waits", "hides", "jumps", "looks", "walks", "dreams", "sleeps")


class LineSet(Held):
    """Lines for training.

    Attributes are those of `fastgan.data.Samples`; values: uint8 [M, length], numbers of `alphabet`, filled up with
    that of its first character, the end of a line.
    """

    def __init__(
        self,
        values: Tensor,
        alphabet: str,
        *,
        name: str = "lines",
        skipped: Sequence[tuple[str, str]] = (),
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(values, name=name, skipped=skipped, device=device)
        self.alphabet = alphabet

    def pick(self, indices: Tensor, *, mirror: Tensor | None = None, channels_last: bool = False) -> Tensor:
        """Lines by number, one-hot float32 [N, characters of the alphabet, length]; they are never mirrored."""
        at = self.deliver(self.values.index_select(0, indices)).long()[:, None]
        hot = torch.zeros(len(at), len(self.alphabet), at.shape[2], device=at.device)
        return hot.scatter_(1, at, 1.0)

    def lines(self, numbers: Tensor | None = None) -> list[str]:
        """Lines of these numbers, or all, as texts."""
        return texts(self.values if numbers is None else self.values[numbers.to(self.values.device)], self.alphabet)


def texts(numbers: Tensor, alphabet: str) -> list[str]:
    """Lines [N, length] of numbers of characters as texts, each up to its first end."""
    return ["".join(alphabet[i] for i in row).partition(END)[0] for row in numbers.tolist()]


def load_lines(source: str, *, length: int, alphabet: str = "", device: torch.device | str = "cpu") -> LineSet:
    """Lines of a text file, of all .txt files below a folder, or of the demonstration set "sentences".

    Args:
        source: the path, or the set's name.
        length: characters a line; longer lines are cut, shorter ones filled up.
        alphabet: the characters that lines may have, the end of a line first; "": the at most 96 that are most frequent
            in the data. A line that has another one is left out.

    Files are UTF-8, UTF-16 or UTF-32 with its mark, or else read as Latin-1. Whatever is not as it should be (an
    encoding, empty lines, lines that are cut or left out) is counted, named in `skipped` and logged in one line.

    Raises:
        ValueError: no file, no line that is left, or an alphabet of more than 256 characters, doubled ones or another
            first one than the end of a line.
    """
    if alphabet and (alphabet[0] != END or len(set(alphabet)) != len(alphabet) or len(alphabet) > LARGEST):
        raise ValueError(
            f"load: an alphabet must be at most {LARGEST} different characters from {END!r}, got {alphabet!r}"
        )
    if source == DEMONSTRATION:
        sentences = [("", " ".join(words)) for words in product(ARTICLES, QUALITIES, NOUNS, VERBS)]
        read = _numbered(source, sentences, [], length, alphabet)
    else:
        folder, names = files_below(source, (".txt",), "text files")
        of = lambda: [fingerprint_of(folder, names), length, alphabet]
        read = read_once("lines", of, lambda: _read(source, folder, names, length, alphabet))
    tell(source, read.remarks)
    return LineSet(read.values, read.facts["alphabet"], name=source, skipped=read.remarks, device=device)


def _read(source: str, folder: Path, names: Sequence[str], length: int, alphabet: str) -> Read:
    remarks: Remarks = []
    found = [(name, line) for name in names for line in _lines_of(folder / name, name, remarks)]
    return _numbered(source, found, remarks, length, alphabet)


def _numbered(source: str, found: list[tuple[str, str]], remarks: Remarks, length: int, alphabet: str) -> Read:
    """found: [(file, line)]. remarks: on the files, to which those on their lines are added."""
    cut = Counter(name for name, line in found if len(line) > length)
    remarks += [(name, f"{plural(count, 'line')} cut at {length} characters") for name, count in cut.items()]
    found = [(name, line[:length]) for name, line in found]
    alphabet = alphabet or _alphabet_of(line for _, line in found)
    known = set(alphabet)
    strange = Counter(name for name, line in found if not known.issuperset(line))
    remarks += [(name, f"{plural(n, 'line')} with rare characters left out") for name, n in strange.items()]
    lines = [line for _, line in found if known.issuperset(line)]
    if not lines:
        raise ValueError(f"load: {source} must hold a line of text, it holds none{_why(remarks)}")
    require(2 * len(lines) * length, "cpu", f"load: {len(lines):,} lines of {length} characters")
    number = {character: i for i, character in enumerate(alphabet)}
    rows = b"".join(bytes(number[c] for c in line).ljust(length, b"\0") for line in lines)
    values = torch.frombuffer(bytearray(rows), dtype=torch.uint8).view(len(lines), length)
    return Read(values, remarks, {"alphabet": alphabet})


def _why(remarks: Remarks) -> str:
    return "".join(f"; {name}: {what}" for name, what in remarks[:3])


def _lines_of(path: Path, name: str, remarks: Remarks) -> list[str]:
    """The lines of a file that are not empty, spaces run together."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        remarks.append((name, (error.strerror or str(error)).lower()))
        return []
    text = _decoded(raw, name, remarks)
    if "\0" in text:
        remarks.append((name, "it has NUL characters and is no text, or UTF-16 without its mark"))
        return []
    lines = [" ".join(line.split()) for line in text.splitlines()]
    if empty := lines.count(""):
        remarks.append((name, plural(empty, "empty line")))
    if not lines:
        remarks.append((name, "the file is empty"))
    return [line for line in lines if line]


def _decoded(raw: bytes, name: str, remarks: Remarks) -> str:
    marked = next((encoding for mark, encoding in MARKS if raw.startswith(mark)), "")
    try:
        return raw.decode(marked or "utf-8-sig")
    except UnicodeDecodeError as error:
        if marked:
            remarks.append((name, f"byte {error.start:,} is not {marked.upper()}, damaged characters are replaced"))
            return raw.decode(marked, "replace")
        remarks.append((name, f"byte {error.start:,} is not UTF-8, read as Latin-1"))
        return raw.decode("latin-1")


def _alphabet_of(lines: Iterable[str]) -> str:
    counts = Counter(character for line in lines for character in line)
    frequent = sorted(counts, key=lambda c: (-counts[c], c))[: MOST - 1]
    return END + "".join(sorted(frequent))
