from __future__ import annotations

import json
import zipfile
from io import BytesIO

import numpy as np
import pytest
import torch

from fastdino.errors import CheckpointError, DataError
from fastdino.evals import principal_components
from fastdino.evals.principal_components import (
    PatchPCA,
    PatchSample,
    fit,
    principal_axes,
    two_class_threshold,
)


def patches(number=600, dim=12, seed=0):
    """Features of two clusters, a third of them foreground, with deviations that differ."""
    rng = np.random.default_rng(seed)
    scales = np.array([5, 3, 2, *np.linspace(1, 0.1, dim - 3)])
    basis = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    values = rng.standard_normal((number, dim)) * scales
    inside = np.arange(number) % 3 == 0
    values[inside, 0] += 40
    return torch.from_numpy((values @ basis + 7).astype(np.float32)), torch.from_numpy(inside)


def svd(features):
    """Mean, axes and variances by numpy's SVD of the centred features, in float64."""
    x = features.double().numpy()
    mean = x.mean(0)
    _, values, axes = np.linalg.svd(x - mean, full_matrices=False)
    return mean, axes, values**2 / len(x)


@pytest.fixture(params=[7, 4096])
def rows(request, monkeypatch):
    monkeypatch.setattr(principal_components, "_ROWS", request.param)


@pytest.mark.usefixtures("rows")
def test_axes_and_variances_are_those_of_an_svd():
    features, _ = patches()
    mean, axes, variances = principal_axes(features, 3)
    expected_mean, expected_axes, expected_variances = svd(features)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-12)
    np.testing.assert_allclose(variances, expected_variances[:3], rtol=1e-10)
    cosines = (axes.numpy() * expected_axes[:3]).sum(1)
    np.testing.assert_allclose(np.abs(cosines), 1, rtol=1e-12)


def test_each_axis_has_a_positive_largest_coefficient():
    for seed in range(5):
        features, _ = patches(seed=seed)
        _, axes, _ = principal_axes(features, 3)
        assert (axes.gather(1, axes.abs().argmax(1, keepdim=True)) > 0).all()
        # The mirrored features have the mirrored components, and the same axes.
        torch.testing.assert_close(principal_axes(-features, 3)[1], axes)


@pytest.mark.usefixtures("rows")
def test_small_deviations_from_a_large_mean_keep_their_axes():
    """In float32 a covariance as E[x^2] - m^2 would have no correct digit here."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((500, 4)) * [0.04, 0.03, 0.02, 0.01]
    features = torch.from_numpy((values + 300).astype(np.float32))
    _, axes, variances = principal_axes(features, 3)
    np.testing.assert_allclose(variances, svd(features)[2][:3], rtol=1e-8)
    assert axes.abs().argmax(1).tolist() == [0, 1, 2]


def test_the_threshold_has_the_largest_variance_between_two_classes():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(-2, 1, 40), rng.normal(5, 2, 15)])
    ordered = np.sort(values)

    def between(split):
        low, high = ordered[: split + 1], ordered[split + 1 :]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2

    best = max(range(len(ordered) - 1), key=between)
    threshold = two_class_threshold(torch.from_numpy(values))
    assert threshold == pytest.approx((ordered[best] + ordered[best + 1]) / 2)


@pytest.mark.parametrize("values", [[0.0, 0, 0, 1], [0.0, 1], [3.0, 3, 7, 7, 7]])
def test_equal_values_are_on_one_side_of_the_threshold(values):
    threshold = two_class_threshold(torch.tensor(values))
    assert threshold == (min(values) + max(values)) / 2
    with pytest.raises(DataError, match="of all patches is equal"):
        two_class_threshold(torch.zeros(4))


@pytest.mark.parametrize("mirror", [1, -1])
@pytest.mark.parametrize("border_is", ["background", "foreground"])
def test_auto_takes_the_side_away_from_borders_whatever_the_axis(mirror, border_is):
    features, inside = patches()
    border = ~inside if border_is == "background" else inside
    pca = fit(mirror * features, border)
    found = torch.from_numpy(pca.foreground(mirror * features))
    assert torch.equal(found, inside if border_is == "background" else ~inside)


def test_positive_and_negative_are_the_two_sides():
    features, _ = patches()
    border = torch.zeros(len(features), dtype=torch.bool)
    above, below = (fit(features, border, foreground=side) for side in ("positive", "negative"))
    first = (features.double().numpy() - above.mean) @ above.first
    assert np.array_equal(above.foreground(features), first > above.threshold)
    assert np.array_equal(below.foreground(features), first < below.threshold)
    assert np.array_equal(
        fit(features, border, foreground="none").foreground(features), first < 1e9
    )


def test_a_threshold_is_in_standard_deviations():
    features, _ = patches()
    border = torch.zeros(len(features), dtype=torch.bool)
    pca = fit(features, border, foreground="positive", threshold=0.8)
    first = (features.double().numpy() - pca.mean) @ pca.first
    assert np.array_equal(pca.foreground(features), first > 0.8 * first.std())
    assert pca.about["foreground_share"] == (first > 0.8 * first.std()).mean()


def test_colors_are_the_components_of_the_foreground_between_two_quantiles():
    features, inside = patches()
    pca = fit(features, ~inside)
    part = features[inside]
    mean, axes, _ = svd(part)
    components = np.abs((part.double().numpy() - mean) @ axes[:3].T)
    np.testing.assert_allclose(
        np.abs((part.double().numpy() - pca.center) @ pca.axes.T), components, atol=1e-9
    )
    signed = (part.double().numpy() - pca.center) @ pca.axes.T
    low, high = np.quantile(signed, [0.01, 0.99], axis=0, method="nearest")
    np.testing.assert_allclose(pca.low, low)
    np.testing.assert_allclose(pca.high, high)
    colors = pca.colors(part)
    np.testing.assert_allclose(colors, np.clip((signed - low) / (high - low), 0, 1), atol=1e-12)
    assert pca.colors(features.view(20, 30, 12)).shape == (20, 30, 3)


@pytest.mark.parametrize("case", ["one", "three", "constant", "zero", "plane", "narrow"])
def test_patches_without_three_components_are_an_error(case):
    features, _ = patches()
    cases = {
        "one": (features[:1], r"1 patch\(es\) are too few for 3 components"),
        "three": (features[:3], r"3 patch\(es\) are too few"),
        "constant": (features[:1].expand(50, -1), "features of all 50 patches are equal"),
        "zero": (torch.zeros(50, 12), "features of all 50 patches are equal"),
        "plane": (
            features[:, :1] * torch.arange(12.0),
            r"have 1 principal component\(s\), expected",
        ),
        "narrow": (features[:, :2], r"have 2 principal component\(s\), expected at least 3"),
    }
    some, message = cases[case]
    border = torch.zeros(len(some), dtype=torch.bool)
    with pytest.raises(DataError, match=message):
        fit(some, border, foreground="none")


def test_a_threshold_that_leaves_nothing_is_an_error():
    features, inside = patches()
    with pytest.raises(DataError, match="0 of 600 patches are foreground, too few .* --threshold"):
        fit(features, ~inside, threshold=1e6, foreground="positive")


def test_saved_components_give_the_same_colors_and_bytes(tmp_path):
    features, inside = patches()
    pca = fit(features, ~inside, about={"settings": {"seed": 3}})
    path = tmp_path / "new/pca.npz"
    pca.save(path)
    loaded = PatchPCA.load(path)
    assert np.array_equal(loaded.colors(features), pca.colors(features))
    assert np.array_equal(loaded.foreground(features), pca.foreground(features))
    assert loaded.about["settings"] == {"seed": 3}
    first = path.read_bytes()
    fit(features, ~inside, about={"settings": {"seed": 3}}).save(path)
    assert path.read_bytes() == first


def _changed(path, **changes):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


BAD = {
    "empty": b"",
    "text": b"no",
    "zip": None,
    "cut": None,
    "flipped": None,
    "array": None,
    "pickle": np.array([{"a": 1}]),
    "missing": {"axes": None},
    "shape": {"axes": np.zeros((3, 5))},
    "dtype": {"low": np.zeros(3, np.float32)},
    "nan": {"mean": np.full(12, np.nan)},
    "range": {"high": np.full(3, -1e9)},
    "format": {"about": np.array(json.dumps({"format": "other"}))},
    "about": {"about": np.array("[")},
    "list": {"about": np.array("[]")},
}


@pytest.mark.parametrize("damage", BAD)
def test_a_damaged_file_is_one_error(tmp_path, damage):
    features, inside = patches()
    path = tmp_path / "pca.npz"
    fit(features, ~inside).save(path)
    data, bad = path.read_bytes(), BAD[damage]
    if isinstance(bad, dict):
        _changed(path, **bad)
    elif damage == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "x")
    elif damage == "flipped":
        path.write_bytes(data[:200] + bytes([data[200] ^ 255]) + data[201:])
    elif damage in ("array", "pickle"):
        file = BytesIO()
        np.save(file, np.zeros(3) if bad is None else bad)
        path.write_bytes(file.getvalue())
    else:
        path.write_bytes(data[:-40] if damage == "cut" else bad)
    with pytest.raises(CheckpointError, match="is damaged, or was not written by --save_pca: ."):
        PatchPCA.load(path)
    with pytest.raises(CheckpointError, match="there is no file"):
        PatchPCA.load(tmp_path / "missing.npz")


def images(number=8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3 + i % 2, 4, 5, generator=generator) for i in range(number)]


def test_a_sample_of_all_patches_has_them_in_order():
    sample = PatchSample(1000, seed=0)
    for features in images():
        sample.add(features)
    features, border = sample.result()
    assert torch.equal(features, torch.cat([image.flatten(0, 1) for image in images()]))
    grid = border[:12].view(3, 4)
    assert grid.tolist() == [[True] * 4, [True, False, False, True], [True] * 4]


def test_a_sample_is_random_depends_on_the_seed_and_keeps_the_order():
    chosen = {}
    for seed in (0, 0, 1):
        sample = PatchSample(20, seed)
        for features in images():
            sample.add(features)
        features, border = sample.result()
        assert features.shape == (20, 5)
        assert len(border) == 20
        everything = torch.cat([image.flatten(0, 1) for image in images()])
        places = [(everything == row).all(1).nonzero().item() for row in features]
        assert places == sorted(set(places))
        assert chosen.setdefault(seed, places) == places
    assert chosen[0] != chosen[1]


def test_each_patch_is_as_likely_in_a_sample():
    """Of 2000 samples of 5 among 16 patches, each is in 625; the deviation is 21."""
    counts = torch.zeros(16)
    for seed in range(2000):
        sample = PatchSample(5, seed)
        for i in range(4):
            sample.add(torch.arange(4 * i, 4 * i + 4.0).view(2, 2, 1))
        counts[sample.result()[0][:, 0].long()] += 1
    assert (counts - 625).abs().max() < 5 * 21


def test_without_images_there_is_no_sample():
    with pytest.raises(DataError, match="no image to fit"):
        PatchSample(5, 0).result()


def _replace_member(path, name, content):
    """Replace a member of a zip."""
    with zipfile.ZipFile(path) as file:
        members = {one: file.read(one) for one in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for one, data in (members | {name: content}).items():
            file.writestr(one, data)


def _npy(values):
    file = BytesIO()
    np.save(file, values)
    return file.getvalue()


def _huge():
    file = BytesIO()
    shape = {"descr": "<f8", "fortran_order": False, "shape": (10**13,)}
    np.lib.format.write_array_header_1_0(file, shape)
    return file.getvalue()


CRAFTED = {
    "shape of terabytes": ("mean.npy", _huge()),
    "header that does not end": ("mean.npy", b"\x93NUMPY\1\0v\0" + b"(" * 9 + b" " * 108 + b"\n"),
    "nested JSON": ("about.npy", _npy(np.array('{"format":' + "[" * 200_000))),
    "settings": ("about.npy", _npy(np.array('{"format": "fastdino pca 1", "settings": "x"}'))),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_crafted_files_are_one_error(tmp_path, case):
    path = tmp_path / "crafted.npz"
    fit(patches()[0], torch.zeros(600, dtype=torch.bool), foreground="none").save(path)
    _replace_member(path, *CRAFTED[case])
    with pytest.raises(CheckpointError, match="was not written by --save_pca"):
        PatchPCA.load(path)
