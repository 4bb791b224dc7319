"""What a saved network says of image files: their most probable classes."""

import os

import numpy as np
import torch

from engine.log import read_log
from formats.networks import build, checkpoint_of, load_params
from formats.read import read
from formats.torchvision import categories
from imagenet_resnet import imagenet_forward
from images import memory, photographs
from images.crops import test_crop
from images.decode import read_image

MAX_NAME = 200  # characters of a class name, which may come from a hostile file


def open_network(run):
    """The network of a run or file: (f, params, names of its classes, usual size of its images in pixels).

    Names and size are those of its checkpoint, else those of the log beside it, else numbers from 0 and the size of the
    paper's experiments. Raises what `formats.networks.load_teacher` raises.
    """
    path = checkpoint_of(run)
    f, params = build(load_params(path), path)
    facts = _facts(path)
    classes, size = facts.get('classes'), facts.get('image_size')
    if classes is None and facts.get('dataset') == 'CIFAR10':  # of older runs
        classes = memory.CIFAR10_CLASSES
    number = len(params['fc.bias'])
    if not (isinstance(classes, list | tuple) and len(classes) == number and all(type(c) is str for c in classes)):
        classes = map(str, range(number))
    usual = 224 if f is imagenet_forward else 32
    return f, params, [name[:MAX_NAME] for name in classes], size if type(size) is int and 8 <= size <= 1024 else usual


def _facts(path):
    """What a checkpoint or the log beside it says of its data: a dictionary, maybe with `classes` and `image_size`."""
    if path.startswith('torchvision:'):
        return {'classes': categories(path.removeprefix('torchvision:'))}
    state = read(path)
    if isinstance(state, dict) and 'classes' in state:
        return state
    log = os.path.join(os.path.dirname(path), 'log.txt')
    records = read_log(log) if os.path.basename(path) == 'model.pt7' and os.path.isfile(log) else []
    return records[-1] if records else {}


def read_pixels(path, size, imagenet):
    """An image file as a network sees it in a test: (size, size, 3) uint8.

    Its centre for an ImageNet network, the whole image stretched to a square for another. Raises OSError or ValueError
    if it cannot be read.
    """
    return test_crop(path, size) if imagenet else memory.square(read_image(path), size)


def normalized(pixels, imagenet):
    """Pixels (N, H, W, 3) uint8 as the images (N, 3, H, W) that a network takes."""
    return (photographs if imagenet else memory).normalize(pixels)


def predict(f, params, path, size, top):
    """The `top` most probable classes of an image file: [(number of the class, probability), ...].

    Raises OSError or ValueError if it cannot be read, and ValueError for an output that is not finite.
    """
    imagenet = f is imagenet_forward
    pixels = torch.from_numpy(np.ascontiguousarray(read_pixels(path, size, imagenet)))[None]
    with torch.no_grad():
        probabilities = f(normalized(pixels, imagenet), params, False)[0].softmax(1)[0]
    if not probabilities.isfinite().all():
        raise ValueError(f'{path}: the output of the network is not finite')
    best = probabilities.topk(min(top, len(probabilities)))
    return list(zip(best.indices.tolist(), best.values.tolist()))
