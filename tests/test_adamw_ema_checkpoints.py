"""Checkpoints and copies of AdamWEMA against those of torch.optim.AdamW."""

import copy
import io
import math
import pickle

import pytest
import torch
from fastdino_kernels import AdamWEMA

from tests.optimizer_networks import assert_networks_close, groups_of, networks, set_gradients

THEIRS = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"foreach": True, "capturable": True},
}


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("kind", THEIRS)
def test_checkpoints_are_interchangeable_with_adamw(kind, saved, target):
    if kind == "capturable" and target["device"] == "cpu":
        pytest.skip("capturable is for accelerators")
    if target == {"impl": "triton", "device": "cpu"} and (kind != "fused" or not saved):
        pytest.skip("the interpreter is slow, and one kind shows it")

    def carry(state):
        """Copy a state, through a file if `saved`."""
        if not saved:
            return copy.deepcopy(state)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def both():
        ours, theirs = networks(target["device"])
        optimizer = AdamWEMA(groups_of(ours), impl=target["impl"])
        return ours, optimizer, theirs, torch.optim.AdamW(groups_of(theirs), **THEIRS[kind])

    ours, our_adamw, theirs, their_adamw = both()
    for step in range(3):
        for network, optimizer in ((ours, our_adamw), (theirs, their_adamw)):
            set_gradients(network, step, without=(3,) if step < 2 else ())
            optimizer.step()
    other, our_other, others, their_other = both()
    other.load_state_dict(theirs.state_dict())
    others.load_state_dict(ours.state_dict())
    our_other.load_state_dict(carry(their_adamw.state_dict()))
    their_other.load_state_dict(carry(our_adamw.state_dict()))
    everyone = [(ours, our_adamw), (theirs, their_adamw), (other, our_other), (others, their_other)]
    for step in range(3, 5):
        for network, optimizer in everyone:
            set_gradients(network, step)
            optimizer.step()
    assert our_other.state_dict()["param_groups"] == our_adamw.state_dict()["param_groups"]
    for network, optimizer in everyone[1:]:
        assert_networks_close(network, ours)
        for p, q in zip(network.parameters(), ours.parameters(), strict=True):
            state, expected = optimizer.state[p], our_adamw.state[q]
            assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
            assert state["step"].item() == expected["step"].item()
            torch.testing.assert_close(state["exp_avg"], expected["exp_avg"])
            torch.testing.assert_close(state["exp_avg_sq"], expected["exp_avg_sq"])


def test_state_dict_has_the_format_of_fused_adamw():
    ours, theirs = networks()
    optimizers = AdamWEMA(groups_of(ours)), torch.optim.AdamW(groups_of(theirs), fused=True)
    for network, optimizer in zip((ours, theirs), optimizers, strict=True):
        set_gradients(network, 0, without=(1,))
        optimizer.step()
    own, expected = (optimizer.state_dict() for optimizer in optimizers)
    assert own["param_groups"] == expected["param_groups"]
    assert list(own["state"]) == list(expected["state"])
    for i, state in expected["state"].items():
        for name, value in state.items():
            assert own["state"][i][name].shape == value.shape
            assert own["state"][i][name].dtype == value.dtype


@pytest.mark.parametrize(
    "change", ["a dict", "a copy", "a pickle", "by hand", "cleared", "another group", "order"]
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_step_counts_belong_to_their_parameters(change, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    (network,) = networks(device, 1)
    optimizer = AdamWEMA(groups_of(network), skip_nonfinite=True)
    for step, without in enumerate([(1,), (1,), ()]):
        set_gradients(network, step, without)
        optimizer.step()
    expected = [3.0, 1.0, 3.0, 3.0]  # of the parameters of the network, in its order
    if change == "a dict":
        state = copy.deepcopy(optimizer.state_dict())
        set_gradients(network, 2)
        optimizer.step()
        optimizer.load_state_dict(state)
    elif change in ("a copy", "a pickle"):
        pair = (network, optimizer)
        network, optimizer = (
            copy.deepcopy(pair) if change == "a copy" else pickle.loads(pickle.dumps(pair))
        )
    elif change == "by hand":
        optimizer.state[network[0].weight]["step"] = torch.tensor(7.0, device=device)
        expected[0] = 7.0
    elif change == "cleared":
        optimizer.state.clear()
        expected = [0.0] * 4
    elif change == "another group":
        network.append(torch.nn.Linear(3, 1, bias=False, device=device))
        optimizer.add_param_group({"params": [network[3].weight]})
        expected.append(0.0)
    else:
        optimizer.param_groups.reverse()
    for step in (3, 4):
        set_gradients(network, step, without=(2,))
        optimizer.step()
    counts = [optimizer.state[p].get("step", 0.0) for p in network.parameters()]
    assert counts == [count + 2.0 * (i != 2) for i, count in enumerate(expected)]
    in_groups = [p for group in optimizer.param_groups for p in group["params"]]
    assert optimizer.steps.tolist() == [optimizer.state[p].get("step", 0.0) for p in in_groups]


def test_loaded_state_is_copied_into_existing_tensors():
    """A captured graph reads the existing tensors."""
    (network,) = networks(count=1)
    lr = torch.tensor(0.1)
    optimizer = AdamWEMA(network.parameters(), lr=lr)
    set_gradients(network, 0)
    optimizer.step()
    before = {p: dict(state) for p, state in optimizer.state.items()}
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = 0.7
    state["state"][1]["exp_avg"].fill_(5.0)
    state["state"][1]["step"].fill_(9.0)
    del state["state"][0]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.7)
    bias = network[0].bias
    assert optimizer.state[bias]["exp_avg"] is before[bias]["exp_avg"]
    assert bool((before[bias]["exp_avg"] == 5).all())
    assert before[bias]["step"].item() == 9
    set_gradients(network, 1)
    optimizer.step()
    assert optimizer.steps.tolist() == [1.0, 10.0, 2.0, 2.0]  # a missing state starts from 0


@pytest.mark.parametrize("name", ["amsgrad", "maximize"])
def test_state_with_amsgrad_or_maximize_is_an_error(name):
    ours, theirs = networks()
    adamw = torch.optim.AdamW(theirs.parameters(), **{name: True})
    optimizer = AdamWEMA(ours.parameters())
    with pytest.raises(ValueError, match=f"{name}=True is not supported"):
        optimizer.load_state_dict(adamw.state_dict())
    assert not optimizer.param_groups[0][name]


def test_state_of_another_optimizer_is_an_error():
    ours, theirs = networks()
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    set_gradients(theirs, 0)
    sgd.step()
    with pytest.raises(ValueError, match="state of an AdamW, got one of momentum_buffer"):
        AdamWEMA(ours.parameters()).load_state_dict(sgd.state_dict())


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
def test_distributed_checkpoint_does_not_move_the_teacher(lr):
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    student, teacher, new_student, new_teacher = networks(count=4)
    optimizer = AdamWEMA(student.parameters(), lr=lr, teacher=list(teacher.parameters()))
    set_gradients(student, 0)
    optimizer.step(momentum=0.9)
    state = get_optimizer_state_dict(student, optimizer)
    new_student[0].weight.data += 1
    shadow = [torch.full_like(p, math.nan) for p in new_student.parameters()]
    other = AdamWEMA(
        new_student.parameters(), lr=lr, teacher=list(new_teacher.parameters()), shadow=shadow
    )
    before = copy.deepcopy((new_teacher.state_dict(), new_student.state_dict()))
    set_optimizer_state_dict(new_student, other, state)
    after = (new_teacher.state_dict(), new_student.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert all(bool(copies.isnan().all()) for copies in shadow)
    assert other.steps.tolist() == [1.0] * 4
    for p, q in zip(new_student.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(other.state[p]["exp_avg"], optimizer.state[q]["exp_avg"])


def test_hooks_of_load_state_dict_run_around_the_checks():
    """A hook may repair a state, as one from another optimizer's checkpoint."""
    ours, theirs = networks()
    adamw = torch.optim.AdamW(theirs.parameters(), amsgrad=True)
    set_gradients(theirs, 0)
    adamw.step()
    optimizer, seen = AdamWEMA(ours.parameters()), []

    def without_amsgrad(optimizer, state_dict):
        groups = [group | {"amsgrad": False} for group in state_dict["param_groups"]]
        return {"state": state_dict["state"], "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(without_amsgrad)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.steps.tolist()))
    optimizer.load_state_dict(adamw.state_dict())
    assert seen == [[1.0] * 4]
    set_gradients(ours, 1)
    optimizer.step()
    assert optimizer.steps.tolist() == [2.0] * 4


def test_unit_rows_survive_a_copy_of_the_optimizer():
    p = torch.nn.Parameter(torch.full((2, 4), 2.0))
    made = AdamWEMA(
        [p], teacher=[p.detach().clone()], teacher_shadow=[torch.zeros(2, 4)], unit_rows=p
    )
    parameter, optimizer = copy.deepcopy((p, made))
    parameter.grad = torch.zeros(2, 4)
    optimizer.step(momentum=1.0)
    assert torch.equal(optimizer._teacher_shadows[parameter], torch.full((2, 4), 0.5))
