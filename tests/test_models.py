from __future__ import annotations

import pytest
import torch
from torch import nn

from fastdino import distributed
from fastdino.errors import ConfigError
from fastdino.models.backbones import build_backbone, build_networks
from fastdino.models.head import DINOHead, MultiCropWrapper, WeightNormLinear


@pytest.mark.parametrize(
    ("size", "millions"), [("tiny", 5.5), ("small", 21.7), ("base", 85.8), ("large", 303.3)]
)
@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_vit_parameter_counts(kind, size, millions):
    with torch.device("meta"):
        vit, width = build_backbone(f"{kind}_{size}", patch_size=16)
    assert width == vit.embed_dim
    assert sum(p.numel() for p in vit.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    ("arch", "width"),
    [
        ("resnet50", 2048), ("xcit_nano_12_p16", 128), ("convnext_atto", 320),
        ("vit_tiny_patch16_224", 192), ("deit_tiny_distilled_patch16_224", 192),
    ],
)  # fmt: skip
def test_other_backbones_return_one_vector_for_both_crop_sizes(arch, width):
    backbone, built_width = build_backbone(arch)
    backbone.eval()
    assert built_width == width
    for size in (64, 96):
        assert backbone(torch.zeros(1, 3, size, size)).shape == (1, width)


def test_unknown_architecture_suggests_similar_names():
    with pytest.raises(ConfigError, match=r"unknown --arch 'vit_smal'; .*vit_small"):
        build_backbone("vit_smal")


@pytest.mark.parametrize("arch", ["alexnet", "squeezenet1_0"])
def test_torchvision_models_without_an_fc_layer_are_refused(arch):
    with pytest.raises(ConfigError, match=f"{arch}: the torchvision model does not end in one fc"):
        build_backbone(arch)


@pytest.mark.parametrize(
    ("arch", "size", "message"),
    [
        ("mixer_s32_224", 16, "does not support 16 px crops; use --local_crops_size 224"),
        ("vit_tiny_patch16_224", 50, "does not support 50 px crops; use --local_crops_size 48"),
    ],
)
def test_unsupported_crop_sizes_are_an_error_that_names_a_size_that_works(
    tiny, arch, size, message
):
    with pytest.raises(ConfigError, match=message) as error:
        build_networks(tiny(arch=arch, global_crops_size=224, local_crops_size=size))
    assert "\n" not in str(error.value)


def test_batch_norm_over_one_value_is_an_error_before_the_run(tiny, monkeypatch):
    settings = {"arch": "resnet18", "global_crops_size": 64, "batch_size_per_gpu": 1}
    one = {"local_crops_number": 1, "local_crops_size": 32}
    with pytest.raises(ConfigError, match="batch norm of --arch resnet18 would see one value"):
        build_networks(tiny(**settings, **one))
    build_networks(tiny(**settings, **one | {"local_crops_number": 2}))
    build_networks(tiny(**settings, **one | {"local_crops_size": 64}))
    build_networks(tiny(**settings | one | {"batch_size_per_gpu": 2}))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)  # SyncBN sees both ranks' values
    build_networks(tiny(**settings, **one))


def test_networks_start_equal_and_the_teacher_has_no_gradients(tiny):
    student, teacher = build_networks(tiny(norm_last_layer=False, drop_path_rate=0.3))
    for ours, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.requires_grad
        assert not theirs.requires_grad
    assert student.backbone.drop_path_rates == pytest.approx([0.3 * i / 5 for i in range(6)])
    assert not any(teacher.backbone.drop_path_rates)


def test_initial_values_of_every_parameter_are_the_papers(tiny):
    """Truncated normals of 0.02, PyTorch's uniform for the convolution and the prototypes."""
    student, _ = build_networks(tiny(arch="vit_tiny", out_dim=300))
    uniform = {  # PyTorch's default: +- 1/sqrt(fan_in), whose deviation is that over sqrt(3)
        "backbone.patch_embed.proj.weight": 3 * 8 * 8,
        "backbone.patch_embed.proj.bias": 3 * 8 * 8,
        "head.last_layer.weight_v": 256,
    }
    for name, values in student.named_parameters():
        if name in uniform:
            bound = uniform[name] ** -0.5
            assert values.abs().max() <= bound, name
            assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.15), name
        elif name == "head.last_layer.weight_g" or "norm" in name:
            assert (values == (0 if name.endswith("bias") else 1)).all(), name
        elif name.endswith("bias"):
            assert not values.any(), name
        else:
            assert values.mean().abs() < 0.004, name
            assert values.std().item() == pytest.approx(0.02, rel=0.15), name


def test_head_returns_cosines_and_has_the_papers_names(float64):
    head = DINOHead(8, 5, use_bn=True, norm_last_layer=True)
    assert not head.last_layer.weight_g.requires_grad
    assert DINOHead(8, 5, norm_last_layer=False).last_layer.weight_g.requires_grad
    names = set(head.state_dict())
    assert {"last_layer.weight_g", "last_layer.weight_v", "mlp.0.weight", "mlp.6.bias"} <= names
    head.eval()
    with torch.no_grad():
        logits = head(torch.randn(3, 8) * 100)
        head.last_layer.weight_v.mul_(7)
        assert logits.abs().max() <= 1  # cosines do not depend on either norm
        torch.testing.assert_close(head(torch.zeros(1, 8)), head(torch.zeros(1, 8)))


@pytest.mark.parametrize("rows", [1, 4, 5])  # up to 4 rows scale the product
@pytest.mark.parametrize("train_magnitude", [False, True])
def test_weight_norm_for_any_number_of_rows(float64, rows, train_magnitude):
    layer = WeightNormLinear(4, 7, train_magnitude=train_magnitude)
    nn.init.uniform_(layer.weight_g, 0.5, 2)
    x = torch.randn(rows, 4, requires_grad=True)
    weight = layer.weight_g * layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True)
    gradient = torch.randn(rows, 7)
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    results = [(y, *torch.autograd.grad(y, inputs, gradient)) for y in (layer(x), x @ weight.T)]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_few_rows_save_no_normalised_weight_for_backward():
    layer = WeightNormLinear(4, 700, train_magnitude=False)
    own = {layer.weight_v.data_ptr(), layer.weight_g.data_ptr()}
    kept = []

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(3, 4, requires_grad=True))
    assert sum(kept) == 3 * 4 + 700  # x and the norms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_norm_under_autocast(dtype):
    layer = WeightNormLinear(64, 50, train_magnitude=True)
    x = torch.randn(8, 64, requires_grad=True)
    gradient = torch.randn(8, 50)
    inputs = [x, *layer.parameters()]
    exact = layer(x)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    results = [(z, *torch.autograd.grad(z, inputs, gradient.to(z.dtype))) for z in (y, exact)]
    for got, want in zip(*results, strict=True):
        error = (got.float() - want).norm() / want.norm()
        assert error < 4 * torch.finfo(dtype).eps


def test_one_backbone_pass_per_crop_size_keeps_the_order():
    passes = []

    class Backbone(nn.Module):
        def forward(self, x):
            passes.append(tuple(x.shape))
            return x.mean((2, 3))

    head = nn.Identity()
    crops = [torch.full((2, 3, size, size), float(i)) for i, size in enumerate((8, 8, 4, 4, 4))]
    out = MultiCropWrapper(Backbone(), head)(crops)
    assert passes == [(4, 3, 8, 8), (6, 3, 4, 4)]
    assert out[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("packing", [False, True])
def test_features_of_the_backbone_are_returned_with_the_logits(packing):
    class Backbone(nn.Module):
        def forward(self, x):
            groups = x if packing else [x]
            return torch.cat([group.mean((2, 3)) for group in groups])

    wrapper = MultiCropWrapper(Backbone(), nn.Linear(3, 5))
    wrapper.packing = packing
    crops = [torch.full((2, 3, size, size), float(i)) for i, size in enumerate((8, 8, 4))]
    logits, features = wrapper(crops, with_features=True)
    assert features[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(logits, wrapper.head(features))
    assert torch.equal(wrapper(crops), logits)
