"""The autograd engine in Python: PyTorch's own asks the CUDA driver for streams.

Nodes run in the order of PyTorch's engine, latest first, so that sums of gradients round alike.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ROOT_LAST = 2**64


def run_backward(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    retain_graph: bool,
    create_graph: bool,
    inputs: Sequence[Any] = (),
    allow_unreachable: bool = True,
    accumulate_grad: bool = True,
) -> tuple[Tensor | None, ...]:
    """Replace torch.autograd's _engine_run_backward, with the same arguments and result."""
    if create_graph:
        raise NotImplementedError("the simulated backward pass has no create_graph")
    wanted = {_edge(tensor): i for i, tensor in enumerate(inputs)}
    results: list[Tensor | None] = [None] * len(inputs)
    roots = [_edge(output) for output in outputs]
    dependencies = _count_edges([node for node, _ in roots])
    pending: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    ready: list[tuple[int, int, Any]] = []
    order = itertools.count()

    def push(node: Any) -> None:
        accumulates = type(node).__name__ == "AccumulateGrad"
        number = _ROOT_LAST if accumulates else node._sequence_nr()
        heapq.heappush(ready, (-number, next(order), node))

    def add(edge: tuple[Any, int], gradient: Tensor | None) -> None:
        node, slot = edge
        if gradient is not None:
            earlier = pending[node].get(slot)
            pending[node][slot] = gradient if earlier is None else earlier + gradient

    with torch.no_grad():
        for edge, gradient in zip(roots, gradients, strict=True):
            add(edge, gradient)
        for node in {node for node, _ in roots}:
            if not dependencies[node]:
                push(node)
        while ready:
            _, _, node = heapq.heappop(ready)
            slots = pending.pop(node, {})
            for slot, gradient in slots.items():
                if (node, slot) in wanted:
                    results[wanted[node, slot]] = gradient
            if type(node).__name__ == "AccumulateGrad":
                if accumulate_grad and slots and (not wanted or (node, 0) in wanted):
                    node(slots[0])
                continue
            gradients_out = _call(node, slots) if slots else [None] * len(node.next_functions)
            for edge, gradient in zip(node.next_functions, gradients_out, strict=False):
                if edge[0] is None:
                    continue
                if gradient is not None:
                    gradient = _validated(gradient, edge)
                add(edge, gradient)
                dependencies[edge[0]] -= 1
                if not dependencies[edge[0]]:
                    push(edge[0])
    return tuple(results)


def _edge(tensor: Any) -> tuple[Any, int]:
    if not isinstance(tensor, Tensor):  # a GradientEdge
        return tensor.node, tensor.output_nr
    node = tensor.grad_fn
    if node is None:
        with torch.enable_grad():
            node = tensor.view_as(tensor).grad_fn.next_functions[0][0]
    return node, tensor.output_nr


def _count_edges(roots: list[Any]) -> Counter[Any]:
    """Return the number of edges into each node that is reachable from the roots."""
    counts: Counter[Any] = Counter()
    seen, stack = set(roots), list(set(roots))
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                counts[node] += 1
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
    return counts


def _call(node: Any, slots: dict[int, Tensor]) -> Sequence[Tensor | None]:
    """Run a node; a missing gradient is None, or zeros for an autograd.Function."""
    gradients = [slots.get(slot) for slot in range(len(node._input_metadata))]
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        given = [
            torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if g is None else g
            for g, meta in zip(gradients, node._input_metadata, strict=True)
        ]
        results = node.apply(*given)
        results = results if isinstance(results, tuple) else (results,)
        # One result per argument of forward; next_functions has only the tensors among them.
        needed = iter(r for r, need in zip(results, node.needs_input_grad, strict=True) if need)
        return [next(needed) if edge[0] is not None else None for edge in node.next_functions]
    results = node(*gradients)
    return results if isinstance(results, tuple) else (results,)


def _validated(gradient: Tensor, edge: tuple[Any, int]) -> Tensor:
    """Return the gradient in the shape and dtype that the next node expects, as the engine does."""
    node, slot = edge
    meta = node._input_metadata[slot]
    if gradient.device != meta.device:
        raise RuntimeError(
            f"{node.name()} expected a gradient on {meta.device}, got one on {gradient.device}"
        )
    if tuple(gradient.shape) != tuple(meta.shape):
        gradient = gradient.sum_to_size(meta.shape)
    return gradient if gradient.dtype == meta.dtype else gradient.to(meta.dtype)
