"""`fastdino bench`: the correctness check, the counted FLOPs and bytes, the report, the command."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from benchmarks.results_table import measurements_of
from fastdino import cli, cpu_speed, runtime
from fastdino.bench import flops, scaling, step_benchmark
from fastdino.bench.baselines import compiled_step, steps
from fastdino.bench.baselines.dino_repository import DinoRepositoryStep, load_repository
from fastdino.bench.baselines.losses import paper_loss
from fastdino.bench.baselines.paper_step import Loss, PaperStep
from fastdino.bench.baselines.training_step import StepSetup, initial_setup, synthetic_crops
from fastdino.bench.correctness import CorrectnessCheck, Verdict
from fastdino.bench.harness import Outcome, Sample
from fastdino.bench.measurement import saved_bytes
from fastdino.bench.report import write_report
from fastdino.bench.scaling import Scaling, StepTime
from fastdino.bench.step_messages import Message
from fastdino.bench.step_profile import PARTS, UPDATE, Breakdown
from fastdino.bench.step_report import DiskFeed, StepReport, StepResult
from fastdino.config import TrainConfig
from fastdino.errors import ConfigError
from fastdino.models.compile import compile_problem
from fastdino.models.vit import VIT_ARCHS

CPU = torch.device("cpu")
TINY = """
    --arch vit_nano --patch_size 8 --out_dim 64 --global_crops_size 32 --local_crops_size 16
    --local_crops_number 2 --batch_size_per_gpu 2 --device cpu --rounds 2 --steps 1
"""

# PyTorch warns while tracing.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    """Trace compiled blocks without generating code, which takes a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.fixture(scope="module", autouse=True)
def two_blocks():
    """Reduce vit_nano to two of its six blocks: the profiler records many events."""
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
def checker(config) -> CorrectnessCheck:
    return CorrectnessCheck(config, CPU)


@pytest.fixture
def checkout(tmp_path):
    """A folder with the modules and names that the baseline `dino` uses."""
    files = {
        "vision_transformer": """
            from types import SimpleNamespace
            from fastdino.bench.baselines import paper_step

            class VisionTransformer(paper_step.Backbone):
                def __init__(self, img_size, patch_size, embed_dim, **_):
                    super().__init__(SimpleNamespace(
                        arch="vit_nano", patch_size=patch_size, global_crops_size=img_size[0]
                    ))
                    self.embed_dim = embed_dim

            DINOHead = paper_step.Head
        """,
        "utils": """
            from torch import nn
            from fastdino.bench.baselines import paper_step
            from fastdino.training.optimizers import parameter_groups as get_params_groups

            class MultiCropWrapper(paper_step.Network):
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
            from fastdino.bench.baselines import paper_step

            class DINOLoss(paper_step.Loss):
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
        (tmp_path / f"{name}.py").write_text(inspect.cleandoc(text), encoding="utf-8")
    return tmp_path


# Correctness


@pytest.mark.parametrize("name", [n for n in steps.BASELINES if n not in ("paper", "dino")])
def test_every_baseline_computes_the_papers_step(name, checker, monkeypatch):
    if name == "lightly":
        pytest.importorskip("lightly")
    monkeypatch.setattr(compiled_step, "BACKEND", "eager")
    baseline = steps.BASELINES[name]
    verdict = checker.check(baseline.build, one_size=bool(baseline.one_size))
    assert verdict.passed, str(verdict)
    assert set(verdict.worst) == {"loss", "gradient", "student", "center", "teacher"}


@pytest.mark.slow
def test_the_compiled_baseline_passes_with_generated_code(checker):
    assert checker.check(compiled_step.CompiledStep).passed


def test_a_checkout_passes_and_leaves_no_modules(config, checkout, monkeypatch):
    monkeypatch.setitem(sys.modules, "utils", own := SimpleNamespace())
    paths = list(sys.path)
    assert CorrectnessCheck(config, CPU, checkout).check(DinoRepositoryStep).passed
    assert sys.modules["utils"] is own
    assert not {"main_dino", "vision_transformer"} & sys.modules.keys()
    assert sys.path == paths
    assert not (checkout / "__pycache__").exists()


def test_an_invalid_checkout_is_reported(checkout):
    (checkout / "main_dino.py").write_text("import no_such_module", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be imported: .*no_such_module"):
        load_repository(checkout)
    (checkout / "utils.py").unlink()
    with pytest.raises(ConfigError, match="not a checkout .*: it has no utils.py"):
        load_repository(checkout)


def paper_step(**methods):
    """Return a subclass of PaperStep with other methods."""
    return type("OtherStep", (PaperStep,), methods)


def forward_with_wrong_center(step, crops):
    before = step.loss.center.clone()
    loss = PaperStep.forward(step, crops)
    step.loss.center.lerp_(before, 0.01)
    return loss


def loss_with_equal_pair(student, teacher, center, student_temp, teacher_temp):
    """Add the pair of the first crop with itself."""
    loss, teacher_sum = paper_loss(student, teacher, center, student_temp, teacher_temp)
    target = F.softmax(teacher[0] / teacher_temp, dim=-1)
    log_probs = F.log_softmax(student[0] / student_temp, dim=-1)
    return loss - 0.1 * (target * log_probs).sum(dim=-1).mean(), teacher_sum


WRONG_CENTER = paper_step(forward=forward_with_wrong_center)
WRONG_TEACHER = paper_step(update_teacher=lambda self, m: PaperStep.update_teacher(self, m - 0.01))
NO_CLIP = paper_step(clip_gradients=lambda self, max_norm: None)
DECAYS_ALL = paper_step(build_optimizer=lambda self: torch.optim.AdamW(self.student.parameters()))
WRONG_LOSS = paper_step(
    build=lambda self, setup: (
        *PaperStep.build(self, setup)[:2],
        Loss(setup.config, loss_with_equal_pair),
    )
)
NOT_A_NUMBER = paper_step(step=lambda self, crops: PaperStep.step(self, crops) * math.nan)


@pytest.mark.parametrize(
    ("step", "wrong"),
    [
        (WRONG_CENTER, {"center"}),
        (WRONG_TEACHER, {"teacher"}),
        (NO_CLIP, {"student", "teacher"}),
        (DECAYS_ALL, {"student"}),
        (WRONG_LOSS, {"loss", "gradient", "student", "teacher"}),
        (NOT_A_NUMBER, {"loss"}),
    ],
)
def test_a_wrong_step_fails_the_check(step, wrong, checker):
    verdict = checker.check(step)
    assert not verdict.passed
    assert {name for name, (error, _) in verdict.worst.items() if not error <= 1e-5} == wrong
    assert str(verdict).startswith("failed, ")


def test_an_exception_fails_the_check(checker):
    def broken(setup: StepSetup):
        raise RuntimeError("out of order\nand more")

    assert str(checker.check(broken)) == "failed: RuntimeError: out of order"


@pytest.mark.parametrize(
    ("name", "faster_in", "checked"),
    [
        ("ours-fast", torch.bfloat16, "matmul"),
        ("ours-fast", torch.float32, "sdpa"),
        ("ours-bf16", torch.bfloat16, "matmul"),
        ("ours-fp32", torch.bfloat16, "sdpa"),
        ("ours-fp32", torch.float32, "matmul"),
        ("ours", torch.float32, "sdpa"),
    ],
)
def test_the_attention_that_is_timed_is_checked(checker, monkeypatch, name, faster_in, checked):
    """The check is in fp32, in which another backend may be the faster one."""
    monkeypatch.setattr(cpu_speed, "NEGLIGIBLE_WEIGHTS", 0)
    monkeypatch.setattr(cpu_speed, "bf16_speedup", lambda: 3.0)
    monkeypatch.setattr(
        cpu_speed, "matmul_speedup", lambda inputs: 3.0 if inputs.dtype == faster_in else 0.3
    )
    verdict = checker.check(steps.BASELINES[name].build)
    assert verdict.passed, verdict
    assert verdict.choices["attention"] == checked


@pytest.mark.parametrize(
    ("name", "faster_for", "negligible", "checked"),
    [
        ("ours-fp32", "many", 0, "on"),
        ("ours-fp32", "few", 0, "off"),
        ("ours-fp32", "all", 0, "on"),
        ("ours-fp32", "all", 4000, "on"),
        ("ours-fast", "all", 0, "off"),  # timed in bf16
        ("ours-bf16", "all", 0, "off"),
        ("ours", "all", 0, "off"),
    ],
)
def test_the_linear_layers_that_are_timed_are_checked(
    config, monkeypatch, name, faster_for, negligible, checked
):
    """The check is in fp32 and has fewer images, for which others may be the faster ones."""
    rows = {"many": range(4000, 10**9), "few": range(4000), "all": range(10**9)}[faster_for]
    dim = VIT_ARCHS[config.arch]["embed_dim"]
    monkeypatch.setattr(cpu_speed, "NEGLIGIBLE_PRODUCT", 4 * negligible * dim**2)
    monkeypatch.setattr(cpu_speed, "bf16_speedup", lambda: 3.0)
    monkeypatch.setattr(cpu_speed, "onednn_speedup", lambda n, dim: 9.0 if n in rows else 1.0)
    timed = dataclasses.replace(config, batch_size_per_gpu=256)
    built = steps.BASELINES[name].build(initial_setup(timed, CPU))
    verdict = CorrectnessCheck(timed, CPU).check(steps.BASELINES[name].build)
    assert verdict.passed, verdict
    assert built.choices["onednn"].value == verdict.choices["onednn"] == checked
    assert set(verdict.choices) == set(runtime.MEASURED) - {"precision"}


def test_a_backend_that_cannot_run_in_fp32_is_not_checked(checker, monkeypatch):
    monkeypatch.setattr(cpu_speed, "NEGLIGIBLE_WEIGHTS", 0)
    monkeypatch.setattr(cpu_speed, "bf16_speedup", lambda: 3.0)
    monkeypatch.setattr(cpu_speed, "matmul_speedup", lambda inputs: 3.0)
    monkeypatch.setattr(cpu_speed, "NEGLIGIBLE_PRODUCT", 0)
    monkeypatch.setattr(cpu_speed, "onednn_speedup", lambda rows, dim: 9.0)
    tested = []

    def problem(name, inputs):
        tested.append((name, inputs.dtype))
        return "fp32" if tested[-1] == ("matmul", torch.float32) else None

    monkeypatch.setattr(runtime, "attention_problem", problem)
    verdict = checker.check(steps.BASELINES["ours-fast"].build)
    assert verdict.passed, verdict
    assert ("matmul", torch.bfloat16) in tested
    assert verdict.choices == {"attention": "sdpa", "onednn": "off"}


# FLOPs and bytes


@pytest.mark.parametrize(
    ("arch", "patch", "gflop", "head"),
    [
        ("vit_small", 16, 113.4, 0.0126),
        ("vit_base", 16, 434.8, 0.0034),
        ("vit_small", 8, 517.1, 0.0028),
        ("vit_large", 16, 1526, 0.0010),
    ],
)
def test_flops_of_the_model(arch, patch, gflop, head):
    counted = flops.model_flops(TrainConfig(arch=arch, patch_size=patch))
    assert counted.total / 1e9 == pytest.approx(gflop, rel=5e-4)
    assert counted.head / counted.total == pytest.approx(head, abs=5e-5)


def test_the_papers_step_executes_the_flops_of_the_model(config):
    step, crops = PaperStep(initial_setup(config, CPU)), synthetic_crops(config, CPU)
    executed = flops.executed_flops(lambda: step.step(crops))
    assert executed == flops.model_flops(config).total * config.batch_size_per_gpu


def test_attention_on_a_cpu_is_counted():
    query = torch.randn(1, 2, 5, 8, requires_grad=True)

    def attend():
        F.scaled_dot_product_attention(query, query, query).sum().backward()

    product = 2 * 2 * 5 * 5 * 8  # heads, 2 FLOPs
    assert flops.executed_flops(attend) == (2 + 5) * product  # the backward pass computes QK again


def test_bytes_saved_for_the_backward_pass_are_counted_once():
    x, weight = torch.randn(10, 100), torch.randn(100, 100, requires_grad=True)

    def step():
        hidden = x @ weight  # saves x
        # exp saves its result; sin and cos both save their input.
        (hidden.exp() + hidden.sin() + hidden.cos()).sum().backward()

    assert saved_bytes(step, [weight]) == 3 * 4000
    assert saved_bytes(step, [weight, x]) == 2 * 4000


# The report


def result(name="ours", seconds=(0.5, 0.25, 0.25), **changes) -> StepResult:
    values = {
        "title": "a step", "verdict": Verdict({"loss": (1e-7, "")}), "precision": "fp32",
        "outcome": Outcome(samples=[Sample(8, s) for s in seconds]), "images": 8,
        "first_steps": 3.25, "memory": 7_000_000, "executed": 2e9,
        "breakdown": Breakdown(0.5, dict.fromkeys(PARTS, 0.05), 0.2, 1234, 5),
    }  # fmt: skip
    return StepResult(name, **(values | changes))


def wrong() -> StepResult:
    outcome = Outcome(status="failed", reason="incorrect: not timed")
    return StepResult("wrong", "a step", Verdict({"center": (0.5, "")}), outcome, images=8)


@pytest.fixture
def report(config) -> StepReport:
    settings = {name: getattr(config, name) for name in step_benchmark.SETTINGS} | {"rounds": 3}
    model, peak = flops.ModelFlops(0.9e9, 0.1e9), flops.Peak(64e9, "a product")
    results = [result("paper", seconds=(1.0, 1.0, 1.0)), result(), wrong()]
    missing = {"compiled": "no compiler"}
    return StepReport({"device": "cpu"}, settings, "cpu", results, missing, model, {"fp32": peak})


def test_the_tables_and_the_json_show_the_figures(report, tmp_path):
    text = report.markdown()
    for line in (
        "| ours | 32 | 24 - 32 | 4.00 (3.00 - 4.00) | fp32 | 50.0% | 100.0% | 7 | 1234 | 5 "
        "| 3.2 | a step |",
        "| paper | 8 | 8 - 8 | 1.00 (1.00 - 1.00) |",
        "| ours | 50 | 50 | 50 | 50 | 50 | 50 | 50 | 150 | 500 | 200 |",
        "| wrong | not timed | - |",
        "| wrong | failed, 5.0e-01 at most (center) | - | incorrect: not timed |",
        "| compiled | left out | - ",
    ):
        assert line in text, line
    assert report.failed
    assert report.summary() == "images/s: paper 8, ours 32; not timed: wrong"
    write_report(tmp_path / "new", "step", text, report.as_json())
    record = json.loads((tmp_path / "new/step.json").read_text(encoding="utf-8"))
    ours = record["arms"][1]
    assert set(ours) == {
        "name", "title", "gate", "note", "problem", "precision", "images", "seconds",
        "first_steps", "memory", "executed", "breakdown", "images_per_second", "quartiles",
        "times_paper", "mfu", "executed_mfu",
    }  # fmt: skip
    assert ours["seconds"] == [0.5, 0.25, 0.25]
    assert (ours["images_per_second"], ours["times_paper"], ours["mfu"]) == (32, 4, 0.5)
    assert ours["gate"] == {"verdict": "passed, 1.0e-07 at most (loss)", "green": True}
    assert ours["breakdown"]["parts"][UPDATE] == 0.05
    assert record["arms"][2]["gate"]["green"] is False
    assert (tmp_path / "new/step.md").read_text(encoding="utf-8") == text


def test_utilization_is_of_the_peak_in_the_precision_of_the_step(report):
    bf16 = result("ours-fast", precision="bf16")
    peaks = {"bf16": flops.Peak(256e9, "a fast product"), **report.peaks}
    report = dataclasses.replace(report, results=[*report.results, bf16], peaks=peaks)
    text = " ".join(report.markdown().split())
    assert "fp32 | 50.0% | 100.0% |" in text
    assert "bf16 | 12.5% | 25.0% |" in text
    assert "Peak in bf16: 0.256 TFLOP/s, a fast product. Peak in fp32: 0.064 TFLOP/s" in text
    record = report.as_json()
    assert [arm.get("mfu") for arm in record["arms"]] == [0.125, 0.5, None, 0.125]
    assert record["peaks"]["bf16"] == {"flops": 256e9, "source": "a fast product"}
    (measured,) = {values["mfu_percent"] for (_, name), values in measurements_of(record).items()
                   if name == "ours-fast"}  # fmt: skip
    assert measured == 12.5


SCALING = Scaling(
    scaling.scale(StepTime(0.02, 0.01), [Message(10**9, 1.0)], (1, 8)),
    0.02, 0.01, "baseline ours", 1, 10**9, 1_750_000_000, 3_500_000_000, on_cpu=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            {
                "results": [result(seconds=[0.25], breakdown=None, executed=0.0)],
                "problem": "interrupted",
            },
            ["**interrupted**", "| ours | 32 | 32 - 32 | - | fp32 | 50.0% | - | 7 | - | - | 3.2 |"],
        ),
        (  # the parts of a CUDA graph are unknown
            {"results": [result(breakdown=Breakdown(0.02, dict.fromkeys(PARTS, 0.0)))]},
            [f"| ours |{' - |' * (len(PARTS) + 1)} 20 | - |"],
        ),
        (
            {"feed": DiskFeed("ours", "a loader", 24.0, 0.0125, 0.75)},
            ["24 images/s, 75% of the rate with crops in memory; 12.5 ms per step"],
        ),
        (
            {"scaling": SCALING},
            [
                "measured on a CPU",
                "sends 1750 MB per step (in rings), and 3500 MB with --fsdp",
                "| 1 | 0.00 | 100.0% |",
                "| 8 | 4.44 | 81.8% |",
            ],
        ),
    ],
    ids=["interrupted", "graph", "disk", "scaling"],
)
def test_optional_parts_of_the_report(report, changes, lines):
    report = dataclasses.replace(report, **changes)
    text = " ".join(report.markdown().split())
    for line in lines:
        assert line in text
    assert report.failed == ("problem" in changes or len(report.results) == 3)


def test_scaling_uses_the_fastest_step_with_known_parts(config):
    known = Breakdown(0.2, dict.fromkeys(PARTS, 0.1), backward=0.35)
    benchmark = step_benchmark.StepBenchmark(config, CPU, SimpleNamespace())
    for name, seconds, parts in (
        ("ours", 0.3, known), ("ours-fast", 0.2, known), ("ours-graph", 0.1, Breakdown(0.1)),
    ):  # fmt: skip
        benchmark.steps[name] = SimpleNamespace()
        benchmark.results[name] = result(name, seconds=[seconds], breakdown=parts)
    modelled = benchmark.scaling()
    assert (modelled.source, modelled.step) == ("baseline ours-fast", pytest.approx(0.2))
    assert modelled.backward == pytest.approx(0.1)


# The command


def bench(*words: object) -> int:
    return cli.main(["bench", *TINY.split(), *map(str, words)])


def test_the_command_measures_and_writes(tmp_path, capsys):
    assert bench("--baselines", "ours", "--scaling", "--output", tmp_path) == 0
    record = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))
    names = ["ours", "ours-fast", "ours-fp32", "ours-bf16"]
    assert [result["name"] for result in record["arms"]] == names
    assert [result["precision"] for result in record["arms"]] == ["fp32"] * 3 + ["bf16"]
    assert "precision: bf16 (autocast" in record["arms"][3]["note"]
    checked = "checked in fp32 with attention sdpa, onednn off"
    assert all(checked in arm["note"] for arm in record["arms"])
    assert record["environment"]["large product in bf16"] == "1 times as fast as in fp32"
    assert "features" in record["environment"]
    assert record["missing"] == {"ours-graph": "CUDA graphs need a GPU"}
    assert all(len(result["seconds"]) == 2 and result["memory"] > 0 for result in record["arms"])
    assert (record["settings"]["batch_size_per_gpu"], record["settings"]["device"]) == (2, "cpu")
    assert record["scaling"]["on_cpu"] is True
    assert set(record["peaks"]) == {"fp32", "bf16"}
    assert all(peak["flops"] > 1e8 for peak in record["peaks"].values())
    text = capsys.readouterr().out
    assert "## Many GPUs" in text
    assert text.splitlines()[-1].startswith("images/s: ours")


def break_in_fourth_step(step, crops):
    step.steps = getattr(step, "steps", 0) + 1
    if step.steps > 3:
        raise RuntimeError("out of memory")
    return PaperStep.step(step, crops)


def test_a_wrong_or_broken_baseline_fails_the_command_but_not_the_others(monkeypatch, capsys):
    broken = paper_step(step=break_in_fourth_step)
    monkeypatch.setitem(steps.BASELINES, "lightly", steps.StepBaseline("wrong", WRONG_CENTER))
    monkeypatch.setitem(steps.BASELINES, "ours", steps.StepBaseline("breaks", broken))
    assert bench("--baselines", "paper,lightly,ours") == 1
    text = capsys.readouterr().out
    assert "| lightly | not timed |" in text
    assert "| lightly | failed, " in text
    assert "| ours | not timed |" in text
    assert "| ours | passed, 0.0e+00 at most (loss) | - | RuntimeError: out of memory |" in text
    assert "| paper | not timed |" not in text


def test_baselines_that_are_not_ready_in_time_are_left_out(monkeypatch, capsys):
    clock = itertools.count(step=1e-6)
    slept = []
    monkeypatch.setattr(
        step_benchmark.time, "perf_counter", lambda: next(clock) + 30.0 * len(slept)
    )

    def slow(step, crops):
        slept.append(1)
        return PaperStep.step(step, crops)

    late = paper_step(step=slow)
    monkeypatch.setitem(steps.BASELINES, "ours", steps.StepBaseline("slow", late))
    assert bench("--baselines", "paper,ours,ours-fast", "--time_limit", 40) == 1
    text = capsys.readouterr().out
    reason = "not ready after two thirds of --time_limit"
    assert f"| ours-fast | failed: {reason} | - | {reason} |" in text
    assert "| ours | passed, 0.0e+00 at most (loss) | - | - |" in text
    assert "| paper | not timed |" not in text


@pytest.mark.parametrize("keep", [True, False])
def test_freed_memory_is_kept_on_request(keep, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(step_benchmark, "keep_freed_memory", lambda: not calls.append("kept"))
    assert bench("--baselines", "paper", "--keep_memory", str(keep)) == 0
    assert calls == ["kept"] * keep
    expected = "kept" if keep else "C library's default"
    assert f"| freed memory | {expected} |" in capsys.readouterr().out


def test_a_missing_compiler_is_reported(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in str(compile_problem(CPU))


def test_steps_run_on_images_from_the_disk(config, pictures):
    config = dataclasses.replace(config, data_path=str(pictures))
    step = steps.TrainerStep(initial_setup(config, CPU))
    # More steps than the 9 of an epoch.
    feed = step_benchmark.feed_from_disk(step, "ours", config, CPU, steps=10, synthetic=1e-3)
    assert step.trainer.iteration == 11
    assert feed.wait > 0
    assert feed.images_per_second == pytest.approx(2000 * feed.of_synthetic)
