"""The one switch between implementations of softmax attention, and the layout that they share.

Legend: T tokens of all sequences, one after another; S sequences, H heads, D channels a head.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdino.errors import ConfigError

# In the order in which `auto` tries them.
BACKENDS = ("xformers", "varlen", "sdpa")


@dataclass(frozen=True)
class AttentionChoice:
    """The implementation taken, and why: `reason` is one phrase for the run's first line.

    It holds for CUDA tensors of `dtype`, with which it was tried; others take sdpa.
    """

    name: str
    reason: str
    dtype: torch.dtype | None = None

    def backend_for(self, device: torch.device, dtype: torch.dtype) -> str:
        """The backend for queries and keys of this dtype on this device."""
        return self.name if device.type == "cuda" and dtype == self.dtype else "sdpa"


def choose_attention(
    wanted: str,
    device: torch.device,
    dtype: torch.dtype = torch.float16,
    *,
    head_dim: int = 64,
    tokens: Sequence[int] = (197, 37),
    compiled: bool = False,
) -> AttentionChoice:
    """Resolves --attention {auto, xformers, varlen, sdpa}.

    Args:
        wanted: the flag's value.
        device, dtype, head_dim: of the queries and keys there will be.
        tokens: lengths of the sequences there will be.
        compiled: whether it will be a part of compiled blocks.

    Raises: ConfigError: what was asked for by name cannot run there.
    """
    problems: dict[str, str] = {}
    for name in BACKENDS if wanted == "auto" else (wanted,):
        problem = attention_problem(
            name, device, dtype, head_dim=head_dim, tokens=tokens, compiled=compiled
        )
        if problem is None:
            why = "; ".join(f"no {other}: {problems[other]}" for other in problems)
            asked = "asked for" if wanted != "auto" else f"the first of {', '.join(BACKENDS)}"
            return AttentionChoice(name, why or asked, dtype)
        problems[name] = problem
    nearest = choose_attention(
        "auto", device, dtype, head_dim=head_dim, tokens=tokens, compiled=compiled
    ).name
    raise ConfigError(
        f"--attention {wanted} cannot run: {problems[wanted]}; use --attention {nearest}"
    )


def attention_problem(
    name: str,
    device: torch.device,
    dtype: torch.dtype = torch.float16,
    *,
    head_dim: int = 64,
    tokens: Sequence[int] = (197, 37),
    compiled: bool = False,
) -> str | None:
    """Why a backend cannot train there, or None where it can.

    It is tried as it will be used: sequences of several lengths packed, forward and backward, with
    queries of all tokens and of the first of each sequence, and `compiled` too; the results must be
    those of sdpa.
    """
    if name == "sdpa":
        return None
    if name == "xformers" and importlib.util.find_spec("xformers") is None:
        return "it is not installed"
    if name == "varlen" and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"PyTorch {torch.__version__} does not have it"
    if device.type != "cuda":
        return "it has no CPU kernels"
    trial = functools.partial(_trial, name, device, dtype, head_dim, tokens)
    problem = _told(trial, attend)
    if problem is None and compiled:
        # Traced whole, as blocks are; what is made of the trace has no say in it.
        traced = torch.compile(attend, fullgraph=True, dynamic=False, backend="aot_eager")
        with torch._dynamo.config.patch(recompile_limit=64):  # one trial a network and dtype
            problem = _told(trial, traced)
        problem = problem and f"torch.compile cannot take it ({problem})"
    return problem


def _told(
    trial: Callable[[Callable[..., Tensor]], str | None], call: Callable[..., Tensor]
) -> str | None:
    """What a trial of `call` finds wrong; where it ends in an error, that."""
    try:
        return trial(call)
    except Exception as error:  # whatever it is, it would end the run at its first step
        return _one_line(error)


def _trial(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    tokens: Sequence[int],
    call: Callable[..., Tensor],
) -> str | None:
    """`call` is attend, or something made of it."""
    groups = tuple((2, n) for n in tokens)
    generator = torch.Generator(device).manual_seed(0)
    for first_only in (False, True):
        results = []
        for backend, precision, function in (
            (name, dtype, call),
            ("sdpa", torch.float32, attend),
        ):
            layout = token_layout(groups, device, backend)
            generator.manual_seed(0)
            query, key, value, gradient = (
                torch.randn(layout.tokens, 2, head_dim, generator=generator, device=device)
                .to(dtype)
                .to(precision)
                for _ in range(4)
            )
            if first_only:
                query, gradient = layout.first(query), layout.first(gradient)
            inputs = [x.requires_grad_() for x in (query, key, value)]
            out = function(query, key, value, layout, first_only=first_only)
            results.append((out, *torch.autograd.grad(out, inputs, gradient)))
        for got, want in zip(*results, strict=True):
            error = (got - want).abs().max().item()
            if not error < 0.1:  # bf16 is off by up to 0.02; NaN is not below
                return f"its result is off by {error:.2g}"
    return None


def _one_line(error: Exception) -> str:
    """What an error says: what xformers has against each of its kernels, or the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [reason for line, reason in pairwise(lines) if line.endswith("because:")]
    return "; ".join(dict.fromkeys(reasons)) or (lines[0] if lines else repr(error))


@functools.cache
def _xformers_ops() -> Any:
    """xformers.ops, with the CUDA 12 runtime that its extension links against loaded first.

    Beside a CUDA 13 torch that library is missing, and every CUDA op is then refused at call time;
    the wheel nvidia-cuda-runtime-cu12 carries it.
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
    """Where the sequences lie in [T, ...] tensors, and what computes attention over them.

    Made by token_layout.

    Attributes:
        groups: (sequences, tokens of each) in the order of the tokens.
        backend: one of BACKENDS.
        first_tokens: [S] int64, the index of each sequence's first token (CLS).
        bounds: for varlen, [S + 1] int32: where each sequence begins, and T. Beside it those of
            the queries where they are the first tokens alone.
        masks: for xformers, its BlockDiagonalMask; the second for queries of the first tokens.
        operator: for both, their function: a compiled graph could not import it.
    """

    groups: tuple[tuple[int, int], ...]
    backend: str
    first_tokens: Tensor
    bounds: tuple[Tensor, Tensor] | None = None
    masks: tuple[Any, Any] | None = None
    operator: Any = None

    @property
    def tokens(self) -> int:
        """T."""
        return sum(sequences * tokens for sequences, tokens in self.groups)

    def first(self, x: Tensor) -> Tensor:
        """The rows of each sequence's first token: [T, ...] -> [S, ...]."""
        return x.index_select(0, self.first_tokens)

    def split(self, x: Tensor) -> list[Tensor]:
        """Views of x, [T, ...], by group: [sequences, tokens, ...]."""
        parts = x.split([sequences * tokens for sequences, tokens in self.groups])
        return [part.unflatten(0, group) for part, group in zip(parts, self.groups, strict=True)]

    def spread(self, x: Tensor) -> Tensor:
        """Repeats what holds for a sequence for each of its tokens: [..., S] -> [..., T]."""
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
    """The layout of `groups`, kept: a step asks for its own again, with no copy to the device.

    Raises: ValueError: more tokens than the kernels can count.
    """
    lengths = [tokens for sequences, tokens in groups for _ in range(sequences)]
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    if bounds[-1] >= 2**31:
        raise ValueError(f"{bounds[-1]} tokens in one pass, expected fewer than 2**31")
    with torch.inference_mode(False):  # what is kept must serve the backward pass too
        first_tokens = torch.tensor(bounds[:-1], dtype=torch.int64, device=device)
        if backend == "varlen":
            ends = torch.tensor(bounds, dtype=torch.int32, device=device)
            ones = torch.arange(len(bounds), dtype=torch.int32, device=device)
            operator = importlib.import_module("torch.nn.attention.varlen").varlen_attn
            return TokenLayout(
                groups, backend, first_tokens, bounds=(ends, ones), operator=operator
            )
        if backend == "xformers":
            ops = _xformers_ops()
            make = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens
            whole = make(lengths, device=device)
            first = make([1] * len(lengths), lengths, device=device)
            operator = ops.memory_efficient_attention
            return TokenLayout(
                groups, backend, first_tokens, masks=(whole, first), operator=operator
            )
        return TokenLayout(groups, backend, first_tokens)


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, *, first_only: bool = False
) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V within each sequence.

    Args:
        query: [T, H, D], or [S, H, D] with first_only: those of each sequence's first token.
        key, value: [T, H, D], of the query's dtype and device.
        layout: which tokens are a sequence; its backend computes.

    Returns: like query.
    """
    return _ATTEND[layout.backend](query, key, value, layout, first_only)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, first_only: bool
) -> Tensor:
    """One call for each group of equally long sequences, on views."""
    if first_only:
        queries = [q.unsqueeze(1) for q in query.split([s for s, _ in layout.groups])]
    else:
        queries = layout.split(query)
    outputs = []
    for qkv in zip(queries, layout.split(key), layout.split(value), strict=True):
        q, k, v = (x.transpose(1, 2) for x in qkv)
        outputs.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _xformers(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, first_only: bool
) -> Tensor:
    assert layout.masks is not None
    query, key, value = (x.unsqueeze(0) for x in (query, key, value))
    mask = layout.masks[first_only]
    return layout.operator(query, key, value, attn_bias=mask).squeeze(0)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, first_only: bool
) -> Tensor:
    assert layout.bounds is not None
    longest = max(tokens for _, tokens in layout.groups)
    of_keys, of_queries = layout.bounds[0], layout.bounds[first_only]
    longest_query = 1 if first_only else longest
    return layout.operator(query, key, value, of_queries, of_keys, longest_query, longest)


_ATTEND: dict[str, Callable[[Tensor, Tensor, Tensor, TokenLayout, bool], Tensor]] = {
    "sdpa": _sdpa,
    "xformers": _xformers,
    "varlen": _varlen,
}
