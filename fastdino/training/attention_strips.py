"""Pictures of the teacher's attention maps during a run, of the same images each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastdino.data.image_dataset import ImageDataset
from fastdino.data.image_files import explained_reading, quiet_pillow
from fastdino.errors import DataError
from fastdino.evals.attention_figures import Pixels, attention_strip
from fastdino.evals.attention_maps import attention_maps, fit_to_patches
from fastdino.evals.transforms import center_crop_picture, to_input
from fastdino.files import atomic_write, explain_write_errors
from fastdino.models.vit import VisionTransformer

IMAGES = 4  # per picture
SMALLEST = 128  # smaller images are enlarged to about this side, in pixels


class AttentionStrips:
    """A row per image: the image, the mean map of the last block, and the map of each head.

    The images are the first one of each class, then the first others, up to 4 in all.

    Args:
        sizes: short side after the resize, and side of the crop, in pixels.
        patch_size: the crop is cut at the right and bottom to whole patches.
        folder: of the pictures; it is created.

    Raises: DataError: no image can be read. CheckpointError: the folder cannot be created.
    """

    def __init__(
        self, images: ImageDataset, sizes: tuple[int, int], patch_size: int, folder: Path
    ) -> None:
        with explain_write_errors(folder):
            folder.mkdir(exist_ok=True)
        self._folder = folder
        crop = center_crop_picture(*sizes)
        self._pictures: list[Image.Image] = []
        problem = ""
        for index in _first_of_each_class(images):
            path = images.path(index)
            try:
                with quiet_pillow(), explained_reading(path):
                    picture = crop(images.read_rgb(index))
            except DataError as error:
                problem = problem or str(error)
                continue
            self._pictures.append(fit_to_patches(picture, None, patch_size))
            if len(self._pictures) == IMAGES:
                break
        if not self._pictures:
            raise DataError(f"--attention_every: no image can be read: {problem}")

    def draw(self, backbone: nn.Module, device: torch.device) -> Pixels:
        """Return the picture, uint8 [height, width, 3].

        Args: backbone: a VisionTransformer in eval mode on `device`.
        """
        assert isinstance(backbone, VisionTransformer)
        inputs = torch.stack([to_input(picture) for picture in self._pictures])
        maps = attention_maps(backbone, inputs.to(device)).float().cpu()
        scale = max(1, SMALLEST // self._pictures[0].width)
        return attention_strip([np.asarray(picture) for picture in self._pictures], maps, scale)

    def save(self, pixels: Pixels, epoch: int) -> None:
        """Write the picture of an epoch, from 0; raise OSError."""
        self._folder.mkdir(exist_ok=True)  # the run's folder may have been replaced
        with atomic_write(self._folder / f"{epoch:04}.png") as file:
            Image.fromarray(pixels).save(file, format="PNG")


def _first_of_each_class(images: ImageDataset) -> list[int]:
    """Return the indices of all images: the first of each class, then the others."""
    first = np.unique(images.labels, return_index=True)[1].tolist()
    return [*first, *np.setdiff1d(np.arange(len(images)), first).tolist()]
