"""`fastdino demo`: generate images, pretrain and evaluate on any machine, in minutes.

Prints and runs fastdino commands, and ends with k-NN accuracies, attention maps and a loss curve.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

from fastdino import cli
from fastdino.config import user_path
from fastdino.data import scan_images
from fastdino.data.shapes import CLASSES
from fastdino.evals.attention_figures import draw_attention
from fastdino.evals.attention_maps import attention_maps
from fastdino.evals.transforms import to_input
from fastdino.models.vit import VisionTransformer
from fastdino.models.weights import load_backbone
from fastdino.terminal import print_out

SHAPES = "--train_per_class 200 --val_per_class 40 --size 96 --clips 0"
MODEL = "--arch vit_nano --patch_size 8"
KNN = "--resize 48 --crop 48 --nb_knn 20"
TRAIN = (
    f"{MODEL} --global_crops_size 48 --local_crops_size 24 --local_crops_number 2 --out_dim 256 "
    "--use_bn_in_head true --momentum_teacher 0.99 --warmup_teacher_temp 0.02 --teacher_temp 0.02 "
    "--batch_size_per_gpu 32 --epochs 11 --warmup_epochs 1 --lr 0.008 --min_lr 1e-5 "
    "--weight_decay_end 0.1 --drop_path_rate 0 --saveckp_freq 0"
)
ATTENTION_SIZE = 96  # px; twice the training size, for finer maps


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `fastdino demo`."""
    about = "folder for images, checkpoints and results (default: %(default)s)"
    parser.add_argument("--output_dir", type=user_path, default="runs/demo", help=about)


def main(args: argparse.Namespace) -> int:
    """Run the demo, resuming one that was interrupted."""
    started = time.monotonic()
    root = Path(args.output_dir)
    images, checkpoint = root / "shapes", root / "checkpoint.pth"
    run("shapes", f"{SHAPES} --output_dir", images)
    accuracy = {
        "raw pixels": knn(root, images, "--raw_pixels"),
        "untrained network": knn(root, images, MODEL),
    }
    run("train", f"{TRAIN} --data_path", images / "train", "--output_dir", root)
    accuracy["trained network"] = knn(root, images, "--pretrained_weights", checkpoint)
    draw_attention_sheet(images / "val", checkpoint, root / "attention.png")
    draw_loss(root / "log.txt", root / "loss.png")
    print_out("", f"20-NN accuracy on {images / 'val'} (chance {100 / len(CLASSES):.1f} %):")
    for name, percent in accuracy.items():
        print_out(f"  {name:18} {percent:5.1f} %")
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


def draw_attention_sheet(folder: Path, checkpoint: Path, path: Path) -> None:
    """Draw attention maps for one image from each of six classes."""
    weights = str(checkpoint)
    model = load_backbone(weights, checkpoint_key="teacher", arch=None, patch_size=None).module
    assert isinstance(model, VisionTransformer)
    images, size = scan_images(folder), (ATTENTION_SIZE, ATTENTION_SIZE)
    firsts = [images.labels.tolist().index(label) for label in range(0, len(images.classes), 2)]
    pictures = [images.read_rgb(i).resize(size, Image.Resampling.BICUBIC) for i in firsts]
    maps = attention_maps(model, torch.stack([to_input(picture) for picture in pictures]))
    draw_attention(pictures, maps, path, title="Attention of CLS in the last block, no labels used")


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
