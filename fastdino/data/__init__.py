"""From a folder of images to the crops of a step: which images, which crops, and who makes them.

crops.py says what is drawn, sources.py finds the images and their order, pil.py and dali.py make
the crops (exactly as the paper, and fast), loader.py chooses between the two.
"""

from fastdino.data.crops import draw_crops
from fastdino.data.loader import build_loader
from fastdino.data.sources import scan_images

__all__ = ["build_loader", "draw_crops", "scan_images"]
