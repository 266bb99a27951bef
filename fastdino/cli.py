"""The command `fastdino`: its subcommands, and how mistakes and signals become exit statuses.

0: done. 1: a defect of fastdino (with its traceback). 2: a mistake in flags, data or checkpoint
(one line says which). 75 (EX_TEMPFAIL): stopped by SIGTERM or SIGINT and saved, to be run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from fastdino import __version__
from fastdino.errors import UserError

EXIT_MISTAKE = 2


@dataclass(frozen=True)
class Command:
    """A subcommand: `module` has configure(parser) and main(args) -> exit status."""

    module: str
    help: str


COMMANDS = {
    "train": Command(
        "fastdino.training.loop",
        "pretrain with DINO (takes every flag of the paper's main_dino.py)",
    ),
    "knn": Command("fastdino.evals.knn", "weighted k-NN accuracy (the flags of eval_knn.py)"),
    "linear": Command(
        "fastdino.evals.linear", "linear probe of frozen features (the flags of eval_linear.py)"
    ),
    "attention": Command(
        "fastdino.evals.visualize_attention",
        "draw attention maps of a ViT, or score them against masks",
    ),
    "video": Command("fastdino.evals.video", "the attention of a ViT, frame by frame"),
    "davis": Command(
        "fastdino.evals.davis", "video segmentation (the flags of eval_video_segmentation.py)"
    ),
    "retrieval": Command(
        "fastdino.evals.retrieval", "image retrieval (the flags of eval_image_retrieval.py)"
    ),
    "copydays": Command(
        "fastdino.evals.copydays", "copy detection (the flags of eval_copy_detection.py)"
    ),
    "export": Command(
        "fastdino.export.command", "write a backbone for timm, Hugging Face, ONNX, ..."
    ),
    "crops": Command(
        "fastdino.crop_comparison", "draw a photo's crops and how the backends differ"
    ),
    "info": Command("fastdino.info", "what this machine has, and what fastdino makes of it"),
    "demo": Command("fastdino.demo", "all of it on a small generated set, in minutes"),
    "bench": Command(
        "fastdino.bench.command", "how fast a training step or a loader is here, and others' beside"
    ),
    "shapes": Command("fastdino.data.shapes", "write a small labelled image set to try things on"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="fastdino", description="DINO pretraining, fast.")
    parser.add_argument("--version", action="version", version=f"fastdino {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    wanted = next((word for word in argv if not word.startswith("-")), None)
    try:
        for name, command in COMMANDS.items():
            subparser = commands.add_parser(name, help=command.help, description=command.help)
            # Only the one that runs is imported: torch takes seconds.
            if name == wanted:
                module = import_module(command.module)
                module.configure(subparser)
                run: Callable[[argparse.Namespace], int] = module.main
        args = parser.parse_args(argv)
        return run(args)
    except UserError as error:
        if not error.told_elsewhere:
            print(f"fastdino {wanted}: error: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        install = 'pip install "fastdino[train]"'
        print(f"fastdino {wanted}: error: {error}; {install} brings it", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return EXIT_MISTAKE
