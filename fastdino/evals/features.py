"""What evaluations share: the network, the two splits, the images as tensors, their features.

Legend: N images, D channels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fastdino import distributed
from fastdino.data.image_dataset import ImageDataset
from fastdino.environment import cpu_count

UNREADABLE = -1  # the label of an image whose header was good and whose pixels are not


class Images(Dataset[tuple[Tensor, int]]):
    """The images of a source, transformed, with their labels."""

    def __init__(self, source: ImageDataset, transform: Callable[[Image.Image], Tensor]):
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The image and its label; any image and UNREADABLE where it cannot be decoded."""
        try:
            image = self.source.read_rgb(index)
        except Exception:  # Pillow's plugins raise all kinds on broken files.
            return self.transform(Image.new("RGB", (1, 1))), UNREADABLE
        return self.transform(image), int(self.source.labels[index])


@torch.no_grad()
def extract_features(
    model: Callable[[Tensor], Tensor],
    source: ImageDataset,
    transform: Callable[[Image.Image], Tensor],
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    title: str = "",
) -> tuple[Tensor, Tensor]:
    """L2-normalised features [N, D] and labels [N] of all images, on the CPU, in order.

    Images that cannot be decoded have no row. In a run of many processes each computes a share,
    and every one gets the whole.
    """
    images: Dataset[tuple[Tensor, int]] = Images(source, transform)
    share = range(distributed.rank(), len(source), distributed.world_size())
    loader = DataLoader(
        torch.utils.data.Subset(images, share),
        batch_size=batch_size,
        num_workers=min(workers, cpu_count()),
        pin_memory=device.type == "cuda",
    )
    features: Tensor | None = None
    labels = torch.zeros(len(source), dtype=torch.long)
    done = 0
    for batch, batch_labels in tqdm(loader, desc=title, disable=not sys.stderr.isatty()):
        rows = share[done : done + len(batch)]
        out = F.normalize(model(batch.to(device)).float(), dim=1).cpu()
        if features is None:
            features = torch.zeros(len(source), out.shape[1])
        features[rows] = out
        labels[rows] = batch_labels
        done += len(batch)
    if distributed.world_size() > 1:
        widths = distributed.gather(0 if features is None else features.shape[1])
        if features is None:  # more processes than images: this one had none
            features = torch.zeros(len(source), max(widths))
    assert features is not None
    features, labels = distributed.total(features), distributed.total(labels)
    good = labels != UNREADABLE
    return features[good], labels[good]
