from __future__ import annotations

import gc
import importlib
import importlib.util
import io
import math
import os
import re
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import TrainConfig
from fastdino.models import attention
from tests.interpreter import patch_interpreter
from tests.processes import make_measurements_ties

if TYPE_CHECKING:
    from fastdino_kernels import CropParams

    from fastdino.data.image_dataset import ImageDataset
    from tests.simulated_cuda.device import SimulatedCuda

# Tests that need a missing package are skipped, because a GPU machine may only have torch, triton,
# timm and pytest.
NEEDED = {
    "av": ["flags_effect_maps", "flags_effect_tools", "image_names", "pca", "video", "video_io"],
    "matplotlib": [
        "attention_figures", "attention_jaccard", "crop_comparison", "crop_differences", "demo",
        "flags_effect_maps", "flags_effect_tools", "pca", "video", "visualize_attention",
    ],
    "numba": ["cpu"],
}  # fmt: skip
collect_ignore = [
    f"test_{name}.py"
    for package, names in NEEDED.items()
    if importlib.util.find_spec(package) is None
    for name in names
]

# Files whose module fixtures take longest. They run first: one process then sets each up, once, and
# none at the end, when the others have nothing left to do.
FIRST = ("test_launch.py", "test_file_names.py")

# Under nohup, or in the background of a shell, these are ignored, and a run that inherits that
# ignores them too: tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

if not torch.cuda.is_available():
    # Triton reads this when it is first imported; its interpreter then runs kernels on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--one-per-dtype",
        action="store_true",
        help="of each test and combination of dtypes, run one case with the kernels' code",
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Iterator[None]:
    """Mark the cases of gpu_quick before -m selects, and apply --one-per-dtype afterwards."""
    items.sort(key=lambda item: item.path.name not in FIRST)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    for item in one_per_dtype([item for item in on_gpu if "torch-cuda" not in item.name]):
        item.add_marker("gpu_quick")
    yield
    if config.getoption("--one-per-dtype"):
        selected = one_per_dtype([item for item in items if "triton" in item.name])
        config.hook.pytest_deselected(items=[item for item in items if item not in selected])
        items[:] = selected


def pytest_collection_finish() -> None:
    """Exempt what is imported from garbage collection, which some tests do often."""
    gc.collect()
    gc.freeze()


def one_per_dtype(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the middle case of each test and combination of dtypes; the others are edges."""
    cases: dict[Any, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault((item.function, dtypes_of(item)), []).append(item)
    return [group[(len(group) - 1) // 2] for group in cases.values()]


def dtypes_of(item: pytest.Item) -> tuple[str, ...]:
    """Return the parameters of a case that are dtypes or lists of them."""
    callspec = getattr(item, "callspec", None)
    values = [] if callspec is None else callspec.params.values()
    return tuple(str(value) for value in values if "torch." in str(value))


@pytest.fixture(autouse=True)
def interpreter(monkeypatch) -> None:
    """Make Triton's interpreter round as GPUs do, and twice as fast."""
    patch_interpreter(monkeypatch)


@pytest.fixture(autouse=True)
def ties(monkeypatch) -> None:
    make_measurements_ties(monkeypatch)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., TrainConfig]:
    """A function that makes the config of a network and crops of a few tokens per image."""

    def make(**overrides: Any) -> TrainConfig:
        settings = {
            "arch": "vit_nano",
            "patch_size": 8,
            "out_dim": 64,
            "global_crops_size": 32,
            "local_crops_size": 16,
            "local_crops_number": 2,
            "batch_size_per_gpu": 4,
            "epochs": 3,
            "warmup_epochs": 1,
            "drop_path_rate": 0.0,
            "lr": 0.05,
            "device": "cpu",
            "crops": "torchvision",
            "num_workers": 0,
        }
        return TrainConfig(**(settings | overrides))

    return make


@pytest.fixture
def small_networks(monkeypatch) -> None:
    """Make vit_nano and the head small."""
    from tests.small_networks import shrink_networks

    shrink_networks(monkeypatch)


@pytest.fixture
def config(tiny, pictures, tmp_path) -> Callable[..., TrainConfig]:
    """A function that makes the config of a run on `pictures` that writes to tmp_path/run."""
    folders = {"data_path": str(pictures), "output_dir": str(tmp_path / "run")}
    settings = folders | {"drop_path_rate": 0.2, "print_freq": 2}
    return lambda **overrides: tiny(**(settings | overrides))


@pytest.fixture(
    params=[
        ("torch", "cpu"),
        ("triton", "cpu"),
        pytest.param(("torch", "cuda"), marks=pytest.mark.gpu),
        pytest.param(("triton", "cuda"), marks=pytest.mark.gpu),
    ],
    ids="-".join,
)
def target(request) -> dict[str, str]:
    """A kernel implementation and its device: {"impl": ..., "device": ...}."""
    impl, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if (impl, device) == ("triton", "cpu") and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here: the interpreter is for machines without one")
    return {"impl": impl, "device": device}


@pytest.fixture
def poisoned(monkeypatch) -> None:
    """Fill new memory with NaN (integers: 77) to reveal values that a kernel does not write."""
    empty = torch.empty

    def poisoned_empty(*args: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*args, **options)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned_empty)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_bounds: torch.Tensor,
    key_bounds: torch.Tensor,
) -> torch.Tensor:
    """Compute softmax(Q K^T / sqrt(D)) V for query [Tq, H, D], key and value [T, H, D].

    A query attends to the keys of its own sequence. The bounds [S + 1] are the start of each
    sequence, and the end.
    """
    sequences = [
        torch.bucketize(torch.arange(len(x), device=bounds.device), bounds, right=True)
        for x, bounds in ((query, query_bounds), (key, key_bounds))
    ]
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
    own = sequences[0][:, None] == sequences[1][None, :]
    weights = scores.masked_fill(~own, -math.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


@pytest.fixture
def emulated(monkeypatch) -> Iterator[None]:
    """Replace the functions of xformers and varlen by plain arithmetic that runs on a CPU.

    The masks remain those of xformers.
    """
    ops = pytest.importorskip("xformers.ops")
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def memory_efficient_attention(query, key, value, attn_bias):
        assert type(attn_bias) is ops.fmha.BlockDiagonalMask
        assert query.shape[0] == 1
        bounds = (attn_bias.q_seqinfo.seqstart, attn_bias.k_seqinfo.seqstart)
        return masked_attention(query[0], key[0], value[0], *bounds).unsqueeze(0)

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        if not torch.compiler.is_compiling():
            assert [max_q, max_k] == [cu.diff().max() for cu in (cu_seq_q, cu_seq_k)]
        return masked_attention(query, key, value, cu_seq_q, cu_seq_k)

    monkeypatch.setattr(ops, "memory_efficient_attention", memory_efficient_attention)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    attention.token_layout.cache_clear()  # layouts keep the functions
    yield
    attention.token_layout.cache_clear()


@pytest.fixture
def one_process_group(tmp_path) -> Iterator[None]:
    """A process group of this process only."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def nano_weights(tmp_path_factory) -> Path:
    """A weight file of vit_nano, patch 8, 32 px; the weights are large, for uneven attention."""
    from fastdino.models.backbones import build_backbone

    generator = torch.Generator().manual_seed(0)
    model, _ = build_backbone("vit_nano", patch_size=8, img_size=32)
    for parameter in model.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    path = tmp_path_factory.mktemp("weights") / "nano.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def nano_model(nano_weights) -> torch.nn.Module:
    """The network of nano_weights, in eval mode."""
    from fastdino.models.weights import load_backbone

    return load_backbone(
        str(nano_weights), checkpoint_key="teacher", arch="vit_nano", patch_size=8
    ).module


@pytest.fixture
def nano_settings(nano_weights, nano_model) -> dict[str, Any]:
    """The settings of nano_weights in the JSON report of a command."""
    from fastdino.evals.options import weights_digest

    return {
        "pretrained_weights": str(nano_weights),
        "checkpoint_key": "teacher",
        "weights": weights_digest(nano_model),
        "arch": "vit_nano",
        "patch_size": 8,
        "exif_orientation": False,
        "image_range": "clip",
    }


@pytest.fixture
def run_nano(nano_weights, capsys) -> Callable[..., tuple[int, str, str]]:
    """A function that runs a command on nano_weights; returns exit status, stdout and stderr.

    It checks that an error is one line.
    """
    from fastdino import cli

    def run(command: str, *words: Any) -> tuple[int, str, str]:
        network = ["--arch", "vit_nano", "--patch_size", "8", "--device", "cpu"]
        network += ["--pretrained_weights", str(nano_weights)]
        status = cli.main([command, *network, *map(str, words)])
        out, err = capsys.readouterr()
        if status:
            assert (status, out) == (2, "")
            assert re.fullmatch(rf"fastdino {command}: error: .+\n", err)
        return status, out, err

    return run


@pytest.fixture(scope="session")
def commands(tmp_path_factory, nano_weights) -> Any:
    """The flag_effects.Commands of the session."""
    from tests.flag_effects import Commands

    return Commands(tmp_path_factory.mktemp("commands"), nano_weights)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """18 small JPEGs of noise in 3 classes: an epoch has 4 batches of 4, and 2 images remain."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(18):
        folder = root / f"class{i % 3}"
        folder.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.jpg")
    return root


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """A function that encodes a small picture of noise."""

    def encode(
        seed: int = 0, size: tuple[int, int] = (20, 10), form: str = "JPEG", **options: Any
    ) -> bytes:
        noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, form, **options)
        return file.getvalue()

    return encode


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> ImageDataset:
    """A dataset of 18 JPEGs of different sizes in 3 classes."""
    from fastdino.data.image_dataset import scan_images
    from tests.loaders import photo

    root = tmp_path_factory.mktemp("photos")
    for n in range(18):
        folder = root / f"class{n % 3}"
        folder.mkdir(exist_ok=True)
        photo(n, (100 + n, 75 + 3 * n)).save(folder / f"{n:02}.jpg", quality=92)
    return scan_images(root)


@pytest.fixture
def build() -> Iterator[Callable[..., Any]]:
    """build_loader on the CPU; its loaders are closed when the test ends."""
    from tests.loaders import build_loader, make_config

    built = []

    def build_one(dataset, rank=0, world_size=1, **changes):
        built.append(
            build_loader(
                make_config(**changes), dataset, rank=rank, world_size=world_size, device="cpu"
            )
        )
        return built[-1]

    yield build_one
    for one in built:
        one.close()


@pytest.fixture
def breakable(tmp_path) -> ImageDataset:
    """A dataset of 18 JPEGs that the test may damage."""
    from fastdino.data.image_dataset import scan_images
    from tests.loaders import photo

    for n in range(18):
        photo(n).save(tmp_path / f"{n:02}.jpg", quality=92)
    return scan_images(tmp_path)


@pytest.fixture(scope="session")
def make_tar() -> Callable[..., Path]:
    """A function that writes a tar of named members: bytes, or a TarInfo without content."""

    def make(
        path: Path, members: dict[str, bytes | tarfile.TarInfo], mode: str = "w", **options: Any
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, mode, **options) as tar:
            for name, content in members.items():
                info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo()
                info.name = name
                if isinstance(content, bytes):
                    info.size = len(content)
                tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
        return path

    return make


@pytest.fixture
def crops_of() -> Callable[..., list[torch.Tensor]]:
    """A function that returns normal noise in the shapes of a config's crops."""

    def make(config: TrainConfig, iteration: int) -> list[torch.Tensor]:
        generator = np.random.default_rng([config.seed, iteration])
        globals_, locals_ = [config.global_crops_size] * 2, [config.local_crops_size]
        images = config.split_batch(1).images_per_step
        return [
            torch.from_numpy(generator.standard_normal((images, 3, size, size))).to(
                torch.get_default_dtype()
            )
            for size in globals_ + locals_ * config.local_crops_number
        ]

    return make


@pytest.fixture(scope="session")
def ragged_images() -> list[torch.Tensor]:
    """Images uint8 [H, W, 3] of different sizes: photo-like, noise, flat, gray, tiny, narrow."""
    rng = np.random.default_rng(0)

    def smooth(height: int, width: int) -> np.ndarray:
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
        pixels[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
        return np.clip(pixels + rng.integers(-20, 21, pixels.shape), 0, 255)

    gray = np.repeat(rng.integers(0, 256, (30, 50, 1)), 3, axis=2)
    few = rng.choice([0, 1, 127, 128, 254, 255], (24, 24, 3))
    noise = [rng.integers(0, 256, (*size, 3)) for size in ((61, 47), (1, 1), (2, 190), (170, 3))]
    flat = np.full((20, 31, 3), 255)
    arrays = [smooth(75, 100), smooth(120, 90), gray, few, *noise, flat, smooth(9, 12)]
    return [torch.from_numpy(a.astype(np.uint8)) for a in arrays]


@pytest.fixture(scope="session")
def draw_any_crops() -> Callable[..., CropParams]:
    """A function that draws crops from wider ranges than the paper's; `changes` fixes fields."""
    from fastdino_kernels import CropParams

    def draw(images: list[torch.Tensor], n: int, seed: int = 0, **changes: Any) -> CropParams:
        rng = np.random.default_rng(seed)
        shape = (len(images), n)
        full = np.array([image.shape[:2] for image in images]).reshape(-1, 1, 2)
        extent = 1 + np.floor(rng.random((*shape, 2)) * full).astype(int)
        start = np.floor(rng.random((*shape, 2)) * (full - extent + 1)).astype(int)
        factor = rng.uniform(0, 2, (*shape, 4))
        factor[..., 3] = rng.uniform(-0.5, 0.5, shape)
        fields: dict[str, Any] = {
            "top": start[..., 0],
            "left": start[..., 1],
            "height": extent[..., 0],
            "width": extent[..., 1],
            "jitter_order": rng.permuted(np.tile(np.arange(4), (*shape, 1)), axis=-1),
        }
        values = {name: torch.from_numpy(a.astype(np.int32)) for name, a in fields.items()}
        values |= {
            name: torch.from_numpy(rng.random(shape) < p)
            for name, p in (("flip", 0.5), ("jitter", 0.8), ("gray", 0.2), ("solarize", 0.3))
        }
        values["jitter_factor"] = torch.from_numpy(factor.astype(np.float32))
        radius = np.where(rng.random(shape) < 0.5, rng.uniform(0, 4, shape), 0)
        values["blur_radius"] = torch.from_numpy(radius.astype(np.float32))
        for name, value in changes.items():
            values[name] = torch.full_like(values[name], value)
        return CropParams(**values)

    return draw


@pytest.fixture(scope="session")
def crops_by_pil() -> Callable[..., torch.Tensor]:
    """A function that makes crops [B, N, 3, size, size] with Pillow and torchvision."""
    from fastdino.augmentation.pillow import make_crop

    def make(images: list[torch.Tensor], params: CropParams, size: int) -> torch.Tensor:
        pictures = [Image.fromarray(image.cpu().numpy()) for image in images]
        return torch.stack(
            [
                torch.stack([make_crop(picture, crop, size) for crop in params.of_sample(b)])
                for b, picture in enumerate(pictures)
            ]
        )

    return make


@pytest.fixture
def gpu() -> Iterator[SimulatedCuda]:
    """A simulated GPU, on which the kernels are interpreted; for machines without one."""
    from fastdino_kernels.multi_crop import normalized_levels

    from tests.simulated_cuda.install import simulate_cuda

    with simulate_cuda() as device:
        yield device
    attention.token_layout.cache_clear()  # their tensors are on the simulated device
    normalized_levels.cache_clear()
