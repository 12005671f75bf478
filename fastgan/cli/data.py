"""``fastgan data``: the image sets known by name, what a source holds, and decoding one once for all runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fastgan import data
from fastgan.domains import domains
from fastgan.training.progress import counter

from .arguments import Commands, positive_int

_SOURCE = "a name of `fastgan data list`, a folder, a .zip, .tar files, an idx file, a .npy or a .npz"


def add(commands: Commands) -> argparse.ArgumentParser:
    """Register the command and its three verbs."""
    parser = commands.add_parser(
        "data",
        help="list, inspect and prepare images",
        description="List image sets, see what a source holds, or decode it once for all runs.",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    verbs.add_parser("list", help="print the data sets known by name")
    inspect = verbs.add_parser("inspect", help="decode every image once and say what is there")
    inspect.add_argument("source", metavar="PATH", help=_SOURCE)
    inspect.add_argument("--limit", type=positive_int, metavar="N", help="look at N images, evenly spread")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    prepare = verbs.add_parser("prepare", help="decode to a .npy, which loads at once")
    prepare.add_argument("source", metavar="NAME|PATH", help=_SOURCE)
    prepare.add_argument("--out", metavar="FILE.npy", help="default: the source's name in this folder")
    prepare.add_argument("--image-size", type=positive_int, metavar="PIXELS")
    prepare.add_argument("--channels", type=int, choices=(1, 3))
    prepare.add_argument("--limit", type=positive_int, metavar="N", help="take N images, evenly spread")
    prepare.add_argument(
        "--white",
        type=_white,
        default=65535,
        metavar="sbit|max|N",
        help="what is white in 16-bit greys: each PNG's significant bits, the set's greatest number, or N "
        "(default 65535)",
    )
    for verb in verbs.choices.values():
        # also after the verb; SUPPRESS leaves what was given before it
        verb.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def run(args: argparse.Namespace) -> int:
    """Do what the verb says."""
    if args.verb == "list":
        names = data.available() | {name: text for kind in domains().values() for name, text in kind.sets.items()}
        width = max(map(len, names))
        print("\n".join(f"{name:<{width}}  {text}" for name, text in names.items()))
    elif args.verb == "inspect":
        found = data.inspect(args.source, limit=args.limit, progress=counter("images"))
        print(json.dumps(found, indent=2) if args.json else found)
    else:
        out = args.out or f"{Path(args.source).stem}.npy"
        path = data.prepare(
            args.source,
            out,
            image_size=args.image_size,
            channels=args.channels,
            limit=args.limit,
            white=args.white,
            progress=counter("images"),
        )
        print(f"train on it with: --data {path}")
    return 0


def _white(text: str) -> int | str:
    return text if text in ("sbit", "max") else positive_int(text)
