"""Photographs from real files: batches do not depend on the numbers of workers and loader processes; bad images."""

import errno
import math
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import TESTING, TRAINING, smooth, write_photographs

from images import batches, crops, decode, photographs

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(photographs.__file__)))
CPU = torch.device('cpu')
SIZE = 16


@pytest.fixture
def damaged(tmp_path):
    """As `folder`, with three training images (two of them neighbours) and two test images that cannot be read."""
    loaded = photographs.load(write_photographs(tmp_path))
    for path in [loaded.train.paths[i] for i in (3, 4, 24)] + [loaded.test.paths[i] for i in (0, 5)]:
        os.truncate(path, os.path.getsize(path) // 2)
    return loaded


def train_batches(dataset, nthread=0, rank=0, world=1, seed=5, epoch=2, batch_size=8):
    return photographs.TrainBatches(
        photographs.share(dataset), batch_size, SIZE, seed, rank, world, nthread, CPU, epoch
    )


def eval_batches(dataset, nthread=0, rank=0, world=1, **options):
    return photographs.TestBatches(photographs.share(dataset), 4, SIZE, rank, world, nthread, CPU, **options)


def all_equal(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) > 0
    for (images, labels, size), (images2, labels2, size2) in zip(found, expected):
        assert torch.equal(images, images2) and torch.equal(labels, labels2) and size == size2
    return True


def test_normalisation_is_imagenets_in_channels_last_order():
    pixels = torch.from_numpy(smooth(np.random.default_rng(0), 24, 16)).reshape(2, 12, 16, 3)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()
    expected = (pixels.double() / 255 - mean) / std
    found = photographs.normalize(pixels)
    torch.testing.assert_close(found, expected.permute(0, 3, 1, 2).float())
    assert found.is_contiguous(memory_format=torch.channels_last) and pixels.dtype == torch.uint8


@pytest.mark.parametrize('nthread', [1, 2])
def test_worker_processes_make_the_very_batches_of_none(folder, nthread):
    assert all_equal(train_batches(folder, nthread), train_batches(folder))
    assert all_equal(eval_batches(folder, nthread), eval_batches(folder))


@pytest.mark.parametrize('world', [2, 3])
def test_workers_share_the_very_batches_of_one(folder, world):
    parts = [list(train_batches(folder, rank=rank, world=world)) for rank in range(world)]
    one = list(train_batches(folder))
    assert [size for *_, size in one] == [8, 8, 8, 1]
    assert {len(part) for part in parts} == {len(train_batches(folder, world=world))} == {3}  # not the last
    for number, (images, labels, size) in enumerate(one[:3]):
        for rank in range(world):
            assert torch.equal(parts[rank][number][0], images[rank::world])
            assert torch.equal(parts[rank][number][1], labels[rank::world])
            assert parts[rank][number][2] == size == 8


def test_an_image_is_augmented_by_seed_epoch_and_its_index_alone(folder):
    def picture(index, seed=5, epoch=2, beside=()):
        return photographs.read_batch(folder.train, SIZE, (seed, epoch), [index, *beside])[0][0]

    assert torch.equal(picture(7), picture(7, beside=[1, 2]))
    assert not torch.equal(picture(7), picture(7, seed=6))
    assert not torch.equal(picture(7), picture(7, epoch=3))
    twins = photographs.Files([folder.train.paths[0]] * 2, folder.train.labels[:2])
    first, second = photographs.read_batch(twins, SIZE, (5, 2), [0, 1])[0]
    assert not torch.equal(first, second)


def test_an_epoch_is_a_permutation_that_seed_and_epoch_choose(folder):
    expected = folder.train.labels[batches.order(TRAINING, 5, 2)]
    assert torch.equal(torch.cat([labels for _, labels, _ in train_batches(folder)]), expected)
    other = torch.cat([labels for _, labels, _ in train_batches(folder, epoch=3)])
    assert not torch.equal(other, expected) and torch.equal(other.sort()[0], expected.sort()[0])
    assert all_equal(train_batches(folder), train_batches(folder))


def test_loading_leaves_the_global_random_numbers_alone(folder):
    torch.manual_seed(3)
    list(train_batches(folder))
    found = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), found)


@pytest.mark.parametrize('world', [1, 2, 3, 10])
def test_every_test_image_comes_exactly_once_over_all_workers(folder, world):
    seen = []
    for rank in range(world):
        batches = eval_batches(folder, rank=rank, world=world)
        parts = list(batches)
        assert len(parts) == len(batches) == math.ceil(len(range(rank, TESTING, world)) / 4)
        for images, labels, size in parts:
            assert len(images) == len(labels) == size <= 4
            seen += [(image.double().sum().item(), int(label)) for image, label in zip(images, labels)]
    whole = photographs.normalize(photographs.read_batch(folder.test, SIZE, None, range(TESTING))[0])
    assert sorted(seen) == sorted(zip(whole.double().sum((1, 2, 3)).tolist(), folder.test.labels.tolist()))


def test_a_bad_training_image_is_named_once_counted_and_replaced_by_the_next_good_one(damaged, capfd):
    batches = train_batches(damaged, nthread=1)
    first = list(batches)
    assert batches.bad == 3 and sum(len(labels) for _, labels, _ in first) == TRAINING
    assert all_equal(batches, first) and batches.bad == 3
    err = capfd.readouterr().err
    assert err.count('\n') == 3
    for i in (3, 4, 24):
        name = damaged.train.paths[i]
        assert err.count(f'warning: {name} is not a readable image') == 1, err

    pixels, labels, bad = photographs.read_batch(damaged.train, SIZE, (5, 2), range(TRAINING))
    for index, taken in ((3, 5), (4, 5), (24, 0)):
        assert torch.equal(pixels[index], pixels[taken]) and labels[index] == damaged.train.labels[taken]
    assert len(bad) == 3


@pytest.mark.parametrize('fault', [OSError(errno.ESTALE, 'it fails'), OSError(errno.EMFILE, 'it fails'), MemoryError()])
@pytest.mark.parametrize('augment', [None, (5, 2)])
def test_a_failure_of_the_machine_does_not_make_an_image_a_bad_one(folder, monkeypatch, fault, augment):
    def fails(*_):
        raise fault

    monkeypatch.setattr(crops, 'read_image', fails)
    with pytest.raises(type(fault)):
        photographs.read_batch(folder.train, SIZE, augment, range(3))


def test_a_lack_of_memory_is_no_damage_of_an_image(folder, monkeypatch):
    def fails(*_):
        error = cv2.error('no memory')
        error.code = cv2.Error.StsNoMem
        raise error

    monkeypatch.setattr(cv2, 'imdecode', fails)
    with pytest.raises(MemoryError):
        decode.read_image(folder.train.paths[0])


@pytest.mark.parametrize('world', [2, 3])
def test_bad_images_are_counted_once_over_all_workers(damaged, world):
    parts = [train_batches(damaged, rank=rank, world=world, batch_size=25) for rank in range(world)]
    labels = [torch.cat([labels for _, labels, _ in part]) for part in parts]
    assert sum(part.bad for part in parts) == 3 and sum(map(len, labels)) == TRAINING


def test_without_any_good_image_training_is_refused(damaged):
    for path in damaged.train.paths:
        os.truncate(path, 9)
    with pytest.raises(ValueError, match='not a readable image.*; no other training image can be read') as caught:
        list(train_batches(damaged, nthread=1))
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('nthread', [0, 1])
def test_a_bad_test_image_is_refused_by_name_unless_it_may_be_left_out(damaged, nthread, capfd):
    with pytest.raises(ValueError) as caught:
        list(eval_batches(damaged, nthread))
    assert str(caught.value).startswith(f'{damaged.test.paths[0]} is not a readable image')
    assert '\n' not in str(caught.value) and not capfd.readouterr().err
    batches = eval_batches(damaged, nthread, skip_bad_images=True)
    found, good = list(batches), [i for i in range(TESTING) if i not in (0, 5)]
    assert batches.bad == 2 and [size for *_, size in found] == [3, 3, 1]
    assert torch.cat([labels for _, labels, _ in found]).tolist() == damaged.test.labels[good].tolist()
    assert capfd.readouterr().err.count('left out of the test') == 2


def test_a_bad_image_whose_name_would_control_a_terminal_is_named_without_that(capfd):
    photographs._warn_once('x\x1b[2J\n.jpg is not a readable image')
    assert capfd.readouterr().err == 'warning: x?[2J?.jpg is not a readable image\n'


def test_an_image_that_has_gone_counts_as_bad_and_a_batch_of_none_is_passed_over(damaged, capfd):
    for path in damaged.test.paths[:4]:
        os.unlink(path) if os.path.exists(path) else None
    batches = eval_batches(damaged, skip_bad_images=True)
    assert [size for *_, size in batches] == [3, 1] and batches.bad == 5
    assert f'No such file or directory: {damaged.test.paths[1]!r}' in capfd.readouterr().err


def benchmark(*flags):
    """What benchmarks/input.py prints."""
    command = [sys.executable, os.path.join('benchmarks', 'input.py'), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_benchmark_prints_ratio_and_pixel_difference(folder):
    root = os.path.dirname(os.path.dirname(os.path.dirname(folder.train.paths[0])))
    out = benchmark('--imagenetpath', root, '--image_size', '16', '--repeats', '2')
    assert 'ours, uint8 batch' in out and 'torchvision on PIL' in out
    mean = float(out.split('on equal crops, of 255: mean ')[1].split(',')[0])
    assert 0 <= mean < 0.3


@pytest.mark.skipif(not os.path.exists('/proc/self/smaps_rollup'), reason='reads memory from /proc')
def test_the_benchmark_prints_time_and_memory_of_many_names():
    lines = benchmark('--files', '2000', '--nthread', '1', '--image_size', '16').splitlines()
    assert '2,000 training and 1,000 validation images' in lines
    table = [line.split() for line in lines[-3:]]
    assert [row[0] for row in table] == ['1', '2', '3']
    for _, seconds, alone, together in table:
        assert 0 < float(seconds) < 600 and 0 < float(alone) < float(together)
