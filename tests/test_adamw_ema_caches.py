"""What AdamWEMA keeps between steps is forgotten when it no longer applies."""

import pytest
import torch
from fastdino_kernels import AdamWEMA

from tests import adamw_steps
from tests.adamw_steps import assert_unchanged, make

target = adamw_steps.target


def optimizer_of(target, *values, **options):
    """Make an optimizer of parameters with gradients of 1, and step it once."""
    parameters = [torch.nn.Parameter(x.to(target["device"])) for x in values]
    settings = {"lr": 0.1, "betas": (0.5, 0.5), "eps": 1e-8, "weight_decay": 0.0} | options
    optimizer = AdamWEMA(parameters, impl=target["impl"], **settings)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer, parameters


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_a_replaced_moment_is_used_instead_of_the_old_one(name, target):
    optimizer, (p,) = optimizer_of(target, torch.zeros(5))
    old = optimizer.state[p][name]
    kept, new = old.clone(), old.clone().fill_(4.0)
    optimizer.state[p][name] = new
    optimizer.step()
    assert torch.equal(old, kept)
    torch.testing.assert_close(new, torch.full_like(new, 2.5))  # 0.5 * 4 + 0.5 * 1


def test_a_replaced_state_is_used_instead_of_the_old_one(target):
    optimizer, (p, q) = optimizer_of(target, torch.zeros(5), torch.zeros(3))
    old = optimizer.state[p]
    kept = {name: x.clone() for name, x in old.items()}
    new = {name: x.clone() for name, x in old.items()}
    optimizer.state[p] = new
    optimizer.step()
    for name, x in kept.items():
        assert torch.equal(old[name], x)
        assert not torch.equal(new[name], x)
    assert optimizer.steps.tolist() == [2.0, 2.0]
    assert optimizer.state[q]["step"].item() == 2.0


def test_parameters_follow_their_groups(target):
    """The same parameters in the same order; only the border of the groups moves."""
    optimizer, (p, q, r) = optimizer_of(target, *torch.zeros(3, 5).unbind())
    first = optimizer.param_groups[0]
    for lr, border in ((0.0, 1), (0.0, 2), (0.5, 1)):
        before = [x.detach().clone() for x in (p, q, r)]
        first["params"] = [p, q, r][:border]
        second = first | {"params": [p, q, r][border:], "lr": lr}
        optimizer.param_groups[1:] = [second]
        optimizer.step()
        rates = [0.1] * border + [lr] * (3 - border)
        for x, old, rate in zip((p, q, r), before, rates, strict=True):
            torch.testing.assert_close(x, old - rate, rtol=1e-5, atol=1e-6)


def test_a_gradient_that_appears_later_is_used(target):
    optimizer, _ = optimizer_of(target, torch.zeros(5), torch.zeros(3))
    r = torch.nn.Parameter(torch.zeros(2, device=target["device"]))
    optimizer.add_param_group({"params": [r]})
    optimizer.step()  # r has neither a gradient nor a state
    r.grad = torch.ones_like(r)
    optimizer.step()
    assert optimizer.steps.tolist() == [3.0, 3.0, 1.0]
    torch.testing.assert_close(r, torch.full_like(r, -0.1))


def test_a_row_to_normalise_is_checked_for_known_tensors_too(target):
    lists = make(target["device"], [(4, 8), (3, 5)])
    lists.step(target)
    lists.step(target, unit_rows=0)
    with pytest.raises(ValueError, match=r"unit_rows: expected parameters\[1\] .*power of two"):
        lists.step(target, unit_rows=1)


def test_tables_are_those_of_the_present_number_of_gradients(target):
    """Gradients in the same memory, of which one goes and comes back."""
    lists = make(target["device"], [(4,), (6,)], copies=False)
    both = list(lists.gradients)
    for gradients in (both, [both[0], None], both, [None, both[1]]):
        before = [p.clone() for p in lists.parameters]
        lists.gradients = gradients
        lists.step(target)
        moved = [not torch.equal(p, b) for p, b in zip(lists.parameters, before, strict=True)]
        assert moved == [g is not None for g in gradients]


def test_a_momentum_of_zero_is_not_the_default(target):
    teacher = torch.full((5,), 7.0, device=target["device"])
    optimizer, (p,) = optimizer_of(target, torch.zeros(5), teacher=[teacher], momentum=1.0)
    assert torch.equal(teacher, torch.full_like(teacher, 7.0))
    optimizer.step(momentum=0.0)
    assert torch.equal(teacher, p)
    assert optimizer.momentum == 1.0


def test_skip_holds_in_a_first_step_without_a_rate(target):
    """torch.distributed.checkpoint's first step has another reason to change nothing."""
    p = torch.nn.Parameter(torch.zeros(5, device=target["device"]))
    teacher = torch.ones_like(p)
    optimizer = AdamWEMA([p], lr=0.0, teacher=[teacher], momentum=0.5, impl=target["impl"])
    p.grad = torch.ones_like(p)
    optimizer.step(skip=torch.ones((), device=target["device"]))
    assert torch.equal(teacher, torch.ones_like(teacher))
    assert optimizer.steps.tolist() == [0.0]
    optimizer.step(skip=torch.zeros((), device=target["device"]))
    assert torch.equal(teacher, torch.full_like(teacher, 0.5))


@pytest.mark.parametrize("role", ["parameters", "exp_avgs", "exp_avg_sqs", "teachers"])
@pytest.mark.parametrize("shift", [-39, -1, 0, 1, 39])
def test_gradients_in_the_memory_of_a_written_tensor_are_an_error(role, shift, target):
    """Also if they begin elsewhere, and if the other tensors are known from an earlier step."""
    lists = make(target["device"], [(4,), (40,)], copies=False)
    room = torch.zeros(128, device=target["device"])
    getattr(lists, role)[1] = room[48:88].copy_(getattr(lists, role)[1])
    own = list(lists.gradients)
    lists.step(target)
    before = lists.copies()
    lists.gradients = [own[0], room[48 + shift : 88 + shift]]
    with pytest.raises(ValueError, match=rf"{role}\[1\] and gradients\[1\] share memory"):
        lists.step(target)
    assert_unchanged(lists, before)
    for other in (room[8:48], room[88:128]):
        lists.gradients = [own[0], other.copy_(own[1])]
        lists.step(target)
    assert lists.steps.tolist() == [3.0, 4.0]
