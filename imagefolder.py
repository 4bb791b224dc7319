"""ImageNet, birds, rooms, or another folder of photographs: decoded and cropped in worker processes, normalised on the
device.

Order, crops and mirroring are a pure function of (seed, epoch, sample index): they depend neither on the number of
workers nor on where a run was resumed.
"""

import codecs
import functools
import itertools
import math
import os
import re
import sys
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import readers

MEAN = (123.675, 116.28, 103.53)  # of ImageNet's training images, red, green, blue: 255 * (0.485, 0.456, 0.406)
STD = (58.395, 57.12, 57.375)  # 255 * (0.229, 0.224, 0.225)
MAX_LIST = 2**26  # bytes of a list of images
MAX_RATIO = 100  # of the sides of an image: scaled by the shorter one, a thinner one would fill the memory


class Files(NamedTuple):
    """Image files with their labels."""

    paths: list  # N names
    labels: torch.Tensor  # (N,) int64
    boxes: list | None = None  # of each file, what is looked at: (left, top, width, height) in pixels, or None for all
    scaled: bool = False  # crops to train on are of one scale, that of the test, and not random_box


class Dataset(NamedTuple):
    """What `load` returns."""

    train: Files
    test: Files
    num_classes: int


# -------------------------------------------------------------------------------------------------------- the folder


def load(root, follow_links=False, note=print):
    """List the images root/train/<class>/* and root/val/<class>/*; classes are numbered in the order of their names.

    Raises ValueError or OSError, with a message for the user, where folders or images are missing or links lead out of
    `root`: see `data.find_parts`.
    """
    if not os.path.isdir(root):
        raise OSError(f'{root}: no such folder')
    num_classes, train, test = data.find_parts(root, ('train', 'val'), follow_links, note)
    return Dataset(_files(train), _files(test), num_classes)


def hold_out(dataset, count):
    """A data set with `count` of its training files, as of `data.hold_out`, in place of the test; with 0 as it is."""
    if not count:
        return dataset
    files = dataset.train

    def part(indices):
        boxes = [files.boxes[i] for i in indices] if files.boxes else None
        return files._replace(paths=[files.paths[i] for i in indices], labels=files.labels[indices], boxes=boxes)

    kept, held = data.hold_out(files.labels, count)
    return dataset._replace(train=part(kept), test=part(held))


def _files(found, **more):
    paths, labels = zip(*found)
    return Files(list(paths), torch.tensor(labels), **more)


def load_cub(root, follow_links=False):
    """Caltech-UCSD Birds-200-2011 (Wah et al. 2011): the folder CUB_200_2011 as it is published, cropped to its boxes.

    Raises ValueError or OSError, with a message for the user, where a list or an image is missing, lists do not agree
    or links lead out of `root`.
    """
    lines = {
        'images': r'[^/ ]+/[^/]+',
        'train_test_split': '[01]',
        'bounding_boxes': ' '.join([r'\d{1,6}(?:\.\d*)?'] * 4),
    }
    names, trained, boxes = (dict(_lines(root, f'{name}.txt', rf'(\d+) ({line})')) for name, line in lines.items())
    if not names.keys() == trained.keys() == boxes.keys():
        raise ValueError(f'{root}: {", ".join(f"{name}.txt" for name in lines)} do not number the same images')
    boxes = {i: tuple(map(float, box.split())) for i, box in boxes.items()}
    train, test = ([(name, boxes[i]) for i, name in names.items() if trained[i] == part] for part in '10')
    return _listed(root, 'images', train, test, follow_links)


def load_scenes(root, follow_links=False):
    """MIT Indoor-67 (Quattoni & Torralba 2009): a folder with Images/, TrainImages.txt and TestImages.txt.

    Raises ValueError or OSError as `load_cub` does.
    """
    lists = (_lines(root, f'{part}Images.txt', '([^/]+/[^/]+)') for part in ('Train', 'Test'))
    train, test = ([(name, None) for (name,) in found] for found in lists)
    return _listed(root, 'Images', train, test, follow_links)


def _lines(root, name, pattern):
    """The groups of a pattern in each line of a list of images."""
    path = os.path.join(root, name)
    if not os.path.isfile(path):
        raise OSError(f'--dataroot {root} has no {name}')
    if os.path.getsize(path) > MAX_LIST:
        raise ValueError(f'{path} has more than {MAX_LIST:,} bytes: it is no list of images')
    with open(path, 'rb') as file:
        content = file.read().removeprefix(codecs.BOM_UTF8)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f'{path} is a text in UTF-16: save it in UTF-8')
    # Names are bytes to the system, in whatever encoding.
    lines = [os.fsdecode(line.strip()) for line in content.splitlines() if line and not line.isspace()]
    found = [re.fullmatch(pattern, line) for line in lines]
    if not all(found):
        wrong = lines[found.index(None)]
        raise ValueError(f'{path} has a line that does not belong there: {wrong[:100]!r}')
    return [match.groups() for match in found]


def _listed(root, folder, train, test, follow_links):
    """A data set of lists [('<class>/<file>' in a folder of `root`, box or None), ...], classes in order of names."""
    top, allowed, parts = os.path.join(root, folder), None if follow_links else root, []
    classes = sorted({name.partition('/')[0] for name, _ in train})
    numbers = {name: i for i, name in enumerate(classes)}
    if len(classes) < 2 or not test:
        raise ValueError(f'{root} lists {len(classes)} classes to train on and {len(test)} images to test')
    data.check_link(top, allowed)
    for name in classes:
        data.check_link(os.path.join(top, name), allowed)
    for listed in (train, test):
        files, boxes = [], []
        for name, box in listed:
            label, path = name.partition('/')[0], os.path.join(top, name)
            hidden = any(map(data.is_hidden, name.split('/')))
            if label not in numbers or hidden or not name.lower().endswith(data.IMAGE_SUFFIXES):
                raise ValueError(f'{root} lists {name[:200]!r}, which is no image of a class to train on')
            data.check_link(path, allowed)
            if not os.path.isfile(path):
                raise OSError(f'{path} is missing')
            files.append((path, numbers[label]))
            boxes.append(box)
        parts.append(_files(files, boxes=boxes, scaled=True))
    return Dataset(*parts, len(classes))


# ------------------------------------------------------------------------------------------------------------- crops


def resize(image, height, width):
    """Resize (H, W, 3) uint8 to (height, width, 3) as PIL's antialiased bilinear filter does.

    OpenCV has no such filter: INTER_AREA averages boxes, INTER_LINEAR skips pixels.
    """
    planes = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # a view: PyTorch's fast case is channels-last uint8
    small = F.interpolate(planes, (height, width), mode='bilinear', antialias=True)
    return small[0].permute(1, 2, 0).numpy()


def augmentation(seed, epoch, index):
    """An image's random numbers: whether it is mirrored, and ten trials of where to crop, each four of [0, 1)."""
    draws = np.random.default_rng([seed, epoch, 1, index]).random(41).tolist()
    return draws[0] < 0.5, [draws[i : i + 4] for i in range(1, 41, 4)]


def random_box(height, width, trials):
    """Where to crop an image: (top, left, height, width), of 0.08 to 1 of its area and aspect ratio 3/4 to 4/3.

    The first of `trials` that fits, as of `augmentation`, or else the centre: the "Inception" crop (Szegedy et al.
    2015) in the form of fb.resnet.torch and torchvision's RandomResizedCrop.
    """
    least, most = 3 / 4, 4 / 3
    for area, ratio, down, right in trials:
        area = height * width * (0.08 + 0.92 * area)
        ratio = least * (most / least) ** ratio
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    w, h = min(width, round(height * most)), min(height, round(width / least))
    return (height - h) // 2, (width - w) // 2, h, w


def train_crop(path, size, mirrored, trials):
    """A random box of an image file resized to (size, size, 3), mirrored or not; the draws are of `augmentation`."""
    small = resize(data.read_image(path, functools.partial(random_box, trials=trials)), size, size)
    return cv2.flip(small, 1) if mirrored else small


def test_crop(path, size, box=None):
    """The shorter side of an image file, or of a box, resized to size * 256 / 224, then the central (size, size, 3)."""
    image = _scaled(path, size, box)
    top, left = (round((side - size) / 2) for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def scaled_crop(path, size, mirrored, trials, box=None):
    """As `test_crop`, but of a random place, and mirrored or not; the draws are of `augmentation`."""
    image = _scaled(path, size, box)
    top, left = (int(at * (side - size + 1)) for at, side in zip(trials[0][2:], image.shape[:2]))
    crop = image[top : top + size, left : left + size]
    return cv2.flip(crop, 1) if mirrored else crop


def _scaled(path, size, box):
    """An image file, or a box of it, with a shorter side of size * 256 / 224."""
    image = data.read_image(path, box and functools.partial(_within, path, box))
    short, shortest = round(size * 256 / 224), min(image.shape[:2])
    if max(image.shape[:2]) > MAX_RATIO * shortest:
        raise ValueError(f'{path}: {image.shape[1]}x{image.shape[0]} pixels are too thin to be scaled')
    height, width = (short * side // shortest for side in image.shape[:2])
    return resize(image, height, width)


def _within(path, box, height, width):
    """What of a box (left, top, width, height) lies in an image of that size: (top, left, height, width), in pixels."""
    left, top = (int(at) for at in box[:2])
    bottom, right = min(height, round(box[1] + box[3])), min(width, round(box[0] + box[2]))
    if top >= bottom or left >= right:
        raise ValueError(f'{path} has {width}x{height} pixels, none of which its box {box} covers')
    return top, left, bottom - top, right - left


# ----------------------------------------------------------------------------------------------------------- batches


def read_batch(files, size, augment, indices, pixels=None):
    """Decode and crop images: (pixels (B, size, size, 3) uint8, labels [B numbers], what is wrong with bad ones).

    augment: (seed, epoch) to train, None to test. pixels: an array for the crops, with room for all indices. Bad are
    files that cannot be read; to train, the next good one takes the place of each, to test they are left out. Each bad
    file is named by its own index alone: once in an epoch.
    """
    n = len(files.paths)
    pixels = np.empty((len(indices), size, size, 3), np.uint8) if pixels is None else pixels
    taken, bad = [], []
    # All draws first: between two images, with the processor's caches full of pixels, they would cost ten times more.
    drawn = {i: augmentation(*augment, i) for i in indices} if augment else {}
    for i in indices:
        for j in itertools.chain(range(i, n), range(i)) if augment else [i]:
            path, box = files.paths[j], files.boxes[j] if files.boxes else None
            try:
                if not augment:
                    crop = test_crop(path, size, box)
                else:
                    draws = drawn.get(j) or augmentation(*augment, j)
                    crop = scaled_crop(path, size, *draws, box) if files.scaled else train_crop(path, size, *draws)
            except (OSError, ValueError) as error:
                if j == i:
                    bad.append(str(error))
                continue
            pixels[len(taken)] = crop
            taken.append(j)
            break
    return torch.from_numpy(pixels[: len(taken)]), files.labels[taken].tolist(), bad


normalize = functools.partial(data.normalize, mean=MEAN, std=STD)


def sample(files, size, count=64):
    """Images spread evenly over a part of a data set, unaugmented: (up to count, 3, size, size).

    Raises ValueError where none of them can be read.
    """
    pixels, labels, bad = read_batch(files, size, None, data.spread(len(files.paths), count))
    if not len(labels):
        raise ValueError(f'{bad[0]}; nor can {len(bad) - 1} others')
    return normalize(pixels)


def _read(files, batches, size, augment, nthread):
    """Yield `read_batch` of each batch of indices, read by `nthread` processes, by this one if there are none."""
    if not nthread:
        yield from (read_batch(files, size, augment, batch) for batch in batches)
    elif batches:
        files = files._replace(labels=files.labels.numpy())  # tensors would travel through /dev/shm
        read = functools.partial(read_batch, files, size, augment)
        yield from readers.read_ahead(read, batches, (max(map(len, batches)), size, size, 3), nthread)


def _on_device(pixels, labels, device):
    """Pixels and labels as images (B, 3, H, W) and labels (B,) on the device, in memory of their own."""
    labels = torch.tensor(labels)
    if device.type == 'cuda':
        pixels, labels = pixels.pin_memory(), labels.pin_memory()
    return normalize(pixels.to(device, non_blocking=True)), labels.to(device, non_blocking=True)


@functools.cache
def _warn_once(message):
    tqdm.write(f'warning: {message}', file=sys.stderr)


class TrainBatches:
    """One epoch of augmented batches: (images (B, 3, H, W), labels (B,), size of the global batch).

    files: the training part of what `load` returns. `start` batches are passed over, and a last one of fewer than
    `least` images, over all workers, is left out. `bad` counts the images of this
    worker's share that could not be read; the next good one takes the place of each. Raises ValueError where no image
    at all can be read.
    """

    def __init__(self, files, batch_size, image_size, seed, rank, world, nthread, device, epoch, start=0, least=1):
        batches = data.global_batches(len(files.paths), batch_size, seed, epoch, max(world, least))[start:]
        self.sizes = [len(b) for b in batches]
        self.read = files, [data.share(b, rank, world) for b in batches], image_size, (seed, epoch), nthread
        self.device, self.bad = device, 0

    def __len__(self):
        return len(self.sizes)

    def __iter__(self):
        self.bad = 0
        for (pixels, labels, bad), size in zip(_read(*self.read), self.sizes):
            self.bad += len(bad)
            if not len(labels):
                raise ValueError(f'{bad[0]}; nor can any other training image be read')
            for reason in bad:
                _warn_once(f'{reason}; another takes its place in training')
            yield *_on_device(pixels, labels, self.device), size


class TestBatches:
    """Every image once, in order, its centre alone: (images (B, 3, H, W), labels (B,), B).

    Raises ValueError naming an image that cannot be read, unless `skip_bad_images` leaves it out; `bad` counts them.
    """

    def __init__(self, files, batch_size, image_size, rank, world, nthread, device, skip_bad_images=False):
        share = data.share(np.arange(len(files.paths)), rank, world)
        batches = [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
        self.read = files, batches, image_size, None, nthread
        self.device, self.skip_bad_images, self.bad = device, skip_bad_images, 0

    def __len__(self):
        return len(self.read[1])

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
