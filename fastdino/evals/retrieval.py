"""`fastdino retrieval`: mAP of image retrieval on revisited Oxford and Paris."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdino import distributed
from fastdino.config import parse_bool, user_path
from fastdino.data.image_files import Header, Unusable, count_deep, read_headers
from fastdino.environment import cpu_count
from fastdino.evals import options
from fastdino.evals.descriptors import SCALES, multi_scale
from fastdino.evals.features import Extractor, ImageFiles
from fastdino.evals.options import DEFAULT
from fastdino.evals.ranking_metrics import Indices, Relevance, restrict, revisited_scores
from fastdino.evals.retrieval_dataset import DATASETS, LABELS, RetrievalDataset, read_dataset
from fastdino.evals.transforms import fit_within
from fastdino.terminal import print_out


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `fastdino retrieval`: the paper's eval_image_retrieval.py's, then ours."""
    options.add_network_flags(parser)
    options.add_conversion_flags(parser)
    options.add_extraction_flags(parser, batch_size=16)
    add = parser.add_argument_group("images").add_argument
    add(
        "--data_path",
        type=user_path,
        default="/path/to/revisited_paris_oxford/",
        help="folder with <dataset>/",
    )
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
        network = options.load_network(args, device, size_flag="imsize")
        dataset = distributed.from_main(
            lambda: read_dataset(
                Path(args.data_path),
                args.dataset,
                crop_queries=args.crop_queries,
                conversion=options.conversion_of(args),
            )
        )
        images = (dataset.queries, dataset.database)
        headers = distributed.from_main(
            lambda: [read_headers(one.paths, args.num_workers) for one in images]
        )
        every = [*headers[0], *headers[1]]
        options.warn_of_deep(args, count_deep(every), len(every))
        extractor = build_extractor(args, network, device)
        queries, database, relevance = compute_features(extractor, dataset, headers)
        if distributed.rank() > 0:
            return 0
        compare_on = options.comparison_device(args, device)
        scores = revisited_scores(queries.to(compare_on), database.to(compare_on), relevance)
    for difficulty, values in scores.items():
        shown = ", ".join(
            f"{name}: {'-' if value is None else f'{value:.2f}'}" for name, value in values.items()
        )
        print_out(f"{args.dataset} {difficulty}: {shown}")
    flags = ("data_path", "dataset", "imsize", "multiscale", "crop_queries")
    counts = {"queries": len(queries), "database": len(database)}
    left_out = {name: len(getattr(dataset, name)) - number for name, number in counts.items()}
    options.write_scores(args, network, flags, {"images": counts, "left_out": left_out, **scores})
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


def compute_features(
    extractor: Extractor, dataset: RetrievalDataset, headers: list[list[Header | Unusable]]
) -> tuple[Tensor, Tensor, list[Relevance]]:
    """Return L2-normalised features [Q, D] and [N, D] on the CPU, and the relevance of each query.

    Images that cannot be decoded, or are smaller than a patch, are left out of the queries, the
    database and the relevant images. (The paper's script accepts truncated files.)

    Raises: DataError: no query or no image of the database can be used.
    """

    def extract(
        images: ImageFiles, own: list[Header | Unusable], title: str
    ) -> tuple[Tensor, Indices]:
        features, usable = extractor.extract_usable(images, title, sizes=images.sizes(own))
        return F.normalize(features, dim=1), usable.numpy()

    # Queries first: they are few, so a mistake shows early.
    queries, asked = extract(dataset.queries, headers[0], "queries")
    database, found = extract(dataset.database, headers[1], "database")
    relevance = [
        Relevance(*(restrict(getattr(dataset.relevance[i], name), found) for name in LABELS))
        for i in asked.tolist()
    ]
    return queries, database, relevance
