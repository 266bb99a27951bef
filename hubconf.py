"""torch.hub entry points: DINO backbones with the weights you choose.

    model = torch.hub.load("<owner>/<repository>", "dino_vit_small", weights="checkpoint.pth")
    features = model(images)  # [B, 3, 224, 224] -> [B, 384]

`weights` takes the same values as `fastdino knn --pretrained_weights`: a file, a URL,
"dino_vits16", ...
"""

# Import modules only: torch.hub lists every public class and function here as an entry point.
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
    """Return a backbone [B, 3, H, W] -> [B, D] in eval mode.

    Args:
        weights: a path, a URL, or the name of released weights. Downloads are cached in torch.hub's
            folder. "": random weights.
        arch, patch_size: None: read from the checkpoint, else vit_small and 16.
        checkpoint_key: "teacher" or "student", for files with both.

    Raises: CheckpointError: the weights are unavailable or belong to another network.
    """
    return fastdino.models.weights.load_backbone(
        weights, checkpoint_key=checkpoint_key, arch=arch, patch_size=patch_size
    ).module


def dino_vit_tiny(
    weights: str = "", *, patch_size: int | None = None, checkpoint_key: str = "teacher"
) -> torch.nn.Module:
    """Return a ViT-Ti, D = 192; the arguments are those of `dino`."""
    return dino(weights, arch="vit_tiny", patch_size=patch_size, checkpoint_key=checkpoint_key)


def dino_vit_small(
    weights: str = "", *, patch_size: int | None = None, checkpoint_key: str = "teacher"
) -> torch.nn.Module:
    """Return a ViT-S, D = 384; the arguments are those of `dino`."""
    return dino(weights, arch="vit_small", patch_size=patch_size, checkpoint_key=checkpoint_key)


def dino_vit_base(
    weights: str = "", *, patch_size: int | None = None, checkpoint_key: str = "teacher"
) -> torch.nn.Module:
    """Return a ViT-B, D = 768; the arguments are those of `dino`."""
    return dino(weights, arch="vit_base", patch_size=patch_size, checkpoint_key=checkpoint_key)
