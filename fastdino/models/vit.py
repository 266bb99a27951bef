"""The Vision Transformer of the paper: its names, its initialisation, its position embedding.

Source: Dosovitskiy et al. 2020; Caron et al. 2021, section 3 and the authors' code.
Legend: B images, N tokens (1 CLS + patches), H heads, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdino.models.attention import attend


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drops a branch for a sample, rescales the kept."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1 - self.rate
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        mask = (keep + torch.rand(shape, dtype=x.dtype, device=x.device)).floor_()
        return x.div(keep) * mask


class PatchEmbed(nn.Module):
    """[B, 3, height, width] -> [B, patches, D] by a convolution of stride `patch_size`."""

    def __init__(self, patch_size: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention; `backend` names the implementation (models/attention.py)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.backend = "sdpa"
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, d = x.shape
        query, key, value = (
            self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads).unbind(2)
        )
        return query, key, value

    def forward(self, x: Tensor) -> Tensor:
        out = attend(*self._project(x), backend=self.backend)
        return self.proj(out.reshape(x.shape))

    def weights(self, x: Tensor) -> Tensor:
        """The attention weights themselves: [B, N, D] -> [B, H, N, N]."""
        query, key, _ = self._project(x)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
        return scores.softmax(dim=-1)


class Mlp(nn.Module):
    """Linear, GELU (erf), linear."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block with stochastic depth."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path_rate: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """ViT that takes images of any size and returns the normalised CLS token.

    Args:
        patch_size: side of a patch in pixels.
        embed_dim, depth, num_heads: D, the number of blocks, H.
        mlp_ratio: hidden width of the MLP over D.
        drop_path_rate: stochastic depth of the last block; earlier blocks linearly less.
        img_size: image side in pixels whose patch grid the position embedding holds one entry for.
    """

    def __init__(
        self,
        *,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        img_size: int = 224,
    ):
        super().__init__()
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        patches = (img_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, embed_dim))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, r) for r in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, height, width] -> [B, D]."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def embed(self, images: Tensor) -> Tensor:
        """[B, 3, height, width] -> [B, N, D]: patches, CLS, positions."""
        patches = self.patch_embed(images)
        cls = self.cls_token.expand(patches.shape[0], -1, -1)
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        return torch.cat((cls, patches), dim=1) + self.positions(grid)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position embedding, [1, 1 + rows * columns, D], resized bicubically to a patch grid.

        The 0.1 added to each side keeps the scale factor from rounding a patch away.
        """
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if grid == (side, side):
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        resized = F.interpolate(
            patches.reshape(1, side, side, -1).permute(0, 3, 1, 2),
            scale_factor=((grid[0] + 0.1) / side, (grid[1] + 0.1) / side),
            mode="bicubic",
        )
        assert resized.shape[-2:] == grid
        return torch.cat((cls, resized.flatten(2).transpose(1, 2)), dim=1)

    def get_last_selfattention(self, images: Tensor) -> Tensor:
        """[B, 3, height, width] -> the last block's attention weights [B, H, N, N]."""
        x = self.embed(images)
        for block in list(self.blocks)[:-1]:
            x = block(x)
        last = self.blocks[-1]
        assert isinstance(last, Block)
        return last.attn.weights(last.norm1(x))

    def get_intermediate_layers(self, images: Tensor, n: int = 1) -> Sequence[Tensor]:
        """[B, 3, height, width] -> the last n blocks' normalised tokens [B, N, D], in order."""
        x = self.embed(images)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if len(self.blocks) - i <= n:
                outputs.append(self.norm(x))
        return outputs


def init_linear(module: nn.Module) -> None:
    """The paper's initialisation of linear layers: weight trunc-normal .02, bias 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# Width, depth and heads of each vit_* architecture.
VIT_ARCHS = {
    "vit_nano": {"embed_dim": 96, "depth": 6, "num_heads": 3},
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}
