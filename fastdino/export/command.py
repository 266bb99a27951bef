"""`fastdino export`: a backbone in the form of another library, read back there and compared."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.metadata
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdino.config import check_at_least
from fastdino.errors import CheckpointError, ConfigError
from fastdino.export.model_card import model_card, read_figures
from fastdino.export.targets import TARGETS, Network, Target, image_size_of, resize_of
from fastdino.files import explain_write_errors, write_json
from fastdino.models.vit import VisionTransformer
from fastdino.models.weights import Backbone, load_backbone

# Of the largest feature: what rounding may differ by, between two libraries' orders of operations.
TOLERANCE = 1e-5
INSTALL = 'pip install "fastdino[export]"'


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `fastdino export`."""
    add = parser.add_argument
    add("--pretrained_weights", required=True, help="file, URL or name of the weights")
    add("--to", required=True, metavar="TARGET", help=f"one of {', '.join(TARGETS)}")
    about = "file to write (timm: .safetensors or .pth), for hf a folder"
    add("--output", required=True, metavar="PATH", help=about)
    add("--overwrite", action="store_true", help="replace what is there")
    about = "side of the images it will take: a ViT's positions are resized (default: its own)"
    add("--image_size", type=int, metavar="PX", help=about)
    add("--arch", help="architecture (default: what the checkpoint says)")
    add("--patch_size", type=int, help="patch size (default: what the checkpoint says)")
    add("--checkpoint_key", default="teacher", help="which network of the checkpoint (teacher)")
    about = "also write a model card beside the file, OUTPUT with .md (hf: always, as README.md)"
    add("--model_card", action="store_true", help=about)
    about = "JSON files of knn --output and linear, for the model card"
    add("--figures", nargs="+", default=[], metavar="JSON", help=about)
    add("--report", metavar="JSON", help="file for what was written and how near it is")


def main(args: argparse.Namespace) -> int:
    """Runs `fastdino export`."""
    target = _check_flags(args)
    figures = read_figures(args.figures)
    backbone = load_backbone(
        args.pretrained_weights,
        checkpoint_key=args.checkpoint_key,
        arch=args.arch,
        patch_size=args.patch_size,
    )
    network = prepare(backbone, args.image_size)
    if target.vit_only and not isinstance(network.module, VisionTransformer):
        others = ", ".join(name for name in TARGETS if not TARGETS[name].vit_only)
        raise ConfigError(
            f"--to {args.to} takes vit_* alone, and this is a {network.arch}: use --to {others}"
        )
    output = Path(args.output)
    usage = target.usage(network, str(output))
    card = None
    if args.to == "hf" or args.model_card:
        card = model_card(
            title=f"DINO {_name(network)}",
            library={"hf": "transformers", "timm": "timm"}.get(args.to),
            facts=_facts(network),
            usage=target.usage(network, output.name),
            settings=backbone.args,
            epoch=backbone.epoch,
            figures=figures,
        )
    checked = export(network, args.to, output, card=card)
    print(f"{output}: {_name(network)} for {args.to}, {_verdict(target, checked)}\n\n{usage}")
    if args.report:
        report = {"to": args.to, "output": str(output), **_facts(network)}
        report |= {"usage": usage, "checked": checked}
        write_json(report, Path(args.report))
    return 0


def _check_flags(args: argparse.Namespace) -> Target:
    """The target of the flags; raises ConfigError before anything is read."""
    if args.to not in TARGETS:
        near = difflib.get_close_matches(args.to, TARGETS, n=1)
        meant = f": did you mean {near[0]}?" if near else ""
        raise ConfigError(f"--to {args.to!r} is none of {', '.join(TARGETS)}{meant}")
    target, output = TARGETS[args.to], Path(args.output)
    check_at_least(args, 1, "image_size", "patch_size")
    if target.suffixes and output.suffix not in target.suffixes:
        raise ConfigError(
            f"--to {args.to} writes a file that ends in {' or '.join(target.suffixes)}, "
            f"got --output {output}"
        )
    missing = [name for name in target.needs if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--to {args.to} needs {' and '.join(missing)}: {INSTALL}")
    written = [output]
    if args.model_card and target.suffixes:
        written.append(card_path(output))
    for path in written:
        if path.exists() and not args.overwrite:
            raise ConfigError(f"--output {path} exists: name another, or give --overwrite")
    if output.exists() and output.is_dir() != (not target.suffixes):
        kind = "file" if target.suffixes else "folder"
        raise ConfigError(f"--to {args.to} writes a {kind}, which --output {output} is not")
    if args.figures and not (args.model_card or args.to == "hf"):
        raise ConfigError("--figures is for a model card: give --model_card too")
    return target


def card_path(output: Path) -> Path:
    """Where the model card of an exported file goes."""
    return output.with_suffix(".md")


def prepare(backbone: Backbone, image_size: int | None) -> Network:
    """The network to write: its name without "deit_", positions for images of image_size px.

    Raises: ConfigError: a size that is no whole number of patches, or that it cannot take.
    """
    module = backbone.module.float().eval().requires_grad_(False)
    arch, patch_size = backbone.arch, backbone.patch_size
    size = image_size or image_size_of(module, patch_size)
    if isinstance(module, VisionTransformer):
        arch = arch.replace("deit_", "vit_", 1)
        if size % patch_size:
            raise ConfigError(
                f"--image_size {size} is no multiple of the patch size, {patch_size}: "
                f"the nearest is {max(1, round(size / patch_size)) * patch_size}"
            )
        module.pos_embed = nn.Parameter(module.positions((size, size)), requires_grad=False)
    try:
        with torch.no_grad():
            dim = module(torch.zeros(1, 3, size, size)).shape[1]
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(f"{arch} cannot take --image_size {size}: {error}") from error
    return Network(module, arch, patch_size, size, dim)


def export(network: Network, to: str, output: Path, *, card: str | None) -> dict[str, Any]:
    """Writes a network as `to` says, and takes it in place once it reads back as it was.

    Args:
        network: from prepare.
        to: a name of TARGETS.
        output: the file, or the folder; what is there of the same name is replaced.
        card: the model card, written beside it or into the folder; None: none.

    Returns: who read it back, and how far its features were off, relative to the largest; or why
        nobody did.
    Raises: CheckpointError: it cannot be written, or features differ by more than TOLERANCE.
    """
    target, place = TARGETS[to], output.resolve()
    with explain_write_errors(output):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".export-") as folder:
            made = Path(folder) / place.name
            target.write(network, made)
            checked = check(network, target, made)
            if card is not None:
                (card_path(made) if target.suffixes else made / "README.md").write_text(card)
            _take_in_place(Path(folder), place.parent)
    return checked


def check(network: Network, target: Target, path: Path) -> dict[str, Any]:
    """Reads an export by the library that it is for, and compares the features of three images.

    Returns: {"by": ..., "version": ..., "error": ...}, the error relative to the largest feature;
        or {"by": None, "why": ...}.
    Raises: CheckpointError: they differ.
    """
    if importlib.util.find_spec(target.reader) is None:
        return {"by": None, "why": f"{target.reader} is not installed: {INSTALL}"}
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, network.image_size, network.image_size, generator=generator)
    with torch.no_grad():
        want = network.module(images)
        got = target.read(network, path)(images)
    error = float((got - want).abs().max() / want.abs().max())
    if got.shape != want.shape or not error <= TOLERANCE:  # NaN is not below
        raise CheckpointError(
            f"{target.reader} gives other features: off by {error:.2g} of the largest, expected "
            f"at most {TOLERANCE:.0e}; nothing was written"
        )
    version = importlib.metadata.version(target.reader)
    return {"by": target.reader, "version": version, "error": error}


def _take_in_place(source: Path, destination: Path) -> None:
    """Moves every file below one folder to the same place below another."""
    for path in sorted(source.rglob("*")):
        place = destination / path.relative_to(source)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            os.replace(path, place)


def _name(network: Network) -> str:
    vit = isinstance(network.module, VisionTransformer)
    return f"{network.arch}/{network.patch_size}" if vit else network.arch


def _facts(network: Network) -> dict[str, Any]:
    facts = dataclasses.asdict(dataclasses.replace(network, module=nn.Identity()))
    del facts["module"]
    if not isinstance(network.module, VisionTransformer):
        del facts["patch_size"]
    parameters = sum(p.numel() for p in network.module.parameters())
    return facts | {"resize": resize_of(network.image_size), "parameters": parameters}


def _verdict(target: Target, checked: dict[str, Any]) -> str:
    if checked["by"] is None:
        return f"not checked: {checked['why']}"
    return (
        f"read back by {checked['by']} {checked['version']}: features within "
        f"{checked['error']:.1e} of the largest"
    )
