"""Build both packages: the trainer, and the kernels that need only torch and triton."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
INIT = (ROOT / "fastdino/__init__.py").read_text(encoding="utf-8")
VERSION = re.findall(r'__version__ = "(.+)"', INIT)[0]

EVAL = [
    "av>=15",
    "matplotlib>=3.8",
    "numpy>=1.26",
    "pillow>=10,<13",  # 13 changed the order of the resize passes: crops would differ
    "safetensors>=0.4",
    "timm>=1.0.20",
    "torchvision>=0.25",
    "tqdm>=4.66",
]
# `fastdino embed --output FILE.parquet`.
PARQUET = ["pyarrow>=15"]
# Datasets by name: hf:NAME, and torchvision's datasets that are distributed as .mat files.
DATA = [
    *PARQUET,
    "datasets>=3",
    "scipy>=1.11",
]
TRAIN = [
    *EVAL,
    "numba>=0.61",
    "nvidia-cuda-runtime-cu12; sys_platform == 'linux'",  # xformers links against it
    "tensorboard>=2.16",
    "xformers>=0.0.35; sys_platform == 'linux' and platform_machine == 'x86_64'",
]
# tests/test_export.py passes with each of these, with timm 1.0.20 and with safetensors 0.4.
EXPORT = [
    *EVAL,
    "onnx>=1.18",
    "onnxruntime>=1.22",
    "onnxscript>=0.6",  # the oldest that torch 2.11 and newer can export with
    "transformers>=4.50",
]
# fastdino train --logger wandb, --logger mlflow.
WANDB = ["wandb>=0.31"]
MLFLOW = ["mlflow>=3.17"]
# fastdino submit.
SUBMIT = ["submitit>=1.5"]
DEV = [
    "build",
    "hypothesis>=6.100",
    "kernels>=0.17",  # Hugging Face's, which loads what kernels/build_hub.py writes
    "lightly>=1.6,<1.7",  # compared with in tests/test_compat_lightly_*.py
    "mkdocs-material>=9.5",
    "mypy>=1.18",
    "pre-commit",
    "pytest>=8",
    "pytest-benchmark>=5.1",
    "pytest-xdist",
    "ruff>=0.14",
    "vermin>=1.6",  # tests/test_build_hub.py: oldest Python of the kernels
    "setuptools>=77",  # tests/test_package.py builds in the environment it runs in
]
DALI_CUDA12 = ["nvidia-dali-cuda120>=1.50; sys_platform == 'linux'"]
DALI_CUDA13 = ["nvidia-dali-cuda130>=2.0; sys_platform == 'linux'"]

setup(
    name="fastdino",
    version=VERSION,
    description="DINO self-supervised pretraining as fast as the hardware allows",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["fastdino*"]) + find_packages("kernels"),
    package_dir={"fastdino_kernels": "kernels/fastdino_kernels"},
    package_data={"fastdino": ["py.typed"], "fastdino_kernels": ["py.typed"]},
    install_requires=["torch>=2.10", "triton>=3.6; sys_platform == 'linux'"],
    extras_require={
        "eval": EVAL,
        "train": TRAIN,
        "data": DATA,
        "parquet": PARQUET,
        "export": EXPORT,
        "wandb": WANDB,
        "mlflow": MLFLOW,
        "submit": SUBMIT,
        "dali-cuda12": DALI_CUDA12,
        "dali-cuda13": DALI_CUDA13,
        "dev": DEV,
        "all": TRAIN + DATA + EXPORT + WANDB + MLFLOW + SUBMIT + DALI_CUDA13 + DEV,
    },
    entry_points={"console_scripts": ["fastdino = fastdino.__main__:run"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
