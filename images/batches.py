"""Which images make up a batch, and how each is augmented: arithmetic on indices and pixels.

Order and augmentation are a pure function of (seed, epoch, sample index): they depend neither on the number of
workers nor on where a run was resumed.
"""

import functools
from collections import Counter

import numpy as np
import torch


def order(n, seed, epoch):
    """The order of n samples in an epoch: a permutation, (n,) int64."""
    return np.random.default_rng([seed, epoch, 0]).permutation(n)


def global_batches(n, batch_size, seed, epoch, least):
    """The batches of an epoch, of all workers together: [indices (B,), ...] of n shuffled samples.

    A last batch of fewer than `least` is dropped: every worker needs an image, and batch norm more than one value.
    Raises ValueError if no batch is left.
    """
    shuffled = order(n, seed, epoch)
    batches = [shuffled[i : i + batch_size] for i in range(0, n, batch_size)]
    batches = [b for b in batches if len(b) >= least]
    if not batches:
        raise ValueError(f'{n} training images in batches of {batch_size}: a batch needs at least {least} here')
    return batches


def augmentation(n, pad, flip, seed, epoch):
    """Where to crop each of n samples and whether to mirror it: an int64 array (n, 3) of row, column, mirrored.

    Rows and columns are 0 to 2 * pad. Entry i depends only on seed, epoch and i.
    """
    draws = np.random.default_rng([seed, epoch, 1]).integers(0, 2**32, size=(n, 3))
    return (draws * np.array([2 * pad + 1, 2 * pad + 1, 2 if flip else 1])) >> 32


def crop(pixels, index, where, pad):
    """Reflect-pad (edge not repeated), crop back to size and mirror, all in one indexing operation.

    pixels (N, H, W, 3), index (B,), where (B, 3) from `augmentation` -> (B, H, W, 3) of the same dtype.
    """
    height, width = pixels.shape[1:3]

    def reflected(start, size):  # (B,) -> (B, size)
        at = start[:, None] + torch.arange(size, device=start.device) - pad
        return (size - 1) - ((size - 1) - at.abs()).abs()

    rows, columns = reflected(where[:, 0], height), reflected(where[:, 1], width)
    columns = torch.where(where[:, 2:] > 0, columns.flip(1), columns)
    return pixels[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def share(indices, rank, world):
    """The part of a global batch of indices that worker `rank` of `world` takes."""
    return indices[rank::world]


def spread(n, count):
    """Up to `count` evenly spaced indices from 0 to n - 1, as an array."""
    return np.linspace(0, n - 1, min(n, count)).astype(int)


def hold_out(labels, count):
    """Split training images into those to train on and `count` to test on: two sorted lists of indices.

    About the same fraction of each class is held out, evenly spaced in its order; at least one image of each class is
    kept, and at least one held out of each class of two or more. The split depends only on labels (N,). Raises
    ValueError for too few images.
    """
    sizes = np.bincount(labels)
    limit = len(labels) - len(sizes)
    if count > limit:
        raise ValueError(
            f'--holdout {count}: at most {limit} of the {len(labels)} training images, or a class would keep none'
        )
    if count < len(sizes):
        raise ValueError(f'--holdout {count}: at least {len(sizes)}, one image of each class')
    # The next image is taken from the class with the smallest fraction held out, and from the first of equal ones.
    parts = [(taken / size, label) for label, size in enumerate(sizes.tolist()) for taken in range(size - 1)]
    counts = Counter(label for _, label in sorted(parts)[:count])
    of_class = [np.flatnonzero(np.asarray(labels) == label) for label in range(len(sizes))]
    held = np.concatenate([indices[spread(len(indices), counts[i])] for i, indices in enumerate(of_class)])
    return np.setdiff1d(np.arange(len(labels)), held).tolist(), np.sort(held).tolist()


def normalize(pixels, mean, std):
    """Normalise (B, H, W, 3) uint8 to float32 (B, 3, H, W) in channels-last memory format; mean and std are (3,)."""
    mean, std = (_rows(v, pixels.shape[2], pixels.device) for v in (mean, std))
    rows = pixels.flatten(2).float()  # (B, H, W * 3): rows of three numbers would be five times slower on a CPU
    return rows.sub_(mean).div_(std).view(pixels.shape).permute(0, 3, 1, 2)


@functools.cache  # otherwise each batch makes the host wait for the device
def _rows(channels, width, device):
    return torch.tensor(channels, device=device).repeat(width)  # (3,) -> (W * 3,)
