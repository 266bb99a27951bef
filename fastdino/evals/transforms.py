"""Image transforms of the paper's evaluation scripts: PIL image -> normalised tensor [3, H, W]."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.functional import normalize, to_tensor

from fastdino.augmentation.pillow import MEAN, STD

Transform = Callable[[Image.Image], Tensor]


def to_input(image: Image.Image) -> Tensor:
    """Convert RGB to float32 [3, H, W], normalised with ImageNet's mean and std.

    Matches the paper's code to the bit: it divides by 255, whereas torchvision's v2.ToDtype
    multiplies by 1/255, which rounds differently.
    """
    return normalize(to_tensor(image), MEAN, STD)


def center_crop(resize: int, crop: int) -> Transform:
    """Return the k-NN and validation transform: bicubic resize of the short side, centre crop."""
    return v2.Compose([*center_crop_picture(resize, crop).transforms, to_input])


def center_crop_picture(resize: int, crop: int) -> v2.Compose:
    """Return `center_crop` without the conversion to a tensor: PIL image -> PIL image."""
    bicubic = v2.InterpolationMode.BICUBIC
    return v2.Compose([v2.Resize(resize, interpolation=bicubic), v2.CenterCrop(crop)])


def random_crop(crop: int) -> Transform:
    """Return the linear probe's training transform: random resized crop (bilinear) and flip."""
    return v2.Compose([v2.RandomResizedCrop(crop), v2.RandomHorizontalFlip(), to_input])


def square(size: int) -> Transform:
    """Return the copy detection transform: bicubic resize to a square, without cropping."""
    return v2.Compose([v2.Resize((size, size), v2.InterpolationMode.BICUBIC), to_input])


def fit_within(size: int) -> Transform:
    """Return the retrieval transform: shrink to fit a square (Lanczos), keeping the aspect ratio.

    An image that already fits keeps its size.
    """

    def transform(image: Image.Image) -> Tensor:
        image = image.copy()
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
        return to_input(image)

    return transform
