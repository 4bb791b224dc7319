"""ImageNet, birds, rooms, or another folder of photographs: decoded and cropped in worker processes, normalised on the
device.

A new data set is a function and a line of DATASETS. Order, crops and mirroring are a pure function of (seed, epoch,
sample index): they depend neither on the number of workers nor on where a run was resumed.
"""

import functools
import itertools
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from formats.faults import is_of_the_machine
from images import batches, crops, folders, readers, shared

MEAN = (123.675, 116.28, 103.53)  # of ImageNet's training images, red, green, blue: 255 * (0.485, 0.456, 0.406)
STD = (58.395, 57.12, 57.375)  # 255 * (0.229, 0.224, 0.225)


class Files(NamedTuple):
    """Image files with their labels."""

    paths: Sequence  # N paths
    labels: torch.Tensor | np.ndarray  # (N,) int64
    boxes: list | None = None  # the used part of each file: (left, top, width, height) in pixels, or None for all
    scaled: bool = False  # training crops have the scale of test crops, and are not a random_box


class Dataset(NamedTuple):
    """What `load` returns."""

    train: Files
    test: Files
    classes: list  # their names, in the order of their numbers

    @property
    def num_classes(self):
        return len(self.classes)


# --------------------------------------------------------------------------------------------------------- data sets


def load(root, follow_links=False, note=print):
    """List the images of a folder with train/ and val/, as `folders.find_parts` does.

    Raises ValueError or OSError, with a message for the user, if folders or images are missing or links lead out of
    `root`.
    """
    classes, train, test = folders.find_parts(root, follow_links, note)
    return Dataset(_files(train), _files(test), classes)


def hold_out(dataset, count):
    """A data set whose test files are `count` of its training files, by `batches.hold_out`; with 0, unchanged."""
    if not count:
        return dataset
    files = dataset.train

    def part(indices):
        boxes = [files.boxes[i] for i in indices] if files.boxes else None
        return files._replace(paths=[files.paths[i] for i in indices], labels=files.labels[indices], boxes=boxes)

    kept, held = batches.hold_out(files.labels, count)
    return dataset._replace(train=part(kept), test=part(held))


def share(dataset):
    """A `Dataset` as `shared.Shared`, with names and labels in memory that processes can share."""
    parts = dataset.train, dataset.test
    parts = (f._replace(paths=shared.Names(f.paths), labels=np.asarray(f.labels)) for f in parts)
    return shared.share(Dataset(*parts, dataset.classes))


def _files(files, **fields):
    paths, labels = zip(*files)
    return Files(list(paths), torch.tensor(labels), **fields)


def load_cub(root, follow_links=False, note=print):
    """Caltech-UCSD Birds-200-2011 (Wah et al. 2011): the folder CUB_200_2011 as published, cropped to its boxes.

    Raises ValueError or OSError, with a message for the user, if a list or an image is missing, lists do not agree
    or links lead out of `root`.
    """
    lines = {
        'images': r'[^/ ]+/[^/]+',
        'train_test_split': '[01]',
        'bounding_boxes': ' '.join([r'\d{1,6}(?:\.\d*)?'] * 4),
    }
    lists = (folders.read_list(root, f'{name}.txt', rf'(\d+) ({line})') for name, line in lines.items())
    names, trained, boxes = map(dict, lists)
    if not names.keys() == trained.keys() == boxes.keys():
        raise ValueError(f'{root}: {", ".join(f"{name}.txt" for name in lines)} do not number the same images')
    boxes = {i: tuple(map(float, box.split())) for i, box in boxes.items()}
    train, test = ([(name, boxes[i]) for i, name in names.items() if trained[i] == part] for part in '10')
    return _listed(root, 'images', train, test, follow_links)


def load_scenes(root, follow_links=False, note=print):
    """MIT Indoor-67 (Quattoni & Torralba 2009): a folder with Images/, TrainImages.txt and TestImages.txt.

    Raises ValueError or OSError as `load_cub` does.
    """
    lists = (folders.read_list(root, f'{part}Images.txt', '([^/]+/[^/]+)') for part in ('Train', 'Test'))
    train, test = ([(name, None) for (name,) in names] for names in lists)
    return _listed(root, 'Images', train, test, follow_links)


def _listed(root, folder, train, test, follow_links):
    """A data set from lists [('<class>/<file>' in a folder of `root`, box or None), ...]; classes sorted by name."""
    names = ([name for name, _ in part] for part in (train, test))
    classes, *listed = folders.find_listed(root, folder, *names, follow_links)
    boxes = ([box for _, box in part] for part in (train, test))
    parts = (_files(files, boxes=part_boxes, scaled=True) for files, part_boxes in zip(listed, boxes))
    return Dataset(*parts, classes)


def load_folder(root, follow_links=False, note=print):
    """The user's own images (see `load`), cropped like those of the other data sets of DATASETS."""
    dataset = load(root, follow_links, note)
    return dataset._replace(train=dataset.train._replace(scaled=True))


DATASETS = {'cub': load_cub, 'scenes': load_scenes, 'folder': load_folder}  # what --dataset of finetune.py takes


# ----------------------------------------------------------------------------------------------------------- batches


def read_batch(files, size, augment, indices, pixels=None):
    """Decode and crop images: (pixels (B, size, size, 3) uint8, labels [B numbers], error messages of bad files).

    `augment` is (seed, epoch) for training, None for testing. `pixels` is an array for the crops, with room for all
    indices. Bad files cannot be read: in training the next good one replaces each, in testing they are left out. A bad
    file is reported only for its own index: once in an epoch.
    """
    n = len(files.paths)
    pixels = np.empty((len(indices), size, size, 3), np.uint8) if pixels is None else pixels
    taken, bad = [], []
    # All draws come first: between two images, with the caches full of pixels, they would cost ten times more.
    drawn = {i: crops.augmentation(*augment, i) for i in indices} if augment else {}
    for i in indices:
        for j in itertools.chain(range(i, n), range(i)) if augment else [i]:
            path, box = files.paths[j], files.boxes[j] if files.boxes else None
            try:
                if not augment:
                    crop = crops.test_crop(path, size, box)
                else:
                    draws = drawn.get(j) or crops.augmentation(*augment, j)
                    if files.scaled:
                        crop = crops.scaled_crop(path, size, *draws, box)
                    else:
                        crop = crops.train_crop(path, size, *draws)
            except (OSError, ValueError) as error:
                if is_of_the_machine(error):  # the image itself may be good
                    raise
                if j == i:
                    bad.append(str(error))
                continue
            pixels[len(taken)] = crop
            taken.append(j)
            break
    return torch.from_numpy(pixels[: len(taken)]), files.labels[taken].tolist(), bad


normalize = functools.partial(batches.normalize, mean=MEAN, std=STD)


def sample(files, size, count=64):
    """Evenly spaced images of a part of a data set, unaugmented: (up to count, 3, size, size).

    Raises ValueError if none of them can be read.
    """
    pixels, labels, bad = read_batch(files, size, None, batches.spread(len(files.paths), count))
    if not len(labels):
        raise ValueError(f'{bad[0]}; {len(bad) - 1} others cannot be read either')
    return normalize(pixels)


def _read(dataset, part, batches, size, augment, nthread):
    """Yield `read_batch` of each batch of indices, read by `nthread` processes, or by this one if that is 0."""
    read = functools.partial(_read_part, part, size, augment)
    if not nthread:
        yield from (read(dataset.value, batch) for batch in batches)
    elif batches:
        yield from readers.read_ahead(read, dataset, batches, (max(map(len, batches)), size, size, 3), nthread)


def _read_part(part, size, augment, dataset, indices, pixels=None):
    return read_batch(getattr(dataset, part), size, augment, indices, pixels)


def _on_device(pixels, labels, device):
    """Pixels and labels as images (B, 3, H, W) and labels (B,) on the device, in memory of their own."""
    labels = torch.tensor(labels)
    if device.type == 'cuda':
        pixels, labels = pixels.pin_memory(), labels.pin_memory()
    return normalize(pixels.to(device, non_blocking=True)), labels.to(device, non_blocking=True)


@functools.cache
def _warn_once(message):
    plain = ''.join(c if c.isprintable() else '?' for c in message)  # it quotes the names of files
    tqdm.write(f'warning: {plain}', file=sys.stderr)


class TrainBatches:
    """One epoch of augmented batches: (images (B, 3, H, W), labels (B,), size of the global batch).

    `dataset` is what `share` returns. The first `start` batches are skipped, and a last one of fewer than `least`
    images, over all workers, is dropped. `bad` counts the images of this worker's share that could not be read; the
    next good one replaces each. Raises ValueError if no image at all can be read.
    """

    def __init__(self, dataset, batch_size, image_size, seed, rank, world, nthread, device, epoch, start=0, least=1):
        n = len(dataset.value.train.paths)
        global_batches = batches.global_batches(n, batch_size, seed, epoch, max(world, least))[start:]
        self.sizes = [len(b) for b in global_batches]
        own = [batches.share(b, rank, world) for b in global_batches]
        self.read = dataset, 'train', own, image_size, (seed, epoch), nthread
        self.device, self.bad = device, 0

    def __len__(self):
        return len(self.sizes)

    def __iter__(self):
        self.bad = 0
        for (pixels, labels, bad), size in zip(_read(*self.read), self.sizes):
            if not len(labels):
                raise ValueError(f'{bad[0]}; no other training image can be read either')
            self.bad += len(bad)
            for reason in bad:
                _warn_once(f'{reason}; another replaces it in training')
            yield *_on_device(pixels, labels, self.device), size


class TestBatches:
    """The centre of every test image once, in order: (images (B, 3, H, W), labels (B,), B).

    `dataset` is what `share` returns. Raises ValueError naming an image that cannot be read, unless `skip_bad_images`
    leaves it out; `bad` counts them.
    """

    def __init__(self, dataset, batch_size, image_size, rank, world, nthread, device, skip_bad_images=False):
        share = batches.share(np.arange(len(dataset.value.test.paths)), rank, world)
        own = [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
        self.read = dataset, 'test', own, image_size, None, nthread
        self.device, self.skip_bad_images, self.bad = device, skip_bad_images, 0

    def __len__(self):
        return len(self.read[2])

    def __iter__(self):
        self.bad = 0
        for pixels, labels, bad in _read(*self.read):
            self.bad += len(bad)
            if bad and not self.skip_bad_images:
                raise ValueError(f'{bad[0]}; replace it, or leave such images out with --skip_bad_images')
            for reason in bad:
                _warn_once(f'{reason}; left out of the test')
            if len(labels):
                yield *_on_device(pixels, labels, self.device), len(labels)
