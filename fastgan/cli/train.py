"""``fastgan train``: a run from a recipe, the rest of one that was stopped, or its plan."""

from __future__ import annotations

import argparse
import os
import textwrap

from fastgan.data import all_grey
from fastgan.training.distributed import leave
from fastgan.training.plan import chosen_batch, plan
from fastgan.training.precision import NAMES
from fastgan.training.recipes import Recipe, recipes
from fastgan.training.recovery import ACTIONS
from fastgan.training.rundir import RunDirectory
from fastgan.training.stopping import StopRules
from fastgan.training.trainer import Trainer

from .arguments import Commands, batch_size, positive_float, positive_int, seed

DEFAULT = "fastgan"  # the recipe of a run that names none
# Options that are fields of a recipe; those that end a run.
FIELDS = ("data", "labels", "steps", "batch_size", "precision", "seed", "eval_every", "augment")
RULES = ("time_limit", "target", "patience", "plateau")


def _epilog() -> str:
    lines = ["recipes (their fields and values: --recipe NAME --dry-run):"]
    for name, recipe in recipes().items():
        lines += textwrap.wrap(recipe.source, 110, initial_indent=f"  {name:<12} ", subsequent_indent=" " * 15)
    lines += [
        "",
        "examples:",
        "  fastgan train --data ~/pictures --out runs/pictures",
        "  fastgan train --recipe dcgan-28 --data fashion-mnist --out runs/garments",
        "  fastgan train --recipe dcgan-64 --data ~/pictures --out runs/mine --set flip=true --set ema=0.999",
        "  fastgan train --resume runs/garments --steps 20000",
    ]
    return "\n".join(lines)


def add(commands: Commands) -> argparse.ArgumentParser:
    """Register the command."""
    parser = commands.add_parser(
        "train",
        help="train a GAN",
        description="Train from a recipe, go on with a run that was stopped, or print what one would take.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", metavar="NAME", help="the recipe to follow (listed below; default fastgan)")
    parser.add_argument("--data", metavar="NAME|PATH", help="a set of `fastgan data list`, a folder, a zip, tar files")
    parser.add_argument("--stream", action="store_true", help="keep decoded images in a file, made once, not in memory")
    parser.add_argument("--conditional", action="store_true", help="both networks take the images' classes")
    parser.add_argument("--labels", metavar="FILE.csv", help="classes of a folder's images, a line FILE,LABEL each")
    parser.add_argument("--augment", metavar="POLICY", help="for few images: ada, or some of colour,translation,cutout")
    parser.add_argument("--out", metavar="DIR", help="the run directory: new or empty")
    parser.add_argument("--overwrite", action="store_true", help="delete the run that lies in --out")
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in DIR, bit for bit")
    parser.add_argument("--continue", action="store_true", dest="go_on", help="go on with a run begun in --out")
    parser.add_argument("--steps", type=positive_int, help="generator updates in all")
    parser.add_argument(
        "--batch-size", type=batch_size, metavar="N|auto", help="auto: the smallest that is nearly as fast as twice it"
    )
    parser.add_argument(
        "--precision", choices=NAMES, help="auto (default): bf16 where this machine is faster in it, else fp32"
    )
    parser.add_argument("--seed", type=seed)
    parser.add_argument("--device", metavar="D", help="auto (default), cpu, cuda, cuda:1")
    parser.add_argument(
        "--backend", metavar="B", help="force one: reference, native, triton, cuda (default: the fastest)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="set any recipe field; repeat it",
    )
    parser.add_argument(
        "--allow-changed-data", action="store_true", help="with --resume: go on although the images have changed"
    )
    parser.add_argument(
        "--sync-statistics", action="store_true", help="under torchrun: batch norm over the batches of all ranks"
    )
    _add_endings(parser)
    parser.add_argument("--tensorboard", action="store_true", help="event files too (needs the package tensorboard)")
    parser.add_argument("--wandb", metavar="PROJECT", help="log there too (needs the package wandb)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan with memory and time, write nothing")
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    return parser


def _add_endings(parser: argparse.ArgumentParser) -> None:
    """What ends a run before its last step."""
    parser.add_argument("--time-limit", type=positive_float, metavar="SECONDS", help="stop and save after so long")
    parser.add_argument("--eval-every", type=positive_int, metavar="STEPS", help="measure the generator so often")
    parser.add_argument("--target", metavar="BOUND", help="stop at a metric's bound: 'kcd<0.05', 'fcd<2'")
    parser.add_argument("--patience", type=positive_int, metavar="N", help="stop after N evaluations without a best")
    parser.add_argument("--plateau", type=positive_int, metavar="N", help="stop after N evaluations without a change")
    parser.add_argument(
        "--on-collapse",
        choices=ACTIONS,
        default="warn",
        help="where the generator is lost: warn (default), go back to the last good checkpoint at half the rates, stop",
    )


def run(args: argparse.Namespace) -> int:
    """Train, or print the plan; 130 when interrupted."""
    given = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    given |= {name: True for name in ("conditional", "sync_statistics") if getattr(args, name)}
    if not args.resume:
        given.setdefault("precision", "auto")
    named = _recipe(args)
    _refuse_contradictions(args)
    automatic = given.get("batch_size") == "auto"
    if automatic:
        del given["batch_size"]
    recipe = _fitting(args, named).replace(**given).with_settings(args.settings)
    if args.stream:
        recipe = recipe.replace(domain_options=recipe.domain_options | {"stream": True})
    StopRules.of(recipe, **{name: getattr(args, name) for name in RULES})  # raises for what cannot be meant
    if automatic:
        recipe = chosen_batch(recipe, device=args.device or "auto", backend=args.backend)
    if args.dry_run:
        print(plan(recipe, device=args.device or "auto", backend=args.backend))
        return 0
    begun = args.go_on and _holds_run(args.out)
    names = (
        *(*RULES, "overwrite", "device", "backend", "on_collapse"),
        *("tensorboard", "wandb", "quiet", "allow_changed_data"),
    )
    options = {name: getattr(args, name) for name in names}
    out, resume = (None, args.out) if begun else (args.out, args.resume)
    result = Trainer(recipe, out=out, resume=resume, **options).fit()
    leave()
    return {"interrupted": 130, "collapse": 1}.get(result.reason, 0)


def _refuse_contradictions(args: argparse.Namespace) -> None:
    """Raise ValueError for options that take each other back, before anything is measured."""
    automatic = args.batch_size == "auto"
    if not (args.out or args.resume or args.dry_run):
        raise ValueError("train: --out DIR must say where the run is written")
    if args.go_on and (args.overwrite or args.resume or automatic):
        raise ValueError("train: --continue goes with --out alone, not with --overwrite, --resume or --batch-size auto")
    if args.allow_changed_data and not (args.resume or args.go_on):
        raise ValueError("train: --allow-changed-data is for a run that goes on, by --resume or --continue")
    if automatic and args.resume:
        raise ValueError("train: --batch-size auto is for a new run, a resumed one keeps its own")
    if automatic and int(os.environ.get("WORLD_SIZE", "1")) > 1:  # each rank would measure, and find another
        raise ValueError("train: --batch-size must be a number on several ranks, got auto")
    settings = {setting.partition("=")[0].strip() for setting in args.settings}
    for name in FIELDS:
        if getattr(args, name) is not None and name in settings:
            raise ValueError(f"train: --{name.replace('_', '-')} and --set {name} say one thing twice, leave one out")


def _fitting(args: argparse.Namespace, recipe: Recipe) -> Recipe:
    """The default recipe with one channel where every image of --data is grey, and a line that says so."""
    if args.recipe or args.resume or any(s.partition("=")[0].strip() == "channels" for s in args.settings):
        return recipe
    if not all_grey(args.data):
        return recipe
    if not args.quiet:
        print(f"every image of {args.data} is grey: channels=1 (--set channels=3 for three)")
    return recipe.replace(channels=1)


def _holds_run(path: str) -> bool:
    """Whether a run has begun in the directory."""
    try:
        RunDirectory(path).read_config()
    except ValueError:
        return False
    return True


def _recipe(args: argparse.Namespace) -> Recipe:
    """The named recipe, or the one of the run to resume."""
    if args.resume:
        if args.recipe:
            raise ValueError("train: --resume goes on with the run's own recipe, leave out --recipe")
        return Recipe.from_dict(RunDirectory(args.resume).read_config()["recipe"])
    named = recipes()
    if args.recipe is None and args.data is None:
        raise ValueError(f"train: --recipe NAME or --data must be given, or --resume DIR; recipes: {', '.join(named)}")
    if args.recipe is None:
        return named[DEFAULT]
    if args.recipe not in named:
        raise ValueError(f"train: there is no recipe {args.recipe!r}, choose one of {', '.join(named)}")
    return named[args.recipe]
