"""Runs of the authors' own scripts and of ours, from the same weights and batches, end with the same numbers.

AUTHORS=/path/to/attention-transfer make test, with a clone of github.com/szagoruyko/attention-transfer at 893df54.
Their `main` runs unchanged, in float64 and without CUDA, on batches of ours. Two deviations that docs/fidelity.md names
are made equal: the bias of the teacher's shortcuts is 0, and the ImageNet student's shortcuts have no batch norm.
"""

import os
import pathlib
import sys
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import cifar
import imagenet
import imagenet_resnet
import resnet
from benchmarks.authors import load
from engine.log import read_log
from formats import networks, write
from images import memory, photographs

AUTHORS = os.environ.get('AUTHORS', '')
pytestmark = [
    pytest.mark.skipif(not AUTHORS, reason='AUTHORS names no clone of szagoruyko/attention-transfer'),
    pytest.mark.filterwarnings('ignore'),
]
CLOSE = 1e-12
SCHEDULE = '--epochs 3 --epoch_step [2,3] --lr_decay_ratio 0.2'
METHODS = {'student': '', 'at': '--beta 1e+3', 'kd': '--alpha 0.9', 'at-kd': '--beta 1e+3 --alpha 0.9'}


@pytest.fixture
def authors(monkeypatch, tmp_path):
    """Load a script of the authors: authors('cifar') -> its module, whose tensors are float64 on the CPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.Tensor, 'cuda', lambda self: self)
    return partial(load, AUTHORS)


class Loader:
    """Batches of ours as the authors' DataLoader gives them, those of the next epoch each time."""

    def __init__(self, of_epoch):
        self.of_epoch, self.epoch = of_epoch, 0

    def __iter__(self):
        self.epoch += 1
        return iter([[images.double(), labels] for images, labels, _ in self.of_epoch(self.epoch)])


def cast(value, dtype='float'):
    """The authors' utils.cast in float64."""
    if isinstance(value, dict):
        return {key: cast(tensor, dtype) for key, tensor in value.items()}
    return value.long() if dtype == 'long' else value.double()


def run_theirs(module, monkeypatch, words):
    monkeypatch.setattr(sys, 'argv', ['theirs', *words.split()])
    torch.set_default_dtype(torch.float64)
    try:
        module.main()
    finally:
        torch.set_default_dtype(torch.float32)


def start_of(build, *shape):
    """The initial params of our seed 7, in float64."""
    torch.manual_seed(7)
    params = build(*shape)[1]
    return {key: value.detach().double().requires_grad_('running' not in key) for key, value in params.items()}


def assert_equal_runs(prefix):
    ours, theirs = read_log('logs/ours/log.txt'), read_log('logs/theirs/log.txt')
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs):
        assert a['train_loss'] == pytest.approx(b['train_loss'], rel=CLOSE)
        assert a['test_acc'] == pytest.approx(b['test_acc'])
    params = networks.load('logs/ours/model.pt7')['params']
    expected = torch.load('logs/theirs/model.pt7')['params']
    for key, value in params.items():
        right = expected[prefix + key]
        assert (value - right).abs().max() <= CLOSE * max(1, right.abs().max()), key


@pytest.fixture
def digits(monkeypatch):
    """Seven batches of 16 digits of 32x32 an epoch, mirrored and cropped."""
    load = memory.DATASETS['digits']

    def some(**source):
        whole = load(**source)
        train, test = (memory.Images(p.pixels[:n], p.labels[:n]) for p, n in ((whole.train, 112), (whole.test, 32)))
        return whole._replace(train=train, test=test, flip=True)

    monkeypatch.setitem(memory.DATASETS, 'digits', some)
    return memory.load('digits')


@pytest.mark.parametrize('method', METHODS)
def test_cifar(script, authors, digits, monkeypatch, method):
    theirs = authors('cifar')
    torch.manual_seed(3)
    teacher = {key: value.detach().double() for key, value in resnet.wide_resnet(16, 2, 10)[1].items()}
    os.makedirs('logs/teacher')
    write.save('logs/teacher/model.pt7', {'params': teacher})
    pathlib.Path('logs/teacher/log.txt').write_text('json_stats: {"depth": 16, "width": 2.0, "epoch": 1}\n')
    words = f'{SCHEDULE} --batch_size 16 --lr 0.1 {METHODS[method]} {"--teacher_id teacher" * (method != "student")}'
    status, _, err = script(cifar, words, '--dataset digits --dtype double --seed 7 --save logs/ours')
    assert status == 0, err

    start = start_of(resnet.wide_resnet, 16, 1, 10)

    def same_start(depth, width, classes, build=theirs.resnet):
        f, params = build(depth, width, classes)
        return f, start if (depth, width) == (16, 1) else params

    batches = partial(memory.TrainBatches, digits.train, 16, 4, True, 7, 0, 1)
    unseen = memory.TestBatches(digits.test, 16)
    for name, value in {
        'resnet': same_start,
        'create_dataset': lambda opt, train: train,
        'DataLoader': lambda train, *_, **__: Loader(batches if train else lambda _: unseen),
    }.items():
        monkeypatch.setattr(theirs, name, value)
    monkeypatch.setattr(theirs.utils, 'cast', cast)
    run_theirs(theirs, monkeypatch, f'{words} --dataset CIFAR10 --save logs/theirs')
    assert_equal_runs('' if method == 'student' else 'student.')


@pytest.mark.parametrize('method', ['at', 'kd', 'at-kd'])
def test_imagenet(script, authors, monkeypatch, tmp_path, method):
    """ResNet-18 taught by ResNet-34 at 64 pixels, whose last maps are 2x2, not the 7x7 that theirs averages."""
    theirs = authors('imagenet')
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (28, 64, 64, 3), dtype=torch.uint8, generator=rng)
    labels = torch.arange(28) % 10

    def read(files, size, augment, indices, out=None):
        return pixels[list(indices)], labels[list(indices)].tolist(), []

    files = photographs.Files([str(i) for i in range(28)], labels)
    dataset = photographs.Dataset(files, files, list(map(str, range(1000))))
    shared = photographs.share(dataset)
    monkeypatch.setattr(photographs, 'read_batch', read)
    monkeypatch.setattr(imagenet, 'load', lambda *_: dataset)

    torch.manual_seed(3)
    teacher = imagenet_resnet.fold_batch_norm(imagenet_resnet.imagenet_resnet(34, 1, 1000)[1])
    teacher = {key: value.detach() * (not key.endswith('_dim.bias')) for key, value in teacher.items()}
    torch.save({key: value.double() for key, value in teacher.items()}, 'teacher.pth')
    build = imagenet_resnet.imagenet_resnet

    def without_norm(depth, width, classes):
        f, params = build(depth, width, classes)
        return f, {key: value for key, value in params.items() if 'bndim' not in key}

    monkeypatch.setattr(imagenet_resnet, 'imagenet_resnet', without_norm)
    words = f'{SCHEDULE} --batch_size 4 --lr 0.01 {METHODS[method]} --teacher_params teacher.pth'
    flags = '--dtype double --seed 7 --image_size 64 --nthread 0 --save logs/ours'
    status, _, err = script(imagenet, words, flags)
    assert status == 0, err

    start = start_of(without_norm, 18, 1, 1000)

    def same_start(depth, width, define=theirs.define_student):
        return define(depth, width)[0], start

    def batches(epoch):
        return photographs.TrainBatches(shared, 4, 64, 7, 0, 1, 0, torch.device('cpu'), epoch)

    def unseen(_):
        return photographs.TestBatches(shared, 4, 64, 0, 1, 0, torch.device('cpu'))

    for name, value in {
        'define_student': same_start,
        'get_iterator': lambda path, size, nthread, train: Loader(batches if train else unseen),
        'tqdm': lambda loader, **_: Bar(loader),
        'F': types.SimpleNamespace(**{**vars(F), 'avg_pool2d': lambda x, *_: F.avg_pool2d(x, x.shape[-1])}),
    }.items():
        monkeypatch.setattr(theirs, name, value)
    run_theirs(theirs, monkeypatch, f'{words} --save logs/theirs')
    assert_equal_runs('student.')


class Bar:
    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)

    def set_postfix(self, **_):
        pass
