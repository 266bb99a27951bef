"""From images on disk to the crops of a step: which images, which crops, and who makes them.

crops.py says what is drawn, sources.py which images there are, order.py in which step each comes.
pil.py makes the crops as the paper does, fused.py the same ones fast, dali.py near ones; loader.py
chooses one of them. decode.py reads and decodes for fused.py, dali_decode.py decodes for it. Under
sources.py: find.py tells what --data_path is (places.py takes it apart; davis_frames.py, yfcc.py,
torchvision_sets.py and hugging_face.py know their sets), archives.py, tars.py and zips.py where
images lie in files of many, scan.py reads the headers, reading.py the bytes; table.py keeps what
was found, broken.py counts what is broken.
"""

from fastdino.augmentation.params import draw_crops
from fastdino.data.image_dataset import scan_images
from fastdino.data.loader import build_loader

__all__ = ["build_loader", "draw_crops", "scan_images"]
