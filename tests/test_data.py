"""Data sets from real files, and batches that are a pure function of (seed, epoch, sample index)."""

import functools
import hashlib
import http.server
import os
import pickle
import tarfile
import threading

import cv2
import numpy as np
import pytest
import torch
import torchvision
from conftest import draw
from hypothesis import given, settings
from hypothesis import strategies as st

import data

REAL = os.path.join('data', data.BINARY_FOLDER)


def random_images(n=23, size=8):
    pixels = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (n, size, size, 3), dtype=np.uint8))
    return data.Images(pixels, torch.arange(n))


# -------------------------------------------------------------------------------------------------------- batches


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 7), st.integers(0, 2**32), st.integers(1, 300), st.booleans())
def test_crop_equals_reflect_padding_slicing_and_mirroring(pad, seed, epoch, flip):
    images = random_images()
    where = data.augmentation(23, pad, flip, seed, epoch)
    index = np.random.default_rng(seed).permutation(23)[:9]
    got = data.crop(images.pixels, torch.from_numpy(index), torch.from_numpy(where[index]), pad).numpy()
    for result, i in zip(got, index):
        padded = np.pad(images.pixels[i].numpy(), ((pad, pad), (pad, pad), (0, 0)), mode='reflect')
        row, column, mirrored = where[i]
        expected = padded[row : row + 8, column : column + 8]
        np.testing.assert_array_equal(result, expected[:, ::-1] if mirrored else expected)


def test_augmentation_takes_every_place_and_side_about_equally_often():
    where = data.augmentation(90_000, 4, True, 0, 1)
    for column, places in zip(where.T, (9, 9, 2)):
        counts = np.bincount(column, minlength=places)
        assert len(counts) == places and abs(counts * places / 90_000 - 1).max() < 0.06
    assert not data.augmentation(1000, 4, False, 0, 1)[:, 2].any()


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    base = data.augmentation(100, 4, True, 5, 9)
    np.testing.assert_array_equal(base[:40], data.augmentation(40, 4, True, 5, 9))
    assert (base != data.augmentation(100, 4, True, 6, 9)).any() and (
        base != data.augmentation(100, 4, True, 5, 8)
    ).any()
    assert (data.order(100, 5, 9) != data.order(100, 5, 8)).any()
    assert sorted(data.order(100, 5, 9)) == list(range(100))


@pytest.mark.parametrize('world', [2, 3])
def test_workers_share_the_very_batches_of_one(world):
    images = random_images()
    one = list(data.TrainBatches(images, 8, 2, True, 1, 0, 1, epoch=4))
    parts = [list(data.TrainBatches(images, 8, 2, True, 1, rank, world, epoch=4)) for rank in range(world)]
    assert [len(labels) for _, labels, _ in one] == [8, 8, 7]
    for whole, shares in zip(one, zip(*parts)):
        assert {size for *_, size in shares} == {len(whole[1])}
        rows = {int(label): image for images, labels, _ in shares for image, label in zip(images, labels)}
        assert sorted(rows) == sorted(whole[1].tolist()) and sum(len(s[1]) for s in shares) == len(whole[1])
        assert all(torch.equal(rows[int(label)], image) for image, label in zip(whole[0], whole[1]))


@pytest.mark.parametrize('world', [1, 2, 4])
def test_workers_test_every_image_exactly_once(world):
    images = random_images()
    seen = [label for r in range(world) for _, labels, _ in data.TestBatches(images, 5, r, world) for label in labels]
    assert sorted(map(int, seen)) == list(range(23))


def test_test_images_are_normalised_in_channels_last_order_and_otherwise_untouched():
    images = random_images()
    batch, labels, size = next(iter(data.TestBatches(images, 5)))
    expected = (images.pixels[:5].double().permute(0, 3, 1, 2) - torch.tensor(data.MEAN).view(3, 1, 1).double()) / (
        torch.tensor(data.STD).view(3, 1, 1).double()
    )
    torch.testing.assert_close(batch, expected.float())
    assert batch.is_contiguous(memory_format=torch.channels_last) and size == 5 and labels.tolist() == list(range(5))


# ------------------------------------------------------------------------------------------------------ data sets


def test_digits_need_no_files_and_are_never_mirrored():
    digits = data.load('digits')
    assert digits.train.pixels.shape == (1000, 32, 32, 3) and digits.test.pixels.shape == (797, 32, 32, 3)
    assert digits.train.pixels.max() == 255 and digits.train.pixels.dtype == torch.uint8
    assert not digits.flip and digits.num_classes == 10


def test_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match='--dataset MNIST: expected CIFAR10, CIFAR100, folder or digits'):
        data.load('MNIST')


def test_holdout_tests_on_the_last_training_images():
    whole, held = data.load('digits'), data.load('digits', holdout=100)
    assert torch.equal(held.train.pixels, whole.train.pixels[:900])
    assert torch.equal(held.test.pixels, whole.train.pixels[900:])
    assert torch.equal(held.test.labels, whole.train.labels[900:])
    with pytest.raises(ValueError, match='only 1000 training images'):
        data.load('digits', holdout=1000)


def binary_cifar(root, monkeypatch, test_records=10, records=10):
    """Write the official binary layout, with 10 instead of 10,000 images in a file; returns what is in it."""
    monkeypatch.setattr(data, 'BINARY_RECORDS', 10)
    folder, rng = root / data.BINARY_FOLDER, np.random.default_rng(0)
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
    loaded = data.load('CIFAR10', tmp_path, note=notes.append)
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
        data.load('CIFAR10', tmp_path)


def test_binary_files_that_are_missing_empty_or_of_other_labels_are_refused(tmp_path, monkeypatch):
    folder, _ = binary_cifar(tmp_path, monkeypatch)
    path = folder / 'data_batch_5.bin'
    whole = path.read_bytes()
    path.write_bytes(b'\x0a' + whole[1:])
    with pytest.raises(ValueError, match='a label of 10'):
        data.load('CIFAR10', tmp_path)
    path.write_bytes(b'')
    with pytest.raises(ValueError, match='has 0 bytes'):
        data.load('CIFAR10', tmp_path)
    path.unlink()
    with pytest.raises(OSError, match=r'data_batch_5.bin is missing'):
        data.load('CIFAR10', tmp_path)


@pytest.mark.skipif(not os.path.isdir(REAL), reason=f'no {REAL}: the real CIFAR-10 is not here')
def test_real_binary_cifar_has_5000_training_images_of_each_class():
    loaded = data.load('CIFAR10', 'data', note=lambda _: None)
    assert loaded.train.labels.bincount().tolist() == [5000] * 10
    mean = loaded.train.pixels.double().mean((0, 1, 2))
    torch.testing.assert_close(mean, torch.tensor(data.MEAN, dtype=torch.float64), rtol=0, atol=0.1)


@pytest.fixture
def cifar_server(tmp_path, monkeypatch):
    """CIFAR-10's Python version in small, served over HTTP on this machine in place of the real address."""
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
    loaded = data.load('CIFAR10', str(tmp_path / 'data'), note=notes.append)
    assert loaded.train.labels.tolist() == [0, 1, 2, 0, 0, 1, 2, 1, 0, 1, 2, 2, 0, 1, 2, 3, 0, 1, 2, 4]
    assert loaded.test.pixels.unique().tolist() == [5] and loaded.num_classes == 10
    assert len(notes) == 1 and 'downloading 163 MiB from http://127.0.0.1' in notes[0]
    cifar_server.shutdown()
    again = data.load('CIFAR10', str(tmp_path / 'data'), note=notes.append)
    assert torch.equal(again.train.pixels, loaded.train.pixels) and len(notes) == 1


def test_without_a_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR100, 'url', 'http://127.0.0.1:9/cifar.tar.gz')
    with pytest.raises(OSError, match='CIFAR100 is not in .* cannot be reached .* by hand, or .* --dataroot'):
        data.load('CIFAR100', str(tmp_path / 'new'), note=lambda _: None)
    assert not (tmp_path / 'new').exists()


# --------------------------------------------------------------------------------------------------- own images


def test_folder_holds_images_of_any_size_and_kind_as_squares(photos):
    loaded = data.load('folder', photos, image_size=16)
    assert loaded.train.pixels.shape == (60, 16, 16, 3) and loaded.test.pixels.shape == (21, 16, 16, 3)
    assert loaded.train.labels.bincount().tolist() == [20, 20, 20] and loaded.num_classes == 3
    corner = loaded.train.pixels.double()[:, :8, :8].mean((1, 2, 3))
    assert (corner[:20] > 120).all() and (corner[20:] < 120).all()  # class 0 is bright there


@pytest.mark.parametrize('nthread', [0, 1, 5])
def test_folder_is_read_alike_by_any_number_of_threads(photos, nthread):
    loaded, alone = (data.load('folder', photos, image_size=16, nthread=n) for n in (nthread, 2))
    assert torch.equal(loaded.train.pixels, alone.train.pixels)


def write_folder(root, train=('a', 'b'), test=('a', 'b')):
    rng = np.random.default_rng(0)
    for part, classes in (('train', train), ('test', test)):
        (root / part).mkdir(parents=True)
        for label, name in enumerate(classes):
            (root / part / name).mkdir()
            cv2.imwrite(str(root / part / name / '0.png'), draw(rng, label, (9, 9)))
    return root


def test_unusable_folders_are_refused_by_name(tmp_path):
    with pytest.raises(OSError, match='nowhere: no such folder'):
        data.load('folder', str(tmp_path / 'nowhere'))
    (tmp_path / 'empty').mkdir()
    with pytest.raises(OSError, match="empty has no folder 'train'"):
        data.load('folder', str(tmp_path / 'empty'))
    with pytest.raises(ValueError, match='only one class'):
        data.load('folder', write_folder(tmp_path / 'one', train=['a']))
    with pytest.raises(ValueError, match='different classes; in one only: b, c'):
        data.load('folder', write_folder(tmp_path / 'other', test=['a', 'c']))
    root = write_folder(tmp_path / 'bare')
    os.unlink(root / 'train' / 'b' / '0.png')
    with pytest.raises(ValueError, match='bare/train/b holds no images'):
        data.load('folder', root)


def test_links_out_of_the_folder_are_refused_unless_they_may_be_followed(tmp_path):
    root, other = write_folder(tmp_path / 'root'), write_folder(tmp_path / 'other')
    (root / 'train' / 'a' / 'again.png').symlink_to('0.png')
    assert len(data.load('folder', root).train.labels) == 3
    for i, where in enumerate(('train', 'train/a', 'train/a/0.png')):
        root = write_folder(tmp_path / str(i))
        (root / where).rename(root / 'before')
        (root / where).symlink_to(other / where)
        with pytest.raises(ValueError, match=f'{root / where} is a link that leads out of {root}: --follow_links'):
            data.load('folder', root)
        assert len(data.load('folder', root, follow_links=True).train.labels) == 2


def test_links_to_folders_that_would_loop_for_ever_are_refused(tmp_path):
    root = write_folder(tmp_path / 'root')
    for name in ('x', 'y'):  # two of them: 2 ** 40 ways before the system stops
        (root / 'train' / 'a' / name).symlink_to('.')
    for follow_links in (False, True):
        with pytest.raises(ValueError, match='a link to a folder inside a class'):
            data.load('folder', root, follow_links=follow_links)


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / 'pipe.png')  # nobody writes to it
    (tmp_path / 'zero.png').symlink_to('/dev/zero')  # has no size, and no end
    for name in ('pipe.png', 'zero.png'):
        with pytest.raises(ValueError, match=f'{name} is no file of at most'):
            data.read_image(tmp_path / name)


def test_grey_alpha_and_turned_images_are_read_as_they_are_stored(tmp_path):
    picture = draw(np.random.default_rng(1), 1, (20, 30))
    cv2.imwrite(str(tmp_path / 'grey.png'), picture[..., 0])
    np.testing.assert_array_equal(data.read_image(tmp_path / 'grey.png'), np.repeat(picture[..., :1], 3, 2))
    cv2.imwrite(str(tmp_path / 'alpha.png'), np.concatenate([picture, picture[..., :1]], 2))
    np.testing.assert_array_equal(data.read_image(tmp_path / 'alpha.png'), picture[..., ::-1])
    exif = b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0'  # orientation 6: a quarter turn
    plain = cv2.imencode('.jpg', picture)[1].tobytes()
    turned = plain[:2] + b'\xff\xe1' + (len(exif) + 2).to_bytes(2, 'big') + exif + plain[2:]
    (tmp_path / 'plain.jpg').write_bytes(plain)
    (tmp_path / 'turned.png').write_bytes(turned)  # and of the wrong name
    np.testing.assert_array_equal(data.read_image(tmp_path / 'turned.png'), data.read_image(tmp_path / 'plain.jpg'))


@pytest.mark.parametrize('kind', ['.jpg', '.png', '.bmp', '.webp'])
@pytest.mark.parametrize('part', [0, 0.1, 0.5, 0.9])
def test_an_image_cut_short_is_refused_by_name(tmp_path, kind, part):
    picture = draw(np.random.default_rng(1), 1, (60, 80))
    content = cv2.imencode(kind, picture)[1].tobytes()
    path = tmp_path / f'cut{kind}'
    path.write_bytes(content)
    assert data.read_image(path).shape == (60, 80, 3)
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=f'cut{kind} is not a readable image'):
        data.read_image(path)


def test_a_cut_jpeg_is_refused_even_if_its_thumbnail_is_whole(tmp_path):
    picture = draw(np.random.default_rng(1), 1, (60, 80))
    thumbnail = cv2.imencode('.jpg', picture[::4, ::4])[1].tobytes()
    plain = cv2.imencode('.jpg', picture)[1].tobytes()
    content = plain[:2] + b'\xff\xe1' + (len(thumbnail) + 2).to_bytes(2, 'big') + thumbnail + plain[2:]
    (tmp_path / 'whole.jpg').write_bytes(content)
    assert data.read_image(tmp_path / 'whole.jpg').shape == (60, 80, 3)
    (tmp_path / 'cut.jpg').write_bytes(content[:-200])
    with pytest.raises(ValueError, match='cut short'):
        data.read_image(tmp_path / 'cut.jpg')


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([b'', b'\xff\xd8\xff\xe0', b'\x89PNG\r\n\x1a\n', b'BM']))
def test_bytes_that_are_no_image_are_refused(tmp_path_factory, content, start):
    path = tmp_path_factory.getbasetemp() / 'noise.jpg'
    path.write_bytes(start + content)
    with pytest.raises(ValueError, match='not a readable image'):
        data.read_image(path)


def test_fewer_training_images_than_workers_are_refused():
    with pytest.raises(ValueError, match='1 training images in batches of 8: a batch needs at least 2'):
        data.global_batches(1, 8, seed=0, epoch=1, least=2)
