"""A linear classifier on frozen features, trained as the paper trains it.

Source: Caron et al. 2021, section 4.1, and the authors' eval_linear.py.
Legend: B images, D channels, C classes.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fastdino import checkpoint, distributed
from fastdino.checkpoint import check_shapes, strip_prefix
from fastdino.errors import CheckpointError, ConfigError, NonFiniteError
from fastdino.evals.features import (
    UNREADABLE,
)
from fastdino.models.vit import VisionTransformer

# The paper's name of the only module that its checkpoints hold.
PREFIX = "module.linear."


class FrozenFeatures:
    """[B, 3, H, W] -> [B, dim]: what the paper classifies; no gradient.

    Of a vit_*: the normalised CLS tokens of the last `blocks` blocks, one after the other; with
    `avgpool` (one block) CLS and the mean patch, whose channels alternate as in the paper's code.
    Of other networks: their output.

    Raises: ConfigError: more blocks than there are, or avgpool with several.
    """

    def __init__(self, model: nn.Module, *, blocks: int, avgpool: bool):
        self.model, self.blocks, self.avgpool = model, blocks, avgpool
        if not isinstance(model, VisionTransformer):
            return
        if blocks > len(model.blocks):
            raise ConfigError(
                f"--n_last_blocks {blocks}: the network has {len(model.blocks)} blocks"
            )
        if avgpool and blocks > 1:
            raise ConfigError(
                f"--avgpool_patchtokens true goes with --n_last_blocks 1, got {blocks}"
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if not isinstance(self.model, VisionTransformer):
            return self.model(images)
        layers = self.model.get_intermediate_layers(images, self.blocks)
        if self.avgpool:
            return torch.stack((layers[-1][:, 0], layers[-1][:, 1:].mean(1)), dim=2).flatten(1)
        return torch.cat([tokens[:, 0] for tokens in layers], dim=1)


class Probe:
    """The classifier with its SGD and its schedule: momentum .9, no decay, lr cosine to 0 an epoch.

    Args:
        dim, classes: D, C.
        lr: at the start, as it is used: the paper's scaled by the global batch over 256.
        epochs: the schedule's length.
        seed: of the weights, normal of std .01; the biases are 0.

    Attributes:
        epoch: epochs done. losses: of the steps done in the one that was begun. seen: images that
            these were of, in all processes. best_acc: best top-1 so far, percent.
    """

    def __init__(
        self, dim: int, classes: int, *, lr: float, epochs: int, seed: int, device: torch.device
    ):
        self.device, self.epochs = device, epochs
        self.epoch, self.best_acc = 0, 0.0
        self.losses: list[Tensor] = []
        self.seen = 0
        self.linear = nn.Linear(dim, classes)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.linear.bias)
        self.linear.to(device)
        self.optimizer = torch.optim.SGD(
            self.linear.parameters(), lr=lr, momentum=0.9, weight_decay=0
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, epochs, eta_min=0
        )

    @property
    def lr(self) -> float:
        """The learning rate of this epoch."""
        return float(self.optimizer.param_groups[0]["lr"])

    def train_epoch(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        features: Callable[[Tensor], Tensor],
        stopped: Callable[[], bool] = lambda: False,
    ) -> float | None:
        """One epoch, or what is left of one; returns the mean loss of its steps.

        Args:
            batches: those of the epoch's images that were not seen yet.
            stopped: asked after each step; where it says so, None is returned, and the epoch can be
                gone on with.

        Raises: NonFiniteError: the loss is not finite.
        """
        title = f"epoch {self.epoch + 1}/{self.epochs}"
        for batch, labels in tqdm(batches, desc=title, disable=not sys.stderr.isatty()):
            labels = labels.to(self.device)
            logits = self.linear(features(batch.to(self.device)))
            # Over the images that could be read; a batch without any moves nothing of its own.
            total = F.cross_entropy(logits, labels, ignore_index=UNREADABLE, reduction="sum")
            loss = total / (labels != UNREADABLE).sum().clamp(min=1)
            self.optimizer.zero_grad()
            loss.backward()
            for parameter in self.linear.parameters():
                assert parameter.grad is not None
                parameter.grad = distributed.mean(parameter.grad)
            self.optimizer.step()
            self.losses.append(loss.detach())
            self.seen += len(labels) * distributed.world_size()
            if stopped():
                return None
        mean = distributed.mean(torch.stack(self.losses).mean()).item()
        if not math.isfinite(mean):
            raise NonFiniteError(
                f"the loss of epoch {self.epoch + 1} is {mean}: lower --lr, or look at the weights"
            )
        with warnings.catch_warnings():
            # Where a run was stopped after an epoch's last step, the optimizer stepped before it.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()
        self.epoch += 1
        self.losses, self.seen = [], 0
        return mean

    @torch.no_grad()
    def validate(
        self, batches: Iterable[tuple[Tensor, Tensor]], features: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Mean loss, top-1 and top-5 in percent, over all processes' images, and their number.

        With fewer than five classes top-5 is top-C.
        """
        sums = torch.zeros(4, dtype=torch.float64)
        for batch, labels in tqdm(batches, desc="val", disable=not sys.stderr.isatty()):
            good = labels != UNREADABLE
            labels = labels[good].to(self.device)
            logits = self.linear(features(batch.to(self.device)))[good.to(self.device)]
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack((loss, hits[:, 0].sum(), hits.sum(), good.sum())).double().cpu()
        loss_sum, top1, top5, number = distributed.total(sums).tolist()
        number = max(number, 1)
        return {
            "loss": loss_sum / number,
            "acc1": 100 * top1 / number,
            "acc5": 100 * top5 / number,
            "images": number,
        }

    def save(self, path: Path, protocol: dict[str, Any]) -> None:
        """Writes the paper's keys, and `protocol`: what the features depend on."""
        state = {
            "epoch": self.epoch,
            "state_dict": {PREFIX + k: v for k, v in self.linear.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "best_acc": self.best_acc,
            "losses": [loss.item() for loss in self.losses],
            "seen": self.seen,
            "protocol": protocol,
        }
        checkpoint.save(state, path)

    def resume(self, path: Path, protocol: dict[str, Any]) -> None:
        """Goes on with what save, or the paper's code, wrote.

        Raises: CheckpointError: it is of another head, of other features or of another schedule.
        """
        state = self.load_head(path)
        for key in ("epoch", "optimizer", "scheduler", "best_acc"):
            if key not in state:
                raise CheckpointError(
                    f"{path} has no {key!r}: to classify with it, --evaluate --linear_weights"
                )
        saved = state.get("protocol", protocol)
        other = [
            f"{k} {protocol[k]} (was {saved.get(k)})"
            for k in protocol
            if protocol[k] != saved.get(k)
        ]
        if state["scheduler"]["T_max"] != self.epochs:
            other.append(f"epochs {self.epochs} (was {state['scheduler']['T_max']})")
        if other:
            raise CheckpointError(
                f"{path} is of another probe: {', '.join(other)}; name another --output_dir"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.best_acc = int(state["epoch"]), float(state["best_acc"])
        self.losses = [torch.tensor(loss, device=self.device) for loss in state.get("losses", [])]
        self.seen = int(state.get("seen", 0))

    def load_head(self, path: Path) -> dict[str, Any]:
        """Takes up the classifier of a checkpoint or of the paper's linear weights; returns it all.

        Raises: CheckpointError: tensors of other shapes are named.
        """
        state = checkpoint.load(path)
        weights = state.get("state_dict", state)
        weights = strip_prefix(strip_prefix(weights, "module."), "linear.")
        try:
            check_shapes(self.linear, weights, str(path))
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; --n_last_blocks, --avgpool_patchtokens, --arch and --num_labels must be "
                "those it was trained with"
            ) from error
        self.linear.load_state_dict(weights)
        return state
