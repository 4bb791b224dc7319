"""How fast one core makes training images from JPEGs, how close they are to PIL's, and what a million files need.

    python benchmarks/input.py
    python benchmarks/input.py --imagenetpath ~/ILSVRC2012
    python benchmarks/input.py --files 1281167 --nthread 4 --ngpu 1

Ours (OpenCV decodes, PyTorch resizes, a batch of uint8) and torchvision's usual pipeline on PIL (RandomResizedCrop,
RandomHorizontalFlip, ToTensor, Normalize) read the same files in turns, each on one thread, timed in CPU seconds,
which other work on the machine disturbs little. Without --imagenetpath the files are 500x375 photograph-like noise of
ImageNet's usual file size, about 110 KB.

With --files, one such image has that many names in 1,000 folders: hard links, so that a real folder is listed and read
that needs the space of a few images. It is listed as in training, and each of --ngpu workers begins epochs with
--nthread loader processes. The table tells how long the first batch takes, and how much memory (from /proc) processes
need. The last batches of each epoch are read, after which it ends as in training.
"""

import argparse
import multiprocessing
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

from engine import ending, workers
from engine.arguments import Parser, number, path
from engine.photographs import build_data
from images import crops, photographs
from images.batches import order

BATCH = 50
LINKS = 60_000  # names of a file; ext4 allows 65,000
EPOCHS = 3
FOLDER = 'BENCHMARK_FOLDER'  # in the environment of workers: what the first process has made


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


def write_names(root, count):
    """Write `count` training images of up to 1,000 classes that are names of one image; returns root."""
    content = cv2.imencode('.jpg', photograph(np.random.default_rng(0)), [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes()
    classes = [f'n{i:08d}' for i in range(min(1000, count))]
    for part in ('train', 'val'):
        for name in classes:
            os.makedirs(os.path.join(root, part, name))
    names = [
        os.path.join('train', name, f'{name}_{i}.JPEG') for i in range(-(-count // len(classes))) for name in classes
    ]
    names = names[:count] + [os.path.join('val', name, 'ILSVRC2012_val_00000001.JPEG') for name in classes]
    paths = [os.path.join(root, name) for name in names]
    for i, link in enumerate(paths):
        if i % LINKS:
            os.link(paths[i - i % LINKS], link)
        else:
            with open(link, 'wb') as file:
                file.write(content)
    return root


def megabytes(pid):
    """The memory of a process: (its part of what it shares and all else, what it alone has), in MB."""
    with open(f'/proc/{pid}/smaps_rollup', encoding='ascii') as file:
        sizes = {line.split()[0]: int(line.split()[1]) * 1024 / 1e6 for line in file.readlines()[1:]}
    return sizes['Pss:'], sizes['Private_Clean:'] + sizes['Private_Dirty:']


def measure_names(opt):
    """List the folder that a worker finds in its environment, begin epochs and print the table; all workers at once."""
    device, since = workers.join(opt), time.perf_counter()
    data, _ = build_data(opt, partial(photographs.load, os.environ[FOLDER], note=workers.say), device)
    seconds = time.perf_counter() - since
    seconds, pss = workers.sum_over_workers([seconds / workers.world(), megabytes(os.getpid())[0]], device)
    workers.say(f'listed in {seconds:.1f} s; {workers.world()} workers need {pss:.0f} MB together')
    workers.say('epoch  first batch, s   one loader process: alone has, MB   all processes together, MB')
    last = len(data.train(1, 0)) - 4 * opt.nthread
    for epoch in range(1, EPOCHS + 1):
        since = time.perf_counter()
        batches = data.train(epoch, max(0, last))
        for i, _ in enumerate(batches):
            if i == 0:
                seconds = time.perf_counter() - since
            elif i == len(batches) // 2:  # each process has read
                found = [megabytes(process.pid) for process in multiprocessing.active_children()]
        pss = megabytes(os.getpid())[0] + sum(pss for pss, _ in found)
        alone = sum(own for _, own in found) / len(found)
        means = workers.sum_over_workers([seconds / workers.world(), alone / workers.world(), pss], device)
        workers.say('{:5}{:16.2f}{:36.0f}{:29.0f}'.format(epoch, *means))


def main():
    """Read the flags, make images if none are given, and compare or, with --files, measure what names need."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag('--imagenetpath', type=path, help='folder with train/<class>/*; without it, images are made')
    flag('--image_size', default=224, type=number(int, 8, 1024), help='height and width')
    flag('--repeats', default=7, type=number(int, 1, 10_000), help='repeated measurements')
    flag('--files', type=number(int, 2000), metavar='N', help='measure what N names need, instead of speed')
    flag('--nthread', default=4, type=number(int, 1, 1024), help='with --files: loader processes of each worker')
    flag('--ngpu', default=1, type=number(int, 1, 1024), help='with --files: workers')
    opt = parser.parse_args()
    torch.set_num_threads(1)
    fixed = dict.fromkeys(('gpu_id', 'save'), '') | dict.fromkeys(('deterministic', 'skip_bad_images'), False)
    fixed |= dict.fromkeys(('seed', 'holdout', 'max_restarts'), 0) | {'batch_size': BATCH * opt.ngpu}
    opt = argparse.Namespace(**vars(opt), **fixed)
    if opt.files and FOLDER in os.environ:
        return measure_names(opt)
    print(f'{platform.processor() or platform.machine()}, torch {torch.__version__}, OpenCV {cv2.__version__}')
    with tempfile.TemporaryDirectory() as made:
        if opt.files:
            os.environ[FOLDER] = write_names(made, opt.files)
            return measure_names(opt)
        root = opt.imagenetpath or write_photographs(made)
        compare(photographs.load(root).train, opt.image_size, opt.repeats)


if __name__ == '__main__':
    ending.run(main)
