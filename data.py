"""Image data sets held in memory as uint8, and batches of them augmented on the compute device.

Order and augmentation are a pure function of (seed, epoch, sample index): they depend neither on the number of
workers nor on where a run was resumed.
"""

import functools
import os
import stat
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import NamedTuple
from urllib.error import URLError

os.environ.setdefault('OPENCV_IO_MAX_IMAGE_PIXELS', str(2**27))  # memory for what a header of some bytes declares

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402

cv2.setNumThreads(0)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # files that cannot be read are named here

MEAN = (125.3, 123.0, 113.9)  # of CIFAR-10's training images, red, green, blue; used for every data set here
STD = (63.0, 62.1, 66.7)
BINARY_FOLDER = 'cifar-10-batches-bin'
BINARY_RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the red, green and blue planes
BINARY_RECORDS = 10_000  # in each official file
MAX_BYTES = 2**28  # of an image file
IMAGE_SUFFIXES = tuple('.png .jpg .jpeg .jfif .bmp .gif .webp .tif .tiff .ppm .pgm'.split())
# What systems leave in folders, besides names that begin with a dot.
SYSTEM_NAMES = {*'__macosx @eadir thumbs.db desktop.ini lost+found $recycle.bin'.split(), 'system volume information'}
TIFF_ALPHA, TIFF_BITS, TIFF_PLANES = 338, 258, 284  # tags: ExtraSamples, BitsPerSample, PlanarConfiguration
PREMULTIPLIED, PLAIN_ALPHA, SEPARATE = 1, 2, 2  # values of the first and of the last
MAX_TAGS = 2**16
MAX_GIF_HEADER = 2**20  # bytes


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
    num_classes: int
    flip: bool  # whether a mirrored image is still of its class


# ------------------------------------------------------------------------------------------------------ data sets


def load(dataset, root='.', image_size=32, holdout=0, nthread=4, note=print, follow_links=False):
    """Load a data set: 'CIFAR10', 'CIFAR100', 'folder' or 'digits'.

    With `holdout`, that many training images take the place of the test set: the last, or of a folder, where they stand
    class by class, those of `hold_out`. `note` is told what the reader should know; `follow_links` is as of
    `find_images`. Raises ValueError or OSError, with a message for the user, where data is missing or damaged.
    """
    if dataset == 'digits':
        loaded = _digits(image_size)
    elif dataset == 'folder':
        loaded = _folder(root, image_size, nthread, follow_links, note)
    elif dataset == 'CIFAR10' and os.path.isdir(os.path.join(root, BINARY_FOLDER)):
        loaded = _cifar10_binary(os.path.join(root, BINARY_FOLDER), note)
    elif dataset in ('CIFAR10', 'CIFAR100'):
        loaded = _cifar(dataset, root, note)
    else:
        raise ValueError(f'--dataset {dataset}: expected CIFAR10, CIFAR100, folder or digits')
    if image_size != 32 and dataset.startswith('CIFAR'):
        raise ValueError(f'--image_size {image_size}: {dataset} has images of 32x32')
    if not holdout:
        return loaded
    kept = len(loaded.train.labels) - holdout
    if dataset == 'folder':
        parts = hold_out(loaded.train.labels, holdout)
    elif kept < 1:
        raise ValueError(f'--holdout {holdout}: {dataset} has only {kept + holdout} training images')
    else:
        parts = slice(kept), slice(kept, None)
    train, test = (Images(*(t[part] for t in loaded.train)) for part in parts)
    return loaded._replace(train=train, test=test)


def hold_out(labels, count):
    """Divide training images into those to train on and `count` to test on: two sorted lists of indices.

    Each class gives at least one and about the same part of its images, evenly spread over their order, and keeps at
    least one. The choice depends on the labels (N,) alone. Raises ValueError where there are too few images.
    """
    sizes = np.bincount(labels)
    most = len(labels) - len(sizes)
    if count > most:
        raise ValueError(
            f'--holdout {count}: at most {most} of the {len(labels)} training images, or a class would keep none'
        )
    if count < len(sizes):
        raise ValueError(f'--holdout {count}: at least {len(sizes)}, an image of each class')
    # The next image comes from the class of which the least part is held out, at first from one after the other.
    parts = [(taken / size, label) for label, size in enumerate(sizes.tolist()) for taken in range(size - 1)]
    counts = Counter(label for _, label in sorted(parts)[:count])
    of_class = [np.flatnonzero(np.asarray(labels) == label) for label in range(len(sizes))]
    held = np.concatenate([indices[spread(len(indices), counts[i])] for i, indices in enumerate(of_class)])
    return np.setdiff1d(np.arange(len(labels)), held).tolist(), np.sort(held).tolist()


def _images(pixels, labels):
    return Images(torch.from_numpy(np.ascontiguousarray(pixels)), torch.as_tensor(np.asarray(labels), dtype=torch.long))


def _cifar(dataset, root, note):
    source = getattr(torchvision.datasets, dataset)
    if not os.path.isdir(os.path.join(root, source.base_folder)):
        size = {'CIFAR10': 163, 'CIFAR100': 161}[dataset]
        note(f'{dataset} is not in {root}: downloading {size} MiB from {source.url}')
    missing = not os.path.exists(root)
    try:
        parts = [source(root, train=train, download=True) for train in (True, False)]
    except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
        if missing and os.path.isdir(root) and not os.listdir(root):
            os.rmdir(root)
        raise OSError(
            f'{dataset} is not in {root} and {source.url} cannot be reached ({getattr(error, "reason", error)}): '
            f'put {source.base_folder} there by hand, or name its folder with --dataroot'
        ) from None
    except (RuntimeError, EOFError) as error:
        raise ValueError(f'{dataset} in {root} is damaged ({error}): delete {source.base_folder} there') from None
    return Dataset(*(_images(part.data, part.targets) for part in parts), len(parts[0].classes), flip=True)


def _cifar10_binary(folder, note):
    def read(name, fewer_allowed):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise OSError(f'{path} is missing: the binary CIFAR-10 has data_batch_1..5.bin and test_batch.bin')
        size = os.path.getsize(path)
        records, rest = divmod(size, BINARY_RECORD)
        if rest or not 0 < records <= BINARY_RECORDS or records < BINARY_RECORDS and not fewer_allowed:
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
    return Dataset(_images(planes[0], train[:, 0]), _images(planes[1], test[:, 0]), 10, flip=True)


def _digits(image_size):
    """scikit-learn's 1,797 handwritten digits of 8x8, enlarged: the first 1,000 to train on, the others to test."""
    from sklearn.datasets import load_digits  # a second to import: only where it is asked for

    pixels, labels = load_digits(return_X_y=True)
    small = (pixels.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    grey = [cv2.resize(d, (image_size, image_size), interpolation=cv2.INTER_LINEAR) for d in small]
    pixels = np.repeat(np.stack(grey)[..., None], 3, axis=3)
    return Dataset(_images(pixels[:1000], labels[:1000]), _images(pixels[1000:], labels[1000:]), 10, flip=False)


def _folder(root, image_size, nthread, follow_links, note):
    if not os.path.isdir(root):
        raise OSError(f'--dataroot {root}: no such folder')
    num_classes, *found = find_parts(root, ('train', 'test'), follow_links, note)
    parts = []
    for files in found:
        with ThreadPoolExecutor(max(1, nthread)) as pool:
            pixels = list(pool.map(lambda file: _square(read_image(file[0]), image_size), files))
        parts.append(_images(np.stack(pixels), [label for _, label in files]))
    return Dataset(*parts, num_classes, flip=True)


def find_parts(root, parts, follow_links=False, note=print):
    """The number of classes, and the images of each of two parts, as of `find_images`, whose classes are the same.

    Raises what that raises, and ValueError where there are other classes in one part than in the other.
    """
    (classes, found), (others, found_too) = (find_images(root, part, follow_links, note) for part in parts)
    odd = sorted(set(classes) ^ set(others))
    alike = {}
    for name in odd:
        alike.setdefault(unicodedata.normalize('NFC', name).casefold(), []).append(name)
    pair = next((pair for pair in alike.values() if len(pair) == 2 and len(set(pair) & set(classes)) == 1), None)
    if pair:
        a, b = sorted(pair, key=lambda name: name in others)
        same = len({unicodedata.normalize('NFC', name) for name in pair}) == 1
        raise ValueError(
            f'{root}: the class {a} ({ascii(a)}) of {parts[0]} and {b} ({ascii(b)}) of {parts[1]} differ only '
            f'in {"the Unicode form of their letters (NFC or NFD)" if same else "case"}: rename one of them'
        )
    if odd:
        more = f' and {len(odd) - 5} more' if len(odd) > 5 else ''
        names = ' and '.join(parts)
        raise ValueError(f'{root}: {names} have different classes; in one only: {", ".join(odd[:5])}{more}')
    return len(classes), found, found_too


def is_hidden(name):
    """Whether a file or folder is one of the system's, or hidden from the user by a dot before its name."""
    return name.startswith('.') or name.lower() in SYSTEM_NAMES


def find_images(root, part, follow_links=False, note=print):
    """The files root/part/<class>/...: (names of the classes, [(path, number of the class), ...]), in order of names.

    What is hidden is no class and no image. `note` is told how many other files are passed over. Raises OSError and
    ValueError, with a message for the user, where there are no images, and ValueError for a link that leads out of
    `root`, unless `follow_links` allows it. No link to a folder inside a class is followed: it may loop.
    """
    folder = os.path.join(root, part)
    if not os.path.isdir(folder):
        raise OSError(f'{root} has no folder {part!r}: expected {part}/<class>/*')
    entries = [entry for entry in os.scandir(folder) if not is_hidden(entry.name)]
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise ValueError(f'{folder} has no folders of classes: expected {part}/<class>/*')
    tops, allowed = [os.path.join(folder, name) for name in classes], None if follow_links else root
    for path in (folder, *tops):
        check_link(path, allowed)
    below = [(path, label) for label, top in enumerate(tops) for path in files_below(top, allowed)]
    files = [file for file in below if file[0].lower().endswith(IMAGE_SUFFIXES)]
    expected = f'{part}/<class>/* of {" ".join(IMAGE_SUFFIXES)}'
    others = [path for path, _ in below if not path.lower().endswith(IMAGE_SUFFIXES)]
    others += sorted(entry.path for entry in entries if not entry.is_dir())
    if others:
        many = f'{len(others):,} files in {folder} are' if len(others) > 1 else f'a file in {folder} is'
        note(f'note: {many} passed over, like {others[0]}: expected {expected}')
    if not files:
        raise ValueError(f'{folder} holds no images: expected {expected}')
    if len(classes) < 2:
        raise ValueError(f'{folder} has only one class, {classes[0]!r}: nothing to learn')
    empty = set(range(len(classes))) - {label for _, label in files}
    if empty:
        raise ValueError(f'{tops[min(empty)]} holds no images')
    return classes, files


def files_below(folder, allowed):
    """Yield the paths of all files below a folder, but for hidden ones, in order of names; `find_images` says what of.

    Raises ValueError for a link that leads out of the folder `allowed`, if one is given, or to a folder.
    """
    left = [folder]
    while left:
        entries = sorted((e for e in os.scandir(left.pop()) if not is_hidden(e.name)), key=lambda entry: entry.name)
        for entry in entries:
            if entry.is_symlink():  # known from the listing: no look at each of a million files
                check_link(entry.path, allowed)
                if entry.is_dir():
                    raise ValueError(f'{entry.path} is a link to a folder inside a class: it is not followed')
        folders = {entry.path for entry in entries if entry.is_dir()}
        left += sorted(folders, reverse=True)
        yield from (entry.path for entry in entries if entry.path not in folders)


def check_link(path, allowed):
    """Refuse a link that leads out of the folder `allowed`; None allows all."""
    if allowed is not None and os.path.islink(path):
        tree = os.path.realpath(allowed)
        if os.path.commonpath([tree, os.path.realpath(path)]) != tree:
            raise ValueError(f'{path} is a link that leads out of {allowed}: --follow_links reads what is there')


def _square(image, size):
    shrinking = min(image.shape[:2]) > size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)


def read_image(path, box=None):
    """Decode an image file to (H, W, 3) uint8, red, green, blue, unrotated as PIL gives it.

    With box, a function (height, width) -> (top, left, height, width), that part alone; the rows of a JPEG below it are
    not decoded. Raises ValueError naming the file when it is unreadable or cut short (which OpenCV alone would pass
    over).
    """
    with open(path, 'rb', buffering=0, opener=_open_at_once) as file:  # a buffer would only be one more copy
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
            raise ValueError(f'{path} is no file of at most {MAX_BYTES:,} bytes: it is not read')
        content = file.read()
    whole, frame = _scan_jpeg(content) if content.startswith(b'\xff\xd8') else (bool(content), None)
    image = None
    if whole and box and frame:
        image = _decode_box(content, frame, box)
        if image is not None:
            return image
    if whole:
        image = _decode_opaque(content)
    if image is None:
        raise ValueError(f'{path} is not a readable image{"" if whole else ": it is empty or cut short"}')
    return _part(image, box(*image.shape[:2])) if box else image


def _open_at_once(path, flags):
    return os.open(path, flags | os.O_NONBLOCK)  # or a named pipe would wait for a writer


def _decode(content, flags=cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION):
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:  # more pixels than OpenCV's limit, for one
        return None


def _decode_opaque(content):
    """Decode to the plain colours whatever the alpha, as PIL's convert('RGB') gives them.

    OpenCV does so by itself but for GIF and TIFF, which it darkens: their headers are changed to some without alpha.
    """
    if content.startswith((b'GIF87a', b'GIF89a')):
        return _decode(_opaque_gif(content))
    if not content.startswith((b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')):
        return _decode(content)
    (alpha, where), (bits, _) = (_tiff_tag(content, tag) for tag in (TIFF_ALPHA, TIFF_BITS))
    if alpha == PREMULTIPLIED and bits in (8, 16):
        image = _decode(content, cv2.IMREAD_UNCHANGED)
        if image is not None and image.ndim == 3 and image.shape[2] == 4:  # OpenCV drops the alpha of grey
            if bits == 16 and _tiff_tag(content, TIFF_PLANES)[0] == SEPARATE:
                return None  # OpenCV mixes such planes up
            return _unmultiplied(image >> 8 if image.dtype == np.uint16 else image)
    return _decode(content[:where] + b'\0\0' + content[where + 2 :] if alpha == PLAIN_ALPHA else content)


def _opaque_gif(content):
    """A GIF of whose first picture no colour is transparent; extensions of more than a MiB are not looked through."""
    at = 13 + (3 << (content[10] & 7) + 1 if content[10:11] >= b'\x80' else 0)  # behind the header and its palette
    while content[at : at + 1] == b'!' and at < MAX_GIF_HEADER:
        if content[at + 1 : at + 3] == b'\xf9\x04':  # the first bit of what follows says that there is such a colour
            flags = int.from_bytes(content[at + 3 : at + 4])
            return content[: at + 3] + bytes([flags & ~1]) + content[at + 4 :]
        at += 2
        while content[at : at + 1] > b'\0' and at < MAX_GIF_HEADER:
            at += 1 + content[at]
        at += 1
    return content


def _tiff_tag(content, tag):
    """The first number of a tag, if it is of 16 bits, in the first directory of a TIFF, and its position; or (0, 0)."""
    order = 'little' if content.startswith(b'II') else 'big'

    def number(at, size):
        return int.from_bytes(content[at : at + size], order)

    size, entry = (8, 20) if number(2, 2) == 43 else (4, 12)  # of an offset, and of an entry; 43: BigTIFF
    directory = number(size, size)
    first = directory + (8 if size == 8 else 2)
    count = min(number(directory, first - directory), MAX_TAGS)
    at = next((at for at in range(first, first + entry * count, entry) if number(at, 2) == tag), None)
    if at is None or number(at + 2, 2) != 3:  # another type than 16 bits
        return 0, 0
    where = at + 4 + size  # of the value, or of what tells where more than fits is
    where = where if 2 * number(at + 4, size) <= size else number(where, size)
    return number(where, 2), where


def _unmultiplied(image):
    """The colours (H, W, 3), red, green, blue, of an image (H, W, 4), blue first, that was multiplied by its alpha."""
    alpha, colours = image[..., 3:], image[..., 2::-1].astype(np.uint16)
    colours *= np.where(alpha, 255, 0).astype(np.uint16)
    colours //= np.maximum(alpha, 1)
    return np.minimum(colours, 255, out=colours).astype(np.uint8)


def _part(image, box):
    top, left, height, width = box
    return image[top : top + height, left : left + width]


def _scan_jpeg(content):
    """Whether a JPEG has its end marker behind its first scan (one inside a thumbnail does not count), and its frame.

    The frame is where the header of a baseline image without restart markers is, None for the other kinds of JPEG.
    """
    at, segments = 2, {}
    while content[at : at + 1] == b'\xff' and at + 4 <= len(content):
        marker = content[at + 1]
        if marker == 0xDA:  # start of scan: from here on, FF D9 is the end of the image
            frame = None if 0xDD in segments else segments.get(0xC0)
            return content.rfind(b'\xff\xd9', at) >= 0, frame  # backwards: it should be the last two bytes
        segments[marker] = at
        at += 1 if marker == 0xFF else 2 + int.from_bytes(content[at + 2 : at + 4], 'big')  # FF FF: a fill byte
    return False, None


def _decode_box(content, frame, box):
    """A box of a baseline JPEG, decoding the rows down to its end; None where that is not possible or does not pay.

    The decoder is shown a header with fewer rows, and no end marker, for which it would search and complain.
    """
    # frame: FF C0, length (2 bytes), precision, height (2), width (2), components, 3 bytes for each component
    height, width = (int.from_bytes(content[frame + i : frame + i + 2], 'big') for i in (5, 7))
    components = int.from_bytes(content[frame + 9 : frame + 10], 'big')
    sampling = content[frame + 11 : frame + 10 + 3 * components : 3]
    unit = 8 * max((s & 15 for s in sampling), default=0)  # rows that are coded together
    if not (unit and height and width):
        return None
    top, left, box_height, box_width = box(height, width)
    rows = top + box_height + unit  # one unit more, since colour is interpolated from the rows around
    if rows > height - 2 * unit:
        return None
    shorter = content[: frame + 5] + rows.to_bytes(2, 'big') + content[frame + 7 : content.rfind(b'\xff\xd9')]
    image = _decode(shorter)
    if image is None or image.shape[:2] != (rows, width):
        return None
    return _part(image, (top, left, box_height, box_width))


# -------------------------------------------------------------------------------------------------------- batches


def order(n, seed, epoch):
    """The order of n samples in an epoch: a permutation, (n,) int64."""
    return np.random.default_rng([seed, epoch, 0]).permutation(n)


def global_batches(n, batch_size, seed, epoch, least):
    """The batches of an epoch for all workers together: [indices (B,), ...] of n samples in their order.

    A last batch of fewer than `least` is left out: every worker needs an image, and batch norm more than one value.
    Raises ValueError where no batch is left.
    """
    shuffled = order(n, seed, epoch)
    batches = [shuffled[i : i + batch_size] for i in range(0, n, batch_size)]
    batches = [b for b in batches if len(b) >= least]
    if not batches:
        raise ValueError(f'{n} training images in batches of {batch_size}: a batch needs at least {least} here')
    return batches


def augmentation(n, pad, flip, seed, epoch):
    """Where to crop each of n samples and whether to mirror it: an int64 array (n, 3) of row, column, mirrored.

    Rows and columns are 0 to 2 * pad. Line i depends on seed, epoch and i alone.
    """
    draws = np.random.default_rng([seed, epoch, 1]).integers(0, 2**32, size=(n, 3))
    return (draws * np.array([2 * pad + 1, 2 * pad + 1, 2 if flip else 1])) >> 32


def crop(pixels, index, where, pad):
    """Reflect-pad (edge not repeated), crop back to size and mirror, all in one indexing operation.

    pixels (N, H, W, 3), index (B,), where (B, 3) as of `augmentation` -> (B, H, W, 3) of the same dtype.
    """
    height, width = pixels.shape[1:3]

    def reflected(start, size):  # (B,) -> (B, size)
        at = start[:, None] + torch.arange(size, device=start.device) - pad
        return (size - 1) - ((size - 1) - at.abs()).abs()

    rows, columns = reflected(where[:, 0], height), reflected(where[:, 1], width)
    columns = torch.where(where[:, 2:] > 0, columns.flip(1), columns)
    return pixels[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def sample(images, count=512):
    """Images spread evenly over a part of a data set, unaugmented: (up to count, 3, H, W)."""
    return normalize(images.pixels[spread(len(images.labels), count)])


def spread(n, count):
    """Up to `count` of the indices 0 to n - 1, evenly spread, as an array."""
    return np.linspace(0, n - 1, min(n, count)).astype(int)


def normalize(pixels, mean=MEAN, std=STD):
    """Normalise (B, H, W, 3) uint8 to float32 (B, 3, H, W) in channels-last memory format."""
    mean, std = (_rows(v, pixels.shape[2], pixels.device) for v in (mean, std))
    rows = pixels.flatten(2).float()  # (B, H, W * 3): rows of three numbers would be five times slower on a CPU
    return rows.sub_(mean).div_(std).view(pixels.shape).permute(0, 3, 1, 2)


@functools.cache  # or each batch would make the host wait for the device
def _rows(channels, width, device):
    return torch.tensor(channels, device=device).repeat(width)  # (3,) -> (W * 3,)


def share(indices, rank, world):
    """What one of `world` workers takes of a global batch of indices."""
    return indices[rank::world]


class TrainBatches:
    """One epoch of augmented batches: (images (B, 3, H, W), labels (B,), size of the global batch).

    `start` is the number of batches of the epoch to pass over.
    """

    def __init__(self, images, batch_size, pad, flip, seed, rank, world, epoch, start=0):
        n, device = len(images.labels), images.labels.device
        batches = global_batches(n, batch_size, seed, epoch, least=world)[start:]
        self.sizes = [len(b) for b in batches]
        self.batches = [torch.from_numpy(share(b, rank, world)).to(device) for b in batches]
        self.where = torch.from_numpy(augmentation(n, pad, flip, seed, epoch)).to(device)
        self.images, self.pad = images, pad

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for index, size in zip(self.batches, self.sizes):
            pixels = crop(self.images.pixels, index, self.where[index], self.pad)
            yield normalize(pixels), self.images.labels[index], size


class TestBatches:
    """Every image once, in order, unaugmented: (images (B, 3, H, W), labels (B,), B)."""

    def __init__(self, images, batch_size, rank=0, world=1):
        index = torch.arange(len(images.labels), device=images.labels.device)
        self.batches = share(index, rank, world).split(batch_size)
        self.images = images

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for index in self.batches:
            yield normalize(self.images.pixels[index]), self.images.labels[index], len(index)
