"""Image data sets held in memory as uint8, and batches of them augmented on the compute device.

A new data set is a function and a line of DATASETS.
"""

import contextlib
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPException
from typing import NamedTuple
from urllib.error import URLError

import numpy as np
import torch

from images import batches
from images.decode import cv2, read_image  # its cv2 refuses images with too many pixels
from images.folders import find_parts

MEAN = (125.3, 123.0, 113.9)  # of CIFAR-10's training images, red, green, blue; used for every data set here
STD = (63.0, 62.1, 66.7)
CIFAR10_CLASSES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
BINARY_FOLDER = 'cifar-10-batches-bin'
BINARY_RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the red, green and blue planes
BINARY_RECORDS = 10_000  # in each official file


class Images(NamedTuple):
    """Images of one size with their labels."""

    pixels: torch.Tensor  # (N, H, W, 3) uint8, red, green, blue
    labels: torch.Tensor  # (N,) int64

    def to(self, device):
        return Images(self.pixels.to(device), self.labels.to(device))


class Dataset(NamedTuple):
    """What `load` returns."""

    train: Images
    test: Images
    classes: list  # their names, in the order of their numbers
    flip: bool  # whether a mirrored image is still of its class
    by_class: bool = False  # whether training images are sorted by class, so that the last ones are all of one class

    @property
    def num_classes(self):
        return len(self.classes)


# ------------------------------------------------------------------------------------------------------ data sets


def load(dataset, root='.', image_size=32, holdout=0, nthread=4, note=print, follow_links=False):
    """Load a data set of DATASETS.

    With `holdout`, that many training images replace the test set: the last ones or, where images are sorted by class,
    those that `batches.hold_out` picks. `note` takes lines for the user; `follow_links` is as in `folders.find_images`.
    Raises ValueError or OSError, with a message for the user, if data is missing or damaged.
    """
    if dataset not in DATASETS:
        *names, last = DATASETS
        raise ValueError(f'--dataset {dataset}: expected {", ".join(names)} or {last}')
    source = {'root': root, 'image_size': image_size, 'nthread': nthread, 'follow_links': follow_links, 'note': note}
    loaded = DATASETS[dataset](**source)
    height, width = loaded.train.pixels.shape[1:3]
    if (height, width) != (image_size, image_size):
        raise ValueError(f'--image_size {image_size}: {dataset} has images of {height}x{width}')
    if not holdout:
        return loaded
    kept = len(loaded.train.labels) - holdout
    if loaded.by_class:
        parts = batches.hold_out(loaded.train.labels, holdout)
    elif kept < 1:
        raise ValueError(f'--holdout {holdout}: {dataset} has only {kept + holdout} training images')
    else:
        parts = slice(kept), slice(kept, None)
    train, test = (Images(*(t[part] for t in loaded.train)) for part in parts)
    return loaded._replace(train=train, test=test)


def _images(pixels, labels):
    return Images(torch.from_numpy(np.ascontiguousarray(pixels)), torch.as_tensor(np.asarray(labels), dtype=torch.long))


def _cifar(dataset, root, note, **_):
    import torchvision  # slow to import, so only where it is needed

    source = getattr(torchvision.datasets, dataset)
    folder, missing = os.path.join(root, source.base_folder), not os.path.exists(root)
    if not os.path.isdir(folder) or not os.listdir(folder):
        size = {'CIFAR10': 163, 'CIFAR100': 161}[dataset]
        note(f'{dataset} is not in {root}: downloading {size} MiB from {source.url}')
    try:
        with _alone(folder):
            test = source(root, train=False, download=True)
        parts = source(root, train=True), test
    except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
        with contextlib.suppress(OSError):  # only empty folders can be removed
            os.rmdir(folder)
            if missing:
                os.rmdir(root)
        raise OSError(
            f'{dataset} is not in {root} and {source.url} cannot be reached ({getattr(error, "reason", error)}): '
            f'put {source.base_folder} there by hand, or name its folder with --dataroot'
        ) from None
    except (RuntimeError, EOFError) as error:
        raise ValueError(f'{dataset} in {root} is damaged ({error}): delete {source.base_folder} there') from None
    return Dataset(*(_images(part.data, part.targets) for part in parts), parts[0].classes, flip=True)


@contextlib.contextmanager
def _alone(folder):
    """Make a folder into which one process at a time downloads, while others wait."""
    os.makedirs(folder, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _cifar10(root, note, **_):
    folder = os.path.join(root, BINARY_FOLDER)
    return _cifar10_binary(folder, note) if os.path.isdir(folder) else _cifar('CIFAR10', root, note)


def _cifar10_binary(folder, note):
    def read(name, fewer_allowed):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise OSError(f'{path} is missing: the binary CIFAR-10 has data_batch_1..5.bin and test_batch.bin')
        size = os.path.getsize(path)
        records, remainder = divmod(size, BINARY_RECORD)
        if remainder or not 0 < records <= BINARY_RECORDS or records < BINARY_RECORDS and not fewer_allowed:
            expected = f'{BINARY_RECORDS} records of {BINARY_RECORD} bytes'
            raise ValueError(f'{path} has {size} bytes, not {expected}: it is truncated or not CIFAR-10')
        data = np.fromfile(path, np.uint8).reshape(records, BINARY_RECORD)
        if data[:, 0].max() > 9:
            raise ValueError(f'{path} has a label of {data[:, 0].max()}; CIFAR-10 has 0 to 9')
        if records < BINARY_RECORDS:
            note(f'{path} holds {records} of {BINARY_RECORDS} images')
        return data

    train = np.concatenate([read(f'data_batch_{i}.bin', False) for i in range(1, 6)])
    test = read('test_batch.bin', True)
    planes = [d[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for d in (train, test)]  # -> (N, 32, 32, 3)
    return Dataset(_images(planes[0], train[:, 0]), _images(planes[1], test[:, 0]), CIFAR10_CLASSES, flip=True)


def _digits(image_size, **_):
    """scikit-learn's 1,797 handwritten digits of 8x8, enlarged: the first 1,000 to train on, the others to test."""
    from sklearn.datasets import load_digits  # takes a second to import, so only where it is needed

    pixels, labels = load_digits(return_X_y=True)
    small = (pixels.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    grey = [cv2.resize(d, (image_size, image_size), interpolation=cv2.INTER_LINEAR) for d in small]
    pixels = np.repeat(np.stack(grey)[..., None], 3, axis=3)
    parts = (_images(pixels[part], labels[part]) for part in (slice(1000), slice(1000, None)))
    return Dataset(*parts, list('0123456789'), flip=False)


def _folder(root, image_size, nthread, follow_links, note):
    classes, *listed = find_parts(root, follow_links, note)
    parts = []
    for files in listed:
        with ThreadPoolExecutor(max(1, nthread)) as pool:
            pixels = list(pool.map(lambda file: square(read_image(file[0]), image_size), files))
        parts.append(_images(np.stack(pixels), [label for _, label in files]))
    return Dataset(*parts, classes, flip=True, by_class=True)


def square(image, size):
    """An image (H, W, 3) uint8 stretched to (size, size, 3)."""
    shrinking = min(image.shape[:2]) > size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)


# Values of --dataset of cifar.py; each is called with root, image_size, nthread, follow_links and note, as in `load`.
DATASETS = {'CIFAR10': _cifar10, 'CIFAR100': partial(_cifar, 'CIFAR100'), 'folder': _folder, 'digits': _digits}
normalize = partial(batches.normalize, mean=MEAN, std=STD)


def sample(images, count=512):
    """Evenly spaced images of a part of a data set, unaugmented: (up to count, 3, H, W)."""
    return normalize(images.pixels[batches.spread(len(images.labels), count)])


class TrainBatches:
    """One epoch of augmented batches: (images (B, 3, H, W), labels (B,), size of the global batch).

    `start` is the number of batches of the epoch to skip.
    """

    def __init__(self, images, batch_size, pad, flip, seed, rank, world, epoch, start=0):
        n, device = len(images.labels), images.labels.device
        global_batches = batches.global_batches(n, batch_size, seed, epoch, least=world)[start:]
        self.sizes = [len(b) for b in global_batches]
        shares = [batches.share(b, rank, world) for b in global_batches]
        # One copy, since a GPU makes the host wait for each; np.empty for a resume after the last batch.
        indices = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *shares])).to(device)
        self.batches = indices.split([len(b) for b in shares])
        self.where = torch.from_numpy(batches.augmentation(n, pad, flip, seed, epoch)).to(device)
        self.images, self.pad = images, pad

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for index, size in zip(self.batches, self.sizes):
            pixels = batches.crop(self.images.pixels, index, self.where[index], self.pad)
            yield normalize(pixels), self.images.labels[index], size


class TestBatches:
    """Every image once, in order, unaugmented: (images (B, 3, H, W), labels (B,), B)."""

    def __init__(self, images, batch_size, rank=0, world=1):
        index = torch.arange(len(images.labels), device=images.labels.device)
        self.batches = batches.share(index, rank, world).split(batch_size)
        self.images = images

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for index in self.batches:
            yield normalize(self.images.pixels[index]), self.images.labels[index], len(index)
