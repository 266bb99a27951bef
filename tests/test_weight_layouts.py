"""Networks in weight files: nested dicts, prefixes of wrappers, other projects' files."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from fastdino.errors import CheckpointError
from fastdino.evals.linear_probe import Probe
from fastdino.models.backbones import build_backbone
from fastdino.models.head import DINOHead
from fastdino.models.weights import initial_weights, load_backbone

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def randomize(module):
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


@pytest.fixture(scope="module")
def vit():
    return randomize(build_backbone("vit_nano", patch_size=8, img_size=32)[0])


@pytest.fixture
def load(tmp_path):
    def load_state(state, *, key="teacher", arch=None, patch_size=None):
        path = tmp_path / "file.pth"
        torch.save(state, path)
        return load_backbone(str(path), checkpoint_key=key, arch=arch, patch_size=patch_size)

    return load_state


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def assert_same(backbone, network, images=IMAGES):
    with torch.no_grad():
        torch.testing.assert_close(backbone.module(images), network(images), rtol=1e-4, atol=1e-5)


def compiled_blocks(state):
    return {name.replace("attn.", "attn._orig_mod."): t for name, t in state.items()}


def zeros(state):
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


NESTED = {
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "args": None},
    "model.state_dict": lambda s: {"model": {"state_dict": s}},
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "compiled DDP": lambda s: {"model": prefixed(s, "_orig_mod.module.")},
    "DDP compiled": lambda s: {"state_dict": prefixed(s, "module._orig_mod.backbone.")},
    "compiled blocks": lambda s: {"teacher": compiled_blocks(prefixed(s, "backbone."))},
    "FSDP": lambda s: {"model": prefixed(s, "backbone._fsdp_wrapped_module.")},
    "Lightning": lambda s: {
        "state_dict": prefixed(s, "model.backbone.") | {"model.head.weight": torch.zeros(3, 96)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        "hyper_parameters": {"arch": 3},
    },
    "lightly": lambda s: {
        "state_dict": prefixed(s, "teacher_backbone.vit.")
        | prefixed(zeros(s), "student_backbone.vit.")
        | {"teacher_backbone.mask_token": torch.zeros(1, 1, 96)}
    },
    "solo-learn": lambda s: {
        "state_dict": prefixed(s, "momentum_backbone.") | prefixed(zeros(s), "backbone.")
    },
    "EMA": lambda s: {"model": zeros(s), "model_ema": s},
    "DINOv2's training": lambda s: {
        "model": prefixed(s, "teacher.backbone.") | prefixed(zeros(s), "student.backbone."),
        "optimizer": {"state": prefixed(s, "student.backbone.")},
    },
    "iBOT": lambda s: {"teacher": prefixed(s | {"masked_embed": torch.zeros(1, 96)}, "backbone.")},
    "MAE": lambda s: {
        "model": s | {"mask_token": torch.zeros(1, 1, 96), "decoder_pred.bias": torch.zeros(3)}
    },
    "classifier": lambda s: s | {"head.weight": torch.zeros(9, 96), "head.bias": torch.zeros(9)},
}


@pytest.mark.parametrize("layout", NESTED)
def test_networks_are_found_in_nested_dicts_and_under_prefixes(vit, load, layout):
    backbone = load(NESTED[layout](vit.state_dict()))
    assert (backbone.arch, backbone.patch_size) == ("vit_nano", 8)
    assert_same(backbone, vit)


def test_the_key_selects_the_student_or_a_part_of_the_prefix(vit, load):
    state = vit.state_dict()
    file = {"state_dict": prefixed(zeros(state), "momentum_backbone.") | prefixed(state, "net.")}
    assert_same(load(file, key="student"), vit)
    assert_same(load(file, key="net"), vit)
    with pytest.raises(CheckpointError, match="no network 'other', it has teacher, student: sel"):
        load(file, key="other")


def test_two_networks_without_roles_are_listed(vit, load):
    state = vit.state_dict()
    with pytest.raises(CheckpointError, match="2 networks, under 'a', 'b.c': save the state_dict"):
        load(prefixed(state, "a.") | {"b": {"c": state}})


@pytest.mark.filterwarnings("ignore:The .srun. command is available")
def test_checkpoints_of_lightning_load(vit, tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"lr": 0.1})
            self.backbone, self.head = vit, nn.Linear(96, 2)

    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.strategy.connect(Module())
    trainer.save_checkpoint(tmp_path / "lightning.ckpt", weights_only=True)
    path = str(tmp_path / "lightning.ckpt")
    assert_same(load_backbone(path, checkpoint_key="teacher", arch=None, patch_size=None), vit)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny_patch16_224"])
def test_networks_of_torchvision_and_timm_load_without_their_classifier(load, prefix, arch):
    network = randomize(build_backbone(arch)[0])
    head = {"fc.weight": torch.zeros(9, 512), "head.bias": torch.zeros(9)}
    file = {"state_dict": prefixed(network.state_dict() | head, prefix), "arch": arch}
    assert_same(load(file, arch=arch), network, torch.randn(2, 3, 224, 224))
    with pytest.raises(CheckpointError, match=f"file.pth.* for --arch {arch}: the weights"):
        load({"model": prefixed(network.state_dict() | {"z": torch.zeros(1)}, prefix)}, arch=arch)


@pytest.mark.parametrize("arch", ["vit_small_patch14_reg4_dinov2", "vit_small_patch14_dinov2"])
def test_timms_positions_are_resized_to_the_grid_of_the_network(load, arch):
    network = timm.create_model(arch, pretrained=False, num_classes=0, img_size=98)
    backbone = load(network.state_dict(), arch=arch)
    own = network.pos_embed.shape[1] - 49
    loaded = backbone.module.pos_embed
    assert loaded.shape[1] == own + 37**2
    assert torch.equal(loaded[:, :own], network.pos_embed[:, :own])
    side = loaded[:, own:].reshape(37, 37, -1)
    # The corners of a resized grid remain close to those of the grid.
    corner = network.pos_embed[0, own]
    assert torch.cosine_similarity(side[0, 0], corner, dim=0) > 0.9


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("chunks", [False, True])
def test_layer_scale_and_registers_of_dinov2_are_loaded(load, registers, chunks):
    """DINOv2's own names and timm's; timm adds CLS's position to cls_token with registers."""
    arch = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    options = {"embed_dim": 96, "depth": 6, "num_heads": 3, "img_size": 56}
    network = randomize(timm.create_model(arch, pretrained=False, num_classes=0, **options))
    state = network.state_dict()
    images = torch.randn(2, 3, 56, 56)
    assert_same(load(state), network, images)
    if registers:
        state["register_tokens"] = state.pop("reg_token")
        position = torch.randn(1, 1, 96)
        state["cls_token"] = state["cls_token"] - position
        state["pos_embed"] = torch.cat((position, state["pos_embed"]), dim=1)
    state["mask_token"] = torch.zeros(1, 96)
    if chunks:
        state = {name.replace("blocks.", "blocks.2."): tensor for name, tensor in state.items()}
    backbone = load({"teacher": prefixed(state, "backbone.")})
    assert (backbone.arch, backbone.patch_size, backbone.module.registers) == (
        "vit_nano", 14, registers,
    )  # fmt: skip
    assert_same(backbone, network, images)


@pytest.mark.parametrize("registers", [0, 4])
def test_hugging_faces_dinov2_folders_load(tmp_path, registers):
    transformers = pytest.importorskip("transformers")
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{name}Config")(
        hidden_size=96, num_hidden_layers=6, num_attention_heads=3, image_size=56, patch_size=14
    )
    network = randomize(getattr(transformers, f"{name}Model")(config))
    network.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), checkpoint_key=None, arch=None, patch_size=None)
    assert backbone.module.registers == registers
    assert_same(backbone, lambda x: network(x).last_hidden_state[:, 0], torch.randn(2, 3, 56, 56))


def test_registers_take_part_in_attention_but_are_not_returned(vit):
    with_registers = build_backbone("vit_nano", patch_size=8, img_size=32, registers=3)[0].eval()
    with_registers.load_state_dict(vit.state_dict(), strict=False)
    with torch.no_grad():
        for method in ("get_last_selfattention", "get_cls_attention"):
            expected, actual = (getattr(n, method)(IMAGES) for n in (vit, with_registers))
            assert actual.shape == expected.shape
            assert actual.sum(-1).max() < 1  # the rest is the registers'
        shapes = [x.shape for x in with_registers.get_intermediate_layers(IMAGES, 2)]
        assert shapes == [x.shape for x in vit.get_intermediate_layers(IMAGES, 2)]
        assert not torch.allclose(with_registers(IMAGES), vit(IMAGES))
        assert with_registers(torch.randn(1, 3, 48, 40)).shape == (1, 96)


def test_training_does_not_start_from_weights_with_registers(tmp_path):
    network = build_backbone("vit_nano", patch_size=8, img_size=32, registers=3)[0]
    torch.save(network.state_dict(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="a ViT with 3 registers, which networks trained"):
        initial_weights(str(tmp_path / "x.pth"), arch="vit_nano", patch_size=8, img_size=32)


def dinov3_state(vit):
    state = {k: v for k, v in vit.state_dict().items() if k != "pos_embed"}
    more = {"rope_embed.periods": 16, "storage_tokens": (1, 4, 96), "mask_token": (1, 96)}
    return state | {k: torch.zeros(v) for k, v in more.items()}


def hf_dinov3_state(_vit):
    names = ("embeddings.cls_token", "embeddings.patch_embeddings.weight", "layer.0.norm1.weight")
    return {name: torch.zeros(1, 1, 96) for name in names}


def swiglu_state(vit):
    state = vit.state_dict()
    return state | {f"blocks.{i}.mlp.w12.weight": torch.zeros(8, 96) for i in range(6)}


def giant_state(_vit):
    blocks = {f"blocks.{i}.norm1.weight": torch.zeros(1408) for i in range(40)}
    rest = {"cls_token": (1, 1, 1408), "pos_embed": (1, 5, 1408)}
    patches = {"patch_embed.proj.weight": torch.zeros(1408, 3, 14, 14)}
    return blocks | patches | {k: torch.zeros(v) for k, v in rest.items()}


def linear_state(_vit):
    return {"weight": torch.zeros(1000, 1536), "bias": torch.zeros(1000)}


OTHERS = {
    "DINOv3": (dinov3_state, r"a ViT with rotary positions \(DINOv3\), which fastdino's vit_\* d"),
    "DINOv3 of Hugging Face": (hf_dinov3_state, "a ViT with rotary positions"),
    "SwiGLU": (swiglu_state, "a ViT with SwiGLU MLPs, which"),
    "DeiT": (lambda v: v.state_dict() | {"dist_token": torch.zeros(1)}, "a distillation token"),
    "giant": (giant_state, "a ViT of width 1408 with 40 blocks and 14 px patches, expected one of"),
    "the paper's linear weights": (
        lambda v: {"epoch": 3, "state_dict": prefixed(linear_state(v), "module.linear.")},
        "a linear classifier of 1000 classes on features of width 1536, which `fastdino linear",
    ),
    "linear weights": (linear_state, "a linear classifier of 1000 classes"),
    "head": (lambda _: DINOHead(96, 64).state_dict(), "the projection head of DINO without a back"),
    "ResNet": (
        lambda _: {"model": build_backbone("resnet18")[0].state_dict()},
        "a ResNet: select it with --arch",
    ),
    "no tensors": (lambda _: {"epoch": 3}, r"a dict without tensors \(keys: epoch\)"),
    "unknown": (
        lambda _: {"a": torch.zeros(1), "b": {"c": torch.zeros(1)}},
        r"2 tensors of an unknown network \(a, b.c\)",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_named(vit, load, kind):
    make, message = OTHERS[kind]
    with pytest.raises(CheckpointError, match=message):
        load(make(vit))


def test_our_linear_classifier_is_named(tmp_path):
    probe = Probe(96, 7, lr=0.1, epochs=1, seed=0, device=torch.device("cpu"))
    probe.save(tmp_path / "checkpoint.pth.tar", {})
    path = str(tmp_path / "checkpoint.pth.tar")
    with pytest.raises(CheckpointError, match="a linear classifier of 7 classes on features of w"):
        load_backbone(path, checkpoint_key=None, arch=None, patch_size=None)


def test_a_backbone_as_linear_weights_is_named(tmp_path, vit):
    probe = Probe(96, 7, lr=0.1, epochs=1, seed=0, device=torch.device("cpu"))
    torch.save({"teacher": prefixed(vit.state_dict(), "backbone.")}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="is no linear classifier: it is a ViT under 'teach"):
        probe.load_classifier(tmp_path / "x.pth")


def test_names_of_missing_tensors_come_with_what_was_recognised(vit, load):
    state = vit.state_dict()
    del state["norm.bias"]
    expected = r"file.pth, a ViT under 'model.net', for --arch vit_nano .*: norm.bias is missing"
    with pytest.raises(CheckpointError, match=expected):
        load({"model": prefixed(state, "net.")})


def test_dicts_that_contain_themselves_are_read(vit, load):
    state = {"model": vit.state_dict()}
    state["again"] = state
    assert_same(load(state, key="model"), vit)


def test_dicts_that_unfold_without_end_are_read(vit, load):
    """A few kB: 12 levels of 12 references to the next one are 12^12 paths."""
    nested = {}
    for _ in range(12):
        nested = {str(i): nested for i in range(12)}
    assert_same(load({"model": vit.state_dict(), "more": nested}), vit)


def test_safetensors_have_prefixes_too(vit, tmp_path):
    save_file(prefixed(vit.state_dict(), "model.backbone."), tmp_path / "x.safetensors")
    path = str(tmp_path / "x.safetensors")
    assert_same(load_backbone(path, checkpoint_key=None, arch=None, patch_size=None), vit)
