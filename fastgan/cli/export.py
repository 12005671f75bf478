"""``fastgan export``: a run's generator as a file that needs no fastgan."""

from __future__ import annotations

import argparse

from fastgan._writing import target_of
from fastgan.domains import domain_of
from fastgan.training import sampling
from fastgan.training.recipes import Recipe

from .arguments import Commands

FORMATS = ("onnx", "torchscript", "safetensors", "pt2")


def add(commands: Commands) -> argparse.ArgumentParser:
    """Register the command."""
    parser = commands.add_parser(
        "export",
        help="write a run's generator as ONNX, TorchScript, safetensors or pt2",
        description="Write the generator of a run's newest checkpoint, the averaged one if there is one, in eval mode.",
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="the run directory")
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="onnx and safetensors need the packages of their names; pt2 is torch.export's archive",
    )
    parser.add_argument("--out", required=True, metavar="FILE")
    parser.add_argument("--best", action="store_true", help="the generator of the run's best evaluation")
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the file and say how it was checked."""
    from fastgan.export import export

    target_of(args.out)  # before minutes are spent on a file that could not be written
    generator, config = sampling.load_generator(args.run, best=args.best)
    recipe = config["recipe"]
    domain_of(Recipe.from_dict(recipe)).require_latents("export")
    classes = recipe.get("classes", 0)
    facts = {name: recipe[name] for name in ("name", "model", "model_options", "image_size", "channels", "latent")}
    facts |= {"classes": config["classes"]} if classes else {}
    said = export(generator, args.out, format=args.format, latent=recipe["latent"], classes=classes, facts=facts)
    print(f"{args.out}: {said}")
    return 0
