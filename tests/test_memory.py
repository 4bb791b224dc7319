"""Data sets in memory from real files, and the batches that workers make from them."""

import functools
import hashlib
import http.server
import os
import pickle
import shutil
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torchvision
from conftest import random_images, write_folder

from images import memory

REAL = os.path.join('data', memory.BINARY_FOLDER)


@pytest.mark.parametrize('world', [2, 3])
def test_workers_share_the_very_batches_of_one(world):
    images = random_images()
    one = list(memory.TrainBatches(images, 8, 2, True, 1, 0, 1, epoch=4))
    parts = [list(memory.TrainBatches(images, 8, 2, True, 1, rank, world, epoch=4)) for rank in range(world)]
    assert [len(labels) for _, labels, _ in one] == [8, 8, 7]
    for whole, shares in zip(one, zip(*parts)):
        assert {size for *_, size in shares} == {len(whole[1])}
        rows = {int(label): image for images, labels, _ in shares for image, label in zip(images, labels)}
        assert sorted(rows) == sorted(whole[1].tolist()) and sum(len(s[1]) for s in shares) == len(whole[1])
        assert all(torch.equal(rows[int(label)], image) for image, label in zip(whole[0], whole[1]))


@pytest.mark.parametrize('world', [1, 2, 4])
def test_workers_test_every_image_exactly_once(world):
    images = random_images()
    seen = [label for r in range(world) for _, labels, _ in memory.TestBatches(images, 5, r, world) for label in labels]
    assert sorted(map(int, seen)) == list(range(23))


def test_test_images_are_normalised_in_channels_last_order_and_otherwise_untouched():
    images = random_images()
    batch, labels, size = next(iter(memory.TestBatches(images, 5)))
    expected = (images.pixels[:5].double().permute(0, 3, 1, 2) - torch.tensor(memory.MEAN).view(3, 1, 1).double()) / (
        torch.tensor(memory.STD).view(3, 1, 1).double()
    )
    torch.testing.assert_close(batch, expected.float())
    assert batch.is_contiguous(memory_format=torch.channels_last) and size == 5 and labels.tolist() == list(range(5))


def test_digits_need_no_files_and_are_never_mirrored():
    digits = memory.load('digits')
    assert digits.train.pixels.shape == (1000, 32, 32, 3) and digits.test.pixels.shape == (797, 32, 32, 3)
    assert digits.train.pixels.max() == 255 and digits.train.pixels.dtype == torch.uint8
    assert not digits.flip and digits.num_classes == 10


def test_unknown_data_set_is_refused():
    *names, last = memory.DATASETS
    with pytest.raises(ValueError, match=f'--dataset MNIST: expected {", ".join(names)} or {last}'):
        memory.load('MNIST')


def test_holdout_tests_on_the_last_training_images():
    whole, held = memory.load('digits'), memory.load('digits', holdout=100)
    assert torch.equal(held.train.pixels, whole.train.pixels[:900])
    assert torch.equal(held.test.pixels, whole.train.pixels[900:])
    assert torch.equal(held.test.labels, whole.train.labels[900:])
    with pytest.raises(ValueError, match='only 1000 training images'):
        memory.load('digits', holdout=1000)


def test_a_folder_holds_out_the_same_part_of_every_class_spread_over_its_names(tmp_path):
    root = write_folder(tmp_path / 'here', count=8)
    whole, held = memory.load('folder', root), memory.load('folder', root, holdout=8)
    assert held.train.labels.tolist() == held.test.labels.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(held.test.pixels, whole.train.pixels[[0, 2, 4, 7, 8, 10, 12, 15]])
    shutil.copytree(root, tmp_path / 'moved' / 'there')
    again = memory.load('folder', tmp_path / 'moved' / 'there', holdout=8, nthread=0)
    assert torch.equal(again.test.pixels, held.test.pixels) and torch.equal(again.train.pixels, held.train.pixels)


def binary_cifar(root, monkeypatch, test_records=10, records=10):
    """Write the official binary layout with 10 instead of 10,000 images in a file; returns (folder, its content)."""
    monkeypatch.setattr(memory, 'BINARY_RECORDS', 10)
    folder, rng = root / memory.BINARY_FOLDER, np.random.default_rng(0)
    folder.mkdir()
    written = {}
    for name in [f'data_batch_{i}.bin' for i in range(1, 6)] + ['test_batch.bin']:
        count = test_records if name == 'test_batch.bin' else records
        written[name] = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, count)
        lines = [bytes([label]) + pixels.tobytes() for pixels, label in zip(*written[name])]
        (folder / name).write_bytes(b''.join(lines))
    return folder, written


def test_binary_cifar_is_read_plane_by_plane_and_a_shorter_test_file_is_noted(tmp_path, monkeypatch):
    _, written = binary_cifar(tmp_path, monkeypatch, test_records=7)
    notes = []
    loaded = memory.load('CIFAR10', tmp_path, note=notes.append)
    assert loaded.train.pixels.shape == (50, 32, 32, 3) and loaded.test.pixels.shape == (7, 32, 32, 3)
    pixels, labels = written['data_batch_2.bin']
    np.testing.assert_array_equal(loaded.train.pixels[10:20], pixels.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(loaded.train.labels[10:20], labels)
    assert len(notes) == 1 and '7 of 10 images' in notes[0]


@pytest.mark.parametrize('name, size', [('test_batch.bin', -1), ('data_batch_3.bin', -1), ('data_batch_3.bin', -3073)])
def test_truncated_binary_file_is_refused(tmp_path, monkeypatch, name, size):
    folder, _ = binary_cifar(tmp_path, monkeypatch)
    os.truncate(folder / name, os.path.getsize(folder / name) + size)
    with pytest.raises(ValueError, match=f'{name} has .* bytes, not .*truncated'):
        memory.load('CIFAR10', tmp_path)


def test_binary_files_that_are_missing_empty_or_of_other_labels_are_refused(tmp_path, monkeypatch):
    folder, _ = binary_cifar(tmp_path, monkeypatch)
    path = folder / 'data_batch_5.bin'
    whole = path.read_bytes()
    path.write_bytes(b'\x0a' + whole[1:])
    with pytest.raises(ValueError, match='a label of 10'):
        memory.load('CIFAR10', tmp_path)
    path.write_bytes(b'')
    with pytest.raises(ValueError, match='has 0 bytes'):
        memory.load('CIFAR10', tmp_path)
    path.unlink()
    with pytest.raises(OSError, match=r'data_batch_5.bin is missing'):
        memory.load('CIFAR10', tmp_path)


@pytest.mark.skipif(not os.path.isdir(REAL), reason=f'no {REAL}: the real CIFAR-10 is not here')
def test_real_binary_cifar_has_5000_training_images_of_each_class():
    loaded = memory.load('CIFAR10', 'data', note=lambda _: None)
    assert loaded.train.labels.bincount().tolist() == [5000] * 10
    mean = loaded.train.pixels.double().mean((0, 1, 2))
    torch.testing.assert_close(mean, torch.tensor(memory.MEAN, dtype=torch.float64), rtol=0, atol=0.1)


@pytest.fixture
def cifar_server(tmp_path, monkeypatch):
    """A small version of CIFAR-10's Python files, served over HTTP on this machine instead of the real address."""
    base, files = tmp_path / 'made' / 'cifar-10-batches-py', {}
    base.mkdir(parents=True)
    names = [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']
    contents = {n: {'data': np.full((4, 3072), i, np.uint8), 'labels': [0, 1, 2, i]} for i, n in enumerate(names)}
    contents['batches.meta'] = {'label_names': list('abcdefghij')}
    for name, content in contents.items():
        (base / name).write_bytes(pickle.dumps(content))
        files[name] = [name, hashlib.md5((base / name).read_bytes()).hexdigest()]
    served = tmp_path / 'served'
    served.mkdir()
    with tarfile.open(served / 'cifar.tar.gz', 'w:gz') as tar:
        tar.add(base, base.name)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, 'log_message', lambda *_: None)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    real = torchvision.datasets.CIFAR10
    monkeypatch.setattr(real, 'url', f'http://127.0.0.1:{server.server_port}/cifar.tar.gz')
    monkeypatch.setattr(real, 'filename', 'cifar.tar.gz')
    monkeypatch.setattr(real, 'tgz_md5', hashlib.md5((served / 'cifar.tar.gz').read_bytes()).hexdigest())
    monkeypatch.setattr(real, 'train_list', [files[n] for n in names[:5]])
    monkeypatch.setattr(real, 'test_list', [files['test_batch']])
    monkeypatch.setattr(real, 'meta', {**real.meta, 'md5': files['batches.meta'][1]})
    yield server
    server.shutdown()
    server.server_close()


def test_cifar_is_downloaded_once_and_said_from_where(tmp_path, cifar_server):
    notes = []
    loaded = memory.load('CIFAR10', str(tmp_path / 'data'), note=notes.append)
    assert loaded.train.labels.tolist() == [0, 1, 2, 0, 0, 1, 2, 1, 0, 1, 2, 2, 0, 1, 2, 3, 0, 1, 2, 4]
    assert loaded.test.pixels.unique().tolist() == [5] and loaded.num_classes == 10
    assert len(notes) == 1 and 'downloading 163 MiB from http://127.0.0.1' in notes[0]
    cifar_server.shutdown()
    again = memory.load('CIFAR10', str(tmp_path / 'data'), note=notes.append)
    assert torch.equal(again.train.pixels, loaded.train.pixels) and len(notes) == 1


def test_processes_that_need_cifar_at_once_download_it_once(tmp_path, cifar_server, monkeypatch):
    real, at_once, began = torchvision.datasets.CIFAR10.download, threading.Barrier(2), []

    def download(dataset):
        began.append(os.listdir(os.path.join(dataset.root, dataset.base_folder)) != [])
        real(dataset)

    def load(_):
        at_once.wait()
        return memory.load('CIFAR10', str(tmp_path / 'data'), note=lambda _: None)

    monkeypatch.setattr(torchvision.datasets.CIFAR10, 'download', download)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(load, range(2))
    assert torch.equal(one.train.pixels, two.train.pixels) and began == [False, True]


def test_without_a_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR100, 'url', 'http://127.0.0.1:9/cifar.tar.gz')
    with pytest.raises(OSError, match='CIFAR100 is not in .* cannot be reached .* by hand, or .* --dataroot'):
        memory.load('CIFAR100', str(tmp_path / 'new'), note=lambda _: None)
    assert not (tmp_path / 'new').exists()


def test_folder_holds_images_of_any_size_and_kind_as_squares(photos):
    loaded = memory.load('folder', photos, image_size=16)
    assert loaded.train.pixels.shape == (60, 16, 16, 3) and loaded.test.pixels.shape == (21, 16, 16, 3)
    assert loaded.train.labels.bincount().tolist() == [20, 20, 20] and loaded.num_classes == 3
    corner = loaded.train.pixels.double()[:, :8, :8].mean((1, 2, 3))
    assert (corner[:20] > 120).all() and (corner[20:] < 120).all()  # class 0 is bright there


@pytest.mark.parametrize('nthread', [0, 1, 5])
def test_folder_is_read_alike_by_any_number_of_threads(photos, nthread):
    loaded, alone = (memory.load('folder', photos, image_size=16, nthread=n) for n in (nthread, 2))
    assert torch.equal(loaded.train.pixels, alone.train.pixels)
