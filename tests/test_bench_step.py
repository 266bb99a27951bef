"""`fastdino bench`, the training step: the gate, the arms, what is counted, what is told."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.nn import functional as F

from fastdino import cli
from fastdino.bench.step import arms, breakdown, compiled, flops, run, scaling
from fastdino.bench.step.arm import Setting, initial_setting, synthetic_crops
from fastdino.bench.step.breakdown import PARTS, UPDATE, Breakdown, break_down, saved_bytes
from fastdino.bench.step.gate import Gate, Verdict
from fastdino.bench.step.paper import Loss, PaperArm
from fastdino.bench.step.peers import DinoRepoArm, load_dino_repo
from fastdino.bench.step.report import ArmResult, Fed, Report, Scaling, quartiles
from fastdino.bench.step.scaling import Message, StepTime
from fastdino.config import TrainConfig
from fastdino.errors import ConfigError
from fastdino.models.compile import compile_problem
from fastdino.models.vit import VIT_ARCHS

CPU = torch.device("cpu")
TINY = """
    --arch vit_nano --patch_size 8 --out_dim 64 --global_crops_size 32 --local_crops_size 16
    --local_crops_number 2 --batch_size_per_gpu 2 --device cpu --rounds 2 --steps 1
"""

# PyTorch's own, as it traces.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    """Compiled blocks are traced, and not made into machine code, which takes a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.fixture(scope="module", autouse=True)
def two_blocks():
    """vit_nano with two of its six blocks: the profiler's events are many enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VIT_ARCHS["vit_nano"], "depth", 2)
        yield


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    sizes = {"arch": "vit_nano", "patch_size": 8, "global_crops_size": 32, "local_crops_size": 16}
    steady = {"freeze_last_layer": 0, "warmup_epochs": 0, "drop_path_rate": 0.0}
    few = {"out_dim": 64, "local_crops_number": 2, "batch_size_per_gpu": 2, "num_workers": 0}
    return TrainConfig(**sizes, **steady, **few, device="cpu", crops="torchvision")


@pytest.fixture(scope="module")
def gate(config) -> Gate:
    return Gate(config, CPU)


@pytest.fixture
def checkout(tmp_path):
    """A folder with what the arm `dino` takes of the authors' code, under the same names."""
    files = {
        "vision_transformer": """
            from types import SimpleNamespace
            from fastdino.bench.step import paper

            class VisionTransformer(paper.Backbone):
                def __init__(self, img_size, patch_size, embed_dim, **_):
                    super().__init__(SimpleNamespace(
                        arch="vit_nano", patch_size=patch_size, global_crops_size=img_size[0]
                    ))
                    self.embed_dim = embed_dim

            DINOHead = paper.Head
        """,
        "utils": """
            from torch import nn
            from fastdino.bench.step import paper
            from fastdino.training.optimizers import parameter_groups as get_params_groups

            class MultiCropWrapper(paper.Network):
                def __init__(self, backbone, head):
                    nn.Module.__init__(self)
                    self.backbone, self.head = backbone, head

            def clip_gradients(model, clip):
                for p in model.parameters():
                    if p.grad is not None:
                        p.grad.mul_((clip / (p.grad.norm() + 1e-6)).clamp(max=1))
        """,
        "main_dino": """
            from types import SimpleNamespace
            import torch.distributed as dist
            import utils
            from vision_transformer import DINOHead
            from fastdino.bench.step import paper

            class DINOLoss(paper.Loss):
                def __init__(self, K, ncrops, *temperatures):
                    super().__init__(
                        SimpleNamespace(out_dim=K, ncrops=ncrops, teacher_temp=temperatures[1])
                    )

                def forward(self, student, teacher, epoch):
                    dist.all_reduce(teacher)
                    return super().forward(student, teacher)
        """,
    }
    for name, text in files.items():
        lines = [line[12:] for line in text.splitlines()]
        (tmp_path / f"{name}.py").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


# The gate


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo reads it
@pytest.mark.parametrize("name", [name for name in arms.ARMS if name not in ("paper", "dino")])
def test_every_arm_computes_what_the_papers_step_computes(name, gate, monkeypatch):
    if name == "lightly":
        pytest.importorskip("lightly")
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    entry = arms.ARMS[name]
    verdict = gate.check(entry.build, one_size=bool(entry.one_size))
    assert verdict.green, str(verdict)
    assert set(verdict.worst) == {"loss", "gradient", "student", "center", "teacher"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_the_compiled_arm_passes_the_gate_as_it_is_timed(gate):
    assert gate.check(compiled.CompiledArm).green


def test_a_checkout_passes_the_gate_and_leaves_nothing_behind(config, checkout, monkeypatch):
    monkeypatch.setitem(sys.modules, "utils", own := SimpleNamespace())
    paths = list(sys.path)
    assert Gate(config, CPU, checkout).check(DinoRepoArm).green
    assert sys.modules["utils"] is own
    assert not {"main_dino", "vision_transformer"} & sys.modules.keys()
    assert sys.path == paths
    assert not (checkout / "__pycache__").exists()


def test_what_is_no_checkout_or_cannot_be_imported_is_told(checkout):
    (checkout / "main_dino.py").write_text("import no_such_module", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be imported: .*no_such_module"):
        load_dino_repo(checkout)
    (checkout / "utils.py").unlink()
    with pytest.raises(ConfigError, match="no checkout .*: it has no utils.py"):
        load_dino_repo(checkout)


class WrongCenter(PaperArm):
    def forward(self, crops):
        before = self.loss.center.clone()
        loss = super().forward(crops)
        self.loss.center.lerp_(before, 0.01)
        return loss


class WrongTeacher(PaperArm):
    def move_teacher(self, momentum):
        super().move_teacher(momentum - 0.01)


class NoClip(PaperArm):
    def clip_gradients(self, max_norm):
        pass


class DecaysAll(PaperArm):
    def build_optimizer(self):
        optimizer = torch.optim.AdamW(self.student.parameters())
        return optimizer


class PairsOfItself(Loss):
    def forward(self, student, teacher):
        loss = super().forward(student, teacher)
        crops = (student / 0.1).chunk(self.ncrops)
        target = F.softmax(teacher / self.teacher_temp, dim=-1).chunk(2)[0]
        return loss - 0.1 * (target * F.log_softmax(crops[0], dim=-1)).sum(dim=-1).mean()


class WrongLoss(PaperArm):
    def build(self, setting):
        student, teacher, _ = super().build(setting)
        return student, teacher, PairsOfItself(setting.config)


class NotANumber(PaperArm):
    def step(self, crops):
        return super().step(crops) * math.nan


@pytest.mark.parametrize(
    ("arm", "red"),
    [
        (WrongCenter, {"center"}),
        (WrongTeacher, {"teacher"}),
        (NoClip, {"student", "teacher"}),
        (DecaysAll, {"student"}),
        (WrongLoss, {"loss", "gradient", "student", "teacher"}),
        (NotANumber, {"loss"}),
    ],
)
def test_an_arm_that_is_wrong_is_red(arm, red, gate):
    verdict = gate.check(arm)
    assert not verdict.green
    assert {name for name, (error, _) in verdict.worst.items() if not error <= 1e-5} == red
    assert str(verdict).startswith("red, ")


def test_an_arm_that_raises_is_red_and_says_why(gate):
    def broken(setting: Setting):
        raise RuntimeError("out of order\nand more")

    assert str(gate.check(broken)) == "red: RuntimeError: out of order"


# What is counted


@pytest.mark.parametrize(
    ("width", "depth", "patch", "gflop", "head"),
    [
        (384, 12, 16, 113.4, 0.0126),
        (768, 12, 16, 434.8, 0.0034),
        (384, 12, 8, 517.1, 0.0028),
        (1024, 24, 16, 1526, 0.0010),
    ],
)
def test_the_models_flops(width, depth, patch, gflop, head):
    found = flops.model_flops(width, depth, patch)
    assert found.total / 1e9 == pytest.approx(gflop, rel=5e-4)
    assert found.head / found.total == pytest.approx(head, abs=5e-5)


def test_the_plain_step_executes_the_models_flops(config):
    arm, crops = PaperArm(initial_setting(config, CPU)), synthetic_crops(config, CPU)
    executed = flops.executed_flops(lambda: arm.step(crops))
    assert executed == run.flops_of(config).total * config.batch_size_per_gpu


def test_attention_on_a_cpu_is_counted():
    query = torch.randn(1, 2, 5, 8, requires_grad=True)

    def attend():
        F.scaled_dot_product_attention(query, query, query).sum().backward()

    product = 2 * 2 * 5 * 5 * 8  # heads, 2 FLOPs
    assert flops.executed_flops(attend) == (2 + 5) * product  # the backward pass computes QK again


def test_the_measured_peak_is_a_rate():
    assert flops.measured_peak(CPU, repetitions=1).flops > 1e8


def test_bytes_for_the_backward_pass_are_counted_once():
    x, weight = torch.randn(10, 100), torch.randn(100, 100, requires_grad=True)

    def step():
        hidden = x @ weight  # keeps x, and nothing of its own
        # exp keeps its result, sin and cos both keep their input.
        (hidden.exp() + hidden.sin() + hidden.cos()).sum().backward()

    assert saved_bytes(step, [weight]) == 3 * 4000
    assert saved_bytes(step, [weight, x]) == 2 * 4000


def event(name, start, end, parent=None, *, sequence=-1, self_time=0.0, kernels=()):
    made = SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end),
        cpu_parent=parent,
        cpu_children=[],
        sequence_nr=sequence,
        self_cpu_time_total=self_time,
        kernels=[SimpleNamespace(name=kernel, duration=us) for kernel, us in kernels],
        device_type=DeviceType.CPU,
    )
    if parent is not None:
        parent.cpu_children.append(made)
    return made


def events_of_a_step():
    """Microseconds, in the order of a step: forward, head, loss, backward, update."""
    backward = "autograd::engine::evaluate_function: "
    head = event("fastdino part: head", 30, 40, self_time=100)
    passes = [event(f"{backward}{i}", 50 + i, 51 + i, sequence=7 - i) for i in range(3)]
    adam = event("Optimizer.step#AdamW.step", 70, 80)
    return [
        event("aten::convolution", 0, 1, self_time=1, kernels=[("implicit_conv", 10)]),
        event("aten::addmm", 1, 2, sequence=5, self_time=2, kernels=[("nvjet", 20)]),
        event("aten::bmm", 2, 3, self_time=4, kernels=[("cutlass", 40)]),
        event("aten::native_layer_norm", 3, 4, self_time=8, kernels=[("norm", 80)]),
        head,
        event("aten::addmm", 31, 32, head, sequence=6, self_time=16, kernels=[("nvjet", 160)]),
        event("aten::exp", 41, 42, sequence=7, self_time=32, kernels=[("exp", 320)]),
        event("aten::_local_scalar_dense", 43, 44),
        *passes,
        event("aten::mul", 50, 51, passes[0], self_time=64, kernels=[("mul", 640)]),
        event("aten::mm", 51, 52, passes[1], self_time=128, kernels=[("nvjet", 1280)]),
        event("aten::mm", 52, 53, passes[2], self_time=256, kernels=[("nvjet", 2560)]),
        adam,
        event("aten::_fused_adamw_", 71, 72, adam, self_time=512, kernels=[("adamw", 5120)]),
        event("aten::_local_scalar_dense", 73, 74, adam),
        event("aten::lerp_", 81, 82, self_time=1024, kernels=[("lerp", 10240)]),
    ]


@pytest.mark.parametrize(("on_gpu", "unit"), [(False, 1e-6), (True, 1e-5)])
def test_every_event_falls_into_one_part(on_gpu, unit):
    found = break_down(events_of_a_step(), 1.0, on_gpu=on_gpu)
    counted = dict(zip(PARTS, (1, 8, 2 + 256, 4, 16 + 128, 32 + 64, 512 + 1024), strict=True))
    assert found.parts == pytest.approx({part: unit * n for part, n in counted.items()})
    assert found.backward == pytest.approx(unit * (64 + 128 + 256))
    assert found.rest == pytest.approx(1 - unit * sum(counted.values()))


def test_launches_and_reads_of_a_cpu():
    found = break_down(events_of_a_step(), 1.0, on_gpu=False)
    assert found.launches == 11  # the optimizer's counters on the host are no reads
    assert found.reads == 1


def test_launches_and_reads_of_a_gpu():
    launch = event("cudaLaunchKernel", 1, 2)
    copy = event("Memcpy DtoH (Device -> Pinned)", 3, 4)
    copy.device_type = DeviceType.CUDA
    found = break_down([*events_of_a_step(), launch, launch, copy], 1.0, on_gpu=True)
    assert (found.launches, found.reads) == (2, 1)


def test_inside_marked_attention_only_linear_layers_are_not_attention():
    mark = event("fastdino part: attention", 0, 10)
    inner = [event(name, 1, 2, mark, self_time=1) for name in ("aten::addmm", "aten::mul")]
    parts = break_down([mark, *inner], 1.0, on_gpu=False).parts
    assert (parts["GEMM"], parts["attention"]) == (1e-6, 1e-6)


def test_nothing_within_compiled_code_is_marked():
    network = nn.Sequential(*(nn.Sequential() for _ in range(3)))
    for block in network:
        block.attn = nn.Identity()
    network.head = nn.Identity()
    network[0].compile(backend="eager")
    network[1].forward = torch.compile(network[1].forward, backend="eager")
    network.head.forward = torch.compile(network.head.forward, backend="eager")
    marked = {module for module, _ in breakdown.markable(network)}
    assert marked == {network[2].attn, network.head}


def test_a_profiled_step_has_all_parts(config):
    arm, crops = PaperArm(initial_setting(config, CPU)), synthetic_crops(config, CPU)
    arm.step(crops)
    found = breakdown.profile_step(arm, crops, CPU)
    assert all(seconds > 0 for seconds in found.parts.values())
    assert sum(found.parts.values()) <= found.seconds
    clipped = sum(p.requires_grad for p in arm.student.parameters())
    assert found.reads == 1 + 2 * clipped  # the loss; each norm, and whether it is too large
    assert not arm.student.head._forward_hooks


def test_reads_of_many_values_are_counted(config):
    class Reads(PaperArm):
        def step(self, crops):
            torch.arange(3).tolist()
            torch.ones(()).item()

    arm = Reads(initial_setting(config, CPU))
    assert breakdown.profile_step(arm, [], CPU).reads == 2
    assert "tolist" not in vars(torch.Tensor)


# Many GPUs


def test_one_gpu_is_fully_efficient_and_more_are_less():
    messages = [Message(60_000_000, 0.0), Message(20_000_000, 1.0)]
    found = scaling.scale(StepTime(0.02, 0.01), messages, 262_144)
    assert (found[0].gpus, found[0].efficiency) == (1, 1.0)
    efficiencies = [scaled.efficiency for scaled in found]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert len(set(efficiencies)) == len(efficiencies)


def test_what_fits_beside_the_backward_pass_is_hidden():
    early, late = Message(50_000_000, 0.0), Message(20_000_000, 1.0)
    time = StepTime(0.02, 0.01)
    tail = scaling.sum_seconds(late.size, 8)
    assert scaling.exposed_seconds(time, [early], 0, 8) == 0
    assert scaling.exposed_seconds(time, [early, late], 0, 8) == pytest.approx(tail)
    slow = Message(5_000_000_000, 0.0)
    wanted = sum(scaling.sum_seconds(n, 8) for n in (0, slow.size)) - time.backward
    assert scaling.exposed_seconds(time, [slow], 0, 8) == pytest.approx(wanted)


def test_a_large_sum_takes_its_bytes_twice_over_the_bandwidth():
    assert scaling.sum_seconds(4 * 10**12, 8) == pytest.approx(17.5, rel=1e-4)  # 2 * 7/8 * 10
    assert scaling.sum_seconds(3 * 10**12, 1024) == pytest.approx(20 * 1023 / 1024, rel=1e-4)


def test_the_buckets_of_vit_small():
    messages = scaling.messages_of(TrainConfig(arch="vit_small"))
    assert messages[0] == Message(4 * 65536 * 256, 0.0)  # the last layer, 38 % of all
    assert sum(message.size for message in messages) == 4 * (21_665_664 + 22_352_128 - 65_536)
    assert messages[-1].ready == 1.0
    assert all(message.size >= 25 << 20 for message in messages[1:-1])


def test_vit_small_on_an_h100_loses_little():
    messages = scaling.messages_of(TrainConfig(arch="vit_small"))
    found = scaling.scale(StepTime(64 / 3600, 0.01), messages, 4 * 65536, (8, 1024))
    assert [scaled.efficiency for scaled in found] == pytest.approx([0.992, 0.974], abs=0.003)


# What is told


def result(name="ours", seconds=(0.5, 0.25, 0.25), **changes) -> ArmResult:
    values = {
        "title": "an arm", "gate": Verdict({"loss": (1e-7, "")}), "precision": "fp32", "images": 8,
        "seconds": list(seconds), "first_steps": 3.25, "memory": 7_000_000, "executed": 2e9,
        "breakdown": Breakdown(0.5, dict.fromkeys(PARTS, 0.05), 0.2, 1234, 5),
    }  # fmt: skip
    return ArmResult(name, **(values | changes))


def red() -> ArmResult:
    return ArmResult("broken", "an arm", Verdict({"center": (0.5, "")}), problem="red: not timed")


@pytest.fixture
def report(config) -> Report:
    settings = {name: getattr(config, name) for name in run.SETTINGS} | {"rounds": 3}
    model, peak = flops.ModelFlops(0.9e9, 0.1e9), flops.Peak(64e9, "a product")
    timed = [result("paper", seconds=(1.0, 1.0, 1.0)), result(), red()]
    return Report(
        {"device": "cpu"}, settings, "cpu", timed, {"compiled": "no compiler"}, model, peak
    )


def test_the_table_of_known_times(report):
    text = report.markdown()
    assert (
        "| ours | 32 | 24 - 32 | 4.00 (3.00 - 4.00) | fp32 | 50.0% | 100.0% | 7 | 1234 | 5 "
        "| 3.2 | an arm |"
    ) in text
    assert "| paper | 8 | 8 - 8 | 1.00 (1.00 - 1.00) |" in text
    assert "| ours | 50 | 50 | 50 | 50 | 50 | 50 | 50 | 150 | 500 | 200 |" in text
    assert "| broken | not timed | - |" in text
    assert "| broken | red, 5.0e-01 at most (center) | - | red: not timed |" in text
    assert "| compiled | left out | - " in text
    assert report.failed
    assert report.summary() == "images/s: paper 8, ours 32; not timed: broken"


def test_an_interrupted_run_tells_what_there_is(report):
    half = dataclasses.replace(
        report, arms=[result(breakdown=None, executed=0.0)], problem="interrupted"
    )
    assert half.failed
    assert "**interrupted**" in half.markdown()
    assert "| ours | 32 | 24 - 32 | - | fp32 | 50.0% | - | 7 | - | - | 3.2 |" in half.markdown()


def test_the_json_has_what_the_table_has(report, tmp_path):
    report.write(tmp_path / "new")
    found = json.loads((tmp_path / "new/step.json").read_text(encoding="utf-8"))
    ours = found["arms"][1]
    assert ours["images_per_second"] == 32
    assert ours["times_paper"] == 4
    assert ours["mfu"] == 0.5
    assert ours["gate"] == {"verdict": "green, 1.0e-07 at most (loss)", "green": True}
    assert ours["breakdown"]["parts"][UPDATE] == 0.05
    assert found["arms"][2]["gate"]["green"] is False
    assert (tmp_path / "new/step.md").read_text(encoding="utf-8") == report.markdown() + "\n"


def test_the_parts_of_a_graph_are_not_told(report):
    graph = result("ours-graph", breakdown=Breakdown(0.02, dict.fromkeys(PARTS, 0.0)))
    told = dataclasses.replace(report, arms=[graph]).markdown()
    assert f"| ours-graph |{' - |' * (len(PARTS) + 1)} 20 | - |" in told


def test_the_model_of_many_gpus_is_of_an_arm_whose_parts_are_known(config):
    known = Breakdown(0.2, dict.fromkeys(PARTS, 0.1), backward=0.35)
    benchmark = run.Benchmark(config, CPU, SimpleNamespace())
    for name, seconds, parts in (
        ("ours", 0.3, known), ("ours-fast", 0.2, known), ("ours-graph", 0.1, Breakdown(0.1)),
    ):  # fmt: skip
        benchmark.arms[name] = SimpleNamespace()
        benchmark.results[name] = result(name, seconds=[seconds], breakdown=parts)
    modelled = benchmark.scaling()
    assert (modelled.source, modelled.step) == ("arm ours-fast", 0.2)
    assert modelled.backward == pytest.approx(0.1)


def test_images_from_the_disk_and_many_gpus_are_told(report):
    scaled = scaling.scale(StepTime(0.02, 0.01), [Message(10**9, 1.0)], 0, (1, 8))
    told = dataclasses.replace(
        report,
        fed=Fed("ours", "a loader", 24.0, 0.0125, 0.75),
        scaling=Scaling(scaled, 0.02, 0.01, "arm ours", 1, 10**9, on_cpu=True),
    ).markdown()
    line = "24 images/s, 75% of the rate with crops in memory; 12.5 ms a step"
    assert line in " ".join(told.split())
    assert "these figures are no prediction" in told
    assert "| 1 | 0.00 | 100.0% |" in told
    assert "| 8 | 4.44 | 81.8% |" in told


def test_quartiles():
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 4.0)
    assert quartiles([4.0]) == (4.0, 4.0)


# The command


def bench(*words: object) -> int:
    return cli.main(["bench", *TINY.split(), *map(str, words)])


def test_the_command_measures_and_writes(tmp_path, capsys):
    assert bench("--arms", "ours", "--scaling", "--output", tmp_path) == 0
    found = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))
    assert [arm["name"] for arm in found["arms"]] == ["ours", "ours-fast"]
    assert found["missing"] == {"ours-graph": "CUDA graphs are for GPUs"}
    assert all(len(arm["seconds"]) == 2 and arm["memory"] > 0 for arm in found["arms"])
    assert found["settings"]["batch_size_per_gpu"] == 2
    assert found["scaling"]["on_cpu"] is True
    text = capsys.readouterr().out
    assert "## Many GPUs" in text
    assert text.splitlines()[-1].startswith("images/s: ours")


class Breaks(PaperArm):
    def __init__(self, setting):
        super().__init__(setting)
        self.steps = 0

    def step(self, crops):
        self.steps += 1
        if self.steps > 3:
            raise RuntimeError("out of memory")
        return super().step(crops)


def test_an_arm_that_is_red_or_breaks_stops_no_other_and_fails_the_command(monkeypatch, capsys):
    monkeypatch.setitem(arms.ARMS, "lightly", arms.Entry("wrong", WrongCenter))
    monkeypatch.setitem(arms.ARMS, "ours", arms.Entry("breaks", Breaks))
    assert bench("--arms", "paper,lightly,ours") == 1
    text = capsys.readouterr().out
    assert "| lightly | not timed |" in text
    assert "| lightly | red, " in text
    assert "| ours | not timed |" in text
    assert "| ours | green, 0.0e+00 at most (loss) | - | RuntimeError: out of memory |" in text
    assert "| paper | not timed |" not in text


@pytest.mark.parametrize("keep", [True, False])
def test_memory_is_kept_where_it_is_asked_for(keep, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(run, "keep_freed_memory", lambda: not calls.append("kept"))
    assert bench("--arms", "paper", "--keep_memory", str(keep)) == 0
    assert calls == ["kept"] * keep
    said = "kept" if keep else "as the C library does"
    assert f"| freed memory | {said} |" in capsys.readouterr().out


def test_scaling_of_a_given_step_needs_no_measurement(capsys):
    words = ["--arch", "vit_small", "--scaling", "--step_ms", "20", "--backward_ms", "11"]
    assert cli.main(["bench", "--device", "cpu", *words]) == 0
    text = capsys.readouterr().out
    told = " ".join(text.split())
    assert "a step of 20 ms with a backward pass of 11 ms (given), 5 buckets of 175.8 MB" in told
    assert "no prediction" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--arms paper,mine", "--arms mine: expected some of paper, "),
        ("--arms dino", "--arms dino cannot run: no --dino_repo was given"),
        ("--arms ours,ours-graph", "--arms ours-graph cannot run: CUDA graphs are for GPUs"),
        ("--rounds 0", "--rounds must be at least 1, got 0"),
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--seconds nan", "--seconds must be a finite number above 0, got nan"),
        ("--scaling --step_ms 5", "--step_ms and --backward_ms go together"),
        ("--step_ms 5 --backward_ms 3", "and with --scaling"),
        ("--scaling --step_ms 5 --backward_ms 6", "--backward_ms 6 is longer than the step"),
        ("--arch resnet50", "--arch resnet50: the arms are made of vit_nano, "),
        ("--out_dim 0", "--out_dim must be a finite number of at least 1, got 0"),
    ],
)
def test_mistakes_are_told(words, message, capsys):
    assert bench(*words.split()) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_run_here_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(arms, "compile_problem", lambda device: "no compiler")
    chosen, missing = arms.choose_arms(None, CPU, None)
    assert missing["compiled"] == "no compiler"
    assert missing["dino"] == "no --dino_repo was given"
    assert "paper" in chosen


def test_a_missing_compiler_is_seen(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "none of no-such-compiler is there" in str(compile_problem(CPU))


def test_images_from_the_disk_feed_an_arm(config, pictures):
    config = dataclasses.replace(config, data_path=str(pictures))
    arm = arms.TrainerArm(initial_setting(config, CPU))
    fed = run.feed(arm, "ours", config, CPU, steps=10, synthetic=1e-3)  # more than an epoch's 9
    assert arm.trainer.iteration == 11
    assert fed.wait > 0
    assert fed.images_per_second == pytest.approx(2000 * fed.of_synthetic)
