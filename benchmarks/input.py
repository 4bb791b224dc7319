"""How fast one core makes training images from JPEGs, and how close they are to PIL's.

    python benchmarks/input.py
    python benchmarks/input.py --imagenetpath ~/ILSVRC2012

Ours (OpenCV decodes, PyTorch resizes, a batch of uint8) and torchvision's usual pipeline on PIL (RandomResizedCrop,
RandomHorizontalFlip, ToTensor, Normalize) read the same files in turns, each on one thread, timed in CPU seconds,
which other work on the machine disturbs little. Without --imagenetpath the files are 500x375 photograph-like noise of
ImageNet's usual file size, about 110 KB.
"""

import os
import platform
import sys
import tempfile
import time
from functools import partial

import cv2
import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import default_collate
from torchvision import transforms

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))

from engine import ending
from engine.arguments import Parser, number, path
from images import crops, photographs
from images.batches import order

BATCH = 50


def photograph(rng, height=375, width=500):
    """Noise with the 1/f amplitude spectrum of photographs (Field 1987), mostly grey: (H, W, 3) uint8."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    waves = rng.standard_normal((3, *frequency.shape, 2)) @ [1, 1j] / np.maximum(frequency, 1 / width)
    noise = np.fft.irfft2(waves, (height, width)).transpose(1, 2, 0)  # (H, W, 3)
    noise = noise / noise.std() @ (np.full((3, 3), 0.55) + 0.2 * np.eye(3))
    return np.clip(120 + 60 * noise, 0, 255).astype(np.uint8)


def write_photographs(root, count=200):
    """Write an ImageFolder of two classes with `count` training images; returns root."""
    rng = np.random.default_rng(0)
    for part, n in (('train', count), ('val', 2)):
        for i in range(n):
            folder = os.path.join(root, part, f'class{i % 2}')
            os.makedirs(folder, exist_ok=True)
            cv2.imwrite(os.path.join(folder, f'{i}.jpg'), photograph(rng), [cv2.IMWRITE_JPEG_QUALITY, 88])
    return root


def torchvision_pipeline(files, image_size):
    """The plain pipeline as a function of indices: normalised float32 (B, 3, H, W)."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    load = torchvision.datasets.folder.pil_loader
    return lambda indices: default_collate([transform(load(files.paths[i])) for i in indices])


def pixel_differences(files, image_size, indices):
    """Mean absolute difference from PIL's resize of the same random box, in levels of 255, one per image."""
    differences = []
    for i in indices:
        _, trials = crops.augmentation(0, 1, i)
        ours = crops.train_crop(files.paths[i], image_size, False, trials)
        with Image.open(files.paths[i]) as file:
            top, left, height, width = crops.random_box(file.height, file.width, trials)
            crop = file.convert('RGB').crop((left, top, left + width, top + height))
        theirs = np.asarray(crop.resize((image_size, image_size), Image.BILINEAR))
        differences.append(np.abs(ours.astype(int) - theirs).mean())
    return differences


def speeds(pipelines, batches):
    """Images per CPU second of each pipeline over batches of indices; pipelines take turns after each batch."""
    seconds = np.zeros(len(pipelines))
    for batch in batches:
        for i, pipeline in enumerate(pipelines):
            start = time.process_time()
            pipeline(batch)
            seconds[i] += time.process_time() - start
    return sum(map(len, batches)) / seconds


def compare(files, image_size, repeats):
    """Print the table of speeds and the pixel differences."""
    indices = order(len(files.paths), seed=0, epoch=0)[:200]
    batches = [indices[i : i + BATCH] for i in range(0, len(indices), BATCH)]
    ours = partial(photographs.read_batch, files, image_size, (0, 1))
    pipelines = {
        'ours, uint8 batch': ours,
        'ours, normalised on the CPU': lambda batch: photographs.normalize(ours(batch)[0]),
        'torchvision on PIL': torchvision_pipeline(files, image_size),
    }
    rates = [speeds(pipelines.values(), batches) for _ in range(1 + repeats)]
    rates = np.array(rates[1:])  # (repeats, 3), without the warm-up
    kilobytes = np.mean([os.path.getsize(files.paths[i]) for i in indices]) / 1000
    print(f'{len(indices)} images of {kilobytes:.0f} KB on average, to {image_size}x{image_size}, {repeats} repeats')
    print(f'{"images/s of one core":30}{"median":>8}{"min":>8}{"max":>8}   ratio to torchvision: median, min, max')
    for name, s, ratio in zip(pipelines, rates.T, (rates / rates[:, -1:]).T):
        figures = ''.join(f'{f(s):8.0f}' for f in (np.median, np.min, np.max))
        print(f'{name:30}{figures}   ' + '  '.join(f'{f(ratio):.2f}' for f in (np.median, np.min, np.max)))
    differences = pixel_differences(files, image_size, indices)
    print(f'pixel difference from PIL on equal crops, of 255: mean {np.mean(differences):.3f}, ', end='')
    print(f'worst image {np.max(differences):.3f}')


def main():
    """Read the flags, make images if none are given, and compare."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag('--imagenetpath', type=path, help='folder with train/<class>/*; without it, images are made')
    flag('--image_size', default=224, type=number(int, 8, 1024), help='height and width')
    flag('--repeats', default=7, type=number(int, 1, 10_000), help='repeated measurements')
    opt = parser.parse_args()
    torch.set_num_threads(1)
    print(f'{platform.processor() or platform.machine()}, torch {torch.__version__}, OpenCV {cv2.__version__}')
    with tempfile.TemporaryDirectory() as made:
        root = opt.imagenetpath or write_photographs(made)
        compare(photographs.load(root).train, opt.image_size, opt.repeats)


if __name__ == '__main__':
    ending.run(main)
