"""`fastdino copydays`: copy detection, which original an altered picture was made from.

original/200000.jpg, 200100.jpg, ...       one picture each, the database
strong/200001.jpg, 200002.jpg, ...         altered by hand; the first four characters say of which
jpegqual/<quality>/, crops/<percent>/      altered by a program, under the original's name

The paper's script takes original/ for a block of copies too, which are found without fail.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from fastdino import distributed
from fastdino.config import check_at_least, parse_bool
from fastdino.errors import ConfigError, DataError
from fastdino.evals.descriptors import (
    Picture,
    Whitening,
    cls_and_gem,
    extract_descriptors,
    pictures_in,
    raise_if_bad,
    without,
)
from fastdino.evals.options import (
    add_network_flags,
    add_process_flags,
    load_network,
    settings_of,
)
from fastdino.evals.ranking_metrics import Places, copydays_map, micro_ap
from fastdino.evals.transforms import (
    to_input,
)
from fastdino.files import write_json
from fastdino.models.vit import VisionTransformer
from fastdino.runtime import choose_device

ORIGINAL, STRONG = "original", "strong"
QUALITIES = (3, 5, 8, 10, 15, 20, 30, 50, 75)
CROPS = (10, 15, 20, 30, 40, 50, 60, 70, 80)
BLOCKS = (
    STRONG,
    *(f"jpegqual/{quality}" for quality in QUALITIES),
    *(f"crops/{percent}" for percent in CROPS),
)
GROUP = 4  # leading characters of a name that copies share with their original
ALL = "all"


@dataclass(frozen=True)
class Block:
    """Copies of one kind [Q], and for each the places of its originals."""

    pictures: list[Picture]
    positives: list[Places]


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `fastdino copydays`: the paper's eval_copy_detection.py's, then ours."""
    add_network_flags(parser, "architecture, a vit_*", default=("vit_base", 8))
    add_process_flags(parser)
    add = parser.add_argument
    add("--data_path", default="/path/to/copydays/", help="folder with original/, strong/, ...")
    add("--whitening_path", default="", help="folder of images to learn the whitening from")
    add("--distractors_path", default="", help="folder of images that are nobody's original")
    add("--imsize", type=int, default=320, help="side the images are resized to, square (320)")
    add("--batch_size_per_gpu", type=int, default=16, help="images a forward pass (16)")
    add("--use_cuda", type=parse_bool, default=True, help="compare on the GPU, where there is one")
    add("--output", help="JSON file for the scores")


def main(args: argparse.Namespace) -> int:
    """Runs `fastdino copydays`."""
    check_at_least(args, 1, "imsize", "batch_size_per_gpu", "patch_size")
    check_at_least(args, 0, "num_workers")
    device = choose_device(args.device)
    with distributed.process_group(device, args.dist_url):
        originals, blocks, extra = distributed.from_main(lambda: find_pictures(args))
        extract = Extractor(args, device)
        # The queries first: their mistakes end it, a distractor's do not.
        queries = {name: extract.whole(block.pictures, name) for name, block in blocks.items()}
        database = extract.whole(originals, ORIGINAL)
        sets = {name: extract.usable(pictures, name) for name, pictures in extra.items()}
        if distributed.rank() > 0:
            return 0
        if "distractors" in sets:
            database = torch.cat((database, sets["distractors"]))
        if "whitening" in sets:
            whitening = Whitening.learn(sets["whitening"])
            database = whitening(database)
            queries = {name: whitening(features) for name, features in queries.items()}
        where = device if args.use_cuda else torch.device("cpu")
        scores = score(
            {name: F.normalize(features, dim=1).to(where) for name, features in queries.items()},
            F.normalize(database, dim=1).to(where),
            {name: block.positives for name, block in blocks.items()},
        )
    flags = ("data_path", "imsize", "distractors_path", "whitening_path")
    counts = {ORIGINAL: len(originals), **{k: len(v) for k, v in sets.items()}}
    report(args, settings_of(args, extract.network, *flags), scores, counts)
    return 0


def find_pictures(
    args: argparse.Namespace,
) -> tuple[list[Picture], dict[str, Block], dict[str, list[Picture]]]:
    """The originals, the blocks that are there, and the whitening's and the distractors' images.

    Raises: DataError: no originals, no block, a copy of no original, or a folder without images.
    """
    root = Path(args.data_path)
    originals = pictures_in(root / ORIGINAL)
    blocks = {
        name: find_block(root / name, originals, by_group=name == STRONG)
        for name in BLOCKS
        if (root / name).is_dir()
    }
    if not blocks:
        raise DataError(
            f"no copies in {root}: expected folders {STRONG}, jpegqual/3, crops/10, ..."
        )
    extra = {
        name: pictures_in(Path(folder))
        for name, folder in (
            ("distractors", args.distractors_path),
            ("whitening", args.whitening_path),
        )
        if folder
    }
    return originals, blocks, extra


def find_block(folder: Path, originals: list[Picture], *, by_group: bool) -> Block:
    """The copies in a folder; raises DataError where one has no original."""

    def key(picture: Picture) -> str:
        return picture.path.stem[: GROUP if by_group else None]

    places: dict[str, list[int]] = {}
    for place, original in enumerate(originals):
        places.setdefault(key(original), []).append(place)
    pictures = pictures_in(folder)
    for picture in pictures:
        if key(picture) not in places:
            raise DataError(
                f"{picture.path} is a copy of no original: there is no "
                f"{originals[0].path.parent / key(picture)}{'*' if by_group else '.jpg'}"
            )
    return Block(pictures, [np.array(places[key(picture)], np.int64) for picture in pictures])


class Extractor:
    """The network of the flags, and its descriptors of files: CLS beside GeM, not normalised.

    Raises: ConfigError: the network has no patch tokens, or cannot take --imsize.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.network = load_network(args, device, size_flag="imsize")
        if not isinstance(self.network, VisionTransformer):
            raise ConfigError("the network gives no patch tokens; expected one of vit_*")
        self.model = cls_and_gem(self.network)
        self.transform = v2.Compose(
            [
                v2.Resize((args.imsize, args.imsize), v2.InterpolationMode.BICUBIC),
                to_input,
            ]
        )

    def whole(self, pictures: list[Picture], title: str) -> Tensor:
        """Features [N, 2 D] of all; raises DataError where one cannot be decoded."""
        features, bad = self._extract(pictures, title)
        raise_if_bad(bad)
        return features

    def usable(self, pictures: list[Picture], title: str) -> Tensor:
        """Features of those that can be decoded; how many cannot is said on stderr."""
        features, bad = self._extract(pictures, title)
        if bad and distributed.rank() == 0:
            print(f"{title}: {len(bad)} unreadable images left out", file=sys.stderr)
        return without(features, bad)

    def _extract(self, pictures: list[Picture], title: str) -> tuple[Tensor, dict[int, str]]:
        return extract_descriptors(
            self.model,
            pictures,
            self.transform,
            batch_size=self.args.batch_size_per_gpu,
            workers=self.args.num_workers,
            device=self.device,
            title=title,
        )


def score(
    queries: dict[str, Tensor], database: Tensor, positives: dict[str, list[Places]]
) -> dict[str, dict[str, float]]:
    """The mAP and micro-AP in percent of each block, and of all copies together under "all"."""
    together = torch.cat(list(queries.values()))
    everyones = [places for block in positives.values() for places in block]
    sets = {name: (features, positives[name]) for name, features in queries.items()}
    return {
        name: {
            "copies": len(features),
            "mAP": copydays_map(features, database, own),
            "micro_AP": micro_ap(features, database, own),
        }
        for name, (features, own) in {**sets, ALL: (together, everyones)}.items()
    }


def report(
    args: argparse.Namespace,
    settings: dict[str, Any],
    scores: dict[str, dict[str, float]],
    counts: dict[str, int],
) -> None:
    """Prints the scores, and writes them with what they depend on to --output."""
    for name, values in scores.items():
        print(f"{name}: mAP: {values['mAP']:.2f}, micro-AP: {values['micro_AP']:.2f}")
    if args.output:
        result = {"settings": settings, "images": counts, "blocks": scores}
        write_json(result, Path(args.output))
