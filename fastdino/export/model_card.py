"""Model card of an exported backbone: properties, usage, training settings and accuracies."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdino import __version__
from fastdino.data.image_files import read_file
from fastdino.errors import ConfigError
from fastdino.terminal import printable

# Training settings to show; the others, such as paths, depend on the machine.
SETTINGS = (
    "epochs", "warmup_epochs", "batch_size_per_gpu", "grad_accum", "optimizer", "lr", "min_lr",
    "weight_decay", "weight_decay_end", "clip_grad", "momentum_teacher", "out_dim",
    "norm_last_layer", "use_bn_in_head", "freeze_last_layer", "teacher_temp", "warmup_teacher_temp",
    "warmup_teacher_temp_epochs", "centering", "koleo_weight", "global_crops_size",
    "global_crops_scale", "local_crops_number", "local_crops_size", "local_crops_scale",
    "drop_path_rate", "use_fp16", "seed",
)  # fmt: skip
CITATION = """\
@inproceedings{caron2021emerging,
  title={Emerging Properties in Self-Supervised Vision Transformers},
  author={Caron, Mathilde and Touvron, Hugo and Misra, Ishan and J{\\'e}gou, Herv{\\'e} and
          Mairal, Julien and Bojanowski, Piotr and Joulin, Armand},
  booktitle={ICCV},
  year={2021}
}"""


def model_card(
    *,
    title: str,
    library: str | None,
    facts: dict[str, Any],
    usage: str,
    settings: dict[str, Any],
    epoch: int | None,
    figures: Sequence[tuple[str, str]],
) -> str:
    """Return a model card in Markdown, with the YAML front matter of the Hugging Face Hub.

    Args:
        title: name of the model.
        library: library that loads it, under the Hub's name; None if the Hub knows none.
        facts: properties of the model, in the order of the table.
        usage: Python code that loads it.
        settings, epoch: of its training, if the checkpoint records them.
        figures: (evaluation, result), from read_figures.
    """
    front = ["---", *([f"library_name: {library}"] if library else [])]
    front += ["pipeline_tag: image-feature-extraction", "tags:"]
    front += [f"- {tag}" for tag in ("dino", "self-supervised-learning", "vision", "fastdino")]
    parts = [
        "\n".join([*front, "---"]),
        f"# {_markdown(title)}",
        "The backbone of a network pretrained without labels by DINO "
        "([Caron et al. 2021](https://arxiv.org/abs/2104.14294)): one feature vector per image. "
        "It has no classifier.",
        _table(("", ""), facts.items()),
        f"## Use\n\n```python\n{usage}\n```\n\nNormalise images with ImageNet's mean and "
        "standard deviation.",
        _training(settings, epoch),
    ]
    if figures:
        parts.append("## Figures\n\n" + _table(("evaluation", "accuracy, %"), figures))
    parts += [f"## Citation\n\n```bibtex\n{CITATION}\n```", f"Written by fastdino {__version__}."]
    return "\n\n".join(parts) + "\n"


def _training(settings: dict[str, Any], epoch: int | None) -> str:
    known = {name: settings[name] for name in SETTINGS if settings.get(name) is not None}
    if not known:
        return "## Training\n\nThe checkpoint does not record how it was trained."
    lines = ["## Training", ""]
    if settings.get("data_path"):  # only its end; the rest depends on the machine
        end = "/".join(Path(str(settings["data_path"])).parts[-2:])
        lines += [f"Images: {_code(end)}.", ""]
    if epoch is not None:
        lines += [f"{epoch} of {_markdown(known.get('epochs', '?'))} epochs are done.", ""]
    return "\n".join([*lines, _table(("setting", "value"), known.items())])


def _table(head: tuple[str, str], rows: Any) -> str:
    cells = [(_markdown(name), _markdown(value)) for name, value in rows]
    return "\n".join(f"| {name} | {value} |" for name, value in (head, ("---", "---"), *cells))


def _markdown(value: Any) -> str:
    """Return a value as literal text: settings of a checkpoint may hold any HTML or Markdown."""
    text = re.sub(r"([\\`*\[\]|])", r"\\\1", printable(str(value)))
    return html.escape(text, quote=False)


def _code(text: str) -> str:
    """Return text as code: between more backticks than it has in a row."""
    text = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " * ("`" in text)
    return f"{fence}{space}{text}{space}{fence}"


def read_figures(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Read the accuracies from JSON reports of `fastdino knn --output` and `fastdino linear`.

    Raises: ConfigError: a file cannot be read or is another report.
    """
    return [row for path in paths for row in _figures_of(Path(path))]


def _figures_of(path: Path) -> list[tuple[str, str]]:
    try:
        report = json.loads(read_file(str(path)))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--figures {path} cannot be read as JSON: {error}") from error
    try:
        names = {"linear probe, top-1": "acc1", "linear probe, top-5": "acc5"}
        rows = [(f"{k}-NN, top-1", report[k]["top1"]) for k in report if k.isdigit()]
        rows = rows or [(name, report[key]) for name, key in names.items()]
        return [(name, f"{float(value):.2f}") for name, value in rows]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"--figures {path} has no accuracies ({error!r}): expected a JSON of "
            "`fastdino knn --output` or `fastdino linear`"
        ) from error
