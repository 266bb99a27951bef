"""Weighted k-NN classification of frozen features (Wu et al. 2018; Caron et al. 2021, section 4.1).

Legend: N training images, M validation images, D channels, C classes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastdino import checkpoint, distributed
from fastdino.config import check_at_least, parse_bool
from fastdino.errors import CheckpointError, ConfigError, DataError
from fastdino.evals.features import (
    extract_features,
)
from fastdino.evals.options import (
    SPLITS_HELP,
    add_network_flags,
    add_process_flags,
    load_network,
    scan_splits,
    settings_of,
)
from fastdino.evals.transforms import (
    center_crop,
)
from fastdino.files import atomic_write, explain_write_errors, write_json
from fastdino.runtime import choose_device

# Numbers on the device at once: training features, and similarities of some validation images to
# these (or votes).
SLICE_ELEMENTS = 1 << 28
CHUNK_ELEMENTS = 1 << 25


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    *,
    ks: Sequence[int],
    temperature: float = 0.07,
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 accuracy in percent of k-NN, each neighbour's vote exp(cosine / temperature).

    In a run of many processes, which all have the same features, each classifies a share of the
    validation images, and every one gets the whole's accuracies.

    Training features that are on another device are moved to the validation's slice by slice. In
    fp32 that device then holds 1.1 GiB of these and of similarities at most, D numbers a validation
    image and 3 max(ks) more for each of its share, however many training images there are.

    Of equal similarities topk's choice counts, as in the paper's code: it may depend on the slices.

    Args:
        train_features [N, D], val_features [M, D]: L2-normalised.
        train_labels [N], val_labels [M]: class numbers from 0, each beside its features.
        ks: numbers of neighbours; one above N counts as N.

    Returns: k -> (top-1, top-5); with k below 5 the latter is top-k, as in the paper's code. A
        class without a vote is not among the five (there, any of 1000 that ties at none may be).
    """
    classes = max(int(train_labels.max()), int(val_labels.max())) + 1
    correct = torch.zeros(len(ks), 2, dtype=torch.long)  # at top-1 and top-5
    size = min(len(train_features), max(1, SLICE_ELEMENTS // train_features.shape[1]))
    rows = max(1, CHUNK_ELEMENTS // size)
    share = slice(distributed.rank(), None, distributed.world_size())
    slices = zip(train_features.split(size), train_labels.split(size), strict=True)
    found = nearest(slices, val_features[share].split(rows), max(ks))
    for (similarity, neighbour_labels), labels in zip(
        found, val_labels[share].split(rows), strict=True
    ):
        # Relative to the nearest one's: the same order, and no overflow at low temperatures.
        votes = ((similarity - similarity[:, :1]) / temperature).exp()
        for i, k in enumerate(ks):
            scores = torch.zeros(len(votes), classes, device=votes.device, dtype=votes.dtype)
            scores.scatter_add_(1, neighbour_labels[:, :k], votes[:, :k])
            best = scores.topk(min(5, k, classes), dim=1)
            hits = (best.indices == labels[:, None]) & (best.values > 0)
            correct[i] += torch.stack((hits[:, 0].sum(), hits.sum())).cpu()
    percent = 100 * distributed.total(correct).double() / len(val_labels)
    return {k: (top1, top5) for k, (top1, top5) in zip(ks, percent.tolist(), strict=True)}


def nearest(
    slices: Iterable[tuple[Tensor, Tensor]], chunks: Sequence[Tensor], k: int
) -> list[tuple[Tensor, Tensor]]:
    """Similarities and labels [B, k], the nearest first, of the k training images nearest to each.

    Args:
        slices: training features [n, D] and labels [n]; k counts as all of them where it is more.
        chunks: validation features [B, D].
    """
    best: list[tuple[Tensor, Tensor]] = []
    for features, labels in slices:
        features, labels = features.to(chunks[0].device), labels.to(chunks[0].device)
        for i, chunk in enumerate(chunks):
            similarity, places = (chunk @ features.T).topk(min(k, len(features)), dim=1)
            found = similarity, labels[places]
            if i == len(best):
                best.append(found)
                continue
            similarity, both = (torch.cat(pair, 1) for pair in zip(best[i], found, strict=True))
            similarity, places = similarity.topk(min(k, similarity.shape[1]), dim=1)
            best[i] = similarity, both.gather(1, places)
    return best


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `fastdino knn`: those of the paper's eval_knn.py, then this project's."""
    add_network_flags(parser)
    add_process_flags(parser)
    add = parser.add_argument
    add("--batch_size_per_gpu", type=int, default=128, help="images a forward pass (128)")
    add("--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours")
    add("--temperature", type=float, default=0.07, help="of the votes (0.07)")
    add("--use_cuda", type=parse_bool, default=True, help="classify on the GPU, where there is one")
    add("--dump_features", help="folder to save the features in")
    add("--load_features", help="folder to take saved features from")
    add("--data_path", default="/path/to/imagenet/", help=SPLITS_HELP)
    add("--resize", type=int, default=256, help="short side the images are resized to (256)")
    add("--crop", type=int, default=224, help="side of the centre crop (224)")
    add("--raw_pixels", action="store_true", help="classify pixels instead of features: a baseline")
    add("--output", help="JSON file for the accuracies and what they depend on")


def main(args: argparse.Namespace) -> int:
    """Runs `fastdino knn`."""
    check_at_least(args, 1, "batch_size_per_gpu", "resize", "crop", "patch_size")
    check_at_least(args, 0, "num_workers")
    if min(args.nb_knn) < 1:
        raise ConfigError(f"--nb_knn must be numbers from 1, got {args.nb_knn}")
    if not args.temperature > 0:
        raise ConfigError(f"--temperature must be above 0, got {args.temperature}")
    device = choose_device(args.device)
    with distributed.process_group(device, args.dist_url):
        model = None if args.load_features or args.raw_pixels else load_network(args, device)
        tensors = (
            load_features(args) if args.load_features else compute_features(args, model, device)
        )
        if args.dump_features:
            distributed.from_main(lambda: dump_features(Path(args.dump_features), tensors))
        where = device if args.use_cuda else torch.device("cpu")
        accuracy = knn_accuracy(
            tensors["trainfeat"],
            tensors["trainlabels"],
            tensors["testfeat"].to(where),
            tensors["testlabels"].to(where),
            ks=args.nb_knn,
            temperature=args.temperature,
        )
        if distributed.rank() > 0:
            return 0
    for k, (top1, top5) in accuracy.items():
        print(f"{k}-NN classifier result: Top1: {top1:.2f}, Top5: {top5:.2f}")
    if args.output:
        flags = ("data_path", "load_features", "raw_pixels", "resize", "crop", "temperature")
        result = {
            "settings": settings_of(args, model, *flags),
            "images": {"train": len(tensors["trainfeat"]), "val": len(tensors["testfeat"])},
            **{str(k): {"top1": top1, "top5": top5} for k, (top1, top5) in accuracy.items()},
        }
        write_json(result, Path(args.output))
    return 0


def compute_features(
    args: argparse.Namespace, model: torch.nn.Module | None, device: torch.device
) -> dict[str, Tensor]:
    """Features and labels of train/ and val/, under the names of the paper's feature files.

    model: None for the pixels themselves.
    """
    # One verdict for all processes, before the features: they take long.
    sources = distributed.from_main(lambda: scan_splits(args))
    tensors = {}
    for (split, source), name in zip(sources.items(), ("train", "test"), strict=True):
        features, labels = extract_features(
            model or torch.nn.Flatten(),
            source,
            center_crop(args.resize, args.crop),
            batch_size=args.batch_size_per_gpu,
            workers=args.num_workers,
            device=device,
            title=split,
        )
        if not len(labels):
            raise DataError(f"none of the {len(source)} images in {split}/ can be decoded")
        left_out = len(source.skipped) + len(source) - len(labels)
        if left_out and distributed.rank() == 0:
            print(f"{split}: {left_out} unreadable images left out", file=sys.stderr)
        tensors[f"{name}feat"], tensors[f"{name}labels"] = features, labels
    return tensors


FEATURE_FILES = ("trainfeat", "trainlabels", "testfeat", "testlabels")


@distributed.together()
def load_features(args: argparse.Namespace) -> dict[str, Tensor]:
    """The feature files of --dump_features, or of the paper's eval_knn.py.

    Raises: CheckpointError: a file is missing, or they do not belong together.
    """
    tensors = {}
    for name in FEATURE_FILES:
        path = Path(args.load_features) / f"{name}.pth"
        value = checkpoint.load_tensor(path)
        tensors[name] = value.float() if name.endswith("feat") else value.long()
    train, train_labels, test, test_labels = (tensors[name].shape for name in FEATURE_FILES)
    rows = [train[:1], test[:1]] == [train_labels, test_labels]
    if not rows or len(train) != 2 or train[1:] != test[1:] or 0 in (train[0], test[0]):
        raise CheckpointError(
            f"the files in {args.load_features} do not belong together: "
            + ", ".join(f"{name} is {tuple(tensors[name].shape)}" for name in FEATURE_FILES)
            + "; expected [N, D], [N], [M, D], [M]"
        )
    return tensors


def dump_features(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes the four files that the paper's eval_knn.py writes."""
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in FEATURE_FILES:
            with atomic_write(folder / f"{name}.pth") as file:
                torch.save(tensors[name].cpu(), file)
