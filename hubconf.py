"""Entry points for torch.hub: DINO backbones, from the weights that you name.

    model = torch.hub.load("<owner>/<repository>", "dino_vit_small", weights="checkpoint.pth")
    features = model(images)  # [B, 3, 224, 224] -> [B, 384]

`weights` is all that `fastdino knn --pretrained_weights` takes: a file, a URL, "dino_vits16", ...
"""

# Modules alone are imported: torch.hub lists every class and function it finds as an entry point.
import torch

import fastdino.models.weights

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
        weights: a path; a URL, or the name of released weights, whose file is kept in torch.hub's
            folder. "": fresh weights.
        arch, patch_size: None: what the checkpoint says, else vit_small, 16.
        checkpoint_key: "teacher" or "student", where the file has both.

    Raises: CheckpointError: weights that cannot be had, or are of another network.
    """
    return fastdino.models.weights.load_backbone(
        weights, checkpoint_key=checkpoint_key, arch=arch, patch_size=patch_size
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
