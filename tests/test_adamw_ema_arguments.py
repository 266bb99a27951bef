"""Invalid arguments of adamw_ema_update_."""

import math

import pytest
import torch
from fastdino_kernels import adamw_ema_update_

A, B, C, D, E = (torch.full((2, 3), float(x)) for x in range(5))
NO_MOMENTS = {"exp_avgs": [None], "exp_avg_sqs": [None]}
NO_TEACHER = {"teachers": [None], "teacher_shadows": [E.half()]}
REPEATED = torch.zeros(1, 3).expand(2, 3)


@pytest.mark.parametrize(
    ("lists", "options", "raises", "match"),
    [
        ({"gradients": []}, {}, ValueError, "parameters and gradients .*length, got 1 and 0"),
        ({"teachers": [E, E]}, {}, ValueError, "parameters and teachers .*got 1 and 2"),
        ({"gradients": [B.t()]}, {}, ValueError, r"gradients\[0\] .*\(2, 3\) and \(3, 2\)"),
        ({"exp_avgs": [C[0]]}, {}, ValueError, r"exp_avgs\[0\] must have the same shape"),
        (
            {"teachers": [E.to("meta")]},
            {},
            ValueError,
            r"parameters\[0\] and teachers\[0\] .*device, got cpu and meta",
        ),
        (
            {"gradients": [B.to("meta")]},
            {},
            ValueError,
            r"parameters\[0\] and gradients\[0\] .*device, got cpu and meta",
        ),
        ({"parameters": [A.long()]}, {}, TypeError, r"parameters\[0\] .*torch.int64"),
        ({"parameters": [1.0]}, {}, TypeError, r"parameters\[0\] .*got float"),
        ({"gradients": [B.to_sparse()]}, {}, TypeError, r"gradients\[0\] .*dense.*sparse_coo"),
        ({"exp_avgs": [None]}, {}, ValueError, r"exp_avgs\[0\] and exp_avg_sqs\[0\].*both or none"),
        (NO_MOMENTS, {}, ValueError, r"gradients\[0\] is given: expected exp_avgs\[0\]"),
        ({"teachers": [A]}, {}, ValueError, r"parameters\[0\] and teachers\[0\] share memory"),
        ({"gradients": [A]}, {}, ValueError, r"parameters\[0\] and gradients\[0\] share memory"),
        ({"shadows": [C]}, {}, ValueError, r"exp_avgs\[0\] and shadows\[0\] share memory"),
        ({"exp_avgs": [REPEATED]}, {}, ValueError, r"exp_avgs\[0\] is writ.*strides \(0, 1\)"),
        (NO_TEACHER, {}, ValueError, r"teacher_shadows\[0\] is given: expected teachers\[0\]"),
        ({}, {"unit_rows": 1}, ValueError, "unit_rows must be the index of a parameter, got 1"),
        ({}, {"unit_rows": 0}, ValueError, r"expected parameters\[0\] .* got \(2, 3\), strides"),
        ({"steps": torch.zeros(2)}, {}, ValueError, r"steps must have shape \(1,\), got \(2,\)"),
        (
            {"steps": torch.zeros(1).double()},
            {},
            ValueError,
            r"steps\[0\] must be fp32 \[\], got torch.float64",
        ),
        (
            {"steps": torch.zeros(1).to("meta")},
            {},
            ValueError,
            r"steps\[0\] must be on the same device, got cpu and meta",
        ),
        ({}, {"lr": -0.1}, ValueError, r"lr must be >= 0, got -0\.1"),
        ({}, {"lr": math.nan}, ValueError, "lr must be >= 0, got nan"),
        ({}, {"lr": "fast"}, TypeError, "lr must be a float or a 0-d tensor, got str"),
        ({}, {"lr": torch.ones(1)}, ValueError, r"lr .*0-d tensor, got shape \(1,\)"),
        ({}, {"lr": torch.tensor(1)}, TypeError, "lr must have one of the dtypes"),
        ({}, {"lr": torch.tensor(1.0).to("meta")}, ValueError, "lr is on meta"),
        ({}, {"weight_decay": -1}, ValueError, "weight_decay must be >= 0, got -1"),
        ({}, {"eps": -1e-8}, ValueError, "eps must be >= 0"),
        ({}, {"eps": torch.tensor(1e-8)}, TypeError, "eps must be a float, got Tensor"),
        ({}, {"betas": (0.9, 1.0)}, ValueError, r"betas must be in \[0, 1\), got \(0\.9, 1\.0\)"),
        ({}, {"betas": (0.9,)}, TypeError, "betas must be two floats"),
        ({}, {"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\], got 1\.5"),
        ({}, {"momentum": None}, ValueError, "momentum must be given"),
        ({}, {"max_norm": 0.0}, ValueError, "max_norm must be > 0, got 0"),
        ({}, {"max_norm": "3"}, TypeError, "max_norm must be a float, got str"),
        ({}, {"norms": torch.ones(2)}, ValueError, r"norms must have shape \(1,\)"),
        ({}, {"skip": True}, TypeError, "skip must be a torch.Tensor, got bool"),
        ({}, {"skip": torch.ones(1)}, ValueError, r"skip must have shape \(\), got \(1,\)"),
        (
            {},
            {"found_inf": torch.ones((), device="meta")},
            ValueError,
            "found_inf must be on the same device, got cpu and meta",
        ),
        ({}, {"impl": "cuda"}, ValueError, "impl must be one of .*got 'cuda'"),
        ({"parameters": [A.double()]}, {"impl": "triton"}, ValueError, "fp32.*float64"),
        ({"gradients": [B.double()]}, {"impl": "triton"}, ValueError, "fp32.*float64"),
    ],
)
def test_invalid_arguments_change_nothing(lists, options, raises, match):
    whole = {"parameters": [A], "gradients": [B], "exp_avgs": [C], "exp_avg_sqs": [D],
             "steps": torch.zeros(1), "teachers": [E], "momentum": 0.9, "lr": 0.1}  # fmt: skip
    if "impl" in options and torch.cuda.is_available() and options["impl"] == "triton":
        pytest.skip("Triton needs CUDA tensors here")
    with pytest.raises(raises, match=match):
        adamw_ema_update_(**(whole | lists | options))
    for value, tensor in enumerate((A, B, C, D, E)):
        assert torch.equal(tensor, torch.full((2, 3), float(value)))
