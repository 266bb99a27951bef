"""Networks: initial values, drop path, head."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

VIT = "fastdino/models/vit.py"
HEAD = "fastdino/models/head.py"
MODEL_TESTS = ("tests/test_vit.py", "tests/test_models.py")

MUTANTS = (
    Mutant(VIT, "(self.pos_embed, std=0.02)", "(self.pos_embed, std=0.2)", MODEL_TESTS),
    Mutant(VIT, "(self.cls_token, std=0.02)", "(self.cls_token, std=0.2)", MODEL_TESTS),
    Mutant(VIT, "(module.weight, std=0.02)", "(module.weight, std=0.2)", MODEL_TESTS),
    Mutant(
        "fastdino/models/drop_path.py",
        ".to(torch.promote_types(dtype, torch.float32))",
        ".to(dtype)",
        MODEL_TESTS,
    ),
    Mutant(HEAD, "torch.ones(out_features, 1)", "torch.full((out_features, 1), 2.0)", MODEL_TESTS),
    Mutant(
        HEAD, "train_magnitude=not norm_last_layer", "train_magnitude=norm_last_layer", MODEL_TESTS
    ),
    Mutant(HEAD, "self.mlp.apply(init_linear)", "pass", MODEL_TESTS),
    Mutant(
        HEAD,
        "groupby(crops, key=_size)",
        "groupby(crops, key=id)",
        MODEL_TESTS,
        equivalent="the same result, one backbone pass per crop: only slower",
    ),
    Mutant(HEAD, "layer.cache_weight()", "pass", (*MODEL_TESTS, "tests/test_trainer.py")),
)
