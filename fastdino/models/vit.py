"""The paper's Vision Transformer, with its parameter names, initialisation and position embedding.

Source: Dosovitskiy et al. 2020; Caron et al. 2021, section 3, and the authors' code.
Legend: B images, N tokens (1 CLS + patches), H heads, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastdino.models.attention import AttentionBackend, TokenLayout, attend, token_layout
from fastdino.models.drop_path import draw_branch_scales
from fastdino.models.linear_layer import Linear, OneDNNLayer, linear

T = TypeVar("T")


class PatchEmbed(OneDNNLayer):
    """Patch embedding [B, 3, height, width] -> [B, patches, D]; incomplete patches are cropped.

    The convolution with stride = kernel size is computed as a matrix product.
    """

    def __init__(self, patch_size: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        side = self.proj.kernel_size[0]
        height, width = images.shape[-2:]
        rows, columns = height // side, width // side
        if not rows or not columns:
            raise ValueError(f"images of {height} x {width} px are smaller than a {side} px patch")
        patches = images[..., : rows * side, : columns * side]
        patches = patches.unflatten(2, (rows, side)).unflatten(4, (columns, side))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        weight = self.proj.weight.flatten(1)
        return linear(patches, weight, self.proj.bias, onednn=self.onednn)


class Attention(nn.Module):
    """Multi-head self-attention within each sequence of a token layout."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def project(
        self, x: Tensor, layout: TokenLayout, *, first_only: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project [T, D] to queries, keys and values [T, H, D/H].

        With first_only, return the queries of first tokens only, [S, H, D/H].
        """
        if not first_only:
            query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
            return query, key, value
        dim = x.shape[-1]
        weight = self.qkv.weight.split((dim, 2 * dim))
        bias = self.qkv.bias.split((dim, 2 * dim))
        onednn = self.qkv.onednn
        query = linear(layout.first(x), weight[0], bias[0], onednn=onednn)
        pair = linear(x, weight[1], bias[1], onednn=onednn)
        key, value = pair.unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        return query.unflatten(-1, (self.num_heads, -1)), key, value

    def mix(
        self, qkv: tuple[Tensor, Tensor, Tensor], layout: TokenLayout, *, first_only: bool = False
    ) -> Tensor:
        """Attend with the result of `project`: -> [T, D]; with first_only [S, D]."""
        return self.proj(attend(*qkv, layout, first_only=first_only).flatten(1))

    def forward(self, x: Tensor, layout: TokenLayout, *, first_only: bool = False) -> Tensor:
        """Map [T, D] -> [T, D]; with first_only [S, D], for first tokens only."""
        return self.mix(
            self.project(x, layout, first_only=first_only), layout, first_only=first_only
        )

    def weights(self, x: Tensor) -> Tensor:
        """Return the attention weights: [B, N, D] -> [B, H, N, N]."""
        query, key, _ = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
        return scores.softmax(dim=-1)

    def first_weights(self, x: Tensor) -> Tensor:
        """Return only the first token's row of `weights`: [B, N, D] -> [B, H, N]."""
        weight, bias = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        query, key = (
            linear(tokens, weight[i], bias[i], onednn=self.qkv.onednn).unflatten(
                -1, (self.num_heads, -1)
            )
            for i, tokens in enumerate((x[:, 0], x))
        )
        scores = torch.einsum("bhd,bkhd->bhk", query, key) / math.sqrt(query.shape[-1])
        return scores.softmax(dim=-1)


class Mlp(nn.Module):
    """Two linear layers with a GELU (erf) in between."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def contract(self, hidden: Tensor) -> Tensor:
        """Apply GELU and fc2 to the output of fc1: [T, hidden_dim] -> [T, D]."""
        return self.fc2(F.gelu(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(self.fc1(x))


class Block(nn.Module):
    """A pre-norm transformer block with stochastic depth.

    Attributes:
        recompute: recompute norms and GELU in the backward pass instead of keeping their results:
            10 D instead of 16 D values per token. No matrix product is computed twice.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.recompute = False
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        layout: TokenLayout,
        scales: Tensor | None = None,
        *,
        first_only: bool = False,
    ) -> Tensor:
        """Map [T, D] -> [T, D]; with first_only [S, D], for first tokens only.

        Args:
            x: the tokens.
            layout: the sequences.
            scales: [2, rows, 1], factors of the attention branch and the MLP branch for each row of
                the result (models/drop_path.py); None: 1.
            first_only: all other tokens only provide keys and values.
        """
        # In compiled blocks, models/compile.py makes the compiler recompute.
        recompute = self.recompute and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if recompute and not first_only:
            qkv = _keep_input(lambda x: self.attn.project(self.norm1(x), layout), x)
            branch = self.attn.mix(qkv, layout)
        else:
            branch = self.attn(self.norm1(x), layout, first_only=first_only)
        if first_only:
            x = layout.first(x)
        x = x + branch if scales is None else torch.addcmul(x, branch, scales[0])
        if recompute:
            hidden = _keep_input(lambda x: self.mlp.fc1(self.norm2(x)), x)
            branch = _keep_input(self.mlp.contract, hidden)
        else:
            branch = self.mlp(self.norm2(x))
        return x + branch if scales is None else torch.addcmul(x, branch, scales[1])


def _keep_input(function: Callable[[Tensor], T], x: Tensor) -> T:
    """Compute function(x) and keep only x; the backward pass recomputes the rest.

    `function` ends in a matrix product, which is not recomputed: PyTorch's recomputation stops at
    the last saved tensor, the input of the product.
    """
    result: T = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return result


class VisionTransformer(nn.Module):
    """ViT for images of any size; returns the normalised CLS token.

    Registers are DINOv2's (Darcet et al. 2023): tokens between CLS and patches that take part in
    attention. The methods return CLS and patches only.

    Args:
        patch_size: side of a patch in pixels.
        embed_dim, depth, num_heads: D, number of blocks, H.
        mlp_ratio: hidden width of the MLP divided by D.
        drop_path_rate: stochastic depth rate of the last block; linearly less in earlier blocks.
        img_size: side in pixels of the images for which the position embedding is made.
        registers: number of registers.

    Attributes:
        attention: the attention backend (models/attention.py).
        cls_only: forward computes the last block for CLS only. The result is the same, up to
            rounding. The other tokens need 2 D^2 of the last block's 12 D^2 + 2 N D
            multiplications per token, which saves 7.0 % of a ViT-S/16 at 224 px.
        draw_scales: draws stochastic depth (models/drop_path.py).
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
        registers: int = 0,
    ):
        super().__init__()
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.attention = AttentionBackend("sdpa")
        self.cls_only = True
        self.draw_scales: Callable[..., Tensor] = draw_branch_scales
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        patches = (img_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, embed_dim))
        self.registers = registers
        self.register_tokens: nn.Parameter | None = None
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, embed_dim))
        self.drop_path_rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear)

    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Map [B, 3, height, width] -> [B, D], or a list of such tensors -> [sum of B, D].

        The tensors of a list differ in image size and pass through the blocks as one packed
        sequence.
        """
        groups = [images] if isinstance(images, Tensor) else images
        x, layout = self._pack([self.embed(group) for group in groups])
        scales = self._draw_scales(x, layout, cls_only=self.cls_only)
        *blocks, last = self.blocks
        for block, block_scales in zip(blocks, scales, strict=False):
            x = block(x, layout, block_scales)
        x = last(x, layout, scales[-1], first_only=self.cls_only)
        return self.norm(x if self.cls_only else layout.first(x))

    def embed(self, images: Tensor) -> Tensor:
        """Embed images [B, 3, height, width] -> [B, N, D]: CLS and patches with positions, and
        registers without.
        """
        patches = self.patch_embed(images)
        cls = self.cls_token.expand(patches.shape[0], -1, -1)
        height, width = images.shape[-2:]
        return self.add_registers(
            torch.cat((cls, patches), dim=1) + self.positions((height, width))
        )

    def add_registers(self, x: Tensor) -> Tensor:
        """Insert the registers after CLS: [B, 1 + patches, D] -> [B, N, D]."""
        if self.register_tokens is None:
            return x
        registers = self.register_tokens.expand(x.shape[0], -1, -1)
        return torch.cat((x[:, :1], registers, x[:, 1:]), dim=1)

    def _drop_registers(self, x: Tensor, dim: int) -> Tensor:
        """Remove the registers from a dimension of N tokens."""
        if not self.registers:
            return x
        cls, _, patches = x.split((1, self.registers, x.shape[dim] - 1 - self.registers), dim)
        return torch.cat((cls, patches), dim)

    def _pack(self, groups: Sequence[Tensor]) -> tuple[Tensor, TokenLayout]:
        """Concatenate tensors [B, N, D] to [T, D]; return it and its layout."""
        x = torch.cat([group.flatten(0, 1) for group in groups])
        backend = self.attention.for_inputs(x.device, output_dtype(x))
        sizes = tuple((group.shape[0], group.shape[1]) for group in groups)
        return x, token_layout(sizes, x.device, backend)

    def _draw_scales(
        self, x: Tensor, layout: TokenLayout, *, cls_only: bool = False
    ) -> list[Tensor | None]:
        """Draw stochastic depth: the `scales` of Block.forward for each block."""
        rates = [rate for rate in self.drop_path_rates if rate and self.training]
        if not rates:
            return [None] * len(self.blocks)
        per_image = self.draw_scales(
            rates, [images for images, _ in layout.groups], dtype=output_dtype(x), device=x.device
        ).to(x.dtype)
        per_token = iter(layout.spread(per_image).unsqueeze(-1))
        scales = [next(per_token) if rate else None for rate in self.drop_path_rates]
        if cls_only and scales[-1] is not None:
            scales[-1] = per_image[-1].unsqueeze(-1)
        return scales

    def positions(self, size: tuple[int, int]) -> Tensor:
        """Return the position embedding [1, 1 + rows * columns, D] for (height, width) pixels.

        It is resized bicubically to the patch grid, unless the images are square and have the
        embedding's own grid. As in the paper's code, 224 x 230 px (14 x 14 patches of 16) are
        resized too, and 0.1 is added to each side so that rounding does not lose a patch. With
        registers it is resized to the exact grid with antialiasing, as in DINOv2's code.
        """
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        grid = (size[0] // self.patch_size, size[1] // self.patch_size)
        if grid == (side, side) and size[0] == size[1]:
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        image = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        if self.registers:
            resized = F.interpolate(image, size=grid, mode="bicubic", antialias=True)
        else:
            scales = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
            resized = F.interpolate(image, scale_factor=scales, mode="bicubic")
        assert resized.shape[-2:] == grid
        return torch.cat((cls, resized.flatten(2).transpose(1, 2)), dim=1)

    def get_last_selfattention(self, images: Tensor) -> Tensor:
        """Return the attention weights of the last block: [B, 3, height, width] -> [B, H, N, N]."""
        attention, tokens = self._last_attention_inputs(images)
        weights = attention.weights(tokens)
        return self._drop_registers(self._drop_registers(weights, 2), 3)

    def get_cls_attention(self, images: Tensor) -> Tensor:
        """Return CLS's row of get_last_selfattention: [B, 3, height, width] -> [B, H, N].

        It needs H N values per image instead of H N^2: for ViT-S/8 at 480 px, N = 3601, 86 kB
        instead of 311 MB in fp32.
        """
        attention, tokens = self._last_attention_inputs(images)
        return self._drop_registers(attention.first_weights(tokens), 2)

    def _last_attention_inputs(self, images: Tensor) -> tuple[Attention, Tensor]:
        """Return the attention of the last block and its input tokens [B, N, D]."""
        x, layout = self._pack([self.embed(images)])
        *blocks, last = self.blocks
        for block, scales in zip(blocks, self._draw_scales(x, layout), strict=False):
            x = block(x, layout, scales)
        assert isinstance(last, Block)
        return last.attn, layout.split(last.norm1(x))[0]

    def get_intermediate_layers(self, images: Tensor, n: int = 1) -> Sequence[Tensor]:
        """Return the normalised tokens [B, N, D] of the last n blocks, in order."""
        x, layout = self._pack([self.embed(images)])
        scales = self._draw_scales(x, layout)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x, layout, scales[i])
            if len(self.blocks) - i <= n:
                outputs.append(self._drop_registers(layout.split(self.norm(x))[0], 1))
        return outputs


def output_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a linear layer's output for `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer as in the paper: weight trunc-normal with std .02, bias 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# Shapes of the vit_* architectures.
VIT_ARCHS = {
    "vit_nano": {"embed_dim": 96, "depth": 6, "num_heads": 3},
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
