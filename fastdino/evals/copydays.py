"""`fastdino copydays`: copy detection, finding the original of an altered picture.

Layout of the dataset:

    original/200000.jpg, 200100.jpg, ...     the database
    strong/200001.jpg, 200002.jpg, ...       altered by hand; the first four characters of the name
                                             identify the original
    jpegqual/<quality>/, crops/<percent>/    altered by a program; same name as the original

The paper's script also scores original/ as a block of copies, which are always found.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdino import distributed
from fastdino.config import user_path
from fastdino.data.image_files import count_deep, read_headers
from fastdino.errors import ConfigError, DataError
from fastdino.evals import options
from fastdino.evals.descriptors import Whitening, cls_and_gem
from fastdino.evals.features import Extractor, ImageFiles
from fastdino.evals.options import DEFAULT
from fastdino.evals.ranking_metrics import Indices, copydays_map, micro_ap, restrict
from fastdino.evals.transforms import square
from fastdino.models.vit import VisionTransformer
from fastdino.terminal import print_out

ORIGINAL, STRONG, ALL = "original", "strong", "all"
QUALITIES = (3, 5, 8, 10, 15, 20, 30, 50, 75)
CROPS = (10, 15, 20, 30, 40, 50, 60, 70, 80)
BLOCKS = (STRONG, *(f"jpegqual/{q}" for q in QUALITIES), *(f"crops/{c}" for c in CROPS))
ID_LENGTH = 4  # leading characters of a name that strong copies share with their original


@dataclass(frozen=True)
class Block:
    """Copies of one kind [Q], and for each the indices of its originals."""

    images: ImageFiles
    positives: list[Indices]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `fastdino copydays`: the paper's eval_copy_detection.py's, then ours."""
    options.add_network_flags(parser, "architecture, a vit_*", default=("vit_base", 8))
    options.add_conversion_flags(parser)
    options.add_extraction_flags(parser, batch_size=16)
    add = parser.add_argument_group("images").add_argument
    add(
        "--data_path",
        type=user_path,
        default="/path/to/copydays/",
        help="folder with original/, strong/, ...",
    )
    about = "folder of images to learn a whitening from (default: no whitening)"
    add("--whitening_path", type=user_path, default="", metavar="FOLDER", help=about)
    about = "folder of images without copies, added to the database (default: none)"
    add("--distractors_path", type=user_path, default="", metavar="FOLDER", help=about)
    about = f"resize images to a square of this side, in px {DEFAULT}"
    add("--imsize", type=int, default=320, help=about)


def main(args: argparse.Namespace) -> int:
    """Run `fastdino copydays`."""
    options.check_extraction_flags(args, "imsize")
    with options.join_ranks(args) as device:
        network = options.load_network(args, device, size_flag="imsize")
        originals, blocks, extras = distributed.from_main(lambda: find_images(args))
        if not isinstance(network, VisionTransformer):
            raise ConfigError("the network gives no patch tokens; expected one of vit_*")
        images = (originals, *(block.images for block in blocks.values()), *extras.values())
        paths = [path for one in images for path in one.paths]
        headers = distributed.from_main(lambda: read_headers(paths, args.num_workers))
        options.warn_of_deep(args, count_deep(headers), len(paths))
        loading = args.batch_size_per_gpu, args.num_workers, device
        extractor = Extractor(cls_and_gem(network), square(args.imsize), *loading)
        queries, database, positives = compute_features(extractor, originals, blocks)
        extra = {name: extractor.extract_usable(images, name)[0] for name, images in extras.items()}
        if distributed.rank() > 0:
            return 0
        readable = len(database)
        if "distractors" in extra:
            database = torch.cat((database, extra["distractors"]))
        if "whitening" in extra:
            whitening = Whitening.learn(extra["whitening"])
            database = whitening(database)
            queries = {name: whitening(features) for name, features in queries.items()}
        compare_on = options.comparison_device(args, device)
        scores = score_blocks(
            {name: F.normalize(rows, dim=1).to(compare_on) for name, rows in queries.items()},
            F.normalize(database, dim=1).to(compare_on),
            positives,
        )
    for name, values in scores.items():
        print_out(f"{name}: mAP: {values['mAP']:.2f}, micro-AP: {values['micro_AP']:.2f}")
    flags = ("data_path", "imsize", "distractors_path", "whitening_path")
    counts = {ORIGINAL: readable, **{name: len(rows) for name, rows in extra.items()}}
    options.write_scores(args, network, flags, {"images": counts, "blocks": scores})
    return 0


def compute_features(
    extractor: Extractor, originals: ImageFiles, blocks: dict[str, Block]
) -> tuple[dict[str, Tensor], Tensor, dict[str, list[Indices]]]:
    """Return features of the copies in each block and of the originals, and the copies' originals.

    Images that cannot be decoded are left out, and so are copies without a usable original.

    Raises: DataError: no image of a folder can be used, or no copy has a usable original.
    """
    # Queries first: they are few, so a mistake shows early.
    copies = {name: extractor.extract_usable(one.images, name) for name, one in blocks.items()}
    database, usable = extractor.extract_usable(originals, ORIGINAL)
    queries: dict[str, Tensor] = {}
    positives: dict[str, list[Indices]] = {}
    for name, (features, asked) in copies.items():
        own = [restrict(blocks[name].positives[i], usable.numpy()) for i in asked.tolist()]
        if kept := [i for i, indices in enumerate(own) if len(indices)]:
            queries[name], positives[name] = features[kept], [own[i] for i in kept]
    with distributed.fail_together():
        if not queries:
            raise DataError("no copy has an original that can be used")
    return queries, database, positives


def find_images(
    args: argparse.Namespace,
) -> tuple[ImageFiles, dict[str, Block], dict[str, ImageFiles]]:
    """Return the originals, the blocks on disk, and the whitening and distractor images.

    Raises: DataError: no originals, no block, a copy without its original, or an empty folder.
    """
    root = Path(args.data_path)
    conversion = options.conversion_of(args)
    originals = ImageFiles.in_folder(root / ORIGINAL, conversion)
    names = [name for name in BLOCKS if (root / name).is_dir()]
    blocks = {name: find_block(root / name, originals, by_id=name == STRONG) for name in names}
    if not blocks:
        raise DataError(f"no copies in {root}: expected strong/, jpegqual/3/, crops/10/, ...")
    folders = {"distractors": args.distractors_path, "whitening": args.whitening_path}
    extras = {
        name: ImageFiles.in_folder(Path(path), conversion) for name, path in folders.items() if path
    }
    return originals, blocks, extras


def find_block(folder: Path, originals: ImageFiles, *, by_id: bool) -> Block:
    """Match the copies of a folder to their originals.

    Args:
        by_id: match the first four characters of the names, else the whole names.
    """

    def key(path: Path) -> str:
        return path.stem[: ID_LENGTH if by_id else None]

    indices: dict[str, list[int]] = {}
    for index, path in enumerate(originals.paths):
        indices.setdefault(key(path), []).append(index)
    images = ImageFiles.in_folder(folder, originals.conversion)
    for path in images.paths:
        if key(path) not in indices:
            raise DataError(
                f"{path} has no original: there is no "
                f"{originals.paths[0].parent / key(path)}{'*' if by_id else '.jpg'}"
            )
    return Block(images, [np.array(indices[key(path)], np.int64) for path in images.paths])


def score_blocks(
    queries: dict[str, Tensor], database: Tensor, positives: dict[str, list[Indices]]
) -> dict[str, dict[str, float]]:
    """Return mAP and micro-AP in percent of each block, and of all copies under "all"."""
    all_positives = [indices for block in positives.values() for indices in block]
    blocks = {name: (features, positives[name]) for name, features in queries.items()}
    blocks[ALL] = torch.cat(list(queries.values())), all_positives
    return {
        name: {
            "copies": len(features),
            "mAP": copydays_map(features, database, own),
            "micro_AP": micro_ap(features, database, own),
        }
        for name, (features, own) in blocks.items()
    }
