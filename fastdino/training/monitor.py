"""Evaluations of the teacher during a run: k-NN accuracy and pictures of its attention.

They change nothing in the training: neither its weights and statistics nor its random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from fastdino import distributed
from fastdino.config import TrainConfig
from fastdino.data.image_dataset import ImageDataset
from fastdino.data.image_files import Conversion
from fastdino.errors import DataError
from fastdino.evals.features import Extractor
from fastdino.evals.knn import extract_splits, knn_accuracy, normalized
from fastdino.evals.options import scan_labelled
from fastdino.evals.transforms import center_crop
from fastdino.models.backbones import build_backbone
from fastdino.training import sharding
from fastdino.training.logging import Progress
from fastdino.training.trainer import Trainer

NEIGHBOURS = 20
LARGEST_BATCH = 128  # images per forward pass, as in `fastdino knn`


def crop_sizes(config: TrainConfig) -> tuple[int, int]:
    """Return the short side after the resize and the side of the crop, in pixels.

    They are the paper's 256 and 224 for its 224 px global crops, and in proportion for others.
    """
    return round(config.global_crops_size * 256 / 224), config.global_crops_size


def picture_sizes(config: TrainConfig) -> tuple[int, int]:
    """Return the sizes of `crop_sizes` for pictures of attention maps.

    They are larger, as the paper's: 480 px for 224 px global crops and in proportion for others,
    but at least 28 patches.
    """
    side = max(config.global_crops_size * 480 / 224, 28 * config.patch_size)
    return round(side * 256 / 224), round(side)


class TeacherMonitor:
    """Evaluates the teacher after every --knn_every and --attention_every epochs.

    Args:
        dataset: of the training.
        folder: of the run, an existing one.

    Raises: DataError: --knn_data cannot be used. CheckpointError: the folder cannot be written.
    """

    def __init__(
        self,
        config: TrainConfig,
        trainer: Trainer,
        progress: Progress,
        dataset: ImageDataset,
        folder: Path,
    ):
        self._config, self._trainer, self._progress = config, trainer, progress
        self._warned: set[str] = set()
        self._splits: dict[str, ImageDataset] = {}
        if config.knn_data:
            self._splits = distributed.from_main(lambda: _scan(config, folder))
        if config.attention_every:
            from fastdino.training.attention_strips import AttentionStrips  # matplotlib

            images = self._splits.get("val", dataset)
            sizes, patch = picture_sizes(config), config.patch_size
            with distributed.fail_together():
                if distributed.rank() == 0:
                    self._strips = AttentionStrips(images, sizes, patch, folder / "attention")

    def due(self, epoch: int) -> bool:
        """Return True if the teacher is to be evaluated at the end of an epoch, from 0."""
        return self._knn_due(epoch) or self._attention_due(epoch)

    def evaluate(self, epoch: int, should_stop: Callable[[], bool]) -> dict[str, float]:
        """Evaluate the teacher at the end of an epoch; all ranks must call it.

        Args: should_stop: asked between batches; True on one rank stops all.

        Returns: knn_top1 and knn_top5, in percent, if they are due.

        Raises: StoppedError: see `should_stop`.
        """
        results: dict[str, float] = {}
        with _frozen_backbone(self._config, self._trainer) as backbone:
            if self._knn_due(epoch):
                try:
                    results |= self._knn(backbone, should_stop)
                except DataError as error:
                    self._warn_once(f"k-NN after epoch {epoch + 1}: {error}; the run continues")
            if self._attention_due(epoch) and distributed.rank() == 0:
                self._draw(backbone, epoch)
        return results

    def _knn_due(self, epoch: int) -> bool:
        return _due(self._config.knn_every, epoch, self._config.epochs)

    def _attention_due(self, epoch: int) -> bool:
        return _due(self._config.attention_every, epoch, self._config.epochs)

    def _knn(self, backbone: nn.Module, should_stop: Callable[[], bool]) -> dict[str, float]:
        config, device = self._config, self._trainer.device
        extractor = Extractor(
            normalized(backbone),
            center_crop(*crop_sizes(config)),
            min(LARGEST_BATCH, 2 * config.batch_size_per_gpu),  # as many as the teacher trains with
            config.num_workers,
            device,
            should_stop=should_stop,
            report=self._warn_once,
        )
        tensors = extract_splits(self._splits, extractor)
        accuracy = knn_accuracy(
            tensors["trainfeat"],
            tensors["trainlabels"],
            tensors["testfeat"].to(device),
            tensors["testlabels"].to(device),
            ks=[NEIGHBOURS],
        )
        top1, top5 = accuracy[NEIGHBOURS]
        return {"knn_top1": top1, "knn_top5": top5}

    def _draw(self, backbone: nn.Module, epoch: int) -> None:
        """Draw the attention maps; a failed write does not stop the run."""
        pixels = self._strips.draw(backbone, self._trainer.device)
        last = (epoch + 1) * self._trainer.steps_per_epoch - 1
        self._progress.loggers.add_image("attention", pixels, last)
        try:
            self._strips.save(pixels, epoch)
        except OSError as error:
            self._warn_once(
                f"pictures of attention maps cannot be written ({error}): the run continues"
            )

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._progress.warn(text)


def _due(every: int, epoch: int, epochs: int) -> bool:
    """Return True after every `every` epochs and after the last one; False for 0."""
    return bool(every) and ((epoch + 1) % every == 0 or epoch + 1 == epochs)


def _scan(config: TrainConfig, folder: Path) -> dict[str, ImageDataset]:
    """Scan the splits of --knn_data."""
    try:
        return scan_labelled(
            config.knn_data,
            workers=config.num_workers,
            conversion=Conversion(config.exif_orientation, config.image_range),
            caches={split: folder / f"knn_{split}.npz" for split in ("train", "val")},
        )
    except DataError as error:
        reason = str(error).replace("--data_path", "--knn_data")
        prefix = "" if "--knn_data" in reason else "--knn_data: "
        raise DataError(prefix + reason) from error


@contextmanager
def _frozen_backbone(config: TrainConfig, trainer: Trainer) -> Iterator[nn.Module]:
    """Yield the teacher's backbone in eval mode; modes and random generators are restored.

    A sharded teacher is gathered into a whole network, because its forward pass is a collective
    and the ranks have different numbers of batches. A compiled one runs uncompiled, which would
    otherwise compile again for each batch size.
    """
    devices = [trainer.device] if trainer.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),  # data loaders draw a seed
        torch.compiler.set_stance("force_eager"),
    ):
        if config.fsdp:
            backbone, _ = build_backbone(
                config.arch, patch_size=config.patch_size, img_size=config.global_crops_size
            )
            state = trainer.teacher.backbone.state_dict()
            backbone.load_state_dict(sharding.full_tensors(state))
            yield backbone.to(trainer.device).eval()
            return
        backbone = trainer.teacher.backbone
        modes = [(module, module.training) for module in backbone.modules()]
        backbone.eval()
        try:
            yield backbone
        finally:
            for module, mode in modes:
                module.training = mode
