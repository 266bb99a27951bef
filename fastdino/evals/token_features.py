"""The tokens of a network as features: CLS, the mean patch, or each patch.

Shapes: B images, h x w patches, D channels, n blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdino.errors import ConfigError
from fastdino.models.vit import VIT_ARCHS, VisionTransformer
from fastdino.models.weights import Backbone

TOKENS = ("cls", "mean", "patch")


def has_patches(module: nn.Module) -> bool:
    """Return True for networks with one token per patch: our ViTs, and those of timm."""
    if isinstance(module, VisionTransformer):
        return True
    intermediates = getattr(module, "forward_intermediates", None)
    return intermediates is not None and (
        "return_prefix_tokens" in inspect.signature(intermediates).parameters
    )


def check_patches(backbone: Backbone, flag: str) -> None:
    """Raise ConfigError, which begins with `flag`, unless the network has patch tokens."""
    if not has_patches(backbone.module):
        raise ConfigError(
            f"{flag}: --arch {backbone.arch} has no patch tokens; expected one of "
            f"{', '.join(VIT_ARCHS)}, or a ViT of timm"
        )


def patch_size_of(backbone: Backbone) -> int:
    """Return the side of a patch in pixels of a network with patch tokens."""
    if isinstance(backbone.module, VisionTransformer):
        return backbone.module.patch_size
    return int(backbone.module.patch_embed.patch_size[0])  # type: ignore[union-attr,index]


@torch.no_grad()
def patch_tokens(module: nn.Module, images: Tensor) -> Tensor:
    """Return the normalised patch tokens of the last block.

    Args:
        module: a network with patch tokens, in eval mode.
        images: [B, 3, h * P, w * P], normalised.

    Returns: [B, h, w, D].
    """
    if isinstance(module, VisionTransformer):
        return _patches_of(module, module.get_intermediate_layers(images, 1)[0], images)
    (maps,) = module.forward_intermediates(  # type: ignore[operator]
        images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
    )
    return maps.permute(0, 2, 3, 1)


def _patches_of(module: VisionTransformer, tokens: Tensor, images: Tensor) -> Tensor:
    """Return the patches of tokens [B, 1 + h * w, D] on their grid, [B, h, w, D]."""
    height, width = (side // module.patch_size for side in images.shape[-2:])
    return tokens[:, 1:].unflatten(1, (height, width))


class TokenFeatures:
    """The features [B, 3, H, W] -> {token: features} of a frozen network, without gradient.

        cls     [B, n D]        the CLS token; the output [B, D] of a network that is no vit_*
        mean    [B, n D]        the mean of the patch tokens
        patch   [B, h, w, n D]  the patch tokens

    The tokens are normalised by the network's last layer norm. Those of several blocks are
    concatenated, the last block's at the end. Networks that are no vit_* have one block here.

    Args:
        tokens: a selection of TOKENS.
        blocks: n.

    Raises: ConfigError: the network has no patch tokens, or fewer blocks.
    """

    def __init__(self, backbone: Backbone, tokens: Sequence[str], blocks: int):
        self.module, self.tokens, self.blocks = backbone.module, tuple(tokens), blocks
        if set(tokens) != {"cls"}:
            check_patches(backbone, f"--tokens {' '.join(tokens)}")
        is_vit = isinstance(self.module, VisionTransformer)
        available = len(self.module.blocks) if is_vit else 1  # type: ignore[arg-type]
        if blocks > available:
            where = "the network has" if is_vit else f"--arch {backbone.arch} gives features of"
            raise ConfigError(f"--n_last_blocks {blocks}: {where} {available} block(s)")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        module = self.module
        if isinstance(module, VisionTransformer):
            layers = module.get_intermediate_layers(images, self.blocks)
            cls = torch.cat([tokens[:, 0] for tokens in layers], dim=1)
            patches = torch.cat([_patches_of(module, t, images) for t in layers], dim=-1)
        else:
            cls = module(images) if "cls" in self.tokens else images
            patches = images if self.tokens == ("cls",) else patch_tokens(module, images)
        features = {"cls": cls, "patch": patches}
        if "mean" in self.tokens:
            features["mean"] = patches.mean((1, 2))
        return {token: features[token] for token in self.tokens}
