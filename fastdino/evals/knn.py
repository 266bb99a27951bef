"""`fastdino knn`: weighted k-NN classification of frozen features.

Source: Wu et al. 2018; Caron et al. 2021, section 4.1.
Shapes: N training images, M validation images, D channels, C classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdino import checkpoint, distributed
from fastdino.config import user_path
from fastdino.data.image_dataset import ImageDataset
from fastdino.errors import CheckpointError, ConfigError
from fastdino.evals import options
from fastdino.evals.features import Extractor, Model
from fastdino.evals.options import DEFAULT
from fastdino.evals.transforms import center_crop
from fastdino.files import atomic_write, explain_write_errors
from fastdino.terminal import print_out

# Elements held on the device at a time: a slice of the training features, and the similarities
# of a chunk of validation images to that slice.
SLICE_ELEMENTS = 1 << 28
CHUNK_ELEMENTS = 1 << 25
FEATURE_FILES = ("trainfeat", "trainlabels", "testfeat", "testlabels")


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    *,
    ks: Sequence[int],
    temperature: float = 0.07,
) -> dict[int, tuple[float, float]]:
    """Return the top-1 and top-5 accuracy of k-NN in percent, by k.

    Each of the k nearest neighbours votes for its class with weight exp(cosine / temperature).
    Equal similarities are ordered by topk, as in the paper's code; the order may depend on slices.

    In a distributed run every rank passes the same features, classifies a share of the validation
    images, and gets the overall accuracies. Training features on another device are moved to the
    validation device slice by slice. In fp32 the slices and similarities take at most 1.1 GiB
    there; in addition it holds D numbers per validation image, and 3 max(ks) per one of the share.

    Args:
        train_features [N, D], val_features [M, D]: L2-normalised.
        train_labels [N], val_labels [M]: class numbers from 0.
        ks: numbers of neighbours; above N counts as N.

    Returns: k -> (top-1, top-5). If k < 5, top-5 means top-k, as in the paper's code. A class
        without votes is never among the top 5 (the paper's code picks any of 1000 classes that tie
        at zero votes).
    """
    classes = max(int(train_labels.max()), int(val_labels.max())) + 1
    correct = torch.zeros(len(ks), 2, dtype=torch.long)  # top-1, top-5
    size = min(len(train_features), max(1, SLICE_ELEMENTS // train_features.shape[1]))
    rows = max(1, CHUNK_ELEMENTS // size)
    share = slice(distributed.rank(), None, distributed.world_size())
    slices = zip(train_features.split(size), train_labels.split(size), strict=True)
    neighbours = nearest(slices, val_features[share].split(rows), max(ks))
    for (similarity, neighbour_labels), labels in zip(
        neighbours, val_labels[share].split(rows), strict=True
    ):
        # Relative to the nearest neighbour: same order, and no overflow at low temperatures.
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
    """Return, for each chunk, similarities and labels [B, k] of the k nearest training images.

    Neighbours are sorted by falling similarity. A k above the number of training images counts as
    that number.

    Args:
        slices: training features [n, D] and labels [n].
        chunks: validation features [B, D].
    """
    best: list[tuple[Tensor, Tensor]] = []
    for features, labels in slices:
        features, labels = features.to(chunks[0].device), labels.to(chunks[0].device)
        for i, chunk in enumerate(chunks):
            similarity, indices = (chunk @ features.T).topk(min(k, len(features)), dim=1)
            candidates = similarity, labels[indices]
            if i == len(best):
                best.append(candidates)
                continue
            merged, merged_labels = (
                torch.cat(pair, 1) for pair in zip(best[i], candidates, strict=True)
            )
            similarity, indices = merged.topk(min(k, merged.shape[1]), dim=1)
            best[i] = similarity, merged_labels.gather(1, indices)
    return best


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `fastdino knn`: those of the paper's eval_knn.py, then this project's."""
    options.add_network_flags(parser)
    options.add_conversion_flags(parser)
    options.add_extraction_flags(parser, batch_size=128)
    add = parser.add_argument_group("images").add_argument
    add("--data_path", type=user_path, default="/path/to/imagenet/", help=options.SPLITS_HELP)
    add("--resize", type=int, default=256, help=f"resize the short side to this, in px {DEFAULT}")
    add("--crop", type=int, default=224, help=f"side of the centre crop, in px {DEFAULT}")
    add("--raw_pixels", action="store_true", help="baseline: classify pixels, not features")
    add(
        "--dump_features", type=user_path, metavar="FOLDER", help="save the features to this folder"
    )
    add(
        "--load_features",
        type=user_path,
        metavar="FOLDER",
        help="load features saved by --dump_features",
    )
    add = parser.add_argument_group("classifier").add_argument
    about = "numbers of neighbours (default: 10 20 100 200)"
    add("--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200], help=about)
    add("--temperature", type=float, default=0.07, help=f"temperature of the votes {DEFAULT}")


def main(args: argparse.Namespace) -> int:
    """Run `fastdino knn`."""
    options.check_extraction_flags(args, "resize", "crop")
    if min(args.nb_knn) < 1:
        raise ConfigError(f"--nb_knn must be numbers from 1, got {args.nb_knn}")
    if not args.temperature > 0:
        raise ConfigError(f"--temperature must be above 0, got {args.temperature}")
    with options.join_ranks(args) as device:
        no_model = args.load_features or args.raw_pixels
        model = None if no_model else options.load_network(args, device)
        if args.load_features:
            tensors = load_features(args.load_features)
        else:
            tensors = compute_features(args, model, device)
        if args.dump_features:
            distributed.from_main(lambda: dump_features(Path(args.dump_features), tensors))
        compare_on = options.comparison_device(args, device)
        accuracy = knn_accuracy(
            tensors["trainfeat"],
            tensors["trainlabels"],
            tensors["testfeat"].to(compare_on),
            tensors["testlabels"].to(compare_on),
            ks=args.nb_knn,
            temperature=args.temperature,
        )
        if distributed.rank() > 0:
            return 0
    for k, (top1, top5) in accuracy.items():
        print_out(f"{k}-NN classifier result: Top1: {top1:.2f}, Top5: {top5:.2f}")
    flags = ("data_path", "load_features", "raw_pixels", "resize", "crop", "temperature")
    scores = {
        "images": {"train": len(tensors["trainfeat"]), "val": len(tensors["testfeat"])},
        **{str(k): {"top1": top1, "top5": top5} for k, (top1, top5) in accuracy.items()},
    }
    options.write_scores(args, model, flags, scores)
    return 0


def compute_features(
    args: argparse.Namespace, model: torch.nn.Module | None, device: torch.device
) -> dict[str, Tensor]:
    """Extract features and labels of both splits, named as the paper's feature files.

    model: None for raw pixels.
    """
    # Before any extraction, which takes long; one error for all ranks.
    datasets = distributed.from_main(lambda: options.scan_splits(args))
    embed = model or torch.nn.Flatten()
    transform = center_crop(args.resize, args.crop)
    loading = args.batch_size_per_gpu, args.num_workers, device
    return extract_splits(datasets, Extractor(normalized(embed), transform, *loading))


def normalized(embed: Model) -> Model:
    """Return the function that maps images to L2-normalised fp32 features of a network."""
    return lambda images: F.normalize(embed(images).float(), dim=1)


def extract_splits(datasets: dict[str, ImageDataset], extractor: Extractor) -> dict[str, Tensor]:
    """Extract features and labels of the training and validation split of `scan_labelled`.

    Returns: trainfeat [N, D], trainlabels [N], testfeat [M, D], testlabels [M], of usable images.

    Raises: DataError: a split has no usable image. StoppedError: see Extractor.
    """
    tensors = {}
    for name, (split, dataset) in zip(("train", "test"), datasets.items(), strict=True):
        features, usable = extractor.extract_usable(dataset, split, skipped=len(dataset.skipped))
        tensors[f"{name}feat"] = features
        tensors[f"{name}labels"] = torch.from_numpy(dataset.labels)[usable]
    return tensors


@distributed.fail_together()
def load_features(folder: str) -> dict[str, Tensor]:
    """Load the feature files of --dump_features, or of the paper's eval_knn.py.

    Raises: CheckpointError: a file is missing, or shapes do not match.
    """
    tensors = {}
    for name in FEATURE_FILES:
        tensor = checkpoint.load_tensor(Path(folder) / f"{name}.pth")
        tensors[name] = tensor.float() if name.endswith("feat") else tensor.long()
    train, train_labels, test, test_labels = (tensors[name].shape for name in FEATURE_FILES)
    rows_match = [train[:1], test[:1]] == [train_labels, test_labels]
    if not rows_match or len(train) != 2 or train[1:] != test[1:] or 0 in (train[0], test[0]):
        raise CheckpointError(
            f"the shapes of the files in {folder} do not match: "
            + ", ".join(f"{name} is {tuple(tensors[name].shape)}" for name in FEATURE_FILES)
            + "; expected [N, D], [N], [M, D], [M]"
        )
    return tensors


def dump_features(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write the four files that the paper's eval_knn.py writes."""
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in FEATURE_FILES:
            with atomic_write(folder / f"{name}.pth") as file:
                torch.save(tensors[name].cpu(), file)
