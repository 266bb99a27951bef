"""`fastdino linear`: top-1 and top-5 accuracy of a linear classifier on frozen features.

With --cache the backbone sees each image once, or --cache_epochs times, instead of in every epoch.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch

from fastdino import distributed
from fastdino.config import check_at_least, parse_bool, user_path
from fastdino.epoch_log import drop_log_lines
from fastdino.errors import ConfigError, DataError
from fastdino.evals import options
from fastdino.evals.linear_data import Inputs, ProbeData
from fastdino.evals.linear_probe import Probe
from fastdino.evals.options import DEFAULT, print_on_main
from fastdino.files import explain_write_errors, write_json
from fastdino.models.downloads import local_file
from fastdino.signals import EXIT_INTERRUPTED, StopSignals

CHECKPOINT = "checkpoint.pth.tar"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `fastdino linear`: the paper's eval_linear.py's, then this project's."""
    options.add_network_flags(parser)
    options.add_conversion_flags(parser)
    add = options.add_process_flags(parser).add_argument
    about = f"images per step and process {DEFAULT}"
    add("--batch_size_per_gpu", type=int, default=128, help=about)
    add = parser.add_argument_group("features").add_argument
    about = f"concatenate the CLS tokens of this many last blocks {DEFAULT}"
    add("--n_last_blocks", type=int, default=4, help=about)
    about = f"with --n_last_blocks 1: append the mean patch token, as for ViT-B {DEFAULT}"
    add("--avgpool_patchtokens", type=parse_bool, default=False, metavar="BOOL", help=about)
    about = (
        "keep features on disk (default folder: OUTPUT_DIR/features). Unlike in the paper's "
        "protocol, all epochs then see the same centre crops, or --cache_epochs augmentations"
    )
    add("--cache", type=user_path, nargs="?", const="", metavar="FOLDER", help=about)
    about = f"with --cache: keep N augmented passes, used in turn; 0: one of centre crops {DEFAULT}"
    add("--cache_epochs", type=int, default=0, metavar="N", help=about)
    add = parser.add_argument_group("images").add_argument
    add("--data_path", type=user_path, default="/path/to/imagenet/", help=options.SPLITS_HELP)
    about = f"resize the short side of validation images to this, in px {DEFAULT}"
    add("--resize", type=int, default=256, help=about)
    add("--crop", type=int, default=224, help=f"side of all crops, in px {DEFAULT}")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=100, help=f"passes over train/ {DEFAULT}")
    about = f"learning rate for a global batch of 256; scaled linearly with it {DEFAULT}"
    add("--lr", type=float, default=0.001, help=about)
    add("--val_freq", type=int, default=1, help=f"validate every N epochs {DEFAULT}", metavar="N")
    add("--num_labels", type=int, help="number of classes (default: from the images)")
    about = f"folder for {CHECKPOINT}, log.txt and linear.json; a run in it resumes {DEFAULT}"
    add("--output_dir", type=user_path, default=".", help=about)
    add("--evaluate", action="store_true", help="only validate a trained classifier")
    about = f"with --evaluate: file or URL of the classifier (default: OUTPUT_DIR/{CHECKPOINT})"
    add("--linear_weights", type=user_path, help=about)


def main(args: argparse.Namespace) -> int:
    """Run `fastdino linear`."""
    _check_flags(args)
    with options.join_ranks(args) as device:
        return evaluate(args, device) if args.evaluate else train(args, device)


def _check_flags(args: argparse.Namespace) -> None:
    check_at_least(args, 1, "n_last_blocks", "epochs", "batch_size_per_gpu", "val_freq")
    check_at_least(args, 1, "resize", "crop", "patch_size", "num_labels")
    check_at_least(args, 0, "num_workers", "cache_epochs", "seed")
    if not 0 < args.lr < float("inf"):
        raise ConfigError(f"--lr must be a finite number above 0, got {args.lr}")
    if args.cache_epochs and args.cache is None:
        raise ConfigError("--cache_epochs requires --cache")
    if args.cache is not None and args.evaluate:
        raise ConfigError("--cache is only for training: leave it out with --evaluate")
    if args.linear_weights and not args.evaluate:
        raise ConfigError("--linear_weights requires --evaluate")


def train(args: argparse.Namespace, device: torch.device) -> int:
    """Run `_train` with the output folder locked."""
    output = Path(args.output_dir)
    distributed.from_main(lambda: _check_folder(output))
    with options.lock_output(output, "linear"):
        return _train(args, output, device)


def _train(args: argparse.Namespace, output: Path, device: torch.device) -> int:
    """Train a classifier, resuming from the output folder, and report its accuracy.

    Returns: the exit code: 0, or 75 after SIGTERM or SIGINT, once the step is finished and saved.
    """
    data = ProbeData.load(args, device, ("train", "val"))
    probe = build_probe(data)
    print_on_main(
        f"linear probe on {device}, {distributed.world_size()} process(es): {data.dim} features, "
        f"{probe.linear.out_features} classes, {len(data.datasets['train'])} training images"
    )
    _resume(output, probe, data)
    if probe.epoch < args.epochs:
        with StopSignals() as signals:
            inputs = data.inputs(signals.should_stop_after_step)
            if inputs is None:
                print_on_main(
                    f"stopped by {signals.received} while features were written, which are kept; "
                    "run the same command to resume"
                )
                return EXIT_INTERRUPTED
            while probe.epoch < args.epochs:
                line = _run_epoch(data, probe, *inputs, signals)
                if line is not None:
                    distributed.from_main(partial(_log, output / "log.txt", line))
                stopped = signals.should_stop() and probe.epoch < args.epochs
                if line is not None or stopped:
                    distributed.from_main(partial(probe.save, output / CHECKPOINT, data.protocol))
                if stopped:
                    print_on_main(
                        f"stopped by {signals.received} after {probe.epoch} epochs and "
                        f"{probe.seen} images, saved; run the same command to resume"
                    )
                    return EXIT_INTERRUPTED
    if distributed.rank() == 0:
        _write_results(output, probe, data)
    return 0


def evaluate(args: argparse.Namespace, device: torch.device) -> int:
    """Report the accuracy of a trained classifier: this command's, or the paper's weights."""
    data = ProbeData.load(args, device, ("val",))
    path = args.linear_weights or str(Path(args.output_dir) / CHECKPOINT)
    probe = build_probe(data)
    with distributed.fail_together():
        probe.load_classifier(local_file(path))
    scores = _validate(probe, data, Inputs(data.images("val"), data.features))
    print_on_main(_accuracies(scores))
    classifier = {"linear_weights": path, "classifier": options.weights_digest(probe.linear)}
    result = {"settings": data.settings() | classifier, **scores, "images": int(scores["images"])}
    if distributed.rank() == 0:
        write_json(result, Path(args.output_dir) / "evaluate.json")
    return 0


def build_probe(data: ProbeData) -> Probe:
    """Return an untrained classifier of these features."""
    args = data.args
    batch = args.batch_size_per_gpu * distributed.world_size()
    return Probe(
        data.dim,
        args.num_labels or len(data.datasets["val"].classes),
        lr=args.lr * batch / 256,
        epochs=args.epochs,
        seed=args.seed,
        device=data.device,
    )


def _check_folder(output: Path) -> None:
    if (output / "checkpoint.pth").exists():
        raise ConfigError(
            f"--output_dir {output} holds a pretraining run with its own log.txt: use another"
        )


def _resume(output: Path, probe: Probe, data: ProbeData) -> None:
    """Restore the checkpoint of the output folder, if any, and cut the log back to it."""
    path, log = output / CHECKPOINT, output / "log.txt"
    if distributed.from_main(path.exists):
        with distributed.fail_together():
            probe.resume(path, data.protocol)
        begun = f", and {probe.seen} images of the next" if probe.seen else ""
        print_on_main(f"resumed {path}: {probe.epoch} of {probe.epochs} epochs are done{begun}")
    if distributed.from_main(log.exists):
        trim = explain_write_errors(log)(drop_log_lines)
        distributed.from_main(lambda: trim(log, probe.epoch))


def _run_epoch(
    data: ProbeData, probe: Probe, train: list[Inputs], val: Inputs, signals: StopSignals
) -> dict[str, float] | None:
    """Finish an epoch and validate; return the log line, or None if stopped before the end."""
    args, epoch = data.args, probe.epoch
    line: dict[str, float] = {"train_lr": probe.lr}
    samples, features = train[epoch % len(train)]
    batches = data.train_batches(samples, epoch, seen=probe.seen)
    loss = probe.train_epoch(batches, features, signals.should_stop_after_step)
    if loss is None:
        return None
    line |= {"train_loss": loss, "epoch": epoch}
    if epoch % args.val_freq == 0 or probe.epoch == args.epochs:
        scores = _validate(probe, data, val)
        probe.best_acc = max(probe.best_acc, scores["acc1"])
        line |= {f"test_{name}": scores[name] for name in ("loss", "acc1", "acc5")}
        print_on_main(f"epoch {probe.epoch}/{args.epochs}: {_accuracies(scores)}")
    return line


def _validate(probe: Probe, data: ProbeData, val: Inputs) -> dict[str, float]:
    scores = probe.validate(data.val_batches(val.samples), val.features)
    with distributed.fail_together():
        if not scores["images"]:
            raise DataError(f"none of the images in val/ of {data.args.data_path} can be decoded")
    return scores


def _accuracies(scores: dict[str, float]) -> str:
    return (
        f"accuracy on {scores['images']:.0f} images: top-1 {scores['acc1']:.2f} %, "
        f"top-5 {scores['acc5']:.2f} %"
    )


def _log(path: Path, line: dict[str, float]) -> None:
    with explain_write_errors(path), open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def _write_results(output: Path, probe: Probe, data: ProbeData) -> None:
    log = output / "log.txt"
    lines = log.read_text().splitlines() if log.exists() else []  # deleted after the last epoch
    last = json.loads(lines[-1]) if lines else {}
    settings = data.settings("lr", "batch_size_per_gpu", "seed")
    result = {
        "settings": settings | {"processes": distributed.world_size()},
        "acc1": last.get("test_acc1"),
        "acc5": last.get("test_acc5"),
        "best_acc1": probe.best_acc,
        "epochs": probe.epoch,
        "classes": probe.linear.out_features,
        "features": data.dim,
    }
    write_json(result, output / "linear.json")
    print_on_main(f"best top-1 {probe.best_acc:.2f} %; results in {output / 'linear.json'}")
