from __future__ import annotations

import functools
import importlib.util
import json
import warnings

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from fastdino import TrainConfig, Trainer, cli
from fastdino.evals.transforms import center_crop
from fastdino.export import targets
from fastdino.models.backbones import build_backbone
from fastdino.models.weights import initial_weights, load_backbone

IMAGES = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NAMES = {
    "timm": "vit.safetensors", "hf": "vit", "safetensors": "vit.safetensors",
    "onnx": "vit.onnx", "torchscript": "vit.pt",
}  # fmt: skip


def need(to):
    for name in {"hf": ["transformers"], "onnx": ["onnx", "onnxscript", "onnxruntime"]}.get(to, []):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


def hide(package, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if package in name else find(name)
    )


@pytest.fixture(scope="module")
def trainer():
    """Return a tiny trainer whose teacher weights, biases included, are not the initial ones."""
    config = TrainConfig(
        arch="vit_nano", patch_size=8, out_dim=64, global_crops_size=32, local_crops_size=16,
        device="cpu", warmup_teacher_temp_epochs=0, data_path="/home/someone/flowers/train",
    )  # fmt: skip
    trainer = Trainer(config, steps_per_epoch=1)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainer.teacher.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    trainer.teacher.eval()
    return trainer


@pytest.fixture(scope="module")
def weights(trainer, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "checkpoint.pth"
    torch.save({**trainer.state_dict(), "epoch": 3, "args": trainer.config.to_dict()}, path)
    return str(path)


@pytest.fixture
def run(weights, tmp_path, capsys):
    """Return a function that runs `fastdino export`; see its docstring."""

    def export(to, *flags, output=None, pretrained=weights, status=0):
        """Return the output path and the report, or with status=2 the error message."""
        output = output or tmp_path / NAMES.get(to, "vit")
        words = ["export", "--pretrained_weights", pretrained, "--to", to, "--output", str(output)]
        flags = ["--report", str(tmp_path / "report.json"), *flags]
        assert cli.main([*words, *flags]) == status
        captured = capsys.readouterr()
        if status:
            return captured.err
        assert captured.err == ""
        print(captured.out, end="")  # for tests that read the output
        return output, json.loads((tmp_path / "report.json").read_text())

    return export


@pytest.fixture
def refused(run):
    return functools.partial(run, status=2)


@torch.no_grad()
def expected(trainer, images=IMAGES):
    return trainer.teacher.backbone(images)


def assert_near(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("to", "name"), [*NAMES.items(), ("timm", "vit.pth")])
def test_library_reads_the_export_and_the_printed_usage_gives_equal_features(
    run, trainer, tmp_path, to, name
):
    need(to)
    _, report = run(to, output=tmp_path / name)
    readers = {"hf": "transformers", "onnx": "onnxruntime", "torchscript": "torch"}
    assert report["checked"]["by"] == readers.get(to, to)
    assert 0 <= report["checked"]["error"] <= 1e-5
    assert (report["arch"], report["patch_size"], report["image_size"]) == ("vit_nano", 8, 32)
    scope = {"images": IMAGES.numpy() if to == "onnx" else IMAGES}
    lines = report["usage"].replace(
        'processor(image, return_tensors="pt")', '{"pixel_values": images}'
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(lines, scope)
    assert_near(torch.as_tensor(scope["features"]), expected(trainer))


@pytest.mark.parametrize(
    ("arch", "patch_size", "image_size", "call"),
    [
        ("vit_small", 16, 224, ("vit_small_patch16_224", {"num_classes": 0})),
        ("vit_base", 8, 224, ("vit_base_patch16_224", {"num_classes": 0, "patch_size": 8})),
        ("vit_large", 16, 96, ("vit_large_patch16_224", {"num_classes": 0, "img_size": 96})),
    ],
)
def test_timm_call_matches_the_architecture(arch, patch_size, image_size, call):
    network = targets.Network(torch.nn.Identity(), arch, patch_size, image_size, 0)
    assert targets.timm_call(network) == call
    assert timm.is_model(call[0])


def test_load_backbone_reads_a_hugging_face_folder(run, trainer):
    folder, _ = run("hf")
    backbone = load_backbone(str(folder), checkpoint_key="teacher", arch=None, patch_size=None)
    assert (backbone.arch, backbone.patch_size) == ("vit_nano", 8)
    with torch.no_grad():
        assert torch.equal(backbone.module(IMAGES), expected(trainer))
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["image_size"]) == (96, 6, 32)


def test_hugging_face_processor_matches_the_evaluation_transform(run):
    transformers = pytest.importorskip("transformers")
    folder, _ = run("hf")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = torch.randint(0, 256, (6, 5, 3), generator=torch.Generator().manual_seed(2))
    image = Image.fromarray(pixels.byte().numpy()).resize((70, 70), Image.Resampling.BICUBIC)
    actual = processor(image, return_tensors="pt")["pixel_values"]
    wanted = center_crop(targets.resize_of(32), 32)(image)
    assert actual.shape == (1, 3, 32, 32)
    assert (actual[0] - wanted).abs().max() < 0.05  # two or three of 255 levels: rounding


def test_model_cards_of_folders_and_files_describe_the_training(run, tmp_path):
    (tmp_path / "knn.json").write_text('{"20": {"top1": 29.4, "top5": 60.0}}')
    flags = ("--model_card", "--figures", str(tmp_path / "knn.json"))
    folder, _ = run("hf", *flags)
    path, _ = run("safetensors", *flags)
    for card in (folder / "README.md", path.with_suffix(".md")):
        text = card.read_text()
        assert "# DINO vit_nano/8" in text
        assert "| out_dim | 64 |" in text
        assert "| 20-NN, top-1 | 29.40 |" in text
        assert "Images: `flowers/train`" in text
        assert str(tmp_path) not in text
    assert "library_name: transformers" in (folder / "README.md").read_text()


def test_safetensors_metadata_and_default_permissions(run, trainer, tmp_path):
    path, _ = run("safetensors")
    (tmp_path / "other").write_text("")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata == {"format": "pt", "arch": "vit_nano", "patch_size": "8", "image_size": "32"}
    assert load_file(path).keys() == trainer.teacher.backbone.state_dict().keys()


def test_image_size_resizes_positions_as_the_paper_does(run, weights):
    path, report = run("safetensors", "--image_size", "48")
    assert report["image_size"] == 48
    resized, _ = initial_weights(weights, arch="vit_nano", patch_size=8, img_size=48)
    assert torch.equal(load_file(path)["pos_embed"], resized["pos_embed"])


def test_checkpoint_key_selects_the_student(run, trainer):
    path, _ = run("safetensors", "--checkpoint_key", "student")
    assert torch.equal(load_file(path)["norm.bias"], trainer.student.backbone.norm.bias)
    assert not torch.equal(load_file(path)["norm.bias"], trainer.teacher.backbone.norm.bias)


def test_export_whose_features_differ_is_not_written(monkeypatch, refused, tmp_path):
    names = targets.to_hf_names

    def swapped(state):
        return names({**state, "blocks.2.norm1.weight": state["blocks.3.norm1.weight"].clone()})

    need("hf")
    monkeypatch.setattr(targets, "to_hf_names", swapped)
    assert "features by transformers differ by" in refused("hf")
    assert list(tmp_path.iterdir()) == []


def test_export_reports_that_it_was_not_checked(monkeypatch, run, capsys):
    hide("transformers", monkeypatch)
    _, report = run("hf")
    assert report["checked"]["by"] is None
    assert "not checked: transformers is not installed" in capsys.readouterr().out


def test_missing_onnx_packages_are_an_error(monkeypatch, refused):
    hide("onnx", monkeypatch)
    assert refused("onnx") == (
        "fastdino export: error: --to onnx needs onnx and onnxscript: "
        'pip install "fastdino[export]"\n'
    )


def test_other_architectures_export_to_formats_without_vit(run, refused, tmp_path):
    backbone = load_backbone("", checkpoint_key="teacher", arch="resnet18", patch_size=None)
    torch.save(backbone.module.state_dict(), tmp_path / "resnet.pth")
    source = str(tmp_path / "resnet.pth")
    for to in ("timm", "hf"):
        error = refused(to, "--arch", "resnet18", pretrained=source)
        assert f"--to {to} supports only vit_*" in error
        assert "this is a resnet18: use --to safetensors, onnx, torchscript" in error
    flags = ("--arch", "resnet18", "--image_size", "64")
    for to in ("safetensors", "torchscript"):
        _, report = run(to, *flags, pretrained=source)
        assert report["checked"]["error"] <= 1e-5
        assert "patch_size" not in report


def test_invalid_flags_are_errors(refused, tmp_path):
    assert "--to 'torchscrip' is none of timm, hf" in refused("torchscrip")
    assert "did you mean torchscript?" in refused("torchscrip")
    assert "writes a .safetensors or .pth file, got" in refused("timm", output=tmp_path / "vit.bin")
    assert "no multiple of the patch size 8: the nearest is 48" in refused(
        "safetensors", "--image_size", "50"
    )
    assert "--image_size must be at least 1, got 0" in refused("hf", "--image_size", "0")
    assert "--figures requires --model_card" in refused("timm", "--figures", "knn.json")
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused("safetensors", output=tmp_path / "file" / "a.safetensors")
    assert "writes a folder, but" in refused("hf", "--overwrite", output=tmp_path / "file")
    assert "there is no file" in refused("hf", pretrained=str(tmp_path / "none.pth"))
    for to, name in (
        ("safetensors", "a\udcff.safetensors"),
        ("hf", "a\udcff"),
        ("onnx", "b\udcfe.onnx"),
    ):
        assert "has bytes that are not UTF-8" in refused(to, output=tmp_path / name)


def test_existing_files_stay_unless_overwritten(run, refused, tmp_path):
    (tmp_path / "vit.safetensors").write_text("mine")
    assert "vit.safetensors exists: use another path, or --overwrite" in refused("safetensors")
    assert (tmp_path / "vit.safetensors").read_text() == "mine"
    path, _ = run("safetensors", "--overwrite")
    assert "norm.bias" in load_file(path)
    path.rename(tmp_path / "other.safetensors")
    (tmp_path / "vit.md").write_text("mine")
    assert "vit.md exists" in refused("safetensors", "--model_card")
    assert {path.name for path in tmp_path.iterdir()} == {
        "other.safetensors", "vit.md", "report.json"
    }  # fmt: skip


def test_a_folder_is_overwritten_file_by_file(run, refused, tmp_path):
    folder, _ = run("hf")
    (folder / "notes.txt").write_text("mine")
    assert "exists" in refused("hf")
    (folder / "config.json").write_text("old")
    run("hf", "--overwrite")
    assert (folder / "notes.txt").read_text() == "mine"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "vit"


def test_vits_with_registers_are_exported_where_the_format_can_hold_them(run, tmp_path):
    network = build_backbone("vit_nano", patch_size=8, img_size=32, registers=2)[0]
    torch.nn.init.normal_(network.register_tokens)
    torch.save(network.state_dict(), tmp_path / "registers.pth")
    path = str(tmp_path / "registers.pth")
    error = run("timm", pretrained=path, status=2)
    assert "is for ViTs without registers, and this one has 2: use --to safetensors" in error
    for to in ("safetensors", "torchscript"):
        _, report = run(to, pretrained=path)
        assert report["checked"]["error"] < 1e-5
