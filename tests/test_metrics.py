import numpy as np
import pytest
import torch

import fastgan
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
    images = fastgan.data.load("fashion-mnist", limit=200).images.float() / 127.5 - 1
    near = sliced_wasserstein(images[::2], images[1::2])
    assert list(near) == [28, 14] and near == sliced_wasserstein(images[::2], images[1::2])
    noisy = images[1::2] + 0.3 * torch.randn(images[1::2].shape)
    blurred = torch.nn.functional.avg_pool2d(images[1::2], 3, 1, 1)
    for changed in (noisy, blurred):
        far = sliced_wasserstein(images[::2], changed)
        assert far[28] > 2 * near[28]
    assert (
        sliced_wasserstein(images[::2], images[1::2].mean(0, keepdim=True).expand(100, -1, -1, -1))[14] > 3 * near[14]
    )


def test_what_cannot_be_compared_is_refused_in_one_sentence():
    x = torch.zeros(2, 3, 16, 16)
    for other in (x[:, :1], x[:, :, :8], x[0], x[:0]):
        with pytest.raises(ValueError, match="sliced_wasserstein: both sets must be"):
            sliced_wasserstein(x, other)
    with pytest.raises(ValueError, match="at least 7 x 7"):
        sliced_wasserstein(x[:, :, :5], x[:, :, :5])
