"""Networks: initial values, positions, registers, drop path, head."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

VIT = "fastdino/models/vit.py"
HEAD = "fastdino/models/head.py"
DROP_PATH = "fastdino/models/drop_path.py"
LINEAR = "fastdino/models/linear_layer.py"
RUNTIME = "fastdino/runtime.py"
LINEAR_TESTS = ("tests/test_linear_layer.py",)
MODEL_TESTS = ("tests/test_models.py",)
INITIAL_TESTS = ("tests/test_models.py::test_initial_values_of_every_parameter_are_the_papers",)
CACHE_TESTS = (
    "tests/test_fast.py::test_bf16_update_writes_the_normalised_last_layer_of_the_teacher",
)
SHAPE_TESTS = ("tests/test_network_shapes.py",)
VIT_TESTS = tuple(
    f"tests/test_vit.py::{name}"
    for name in (
        "test_packing_and_cls_only_match_the_papers_code",
        "test_position_embedding_is_resized_as_in_the_paper",
        "test_last_selfattention_returns_the_weights_of_the_last_block",
        "test_intermediate_layers",
        "test_stochastic_depth_draws_in_the_dtype_of_the_branches",
    )
)
LAYOUT_TESTS = (
    "tests/test_weight_layouts.py::test_layer_scale_and_registers_of_dinov2_are_loaded",
    "tests/test_weight_layouts.py::test_registers_take_part_in_attention_but_are_not_returned",
)

MUTANTS = (
    Mutant(
        VIT, "(self.pos_embed, std=0.02)", "(self.pos_embed, std=0.2)", INITIAL_TESTS, reported=True
    ),
    Mutant(VIT, "(self.cls_token, std=0.02)", "(self.cls_token, std=0.2)", INITIAL_TESTS),
    Mutant(VIT, "(module.weight, std=0.02)", "(module.weight, std=0.2)", INITIAL_TESTS),
    Mutant(VIT, "nn.init.zeros_(module.bias)", "pass", INITIAL_TESTS),
    Mutant(
        VIT,
        "drop_path_rate * i / max(depth - 1, 1)",
        "drop_path_rate * (i + 1) / depth",
        SHAPE_TESTS,
    ),
    Mutant(VIT, "(grid[1] + 0.1) / side", "(grid[1] + 0.9) / side", VIT_TESTS),
    Mutant(
        VIT,
        'size=grid, mode="bicubic", antialias=True',
        'size=grid, mode="bicubic"',
        SHAPE_TESTS,
    ),
    Mutant(
        VIT, "torch.cat((x[:, :1], registers, x[:, 1:])", "torch.cat((registers, x)", LAYOUT_TESTS
    ),
    Mutant(VIT, "len(self.blocks) - i <= n", "len(self.blocks) - i < n", VIT_TESTS),
    Mutant(
        VIT,
        "math.sqrt(query.shape[-1])\n        return scores.softmax(dim=-1)\n\n    def first",
        "math.sqrt(key.shape[1])\n        return scores.softmax(dim=-1)\n\n    def first",
        VIT_TESTS,
    ),
    Mutant(
        "fastdino/models/weight_names.py",
        'factor = gamma[:, None] if kind == "weight" else gamma',
        "factor = gamma",
        LAYOUT_TESTS,
    ),
    Mutant(
        DROP_PATH,
        ".to(torch.promote_types(numbers.dtype, torch.float32))",
        ".to(numbers.dtype)",
        VIT_TESTS,
        reported=True,
    ),
    Mutant(DROP_PATH, "torch._foreach_div_(list(scales), keep)", "pass", VIT_TESTS),
    Mutant(DROP_PATH, "torch.rand(images, dtype=dtype", "torch.rand(images", VIT_TESTS),
    Mutant(
        HEAD, "torch.ones(out_features, 1)", "torch.full((out_features, 1), 2.0)", INITIAL_TESTS
    ),
    Mutant(
        HEAD, "train_magnitude=not norm_last_layer", "train_magnitude=norm_last_layer", MODEL_TESTS
    ),
    Mutant(HEAD, "self.mlp.apply(init_linear)", "pass", INITIAL_TESTS),
    Mutant(HEAD, "F.normalize(self.mlp(x), dim=-1)", "self.mlp(x)", MODEL_TESTS),
    Mutant(HEAD, "hidden_dim: int = 2048", "hidden_dim: int = 1024", SHAPE_TESTS),
    Mutant(
        HEAD,
        "groupby(crops, key=_size)",
        "groupby(crops, key=id)",
        ("tests/test_models.py::test_one_backbone_pass_per_crop_size_keeps_the_order",),
    ),
    Mutant(HEAD, "layer.cache_weight()", "pass", CACHE_TESTS),
    Mutant(
        "fastdino/models/weights.py",
        'weights["pos_embed"] = module.positions((img_size, img_size)).detach().clone()',
        "pass",
        ("tests/test_weights.py::test_initial_weights_have_the_patch_grid_of_the_run",),
    ),
    Mutant(LINEAR, "_product(dy.t(), x) if", "_product(dy.t(), 2 * x) if"),
    Mutant(LINEAR, "dy.sum(0) if needs_bias", "dy.sum(0) if needs_x"),
    Mutant(LINEAR, '        and not torch.is_autocast_enabled("cpu")\n', ""),
    Mutant(LINEAR, "        and a.numel() > 0\n", ""),
    Mutant(LINEAR, "a.dtype == b.dtype == torch.float32", "a.dtype == b.dtype"),
    Mutant(LINEAR, "a, b.t(), bias, ", "a, b.t(), None, "),
    Mutant(LINEAR, "a.shape[-1] == b.shape[0]", "a.dim() >= 2"),
    Mutant(LINEAR, "torch._C._functorch.peek_interpreter_stack() is None", "a.dim() >= 2"),
    Mutant(LINEAR, "if not distance < 1e-5", "if distance > 1e-5"),
    Mutant(HEAD, "linear(x, weight, onednn=self.onednn)", "linear(x, weight, onednn=False)",
           LINEAR_TESTS),
    Mutant(HEAD, "weight_v.to(dy.dtype), onednn=ctx.onednn", "weight_v.to(dy.dtype), onednn=False",
           LINEAR_TESTS),
    Mutant(VIT, "self.proj.bias, onednn=self.onednn", "self.proj.bias, onednn=False", LINEAR_TESTS),
    Mutant(RUNTIME, "speedup >= cpu_speed.ONEDNN_GAIN", "speedup > cpu_speed.ONEDNN_GAIN",
           LINEAR_TESTS),
    Mutant(RUNTIME, "layer.onednn = self.onednn.on", "layer.onednn = True", LINEAR_TESTS),
)  # fmt: skip
