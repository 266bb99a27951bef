"""The reference backend: the paper's chain of Pillow and torchvision calls."""

from __future__ import annotations

from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from fastdino.augmentation.params import Crop

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Indexed by the operation numbers of CropParams.jitter_order.
_JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def make_crop(image: Image.Image, params: Crop, size: int) -> Tensor:
    """Make one crop of an RGB image: fp32 [3, size, size], normalized by ImageNet's statistics."""
    box = (params.top, params.left, params.height, params.width)
    image = F.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC)
    if params.flip:
        image = F.hflip(image)
    if params.jitter:
        for operation in params.jitter_order:
            image = _JITTER[operation](image, params.jitter_factor[operation])
    if params.gray:
        image = F.to_grayscale(image, num_output_channels=3)
    if params.blur_radius > 0:
        image = image.filter(ImageFilter.GaussianBlur(radius=params.blur_radius))
    if params.solarize:
        image = ImageOps.solarize(image)
    return F.normalize(F.to_tensor(image), MEAN, STD)
