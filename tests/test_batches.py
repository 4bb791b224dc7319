"""The images of a batch and their augmentation are pure functions of (seed, epoch, sample index)."""

import numpy as np
import pytest
import torch
from conftest import random_images
from hypothesis import given, settings
from hypothesis import strategies as st

from images import batches


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 7), st.integers(0, 2**32), st.integers(1, 300), st.booleans())
def test_crop_equals_reflect_padding_slicing_and_mirroring(pad, seed, epoch, flip):
    images = random_images()
    where = batches.augmentation(23, pad, flip, seed, epoch)
    index = np.random.default_rng(seed).permutation(23)[:9]
    got = batches.crop(images.pixels, torch.from_numpy(index), torch.from_numpy(where[index]), pad).numpy()
    for result, i in zip(got, index):
        padded = np.pad(images.pixels[i].numpy(), ((pad, pad), (pad, pad), (0, 0)), mode='reflect')
        row, column, mirrored = where[i]
        expected = padded[row : row + 8, column : column + 8]
        np.testing.assert_array_equal(result, expected[:, ::-1] if mirrored else expected)


def test_augmentation_takes_every_place_and_side_about_equally_often():
    where = batches.augmentation(90_000, 4, True, 0, 1)
    for column, places in zip(where.T, (9, 9, 2)):
        counts = np.bincount(column, minlength=places)
        assert len(counts) == places and abs(counts * places / 90_000 - 1).max() < 0.06
    assert not batches.augmentation(1000, 4, False, 0, 1)[:, 2].any()


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    base = batches.augmentation(100, 4, True, 5, 9)
    np.testing.assert_array_equal(base[:40], batches.augmentation(40, 4, True, 5, 9))
    assert (base != batches.augmentation(100, 4, True, 6, 9)).any() and (
        base != batches.augmentation(100, 4, True, 5, 8)
    ).any()
    assert (batches.order(100, 5, 9) != batches.order(100, 5, 8)).any()
    assert sorted(batches.order(100, 5, 9)) == list(range(100))


@given(st.lists(st.integers(1, 40), min_size=2, max_size=9), st.data())
def test_any_classes_give_their_part_keep_an_image_and_lose_none(sizes, drawn):
    labels, most = np.repeat(np.arange(len(sizes)), sizes), sum(sizes) - len(sizes)
    if most < len(sizes):
        with pytest.raises(ValueError, match=f'--holdout {most + 1}: at most {most} of the .* would keep none'):
            batches.hold_out(labels, most + 1)
        return
    count = drawn.draw(st.integers(len(sizes), most))
    kept, held = batches.hold_out(labels, count)
    assert sorted(kept + held) == list(range(len(labels))) and len(held) == count
    assert kept == sorted(kept) and held == sorted(held)
    given = np.bincount(labels[held], minlength=len(sizes))
    assert all(min(1, n - 1) <= k < n for k, n in zip(given, sizes))
    if len(set(sizes)) == 1:
        assert max(given) - min(given) <= 1
    with pytest.raises(ValueError, match=f'--holdout {len(sizes) - 1}: at least {len(sizes)}, one image of each class'):
        batches.hold_out(labels, len(sizes) - 1)


def test_held_out_images_keep_the_proportions_of_the_classes():
    labels = np.repeat([0, 1, 2], [1000, 100, 10])
    assert np.bincount(labels[batches.hold_out(labels, 111)[1]]).tolist() == [100, 10, 1]


def test_fewer_training_images_than_workers_are_refused():
    with pytest.raises(ValueError, match='1 training images in batches of 8: a batch needs at least 2'):
        batches.global_batches(1, 8, seed=0, epoch=1, least=2)
