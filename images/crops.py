"""Crops of photographs for training and testing."""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

from images.decode import cv2, read_image  # its cv2 refuses images with too many pixels

MAX_RATIO = 100  # of an image's sides: a thinner one, scaled by its shorter side, would fill the memory


def resize(image, height, width):
    """Resize (H, W, 3) uint8 to (height, width, 3) as PIL's antialiased bilinear filter does.

    OpenCV has no such filter: INTER_AREA averages boxes, INTER_LINEAR skips pixels.
    """
    planes = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # a view: PyTorch's fast case is channels-last uint8
    small = F.interpolate(planes, (height, width), mode='bilinear', antialias=True)
    return small[0].permute(1, 2, 0).numpy()


def augmentation(seed, epoch, index):
    """An image's random numbers: whether it is mirrored, and ten trial crops of four numbers in [0, 1) each."""
    draws = np.random.default_rng([seed, epoch, 1, index]).random(41).tolist()
    return draws[0] < 0.5, [draws[i : i + 4] for i in range(1, 41, 4)]


def random_box(height, width, trials):
    """Where to crop an image: (top, left, height, width), with 0.08 to 1 of its area and aspect ratio 3/4 to 4/3.

    The first of `trials` (from `augmentation`) that fits, or else the centre: the "Inception" crop (Szegedy et al.
    2015) as in fb.resnet.torch and torchvision's RandomResizedCrop.
    """
    min_ratio, max_ratio = 3 / 4, 4 / 3
    for area, ratio, down, right in trials:
        area = height * width * (0.08 + 0.92 * area)
        ratio = min_ratio * (max_ratio / min_ratio) ** ratio
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    w, h = min(width, round(height * max_ratio)), min(height, round(width / min_ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def train_crop(path, size, mirrored, trials):
    """A random box of an image file resized to (size, size, 3); `mirrored` and `trials` are from `augmentation`."""
    small = resize(read_image(path, functools.partial(random_box, trials=trials)), size, size)
    return cv2.flip(small, 1) if mirrored else small


def test_crop(path, size, box=None):
    """The central (size, size, 3) of an image file, or of a box, whose shorter side is resized to size * 256 / 224."""
    image = _scaled(path, size, box)
    top, left = (round((side - size) / 2) for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def scaled_crop(path, size, mirrored, trials, box=None):
    """As `test_crop`, but at a random place; `mirrored` and `trials` are from `augmentation`."""
    image = _scaled(path, size, box)
    top, left = (int(at * (side - size + 1)) for at, side in zip(trials[0][2:], image.shape[:2]))
    crop = image[top : top + size, left : left + size]
    return cv2.flip(crop, 1) if mirrored else crop


def _scaled(path, size, box):
    """An image file, or a box of it, resized to a shorter side of size * 256 / 224."""
    image = read_image(path, box and functools.partial(_within, path, box))
    short, shortest = round(size * 256 / 224), min(image.shape[:2])
    if max(image.shape[:2]) > MAX_RATIO * shortest:
        raise ValueError(f'{path}: an image of {image.shape[1]}x{image.shape[0]} pixels is too thin to be scaled')
    height, width = (short * side // shortest for side in image.shape[:2])
    return resize(image, height, width)


def _within(path, box, height, width):
    """The part of a box (left, top, width, height) inside an image of that size: (top, left, height, width), pixels."""
    left, top = (int(at) for at in box[:2])
    bottom, right = min(height, round(box[1] + box[3])), min(width, round(box[0] + box[2]))
    if top >= bottom or left >= right:
        raise ValueError(f'{path} has {width}x{height} pixels, none of which its box {box} covers')
    return top, left, bottom - top, right - left
