"""Crops: their random parameters, and the kernels and chains that make them."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

PACKAGE = "kernels/fastdino_kernels"
PARAMS = "fastdino/augmentation/params.py"
PILLOW = "fastdino/augmentation/pillow.py"
CPU = "fastdino/augmentation/cpu.py"
CPU_KERNELS = "fastdino/augmentation/cpu_kernels.py"
DALI = "fastdino/augmentation/dali.py"
BACKENDS = "fastdino/augmentation/backends.py"
RUNTIME = "fastdino/runtime.py"
ENTRY = f"{PACKAGE}/multi_crop.py"
PLAIN = f"{PACKAGE}/multi_crop_torch.py"
KERNEL = f"{PACKAGE}/multi_crop_triton.py"
TABLE = f"{PACKAGE}/crop_table.py"
CHECKS = f"{PACKAGE}/crop_params.py"

DRAWS = ("tests/test_params.py",)
CHAIN = ("tests/test_pillow.py::test_crops_equal_the_papers_chain_bit_for_bit",)
MULTI = "tests/test_multi_crop.py"
STAGES = (f"{MULTI}::test_each_stage_matches_pillow",)
WHOLE = (f"{MULTI}::test_crops_match_pillow",)
BOXES = (f"{MULTI}::test_extreme_boxes",)
SCRATCH = (f"{MULTI}::test_scratch_is_sufficient",)
UNCHECKED = (f"{MULTI}::test_unchecked_values_stay_inside",)
NUMBA = "tests/test_cpu.py"
CHOICES = ("tests/test_runtime.py",)

MUTANTS = (
    # Draws
    Mutant(PARAMS, "(full_height - height + 1)", "(full_height - height)", DRAWS),
    Mutant(PARAMS, "(full_width - width + 1)", "(full_width - width)", DRAWS),
    Mutant(
        PARAMS,
        "width = np.rint(np.sqrt(area * ratio))",
        "width = np.floor(np.sqrt(area * ratio))",
        DRAWS,
    ),
    Mutant(PARAMS, "(width <= full_width)", "(width < full_width)", DRAWS),
    Mutant(
        PARAMS,
        "ratio = np.exp(log_low + u[..., 1] * (log_high - log_low))",
        "ratio = RATIO[0] + u[..., 1] * (RATIO[1] - RATIO[0])",
        DRAWS,
    ),
    Mutant(
        PARAMS,
        "first = fits.argmax(axis=-1)[..., None]",
        "first = 9 - fits[..., ::-1].argmax(axis=-1)[..., None]",
        DRAWS,
    ),
    Mutant(PARAMS, "u[..., _RADIUS] *", "u[..., _BLUR] *", DRAWS),
    Mutant(PARAMS, "u[..., _SOLARIZE] < solarize_p", "u[..., _GRAY] < solarize_p", DRAWS),
    Mutant(PARAMS, "u[..., _BLUR] < blur_p", "u[..., _JITTER] < blur_p", DRAWS),
    Mutant(PARAMS, "BLUR_P = (1.0, 0.1, 0.5)", "BLUR_P = (1.0, 0.5, 0.1)", DRAWS),
    Mutant(PARAMS, "RATIO = (3 / 4, 4 / 3)", "RATIO = (3 / 4, 1.3)", DRAWS),
    Mutant(
        PARAMS,
        "counter[..., 2] = ids[:, None, None]",
        "counter[..., 2] = np.arange(len(ids), dtype=np.uint64)[:, None, None]",
        DRAWS,
    ),
    Mutant(PARAMS, "(seed >> 32) & 0xFFFFFFFF", "0", DRAWS),
    Mutant(
        PARAMS,
        "_crops(uniform[:, 2:], sizes, config.local",
        "_crops(uniform[:, : config.local_crops_number], sizes, config.local",
        DRAWS,
    ),
    Mutant(PARAMS, "np.rint(full_width / RATIO[0])", "np.rint(full_width / RATIO[1])", DRAWS),
    Mutant(
        PARAMS,
        "return (full_height - height) // 2, (full_width - width) // 2,",
        "return (full_height - height) // 2, 0 * width,",
        DRAWS,
    ),
    # Pillow's chain
    Mutant(PILLOW, "if params.blur_radius > 0:", "if params.blur_radius > 0.5:", CHAIN),
    Mutant(
        PILLOW, "image, params.jitter_factor[operation])", "image, params.jitter_factor[0])", CHAIN
    ),
    # multi_crop, PyTorch
    Mutant(
        PLAIN,
        "torch.where(pixels < 128, pixels, 255 - pixels)",
        "torch.where(pixels <= 128, pixels, 255 - pixels)",
        STAGES,
    ),
    Mutant(
        PLAIN,
        "clamp(max=pixels.shape[dim] - 1)",
        "clamp(max=pixels.shape[dim] - 2)",
        ("tests/test_crop_edges.py",),
    ),
    Mutant(
        PLAIN,
        "mean = (2 * int(gray.sum(dtype=torch.int64)) + gray.numel()) //",
        "mean = (2 * int(gray.sum(dtype=torch.int64))) //",
        STAGES,
    ),
    Mutant(PLAIN, "for dim in (1, 1, 1, 0, 0, 0):", "for dim in (1, 0, 1, 0, 1, 0):", STAGES),
    Mutant(
        PLAIN,
        "packed[n, b, ORDER:FACTOR].tolist()",
        "range(4)",
        (f"{MULTI}::test_every_order_of_the_jitter",),
    ),
    # multi_crop, Triton
    Mutant(
        TABLE,
        "(strip - 1) * stretches[:, 0] + taps[:, 0] + 3",
        "(strip - 1) * stretches[:, 0] + 3",
        SCRATCH,
        reported=True,
    ),
    Mutant(
        TABLE,
        "stretches = (boxes / rows[:, SIZE, None].double()).clamp_(min=1.0)",
        "stretches = boxes / rows[:, SIZE, None].double()",
        ("tests/test_crop_table.py::test_scratch_of_enlarged_boxes_is_sufficient",),
    ),
    Mutant(
        TABLE,
        "else torch.ones(len(rows), dtype=torch.bool)",
        "else torch.zeros(len(rows), dtype=torch.bool)",
        ("tests/test_crop_table.py",),
    ),
    Mutant(
        TABLE,
        "boxes = packed[:, 2:4] if on_cpu",
        "boxes = packed[:, 2:4] if True",
        ("tests/test_crop_table.py",),
    ),
    Mutant(
        TABLE,
        "image.data_ptr(), height, width, image.stride(0)",
        "image.data_ptr(), height, width, 3 * width",
        (f"{MULTI}::test_images_of_any_strides",),
    ),
    Mutant(
        KERNEL,
        "tl.load(first_y + end - 1) + taps_y, height)",
        "tl.load(first_y + end - 1), height)",
        WHOLE,
    ),
    Mutant(
        KERNEL,
        "tl.load(first_y + end - 1) + taps_y, height)",
        "tl.load(first_y + end - 1) + taps_y, height - 1)",
        ("tests/test_crop_edges.py",),
    ),
    Mutant(KERNEL, "tl.where(flip, size - 1 - x, x)", "tl.where(flip, size - x, x)", STAGES),
    Mutant(KERNEL, "tl.where(x < 128, x, 255 - x)", "tl.where(x <= 128, x, 255 - x)", STAGES),
    Mutant(
        KERNEL,
        "    for k in range(1, 4):\n        place = tl.where",
        "    for k in range(0, 3):\n        place = tl.where",
        (f"{MULTI}::test_every_order_of_the_jitter",),
    ),
    Mutant(
        KERNEL,
        "tl.minimum(tl.maximum(tl.load(param + 3), 1), full_width - left)",
        "tl.minimum(tl.maximum(tl.load(param + 3), 1), full_width)",
        UNCHECKED,
    ),
    Mutant(
        KERNEL,
        "tl.where(radius > 0, tl.minimum(radius, _MAX_RADIUS), 0.0)",
        "tl.where(radius > 0, radius, 0.0)",
        UNCHECKED,
        crash="an infinite radius becomes an index outside of the scratch",
    ),
    Mutant(
        KERNEL,
        "tl.minimum(place + distance, size - 1)",
        "tl.minimum(place + distance, size)",
        STAGES,
    ),
    Mutant(
        ENTRY,
        "return image.stride()[1:] == (3, 1)",
        "return image.stride()[2] == 1",
        (f"{MULTI}::test_images_of_any_strides",),
    ),
    Mutant(
        ENTRY,
        "levels.sub(shift).div(scale).to(dtype)",
        "levels.to(dtype).sub(shift).div(scale)",
        (f"{MULTI}::test_half_precision_is_fp32_rounded_once",),
    ),
    Mutant(
        CHECKS,
        "box[..., :2] <= bounds - box[..., 2:]",
        "box[..., :2] <= bounds",
        (f"{MULTI}::test_invalid_values_raise",),
    ),
    Mutant(
        CHECKS,
        "packed[..., FLAGS : FLAGS + 1] & JITTER == 0",
        "packed[..., FLAGS : FLAGS + 1] & JITTER != 0",
        (f"{MULTI}::test_invalid_values_raise",),
    ),
    # The loops on a CPU
    Mutant(
        CPU,
        "for rows in packed:\n        check_values(rows, sizes)",
        "",
        (f"{NUMBA}::test_invalid_arguments_are_refused",),
    ),
    # DALI, and the choice of a backend
    Mutant(
        DALI,
        "factors[:, 3] * np.float32(360)",
        "factors[:, 3] * np.float32(180)",
        ("tests/test_dali.py",),
    ),
    Mutant(
        DALI,
        "np.where(params.gray[:, n].numpy(), np.float32(0), factors[:, 2])",
        "factors[:, 2]",
        ("tests/test_dali.py",),
    ),
    Mutant(
        DALI,
        "params.flip[:, n].int().numpy()",
        "params.flip[:, 0].int().numpy()",
        ("tests/test_dali.py",),
    ),
    Mutant(
        BACKENDS,
        '"torch" if triton_problem(device) else "triton"',
        '"torch" if device.type == "cpu" else "triton"',
        ("tests/test_backends.py",),
    ),
    Mutant(
        RUNTIME,
        'if wanted != "auto":\n            raise ConfigError(\n                f"--decode',
        'if wanted == "gpu":\n            raise ConfigError(\n                f"--decode',
        CHOICES,
        reported=True,
    ),
    Mutant(
        RUNTIME,
        'dali_problem() if wanted == "gpu" else dali_decode_problem()',
        "dali_decode_problem()",
        CHOICES,
    ),
    Mutant(
        RUNTIME,
        '"gpu" if cuda else "cpu"\n        return Choice(own',
        '"cpu"\n        return Choice(own',
        CHOICES,
    ),
    Mutant(
        RUNTIME,
        "crops, choose_decode(config.decode, crops.value, device)",
        'crops, choose_decode(config.decode, crops.value, "cpu")',
        CHOICES,
    ),
    Mutant(
        RUNTIME,
        "crops = choose_crops(config.crops, device)",
        'crops = choose_crops(config.crops, "cpu")',
        CHOICES,
    ),
)
