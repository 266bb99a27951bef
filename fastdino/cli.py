"""The command `fastdino`: its subcommands and exit statuses.

0: done. 1: a bug in fastdino, with its traceback. 2: a mistake in flags, data or checkpoint, with
one line on stderr. 75 (EX_TEMPFAIL): a signal (fastdino.signals) stopped and saved the run, or
another rank was lost; run it again. 130, 141: Ctrl-C, or the reader of the output is gone.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple, NoReturn

from fastdino import __version__
from fastdino.errors import UserError
from fastdino.terminal import finish_output, print_line, printable

EXIT_MISTAKE = 2
DESCRIPTION = "DINO self-supervised pretraining: the paper's results, faster."
EPILOG = "`fastdino COMMAND --help` lists the flags of a command."


class Command(NamedTuple):
    """A subcommand; `module` defines configure(parser) and main(args) -> exit status."""

    module: str
    help: str


COMMANDS = {
    name: Command(f"fastdino.{module}", about)
    for name, module, about in (
        ("train", "training.loop", "pretrain a network (all flags of the paper's main_dino.py)"),
        ("submit", "submit", "run train as a Slurm job (flags of run_with_submitit.py)"),
        ("knn", "evals.knn", "weighted k-NN accuracy (flags of eval_knn.py)"),
        ("linear", "evals.linear", "linear probe on frozen features (flags of eval_linear.py)"),
        ("attention", "evals.visualize_attention", "draw attention maps of a ViT, or score them"),
        ("video", "evals.video", "draw the attention maps of a ViT on a video"),
        ("davis", "evals.davis", "video segmentation (flags of eval_video_segmentation.py)"),
        ("retrieval", "evals.retrieval", "image retrieval (flags of eval_image_retrieval.py)"),
        ("copydays", "evals.copydays", "copy detection (flags of eval_copy_detection.py)"),
        ("embed", "evals.embed", "write the features of a dataset to a file"),
        ("pca", "evals.pca", "draw patch features by their principal components"),
        ("export", "export.command", "export a backbone to timm, Hugging Face, ONNX, ..."),
        ("crops", "crop_comparison", "draw the crops of a photo and compare the crop backends"),
        ("info", "info", "show versions, hardware and available backends"),
        ("demo", "demo", "train and evaluate on a generated dataset, in minutes"),
        ("bench", "bench.flags", "measure the training step or the loaders against baselines"),
        ("shapes", "data.shapes", "generate a small labelled image dataset"),
    )
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are printable: a shell can expand a pattern to any file name."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status."""
    # PyTorch warns with a stack trace of C++ when a rank is lost, which the error explains.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # for names that it cannot encode
    try:
        return _run(argv)
    finally:
        finish_output()


def _run(argv: Sequence[str] | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog="fastdino", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("-V", "--version", action="version", version=f"fastdino {__version__}")
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True
    )
    requested = next((word for word in argv if not word.startswith("-")), None)
    try:
        for name, command in COMMANDS.items():
            about = f"{command.help[0].upper()}{command.help[1:]}."
            subparser = commands.add_parser(name, help=command.help, description=about)
            if name == requested:  # the other modules stay unloaded: importing torch takes seconds
                module = import_module(command.module)
                module.configure(subparser)
                run: Callable[[argparse.Namespace], int] = module.main
        args = parser.parse_args(argv)
        return run(args)
    except UserError as error:
        if not error.reported:
            print_line(f"fastdino {requested}: error: {error}", sys.stderr)
        return error.exit_status
    except ModuleNotFoundError as error:
        install = 'pip install "fastdino[train]"'
        print_line(f"fastdino {requested}: error: {error}: {install}", sys.stderr)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:  # a path that cannot be accessed: too long, or in another's folder
        if error.errno is None:  # not from the operating system
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        print_line(f"fastdino {requested}: error: {where}{error.strerror}", sys.stderr)
    return EXIT_MISTAKE
