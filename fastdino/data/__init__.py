"""From images on disk to the crops of a training step.

scan_images finds a dataset (datasets/registry.py lists the kinds), reads the image headers
(scanning.py) and returns an ImageDataset. build_loader returns the batches of crops (loader.py).
draw_crops draws their parameters.
"""

from fastdino.augmentation.params import draw_crops
from fastdino.data.image_dataset import scan_images
from fastdino.data.loader import build_loader

__all__ = ["build_loader", "draw_crops", "scan_images"]
