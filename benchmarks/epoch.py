"""Time of an epoch and an evaluation of cifar.py, compared with the plain loop, and where it goes.

    python benchmarks/epoch.py                        # 10,000 random images to train on and as many to test on
    python benchmarks/epoch.py --dataroot data        # CIFAR-10
    python benchmarks/epoch.py --eager --teacher_dtype same --json

WRN-16-1 learns from WRN-16-2 by attention transfer. Ours is `fit` on `images.memory`, with the flags of the fast step
of step.py. The plain loop reads PIL images from a torchvision dataset through its transforms and a DataLoader, takes
the plain step of step.py and evaluates in float32, in its own process. They run in turns, and each pair gives a ratio.
The first pair, in which ours is compiled, does not count.
"""

import contextlib
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(HERE, '..'), HERE]

import measure
import step as benchmark

from engine import ending, workers
from engine.arguments import Parser, number, path
from engine.flags import parse_cifar
from engine.log import commit, environment
from engine.loop import Data, count, fit
from engine.meters import Meters
from engine.step import FLUSH, Updates, make_step, total_loss
from engine.student import Network
from engine.teacher import frozen
from images import memory
from utils import DTYPES

AT = '--teacher_id X --beta 1e+3'


class Pictures(torchvision.datasets.VisionDataset):
    """A dataset that returns images as torchvision's CIFAR-10 does."""

    def __init__(self, images, transform):
        super().__init__('', transform=transform)
        self.data, self.targets = images.pixels.numpy(), images.labels.tolist()

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def load(dataroot, count):
    """A data set of `count` training images: CIFAR-10 from `dataroot`, or random images that are also the test set."""
    if dataroot:
        dataset = memory.load('CIFAR10', dataroot, note=lambda text: None)
    else:
        rng = np.random.default_rng(0)
        pixels, labels = rng.integers(0, 256, (count, 32, 32, 3), np.uint8), rng.integers(0, 10, count)
        images = memory.Images(torch.from_numpy(pixels), torch.from_numpy(labels))
        dataset = memory.Dataset(images, images, list('0123456789'), True)
    return dataset._replace(train=memory.Images(*(t[:count] for t in dataset.train)))


@functools.cache
def plain_epoch(dataroot, count, nthread):
    """The plain loop: run() -> (seconds of training, seconds of evaluation)."""
    flags, dataset, device = parse_cifar('', AT.split()), load(dataroot, count), measure.device()
    tensor = [transforms.ToTensor(), transforms.Normalize(*(np.array(v) / 255 for v in (memory.MEAN, memory.STD)))]
    augment = [transforms.Pad(4, padding_mode='reflect'), transforms.RandomCrop(32), transforms.RandomHorizontalFlip()]
    loader = partial(DataLoader, batch_size=flags.batch_size, num_workers=nthread)
    train = loader(Pictures(dataset.train, transforms.Compose(augment + tensor)), shuffle=True)
    test = loader(Pictures(dataset.test, transforms.Compose(tensor)))
    step = benchmark.plain_step(flags, benchmark.CASES['at'], device)
    f, params = benchmark.initialise(benchmark.WRN_16_1, device)

    def run():
        start = time.perf_counter()
        for images, labels in train:
            step(images.to(device), labels.to(device))
        trained = time.perf_counter()
        with torch.no_grad():
            for images, labels in test:
                logits = f(images.to(device), params, False)[0].cpu()
                (F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).sum().item())
        return trained - start, time.perf_counter() - trained

    return run


def run_plain_epoch(*arguments):
    return plain_epoch(*arguments)()


def fast_epoch(flags, dataset, device):
    """Ours: run() -> (seconds of training, seconds of evaluation)."""
    train, test = dataset.train.to(device), dataset.test.to(device)
    train_batches = partial(memory.TrainBatches, train, flags.batch_size, 4, True, flags.seed, 0, 1)
    test_batches = partial(memory.TestBatches, test, flags.batch_size)
    teacher = frozen_teacher(flags, dataset, device)
    f, params = benchmark.initialise(benchmark.WRN_16_1, device)
    step = make_step(flags, partial(f, params=params, mode=True), teacher, device)
    source = Data(train_batches, test_batches, count(dataset), next(iter(test_batches()))[0][:1])

    def run():
        with contextlib.redirect_stdout(None), tempfile.TemporaryDirectory() as folder:
            flags.save = os.path.join(folder, 'run')
            record = fit(flags, step, Network(f, params), source)
        return record['train_time'], record['test_time']

    return run


def frozen_teacher(flags, dataset, device):
    g, fixed = benchmark.initialise(benchmark.WRN_16_2, device)
    fixed = {k: v.detach() for k, v in fixed.items()}
    sample = partial(memory.sample, dataset.train)
    return partial(g, params=frozen(flags, Network(g, fixed), sample, device), mode=False)


def parts(flags, dataset, device):
    """Seconds of ours by part, over an epoch but for its first step; on a GPU, those of the host."""
    f, params = benchmark.initialise(benchmark.WRN_16_1, device)
    updates = Updates(flags, [v for v in params.values() if v.requires_grad], device)
    step = make_step(flags, partial(f, params=params, mode=True), frozen_teacher(flags, dataset, device), device)
    meters, times, since = Meters(device, (1,)), {}, time.perf_counter()

    def lap(part):
        nonlocal since
        now = time.perf_counter()
        times[part] = times.get(part, 0) + now - since
        since = now

    batches = memory.TrainBatches(dataset.train.to(device), flags.batch_size, 4, True, 0, 0, 1, 1)
    for i, sample in enumerate(batches):
        lap('input')
        loss, _ = total_loss(flags, step, sample, 1, meters)
        lap('forward')
        updates.zero_grad()
        updates.scaled(loss, None)[0].backward()
        lap('backward')
        updates.step(lambda: None)
        lap('update')
        if len(meters.pending) == FLUSH:
            meters.flush(1)
        lap('host')
        if i == 0:
            times.clear()  # the first step compiles
    return times


def main():
    """Measure both epochs in turns and print the table."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag('--dataroot', default='', type=path, help='where CIFAR-10 is (default: random images)')
    flag('--images', default=10_000, type=number(int, 256), help='number of training images')
    flag('--dtype', default=measure.fast_dtype(), choices=list(DTYPES), help='of the fast epoch')
    flag('--eager', action='store_true', help='the fast epoch without --compile')
    flag('--teacher_dtype', choices=['same', 'int8'], help='as in step.py')
    flag('--nthread', default=2, type=number(int, 0, 64), help='processes of the plain DataLoader')
    flag('--pairs', default=3, type=number(int, 1, 1000), help='pairs that are measured')
    flag('--json', action='store_true', help='end with a line of JSON')
    opt = parser.parse_args()
    opt.teacher_dtype = opt.teacher_dtype or benchmark.default_teacher_dtype(opt.dtype)
    workers.keep_memory()
    benchmark.choose_arithmetic()
    words = f'{AT} --dtype {opt.dtype} --teacher_dtype {opt.teacher_dtype} --epochs 1'
    flags = parse_cifar('', words.split() + ['--compile'] * (not opt.eager))
    dataset, device = load(opt.dataroot, opt.images), measure.device()
    print(f'{environment(device)["device"]}, torch {torch.__version__}, commit {commit()}')
    print(f'{opt.images:,} training and {len(dataset.test.labels):,} test images, {opt.dtype} beside float32')
    run, plain = fast_epoch(flags, dataset, device), (run_plain_epoch, opt.dataroot, opt.images, opt.nthread)
    with benchmark.own_process() as process:
        pairs = [(process.submit(*plain).result(), run()) for _ in range(1 + opt.pairs)][1:]
    results = {}
    for i, part in enumerate(('train', 'test')):
        plain, fast = ([pair[kind][i] for pair in pairs] for kind in (0, 1))
        ratios = [a / b for a, b in zip(plain, fast)]
        results[part] = {
            'plain_s': statistics.median(plain),
            'fast_s': statistics.median(fast),
            'ratio': statistics.median(ratios),
        }
        print(
            f'{part:6} plain {statistics.median(plain):6.2f} s  fast {statistics.median(fast):6.2f} s  '
            f'ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})'
        )
    times = parts(flags, dataset, device)
    whole = sum(times.values())
    print('of a fast epoch: ' + ', '.join(f'{part} {100 * s / whole:.1f}%' for part, s in times.items()))
    if opt.json:
        results['parts'] = {part: s / whole for part, s in times.items()}
        print(json.dumps(results))


if __name__ == '__main__':
    ending.run(main)
