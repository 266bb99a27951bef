"""From a folder of images to the crops of a step: which images, which crops, and who makes them.

crops.py says what is drawn, sources.py finds the images and their order. pil.py makes the crops as
the paper does, fused.py the same ones fast, dali.py near ones; loader.py chooses.
"""

from fastdino.data.crops import draw_crops
from fastdino.data.loader import build_loader
from fastdino.data.sources import scan_images

__all__ = ["build_loader", "draw_crops", "scan_images"]
