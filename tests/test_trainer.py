"""The training step against a recorded trajectory of the paper's code and its equations."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastdino_kernels import reference
from torch import nn

from fastdino import TrainConfig, Trainer
from fastdino.checkpoint import strip_prefix
from fastdino.errors import CheckpointError
from fastdino.models.attention import BACKENDS, AttentionInputs, attention_problem
from tests.processes import run_two
from tests.small_networks import shrink_networks
from tests.test_schedules import paper_schedule

GOLDEN = json.loads((Path(__file__).parent / "data" / "dino_vit_tiny.json").read_text())


def golden_trainer(**path: Any) -> Trainer:
    recorded = GOLDEN["config"]
    names = TrainConfig.__dataclass_fields__
    settings = {name: value for name, value in recorded.items() if name in names}
    config = TrainConfig(
        **settings,
        batch_size_per_gpu=recorded["batch_size"],
        drop_path_rate=0.0,
        **({"use_fp16": False, "device": "cpu"} | path),
    )
    trainer = Trainer(config, steps_per_epoch=recorded["iters_per_epoch"])
    for network in (trainer.student, trainer.teacher):
        for name, tensor in network.state_dict().items():
            tensor.copy_(torch.from_numpy(golden_weight(name, tuple(tensor.shape))))
    return trainer


def golden_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("weight_g"):
        return np.ones(shape)
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    noise = 0.02 * generator.standard_normal(shape)
    return 1 + noise if "norm" in name and name.endswith("weight") else noise


def golden_crops(iteration: int) -> list[torch.Tensor]:
    recorded = GOLDEN["config"]
    crops = []
    for j in range(2 + recorded["local_crops_number"]):
        size = recorded["global_px"] if j < 2 else recorded["local_px"]
        generator = np.random.Generator(np.random.PCG64([recorded["seed"], iteration, j]))
        pixels = generator.standard_normal((recorded["batch_size"], 3, size, size))
        crops.append(torch.from_numpy(pixels).to(torch.get_default_dtype()))
    return crops


# Numbers of steps. FEW: until a loss after an update; the first learning rate is 0. UNFROZEN: until
# a loss after an update of the last layer, which is frozen in the first of three epochs of 4 steps.
FEW, UNFROZEN, ALL = 3, 6, len(GOLDEN["steps"])
slow = pytest.mark.slow
small = pytest.mark.usefixtures("small_networks")


@pytest.mark.parametrize(
    ("packing", "last_block", "steps"),
    [
        ("on", "cls", UNFROZEN),
        *(
            pytest.param(packing, last_block, ALL, marks=slow)
            for packing in ("on", "off")
            for last_block in ("cls", "all")
        ),
    ],
)
def test_float64_matches_recorded_trajectory(float64, packing, last_block, steps):
    trainer = golden_trainer(packing=packing, last_block=last_block)
    for i, expected in enumerate(GOLDEN["steps"][:steps]):
        loss = trainer.train_step(golden_crops(i)).item()
        group = trainer.optimizer.param_groups[0]
        got = {
            "loss": loss,
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
            "center_norm": trainer.loss.center.norm().item(),
        }
        assert got == pytest.approx({name: expected[name] for name in got}, rel=1e-8), f"step {i}"
    schedules = {
        "lr": trainer.lr_schedule,
        "weight_decay": trainer.weight_decay_schedule,
        "momentum": trainer.momentum_schedule,
        "teacher_temp": lambda i: float(trainer.loss.teacher_temp_schedule[i // 4]),
    }
    for name, schedule in schedules.items():
        expected = [step[name] for step in GOLDEN["steps"]]
        assert [schedule(i) for i in range(ALL)] == pytest.approx(expected, rel=1e-8), name
    if steps == ALL:
        assert_golden_networks(trainer)


def assert_golden_networks(trainer: Trainer) -> None:
    """Compare the weights after the last step, and features of the teacher."""
    for name, network in (("student", trainer.student), ("teacher", trainer.teacher)):
        got = {n: [p.sum().item(), p.norm().item()] for n, p in network.named_parameters()}
        assert got.keys() == GOLDEN["final"][name].keys()
        for parameter, values in got.items():
            expected = GOLDEN["final"][name][parameter]
            assert values == pytest.approx(expected, rel=1e-8, abs=1e-9), f"{name} {parameter}"
    generator = np.random.Generator(np.random.PCG64([GOLDEN["config"]["seed"], 1000000, 0]))
    probe = torch.from_numpy(generator.standard_normal((2, 3, 224, 224)))
    features = trainer.teacher.backbone(probe)
    expected = torch.tensor(GOLDEN["probe_feature_first8"])
    torch.testing.assert_close(features[:, :8], expected, rtol=1e-8, atol=1e-10)
    assert features.norm(dim=1).tolist() == pytest.approx(GOLDEN["probe_feature_norm"], rel=1e-8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("attention", BACKENDS)
def test_mixed_precision_on_a_gpu_stays_close_to_recorded_trajectory(attention, packing):
    problem = attention_problem(attention, AttentionInputs(torch.device("cuda"), torch.bfloat16))
    if problem is not None:
        pytest.skip(f"no {attention}: {problem}")
    settings = {"device": "cuda", "use_fp16": True, "amp_dtype": "bf16"}
    assert_golden_losses(golden_trainer(attention=attention, packing=packing, **settings), 2e-2)


@pytest.mark.parametrize("steps", [FEW, pytest.param(ALL, marks=slow)])
def test_float32_matches_recorded_trajectory_within_rounding(steps):
    assert_golden_losses(golden_trainer(), 1e-4, steps)


def assert_golden_losses(trainer: Trainer, rel: float, steps: int = ALL) -> None:
    losses = [trainer.train_step(golden_crops(i)).item() for i in range(steps)]
    assert losses == pytest.approx([step["loss"] for step in GOLDEN["steps"][:steps]], rel=rel)


class PlainDINO:
    """The paper's training step from the reference equations; only the networks are fastdino's."""

    def __init__(self, config, steps, student, teacher):
        self.config, self.steps, self.iteration = config, steps, 0
        self.student, self.teacher = student, teacher
        self.center = torch.zeros(1, config.out_dim)
        self.moments = {}
        lr = config.lr * config.split_batch(1).images_per_step / 256
        length = config.epochs, steps
        self.lr = paper_schedule(lr, config.min_lr, *length, config.warmup_epochs)
        self.decay = paper_schedule(config.weight_decay, config.weight_decay_end, *length)
        self.momentum = paper_schedule(config.momentum_teacher, 1.0, *length)

    def step(self, crops):
        c, i, rows = self.config, self.iteration, len(crops[0])
        epoch = i // self.steps
        warm = np.linspace(c.warmup_teacher_temp, c.teacher_temp, c.warmup_teacher_temp_epochs)
        temp = warm[epoch] if epoch < len(warm) else c.teacher_temp
        parts = zip(*(crop.chunk(c.grad_accum) for crop in crops), strict=True)
        losses, sums = zip(*(self.loss(part, temp) for part in parts), strict=True)
        if c.centering == "centering":
            self.center = reference.update_center(self.center, sum(sums), 2 * rows, 0.9)
        loss = torch.stack(losses).mean()
        self.student.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, p in self.student.named_parameters():
                if not p.requires_grad or (epoch < c.freeze_last_layer and "last_layer" in name):
                    continue
                (gradient,), _ = reference.clip_grad_norms([p.grad], c.clip_grad or math.inf)
                decay = 0.0 if p.ndim == 1 or name.endswith(".bias") else self.decay[i]
                p.copy_(getattr(self, c.optimizer)(name, p, gradient, self.lr[i], decay))
            teachers, students = list(self.teacher.parameters()), list(self.student.parameters())
            averages = reference.ema_update(teachers, students, self.momentum[i])
            for p, average in zip(teachers, averages, strict=True):
                p.copy_(average)
        self.iteration += 1
        return loss.item()

    def loss(self, crops, temp):
        """Return the loss of one forward pass and the sum of the teacher's logits."""
        rows = len(crops[0])
        with torch.no_grad():
            teacher = self.teacher(crops[:2]).unflatten(0, (2, rows))
        student = self.student(crops).unflatten(0, (len(crops), rows))
        loss, teacher_sum = reference.dino_loss(student, teacher, self.center, 0.1, temp)
        if self.config.centering == "sinkhorn":
            probs = reference.sinkhorn_knopp(teacher.flatten(0, 1), temp, 3).reshape(teacher.shape)
            pairs = reference.soft_cross_entropy(student, probs, 0.1, ignore_diagonal=True)
            loss = pairs.mean(1).sum() / (2 * len(crops) - 2)
        if self.config.koleo_weight:
            features = [self.student.backbone(crop) for crop in crops[:2]]
            koleo = sum(reference.koleo_loss(x, x, 0, 1) for x in features)
            loss = loss + self.config.koleo_weight * koleo
        return loss, teacher_sum

    def adamw(self, name, p, g, lr, decay):
        m, v, t = self.moments.get(name, (torch.zeros_like(p), torch.zeros_like(p), 0))
        options = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": decay}
        p, m, v = reference.adamw(p, g, m, v, t + 1, **options)
        self.moments[name] = (m, v, t + 1)
        return p

    def sgd(self, name, p, g, lr, decay):
        self.moments[name] = 0.9 * self.moments.get(name, 0) + (g + decay * p)
        return p - lr * self.moments[name]

    def lars(self, name, p, g, lr, decay):
        if p.ndim != 1:
            g = g + decay * p
            if p.norm() > 0 and g.norm() > 0:
                g = g * (0.001 * p.norm() / g.norm())
        return self.sgd(name, p, g, lr, 0.0)


@small
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "sgd", "clip_grad": 0.0, "freeze_last_layer": 0},
        {"optimizer": "lars", "lr": 5.0, "norm_last_layer": False},
        {"norm_last_layer": False, "freeze_last_layer": 2, "clip_grad": 0.05},
        {"local_crops_number": 0, "warmup_teacher_temp": 0.02, "warmup_teacher_temp_epochs": 2},
        # Gradients that are 0 but for rounding, as batch norm makes them, are large to AdamW.
        {"use_bn_in_head": True, "warmup_epochs": 0, "momentum_teacher": 0.9, "optimizer": "sgd"},
        {"batch_size_per_gpu": 2, "grad_accum": 2},
        {"packing": "on", "drop_path_rate": 0.5},
        {"arch": "xcit_nano_12_p16", "global_crops_size": 48, "local_crops_size": 32},
        {"centering": "sinkhorn", "warmup_teacher_temp": 0.02, "warmup_teacher_temp_epochs": 2},
        {"koleo_weight": 0.3, "packing": "off", "local_crops_size": 32, "last_block": "all"},
        {"centering": "sinkhorn", "koleo_weight": 0.1, "batch_size_per_gpu": 2, "grad_accum": 2},
    ],
    ids=lambda settings: "-".join(settings) or "default",
)
def test_every_setting_matches_the_equations(float64, tiny, settings, crops_of):
    """The reference networks run one pass per crop size and all tokens through all blocks."""
    config = tiny(**settings)
    trainer = Trainer(config, steps_per_epoch=2)
    plain_config = dataclasses.replace(config, packing="off", last_block="all")
    other = Trainer(plain_config, steps_per_epoch=2)
    plain = PlainDINO(config, 2, other.student, other.teacher)
    for i in range(3 if "arch" in settings else 6):
        crops = crops_of(config, i)
        torch.manual_seed(i)  # for stochastic depth
        loss = trainer.train_step(crops).item()
        torch.manual_seed(i)
        assert loss == pytest.approx(plain.step(crops), rel=1e-9)
    torch.testing.assert_close(trainer.loss.center, plain.center, rtol=1e-9, atol=1e-12)
    for ours, theirs in ((trainer.student, plain.student), (trainer.teacher, plain.teacher)):
        for name, parameter in ours.named_parameters():
            expected = dict(theirs.named_parameters())[name]
            torch.testing.assert_close(parameter, expected, rtol=1e-7, atol=1e-10, msg=name)


@small
@pytest.mark.parametrize("written_by", ["this version", "the paper's code", "version 0"])
def test_checkpoints_are_resumed(tiny, crops_of, written_by):
    config = tiny()
    source = Trainer(config, steps_per_epoch=2)
    for i in range(2):
        source.train_step(crops_of(config, i))
    state = source.state_dict()
    if written_by == "the paper's code":
        keys = ("student", "teacher", "optimizer", "dino_loss", "epoch")
        state = {key: state[key] for key in keys}
    elif written_by == "version 0":
        state["student"] = strip_prefix(state["student"], "module.")
    trainer = Trainer(config, steps_per_epoch=2)
    trainer.load_state_dict(state)
    assert trainer.iteration == 2
    crops = crops_of(config, 2)
    assert trainer.train_step(crops).item() == source.train_step(crops).item()


@pytest.mark.parametrize(
    "settings", [{}, {"use_bn_in_head": True}, {"arch": "resnet18"}], ids=lambda s: str(s)
)
def test_the_papers_code_resumes_a_checkpoint(tiny, settings):
    """The paper's code loads with strict=False, so that other names are passed over in silence."""
    trainer = Trainer(tiny(**settings), steps_per_epoch=2)
    state = trainer.state_dict()
    wrapped = nn.ModuleDict({"module": trainer.student})  # the names of DistributedDataParallel
    teacher = nn.ModuleDict({"module": trainer.teacher}) if settings else trainer.teacher
    assert wrapped.load_state_dict(state["student"], strict=False) == ([], [])
    assert teacher.load_state_dict(state["teacher"], strict=False) == ([], [])


@pytest.mark.parametrize(
    ("settings", "steps", "message"),
    [
        ({}, 3, "had 2 steps per epoch, this one has 3"),
        ({"out_dim": 32}, 2, r"head.last_layer.weight_g is \(64, 1\), expected \(32, 1\)"),
        ({"arch": "vit_tiny"}, 2, "more; use the --arch"),
        ({"norm_last_layer": False}, 2, r"over 31 \+ 54 parameters, this run's is adamw over 32"),
        ({"optimizer": "sgd"}, 2, "optimizer is adamw .*, this run's is sgd"),
        ({"optimizer": "lars"}, 2, "optimizer is adamw .*, this run's is lars"),
    ],
)
def test_checkpoint_of_another_network_or_length_is_rejected(tiny, settings, steps, message):
    state = Trainer(tiny(), steps_per_epoch=2).state_dict()
    other = Trainer(tiny(**settings), steps_per_epoch=steps)
    with pytest.raises(CheckpointError, match=message):
        other.load_state_dict(state)


@small
@pytest.mark.parametrize(
    ("settings", "name"),
    [({}, "exp_avg"), ({"mode": "fast", "compile": "off"}, "exp_avg"),
     ({"optimizer": "sgd"}, "momentum_buffer"), ({"optimizer": "lars"}, "mu")],
    ids=str,
)  # fmt: skip
def test_moments_of_another_size_or_kind_are_rejected(tiny, crops_of, settings, name):
    config = tiny(**settings)
    trainer = Trainer(config, steps_per_epoch=2)
    trainer.train_step(crops_of(config, 0))
    shape = trainer.state_dict()["optimizer"]["state"][0][name].shape
    for wrong in (torch.zeros(1), torch.zeros(shape).to_sparse(), torch.zeros(shape) + 0j, "text",
                  torch.zeros(shape, device="meta")):  # fmt: skip
        state = trainer.state_dict()
        state["optimizer"]["state"][0][name] = wrong
        with pytest.raises(CheckpointError, match=f"{name} of the optimizer's parameter 0 is"):
            Trainer(config, steps_per_epoch=2).load_state_dict(state)


@small
@pytest.mark.parametrize("mode", ["parity", "fast"])
def test_expanded_moments_and_other_settings_in_a_checkpoint_are_harmless(tiny, crops_of, mode):
    """A fused update would write beyond the one number that an expanded tensor has."""
    config = tiny(mode=mode, compile="off")
    source = Trainer(config, steps_per_epoch=2)
    source.train_step(crops_of(config, 0))
    losses = []
    for expanded in (False, True):
        state = copy.deepcopy(source.state_dict())
        for moments in state["optimizer"]["state"].values():
            shape = moments["exp_avg"].shape
            for name, value in (("exp_avg", 0.0), ("exp_avg_sq", 1.0)):
                one = torch.full((1,), value).expand(shape)
                moments[name] = one if expanded else one.contiguous()
        if expanded:
            state["optimizer"]["param_groups"][0] |= {"betas": "text", "eps": None}
        trainer = Trainer(config, steps_per_epoch=2)
        trainer.load_state_dict(state)
        losses.append([trainer.train_step(crops_of(config, i)).item() for i in (1, 2)])
    assert losses[0] == losses[1]


@small
@pytest.mark.parametrize(
    ("name", "value"),
    [("epoch", None), ("epoch", -1), ("epoch", True), ("iteration", "2"), ("iteration", -1),
     ("iteration", torch.tensor(2)), ("iteration", 2.0)],
)  # fmt: skip
def test_counts_of_a_checkpoint_must_be_whole_numbers(tiny, name, value):
    trainer = Trainer(tiny(), steps_per_epoch=2)
    with pytest.raises(CheckpointError, match=f"{name} must be a whole number"):
        trainer.load_state_dict(trainer.state_dict() | {name: value})


@small
def test_entropy_is_measured_every_print_freq_steps_and_at_epoch_starts(float64, tiny, crops_of):
    config = tiny(print_freq=2, grad_accum=2)
    trainer = Trainer(config, steps_per_epoch=3)
    crops = crops_of(config, 0)
    logits = trainer.teacher(crops[:2]) / config.teacher_temp
    expected = torch.distributions.Categorical(logits=logits).entropy().mean()
    trainer.train_step(crops)
    assert trainer.entropy.item() == pytest.approx(expected.item(), rel=1e-10)
    measured = []
    for i in range(1, 6):
        trainer.train_step(crops_of(config, i))
        measured.append(trainer.entropy is not None)
    assert measured == [False, True, True, True, False]


# Settings of two ranks with half of each batch, settings of one rank that trains alike, and the
# order of its images: Sinkhorn-Knopp balances one forward pass of all ranks, KoLeo compares the
# images of one forward pass of one rank.
IN_ORDER = list(range(8))
ON_TWO_RANKS = [
    ({"centering": "sinkhorn", "fsdp": True}, {"fsdp": False}, IN_ORDER),
    ({"centering": "sinkhorn", "grad_accum": 2}, {}, [0, 1, 4, 5, 2, 3, 6, 7]),
    ({"koleo_weight": 0.3}, {"grad_accum": 2}, IN_ORDER),
    ({"koleo_weight": 0.3, "fsdp": True}, {"fsdp": False, "grad_accum": 2}, IN_ORDER),
    ({"koleo_weight": 0.3, "mode": "fast"}, {"mode": "parity", "grad_accum": 2}, IN_ORDER),
]


def train_on(trainer, batches, rows):
    """Train on some rows of each batch; return the losses, the last terms and the student."""
    losses = [trainer.train_step([crop[rows] for crop in batch]).item() for batch in batches]
    trainer.verify()
    return losses, trainer.terms, trainer.state_dict()["student"]


def train_on_half(config, batches, folder):
    shrink_networks(pytest.MonkeyPatch())
    torch.set_default_dtype(torch.float64)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for i, (settings, _, _) in enumerate(ON_TWO_RANKS):
        batch = {"batch_size_per_gpu": 4 // settings.get("grad_accum", 1)}
        trainer = Trainer(TrainConfig.from_dict(config | settings | batch), 2)
        torch.save(train_on(trainer, batches, IN_ORDER[4 * rank :][:4]), folder / f"{i}-{rank}.pt")
    torch.distributed.destroy_process_group()


@small
def test_two_ranks_train_like_one(float64, tiny, crops_of, tmp_path):
    config = tiny(batch_size_per_gpu=8, epochs=2, compile="off")
    batches = [crops_of(config, i) for i in range(2)]
    run_two(train_on_half, config.to_dict(), batches, tmp_path)
    for i, (settings, changes, order) in enumerate(ON_TWO_RANKS):
        ranks = [torch.load(tmp_path / f"{i}-{rank}.pt") for rank in range(2)]
        torch.testing.assert_close(ranks[0], ranks[1], rtol=0, atol=0)
        one = settings | changes
        batch = {"batch_size_per_gpu": 8 // one.get("grad_accum", 1)}
        trainer = Trainer(dataclasses.replace(config, **one | batch), 2)
        expected = train_on(trainer, batches, order)
        torch.testing.assert_close(ranks[0], expected, rtol=1e-8, atol=1e-10)


@small
@pytest.mark.parametrize("settings", [{}, {"centering": "sinkhorn", "koleo_weight": 0.1}])
@pytest.mark.parametrize("amp_dtype", ["bf16", "fp16"])
def test_mixed_precision_is_close_to_fp32(tiny, amp_dtype, settings, crops_of):
    single, mixed = (
        Trainer(tiny(amp_dtype=dtype, **settings), steps_per_epoch=3)
        for dtype in ("auto", amp_dtype)
    )
    assert mixed.scaler.is_enabled() == (amp_dtype == "fp16")
    for i in range(2):  # later steps may be skipped because the initial loss scale is too large
        crops = crops_of(single.config, i)
        assert mixed.train_step(crops).item() == pytest.approx(
            single.train_step(crops).item(), rel=1e-2
        )
    assert next(mixed.student.parameters()).dtype == torch.float32
    assert ("fp16_scaler" in mixed.state_dict()) == (amp_dtype == "fp16")


@small
def test_koleo_of_one_image_is_rejected(tiny, crops_of):
    trainer = Trainer(tiny(batch_size_per_gpu=2, grad_accum=2, koleo_weight=0.1), 1)
    crops = crops_of(trainer.config, 0)
    with pytest.raises(ValueError, match="expected 2 or more, got a batch of 2 in grad_accum=2"):
        trainer.train_step([crop[:2] for crop in crops])
    assert trainer.terms == {}
    loss = trainer.train_step(crops)
    total = trainer.terms["dino"] + 0.1 * trainer.terms["koleo"]
    torch.testing.assert_close(loss, total)


@small
@pytest.mark.parametrize(
    ("crops", "message"),
    [
        (lambda crops: crops[:3], "expected 4 crops"),
        (lambda crops: [*crops[:3], crops[3][:, :1]], r"crop 3 must be \[4, 3, H, W\]"),
        (lambda crops: [crop[:3] for crop in crops], "a batch of 3 cannot be split"),
        (lambda crops: [crop[:0] for crop in crops], "a batch of 0 cannot be split"),
    ],
)
def test_invalid_crops_and_steps_after_the_last_epoch_are_rejected(tiny, crops, message, crops_of):
    trainer = Trainer(tiny(batch_size_per_gpu=2, grad_accum=2, epochs=1), steps_per_epoch=1)
    valid = crops_of(trainer.config, 0)
    with pytest.raises(ValueError, match=message):
        trainer.train_step(crops(valid))
    trainer.train_step(valid)
    with pytest.raises(ValueError, match="the run is over"):
        trainer.train_step(valid)
