"""Data sets from real files, and batches that are a pure function of (seed, epoch, sample index)."""

import functools
import hashlib
import http.server
import os
import pickle
import shutil
import struct
import tarfile
import threading

import cv2
import numpy as np
import pytest
import torch
import torchvision
from conftest import draw, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import cifar
import data
import imagefolder

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


def test_a_folder_holds_out_the_same_part_of_every_class_spread_over_its_names(tmp_path):
    root = write_folder(tmp_path / 'here', count=8)
    whole, held = data.load('folder', root), data.load('folder', root, holdout=8)
    assert held.train.labels.tolist() == held.test.labels.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(held.test.pixels, whole.train.pixels[[0, 2, 4, 7, 8, 10, 12, 15]])
    shutil.copytree(root, tmp_path / 'moved' / 'there')
    again = data.load('folder', tmp_path / 'moved' / 'there', holdout=8, nthread=0)
    assert torch.equal(again.test.pixels, held.test.pixels) and torch.equal(again.train.pixels, held.train.pixels)


@given(st.lists(st.integers(1, 40), min_size=2, max_size=9), st.data())
def test_any_classes_give_their_part_keep_an_image_and_lose_none(sizes, drawn):
    labels, most = np.repeat(np.arange(len(sizes)), sizes), sum(sizes) - len(sizes)
    if most < len(sizes):
        with pytest.raises(ValueError, match=f'--holdout {most + 1}: at most {most} of the .* would keep none'):
            data.hold_out(labels, most + 1)
        return
    count = drawn.draw(st.integers(len(sizes), most))
    kept, held = data.hold_out(labels, count)
    assert sorted(kept + held) == list(range(len(labels))) and len(held) == count
    assert kept == sorted(kept) and held == sorted(held)
    given = np.bincount(labels[held], minlength=len(sizes))
    assert all(min(1, n - 1) <= k < n for k, n in zip(given, sizes))
    if len(set(sizes)) == 1:
        assert max(given) - min(given) <= 1
    with pytest.raises(ValueError, match=f'--holdout {len(sizes) - 1}: at least {len(sizes)}, an image of each class'):
        data.hold_out(labels, len(sizes) - 1)


def test_held_out_images_keep_the_proportions_of_the_classes():
    labels = np.repeat([0, 1, 2], [1000, 100, 10])
    assert np.bincount(labels[data.hold_out(labels, 111)[1]]).tolist() == [100, 10, 1]


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


def write_folder(root, train=('a', 'b'), test=('a', 'b'), count=1):
    rng = np.random.default_rng(0)
    for part, classes in (('train', train), ('test', test)):
        (root / part).mkdir(parents=True)
        for label, name in enumerate(classes):
            (root / part / name).mkdir()
            for i in range(count):
                cv2.imwrite(str(root / part / name / f'{i}.png'), draw(rng, label, (9, 9)))
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


HIDDEN = '.DS_Store .ipynb_checkpoints __MACOSX @eaDir Thumbs.db desktop.ini lost+found $RECYCLE.BIN .x'.split()
HIDDEN += ['System Volume Information', '._a']


@pytest.mark.parametrize('load, parts', [(imagefolder.load, ('train', 'val')), (data.load, ('train', 'test'))])
def test_what_systems_leave_in_folders_is_neither_class_nor_image_at_any_depth(tmp_path, load, parts):
    root, notes = write_folder(tmp_path / 'root'), []
    (root / 'test').rename(root / parts[1])
    for top in (root / 'train', root / 'train' / 'a', root / 'train' / 'a' / 'deeper', root / parts[1]):
        top.mkdir(exist_ok=True)
        for i, name in enumerate(HIDDEN):
            (top / name).mkdir()
            shutil.copy(root / 'train' / 'a' / '0.png', top / name / '0.png')
            shutil.copy(root / 'train' / 'a' / '0.png', top / f'._{i}.png')
    (root / 'train' / 'b' / '.link').symlink_to('/')
    loaded = load(root, note=notes.append) if load is imagefolder.load else load('folder', root, note=notes.append)
    assert (loaded.num_classes, len(loaded.train.labels), len(loaded.test.labels), notes) == (2, 2, 2, [])


@pytest.mark.parametrize('load, parts', [(imagefolder.load, ('train', 'val')), (data.load, ('train', 'test'))])
def test_files_that_are_passed_over_are_counted_in_one_line(tmp_path, load, parts):
    root, notes = write_folder(tmp_path / 'root'), []
    (root / 'test').rename(root / parts[1])
    for name in ('train/b/notes.txt', 'train/b/more/1.heic', 'train/0.png', f'{parts[1]}/a/raw.cr2'):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    load(root, note=notes.append) if load is imagefolder.load else load('folder', root, note=notes.append)
    expected = ' '.join(data.IMAGE_SUFFIXES)
    assert notes == [
        f'note: 3 files in {root}/train are passed over, like {root}/train/b/notes.txt: '
        f'expected train/<class>/* of {expected}',
        f'note: a file in {root}/{parts[1]} is passed over, like {root}/{parts[1]}/a/raw.cr2: '
        f'expected {parts[1]}/<class>/* of {expected}',
    ]


@pytest.mark.parametrize(
    'train, test, words',
    [
        ('caf\u00e9', 'cafe\u0301', ['Unicode form', r"'caf\xe9'", r"'cafe\u0301'"]),
        ('Cat', 'cat', ["'Cat'", "'cat'", 'differ only in case']),
    ],
)
def test_classes_whose_names_only_look_alike_are_told_so(script, tmp_path, train, test, words):
    write_folder(tmp_path / 'root', train=('a', train), test=('a', test))
    assert refused(script(cifar, '--dataset folder --dataroot root'), 'root: the class', *words)


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


def with_alpha(rng, channels, dtype=np.uint8, planar=False, alpha=2, order='<'):
    """Random pixels (20, 30, channels) of which the last is alpha, and a TIFF of them; alpha 1: they are multiplied."""
    pixels = rng.integers(0, np.iinfo(dtype).max, (20, 30, channels), endpoint=True, dtype=dtype)
    planes = (pixels.transpose(2, 0, 1) if planar else pixels).astype(np.dtype(dtype).newbyteorder(order)).tobytes()
    count = channels if planar else 1
    tags = {
        **{256: [30], 257: [20], 258: [pixels.itemsize * 8] * channels, 259: [1], 262: [2 if channels > 2 else 1]},
        **{273: [1000 + i * len(planes) // count for i in range(count)], 277: [channels], 278: [20]},
        **{279: [len(planes) // count] * count, 284: [1 + planar], 338: [alpha]},
    }
    entries, more, at = b'', b'', 8 + 2 + 12 * len(tags) + 4
    for tag, values in tags.items():
        value = struct.pack(f'{order}{len(values)}H', *values)
        if len(value) > 4:
            more, value = more + value, struct.pack(f'{order}I', at + len(more))
        entries += struct.pack(f'{order}HHI', tag, 3, len(values)) + value.ljust(4, b'\0')
    start = {'<': b'II*\0', '>': b'MM\0*'}[order] + struct.pack(f'{order}IH', 8, len(tags))
    return pixels, (start + entries + bytes(4) + more).ljust(1000, b'\0') + planes


@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('planar', [False, True])
@pytest.mark.parametrize('channels, dtype', [(2, np.uint8), (4, np.uint8), (4, np.uint16)])
def test_a_tiff_is_not_darkened_by_its_alpha(tmp_path, channels, dtype, planar, order):
    path = tmp_path / 'image.tif'
    pixels, content = with_alpha(np.random.default_rng(0), channels, dtype, planar, order=order)
    path.write_bytes(content)
    plain = np.broadcast_to(pixels[..., : channels - 1] >> 8 * (pixels.itemsize - 1), (20, 30, 3))
    found = data.read_image(path)
    assert np.abs(found.astype(int) - plain).max() <= (dtype == np.uint16)  # libtiff rounds to 8 bits, PIL cuts
    if not planar:
        assert np.array_equal(np.asarray(Image.open(path).convert('RGB')), plain)
    np.testing.assert_array_equal(data.read_image(path, lambda height, width: (3, 4, 5, 6)), found[3:8, 4:10])


@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_colours_that_a_tiff_multiplied_by_its_alpha_are_divided_by_it_as_pil_does(tmp_path, dtype, order):
    path = tmp_path / 'image.tif'
    path.write_bytes(with_alpha(np.random.default_rng(0), 4, dtype, alpha=1, order=order)[1])
    np.testing.assert_array_equal(data.read_image(path), np.asarray(Image.open(path).convert('RGB')))


SAVED = {  # mode of the image, and what PIL is told
    'packed.tif': ('RGBA', {'compression': 'tiff_lzw'}),
    'big.tif': ('RGBA', {'big_tiff': True}),
    'grey.tif': ('LA', {}),
    'image.bmp': ('RGBA', {}),
    'image.webp': ('RGBA', {'lossless': True, 'exact': True}),
    'image.png': ('RGBA', {}),
    'grey.png': ('LA', {}),
    'palette.png': ('P', {'transparency': 3}),
    'image.gif': ('P', {}),
    'clear.gif': ('P', {'transparency': 3, 'comment': b'before it'}),
    'woven.gif': ('P', {'transparency': 3, 'interlace': 1}),
    'grey.gif': ('L', {}),
    'moving.gif': ('P', {'save_all': True, 'append_images': [Image.new('L', (30, 20), 9)], 'transparency': 3}),
    'image.jfif': ('RGB', {'format': 'JPEG'}),
}


@pytest.mark.parametrize('name', SAVED)
def test_every_kind_of_file_has_the_plain_colours_that_pil_gives(tmp_path, name):
    mode, options = SAVED[name]
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, 'RGBA')
    (image.convert('RGB').quantize(16) if mode == 'P' else image.convert(mode)).save(tmp_path / name, **options)
    assert name.endswith(data.IMAGE_SUFFIXES)
    expected = np.asarray(Image.open(tmp_path / name).convert('RGB'))
    np.testing.assert_array_equal(data.read_image(tmp_path / name), expected)
    if mode == 'RGBA':
        np.testing.assert_array_equal(expected, pixels[..., :3])


@pytest.mark.parametrize('kind', ['.jpg', '.png', '.bmp', '.webp', '.gif', '.tif'])
@pytest.mark.parametrize('part', [0, 0.1, 0.5, 0.9])
def test_an_image_cut_short_is_refused_by_name_alone(tmp_path, capfd, kind, part):
    picture = draw(np.random.default_rng(1), 1, (60, 80))
    content = cv2.imencode(kind, picture)[1].tobytes()
    path = tmp_path / f'cut{kind}'
    path.write_bytes(content)
    assert data.read_image(path).shape == (60, 80, 3)
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=f'cut{kind} is not a readable image'):
        data.read_image(path)
    assert kind == '.png' or capfd.readouterr().err == ''  # but for libpng, which has no switch for it


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


STARTS = [b'', b'\xff\xd8\xff\xe0', b'\x89PNG\r\n\x1a\n', b'BM', b'GIF89a', b'II*\0', b'MM\0+']


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(STARTS))
def test_bytes_that_are_no_image_are_refused(tmp_path_factory, content, start):
    path = tmp_path_factory.getbasetemp() / 'noise.jpg'
    path.write_bytes(start + content)
    with pytest.raises(ValueError, match='not a readable image'):
        data.read_image(path)


def test_fewer_training_images_than_workers_are_refused():
    with pytest.raises(ValueError, match='1 training images in batches of 8: a batch needs at least 2'):
        data.global_batches(1, 8, seed=0, epoch=1, least=2)
