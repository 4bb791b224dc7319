"""Crops of photographs are those of PIL and torchvision."""

import numpy as np
import pytest
import torch
from conftest import difference, draw, smooth
from PIL import Image
from torchvision import transforms

from images import crops

SIZE = 16


@pytest.mark.parametrize('shape', [(375, 500), (224, 224), (90, 61), (20, 500), (7, 5), (1, 1)])
@pytest.mark.parametrize('size', [(224, 224), (64, 64), (256, 341)])
def test_resize_is_pils_antialiased_bilinear(shape, size):
    for image in (smooth(np.random.default_rng(1), *shape), draw(np.random.default_rng(1), 1, shape)):
        theirs = Image.fromarray(image).resize(size[::-1], Image.BILINEAR)
        mean, most = difference(crops.resize(image, *size), theirs)
        assert mean < 0.3 and most <= 2  # both round, at other places


@pytest.mark.parametrize('shape', [(30, 60), (61, 30), (16, 16), (19, 300), (9, 5)])
def test_test_crop_is_torchvisions_resize_and_centre_crop(tmp_path, shape):
    image = smooth(np.random.default_rng(1), *shape)
    Image.fromarray(image).save(tmp_path / 'image.png')
    theirs = transforms.Compose([transforms.Resize(round(SIZE * 256 / 224)), transforms.CenterCrop(SIZE)])
    mean, most = difference(crops.test_crop(tmp_path / 'image.png', SIZE), theirs(Image.fromarray(image)))
    assert mean < 0.3 and most <= 2  # both round, at other places


def test_random_boxes_have_the_areas_and_ratios_of_torchvisions():
    ours = np.array([crops.random_box(375, 500, crops.augmentation(0, 1, i)[1]) for i in range(3000)])
    torch.manual_seed(0)
    image = torch.empty(1, 375, 500)
    get = transforms.RandomResizedCrop.get_params
    theirs = np.array([get(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(3000)])
    for boxes in (ours, theirs):
        top, left, height, width = boxes.T
        assert (boxes >= 0).all() and (top + height <= 375).all() and (left + width <= 500).all()
        area, ratio = height * width / (375 * 500), width / height
        assert 0.079 < area.min() < 0.1 and 0.95 < area.max() < 1.001
        assert 0.73 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.37
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), rtol=0.05)
    np.testing.assert_allclose(ours.std(0), theirs.std(0), rtol=0.05)


@pytest.mark.parametrize('shape, box', [((10, 1000), (0, 493, 10, 13)), ((1000, 10), (493, 0, 13, 10))])
def test_where_no_random_box_fits_the_crop_is_central(shape, box):
    assert all(crops.random_box(*shape, crops.augmentation(0, 1, i)[1]) == box for i in range(5))
    assert crops.random_box(1, 1, crops.augmentation(0, 1, 0)[1]) == (0, 0, 1, 1)


def test_a_training_image_is_its_random_box_mirrored_every_other_time(tmp_path):
    image, mirrored = smooth(np.random.default_rng(1), 40, 50), 0
    Image.fromarray(image).save(tmp_path / 'image.png')
    for i in range(200):
        flip, trials = crops.augmentation(0, 1, i)
        found = crops.train_crop(tmp_path / 'image.png', SIZE, flip, trials)
        top, left, height, width = crops.random_box(40, 50, trials)
        box = (left, top, left + width, top + height)
        theirs = np.asarray(Image.fromarray(image).crop(box).resize((SIZE, SIZE), Image.BILINEAR))
        mean, most = difference(found, theirs[:, ::-1] if flip else theirs)
        assert mean < 0.3 and most <= 2  # both round, at other places
        mirrored += flip
    assert 70 < mirrored < 130
