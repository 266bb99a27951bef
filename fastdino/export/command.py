"""`fastdino export`: write a backbone for another library, read it back there and compare."""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import importlib.util
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdino.config import check_at_least, user_path
from fastdino.errors import CheckpointError, ConfigError
from fastdino.export.model_card import model_card, read_figures
from fastdino.export.targets import TARGETS, Network, Target, resize_of
from fastdino.files import explain_write_errors, write_json
from fastdino.models.backbones import feature_shape
from fastdino.models.vit import VisionTransformer
from fastdino.models.weights import Backbone, load_backbone
from fastdino.terminal import print_out

# Largest difference between features, relative to the largest feature: two libraries round
# differently.
TOLERANCE = 1e-5
INSTALL = 'pip install "fastdino[export]"'


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `fastdino export`."""
    add = parser.add_argument_group("network").add_argument
    add(
        "--pretrained_weights",
        type=user_path,
        required=True,
        help="checkpoint file, URL or released name",
    )
    add("--checkpoint_key", default="teacher", help="network to export (default: %(default)s)")
    add("--arch", help="architecture (default: from the checkpoint)")
    add("--patch_size", type=int, help="patch size in px (default: from the checkpoint)")
    about = "side of the input images; resizes a ViT's positions (default: from the checkpoint)"
    add("--image_size", type=int, metavar="PX", help=about)
    add = parser.add_argument_group("output").add_argument
    add("--to", required=True, metavar="TARGET", help=f"format: {', '.join(TARGETS)}")
    about = "file to write (timm: .safetensors or .pth), or folder for hf"
    add("--output", type=user_path, required=True, metavar="PATH", help=about)
    add("--overwrite", action="store_true", help="replace existing files")
    about = "write a model card to OUTPUT with suffix .md (hf: always, to README.md)"
    add("--model_card", action="store_true", help=about)
    about = "JSON reports of `fastdino knn` and `fastdino linear`, for the model card"
    add("--figures", type=user_path, nargs="+", default=[], metavar="JSON", help=about)
    add(
        "--report",
        type=user_path,
        metavar="JSON",
        help="write the properties of the export and its error",
    )


def main(args: argparse.Namespace) -> int:
    """Run `fastdino export`."""
    target = _check_flags(args)
    figures = read_figures(args.figures)
    backbone = load_backbone(
        args.pretrained_weights,
        checkpoint_key=args.checkpoint_key,
        arch=args.arch,
        patch_size=args.patch_size,
    )
    network = prepare(backbone, args.image_size)
    if target.vit_only and not network.is_vit:
        others = ", ".join(name for name in TARGETS if not TARGETS[name].vit_only)
        raise ConfigError(
            f"--to {args.to} supports only vit_*, and this is a {network.arch}: use --to {others}"
        )
    if network.is_vit and network.module.registers and target.vit_only:
        raise ConfigError(
            f"--to {args.to} is for ViTs without registers, and this one has "
            f"{network.module.registers}: use --to safetensors or onnx"
        )
    output = Path(args.output)
    name = f"{network.arch}/{network.patch_size}" if network.is_vit else network.arch
    usage = target.usage(network, str(output))
    card = None
    if args.to == "hf" or args.model_card:
        card = model_card(
            title=f"DINO {name}",
            library={"hf": "transformers", "timm": "timm"}.get(args.to),
            facts=_facts(network),
            usage=target.usage(network, output.name),
            settings=backbone.args,
            epoch=backbone.epoch,
            figures=figures,
        )
    checked = export(network, target, output, card=card)
    verdict = (
        f"read back by {checked['by']} {checked['version']}: features within "
        f"{checked['error']:.1e} of the largest"
        if checked["by"]
        else f"not checked: {checked['why']}"
    )
    print_out(f"{output}: {name} for {args.to}, {verdict}", "", *usage.split("\n"))
    if args.report:
        report = {"to": args.to, "output": str(output), **_facts(network)}
        write_json(report | {"usage": usage, "checked": checked}, Path(args.report))
    return 0


def _check_flags(args: argparse.Namespace) -> Target:
    """Return the target; raise ConfigError, before anything is read, if a flag is invalid."""
    if args.to not in TARGETS:
        similar = difflib.get_close_matches(args.to, TARGETS, n=1)
        hint = f": did you mean {similar[0]}?" if similar else ""
        raise ConfigError(f"--to {args.to!r} is none of {', '.join(TARGETS)}{hint}")
    target, output = TARGETS[args.to], Path(args.output)
    check_at_least(args, 1, "image_size", "patch_size")
    if target.suffixes and output.suffix not in target.suffixes:
        suffixes = " or ".join(target.suffixes)
        raise ConfigError(f"--to {args.to} writes a {suffixes} file, got --output {output}")
    try:
        str(output.resolve()).encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"--output {output} has bytes that are not UTF-8 in this locale, which the libraries "
            "that write and read it do not accept: use another name"
        ) from None
    missing = [name for name in target.needs if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--to {args.to} needs {' and '.join(missing)}: {INSTALL}")
    card = [card_path(output)] if args.model_card and target.suffixes else []
    for path in (output, *card):
        if path.exists() and not args.overwrite:
            raise ConfigError(f"--output {path} exists: use another path, or --overwrite")
    if output.exists() and output.is_dir() != (not target.suffixes):
        kind = "file" if target.suffixes else "folder"
        raise ConfigError(f"--to {args.to} writes a {kind}, but --output {output} is not one")
    if args.figures and not (args.model_card or args.to == "hf"):
        raise ConfigError("--figures requires --model_card")
    return target


def card_path(output: Path) -> Path:
    """Return the path of the model card of an exported file."""
    return output.with_suffix(".md")


def prepare(backbone: Backbone, image_size: int | None) -> Network:
    """Return the network to export, with its positions resized for images of image_size px.

    A deit_* is renamed to vit_*.

    Raises: ConfigError: the size is no multiple of the patch size, or is not supported.
    """
    module = backbone.module.float().eval().requires_grad_(False)
    arch, patch_size = backbone.arch, backbone.patch_size
    size = image_size or 224
    if isinstance(module, VisionTransformer):
        arch = arch.replace("deit_", "vit_", 1)
        size = image_size or math.isqrt(module.pos_embed.shape[1] - 1) * patch_size
        if size % patch_size:
            raise ConfigError(
                f"--image_size {size} is no multiple of the patch size {patch_size}: "
                f"the nearest is {max(1, round(size / patch_size)) * patch_size}"
            )
        module.pos_embed = nn.Parameter(module.positions((size, size)), requires_grad=False)
    dim = feature_shape(module, size, f"{arch} cannot take --image_size {size}")[1]
    return Network(module, arch, patch_size, size, dim)


def export(network: Network, target: Target, output: Path, *, card: str | None) -> dict[str, Any]:
    """Write a network to a temporary folder, check it, and move it to `output`.

    Args:
        network: from prepare.
        output: file or folder; existing files of the same names are replaced.
        card: model card to write next to the file or into the folder.

    Returns: the result of `check`.
    Raises: CheckpointError: the files cannot be written, or features differ.
    """
    destination = output.resolve()
    with explain_write_errors(output):
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".export-") as folder:
            made = Path(folder) / destination.name
            target.write(network, made)
            checked = check(network, target, made)
            if card is not None:
                page = card_path(made) if target.suffixes else made / "README.md"
                page.write_text(card, encoding="utf-8", errors="backslashreplace")
            _move_files(Path(folder), destination.parent)
    return checked


def check(network: Network, target: Target, path: Path) -> dict[str, Any]:
    """Read an export with the target's library and compare the features of three images.

    Returns: {"by": library, "version": ..., "error": relative to the largest feature}, or
        {"by": None, "why": reason} if the library is not installed.
    Raises: CheckpointError: features differ by more than TOLERANCE.
    """
    if importlib.util.find_spec(target.reader) is None:
        return {"by": None, "why": f"{target.reader} is not installed: {INSTALL}"}
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, network.image_size, network.image_size, generator=generator)
    with torch.no_grad():
        expected = network.module(images)
        actual = target.read(network, path)(images)
    error = float((actual - expected).abs().max() / expected.abs().max())
    if actual.shape != expected.shape or not error <= TOLERANCE:  # also catches NaN
        raise CheckpointError(
            f"features by {target.reader} differ by {error:.2g} of the largest, expected at most "
            f"{TOLERANCE:.0e}; nothing was written"
        )
    version = importlib.metadata.version(target.reader)
    return {"by": target.reader, "version": version, "error": error}


def _move_files(source: Path, destination: Path) -> None:
    """Move every file below one folder to the same relative path below another."""
    for path in sorted(source.rglob("*")):
        target = destination / path.relative_to(source)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            os.replace(path, target)


def _facts(network: Network) -> dict[str, Any]:
    """Return the network's properties for the report and the model card."""
    names = ("arch", *(("patch_size",) if network.is_vit else ()), "image_size", "dim")
    fields = {name: getattr(network, name) for name in names}
    parameters = sum(p.numel() for p in network.module.parameters())
    return fields | {"resize": resize_of(network.image_size), "parameters": parameters}
