"""Recognition of the networks in a weight file, however deep and under whatever prefix they lie.

Training code nests state_dicts ({"state_dict": ...}, {"model": ...}, {"teacher": ...}) and wraps
networks (DDP, torch.compile, FSDP, Lightning). Here a nested dict is one more prefix, and a network
is a prefix below which the tensors of a known layout lie.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from fastdino.checkpoint import unsuitable_kind
from fastdino.errors import CheckpointError

# Parts of a name that wrappers insert anywhere: torch.compile, FSDP, recomputation, DeepSpeed.
_WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
# Words in a prefix that state the role of a network.
_ROLES = {
    "teacher": {"teacher", "momentum", "ema", "target", "k"},
    "student": {"student", "online", "q"},
}
# A tensor of each layout of a ViT, and the layout's name for messages.
VIT_LAYOUTS = {
    "patch_embed.proj.weight": "a ViT",
    "embeddings.patch_embeddings.projection.weight": "a ViT with Hugging Face's names",
    "embeddings.patch_embeddings.weight": "a ViT with Hugging Face's names",
}
# Files that hold something else: patterns of which each matches a tensor, and what they are.
_OTHERS: tuple[tuple[tuple[str, ...], str], ...] = (
    ((r"(.*\.)?layer1\.0\.conv1\.weight",), "a ResNet: select it with --arch, such as resnet50"),
    ((r"(.*\.)?patch_embed\.proj\.0\.0\.weight",), "an XCiT: select it with --arch"),
    (
        (r"(.*\.)?last_layer\.(weight.*|parametrizations.*)", r"(.*\.)?mlp\.\d+\.weight"),
        "the projection head of DINO without a backbone",
    ),
)
_CLASSIFIER = re.compile(r"((?:.*\.)?)weight")


class Network(NamedTuple):
    """A network in a file: its prefix, its role or None, its layout, and its tensors."""

    prefix: str
    role: str | None
    layout: str
    tensors: dict[str, Tensor]

    def __str__(self) -> str:
        under = f" under {self.prefix.rstrip('.')!r}" if self.prefix else ""
        return f"{self.layout}{under}"


def find_network(
    state: dict[str, Any], key: str | None, source: str, own_names: Iterable[str] | None = None
) -> Network:
    """Return the network of a weight file, with names without prefix.

    Args:
        key: "teacher" or "student", or another part of the prefix, if the file has several; None:
            the teacher, or the student if there is no teacher.
        source: the file, for error messages.
        own_names: tensors of the expected network; None: a ViT in one of VIT_LAYOUTS.

    Raises: CheckpointError: no such network, or several that `key` does not distinguish.
    """
    tensors = _flatten(state)
    found = _find_vits(tensors) if own_names is None else _find_by_names(tensors, [*own_names])
    if not found:
        raise CheckpointError(f"{source} has no backbone: it is {describe(state)}")
    network = _select(found, key, source)
    for name, tensor in network.tensors.items():
        if kind := unsuitable_kind(tensor):
            raise CheckpointError(
                f"{source}: {name} is a {kind}, expected a dense tensor of real numbers"
            )
    return network


def _flatten(state: dict[Any, Any]) -> dict[str, Tensor]:
    """Return the tensors of nested dicts, without the optimizer's, by their path."""
    tensors: dict[str, Tensor] = {}
    opened: set[int] = set()  # a pickled dict may contain itself
    waiting = [("", state)]
    while waiting:
        prefix, current = waiting.pop()
        for key, value in current.items():
            if isinstance(value, Tensor):
                tensors[_WRAPPERS.sub("", f"{prefix}{key}")] = value
                continue
            is_new = isinstance(value, dict) and id(current) not in opened
            if is_new and not str(key).startswith("optim"):
                waiting.append((f"{prefix}{key}.", value))
        opened.add(id(current))
    return tensors


def _find_vits(tensors: dict[str, Tensor]) -> list[Network]:
    return [
        Network(prefix, _role(prefix), layout, _below(tensors, prefix))
        for anchor, layout in VIT_LAYOUTS.items()
        for prefix in _prefixes(tensors, anchor)
    ]


def _find_by_names(tensors: dict[str, Tensor], own_names: list[str]) -> list[Network]:
    """Return the networks with most of these names, and no fewer than half of them."""
    prefixes = dict.fromkeys(_prefixes(tensors, own_names[0]))
    counts = {p: sum(p + name in tensors for name in own_names) for p in prefixes}
    most = max(counts.values(), default=0)
    return [
        Network(prefix, _role(prefix), "a network", _below(tensors, prefix))
        for prefix, count in counts.items()
        if count == most and 2 * count >= len(own_names)
    ]


def _prefixes(tensors: dict[str, Tensor], anchor: str) -> list[str]:
    """Return the prefixes with which a tensor occurs."""
    return [
        name.removesuffix(anchor)
        for name in tensors
        if name == anchor or name.endswith("." + anchor)
    ]


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _role(prefix: str) -> str | None:
    words = set(re.split(r"[._]", prefix.lower()))
    return next((role for role, own in _ROLES.items() if own & words), None)


def _select(found: list[Network], key: str | None, source: str) -> Network:
    """Return the network for a key, see find_network."""
    if {network.role for network in found} == {"teacher", None}:  # an average next to its network
        found = [network._replace(role=network.role or "student") for network in found]
    roles = [role for role in _ROLES if any(network.role == role for network in found)]
    if roles:
        key = key or roles[0]
        matches = [n for n in found if n.role == key or key in n.prefix.split(".")]
        if not matches:
            raise CheckpointError(
                f"{source} has no network {key!r}, it has {', '.join(roles)}: "
                "select one with --checkpoint_key"
            )
    else:
        matches = [n for n in found if key and key in n.prefix.split(".")] or found
    if len(matches) > 1:
        names = ", ".join(repr(network.prefix.rstrip(".")) for network in matches)
        raise CheckpointError(
            f"{source} has {len(matches)} networks, under {names}: save the state_dict of one"
        )
    return matches[0]


def find_classifier(state: dict[str, Any]) -> dict[str, Tensor] | None:
    """Return weight [classes, D] and bias [classes] of a file that holds a linear classifier only.

    It has the names of the paper's code (state_dict, module.linear.) or others.
    """
    tensors = _flatten(state)
    prefixes = [match[1] for name in tensors if (match := _CLASSIFIER.fullmatch(name))]
    if len(prefixes) != 1 or {*tensors} != {f"{prefixes[0]}weight", f"{prefixes[0]}bias"}:
        return None
    weights = {name.removeprefix(prefixes[0]): tensor for name, tensor in tensors.items()}
    return weights if weights["weight"].ndim == 2 else None


def describe(state: dict[str, Any]) -> str:
    """Return what a weight file holds, to continue "it is"."""
    tensors = _flatten(state)
    if (classifier := find_classifier(state)) is not None:
        classes, width = classifier["weight"].shape
        return (
            f"a linear classifier of {classes} classes on features of width {width}, which "
            "`fastdino linear --linear_weights` reads next to its backbone"
        )
    for patterns, what in _OTHERS:
        if all(any(re.fullmatch(pattern, name) for name in tensors) for pattern in patterns):
            return what
    if found := _find_vits(tensors):
        return str(found[0])
    if not tensors:
        return f"a dict without tensors (keys: {_few(map(str, state))})"
    return f"a file with {len(tensors)} tensors of an unknown network ({_few(tensors)})"


def _few(names: Iterable[str]) -> str:
    first = [f"{name:.60}" for name in names]
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")
