"""Kernels that update parameters: clip, AdamW, EMA, and their tables of pointers."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

PACKAGE = "kernels/fastdino_kernels"
FUSED = f"{PACKAGE}/adamw_ema_triton.py"
PLAIN = f"{PACKAGE}/adamw_ema_torch.py"
ENTRY = f"{PACKAGE}/adamw_ema.py"
OPTIMIZER = f"{PACKAGE}/adamw_ema_optimizer.py"
EMA = f"{PACKAGE}/ema.py"
EMA_KERNEL = f"{PACKAGE}/ema_triton.py"
CLIP = f"{PACKAGE}/clip.py"
CLIP_KERNEL = f"{PACKAGE}/clip_triton.py"
CHUNKS = f"{PACKAGE}/chunk_triton.py"
TABLE = f"{PACKAGE}/pointer_table.py"
LISTS = f"{PACKAGE}/tensor_lists.py"
DTENSOR = f"{PACKAGE}/dtensor.py"
LAUNCH = f"{PACKAGE}/kernel_launch.py"
MEMORY = f"{PACKAGE}/memory.py"
DISPATCH = f"{PACKAGE}/dispatch.py"
NORMS = f"{PACKAGE}/norms.py"

STEP = ("tests/test_adamw_ema.py::test_one_step_matches_the_equations",)
FLAGS = ("tests/test_adamw_ema_flags.py",)
LAYOUTS = ("tests/test_adamw_ema_triton.py",)
SMALL = ("tests/test_adamw_ema.py",)
MOMENTUM = (
    "tests/test_ema.py::test_momentum_may_be_a_tensor",
    "tests/test_ema.py::test_fp64_momentum_is_not_rounded_to_fp32",
)
CLIPS = ("tests/test_clip.py",)
ALIGNMENT = ("tests/test_alignment.py",)

MUTANTS = (
    # AdamW and EMA, Triton
    Mutant(
        FUSED,
        "p -= shrink * p\n    return p - step_size * tl.div_rn(",
        "return (1 - shrink) * p - (1 - shrink) * step_size * tl.div_rn(",
        STEP,
    ),
    Mutant(
        FUSED,
        "tl.sqrt_rn(v) * root_scale + eps)",
        "(tl.sqrt_rn(v) + eps) * root_scale)",
        STEP,
    ),
    Mutant(
        FUSED,
        "1 - tl.exp2(count.to(tl.float64) * tl.load(h + LOG2_BETA2))",
        "1 - tl.exp2(count.to(tl.float32) * tl.load(h + LOG2_BETA2).to(tl.float32))",
        (
            "tests/test_adamw_ema.py::test_hyperparameters_may_be_tensors",
            "tests/test_adamw_ema.py::test_small_rates_keep_precision",
        ),
    ),
    Mutant(
        FUSED,
        "for role in tl.static_range(6):",
        "for role in tl.static_range(5):",
        ("tests/test_alignment.py::test_adamw_ema_aligns_no_tensor_that_is_not",),
    ),
    Mutant(
        FUSED,
        "together, _ = find_tensor(gradients, owner, 0, 1)",
        "together, _ = find_tensor(words, owner, PARAMETER, ROLES)",
        ("tests/test_alignment.py::test_adamw_ema_aligns_no_tensor_that_is_not",),
    ),
    Mutant(
        FUSED,
        "tl.load(flag) * (1 - overflow)",
        "tl.load(flag)",
        ("tests/test_adamw_ema_flags.py::test_overflow_of_loss_scaling_is_not_counted",),
    ),
    Mutant(
        FUSED,
        "(nothing | overflow) == 0",
        "nothing == 0",
        ("tests/test_adamw_ema_flags.py::test_found_inf_updates_only_the_teacher",),
    ),
    Mutant(
        FUSED,
        "torch.empty if measures else torch.zeros",
        "torch.empty",
        ("tests/test_adamw_ema_flags.py::test_new_memory_may_hold_anything",),
    ),
    Mutant(
        FUSED,
        '(tl.abs(norm) < float("inf")) == 0',
        "norm != norm",
        ("tests/test_adamw_ema_flags.py::test_nonfinite_gradient_is_refused_and_counted",),
    ),
    Mutant(
        FUSED,
        "            norm = tl.div_rn(norm, tl.load(grad_scale).to(tl.float32))\n",
        "            norm = norm * 1.0\n",
        ("tests/test_adamw_ema_flags.py::test_gradients_are_divided_by_the_loss_scale",),
    ),
    Mutant(
        FUSED,
        "hyper + tl.load(words + index * ROLES + GROUP) * HYPER",
        "hyper",
        ("tests/test_adamw_ema_optimizer.py::test_optimizer_equals_clip_adamw_and_ema",),
    ),
    Mutant(
        FUSED,
        "key = values, [tensor.data_ptr() for _, tensor in tensors]",
        "key = values",
        (
            "tests/test_adamw_ema_triton.py::test_calls_with_their_own_learning_rates_share_no_table",
        ),
    ),
    Mutant(
        FUSED,
        "tl.maximum(norms, UNIT_EPS)",
        "tl.maximum(norms, 0.0)",
        ("tests/test_adamw_ema.py::test_unit_rows_normalise_the_teachers_copy",),
    ),
    # AdamW and EMA, PyTorch
    Mutant(
        PLAIN,
        "torch.ones_like(steps[0]) if stays is None else 1 - stays",
        "torch.ones_like(steps[0])",
        ("tests/test_adamw_ema_flags.py::test_found_inf_updates_only_the_teacher",),
    ),
    Mutant(
        PLAIN,
        "for i in (0, 2, 3) if work",
        "for i in (0, 2) if work",
        STEP,
    ),
    Mutant(
        PLAIN,
        "first += group.count",
        "first += 0",
        ("tests/test_adamw_ema_optimizer.py::test_optimizer_equals_clip_adamw_and_ema",),
    ),
    Mutant(
        PLAIN,
        "torch.where(stays != 0, torch.ones_like(decay), decay)",
        "decay",
        ("tests/test_adamw_ema_flags.py::test_found_inf_updates_only_the_teacher",),
    ),
    Mutant(
        PLAIN,
        "bad & ~overflow",
        "bad",
        ("tests/test_adamw_ema_flags.py::test_overflow_of_loss_scaling_is_not_counted",),
    ),
    # The call and its caches
    Mutant(
        ENTRY,
        "key = impl, chosen, counts, call.unit_rows, keys[1]",
        "key = impl, chosen, counts, keys[1]",
        ("tests/test_adamw_ema_caches.py",),
    ),
    Mutant(
        ENTRY,
        "cache.get((checked, keys[0])",
        "cache.get((keys[0],)",
        ("tests/test_adamw_ema_triton.py::test_gradients_of_another_order_are_checked_again",),
    ),
    Mutant(
        f"{PACKAGE}/adamw_ema_arguments.py",
        "if any(map(memory.meet, present([gradients]))):",
        "if False:",
        ("tests/test_adamw_ema_caches.py",),
    ),
    # The optimizer
    Mutant(
        OPTIMIZER,
        "self.momentum if momentum is None else momentum",
        "momentum or self.momentum",
        ("tests/test_adamw_ema_caches.py",),
        reported=True,
    ),
    Mutant(
        OPTIMIZER,
        "and all(map(operator.is_, entries, self.entries))",
        "and True",
        ("tests/test_adamw_ema_caches.py",),
    ),
    Mutant(
        OPTIMIZER,
        "tuple(map(Tensor.data_ptr, state))",
        "()",
        ("tests/test_adamw_ema_caches.py",),
    ),
    Mutant(
        OPTIMIZER,
        "if self.state or not some or",
        "if not some or",
        (
            "tests/test_adamw_ema_optimizer.py::test_only_a_first_step_without_rate_and_gradient_keeps_the_teacher",
        ),
    ),
    Mutant(
        OPTIMIZER,
        "idle if skip is None else idle.logical_or(skip)",
        "idle",
        ("tests/test_adamw_ema_caches.py",),
    ),
    Mutant(
        OPTIMIZER,
        "and all(gradients[i] is None for i in known.stateless)",
        "and True",
        ("tests/test_adamw_ema_caches.py",),
    ),
    Mutant(
        OPTIMIZER,
        "group[name] = _copied(own[name], group[name])",
        "pass",
        ("tests/test_adamw_ema_checkpoints.py::test_loaded_state_is_copied_into_existing_tensors",),
    ),
    # EMA
    Mutant(
        EMA_KERNEL,
        "(teacher | student | shadow) % 16",
        "(teacher | student) % 16",
        ("tests/test_alignment.py::test_ema_aligns_no_tensor_that_is_not",),
        reported=True,
    ),
    Mutant(
        EMA_KERNEL,
        "(teacher | student | shadow) % 16 == 0",
        "(teacher | student | shadow) % 8 == 0",
        ("tests/test_alignment.py::test_ema_aligns_no_tensor_that_is_not",),
    ),
    Mutant(
        EMA_KERNEL,
        "t = store_chunk(t, teacher, teacher_code, start, left, TEACHER, CHUNK, True)",
        "store_chunk(t, teacher, teacher_code, start, left, TEACHER, CHUNK, True)",
        ("tests/test_ema.py::test_shadow_is_rounded_from_the_stored_teacher",),
    ),
    Mutant(
        EMA_KERNEL,
        "tl.where(scale == 0, base, base + scale * (s - t))",
        "base + scale * (s - t)",
        ("tests/test_ema.py::test_momenta_of_zero_and_one_are_exact_with_nan_and_inf",),
    ),
    Mutant(
        EMA_KERNEL,
        "m = tl.load(momentum).to(tl.float64)",
        "m = tl.load(momentum).to(tl.float32)",
        MOMENTUM,
    ),
    Mutant(
        EMA,
        "1 - momentum.to(torch.promote_types(momentum.dtype, torch.float32))",
        "1 - momentum.to(torch.float32)",
        MOMENTUM,
    ),
    Mutant(EMA, "wide = torch.promote_types(wide, torch.float32)", "pass", MOMENTUM),
    Mutant(
        EMA,
        "for written in list(lists.values())[:-1]:",
        "for written in list(lists.values())[:1]:",
        ("tests/test_ema.py::test_module_parameters_are_updated_without_autograd",),
    ),
    # Clip
    Mutant(
        CLIP_KERNEL,
        "(grad % 16 == 0):\n        g = load_chunk(grad, code, start, left, DTYPE, CHUNK, True)\n"
        "        total",
        "True:\n        g = load_chunk(grad, code, start, left, DTYPE, CHUNK, True)\n        total",
        ("tests/test_alignment.py::test_clip_aligns_no_gradient_that_is_not",),
    ),
    Mutant(
        CLIP_KERNEL,
        "        if (left >= CHUNK) & (grad % 16 == 0):",
        "        if left >= CHUNK:",
        ("tests/test_alignment.py::test_clip_aligns_no_gradient_that_is_not",),
    ),
    Mutant(
        CLIP_KERNEL,
        "norm + EPS)",
        "norm)",
        ("tests/test_clip.py::test_factor_of_small_norms_has_the_papers_epsilon",),
    ),
    Mutant(
        CLIP_KERNEL,
        "tl.cdiv(tl.load(row + 1), CHUNK)",
        "tl.load(row + 1) // CHUNK",
        ("tests/test_clip.py::test_lengths_around_a_chunk_write_nothing_outside",),
    ),
    Mutant(
        CLIP_KERNEL,
        "mask=start + offsets < count",
        "mask=offsets < count",
        ("tests/test_clip.py::test_more_chunks_than_one_reduction_step",),
    ),
    Mutant(
        CLIP_KERNEL,
        "factor = tl.where(factor < 1, factor, 1.0)",
        "factor = tl.where(factor >= 1, 1.0, factor)",
        ("tests/test_clip.py::test_infinite_and_nan_norms_match_the_paper_code",),
    ),
    Mutant(
        CLIP,
        "torch.where(factors < 1, factors, 1.0) if each else factors.clamp(max=1.0)",
        "factors.clamp(max=1.0)",
        ("tests/test_clip.py::test_infinite_and_nan_norms_match_the_paper_code",),
    ),
    Mutant(
        CLIP,
        "max_norm / (norms + CLIP_EPS)",
        "max_norm / norms.clamp(min=CLIP_EPS)",
        ("tests/test_clip.py::test_factor_of_small_norms_has_the_papers_epsilon",),
    ),
    # Norms of long tensors on a CPU
    Mutant(
        NORMS,
        "tensor.is_cpu and tensor.numel() > ROW",
        "not tensor.is_cpu and tensor.numel() > ROW",
        (
            "tests/test_clip.py::test_millions_of_elements_are_clipped_accurately",
            "tests/test_optimizers.py::test_lars_scales_millions_of_weights_accurately",
        ),
    ),
    Mutant(
        NORMS,
        "while tensor.is_cpu",
        "if tensor.is_cpu",
        ("tests/test_norms.py::test_lengths_around_a_row",),
    ),
    Mutant(
        NORMS,
        "tensor = torch.cat([rows, last])",
        "tensor = rows",
        ("tests/test_norms.py::test_lengths_around_a_row",),
    ),
    Mutant(
        NORMS,
        "if tensor.is_contiguous():",
        "if tensor.dim() > 0:",
        ("tests/test_norms.py::test_dense_layouts_are_not_copied",),
    ),
    Mutant(
        NORMS,
        "traced = torch.compiler.is_compiling()",
        "traced = False",
        (
            "tests/test_clip_compile.py::test_shapes_may_change",
            "tests/test_clip_compile.py::test_gradients_may_be_transposed",
            "tests/test_norms.py::test_compiled_norms_of_every_layout_are_accurate",
        ),
    ),
    Mutant(
        NORMS,
        "return stacked.detach()",
        "return stacked",
        ("tests/test_norms.py::test_norms_have_no_gradient",),
    ),
    # Chunks, tables and keys
    Mutant(
        CHUNKS,
        "rounded, mask=offsets < left)",
        "rounded, mask=offsets <= left)",
        ("tests/test_ema.py::test_lengths_around_a_chunk_write_nothing_outside",),
    ),
    Mutant(
        CHUNKS,
        "mask=offsets < left, other=0.0)",
        "mask=offsets <= left, other=0.0)",
        ("tests/test_clip.py::test_lengths_around_a_chunk_write_nothing_outside",),
    ),
    Mutant(
        CHUNKS,
        "tl.load(rows + owner * 2 + 1) - start",
        "tl.load(rows + 1) - start",
        ("tests/test_ema.py::test_lengths_around_a_chunk_write_nothing_outside",),
    ),
    Mutant(TABLE, "max(1, -(-numel // chunk))", "-(-numel // chunk)"),
    Mutant(TABLE, "(used_on == stream or capturing) and known == key", "known == key"),
    Mutant(TABLE, "if not capturing:  # a value", "if True:  # a value"),
    Mutant(TABLE, "if len(self._free) < _PINNED_WORDS // 2:", "if len(self._free) == 0:"),
    Mutant(LISTS, "        tuple(map(dtype_of, tensors)),\n", ""),
    Mutant(LISTS, "        tuple(map(Tensor.numel, tensors)),\n", ""),
    Mutant(LISTS, "        gaps,\n        tuple(map(len, lists)),", "        gaps,"),
    Mutant(
        LISTS, "        gaps,\n        tuple(map(len, lists)),", "        tuple(map(len, lists)),"
    ),
    Mutant(
        LISTS,
        "tuple((t.shape, t.stride(), t.is_neg()) for t in tensors)",
        "tuple((t.shape, t.stride()) for t in tensors)",
    ),
    Mutant(DTENSOR, "if not placement.is_replicate())", "if True)", ("tests/test_sharded.py",)),
    Mutant(
        DTENSOR,
        "torch.stack([parts[index] for index in indices]).square()",
        "torch.stack([parts[index] for index in indices])",
        ("tests/test_sharded.py",),
    ),
    # Launches, memory and the choice of an implementation
    Mutant(LAUNCH, "v.data_ptr() & 15 if", "v.data_ptr() & 7 if", ("tests/test_kernel_launch.py",)),
    Mutant(
        LAUNCH,
        "signature, values, *options.values())",
        "signature, *options.values())",
        ("tests/test_kernel_launch.py",),
    ),
    Mutant(
        LAUNCH,
        "signature, values, *options.values())",
        "signature, values)",
        ("tests/test_kernel_launch.py",),
    ),
    Mutant(
        LAUNCH, "key = (kernel.fn, device,", "key = (kernel.fn,", ("tests/test_kernel_launch.py",)
    ),
    Mutant(
        MEMORY,
        "if start < end and min(index, other) < written:",
        "if start <= end and min(index, other) < written:",
    ),
    Mutant(
        MEMORY,
        "bisect.bisect_left(self._starts, start + _extent(tensor)) - 1",
        "bisect.bisect_right(self._starts, start) - 1",
        ("tests/test_adamw_ema_caches.py",),
    ),
    Mutant(MEMORY, "extent += (size - 1) * stride", "extent += size * stride"),
    Mutant(DISPATCH, "capability >= OLDEST_CAPABILITY", "capability > OLDEST_CAPABILITY"),
    Mutant(
        DISPATCH,
        "if torch.float64 in [tensor.dtype for tensor in tensors]:",
        "if torch.float64 in [tensor.dtype for tensor in tensors[:1]]:",
    ),
    Mutant(
        DISPATCH,
        "for device in {tensor.device for tensor in tensors}:",
        "for device in {tensor.device for tensor in tensors[:1]}:",
    ),
    Mutant(DISPATCH, "(problem or not on_gpu)", "problem"),
)
