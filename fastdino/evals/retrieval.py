"""`fastdino retrieval`: mAP of image retrieval on revisited Oxford and Paris."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdino import distributed
from fastdino.config import parse_bool
from fastdino.environment import cpu_count
from fastdino.evals import options
from fastdino.evals.descriptors import SCALES, multi_scale
from fastdino.evals.features import Extractor, ImageFiles
from fastdino.evals.options import DEFAULT
from fastdino.evals.ranking_metrics import revisited_scores
from fastdino.evals.retrieval_dataset import DATASETS, RetrievalDataset, read_dataset
from fastdino.evals.transforms import fit_within


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `fastdino retrieval`: the paper's eval_image_retrieval.py's, then ours."""
    options.add_network_flags(parser)
    options.add_extraction_flags(parser, batch_size=16)
    add = parser.add_argument_group("images").add_argument
    add("--data_path", default="/path/to/revisited_paris_oxford/", help="folder with <dataset>/")
    add("--dataset", choices=DATASETS, default="roxford5k", help=f"dataset {DEFAULT}")
    add("--imsize", type=int, default=224, help=f"shrink images to fit this side, in px {DEFAULT}")
    about = f"average the features at scales 1, 0.71 and 0.5 {DEFAULT}"
    add("--multiscale", type=parse_bool, default=False, metavar="BOOL", help=about)
    about = f"cut out the queries' boxes, as the benchmark does but not the paper's code {DEFAULT}"
    add("--crop_queries", type=parse_bool, default=False, metavar="BOOL", help=about)


def main(args: argparse.Namespace) -> int:
    """Run `fastdino retrieval`."""
    options.check_extraction_flags(args, "imsize")
    with options.join_ranks(args) as device:
        dataset = distributed.from_main(
            lambda: read_dataset(Path(args.data_path), args.dataset, crop_queries=args.crop_queries)
        )
        network = options.load_network(args, device, size_flag="imsize")
        queries, database = compute_features(build_extractor(args, network, device), dataset)
        if distributed.rank() > 0:
            return 0
        compare_on = options.comparison_device(args, device)
        scores = revisited_scores(
            queries.to(compare_on), database.to(compare_on), dataset.relevance
        )
    for difficulty, values in scores.items():
        shown = ", ".join(
            f"{name}: {'-' if value is None else f'{value:.2f}'}" for name, value in values.items()
        )
        print(f"{args.dataset} {difficulty}: {shown}")
    flags = ("data_path", "dataset", "imsize", "multiscale", "crop_queries")
    counts = {"queries": len(dataset.queries), "database": len(dataset.database)}
    options.write_scores(args, network, flags, {"images": counts, **scores})
    return 0


def build_extractor(
    args: argparse.Namespace, network: nn.Module, device: torch.device
) -> Extractor:
    """Return the extractor of the flags; images smaller than a patch are unusable."""
    patch = getattr(network, "patch_size", 1)
    return Extractor(
        multi_scale(network) if args.multiscale else network,
        fit_within(args.imsize),
        args.batch_size_per_gpu,
        min(args.num_workers, cpu_count()),
        device,
        min_side=round(patch / min(SCALES)) if args.multiscale else patch,
    )


def compute_features(extractor: Extractor, dataset: RetrievalDataset) -> tuple[Tensor, Tensor]:
    """Return L2-normalised features [Q, D] of the queries and [N, D] of the database, on the CPU.

    Raises: DataError: an image is smaller than a patch or cannot be decoded. (The paper's script
        accepts truncated files.)
    """

    def extract(images: ImageFiles, title: str) -> Tensor:
        sizes = distributed.from_main(lambda: images.sizes(extractor.workers))
        return F.normalize(extractor.extract_all(images, title, sizes=sizes), dim=1)

    # Queries first: they are few, so a mistake shows early.
    return extract(dataset.queries, "queries"), extract(dataset.database, "database")
