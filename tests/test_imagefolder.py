"""Photographs from real files: the pixels that PIL would give, and batches that no number of workers changes."""

import importlib.metadata
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import cv2
import numpy as np
import paced
import pytest
import torch
from conftest import HANGS, draw, ends, proc, refused, state
from PIL import Image
from torchvision import transforms

import children
import data
import imagefolder
import readers

ROOT = os.path.dirname(os.path.abspath(imagefolder.__file__))
CPU = torch.device('cpu')
SIZE = 16
TRAINING, TESTING = 25, 9  # images in `folder`


def smooth(rng, height, width, channels=3):
    """A picture without hard edges, as photographs are: (height, width, channels) uint8."""
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, channels)).astype(np.float32)
    return np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)


def write(root, train=TRAINING, test=TESTING):
    """Images of two classes, in turns, of many sizes and two kinds of file."""
    rng = np.random.default_rng(0)
    for part, count in (('train', train), ('val', test)):
        for i in range(count):
            folder = root / part / ('ant', 'bee')[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            name = f'{i:02}.{("JPEG", "png")[i // 2 % 2]}'
            image = smooth(rng, 30 + i, 60 - i)
            Image.fromarray(image).save(folder / name, quality=95)
    return root


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return imagefolder.load(write(tmp_path_factory.mktemp('folder')))


@pytest.fixture
def damaged(tmp_path):
    """As `folder`, with three training images (two of them neighbours) and two test images that cannot be read."""
    loaded = imagefolder.load(write(tmp_path))
    for path in [loaded.train.paths[i] for i in (3, 4, 24)] + [loaded.test.paths[i] for i in (0, 5)]:
        os.truncate(path, os.path.getsize(path) // 2)
    return loaded


def train_batches(files, nthread=0, rank=0, world=1, seed=5, epoch=2, batch_size=8):
    return imagefolder.TrainBatches(files, batch_size, SIZE, seed, rank, world, nthread, CPU, epoch)


def eval_batches(files, nthread=0, rank=0, world=1, **options):
    return imagefolder.TestBatches(files, 4, SIZE, rank, world, nthread, CPU, **options)


def all_equal(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) > 0
    for (images, labels, size), (images2, labels2, size2) in zip(found, expected):
        assert torch.equal(images, images2) and torch.equal(labels, labels2) and size == size2
    return True


# -------------------------------------------------------------------------------------------------------- the folder


def test_classes_are_numbered_by_name_and_suffixes_are_read_in_any_case(folder):
    assert len(folder.train.paths) == TRAINING and len(folder.test.paths) == TESTING and folder.num_classes == 2
    for files in (folder.train, folder.test):
        assert files.labels.tolist() == [int(f'{os.sep}bee{os.sep}' in path) for path in files.paths]


def refusal(kind, root):
    with pytest.raises(kind) as caught:
        imagefolder.load(str(root))
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_unusable_folders_are_refused_in_one_line_that_says_why(tmp_path):
    assert 'nowhere: no such folder' in refusal(OSError, tmp_path / 'nowhere')
    assert "has no folder 'train': expected train/<class>/*" in refusal(OSError, tmp_path)
    root = write(tmp_path / 'whole')
    (root / 'val').rename(root / 'test')
    assert "has no folder 'val'" in refusal(OSError, root)
    (root / 'val').mkdir()
    Image.new('RGB', (9, 9)).save(root / 'val' / 'flat.jpg')
    assert f'{root / "val"} has no folders of classes' in refusal(ValueError, root)
    for name in ('ant', 'cow'):
        (root / 'val' / name).mkdir()
        (root / 'val' / name / 'readme.txt').touch()
    assert f'{root / "val"} holds no images' in refusal(ValueError, root)
    Image.new('RGB', (9, 9)).save(root / 'val' / 'cow' / '0.png')
    assert f'{root / "val" / "ant"} holds no images' in refusal(ValueError, root)
    Image.new('RGB', (9, 9)).save(root / 'val' / 'ant' / '0.png')
    assert 'train and val have different classes; in one only: bee, cow' in refusal(ValueError, root)
    alone = write(tmp_path / 'alone', train=1, test=1)
    assert "only one class, 'ant'" in refusal(ValueError, alone)


def test_of_many_different_classes_some_are_named(tmp_path):
    for part, names in (('train', 'abcdefghij'), ('val', 'ab')):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            Image.new('RGB', (9, 9)).save(tmp_path / part / name / '0.png')
    assert refusal(ValueError, tmp_path).endswith('in one only: c, d, e, f, g and 3 more')


# ------------------------------------------------------------------------------------------------------------ pixels


def difference(ours, theirs):
    """Mean and largest absolute difference in levels of 255."""
    difference = np.abs(ours.astype(int) - np.asarray(theirs))
    return difference.mean(), difference.max()


@pytest.mark.parametrize('shape', [(375, 500), (224, 224), (90, 61), (20, 500), (7, 5), (1, 1)])
@pytest.mark.parametrize('size', [(224, 224), (64, 64), (256, 341)])
def test_resize_is_pils_antialiased_bilinear(shape, size):
    for image in (smooth(np.random.default_rng(1), *shape), draw(np.random.default_rng(1), 1, shape)):
        theirs = Image.fromarray(image).resize(size[::-1], Image.BILINEAR)
        mean, most = difference(imagefolder.resize(image, *size), theirs)
        assert mean < 0.3 and most <= 2  # both round, at other places


@pytest.mark.parametrize('shape', [(30, 60), (61, 30), (16, 16), (19, 300), (9, 5)])
def test_test_crop_is_torchvisions_resize_and_centre_crop(tmp_path, shape):
    image = smooth(np.random.default_rng(1), *shape)
    Image.fromarray(image).save(tmp_path / 'image.png')
    theirs = transforms.Compose([transforms.Resize(round(SIZE * 256 / 224)), transforms.CenterCrop(SIZE)])
    mean, most = difference(imagefolder.test_crop(tmp_path / 'image.png', SIZE), theirs(Image.fromarray(image)))
    assert mean < 0.3 and most <= 2  # both round, at other places


def test_random_boxes_have_the_areas_and_ratios_of_torchvisions():
    ours = np.array([imagefolder.random_box(375, 500, imagefolder.augmentation(0, 1, i)[1]) for i in range(3000)])
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
    assert all(imagefolder.random_box(*shape, imagefolder.augmentation(0, 1, i)[1]) == box for i in range(5))
    assert imagefolder.random_box(1, 1, imagefolder.augmentation(0, 1, 0)[1]) == (0, 0, 1, 1)


def test_a_training_image_is_its_random_box_mirrored_every_other_time(tmp_path):
    image, mirrored = smooth(np.random.default_rng(1), 40, 50), 0
    Image.fromarray(image).save(tmp_path / 'image.png')
    for i in range(200):
        flip, trials = imagefolder.augmentation(0, 1, i)
        found = imagefolder.train_crop(tmp_path / 'image.png', SIZE, flip, trials)
        top, left, height, width = imagefolder.random_box(40, 50, trials)
        box = (left, top, left + width, top + height)
        theirs = np.asarray(Image.fromarray(image).crop(box).resize((SIZE, SIZE), Image.BILINEAR))
        mean, most = difference(found, theirs[:, ::-1] if flip else theirs)
        assert mean < 0.3 and most <= 2  # both round, at other places
        mirrored += flip
    assert 70 < mirrored < 130


JPEGS = {
    'usual': {},
    'full colour': {'subsampling': '4:4:4'},
    'half colour': {'subsampling': '4:2:2'},
    'with restarts': {'restart_marker_rows': 1},
    'optimal codes': {'optimize': True},
    'progressive': {'progressive': True},
}


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
@pytest.mark.parametrize('kind', JPEGS)
def test_a_part_of_a_jpeg_is_that_part_of_the_whole_with_fewer_rows_decoded(tmp_path, monkeypatch, capfd, mode, kind):
    path, rng, decode, rows = tmp_path / 'image.jpg', np.random.default_rng(1), data._decode, []
    options = {k: v for k, v in JPEGS[kind].items() if mode == 'RGB' or k != 'subsampling'}
    Image.fromarray(smooth(rng, 181, 150)).convert(mode).save(path, quality=90, **options)
    whole = data.read_image(path)
    monkeypatch.setattr(data, '_decode', lambda content: rows.append(len(decode(content))) or decode(content))
    for height in (1, 8, 17, 100, 133, 150, 165, 180, 181):
        top, left = int(rng.integers(181 - height + 1)), int(rng.integers(100))
        found = data.read_image(path, lambda *shape, box=(top, left, height, 50): box if shape == (181, 150) else None)
        np.testing.assert_array_equal(found, whole[top : top + height, left : left + 50])
    assert len(rows) == 9 and max(rows) == 181
    assert (min(rows) == 181) == (kind in ('progressive', 'with restarts'))
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('transform', [0, 2])
def test_cmyk_jpegs_are_read_as_pil_reads_them(tmp_path, transform):
    path = tmp_path / 'print.jpg'
    Image.fromarray(smooth(np.random.default_rng(1), 60, 80, 4), 'CMYK').save(path, quality=95)
    content = path.read_bytes()
    at = content.index(b'Adobe') + 11  # the byte that tells CMYK (0) from YCCK (2), as most of ImageNet's are
    path.write_bytes(content[:at] + bytes([transform]) + content[at + 1 :])
    with Image.open(path) as theirs:
        assert theirs.mode == 'CMYK'
        assert difference(data.read_image(path), theirs.convert('RGB'))[1] <= 2


@pytest.mark.parametrize('mode', ['RGB', 'L', '1', 'P', 'LA', 'RGBA'])
def test_any_kind_of_png_named_jpeg_is_read_as_pil_reads_it(tmp_path, mode):
    path = tmp_path / 'picture.JPEG'
    Image.fromarray(smooth(np.random.default_rng(1), 60, 80)).convert(mode).save(path, format='PNG')
    with Image.open(path) as theirs:
        assert difference(data.read_image(path), theirs.convert('RGB'))[1] == 0


@pytest.mark.parametrize('channels', [1, 3])
def test_16_bit_pngs_keep_their_upper_8_bits(tmp_path, channels):
    deep = np.random.default_rng(1).integers(0, 65536, (20, 30, channels), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / 'deep.png'), deep)
    expected = np.broadcast_to(deep[..., ::-1] >> 8, (20, 30, 3))
    np.testing.assert_array_equal(data.read_image(tmp_path / 'deep.png'), expected)


def test_grey_progressive_and_turned_jpegs_are_read_as_pil_reads_them(tmp_path):
    image = Image.fromarray(smooth(np.random.default_rng(1), 60, 80))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn to the right
    image.save(tmp_path / 'turned.jpg', exif=exif)
    image.save(tmp_path / 'progressive.jpg', progressive=True)
    image.convert('L').save(tmp_path / 'grey.jpg')
    for path in tmp_path.iterdir():
        with Image.open(path) as theirs:
            assert difference(data.read_image(path), theirs.convert('RGB'))[1] == 0
    grey = data.read_image(tmp_path / 'grey.jpg')
    assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 0] == grey[..., 2]).all()


def test_normalisation_is_imagenets_in_channels_last_order():
    pixels = torch.from_numpy(smooth(np.random.default_rng(0), 24, 16)).reshape(2, 12, 16, 3)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()
    expected = (pixels.double() / 255 - mean) / std
    found = imagefolder.normalize(pixels)
    torch.testing.assert_close(found, expected.permute(0, 3, 1, 2).float())
    assert found.is_contiguous(memory_format=torch.channels_last) and pixels.dtype == torch.uint8


# ----------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize('nthread', [1, 2])
def test_worker_processes_make_the_very_batches_of_none(folder, nthread):
    assert all_equal(train_batches(folder.train, nthread), train_batches(folder.train))
    assert all_equal(eval_batches(folder.test, nthread), eval_batches(folder.test))


@pytest.mark.parametrize('world', [2, 3])
def test_workers_share_the_very_batches_of_one(folder, world):
    parts = [list(train_batches(folder.train, rank=rank, world=world)) for rank in range(world)]
    one = list(train_batches(folder.train))
    assert [size for *_, size in one] == [8, 8, 8, 1]
    assert {len(part) for part in parts} == {len(train_batches(folder.train, world=world))} == {3}  # not the single one
    for number, (images, labels, size) in enumerate(one[:3]):
        for rank in range(world):
            assert torch.equal(parts[rank][number][0], images[rank::world])
            assert torch.equal(parts[rank][number][1], labels[rank::world])
            assert parts[rank][number][2] == size == 8


def test_an_image_is_augmented_by_seed_epoch_and_its_index_alone(folder):
    def picture(index, seed=5, epoch=2, beside=()):
        return imagefolder.read_batch(folder.train, SIZE, (seed, epoch), [index, *beside])[0][0]

    assert torch.equal(picture(7), picture(7, beside=[1, 2]))
    assert not torch.equal(picture(7), picture(7, seed=6))
    assert not torch.equal(picture(7), picture(7, epoch=3))
    twins = imagefolder.Files([folder.train.paths[0]] * 2, folder.train.labels[:2])
    first, second = imagefolder.read_batch(twins, SIZE, (5, 2), [0, 1])[0]
    assert not torch.equal(first, second)


def test_an_epoch_is_a_permutation_that_seed_and_epoch_choose(folder):
    expected = folder.train.labels[data.order(TRAINING, 5, 2)]
    assert torch.equal(torch.cat([labels for _, labels, _ in train_batches(folder.train)]), expected)
    other = torch.cat([labels for _, labels, _ in train_batches(folder.train, epoch=3)])
    assert not torch.equal(other, expected) and torch.equal(other.sort()[0], expected.sort()[0])
    assert all_equal(train_batches(folder.train), train_batches(folder.train))


def test_loading_leaves_the_global_random_numbers_alone(folder):
    torch.manual_seed(3)
    list(train_batches(folder.train))
    found = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), found)


@pytest.mark.parametrize('world', [1, 2, 3, 10])
def test_every_test_image_comes_exactly_once_over_all_workers(folder, world):
    seen = []
    for rank in range(world):
        batches = eval_batches(folder.test, rank=rank, world=world)
        parts = list(batches)
        assert len(parts) == len(batches) == math.ceil(len(range(rank, TESTING, world)) / 4)
        for images, labels, size in parts:
            assert len(images) == len(labels) == size <= 4
            seen += [(image.double().sum().item(), int(label)) for image, label in zip(images, labels)]
    whole = imagefolder.normalize(imagefolder.read_batch(folder.test, SIZE, None, range(TESTING))[0])
    assert sorted(seen) == sorted(zip(whole.double().sum((1, 2, 3)).tolist(), folder.test.labels.tolist()))


# -------------------------------------------------------------------------------------------------------- bad images


def test_a_bad_training_image_is_named_once_counted_and_replaced_by_the_next_good_one(damaged, capfd):
    imagefolder._warn_once.cache_clear()
    batches = train_batches(damaged.train, nthread=1)
    first = list(batches)
    assert batches.bad == 3 and sum(len(labels) for _, labels, _ in first) == TRAINING
    assert all_equal(batches, first) and batches.bad == 3
    err = capfd.readouterr().err
    assert err.count('\n') == 3
    for i in (3, 4, 24):
        name = damaged.train.paths[i]
        assert err.count(f'warning: {name} is not a readable image') == 1, err

    pixels, labels, bad = imagefolder.read_batch(damaged.train, SIZE, (5, 2), range(TRAINING))
    for index, taken in ((3, 5), (4, 5), (24, 0)):
        assert torch.equal(pixels[index], pixels[taken]) and labels[index] == damaged.train.labels[taken]
    assert len(bad) == 3


@pytest.mark.parametrize('world', [2, 3])
def test_bad_images_are_counted_once_over_all_workers(damaged, world):
    parts = [train_batches(damaged.train, rank=rank, world=world, batch_size=25) for rank in range(world)]
    labels = [torch.cat([labels for _, labels, _ in part]) for part in parts]
    assert sum(part.bad for part in parts) == 3 and sum(map(len, labels)) == TRAINING


def test_without_any_good_image_training_is_refused(damaged):
    for path in damaged.train.paths:
        os.truncate(path, 9)
    with pytest.raises(ValueError, match='not a readable image.*; nor can any other') as caught:
        list(train_batches(damaged.train, nthread=1))
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('nthread', [0, 1])
def test_a_bad_test_image_is_refused_by_name_unless_it_may_be_left_out(damaged, nthread, capfd):
    imagefolder._warn_once.cache_clear()
    with pytest.raises(ValueError) as caught:
        list(eval_batches(damaged.test, nthread))
    assert str(caught.value).startswith(f'{damaged.test.paths[0]} is not a readable image')
    assert '\n' not in str(caught.value) and not capfd.readouterr().err
    batches = eval_batches(damaged.test, nthread, skip_bad_images=True)
    found, good = list(batches), [i for i in range(TESTING) if i not in (0, 5)]
    assert batches.bad == 2 and [size for *_, size in found] == [3, 3, 1]
    assert torch.cat([labels for _, labels, _ in found]).tolist() == damaged.test.labels[good].tolist()
    assert capfd.readouterr().err.count('left out of the test') == 2


def test_an_image_that_has_gone_counts_as_bad_and_a_batch_of_none_is_passed_over(damaged, capfd):
    for path in damaged.test.paths[:4]:
        os.unlink(path) if os.path.exists(path) else None
    batches = eval_batches(damaged.test, skip_bad_images=True)
    assert [size for *_, size in batches] == [3, 1] and batches.bad == 5
    assert f'No such file or directory: {damaged.test.paths[1]!r}' in capfd.readouterr().err


# --------------------------------------------------------------------------------------------------------- benchmark


def test_the_benchmark_prints_ratio_and_pixel_difference(folder):
    root = os.path.dirname(os.path.dirname(os.path.dirname(folder.train.paths[0])))
    flags = ['--imagenetpath', root, '--image_size', '16', '--repeats', '2']
    command = [sys.executable, os.path.join('benchmarks', 'input.py'), *flags]
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    out = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout
    assert 'ours, uint8 batch' in out and 'torchvision on PIL' in out
    mean = float(out.split('on equal crops, of 255: mean ')[1].split(',')[0])
    assert 0 <= mean < 0.3


# ------------------------------------------------------------------------------------------------------- processes


PLANTED = """
import os
open({marks!r} + '/' + __name__ + '-' + str(os.getpid()), 'w').close()
raise SystemExit('a file of the current folder was executed')
"""


def plant(folder, marks):
    """Put a Python file under every name that a process could import into a folder; executed, it leaves a mark."""
    marks.mkdir()
    installed = importlib.metadata.packages_distributions()
    ours = {path.stem for path in pathlib.Path(ROOT).glob('*.py')}
    ours |= {path.parent.name for path in pathlib.Path(ROOT).glob('*/__init__.py')}
    for name in filter(
        str.isidentifier, {*sys.stdlib_module_names, *installed, *ours, 'sitecustomize', 'usercustomize'}
    ):
        (folder / f'{name}.py').write_text(PLANTED.format(marks=str(marks)))


@pytest.mark.parametrize(
    'command',
    [
        'imagenet.py --imagenetpath . --image_size 32 --width 0.0625 --batch_size 4 --nthread 1 --ngpu 2',
        'cifar.py --dataset digits --image_size 8 --randomcrop_pad 1 --depth 10 --width 0.25 --compile',
        'reproduce.py demo --methods student --holdout 936 --jobs 2',
        'benchmarks/step.py --only student --pairs 1 --dtype float --eager',
    ],
)
def test_nothing_in_the_current_folder_is_executed(folder, tmp_path, command):
    """By none of the processes that are started: launcher, workers, loaders, runs of a table, benchmarks."""
    here = tmp_path / 'here'
    shutil.copytree(os.path.dirname(os.path.dirname(os.path.dirname(folder.train.paths[0]))), here)
    plant(here, tmp_path / 'marks')
    script, *words = command.split()
    environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | {'OMP_NUM_THREADS': '1'}
    words += [] if 'benchmarks' in script else ['--epochs', '1']
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, script), *words],
        **{'cwd': here, 'env': environment, 'capture_output': True, 'text': True, 'timeout': HANGS},
    )
    assert done.returncode == 0, done.stderr
    assert not os.listdir(tmp_path / 'marks') and 'Error' not in done.stderr


def test_an_environment_that_cannot_keep_the_current_folder_out_is_refused(monkeypatch):
    """With -E, Python passes the variables over; a colon in a name ends it."""
    script = os.path.join(ROOT, 'cifar.py')
    done = subprocess.run([sys.executable, '-E', script, '--epochs', '1'], capture_output=True, text=True)
    assert refused((done.returncode, done.stdout, done.stderr), 'python -E', 'leave -E out')
    monkeypatch.setattr(sys, 'path', [*sys.path, '/a:b'])
    with pytest.raises(ValueError, match='/a:b has a : in its name'):
        children.import_safely()


def threads(task, out):
    return torch.from_numpy(out[:1]), cv2.getNumThreads(), torch.get_num_threads()


def test_a_loader_process_decodes_on_one_thread():
    cv2.setNumThreads(2)
    try:
        found = [more for _, *more in readers.read_ahead(threads, [0, 1], (1, 1, 1, 3), 1)]
    finally:
        cv2.setNumThreads(0)
    assert found == [[1, 1]] * 2


def filled(task, out):
    """A task is (number, images): so many rows of that number; number 9 is a fault of the program."""
    number, count = task
    if number == 9:
        raise KeyError('no such thing')
    out[:count] = number
    return torch.from_numpy(out[:count]), number, os.getpid()


@pytest.mark.parametrize('number', [1, 2, 3, 8])
def test_batches_come_whole_and_in_order_from_any_number_of_processes(number):
    tasks, processes = [(i, i % 3) for i in range(7)], set()
    for task, (rows, found, pid) in zip(tasks, readers.read_ahead(filled, tasks, (2, 4, 4, 3), number), strict=True):
        processes.add(pid)
        assert task == (found, len(rows)) and (rows == found).all()
    assert len(processes) == min(number, 7) and ends(processes)


def test_a_fault_in_a_loader_process_is_raised_with_its_traceback():
    with pytest.raises(RuntimeError, match="KeyError: 'no such thing'"):
        list(readers.read_ahead(filled, [(1, 1), (9, 1)], (2, 4, 4, 3), 2))


needs_proc = pytest.mark.skipif(not os.path.exists('/proc/self/stat'), reason='finds processes in /proc')


@needs_proc
@pytest.mark.parametrize('victim', ['first', 'second', 'server'])
def test_a_dead_loader_process_ends_the_reading_at_once_and_the_others_with_it(victim):
    """Whichever it is, and also where the server that they were forked from dies."""
    batches = readers.read_ahead(filled, [(i % 8, 1) for i in range(100)], (2, 4, 4, 3), 2)
    pids = [next(batches)[2] for _ in range(4)][:2]
    killed = {'first': pids[0], 'second': pids[1], 'server': state(pids[0])[1]}[victim]
    os.kill(killed, signal.SIGKILL)
    assert ends([killed])
    with pytest.raises(ChildProcessError, match='a process that reads images died'):
        list(batches)
    assert ends(pids)


def descendants(pid):
    """The processes that a process has started, and those that they have."""
    parents = {int(name): state(name)[1] for name in os.listdir('/proc') if name.isdigit()}
    tree = [pid]
    for parent in tree:
        tree += [child for child, its in parents.items() if its == parent]
    return tree[1:]


def is_loader(pid):
    """Whether a process was forked by a server, and is not the server."""
    return all('forkserver' in proc(p, 'cmdline') for p in (pid, state(pid)[1]))


IMAGES = '--image_size 32 --width 0.0625 --epochs 1 --batch_size 4 --nthread 2 --epoch_step [] --imagenetpath'


@needs_proc
@pytest.mark.parametrize(
    'ngpu, paused, victim',
    [
        (1, 'TrainBatches', 'loader'),
        (1, 'TrainBatches', 'main'),
        (2, 'TestBatches', 'loader'),
        (2, 'TrainBatches', 'main'),
    ],
)
def test_the_death_of_any_process_of_a_run_ends_all_of_them_with_one_line(tmp_path, ngpu, paused, victim):
    """A loader's, by the system for lack of memory; the main one's, be it trainer or launcher."""
    root = str(write(tmp_path / 'photos', train=24, test=24))  # more than loaders read ahead
    environment = {**os.environ, 'PYTHONPATH': ROOT, 'OMP_NUM_THREADS': '1', 'PACED': 'imagenet', 'PAUSED': paused}
    command = [
        sys.executable,
        paced.__file__,
        *IMAGES.split(),
        root,
        *'--image_size 33 --batch_size 2'.split(),
        '--ngpu',
        str(ngpu),
    ]
    pipes = dict.fromkeys(('stdout', 'stderr'), subprocess.PIPE)
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes) as process:
        for _ in range(ngpu):
            assert 'paused\n' in iter(process.stdout.readline, '')
        others = descendants(process.pid)
        if victim == 'main':
            process.kill()
        else:
            os.kill(max(filter(is_loader, others)), signal.SIGKILL)
        (tmp_path / 'GO').touch()
        assert ends(others)
        _, err = process.communicate(timeout=HANGS)
    if victim == 'loader':
        assert process.returncode == 1 and err.count('\n') == 1, err
        assert 'error: a process that reads images died (signal 9)' in err and '--nthread' in err
    else:
        # Workers that see first that their launcher's store is gone end without a word.
        assert err in ('', 'what started this run has died, and it ends\n'), err


LITTLE = 'umount /dev/shm; mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
can_mount = subprocess.run(['unshare', '-m', 'sh', '-c', LITTLE, 'sh', 'true'], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount, reason='needs the right to mount')
def test_a_full_dev_shm_is_no_hindrance(folder, tmp_path):
    """Containers often have 64 MB of it."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(folder.train.paths[0])))
    words = '--image_size 224 --batch_size 8 --skip_teacher_check'.split()
    command = [sys.executable, os.path.join(ROOT, 'imagenet.py'), *IMAGES.split(), root, *words]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    little = ['unshare', '-m', 'sh', '-c', LITTLE, 'sh', *command]
    done = subprocess.run(little, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0 and 'epoch 1/1' in done.stdout, done.stderr


def test_a_folder_for_temporary_files_of_too_long_a_name_is_named(folder, tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.dirname(folder.train.paths[0])))
    long = tmp_path / ('x' * 100)
    long.mkdir()
    command = [sys.executable, os.path.join(ROOT, 'imagenet.py'), *IMAGES.split(), root]
    environment = {**os.environ, 'TMPDIR': str(long)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert refused((done.returncode, done.stdout, done.stderr), str(long), 'set a shorter TMPDIR')


def test_loader_processes_begin_with_everything_imported_from_wherever_the_run_is_started(folder, tmp_path):
    """And not with seconds of imports for each process of each epoch."""
    script = (
        'import os, sys; sys.path[0] = os.environ["ROOT"]; import readers\n'
        'def loaded(): os._exit(not {"imagefolder", "torch", "cv2"} <= set(sys.modules))\n'
        'if __name__ == "__main__":\n'
        '    process = readers.context().Process(target=loaded); process.start(); process.join()\n'
        '    sys.exit(process.exitcode)\n'
    )
    (tmp_path / 'script.py').write_text(script)
    environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | {'ROOT': ROOT}
    (tmp_path / 'elsewhere').mkdir()
    done = subprocess.run([sys.executable, '../script.py'], cwd=tmp_path / 'elsewhere', env=environment)
    assert done.returncode == 0
