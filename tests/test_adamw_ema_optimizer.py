"""AdamWEMA against separate clip, torch.optim.AdamW and EMA."""

import copy
import math

import numpy
import pytest
import torch
from fastdino_kernels import AdamWEMA, clip_grad_norms_, ema_update_

from tests.multi_tensor import capture, needs_cuda, numpy_warns
from tests.optimizer_networks import assert_networks_close, groups_of, networks, set_gradients


def test_optimizer_equals_clip_adamw_and_ema(target):
    ours, theirs, our_teacher, their_teacher = networks(target["device"], 4)
    optimizer = AdamWEMA(
        groups_of(ours), max_norm=1.0, impl=target["impl"],
        teacher=dict(zip(ours.parameters(), our_teacher.parameters(), strict=True)),
    )  # fmt: skip
    adamw = torch.optim.AdamW(groups_of(theirs))
    for step in range(4):
        frozen = (2, 3) if step < 2 else ()  # the last layer, in the first epoch
        for network in (ours, theirs):
            set_gradients(network, step, frozen)
        momentum, lr = 0.9 + step / 100, 0.01 * step
        for some in (optimizer, adamw):
            some.param_groups[0]["lr"] = lr
        optimizer.step(momentum=momentum)
        expected = clip_grad_norms_([p for g in adamw.param_groups for p in g["params"]], 1.0)
        adamw.step()
        ema_update_(their_teacher.parameters(), theirs.parameters(), momentum)
        torch.testing.assert_close(optimizer.norms, expected)
        assert_networks_close(ours, theirs)
        assert_networks_close(our_teacher, their_teacher)
    counts = [optimizer.state[p]["step"].item() for p in ours.parameters()]
    assert counts == [4, 4, 2, 2]


def test_parameters_outside_all_groups_are_averaged(target):
    student, teacher = networks(target["device"])
    student[2].weight.requires_grad_(False).add_(1)
    trained = [p for p in student.parameters() if p.requires_grad]
    pairs = dict(zip(student.parameters(), teacher.parameters(), strict=True))
    shadow = {p: torch.empty_like(p, dtype=torch.bfloat16) for p in student.parameters()}
    optimizer = AdamWEMA(
        trained, teacher=pairs, momentum=0.75, shadow=shadow, max_norm=1.0, impl=target["impl"]
    )
    set_gradients(student, 0, without=(2,))
    expected = 0.75 * teacher[2].weight + 0.25 * student[2].weight
    optimizer.step()
    torch.testing.assert_close(teacher[2].weight, expected)
    assert torch.equal(shadow[student[2].weight], student[2].weight.bfloat16())
    assert optimizer.norms.shape == optimizer.steps.shape == (3,)
    assert sorted(optimizer.state_dict()["state"]) == [0, 1, 2]


def test_teachers_may_be_a_list_with_none():
    student, teacher = networks()
    teachers = [*list(teacher.parameters())[:3], None]
    before = teacher[2].bias.clone()
    optimizer = AdamWEMA(student.parameters(), lr=0.1, teacher=teachers, momentum=0.0)
    set_gradients(student, 0)
    optimizer.step()
    assert torch.equal(teacher[0].weight, student[0].weight)
    assert torch.equal(teacher[2].bias, before)


@numpy_warns
def test_nonfinite_gradient_is_skipped_on_the_device(target):
    student, teacher = networks(target["device"])
    optimizer = AdamWEMA(
        student.parameters(), lr=0.1, max_norm=1.0, teacher=list(teacher.parameters()),
        skip_nonfinite=True, impl=target["impl"],
    )  # fmt: skip
    set_gradients(student, 0)
    optimizer.step()
    before = copy.deepcopy((student.state_dict(), teacher.state_dict(), optimizer.state_dict()))
    student[2].weight.grad[0, 0] = math.nan
    optimizer.step()
    after = (student.state_dict(), teacher.state_dict(), optimizer.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert optimizer.refused_steps.item() == 1
    assert optimizer.norms.isnan().tolist() == [False, False, True, False]
    set_gradients(student, 1)
    optimizer.step(skip=torch.ones((), device=target["device"]))
    torch.testing.assert_close(student.state_dict(), before[0], rtol=0, atol=0)
    optimizer.step()
    assert optimizer.refused_steps.item() == 1
    assert optimizer.steps.tolist() == [2.0] * 4


@numpy_warns
@pytest.mark.parametrize("unscaled", [False, True])
def test_grad_scaler_scales_skips_and_recovers(unscaled, target):
    device = target["device"]
    if unscaled and target == {"impl": "triton", "device": "cpu"}:
        pytest.skip("the interpreter is slow, and the other form is the harder one")
    ours, theirs, our_teacher, their_teacher = networks(device, 4)
    optimizer = AdamWEMA(
        ours.parameters(), lr=0.01, max_norm=0.5, teacher=list(our_teacher.parameters()),
        momentum=0.9, impl=target["impl"],
    )  # fmt: skip
    adamw = torch.optim.AdamW(theirs.parameters(), lr=0.01)
    scalers = [torch.amp.GradScaler(device, init_scale=256.0, growth_interval=2) for _ in range(2)]
    for step in range(5):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(device)
        for network, some, scaler in zip((ours, theirs), (optimizer, adamw), scalers, strict=True):
            some.zero_grad()
            scaler.scale(network(x).square().mean()).backward()
            if step == 2:
                network[0].weight.grad[0, 0] = math.inf
            if some is adamw or unscaled:
                scaler.unscale_(some)
            if some is adamw:
                expected = clip_grad_norms_(theirs.parameters(), 0.5)
            scaler.step(some)
            scaler.update()
        ema_update_(their_teacher.parameters(), theirs.parameters(), 0.9)
        assert scalers[0].get_scale() == scalers[1].get_scale()
        torch.testing.assert_close(optimizer.norms, expected, equal_nan=True)
        assert_networks_close(ours, theirs)
        assert_networks_close(our_teacher, their_teacher)
    assert optimizer.steps.tolist() == [4.0] * 4
    assert not hasattr(optimizer, "found_inf")


def test_grad_scaler_without_gradients():
    student, teacher = networks()
    optimizer = AdamWEMA(student.parameters(), teacher=list(teacher.parameters()), momentum=0.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    student[0].weight.data.add_(1)
    scaler.step(optimizer)
    assert torch.equal(teacher[0].weight, student[0].weight)


def test_closure_is_evaluated_with_gradients():
    (network,) = networks(count=1)
    optimizer = AdamWEMA(network.parameters(), lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = network(torch.ones(2, 5)).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]


def test_schedulers_change_the_learning_rate():
    (network,) = networks(count=1)
    optimizer = AdamWEMA(network.parameters(), lr=torch.tensor(0.5))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    set_gradients(network, 0)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.25)


P, Q = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))


@pytest.mark.parametrize(
    ("options", "raises", "match"),
    [
        ({"lr": -1.0}, ValueError, "lr must be >= 0"),
        ({"betas": (0.9, 2.0)}, ValueError, r"betas must be in \[0, 1\)"),
        ({"params": [{"params": [P]}, {"params": [Q], "lr": -1}]}, ValueError, "lr must be >= 0"),
        (
            {"params": [{"params": [P], "amsgrad": True}]},
            ValueError,
            "amsgrad=True is not supported",
        ),
        ({"max_norm": -1.0}, ValueError, "max_norm must be > 0"),
        ({"momentum": 2.0}, ValueError, r"momentum must be in \[0, 1\]"),
        ({"teacher": [torch.zeros(2)] * 3}, ValueError, "teacher .*expected 2, got 3"),
        ({"params": [{"params": []}]}, ValueError, "params must hold at least one parameter"),
        ({"shadow": []}, ValueError, "shadow .*expected 2, got 0"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
        (
            {"teacher": [torch.ones(2), None], "unit_rows": P},
            ValueError,
            "unit_rows must be a parameter that has a teacher_shadow",
        ),
    ],
)
def test_invalid_constructor_arguments(options, raises, match):
    with pytest.raises(raises, match=match):
        AdamWEMA(**({"params": [P, Q]} | options))


def test_invalid_group_is_not_added():
    optimizer = AdamWEMA([P])
    with pytest.raises(ValueError, match="weight_decay must be >= 0"):
        optimizer.add_param_group({"params": [Q], "weight_decay": -1.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"fused": True},
        {"fused": False},
        {"foreach": True},
        {"capturable": True},
        {"amsgrad": False, "maximize": False, "differentiable": False},
        {"lr": torch.tensor(0.01), "betas": (torch.tensor(0.7), torch.tensor([0.9]))},
        {"lr": numpy.float32(0.01), "betas": (numpy.float32(0.7), numpy.float64(0.9))},
        {"eps": numpy.float32(1e-6), "weight_decay": numpy.float64(0.1)},
    ],
)
def test_options_of_adamw_that_give_the_same_result_are_accepted(options):
    ours, theirs = networks()
    numbers = {
        name: tuple(map(float, value)) if name == "betas" else float(value)
        for name, value in options.items()
        if name in ("lr", "betas", "eps", "weight_decay")
    }
    optimizers = (
        AdamWEMA(ours.parameters(), **options),
        torch.optim.AdamW(theirs.parameters(), **numbers),
    )
    for step in range(2):
        for network, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(network, step)
            optimizer.step()
    assert_networks_close(ours, theirs)
    assert optimizers[0].state_dict()["param_groups"][0]["fused"] is True


@pytest.mark.parametrize("name", ["amsgrad", "maximize", "differentiable"])
def test_options_of_adamw_that_give_another_result_are_refused(name):
    for params in ([P], [{"params": [P], name: True}]):
        options = {name: True} if params == [P] else {}
        with pytest.raises(ValueError, match=f"{name}=True is not supported: "):
            AdamWEMA(params, **options)
    optimizer = AdamWEMA([P])
    with pytest.raises(ValueError, match=f"{name}=True is not supported: "):
        optimizer.add_param_group({"params": [Q], name: True})
    assert len(optimizer.param_groups) == 1


def test_global_norm_equals_torch_clip_adamw_and_ema(target):
    ours, theirs, our_teacher, their_teacher = networks(target["device"], 4)
    optimizer = AdamWEMA(
        groups_of(ours), max_norm=0.9, clip="all", impl=target["impl"], skip_nonfinite=True,
        teacher=dict(zip(ours.parameters(), our_teacher.parameters(), strict=True)),
    )  # fmt: skip
    adamw = torch.optim.AdamW(groups_of(theirs))
    for step in range(3):
        for network in (ours, theirs):
            set_gradients(network, step, without=(2,) if step == 0 else ())
            for p in network.parameters():
                if step == 2 and p.grad is not None:
                    p.grad *= 0.01  # below max_norm
        optimizer.step(momentum=0.9)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.9)
        adamw.step()
        ema_update_(their_teacher.parameters(), theirs.parameters(), 0.9)
        torch.testing.assert_close(optimizer.norms, expected)
        assert_networks_close(ours, theirs)
        assert_networks_close(our_teacher, their_teacher)
    before = copy.deepcopy(ours.state_dict())
    ours[0].bias.grad[1] = math.nan
    optimizer.step(momentum=0.9)
    torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)
    assert optimizer.refused_steps.item() == 1


def _transpose_parameter(optimizer, p, teacher):
    p.grad, p.data = None, p.data.t()


def _transpose_teacher(optimizer, p, teacher):
    teacher.data = teacher.data.t()


def _keep_four_rows(optimizer, p, teacher):
    p.grad, p.data, teacher.data = None, p.data[:4], teacher.data[:4]
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[p][name] = optimizer.state[p][name][:4]


def _negate_gradient(optimizer, p, teacher):
    p.grad = torch._neg_view(p.grad)


@pytest.mark.parametrize(
    "change", [_transpose_parameter, _transpose_teacher, _keep_four_rows, _negate_gradient]
)
def test_other_layout_of_the_same_memory_is_noticed(change, target):
    results = []
    for impl in (target["impl"], "torch"):
        values = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
        weight, teacher, gradient = whole = values.to(target["device"]).unbind()
        p, average = torch.nn.Parameter(weight), teacher.detach()
        optimizer = AdamWEMA([p], lr=0.1, teacher=[average], momentum=0.5, impl=impl)
        p.grad = gradient.detach()
        optimizer.step()
        change(optimizer, p, average)
        if p.grad is None:
            p.grad = gradient.detach()[: len(p)]
        optimizer.step()
        results.append(whole)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("gradient", [0.0, 1.0, math.nan])
def test_only_a_first_step_without_rate_and_gradient_keeps_the_teacher(gradient):
    p, teacher = torch.nn.Parameter(torch.zeros(3)), torch.ones(3)
    optimizer = AdamWEMA([p], lr=0.0, teacher=[teacher], momentum=0.5)
    moved = []
    for _ in range(2):
        p.grad = torch.full((3,), gradient)
        before = teacher.clone()
        optimizer.step()
        moved.append(not torch.equal(teacher, before))
    assert moved == [gradient != 0, True]
    assert optimizer.steps.tolist() == [1.0 if gradient == 0 else 2.0]


@pytest.mark.parametrize("names", [["teacher"], ["shadow"], ["teacher", "teacher_shadow"]])
def test_group_that_a_list_of_teachers_does_not_cover_is_warned_of(names):
    lists = {name: [torch.zeros(2)] for name in names}
    optimizer = AdamWEMA([P], **lists)
    with pytest.warns(UserWarning, match=" and ".join(names) + " given as a list: .*mapping"):
        optimizer.add_param_group({"params": [Q]})
    mapping = AdamWEMA([P], **{name: {P: torch.zeros(2), Q: torch.zeros(2)} for name in names})
    mapping.add_param_group({"params": [Q]})


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("gradients_in_graph", [False, True])
def test_captured_step_reads_hyperparameters_anew(gradients_in_graph):
    student, teacher = networks("cuda")
    numbers = {
        name: torch.tensor(value, dtype=torch.float64, device="cuda")
        for name, value in (("lr", 0.0), ("weight_decay", 0.0), ("momentum", 1.0))
    }
    optimizer = AdamWEMA(
        student.parameters(), lr=numbers["lr"], weight_decay=numbers["weight_decay"], max_norm=0.5,
        momentum=numbers["momentum"], teacher=list(teacher.parameters()), skip_nonfinite=True,
    )  # fmt: skip
    inputs = torch.randn(4, 5, device="cuda")

    def step():
        if gradients_in_graph:
            optimizer.zero_grad()
            student(inputs).square().mean().backward()
        optimizer.step()

    set_gradients(student, 0)
    graph, _ = capture(step)
    other, other_teacher = networks("cuda")
    adamw = torch.optim.AdamW(other.parameters())
    adamw.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for count, (lr, decay, momentum) in enumerate([(0.1, 0.2, 0.9), (0.01, 0.0, 0.5)]):
        for name, value in (("lr", lr), ("weight_decay", decay), ("momentum", momentum)):
            numbers[name].fill_(value)
        inputs.normal_()
        if not gradients_in_graph:
            for p in student.parameters():
                p.grad.normal_()
        adamw.zero_grad()
        other(inputs).square().mean().backward()
        if not gradients_in_graph:
            for p, q in zip(other.parameters(), student.parameters(), strict=True):
                p.grad.copy_(q.grad)
        expected = clip_grad_norms_(other.parameters(), 0.5)
        adamw.param_groups[0].update(lr=lr, weight_decay=decay)
        adamw.step()
        ema_update_(other_teacher.parameters(), other.parameters(), momentum)
        graph.replay()
        torch.testing.assert_close(optimizer.norms, expected)
        assert_networks_close(student, other)
        assert_networks_close(teacher, other_teacher)
        assert optimizer.steps.tolist() == [count + 2.0] * 4
    if not gradients_in_graph:
        student[0].weight.grad[0, 0] = math.nan
        graph.replay()
        assert_networks_close(student, other)
        assert optimizer.refused_steps.item() == 1


@pytest.mark.gpu
@needs_cuda
def test_capture_without_state_is_an_error():
    (network,) = networks("cuda", 1)
    optimizer = AdamWEMA(network.parameters())
    set_gradients(network, 0)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(3, device="cuda")  # PyTorch warns of an empty graph
        with pytest.raises(RuntimeError, match="step once.*before capturing"):
            optimizer.step()
