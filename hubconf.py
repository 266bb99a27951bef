"""Entry points for torch.hub: DINO backbones, from the weights that you name.

    model = torch.hub.load("<owner>/<repository>", "dino_vit_small", weights="checkpoint.pth")
    features = model(images)  # [B, 3, 224, 224] -> [B, 384]

`weights` is all that `fastdino knn --pretrained_weights` takes, or a URL of such a file.
"""

# Modules alone are imported: torch.hub lists every class and function it finds as an entry point.
import hashlib
import pathlib
import urllib.parse

import torch

import fastdino.errors
import fastdino.weights

dependencies = ["numpy", "safetensors", "timm", "torch", "torchvision"]


def dino(
    weights: str = "",
    *,
    arch: str | None = None,
    patch_size: int | None = None,
    checkpoint_key: str = "teacher",
) -> torch.nn.Module:
    """A backbone [B, 3, H, W] -> [B, D], in eval mode.

    Args:
        weights: a path, or a URL, whose file is kept in torch.hub's folder. "": fresh weights.
        arch, patch_size: None: what the checkpoint says, else vit_small, 16.
        checkpoint_key: "teacher" or "student", where the file has both.

    Raises: CheckpointError: weights that cannot be had, or are of another network.
    """
    path = _download(weights) if "://" in weights else weights
    return fastdino.weights.load_backbone(
        path, checkpoint_key=checkpoint_key, arch=arch, patch_size=patch_size
    ).module


def dino_vit_tiny(
    weights: str = "", *, patch_size: int | None = None, checkpoint_key: str = "teacher"
) -> torch.nn.Module:
    """ViT-Ti, D = 192; arguments as of `dino`."""
    return dino(weights, arch="vit_tiny", patch_size=patch_size, checkpoint_key=checkpoint_key)


def dino_vit_small(
    weights: str = "", *, patch_size: int | None = None, checkpoint_key: str = "teacher"
) -> torch.nn.Module:
    """ViT-S, D = 384; arguments as of `dino`."""
    return dino(weights, arch="vit_small", patch_size=patch_size, checkpoint_key=checkpoint_key)


def dino_vit_base(
    weights: str = "", *, patch_size: int | None = None, checkpoint_key: str = "teacher"
) -> torch.nn.Module:
    """ViT-B, D = 768; arguments as of `dino`."""
    return dino(weights, arch="vit_base", patch_size=patch_size, checkpoint_key=checkpoint_key)


def _download(url: str) -> str:
    """The file of a URL, downloaded once; of many runs' files, all of one name, each is kept."""
    name = pathlib.PurePosixPath(urllib.parse.urlsplit(url).path).name
    folder = pathlib.Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except (OSError, ValueError) as error:
            raise fastdino.errors.CheckpointError(
                f"{url} cannot be downloaded ({error}): name a file instead"
            ) from error
    return str(path)
