"""The program `fastgan`: one file a command, each with `add(commands)` for its arguments and `run(args) ->
int`.

Exit codes: 0 done, 1 a run failed, 2 bad input, 130 interrupted. Failures are one line on stderr;
`--traceback` adds the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

import fastgan
from fastgan._writing import WriteError
from fastgan.training.progress import silence

from . import bench, data, doctor, evaluate, export, interpolate, profile, report, sample, train, translate, watch

__all__ = ["main"]

_COMMANDS = (train, sample, translate, interpolate, evaluate, report, watch, bench, profile, export, data, doctor)


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage text above them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="fastgan", description="Train GANs with PyTorch, fast.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for module in _COMMANDS:
        command = module.add(commands)
        command.set_defaults(run_command=module.run)
        command.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program with `argv` (default: the process' own arguments) and return its exit code."""
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # --help and wrong arguments
        return int(stop.code or 0)
    if args.version:
        print(fastgan.__version__)
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    with _streams():
        try:
            _refuse_empty(args)
            _expand(args)
            code = int(args.run_command(args))
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            print("fastgan: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader of our output has seen enough
            silence(sys.stdout)
            return 0
        except Exception as error:
            if args.traceback:
                raise
            return _fail(error)


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Within: what a locale cannot show is shown as escapes, and no file is opened as a standard stream.

    A process may be started without one (``fastgan ... >&-``); the next file would take its number, and what a library
    prints there would end up in it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    yield


def _refuse_empty(args: argparse.Namespace) -> None:
    """No option means anything by being empty: `--data ""` would be the current folder."""
    for name, value in vars(args).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (not text.strip() or "\0" in text):
                option = f"--{name.replace('settings', 'set').replace('_', '-')}"
                raise ValueError(f"{args.command}: {option} must be neither empty nor hold a NUL, got {text!r}")


def _expand(args: argparse.Namespace) -> None:
    """~ is the home folder in --out=~/runs too, where a shell leaves it."""
    for name, value in vars(args).items():
        if isinstance(value, str) and (value == "~" or value.startswith("~/")):
            setattr(args, name, os.path.expanduser(value))


def _sentence(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        name = str(error.filename)
        name = name if len(name) <= 100 else f"{name[:60]}... ({len(name)} characters)"
        return (
            f"{name} must be a path that can be used, the system says: {error.strerror}; check it and its permissions"
        )
    # torch adds the frames of its C++ code
    return " ".join(str(error).partition("Exception raised from")[0].split()) or type(error).__name__


def _fail(error: Exception) -> int:
    """Print one line for `error` and return the exit code: 2 if the input was wrong, 1 otherwise."""
    text = _sentence(error)
    if isinstance(error, (ValueError, TypeError, ImportError, OSError)) and not isinstance(error, WriteError):
        print(f"fastgan: {text}", file=sys.stderr)
        return 2
    name = "" if type(error).__module__.startswith("fastgan") else f"{type(error).__name__}: "
    print(f"fastgan: {name}{text} (--traceback shows where)", file=sys.stderr)
    return 1
