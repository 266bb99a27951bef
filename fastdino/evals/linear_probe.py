"""A linear classifier on frozen features, trained with the paper's protocol.

Source: Caron et al. 2021, section 4.1, and the authors' eval_linear.py.
Shapes: B images per batch, D channels, C classes.
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
from fastdino.checkpoint import check_count, check_shapes
from fastdino.errors import CheckpointError, ConfigError, NonFiniteError
from fastdino.models.vit import VisionTransformer
from fastdino.models.weight_layouts import describe, find_classifier
from fastdino.optimizer_state import check_optimizer, with_own_settings

UNREADABLE = -1  # label of an image whose header could be read but whose pixels could not
PREFIX = "module.linear."  # parameter names in the paper's checkpoints


class FrozenFeatures:
    """The features [B, 3, H, W] -> [B, dim] that the paper classifies, without gradient.

    For a vit_*: the normalised CLS tokens of the last `blocks` blocks, concatenated; with `avgpool`
    CLS and the mean patch token, with alternating channels as in the paper's code. For other
    networks: their output.

    Raises: ConfigError: more blocks than the network has, or avgpool with several blocks.
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
                f"--avgpool_patchtokens true requires --n_last_blocks 1, got {blocks}"
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
    """The classifier with its optimizer and schedule.

    SGD with momentum 0.9 and no weight decay; the learning rate falls to 0 by a cosine, per epoch.

    Args:
        dim, classes: D, C.
        lr: initial learning rate, already scaled by the global batch size over 256.
        epochs: length of the schedule.
        seed: of the initial weights, normal with std 0.01; biases are 0.

    Attributes:
        epoch: finished epochs.
        losses: of the finished steps in the current epoch.
        seen: images of these steps, over all ranks.
        best_acc: best top-1 accuracy so far, in percent.
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
        """The learning rate of the current epoch."""
        return float(self.optimizer.param_groups[0]["lr"])

    def train_epoch(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        features: Callable[[Tensor], Tensor],
        stopped: Callable[[], bool] = lambda: False,
    ) -> float | None:
        """Train for an epoch, or the rest of one; return the mean loss of its steps.

        Args:
            batches: images of the epoch that were not seen yet, with labels.
            stopped: called after each step; if it returns True, the epoch is left unfinished and
                the result is None.

        Raises: NonFiniteError: the mean loss is not finite.
        """
        title = f"epoch {self.epoch + 1}/{self.epochs}"
        for batch, labels in tqdm(batches, desc=title, disable=not sys.stderr.isatty()):
            self._step(features(batch.to(self.device)), labels.to(self.device))
            if stopped():
                return None
        mean = distributed.mean(torch.stack(self.losses).mean()).item()
        if not math.isfinite(mean):
            raise NonFiniteError(
                f"the loss of epoch {self.epoch + 1} is {mean}: lower --lr, or check the weights"
            )
        with warnings.catch_warnings():
            # After a resume at the end of an epoch, no optimizer step precedes this one.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()
        self.epoch += 1
        self.losses, self.seen = [], 0
        return mean

    def _step(self, features: Tensor, labels: Tensor) -> None:
        # The mean over readable images; a batch without any has a zero gradient.
        total = F.cross_entropy(
            self.linear(features), labels, ignore_index=UNREADABLE, reduction="sum"
        )
        loss = total / (labels != UNREADABLE).sum().clamp(min=1)
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.linear.parameters():
            assert parameter.grad is not None
            parameter.grad = distributed.mean(parameter.grad)
        self.optimizer.step()
        self.losses.append(loss.detach())
        self.seen += len(labels) * distributed.world_size()

    @torch.no_grad()
    def validate(
        self, batches: Iterable[tuple[Tensor, Tensor]], features: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Return loss, acc1 and acc5 (percent) over the readable images of all ranks, and images.

        With fewer than five classes top-5 means top-C.
        """
        sums = torch.zeros(4, dtype=torch.float64)
        for batch, labels in tqdm(batches, desc="val", disable=not sys.stderr.isatty()):
            labels = labels.to(self.device)
            good = labels != UNREADABLE
            labels = labels[good]
            logits = self.linear(features(batch.to(self.device)))[good]
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack((loss, hits[:, 0].sum(), hits.sum(), good.sum())).double().cpu()
        loss_sum, top1, top5, number = distributed.total(sums).tolist()
        divisor = max(number, 1)
        return {
            "loss": loss_sum / divisor,
            "acc1": 100 * top1 / divisor,
            "acc5": 100 * top5 / divisor,
            "images": number,
        }

    def save(self, path: Path, protocol: dict[str, Any]) -> None:
        """Write a checkpoint with the paper's keys, and the settings behind the features."""
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
        """Restore a checkpoint of this class or of the paper's code.

        Raises: CheckpointError: its classifier, features or schedule differ from this probe's.
        """
        state = self.load_classifier(path)
        with checkpoint.explain_content(path):
            self._restore(state, path, protocol)

    def _restore(self, state: dict[str, Any], path: Path, protocol: dict[str, Any]) -> None:
        for key in ("epoch", "optimizer", "scheduler", "best_acc"):
            if key not in state:
                raise CheckpointError(
                    f"{path} has no {key!r}, so training cannot resume from it; to classify with "
                    "it, use --evaluate --linear_weights"
                )
        expected = protocol | {"epochs": self.epochs}
        saved = state.get("protocol", protocol) | {"epochs": state["scheduler"]["T_max"]}
        differences = [
            f"{name} {value} (was {saved.get(name)})"
            for name, value in expected.items()
            if value != saved.get(name)
        ]
        if differences:
            raise CheckpointError(
                f"{path} is of another probe: {', '.join(differences)}; use another --output_dir"
            )
        check_optimizer(self.optimizer, state["optimizer"])
        self.optimizer.load_state_dict(with_own_settings(self.optimizer, state["optimizer"]))
        # The rest of both states is this probe's: it is given by the settings.
        self.optimizer.param_groups[0]["lr"] = float(state["optimizer"]["param_groups"][0]["lr"])
        self.scheduler.last_epoch = self.epoch = check_count(state, "epoch")
        self.best_acc = float(state["best_acc"])
        self.losses = [torch.tensor(loss, device=self.device) for loss in state.get("losses", [])]
        self.seen = check_count(state, "seen")

    def load_classifier(self, path: Path) -> dict[str, Any]:
        """Load the weights of a checkpoint or of the paper's linear weights; return the whole file.

        Raises: CheckpointError: not a classifier, or of another shape.
        """
        state = checkpoint.load(path)
        weights = find_classifier(state)
        if weights is None:
            raise CheckpointError(f"{path} is no linear classifier: it is {describe(state)}")
        try:
            check_shapes(self.linear, weights, str(path))
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; use the --n_last_blocks, --avgpool_patchtokens, --arch and --num_labels "
                "that it was trained with"
            ) from error
        self.linear.load_state_dict(weights)
        return state
