"""The losses of the kernel package: Triton and PyTorch, on one rank and several."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

PACKAGE = "kernels/fastdino_kernels"
PAIRWISE_TRITON = f"{PACKAGE}/pairwise_triton.py"
PAIRWISE_TORCH = f"{PACKAGE}/pairwise_torch.py"
MODULE = f"{PACKAGE}/dino_module.py"
SINKHORN = f"{PACKAGE}/sinkhorn.py"
SINKHORN_TRITON = f"{PACKAGE}/sinkhorn_triton.py"
COLLECTIVES = f"{PACKAGE}/collectives.py"
COMPAT = f"{PACKAGE}/compat"


def of(file: str, *names: str) -> tuple[str, ...]:
    """Return the arguments of pytest for tests of a file; for all of them without names."""
    path = f"tests/test_{file}.py"
    return tuple(f"{path}::test_{name}" for name in names) or (path,)


FAR = of("pairwise_extremes", "all_logits_far_from_zero")
INFINITE = of("pairwise_extremes", "a_chunk_of_minus_infinity_of_the_teacher_has_no_probability")
ONE = of("pairwise_extremes", "one_prototype_has_all_the_probability")
OWN = of("pairwise_extremes", "a_crop_is_not_compared_with_its_own_teacher_even_if_that_is_nan")
FRAME = of("pairwise_extremes", "only_the_rows_are_read_and_written")
ALIGNED = of(
    "pairwise_extremes",
    "vectors_are_promised_only_if_every_row_of_every_tensor_starts_at_16_bytes",
)
LAYOUT = of("pairwise_alignment")
PATCH = of(
    "patch_loss",
    "weights_of_any_stride",
    "denominator_may_be_a_tensor",
    "equals_dino_loss_of_one_crop_and_soft_cross_entropy",
    "non_contiguous_inputs",
    "center_may_change_before_the_backward_pass",
    "autocast_changes_nothing",
    "gradcheck",
    "small_weights_do_not_underflow_in_half_precision",
)
LINEAR = of(
    "linear_dino_loss",
    "matches_the_reference_in_float64",
    "weights_of_any_size_in_fp16",
    "equals_the_loss_of_the_logits",
    "empty_batch_has_loss_zero",
)
RANKS = of("collectives", "reductions_and_centers")
WAIT = of("collectives", "centers_wait_for_the_all_reduce")

PAIRWISE = (
    # A chunk's maximum: prototypes beyond the last one, and chunks of -inf
    Mutant(PAIRWISE_TRITON, "if not EVEN:\n        x = (", "if EVEN:\n        x = (", FAR),
    Mutant(PAIRWISE_TRITON, "if not EVEN:\n        x = tl.where", "if EVEN:\n        x = tl.where",
           FAR),
    Mutant(PAIRWISE_TRITON, 'return tl.where(m == float("-inf"), 0.0, m)', "return m", INFINITE),
    Mutant(PAIRWISE_TRITON, "k < prototypes, k + 1 < prototypes,",
           "k < prototypes, k < prototypes,", FAR),
    Mutant(PAIRWISE_TRITON, "k + BLOCK // 2 < prototypes, k + BLOCK // 2 + 1 < prototypes,",
           "k + BLOCK // 2 < prototypes, k + BLOCK // 2 < prototypes,", FAR),
    Mutant(PAIRWISE_TRITON, 'm = tl.where(total == 0.0, float("-inf"), m)', "m = m", INFINITE),
    Mutant(PAIRWISE_TRITON, "below = tl.where(mask, below, 0.0)", "below = below", ONE),
    Mutant(PAIRWISE_TRITON, "value += tl.where(v == q, 0.0, cross_entropy)",
           "value += tl.where(v == q, 0.0, 1.0) * cross_entropy", OWN),
    # Memory: nothing beyond the rows is read or written, and vectors are aligned
    Mutant(PAIRWISE_TRITON, "left = left // 8 * 4", "left = left // 8 * 8", FRAME),
    Mutant(PAIRWISE_TRITON, "x = tl.load(row + i, mask=i < left, other=0.0)",
           "x = tl.load(row + i)", FRAME,
           equivalent="all uses of elements beyond are masked; a sanitizer sees the reads"),
    Mutant(PAIRWISE_TRITON, "tl.store(row + i, x, mask=i < left)",
           "tl.store(row + i, x, mask=i <= left)", FRAME),
    Mutant(PAIRWISE_TRITON, "if b < 0:\n        return", "if b < -1:\n        return", FRAME),
    Mutant(PAIRWISE_TRITON, "tensor.data_ptr() % 16 == 0", "tensor.data_ptr() % 8 == 0", LAYOUT),
    Mutant(PAIRWISE_TRITON, "and tensor.shape[-1] * tensor.element_size() % 16 == 0", "", LAYOUT),
    Mutant(PAIRWISE_TRITON,
           "and all(step * tensor.element_size() % 16 == 0 for step in tensor.stride()[:-1])", "",
           ALIGNED),
    Mutant(PAIRWISE_TRITON, "aligned = _are_aligned(student, teacher, center)",
           "aligned = _are_aligned(student, teacher)", ALIGNED),
    Mutant(PAIRWISE_TRITON, "_are_aligned(student, teacher, center, grad)",
           "_are_aligned(student, center, grad)", ALIGNED),
    Mutant(PAIRWISE_TRITON, "_are_aligned(student, teacher, center, grad)",
           "_are_aligned(student, teacher, center)", ALIGNED,
           equivalent="the gradient is the student's logits, or new and so aligned as these are"),
    # Weights, divisors and probabilities
    Mutant(PAIRWISE_TRITON, "cross_entropy = mass * tl.log2(L)", "cross_entropy = tl.log2(L)",
           of("soft_cross_entropy", "rows_of_probabilities_need_not_sum_to_one")),
    Mutant(PAIRWISE_TRITON, "g *= tl.load(weights + v * weights_stride_v + b * weights_stride_b)",
           "g *= tl.load(weights + v * weights_stride_v + b)", PATCH),
    Mutant(PAIRWISE_TRITON, "tl.store(loss, tl.sum(everything, 0) / divisor)",
           "tl.store(loss, tl.sum(everything, 0))", PATCH),
    Mutant(PAIRWISE_TRITON, "scale = 1.0 / tl.load(scale)", "scale = tl.load(scale)", PATCH),
    Mutant(PAIRWISE_TRITON, "target_mass += masses[q]", "target_mass = masses[q]",
           of("soft_cross_entropy", "equals_dino_loss_with_its_probabilities") + ONE),
    Mutant(PAIRWISE_TRITON, "if grad is not target:\n        target.copy_(grad)", "", PATCH),
    # PyTorch
    Mutant(PAIRWISE_TORCH, "teacher_sum += sum_of_rows(logits)",
           "teacher_sum = sum_of_rows(logits)", ONE),
    Mutant(PAIRWISE_TORCH, "mass = mass + target.mass", "mass = target.mass",
           of("soft_cross_entropy", "rows_of_probabilities_need_not_sum_to_one")),
    Mutant(PAIRWISE_TORCH, "for q, t in enumerate(targets) if q != v]",
           "for q, t in enumerate(targets) if q != v or T > 2]",
           of("soft_cross_entropy", "is_at_least_as_accurate_as_plain_pytorch")),
    Mutant(PAIRWISE_TORCH, "center.to(dtype, copy=True)", "center.to(dtype)", PATCH),
    Mutant(PAIRWISE_TORCH, "with without_autocast(x.device):  # which would round",
           "with without_autocast(torch.device('meta')):  # which would round", PATCH),
    Mutant(PAIRWISE_TORCH, "factors.expand(S, B) if weights is None else factors * weights",
           "factors.expand(S, B)", PATCH),
    Mutant(f"{PACKAGE}/pairwise.py",
           "if ctx.inplace_backward and (torch.compiler.is_compiling() or not keeps_graph()):",
           "if ctx.inplace_backward:",
           of("compat_ibot", "a_kept_graph_has_the_gradient_of_each_term")),
    Mutant(f"{PACKAGE}/pairwise_arguments.py", "own = min(student_crops, teacher_crops)",
           "own = student_crops", of("compat_soft_targets")),
)  # fmt: skip

MODULES = (
    Mutant(MODULE, "index_select(0, epoch.reshape(1))",
           "index_select(0, (epoch - 1).clamp(min=0).reshape(1))",
           of("dino_module", "epoch_may_be_a_tensor"), reported=True),
    Mutant(MODULE, "if warmup_epochs > 1:", "if warmup_epochs > 0:",
           of("dino_module", "schedule_of_short_warm_ups")),
    Mutant(MODULE, "/ max(warmup_epochs - 1, 1)", "/ max(warmup_epochs, 1)",
           of("dino_module", "schedule_of_short_warm_ups")),
    Mutant(MODULE, "inplace_backward=self.inplace_backward,", "",
           of("dino_module", "gradient_is_written_over_the_logits_only_on_request")),
    Mutant(MODULE, "torch.where(skip > 0, self.center, center)",
           "torch.where(skip == 1, self.center, center)",
           of("dino_module", "center_update_can_be_skipped_on_the_device")),
    Mutant(MODULE, "if rows < 0 or (rows == 0 and world > 1):", "if rows < 0:", RANKS),
    Mutant(MODULE, "functools.partial(self._finish_center_update, total, rows * world, work)",
           "functools.partial(self._finish_center_update, total, rows * 2, work)", RANKS),
    Mutant(MODULE, "if work is not None:\n            work.wait()", "", WAIT),
    Mutant(MODULE, "sinkhorn_center(teacher_output, self._teacher_temp(epoch))",
           "sinkhorn_center(teacher_output, self._teacher_temp(0))",
           of("dino_module", "sinkhorn_module_matches_the_reference")),
    Mutant(f"{PACKAGE}/dino_loss.py", "torch.sub(crop, center).div_(temp)",
           "torch.add(crop, center).div_(temp)", of("dino_module")),
    Mutant(f"{PACKAGE}/patch_loss.py", "weights = weights.to(dtype)[None]",
           "weights = weights.to(student.dtype)[None]", PATCH),
)  # fmt: skip

SINKHORNS = (
    Mutant(SINKHORN, "sums = sums * exp_below(own, largest, temp)", "",
           of("sinkhorn", "ranks_with_unequal_counts")),
    Mutant(SINKHORN, "return x - largest.masked_fill(largest == -torch.inf, 0.0)",
           "return x - largest", of("sinkhorn", "ranks_with_unequal_counts")),
    Mutant(SINKHORN, "masses.clamp_min_(torch.finfo(masses.dtype).tiny)", "",
           of("sinkhorn", "huge_logits_do_not_overflow")),
    Mutant(SINKHORN, "return torch.where(rows == 0, 0.0, center)", "return center",
           of("sinkhorn", "no_rows_give_a_center_of_zeros")),
    Mutant(SINKHORN_TRITON, "stop = tl.minimum(first + group_rows, rows)\n    m = tl.full",
           "stop = first + group_rows\n    m = tl.full", of("sinkhorn", "only_the_rows_are_read")),
    Mutant(SINKHORN_TRITON, "stop = tl.minimum(first + group_rows, rows)\n    mass = tl.zeros",
           "stop = first + group_rows\n    mass = tl.zeros",
           of("sinkhorn", "only_the_rows_are_read")),
    Mutant(SINKHORN_TRITON, "total = tl.load(sums + offsets, mask=inside, other=0.0)",
           "total = tl.load(sums + offsets, mask=inside, other=1.0)",
           of("sinkhorn", "launches_of_any_shape_agree")),
    Mutant(SINKHORN_TRITON, 'return tl.where(m == float("-inf"), 0.0, m)', "return m",
           of("sinkhorn", "minus_infinity_is_probability_zero")),
    Mutant(SINKHORN_TRITON, "tl.store(stats + b, largest, b < rows)",
           "tl.store(stats + b, largest)", of("sinkhorn", "launches_of_any_shape_agree")),
    Mutant(SINKHORN_TRITON, "mass += tl.sum(p, 0)", "mass = tl.sum(p, 0)",
           of("sinkhorn", "launches_of_any_shape_agree")),
    Mutant(f"{PACKAGE}/sinkhorn_torch.py",
           "finite = largest.masked_fill(largest == -torch.inf, 0.0)", "finite = largest",
           of("sinkhorn", "columns_of_only_minus_infinity_have_sum_zero")),
    Mutant(f"{PACKAGE}/linear_sinkhorn.py",
           "sums = sums * exp_below(largest, both, scale)", "",
           of("linear_sinkhorn", "matches_the_reference_in_float64")),
    Mutant(f"{PACKAGE}/linear_sinkhorn.py", "exp_below(chunk_largest, both, scale)",
           "((chunk_largest - both) / scale).exp()",
           of("linear_sinkhorn", "a_chunk_has_only_minus_infinity_where_another_is_finite")),
    Mutant(f"{PACKAGE}/linear_sinkhorn.py", "total += implementation(impl).masses",
           "total = implementation(impl).masses",
           of("linear_sinkhorn", "matches_the_reference_in_float64")),
)  # fmt: skip

LINEAR_LOSSES = (
    Mutant(f"{PACKAGE}/linear_pairwise.py", "replace=images.start == 0", "replace=True", LINEAR),
    Mutant(f"{PACKAGE}/linear_pairwise.py", "for result in (total, dx, dweight):",
           "for result in (dx, dweight):", LINEAR),
    Mutant(f"{PACKAGE}/linear_pairwise.py", "factor = grad_total / ctx.scale",
           "factor = grad_total", LINEAR),
    Mutant(f"{PACKAGE}/linear_pairwise.py", "for result in (total, teacher_sum) if x_student",
           "for result in (total,) if x_student", LINEAR),
    Mutant(f"{PACKAGE}/linear_dino_loss.py", "total / max(pairs * B, 1)", "total / (pairs * B)",
           LINEAR),
    Mutant(f"{PACKAGE}/row_chunks.py", "part.to(total.dtype).add_(total[block])",
           "part.add_(total[block])"),
    Mutant(f"{PACKAGE}/row_chunks.py", "stop = start + rows // count + (i < rows % count)",
           "stop = start + rows // count"),
    Mutant(f"{PACKAGE}/row_chunks.py", "for start in range(0, len(total), PROTOTYPE_BLOCK):",
           "for start in range(0, len(total) - PROTOTYPE_BLOCK, PROTOTYPE_BLOCK):"),
    Mutant(f"{PACKAGE}/last_layer.py", "torch.float64 not in (x.dtype, weight.dtype)",
           "torch.float64 != x.dtype", of("last_layer", "dtype_of_products")),
    Mutant(f"{PACKAGE}/last_layer.py", "or magnitude.shape != (len(direction), 1)",
           "or magnitude.dim() != 2",
           crash="PyTorch's weight norm then writes out of bounds, which can end the process"),
)  # fmt: skip

REGULARIZERS = (
    Mutant(f"{PACKAGE}/koleo.py", "dots.diagonal(first + start).fill_(own)",
           "dots.diagonal(first).fill_(own)", of("koleo", "matches_the_reference_in_float64")),
    Mutant(f"{PACKAGE}/koleo.py", "first = torch.distributed.get_rank(group) * len(x)",
           "first = torch.distributed.get_rank() * len(x)",
           of("koleo", "ranks_compare_their_rows")),
    Mutant(f"{PACKAGE}/koleo.py", "rank = torch.distributed.get_rank(ctx.group)",
           "rank = torch.distributed.get_rank()", of("koleo", "ranks_compare_their_rows")),
    Mutant(f"{PACKAGE}/koleo.py", "all_reduce_sum_(total, ctx.group)",
           "all_reduce_sum_(total, None)", of("koleo", "ranks_compare_their_rows")),
    Mutant(f"{PACKAGE}/koleo.py", "return -(distances + eps).log().sum()",
           "return -distances.log().sum()",
           of("koleo", "eps_is_added_to_differences_and_distances_and_is_the_least_norm")),
    Mutant(f"{PACKAGE}/gram.py", "loss += difference.square_().sum()",
           "loss = difference.square_().sum()"),
    Mutant(f"{PACKAGE}/gram.py", "return grad_loss * gradient, None", "return gradient, None"),
    Mutant(f"{PACKAGE}/gram.py", "4 / entries,", "4 / max(P * P, 1),"),
    # Chunks of lists of tensors
    Mutant(f"{PACKAGE}/chunk_triton.py", "return rounded.to(tl.float32)",
           "return values.to(tl.float32)", of("ema", "shadow_is_rounded_from_the_stored_teacher")),
)  # fmt: skip

ON_RANKS = (
    Mutant(COLLECTIVES, "all_reduce(tensor, torch.distributed.ReduceOp.MAX, group)",
           "all_reduce(tensor, torch.distributed.ReduceOp.MAX)", RANKS),
    Mutant(COLLECTIVES, "all_reduce(tensor, torch.distributed.ReduceOp.SUM, group)",
           "all_reduce(tensor, torch.distributed.ReduceOp.SUM)", RANKS),
    Mutant(COLLECTIVES, "[-size for size in sizes]", "[*sizes]", RANKS),
    Mutant(COLLECTIVES, "if size < 1:", "if size == 0:", RANKS),
    Mutant(f"{COMPAT}/rank_mean.py", "float(rows > 0)", "1.0", RANKS),
    Mutant(f"{COMPAT}/rank_mean.py", "(total / ranks.clamp_min(1)).view(self.shape)",
           "(total / world_size(None)).view(self.shape)", RANKS),
    Mutant(f"{COMPAT}/rank_mean.py", "center.copy_(torch.where(ranks > 0, moved, center))",
           "center.copy_(moved)", RANKS),
    Mutant(f"{COMPAT}/rank_mean.py",
           "if self.work is not None:\n            self.work.wait()\n        total",
           "total", WAIT),
    Mutant(f"{COMPAT}/teacher_center.py", "if self._pending is not None:\n            self._pend",
           "if self._pending is None:\n            self._pend", WAIT),
    Mutant(f"{COMPAT}/teacher_center.py", "total = logits.sum(dim=0, dtype=compute_dtype(logits))",
           "total = logits.sum(dim=0)", of("compat_dinov2", "half_precision_is_computed_in_fp32")),
)  # fmt: skip

DROP_INS = (
    Mutant(f"{COMPAT}/solo_learn.py", "self.epoch if epoch is None else epoch",
           "epoch or self.epoch", of("compat_solo_learn"), reported=True),
    Mutant(f"{COMPAT}/solo_learn.py", "-epochs <= epoch < 0", "-epochs < epoch < 0",
           of("compat_solo_learn")),
    Mutant(f"{COMPAT}/lightly_dino.py", "elif epoch is not None:", "elif epoch:",
           of("compat_lightly_dino", "dino_loss_follows_the_equations_for_several_steps")),
    Mutant(f"{COMPAT}/lightly_dino.py", "teacher.sum(dim=(0, 1), dtype=compute_dtype(teacher))",
           "teacher.sum(dim=(0, 1))",
           of("compat_lightly_dino", "update_center_sums_half_precision_in_fp32")),
    Mutant(f"{COMPAT}/lightly_ibot.py",
           "self.teacher_temp if teacher_temp is None else teacher_temp",
           "teacher_temp or self.teacher_temp",
           of("compat_lightly_ibot", "invalid_types_devices_and_temperatures")),
    Mutant(f"{COMPAT}/lightly_ibot.py", "device=mask.device), right=True)",
           "device=mask.device))",
           of("compat_lightly_ibot",
              "patch_loss_follows_the_equation_and_lightly_over_several_steps")),
    Mutant(f"{COMPAT}/lightly_ibot.py", "(mask.shape[1] - counts).clamp_min(1)",
           "counts.clamp_min(1)",
           of("compat_lightly_ibot", "plus_plus_follows_the_equation_and_lightly")),
    Mutant(f"{COMPAT}/lightly_koleo.py", "_OWN_SIMILARITY = -2.0", "_OWN_SIMILARITY = -1.0",
           of("compat_lightly_koleo")),
    Mutant(f"{COMPAT}/lightly_center.py", "x.sum(self.dim, dtype=compute_dtype(x))",
           "x.sum(self.dim)", of("compat_lightly_center", "sums_are_fp32_for_half_precision")),
    Mutant(f"{COMPAT}/ibot.py", "nepochs - mim_start_epoch,", "nepochs,",
           of("compat_ibot", "schedules_attributes_and_state")),
    Mutant(f"{COMPAT}/ibot.py", "*pending[1].wait(), self.center_momentum2)",
           "*pending[1].wait(), self.center_momentum)",
           of("compat_ibot", "losses_gradients_and_centers_over_epochs")),
    Mutant(f"{COMPAT}/ibot.py", "denominator=max(len(masks), 1),", "",
           of("compat_ibot", "losses_gradients_and_centers_over_epochs")),
    Mutant(f"{COMPAT}/dinov2.py", "return images.sum() / max(len(images), 1)",
           "return images.sum() / student_masks_flat.any(dim=-1).sum().clamp(min=1)",
           of("compat_dinov2", "patch_loss_of_all_tokens")),
    Mutant(f"{COMPAT}/dinov3.py", "self.img_level if img_level is None else img_level",
           "img_level or self.img_level", of("compat_dinov3", "gram_loss")),
    Mutant(f"{COMPAT}/dinov3.py", "if update_centers:", "if update_centers is not None:",
           of("compat_dinov3", "centers_and_targets_are_those_of_dinov2")),
    Mutant(f"{COMPAT}/soft_targets.py", "return rows.sum() / (pairs * max(rows.shape[1], 1))",
           "return rows.mean() / len(probs)", of("compat_soft_targets")),
    Mutant(f"{COMPAT}/soft_targets.py", "inplace_backward=bw_inplace,", "inplace_backward=True,",
           of("compat_soft_targets")),
    Mutant(f"{COMPAT}/stable_pretraining.py", "return loss + self.ibot_loss_weight *",
           "return loss + self.dino_loss_weight *",
           of("compat_stable_pretraining", "weighted_sum_of_both_losses")),
    Mutant(f"{COMPAT}/stable_pretraining.py",
           "self.center = self.center.clone()\n", "",
           of("compat_stable_pretraining",
              "center_of_a_validation_in_inference_mode_can_be_updated")),
    Mutant(f"{COMPAT}/stacking.py", "or piece.is_neg() != first.is_neg():", ":",
           of("compat_stacking")),
    Mutant(f"{COMPAT}/stacking.py", "piece.storage_offset() != start + index * size",
           "piece.storage_offset() < start + index * size", of("compat_stacking")),
)  # fmt: skip

MUTANTS = (
    *PAIRWISE, *MODULES, *SINKHORNS, *LINEAR_LOSSES, *REGULARIZERS, *ON_RANKS, *DROP_INS,
)  # fmt: skip
