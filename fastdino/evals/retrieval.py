"""`fastdino retrieval`: mAP of image retrieval on revisited Oxford and Paris."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdino import distributed
from fastdino.config import check_at_least, parse_bool
from fastdino.environment import cpu_count
from fastdino.evals.descriptors import (
    SCALES,
    Model,
    Picture,
    extract_descriptors,
    multi_scale,
    raise_if_bad,
)
from fastdino.evals.options import (
    add_network_flags,
    add_process_flags,
    load_network,
    settings_of,
)
from fastdino.evals.ranking_metrics import revisited_scores
from fastdino.evals.retrieval_dataset import DATASETS, RetrievalSet, read_set, sizes_of
from fastdino.evals.transforms import fit_within
from fastdino.files import write_json
from fastdino.runtime import choose_device


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `fastdino retrieval`: the paper's eval_image_retrieval.py's, then ours."""
    add_network_flags(parser)
    add_process_flags(parser)
    add = parser.add_argument
    add("--data_path", default="/path/to/revisited_paris_oxford/", help="folder with <dataset>/")
    add("--dataset", choices=DATASETS, default="roxford5k", help="which set (roxford5k)")
    about = "mean of the features at scales 1, .71 and .5 (false)"
    add("--multiscale", type=parse_bool, default=False, metavar="BOOL", help=about)
    add("--imsize", type=int, default=224, help="side the images are shrunk to fit (224)")
    add("--use_cuda", type=parse_bool, default=True, help="compare on the GPU, where there is one")
    about = "cut the queries' boxes out, as the sets' authors do and the paper's code does not"
    add("--crop_queries", type=parse_bool, default=False, metavar="BOOL", help=f"{about} (false)")
    about = "images a forward pass, of one size each (16)"
    add("--batch_size_per_gpu", type=int, default=16, help=about)
    add("--output", help="JSON file for the scores")


def main(args: argparse.Namespace) -> int:
    """Runs `fastdino retrieval`."""
    check_at_least(args, 1, "imsize", "batch_size_per_gpu", "patch_size")
    check_at_least(args, 0, "num_workers")
    device = choose_device(args.device)
    with distributed.process_group(device, args.dist_url):
        found = distributed.from_main(
            lambda: read_set(Path(args.data_path), args.dataset, crop_queries=args.crop_queries)
        )
        backbone = load_network(args, device, size_flag="imsize")
        queries, database = compute_features(args, backbone, found, device)
        if distributed.rank() > 0:
            return 0
        where = device if args.use_cuda else torch.device("cpu")
        scores = revisited_scores(queries.to(where), database.to(where), found.relevance)
    flags = ("data_path", "dataset", "imsize", "multiscale", "crop_queries")
    report(args, settings_of(args, backbone, *flags), found, scores)
    return 0


def compute_features(
    args: argparse.Namespace, backbone: torch.nn.Module, found: RetrievalSet, device: torch.device
) -> tuple[Tensor, Tensor]:
    """L2-normalised features [Q, D] of the queries and [N, D] of the database, on the CPU.

    Raises: DataError: an image cannot be decoded, or is smaller than a patch. (The paper's script
        takes what there is of a file that ends early.)
    """
    model: Model = multi_scale(backbone) if args.multiscale else backbone
    patch = getattr(backbone, "patch_size", 1)
    min_side = round(patch / min(SCALES)) if args.multiscale else patch

    def features_of(pictures: list[Picture], title: str) -> Tensor:
        workers = min(args.num_workers, cpu_count())
        features, bad = extract_descriptors(
            model,
            pictures,
            fit_within(args.imsize),
            min_side=min_side,
            kinds=distributed.from_main(lambda: sizes_of(pictures, workers)),
            batch_size=args.batch_size_per_gpu,
            workers=workers,
            device=device,
            title=title,
        )
        raise_if_bad(bad)
        return F.normalize(features, dim=1)

    # Queries first: they are few, and a mistake shows sooner.
    return features_of(found.queries, "queries"), features_of(found.database, "database")


def report(
    args: argparse.Namespace,
    settings: dict[str, Any],
    found: RetrievalSet,
    scores: dict[str, dict[str, float | None]],
) -> None:
    """Prints the scores, and writes them with what they depend on to --output."""
    for difficulty, values in scores.items():
        shown = ", ".join(
            f"{name}: {'-' if value is None else f'{value:.2f}'}" for name, value in values.items()
        )
        print(f"{args.dataset} {difficulty}: {shown}")
    if args.output:
        counts = {"queries": len(found.queries), "database": len(found.database)}
        result = {"settings": settings, "images": counts, **scores}
        write_json(result, Path(args.output))
