"""`fastdino demo`: generate images, pretrain and evaluate on any machine, in minutes.

Prints and runs fastdino commands. It ends with k-NN accuracies, with how well the attention of CLS
finds the objects, and with pictures of both: what DINO is known for.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from fastdino import cli
from fastdino.config import user_path
from fastdino.data import scan_images
from fastdino.data.shapes_drawing import CLASSES
from fastdino.evals.attention_figures import map_picture
from fastdino.evals.attention_jaccard import THRESHOLD
from fastdino.evals.attention_maps import attention_maps, keep_mass
from fastdino.evals.transforms import to_input
from fastdino.models.vit import VisionTransformer
from fastdino.models.weights import load_backbone
from fastdino.terminal import print_out

# The settings were chosen on the images of seeds 0 to 2. Other seeds draw other images, so the
# default and its results had no part in that choice.
SEED = 3
SHAPES = "--train_per_class 200 --val_per_class 40 --size 128 --clips 0"
MODEL = "--arch vit_nano --patch_size 8"
KNN = "--resize 96 --crop 96 --nb_knn 20"
TRAIN = (
    f"{MODEL} --global_crops_size 48 --global_crops_scale 0.2 0.6 --local_crops_size 24 "
    "--local_crops_scale 0.05 0.15 --local_crops_number 3 --out_dim 256 --use_bn_in_head true "
    "--momentum_teacher 0.99 --warmup_teacher_temp 0.02 --teacher_temp 0.02 "
    "--batch_size_per_gpu 32 --epochs 6 --warmup_epochs 1 --lr 0.008 --min_lr 1e-5 "
    "--weight_decay_end 0.1 --drop_path_rate 0 --saveckp_freq 0"
)
SIDE = 256  # pixels of the images whose attention is measured: 32 x 32 patches


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `fastdino demo`."""
    about = "folder for images, checkpoints and results (default: %(default)s)"
    parser.add_argument("--output_dir", type=user_path, default="runs/demo", help=about)
    about = (
        "of the images and of the training; settings were chosen on 0 to 2 (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=SEED, help=about)


def main(args: argparse.Namespace) -> int:
    """Run the demo, resuming one that was interrupted."""
    started = time.monotonic()
    root = Path(args.output_dir)
    images, checkpoint = root / "shapes", root / "checkpoint.pth"
    run("shapes", f"{SHAPES} --seed {args.seed} --output_dir", images)
    accuracy = {
        "raw pixels": knn(root, images, "--raw_pixels"),
        "untrained network": knn(root, images, *MODEL.split()),
    }
    run("train", f"{TRAIN} --seed {args.seed} --data_path", images / "train", "--output_dir", root)
    accuracy["trained network"] = knn(root, images, "--pretrained_weights", checkpoint)
    overlap = jaccard(root, images, checkpoint)
    draw_attention_sheet(images, checkpoint, overlap["trained"]["fixed_head"]["head"], root)
    draw_loss(root / "log.txt", root / "loss.png")
    print_out("", f"20-NN accuracy on {images / 'val'} (chance {100 / len(CLASSES):.1f} %):")
    for name, percent in accuracy.items():
        print_out(f"  {name:18} {percent:5.1f} %")
    print_out("Jaccard index of the best head's attention and the objects:")
    for name in ("untrained", "trained"):
        print_out(f"  {name + ' network':18} {overlap[name]['best_head']:5.1f} %")
    print_out(f"pictures: {root / 'attention.png'}, {root / 'loss.png'}")
    print_out(f"{(time.monotonic() - started) / 60:.1f} minutes in all")
    return 0


def run(command: str, *words: str | Path) -> None:
    """Print a fastdino command and run it in this process; exit if it fails."""
    quoted = (shlex.quote(str(word)) if isinstance(word, Path) else word for word in words)
    line = f"{command} {' '.join(quoted)}"
    print_out("", f"$ fastdino {line}")
    status = cli.main(shlex.split(line))
    if status:
        raise SystemExit(status)


def knn(root: Path, images: Path, *words: str | Path) -> float:
    """Run `fastdino knn` and return the top-1 accuracy in percent."""
    output = root / "knn.json"
    run("knn", f"{KNN} --data_path", images, "--output", output, *words)
    return float(json.loads(output.read_text())["20"]["top1"])


def jaccard(root: Path, images: Path, checkpoint: Path) -> dict[str, Any]:
    """Run `fastdino attention` on the validation images and return the results."""
    words = f"--image_size {SIDE} {SIDE} --output_dir"
    run("attention", words, root, "--data_path", images, "--pretrained_weights", checkpoint)
    results: dict[str, Any] = json.loads((root / "jaccard.json").read_text())
    return results


def draw_attention_sheet(images: Path, checkpoint: Path, head: int, root: Path) -> None:
    """Draw the first validation image of six classes, a head's attention, and its mask.

    The head is the best one on average over the validation images, the same for all pictures.
    """
    weights = str(checkpoint)
    model = load_backbone(weights, checkpoint_key="teacher", arch=None, patch_size=None).module
    assert isinstance(model, VisionTransformer)
    val, size = scan_images(images / "val"), (SIDE, SIDE)
    firsts = [val.labels.tolist().index(label) for label in range(0, len(val.classes), 2)]
    pictures = [val.read_rgb(i).resize(size, Image.Resampling.BICUBIC) for i in firsts]
    maps = attention_maps(model, torch.stack([to_input(picture) for picture in pictures]))[:, head]
    masks = keep_mass(maps[:, None], THRESHOLD)[:, 0]
    figure = Figure(figsize=(1.5 * len(pictures), 4.6), layout="compressed")
    axes = figure.subplots(3, len(pictures))
    figure.suptitle("CLS attention in the last block, trained without labels", fontsize=10)
    for column, (picture, map_, mask) in enumerate(zip(pictures, maps, masks, strict=True)):
        pixels = np.asarray(picture)
        inside = np.kron(mask.numpy(), np.ones((model.patch_size,) * 2, bool))[..., None]
        cells = (pixels, map_picture(map_, size), np.where(inside, pixels, pixels // 6))
        for axis, cell in zip(axes[:, column], cells, strict=True):
            axis.imshow(cell)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_frame_on(False)
    names = ("image", f"head {head}", f"{100 * THRESHOLD:.0f} % of its mass")
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(name, fontsize=9)
    figure.savefig(root / "attention.png", dpi=110)


def draw_loss(log: Path, path: Path) -> None:
    """Plot the loss and its two parts over the epochs of a log.txt."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    epochs = [line["epoch"] + 1 for line in lines]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axis = figure.subplots()
    for key, name in (
        ("train_loss", "loss = entropy + KL"),
        ("train_entropy", "teacher entropy"),
        ("train_kl", "KL(teacher || student)"),
    ):
        axis.plot(epochs, [line[key] for line in lines], label=name, marker=".")
    axis.set_xlabel("epoch")
    axis.set_ylabel("nats")
    axis.set_ylim(bottom=0)
    axis.legend()
    figure.savefig(path, dpi=120)
