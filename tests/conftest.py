"""Small real data and real runs that several test files use."""

import os
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess

import cv2
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import cifar
from engine import ending, int8
from images import memory, photographs

if not os.environ.get('AT_GPU_TESTS'):
    os.environ['CUDA_VISIBLE_DEVICES'] = ''  # most tests are about bits, int8 and workers of CPUs
torch.set_num_threads(1)
HANGS = 600  # seconds after which a process that tests wait for counts as hung
VNNI = pytest.mark.skipif(not int8.exact(), reason='without VNNI, this CPU cannot add int8 products exactly')
TRAINING, TESTING = 25, 9  # images that `write_photographs` writes


def draw(rng, label, size):
    """A noisy image with a bright square in the corner of its class: (H, W, 3) uint8."""
    height, width = size
    image = rng.integers(0, 100, (height, width, 3), dtype=np.uint8)
    half_h, half_w = height // 2, width // 2
    top, left = divmod(label, 2)
    image[top * half_h : (top + 1) * half_h, left * half_w : (left + 1) * half_w] += 120
    return image


def smooth(rng, height, width, channels=3):
    """A picture without hard edges, like a photograph: (height, width, channels) uint8."""
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, channels)).astype(np.float32)
    return np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)


def random_images(n=23, size=8):
    """Images in memory, each of its own class."""
    pixels = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (n, size, size, 3), dtype=np.uint8))
    return memory.Images(pixels, torch.arange(n))


def write_folder(root, train=('a', 'b'), test=('a', 'b'), count=1):
    """Write `count` 9x9 images of each class for training and testing; returns root."""
    rng = np.random.default_rng(0)
    for part, classes in (('train', train), ('test', test)):
        (root / part).mkdir(parents=True)
        for label, name in enumerate(classes):
            (root / part / name).mkdir()
            for i in range(count):
                cv2.imwrite(str(root / part / name / f'{i}.png'), draw(rng, label, (9, 9)))
    return root


def write_photographs(root, train=TRAINING, test=TESTING):
    """Write images of two classes in turns, of many sizes and two file types; returns root."""
    rng = np.random.default_rng(0)
    for part, count in (('train', train), ('val', test)):
        for i in range(count):
            folder = root / part / ('ant', 'bee')[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            name = f'{i:02}.{("JPEG", "png")[i // 2 % 2]}'
            image = smooth(rng, 30 + i % 30, 60 - i % 30)
            Image.fromarray(image).save(folder / name, quality=95)
    return root


def difference(ours, theirs):
    """Mean and largest absolute difference in levels of 255."""
    difference = np.abs(ours.astype(int) - np.asarray(theirs))
    return difference.mean(), difference.max()


@pytest.fixture(autouse=True)
def environment():
    """Undo a script's changes to the environment after its test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def pytest_runtest_setup(item):
    torch.manual_seed(0)  # PyTorch begins with a random seed; a test and its fixtures have the same in every run
    if os.environ.get('AT_QUICK_TESTS') and item.get_closest_marker('slow'):
        pytest.skip('takes seconds')


@pytest.fixture(scope='session', autouse=True)
def quick():
    """With AT_QUICK_TESTS, skip tests that start a process (training asks git for its commit) or compile."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get('AT_QUICK_TESTS'):
            for owner, name in ((subprocess.Popen, '__init__'), (BaseProcess, 'start'), (torch, 'compile')):
                patch.setattr(owner, name, lambda *_, **__: pytest.skip('starts a process or compiles'))
        yield


@pytest.fixture(scope='session')
def photos(tmp_path_factory):
    """A folder of 3 classes with 20 training and 7 test images each, of several sizes and file types."""
    root, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
    for part, count in (('train', 20), ('test', 7)):
        for label, name in enumerate(('ant', 'bee', 'cat')):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                suffix = ('png', 'jpg', 'bmp')[i % 3]
                assert cv2.imwrite(str(folder / f'{i}.{suffix}'), draw(rng, label, (24 + i, 40 - i)))
    return root


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """The images that `write_photographs` writes, loaded."""
    return photographs.load(write_photographs(tmp_path_factory.mktemp('folder')))


@pytest.fixture
def script(monkeypatch, capfd, tmp_path):
    """Run a script's main in an empty folder: script(cifar, 'flags') -> (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(module, *arguments):
        words = [word for a in arguments for word in (a.split() if isinstance(a, str) else map(str, a))]
        monkeypatch.setattr(sys, 'argv', [f'{module.__name__}.py', *words])
        status = 0
        try:
            ending.run(module.main)
        except SystemExit as stop:
            status = stop.code or 0
        out, err = capfd.readouterr()
        return status, out, err

    return run


SMALL = '--dataset folder --image_size 16 --randomcrop_pad 2 --depth 10 --width 0.25 --batch_size 16'


@pytest.fixture
def train(script, photos):
    """Train a tiny network on `photos`: train('flags') -> (exit status, stdout, stderr)."""
    return lambda *arguments: script(cifar, SMALL, ['--dataroot', photos], *arguments)


def refused(result, *words):
    """Whether a script ended with status 2 and one line of error with all these words; an assertion says why not."""
    status, _, err = result
    assert status == 2, (status, err)
    assert err.count('\n') == 1 and 'error: ' in err, err
    assert 'Traceback' not in err
    for word in words:
        assert word in err, (word, err)
    return True


def proc(pid, name):
    """The content of a process's file in /proc, '' if the process has ended."""
    try:
        with open(f'/proc/{pid}/{name}', encoding='utf8', errors='replace') as file:
            return file.read()
    except OSError:
        return ''


def state(pid):
    """The (state, parent) of a process from /proc; (None, None) if it has ended."""
    letter, parent, *_ = proc(pid, 'stat').rpartition(')')[2].split() or 'Z0'
    return (None, None) if letter in 'ZX' else (letter, int(parent))


def started_by(pid):
    """The processes that a process has started, including short-lived ones: {pid: environment}."""
    pids = subprocess.run(['pgrep', '-P', str(pid)], capture_output=True, text=True).stdout.split()
    return {int(child): proc(child, 'environ').split('\0') for child in pids}


def ends(pids):
    """Whether processes end within a time that does not depend on how long they would train."""
    for _ in range(10 * HANGS):
        if not any(state(pid)[0] for pid in pids):
            return True
        time.sleep(0.1)
    return False


@pytest.fixture
def trace(tmp_path):
    """A path that must not exist after the test: code that runs creates it."""
    path = tmp_path / 'trace'
    yield path
    assert not path.exists()


@pytest.fixture(scope='module')
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module', params=[18, 50])
def torchvision_net(request):
    """A torchvision ResNet with random weights and random statistics, and its depth."""
    torch.manual_seed(0)
    net = torchvision.models.get_model(f'resnet{request.param}', num_classes=7).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2),
            ):
                torch.nn.init.uniform_(tensor, low, high)
    return net.requires_grad_(False), request.param
