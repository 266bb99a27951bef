"""Softmax attention over packed sequences: interchangeable backends behind one function.

Legend: T tokens of all sequences, concatenated; S sequences, H heads, D channels per head.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdino.models.matmul_attention import matmul_attention

# In the order in which `auto` tries them.
BACKENDS = ("xformers", "varlen", "sdpa", "matmul")

# Tokens of a sequence in the test of matmul, where a long one takes seconds. Plain products treat
# all lengths alike.
_TESTED_TOKENS = 256

QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class AttentionBackend:
    """An attention backend and the dtype it was tested with; other inputs use sdpa."""

    name: str
    dtype: torch.dtype | None = None

    def for_inputs(self, device: torch.device, dtype: torch.dtype) -> str:
        """Return the backend for queries and keys of this dtype on this device."""
        made_for = "cpu" if self.name == "matmul" else "cuda"
        return self.name if device.type == made_for and dtype == self.dtype else "sdpa"


@dataclass(frozen=True)
class AttentionInputs:
    """The queries and keys of a run, with which a backend is tested and measured.

    Attributes:
        head_dim: D.
        sequences: (crops per image, tokens of a crop) of each crop size.
        compiled: attention runs inside torch.compile.
        heads: H.
        images: B, per forward pass.
        blocks: the number of blocks.
        cls_only: the last block computes the attention of first tokens only.
    """

    device: torch.device
    dtype: torch.dtype = torch.float16
    head_dim: int = 64
    sequences: tuple[tuple[int, int], ...] = ((2, 197), (8, 37))
    compiled: bool = False
    heads: int = 3
    images: int = 1
    blocks: int = 12
    cls_only: bool = True

    @property
    def weights(self) -> int:
        """The number of attention weights of one block in a step."""
        return self.images * self.heads * sum(crops * n * n for crops, n in self.sequences)

    @property
    def kept_bytes(self) -> int:
        """The bytes of the weights of all blocks, which matmul keeps for the backward pass."""
        of_first = self.images * self.heads * sum(crops * n for crops, n in self.sequences)
        last = of_first if self.cls_only else self.weights
        return self.dtype.itemsize * ((self.blocks - 1) * self.weights + last)


def attention_problem(name: str, inputs: AttentionInputs) -> str | None:
    """Return the reason why a backend cannot train on such inputs; None if it can.

    The backend runs forward and backward on packed sequences of these lengths (matmul: of at most
    _TESTED_TOKENS), with queries of all tokens and of the first token of each sequence, and is
    compared with sdpa.
    """
    if name == "sdpa":
        return None
    if name == "xformers" and importlib.util.find_spec("xformers") is None:
        return "it is not installed"
    if name == "varlen" and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"PyTorch {torch.__version__} does not have it"
    if name == "matmul" and inputs.device.type == "cuda":
        return "it is made for CPUs"
    if name != "matmul" and inputs.device.type != "cuda":
        return "it has no CPU kernels"
    if name == "matmul":
        lengths = tuple((crops, min(n, _TESTED_TOKENS)) for crops, n in inputs.sequences)
        inputs = dataclasses.replace(inputs, sequences=lengths)
    problem = _failure(name, inputs, attend)
    if problem is None and inputs.compiled:
        # aot_eager traces forward and backward as one graph and generates no code.
        traced = torch.compile(attend, fullgraph=True, dynamic=False, backend="aot_eager")
        with torch._dynamo.config.patch(recompile_limit=64):  # one per network and dtype
            problem = _failure(name, inputs, traced)
        problem = problem and f"torch.compile cannot trace it ({problem})"
    return problem


def _failure(name: str, inputs: AttentionInputs, function: Callable[..., Tensor]) -> str | None:
    """Return the problem that a test of `function` reports, or the error it raises."""
    try:
        return _compare(name, inputs, function)
    except Exception as error:  # any error here would end the run at its first step
        return _one_line(error)


def _compare(name: str, inputs: AttentionInputs, function: Callable[..., Tensor]) -> str | None:
    """Compare `function` (attend, or attend compiled) with sdpa in fp32."""
    groups = tuple((2, n) for _, n in inputs.sequences)
    device = inputs.device
    generator = torch.Generator(device)
    for first_only in (False, True):
        results = []
        for backend, dtype, call in (
            (name, inputs.dtype, function),
            ("sdpa", torch.float32, attend),
        ):
            layout = token_layout(groups, device, backend)
            generator.manual_seed(0)
            shape = (layout.tokens, 2, inputs.head_dim)
            query, key, value, gradient = (
                torch.randn(shape, generator=generator, device=device).to(inputs.dtype).to(dtype)
                for _ in range(4)
            )
            if first_only:
                query, gradient = layout.first(query), layout.first(gradient)
            leaves = [x.requires_grad_() for x in (query, key, value)]
            out = call(query, key, value, layout, first_only=first_only)
            results.append((out, *torch.autograd.grad(out, leaves, gradient)))
        for got, want in zip(*results, strict=True):
            error = (got - want).abs().max().item()
            if not error < 0.1:  # bf16 is off by up to 0.02; the comparison is False for NaN
                return f"its result is off by {error:.2g}"
    return None


def _one_line(error: Exception) -> str:
    """Return xformers' reasons against each of its kernels, else the first line of the error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [reason for line, reason in pairwise(lines) if line.endswith("because:")]
    return "; ".join(dict.fromkeys(reasons)) or (lines[0] if lines else repr(error))


@functools.cache
def _xformers_ops() -> Any:
    """Import xformers.ops, after loading the CUDA 12 runtime that its extension links against.

    A CUDA 13 build of torch does not bring that library, and every CUDA op of xformers is then
    refused at call time. The wheel nvidia-cuda-runtime-cu12 contains it.
    """
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        library = Path(root) / "cuda_runtime" / "lib" / "libcudart.so.12"
        if library.exists():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import xformers.ops

    return xformers.ops


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Positions of the sequences in packed [T, ...] tensors; made by token_layout.

    Attributes:
        groups: (sequences, tokens per sequence), in the order of the tokens.
        backend: one of BACKENDS.
        first_tokens: [S] int64, the index of the first token (CLS) of each sequence.
        bounds: for varlen, the cumulative lengths [S + 1] int32 of the keys, and those of the
            queries if only first tokens are queries.
        masks: for xformers, the BlockDiagonalMask for all queries, and for first tokens only.
        operator: the function of xformers or varlen, which a compiled graph cannot import.
    """

    groups: tuple[tuple[int, int], ...]
    backend: str
    first_tokens: Tensor
    bounds: tuple[Tensor, Tensor] | None = None
    masks: tuple[Any, Any] | None = None
    operator: Any = None

    @property
    def tokens(self) -> int:
        """The number of tokens, T."""
        return sum(sequences * tokens for sequences, tokens in self.groups)

    def first(self, x: Tensor) -> Tensor:
        """Select the first token of each sequence: [T, ...] -> [S, ...]."""
        return x.index_select(0, self.first_tokens)

    def split(self, x: Tensor) -> list[Tensor]:
        """Return views of x [T, ...] by group: [sequences, tokens, ...]."""
        parts = x.split([sequences * tokens for sequences, tokens in self.groups])
        return [part.unflatten(0, group) for part, group in zip(parts, self.groups, strict=True)]

    def spread(self, x: Tensor) -> Tensor:
        """Repeat a value per sequence for each of its tokens: [..., S] -> [..., T]."""
        parts = x.split([sequences for sequences, _ in self.groups], dim=-1)
        spread = [
            part.unsqueeze(-1).expand(*part.shape, tokens).flatten(-2)
            for part, (_, tokens) in zip(parts, self.groups, strict=True)
        ]
        return torch.cat(spread, dim=-1)


@functools.cache
def token_layout(
    groups: tuple[tuple[int, int], ...], device: torch.device, backend: str
) -> TokenLayout:
    """Return the cached layout of `groups`, so that a step copies nothing to the device.

    Raises: ValueError: more tokens than the kernels can index.
    """
    lengths = [tokens for sequences, tokens in groups for _ in range(sequences)]
    bounds = [0, *accumulate(lengths)]
    if bounds[-1] >= 2**31:
        raise ValueError(f"{bounds[-1]} tokens in one pass, expected fewer than 2**31")
    with torch.inference_mode(False):  # a cached tensor may be saved for a backward pass later
        layout = TokenLayout(
            groups, backend, torch.tensor(bounds[:-1], dtype=torch.int64, device=device)
        )
        if backend == "varlen":
            ends = torch.tensor(bounds, dtype=torch.int32, device=device)
            ones = torch.arange(len(bounds), dtype=torch.int32, device=device)
            operator = importlib.import_module("torch.nn.attention.varlen").varlen_attn
            return dataclasses.replace(layout, bounds=(ends, ones), operator=operator)
        if backend == "xformers":
            ops = _xformers_ops()
            make_mask = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens
            masks = (
                make_mask(lengths, device=device),
                make_mask([1] * len(lengths), lengths, device=device),
            )
            operator = ops.memory_efficient_attention
            return dataclasses.replace(layout, masks=masks, operator=operator)
        return layout


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, *, first_only: bool = False
) -> Tensor:
    """Compute softmax(Q K^T / sqrt(D)) V within each sequence.

    Args:
        query: [T, H, D], or with first_only [S, H, D], the first token of each sequence.
        key, value: [T, H, D], with the dtype and device of query.
        layout: the sequences, and the backend that computes.

    Returns: a tensor like query.
    """
    return _ATTEND[layout.backend]((query, key, value), layout, first_only)


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Call sdpa on [S, N, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _by_group(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
    qkv: QKV,
    layout: TokenLayout,
    first_only: bool,
) -> Tensor:
    """Call `function` once per group of equally long sequences, on views."""
    query, key, value = qkv
    if first_only:
        queries = [q.unsqueeze(1) for q in query.split([s for s, _ in layout.groups])]
    else:
        queries = layout.split(query)
    groups = zip(queries, layout.split(key), layout.split(value), strict=True)
    return torch.cat([function(*group).flatten(0, 1) for group in groups])


def _xformers(qkv: QKV, layout: TokenLayout, first_only: bool) -> Tensor:
    assert layout.masks is not None
    query, key, value = (x.unsqueeze(0) for x in qkv)
    mask = layout.masks[first_only]
    return layout.operator(query, key, value, attn_bias=mask).squeeze(0)


def _varlen(qkv: QKV, layout: TokenLayout, first_only: bool) -> Tensor:
    assert layout.bounds is not None
    longest_key = max(tokens for _, tokens in layout.groups)
    longest_query = 1 if first_only else longest_key
    key_bounds, query_bounds = layout.bounds[0], layout.bounds[first_only]
    return layout.operator(*qkv, query_bounds, key_bounds, longest_query, longest_key)


_ATTEND: dict[str, Callable[[QKV, TokenLayout, bool], Tensor]] = {
    "sdpa": functools.partial(_by_group, _sdpa),
    "matmul": functools.partial(_by_group, matmul_attention),
    "xformers": _xformers,
    "varlen": _varlen,
}
