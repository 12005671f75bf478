"""Labels of image files from a CSV: one line a file, its name and its class."""

from __future__ import annotations

import csv
import os
from pathlib import Path

__all__ = ["classes_by_table", "read_table"]


def read_table(path: str | os.PathLike[str]) -> dict[str, str]:
    """{file name: class} of a CSV (UTF-8) whose first two columns are these; a first line "file,label" is skipped.

    Raises ValueError for a file that is none, a line without two columns, or a file named twice with two classes.
    """
    found: dict[str, str] = {}
    try:
        with Path(path).expanduser().open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"load: labels must be a readable CSV, {path} is not: {error}") from error
    for number, row in enumerate(rows, 1):
        if len(row) < 2:
            raise ValueError(f"load: each line of labels must read FILE,LABEL, line {number} of {path} is {row[0]!r}")
        name, label = row[0].strip().replace("\\", "/").removeprefix("./"), row[1].strip()
        if number == 1 and name.lower() in ("file", "filename", "file_name", "image", "path", "name"):
            continue
        if not label or found.get(name, label) != label:
            why = "no label" if not label else f"two labels, {found[name]!r} and {label!r}"
            raise ValueError(f"load: each file must have one label, {name} in {path} has {why}")
        found[name] = label
    if not found:
        raise ValueError(f"load: labels must name at least one file, {path} names none")
    return found


def classes_by_table(names: list[str], path: str | os.PathLike[str]) -> tuple[list[int], list[str]]:
    """(a label for each of `names`, the classes in sorted order, numbers by size).

    A file is found by its path below the folder, else by its name alone. Raises ValueError where one is not there.
    """
    table = read_table(path)
    labels = []
    for name in names:
        label = table.get(name, table.get(name.rsplit("/", 1)[-1]))
        if label is None:
            raise ValueError(
                f"load: every image must have a label, {path} has none for {name}; add it or move the image"
            )
        labels.append(label)
    classes = sorted(set(labels), key=lambda text: (0, int(text), "") if text.isdecimal() else (1, 0, text))
    number = {text: index for index, text in enumerate(classes)}
    return [number[label] for label in labels], classes
