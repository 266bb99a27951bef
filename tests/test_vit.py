"""The ViT against a plain transcription of the paper's code, and its fast paths against it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastdino.models.attention import (
    BACKENDS,
    AttentionBackend,
    AttentionInputs,
    attention_problem,
    token_layout,
)
from fastdino.models.drop_path import StepDraws, draw_branch_scales
from fastdino.models.head import MultiCropWrapper
from fastdino.models.vit import VisionTransformer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def make_vit(**settings) -> VisionTransformer:
    """A small ViT without zero parameters, so that each one affects the result."""
    torch.manual_seed(0)
    defaults = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "img_size": 32}
    vit = VisionTransformer(**(defaults | settings))
    for parameter in vit.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return vit


def crops_by_size() -> list[torch.Tensor]:
    """Images of three sizes: the ViT's own, one that is not a multiple of the patch, one patch."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((4, 32, 32), (6, 19, 25), (2, 8, 8))
    dtype = torch.get_default_dtype()
    return [torch.randn(b, 3, h, w, generator=generator, dtype=dtype) for b, h, w in sizes]


def features_and_gradients(vit, call, *, autocast=None):
    """Return the output of `call`, its gradients, and the next random number."""
    vit.zero_grad()
    torch.manual_seed(2)
    device = vit.cls_token.device
    with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        out = call()
    next_number = torch.rand(1)
    generator = torch.Generator().manual_seed(3)
    out.backward(torch.randn(out.shape, generator=generator, dtype=out.dtype).to(device))
    return out.detach(), [p.grad for p in vit.parameters()], next_number


def assert_equal_results(got, want, **tolerances):
    torch.testing.assert_close(got[0], want[0], **tolerances)
    for ours, theirs in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(ours, theirs, **tolerances)
    assert torch.equal(got[2], want[2])


def papers_forward(vit, images):
    """Transcribe the paper's code: all tokens in all blocks, stochastic depth drawn in place."""

    def drop_path(x, rate):
        if rate == 0:
            return x
        keep = 1 - rate
        mask = (keep + torch.rand((x.shape[0], 1, 1), dtype=x.dtype)).floor_()
        return x.div(keep) * mask

    x = F.conv2d(images, vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, stride=8)
    x = x.flatten(2).transpose(1, 2)
    positions = vit.positions(tuple(images.shape[-2:]))
    x = torch.cat((vit.cls_token.expand(len(x), -1, -1), x), dim=1) + positions
    for block, rate in zip(vit.blocks, vit.drop_path_rates, strict=True):
        qkv = block.attn.qkv(block.norm1(x))
        query, key, value = qkv.reshape(*x.shape[:2], 3, 3, 8).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) * 8**-0.5).softmax(dim=-1)
        mixed = (weights @ value).transpose(1, 2).reshape(x.shape)
        x = x + drop_path(block.attn.proj(mixed), rate)
        x = x + drop_path(block.mlp(block.norm2(x)), rate)
    return vit.norm(x)[:, 0]


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
@pytest.mark.parametrize("cls_only", [False, True], ids=["all", "cls"])
@pytest.mark.parametrize("packed", [False, True], ids=["by size", "packed"])
def test_packing_and_cls_only_match_the_papers_code(float64, packed, cls_only, drop_path_rate):
    """Features, gradients and the random state are equal."""
    vit, groups = make_vit(drop_path_rate=drop_path_rate), crops_by_size()
    vit.cls_only = cls_only
    got = features_and_gradients(
        vit, lambda: vit(groups) if packed else torch.cat([vit(images) for images in groups])
    )
    want = features_and_gradients(
        vit, lambda: torch.cat([papers_forward(vit, images) for images in groups])
    )
    assert_equal_results(got, want, rtol=1e-10, atol=1e-11)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("cls_only", [False, True], ids=["all", "cls"])
@pytest.mark.parametrize("backend", ["xformers", "varlen"])
def test_attention_backends_agree(float64, monkeypatch, backend, cls_only):
    vit, groups = make_vit(drop_path_rate=0.5), crops_by_size()
    vit.cls_only = cls_only
    want = features_and_gradients(vit, lambda: vit(groups))
    monkeypatch.setattr(AttentionBackend, "for_inputs", lambda *args: backend)
    got = features_and_gradients(vit, lambda: vit(groups))
    assert_equal_results(got, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packing_agrees_under_autocast(dtype):
    vit, groups = make_vit(drop_path_rate=0.5), crops_by_size()
    got = features_and_gradients(vit, lambda: vit(groups), autocast=dtype)
    vit.cls_only = False
    want = features_and_gradients(
        vit, lambda: torch.cat([vit(images) for images in groups]), autocast=dtype
    )
    assert got[0].dtype == want[0].dtype == torch.float32
    assert_equal_results(got, want, rtol=0.1, atol=0.1)


def test_a_bf16_network_returns_bf16():
    vit = make_vit(drop_path_rate=0.5).bfloat16()
    assert vit([images.bfloat16() for images in crops_by_size()]).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gpu_attention_backends_agree(backend, dtype, compiled):
    sequences = ((2, 17), (2, 7), (2, 2))
    problem = attention_problem(backend, AttentionInputs(CUDA, dtype, 32, sequences))
    if problem is not None:
        pytest.skip(f"no {backend}: {problem}")
    vit = make_vit(embed_dim=96).to(CUDA)
    groups = [images.to(CUDA) for images in crops_by_size()]
    want = features_and_gradients(vit, lambda: torch.cat([vit(images) for images in groups]))
    vit.attention = AttentionBackend(backend, dtype)
    if compiled:
        for block in vit.blocks:
            block.compile(fullgraph=True)
    got = features_and_gradients(vit, lambda: vit(groups), autocast=dtype)
    for ours, theirs in zip([got[0], *got[1]], [want[0], *want[1]], strict=True):
        assert (ours - theirs).norm() <= 0.03 * theirs.norm()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("backend", "compiler"),
    [
        ("sdpa", "aot_eager"),
        pytest.param("xformers", "eager", marks=pytest.mark.slow),
        pytest.param("varlen", "eager", marks=pytest.mark.slow),
    ],
)
def test_blocks_compile_without_graph_breaks_or_recompilation(monkeypatch, backend, compiler):
    monkeypatch.setattr(AttentionBackend, "for_inputs", lambda *args: backend)
    torch._dynamo.reset()
    vit, groups = make_vit(depth=4, drop_path_rate=0.3), crops_by_size()

    def step():
        with torch.no_grad():
            teacher = vit.eval()(groups[:1])
        return teacher, features_and_gradients(vit.train(), lambda: vit(groups))

    want = step()
    counter = CompileCounterWithBackend(compiler)
    for block in vit.blocks:
        block.compile(fullgraph=True, backend=counter)
    for _ in range(3):
        got = step()
        # Student: block without and with stochastic depth, last block. Teacher: block, last block.
        assert counter.frame_count == 5
        torch.testing.assert_close(got[0], want[0])
        assert_equal_results(got[1], want[1], rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_the_last_block_computes_only_cls():
    vit, groups = make_vit(), crops_by_size()
    rows = []
    for block in vit.blocks:
        block.mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape))
    vit(groups)
    assert rows == [(4 * 17 + 6 * 7 + 2 * 2, 24)] * 2 + [(12, 24)]
    rows.clear()
    vit.get_intermediate_layers(groups[0])
    assert rows == [(4 * 17, 24)] * 3


@pytest.mark.parametrize("drop_path_rate", [0, 0.3])
def test_recompute_keeps_less_and_repeats_no_product(float64, drop_path_rate):
    kept, products, results = [], [], []
    vit = make_vit(depth=3, drop_path_rate=drop_path_rate)
    groups = [torch.randn(4, 3, 32, 32), torch.randn(8, 3, 16, 16)]
    own = {p.data_ptr() for p in vit.parameters()}
    for recompute in (False, True):
        for block in vit.blocks:
            block.recompute = recompute
        saved = {}

        def pack(tensor, saved=saved):
            if tensor.untyped_storage().data_ptr() not in own:
                storage = tensor.untyped_storage()
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        torch.manual_seed(0)
        with FlopCounterMode(display=False) as flops:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                out = vit(groups)
            kept.append(sum(saved.values()))
            results.append((out, *torch.autograd.grad(out.square().sum(), list(vit.parameters()))))
        products.append(flops.get_total_flops())
    assert kept[1] < 0.75 * kept[0]
    assert products[1] == products[0]
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_images_smaller_than_a_patch_are_an_error():
    with pytest.raises(ValueError, match="images of 8 x 7 px are smaller than a 8 px patch"):
        make_vit()(torch.zeros(1, 3, 8, 7))


def test_position_embedding_is_resized_as_in_the_paper(float64):
    vit = VisionTransformer(patch_size=16, embed_dim=8, depth=1, num_heads=1)
    assert vit.positions((224, 224)) is vit.positions((230, 230)) is vit.pos_embed
    grid = vit.pos_embed[:, 1:].reshape(1, 14, 14, 8).permute(0, 3, 1, 2)
    want = nn.functional.interpolate(grid, scale_factor=(6.1 / 14, 9.1 / 14), mode="bicubic")
    got = vit.positions((96, 150))
    assert torch.equal(got[:, 1:], want.permute(0, 2, 3, 1).reshape(1, 54, 8))
    assert torch.equal(got[:, :1], vit.pos_embed[:, :1])
    # Without the 0.1, the sampling positions differ.
    by_size = nn.functional.interpolate(grid, size=(6, 9), mode="bicubic")
    assert not torch.allclose(want, by_size)
    # For images that are not square, the paper resizes even to the same grid.
    want = nn.functional.interpolate(grid, scale_factor=(14.1 / 14, 14.1 / 14), mode="bicubic")
    got = vit.positions((224, 230))[:, 1:]
    assert torch.equal(got, want.permute(0, 2, 3, 1).reshape(1, 196, 8))
    assert not torch.allclose(got, vit.pos_embed[:, 1:])


def test_last_selfattention_returns_the_weights_of_the_last_block(float64):
    vit = make_vit(depth=2).eval()
    images = torch.randn(2, 3, 16, 24)
    weights = vit.get_last_selfattention(images)
    assert weights.shape == (2, 3, 7, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7))
    layout = token_layout(((2, 7),), CPU, "sdpa")
    block, tokens = vit.blocks[1], vit.embed(images).flatten(0, 1)
    tokens = block.norm1(vit.blocks[0](tokens, layout))
    value = block.attn.qkv(tokens).unflatten(-1, (3, 3, 8))[:, 2].unflatten(0, (2, 7))
    mixed = torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2).flatten(0, 1)
    torch.testing.assert_close(block.attn.proj(mixed), block.attn(tokens, layout))


def test_intermediate_layers(float64):
    vit = make_vit().eval()
    images = torch.randn(2, 3, 16, 16)
    layers = vit.get_intermediate_layers(images, n=2)
    assert [layer.shape for layer in layers] == [(2, 5, 24)] * 2
    torch.testing.assert_close(layers[-1][:, 0], vit(images))
    layout = token_layout(((2, 5),), CPU, "sdpa")
    x = vit.embed(images).flatten(0, 1)
    for block in vit.blocks[:2]:
        x = block(x, layout)
    torch.testing.assert_close(layers[0].flatten(0, 1), vit.norm(x))


def test_stochastic_depth_is_off_in_eval_mode():
    vit, images = make_vit(drop_path_rate=0.9), crops_by_size()[0]
    assert not torch.equal(vit(images), vit(images))
    assert torch.equal(vit.eval()(images), vit(images))


@pytest.mark.parametrize(("depth", "rate"), [(12, 0.1), (24, 0.4), (2, 0.5), (1, 0.3)])
def test_stochastic_depth_rates_grow_from_block_to_block_as_in_the_paper(depth, rate):
    vit = make_vit(depth=depth, drop_path_rate=rate)
    assert vit.drop_path_rates == pytest.approx(torch.linspace(0, rate, depth).tolist(), rel=1e-6)


def test_stochastic_depth_drops_a_branch_at_its_rate_and_keeps_the_mean(float64):
    torch.manual_seed(0)
    rates, images = [0.1, 0.5], [20_000, 20_000]
    scales = draw_branch_scales(rates, images, dtype=torch.float64, device=CPU)
    assert scales.shape == (2, 2, 40_000)
    for rate, branches in zip(rates, scales, strict=True):
        for part in branches.unflatten(1, (2, 20_000)).flatten(0, 1):  # 5 standard errors
            error = 5 * (rate * (1 - rate) / 20_000) ** 0.5
            assert (part == 0).double().mean().item() == pytest.approx(rate, abs=error)
            assert part.mean().item() == pytest.approx(1, abs=error / (1 - rate))
    dropped = (scales == 0).double().flatten(0, 1)
    assert (torch.corrcoef(dropped) - torch.eye(4)).abs().max() < 0.04, "independent branches"


@pytest.mark.parametrize(("ranks", "passes"), [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_depth_drawn_per_step_does_not_depend_on_who_computes_an_image(ranks, passes):
    """Two global and three local crops of 12 images, in calls of one size or of both."""

    def draw(iteration, places, *calls):
        draws, own = StepDraws(5), len(range(12)[places])
        draws.start_pass(iteration, places, 12)
        made = [draws([0.5, 0.1], [n * own for n in call], dtype=torch.float32, device=CPU)
                for call in calls]  # fmt: skip
        return torch.cat(made, dim=2).unflatten(2, (5, own))  # [blocks, branches, crops, images]

    whole, other = (draw(iteration, slice(0, 12), (2, 3)) for iteration in (7, 8))
    assert not torch.equal(whole, other)
    crops = whole[0, 0]
    assert all(not torch.equal(a, b) for i, a in enumerate(crops) for b in crops[:i])
    size = 12 // passes
    for part in range(passes):
        for rank in range(ranks):
            places = slice(part * size + rank, (part + 1) * size, ranks)
            for calls in ([(2, 3)], [(2,), (3,)]):
                assert torch.equal(draw(7, places, *calls), whole[..., places])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stochastic_depth_draws_in_the_dtype_of_the_branches(dtype):
    """As in the paper's code, other images are dropped in half precision."""
    torch.manual_seed(0)
    kept = draw_branch_scales([0.3], [50], dtype=dtype, device=CPU)
    torch.manual_seed(0)
    for got in kept[0]:
        want = (0.7 + torch.rand(50, dtype=dtype)).floor_()
        assert torch.equal(got > 0, want > 0)
        # The factor is not rounded to half precision: 1/0.7 in fp32, or in fp64.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert got.dtype == wide
        assert torch.equal(got.max(), torch.tensor(1, dtype=wide) / 0.7)


@pytest.mark.parametrize(
    "sizes",
    [[(32, 32)] * 3, [(32, 32)] * 2 + [(16, 16)] * 2, [(32, 16)] * 2 + [(24, 16)] * 2],
    ids=["one size", "two sizes", "two heights"],
)
def test_packing_supports_any_combination_of_crops(float64, sizes):
    wrapper = MultiCropWrapper(make_vit(drop_path_rate=0.5), nn.Identity())
    crops = [torch.randn(2, 3, *size) for size in sizes]
    results = []
    for wrapper.packing in (False, True):
        results.append(features_and_gradients(wrapper.backbone, lambda: wrapper(crops)))
    assert results[0][0].shape == (2 * len(sizes), 24)
    assert_equal_results(results[1], results[0], rtol=1e-10, atol=1e-12)
