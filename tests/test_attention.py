"""Attention backends: equal results, and the tests that a backend must pass to be used."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial

import pytest
import torch

from fastdino.models import attention
from fastdino.models.attention import (
    BACKENDS,
    AttentionBackend,
    AttentionInputs,
    attend,
    attention_problem,
    token_layout,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MIXED = ((2, 5), (3, 2), (1, 1))


def plain_attend(query, key, value, groups, first_only):
    """Attention of one sequence at a time, in plain operations."""
    outputs, start = [], 0
    for i, n in enumerate(n for sequences, n in groups for _ in range(sequences)):
        keys, values = key[start : start + n], value[start : start + n]
        queries = query[i : i + 1] if first_only else query[start : start + n]
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / query.shape[-1] ** 0.5
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        start += n
    return torch.cat(outputs)


def results(function, groups, first_only, *, device=CPU, dtype=torch.float64, head_dim=8):
    """Return the output of attention and its gradients for noise that is equal in every dtype."""
    generator = torch.Generator().manual_seed(0)
    sequences, tokens = sum(s for s, _ in groups), sum(s * n for s, n in groups)
    rows = sequences if first_only else tokens
    query, key, value, gradient = (
        torch.randn(n, 3, head_dim, generator=generator, dtype=torch.float64).to(device, dtype)
        for n in (rows, tokens, tokens, rows)
    )
    inputs = [x.requires_grad_() for x in (query, key, value)]
    out = function(*inputs)
    assert out.dtype == dtype
    return [x.double().cpu() for x in (out, *torch.autograd.grad(out, inputs, gradient))]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("first_only", [False, True], ids=["all", "first"])
@pytest.mark.parametrize("groups", [MIXED, ((4, 3),)], ids=["mixed", "one"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_attend_only_to_themselves(backend, groups, first_only):
    options = {"groups": groups, "first_only": first_only}
    kernel = partial(attend, layout=token_layout(groups, CPU, backend), first_only=first_only)
    got, want = results(kernel, **options), results(partial(plain_attend, **options), **options)
    for ours, plain in zip(got, want, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("first_only", [False, True], ids=["all", "first"])
@pytest.mark.parametrize(
    ("backend", "module", "name"),
    [
        ("xformers", "xformers.ops", "memory_efficient_attention"),
        ("varlen", "torch.nn.attention.varlen", "varlen_attn"),
    ],
    ids=["xformers", "varlen"],
)
def test_calls_fit_the_signatures_of_the_libraries(monkeypatch, backend, module, name, first_only):
    """Only a GPU runs the real functions, so their signatures bind what they would get."""
    library = pytest.importorskip(module)
    signature, calls = inspect.signature(getattr(library, name)), []

    def bind(*args, **options):
        calls.append(signature.bind(*args, **options).arguments)
        return calls[-1]["query"]

    monkeypatch.setattr(library, name, bind)
    token_layout.cache_clear()  # layouts keep the functions
    query, key, value = (torch.randn(n, 3, 8) for n in (6 if first_only else 17, 17, 17))
    attend(query, key, value, token_layout(MIXED, CPU, backend), first_only=first_only)
    token_layout.cache_clear()
    (call,) = calls
    for tensor in ("query", "key", "value"):
        given = call.pop(tensor)
        own = {"query": query, "key": key, "value": value}[tensor]
        assert torch.equal(given, own.unsqueeze(0) if backend == "xformers" else own)
    ends = [0, 5, 10, 12, 14, 16, 17]
    starts = list(range(7)) if first_only else ends
    if backend == "xformers":
        mask = call.pop("attn_bias")
        assert mask.q_seqinfo.seqstart_py == starts
        assert mask.k_seqinfo.seqstart_py == ends
    else:
        assert [call.pop(f"cu_seq_{x}").tolist() for x in "qk"] == [starts, ends]
        assert [call.pop(f"max_{x}") for x in "qk"] == [1 if first_only else 5, 5]
    assert call == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("first_only", [False, True], ids=["all", "first"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gpu_backends_are_as_accurate_as_plain_operations(backend, first_only, dtype, head_dim):
    problem = attention_problem(backend, AttentionInputs(CUDA, dtype, head_dim))
    if problem is not None:
        pytest.skip(f"no {backend}: {problem}")
    groups = ((4, 197), (16, 37))
    run = {"groups": groups, "first_only": first_only, "device": CUDA, "head_dim": head_dim}
    plain = partial(plain_attend, groups=groups, first_only=first_only)
    kernel = partial(attend, layout=token_layout(groups, CUDA, backend), first_only=first_only)
    got, low = (results(function, dtype=dtype, **run) for function in (kernel, plain))
    exact = results(plain, **run)
    rounding = torch.finfo(dtype).eps
    for ours, theirs, want in zip(got, low, exact, strict=True):
        allowed = (theirs - want).abs().max() + rounding * want.abs().max()
        assert (ours - want).abs().max() <= allowed


def test_layout_selects_splits_and_spreads():
    layout = token_layout(MIXED, CPU, "sdpa")
    x = torch.arange(17)
    assert layout.tokens == 17
    assert layout.first(x).tolist() == [0, 5, 10, 12, 14, 16]
    assert [part.tolist() for part in layout.split(x)] == [
        [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]],
        [[10, 11], [12, 13], [14, 15]],
        [[16]],
    ]
    assert all(part.data_ptr() >= x.data_ptr() for part in layout.split(x))
    spread = layout.spread(torch.tensor([[1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 0, 0]]))
    assert spread[0].tolist() == [1] * 5 + [2] * 5 + [3, 3, 4, 4, 5, 5, 6]
    assert spread[1].tolist() == [0] * 10 + [1] * 4 + [0] * 3


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("backend", BACKENDS)
def test_cached_layouts_hold_no_inference_tensors(backend):
    """Inference tensors cannot be saved for a later backward pass."""
    groups = ((3, 2), (2, 3))
    with torch.inference_mode():
        first = token_layout(groups, CPU, backend)
    assert token_layout(groups, CPU, backend) is first
    tensors = [first.first_tokens, *(first.bounds or ())]
    tensors += [mask.q_seqinfo.seqstart for mask in first.masks or ()]
    assert not any(tensor.is_inference() for tensor in tensors)


def test_too_many_tokens_are_an_error():
    with pytest.raises(ValueError, match=r"2147483648 tokens in one pass, expected fewer"):
        token_layout(((2, 2**30),), CPU, "sdpa")


@pytest.fixture
def cuda(monkeypatch, emulated) -> None:
    """Backend tests for CUDA inputs run on the CPU, with emulated kernels."""
    real = attention._compare
    monkeypatch.setattr(
        attention,
        "_compare",
        lambda name, inputs, function: real(name, replace(inputs, device=CPU), function),
    )


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("fitting", "failing"),
    [
        ({"head_dim": 16}, {"head_dim": 12}),
        ({"sequences": ((2, 300), (1, 2))}, {"sequences": ((2, 301), (1, 2))}),
    ],
)
def test_backends_are_tested_with_the_head_dim_and_lengths_of_the_run(
    monkeypatch, fitting, failing
):
    ops = pytest.importorskip("xformers.ops")
    emulation = ops.memory_efficient_attention

    def picky(query, key, value, attn_bias):
        if query.shape[-1] % 8 or attn_bias.k_seqinfo.max_seqlen > 300:
            raise NotImplementedError(
                "No operator found for `memory_efficient_attention_forward` with inputs:\n"
                "     query       : shape=(1, 108, 2, 4) (torch.float16)\n"
                "`fa2F` is not supported because:\n    query.shape[-1] % 8 != 0 or too long\n"
                "`cutlassF` is not supported because:\n    query.shape[-1] % 8 != 0 or too long\n"
            )
        return emulation(query, key, value, attn_bias)

    monkeypatch.setattr(ops, "memory_efficient_attention", picky)
    assert attention_problem("xformers", AttentionInputs(CUDA, **fitting)) is None
    attention.token_layout.cache_clear()
    problem = attention_problem("xformers", AttentionInputs(CUDA, **failing))
    assert problem == "query.shape[-1] % 8 != 0 or too long"


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("wrong", ["value", "mask", "nan", "first"])
def test_wrong_kernels_are_rejected(monkeypatch, wrong):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    emulation = varlen.varlen_attn

    def broken(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
        if wrong == "mask":  # ignores the ends of the sequences
            ends = (torch.tensor([0, cu[-1]], dtype=torch.int32) for cu in (cu_seq_q, cu_seq_k))
            return emulation(query, key, value, *ends, cu_seq_q[-1], cu_seq_k[-1])
        out = emulation(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
        if wrong == "first":  # wrong only for queries of first tokens
            return out if max_q == max_k else out * 1.5
        return out * {"value": 1.5, "nan": float("nan")}[wrong]

    monkeypatch.setattr(varlen, "varlen_attn", broken)
    assert attention_problem("varlen", AttentionInputs(CUDA)).startswith("its result is off by")


@pytest.mark.usefixtures("cuda")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # raised by Dynamo
def test_backends_that_break_the_compiled_graph_are_rejected(monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    eager = AttentionInputs(CUDA, head_dim=16, sequences=((2, 5), (2, 2)))
    compiled = replace(eager, compiled=True)
    assert attention_problem("varlen", compiled) is None
    emulation = varlen.varlen_attn

    def breaking(*args):
        torch._dynamo.graph_break()
        return emulation(*args)

    monkeypatch.setattr(varlen, "varlen_attn", breaking)
    attention.token_layout.cache_clear()
    assert attention_problem("varlen", eager) is None
    problem = attention_problem("varlen", compiled)
    assert problem.startswith("torch.compile cannot trace it (")
    assert "\n" not in problem


@pytest.mark.usefixtures("cuda")
def test_backend_tests_keep_the_random_state():
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    assert attention_problem("xformers", AttentionInputs(CUDA)) is None
    assert torch.equal(torch.rand(3), want)


def test_missing_backends_are_reported(monkeypatch):
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    inputs = AttentionInputs(CUDA)
    assert attention_problem("xformers", inputs) == "it is not installed"
    assert attention_problem("varlen", inputs) == f"PyTorch {torch.__version__} does not have it"


def test_matmul_is_for_cpus_and_can_be_compiled():
    assert attention_problem("matmul", AttentionInputs(CUDA)) == "it is made for CPUs"
    for dtype, compiled in ((torch.float32, False), (torch.bfloat16, True)):
        inputs = AttentionInputs(
            CPU, dtype, head_dim=16, sequences=((2, 5), (2, 2)), compiled=compiled
        )
        assert attention_problem("matmul", inputs) is None


def test_matmul_is_tested_on_short_sequences(monkeypatch):
    """Its products treat all lengths alike, and those of long sequences take seconds."""
    tested = []
    monkeypatch.setattr(
        attention, "_compare", lambda name, inputs, function: tested.append(inputs.sequences)
    )
    long = AttentionInputs(CPU, sequences=((2, 3601), (8, 145)))
    assert attention_problem("matmul", long) is None
    assert tested == [((2, 256), (8, 145))]


def test_other_inputs_than_those_of_the_backend_use_sdpa():
    backend = AttentionBackend("xformers", torch.float16)
    assert backend.for_inputs(CUDA, torch.float16) == "xformers"
    assert backend.for_inputs(torch.device("cuda", 1), torch.float16) == "xformers"
    assert backend.for_inputs(CUDA, torch.float32) == "sdpa"
    assert backend.for_inputs(CPU, torch.float16) == "sdpa"
    on_cpu = AttentionBackend("matmul", torch.float32)
    assert on_cpu.for_inputs(CPU, torch.float32) == "matmul"
    assert on_cpu.for_inputs(CPU, torch.bfloat16) == "sdpa"
    assert on_cpu.for_inputs(CUDA, torch.float32) == "sdpa"


def test_the_reasons_of_xformers_fit_on_one_line():
    ops = pytest.importorskip("xformers.ops")
    x = torch.zeros(1, 4, 1, 8)
    with pytest.raises(NotImplementedError) as refusal:
        ops.memory_efficient_attention(x, x, x)
    line = attention._one_line(refusal.value)
    assert "device=cpu" in line
    assert "shape=" not in line
    assert "\n" not in line
    assert attention._one_line(RuntimeError("")) == "RuntimeError('')"
