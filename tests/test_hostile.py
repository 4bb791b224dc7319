"""Files from strangers: nothing in them runs, memory and time are limited, and the error is one line."""

import json
import os
import pickle
import struct
import subprocess
import sys
import zlib
from urllib.error import URLError

import cv2
import numpy as np
import pytest
import torch
import torchvision
from conftest import HANGS, SMALL, refused
from torchnet.meter import AverageValueMeter

import cifar
from engine.log import read_log
from formats import networks, write
from images import memory

ROOT = os.path.dirname(os.path.abspath(cifar.__file__))


class Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return open, (self.trace, 'w')


# ------------------------------------------------------------------------------------------------- much from little


REFUSALS = """
import resource, sys
import checkpoint, engine.log
from images import decode
from images import decode
from formats import networks
with open('/proc/self/statm') as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for read, path in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        eval(read)(path)
    except ValueError as error:
        print(error)
"""


def refusals(*reads):
    """The ValueErrors of (function, path) pairs, each refused within a GiB of memory and a minute of CPU time."""
    environment = {**os.environ, 'PYTHONPATH': ROOT, 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-c', REFUSALS, *(str(word) for pair in reads for word in pair)]
    ended = subprocess.run(command, env=environment, timeout=HANGS, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert [line[: len(str(path))] for line, (_, path) in zip(lines, reads, strict=True)] == [str(p) for _, p in reads]
    return lines


needs_proc = pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='reads its memory from /proc')


def png(width, height):
    """A PNG of a few bytes that declares a given size."""

    def chunk(name, content):
        return struct.pack('>I', len(content)) + name + content + struct.pack('>I', zlib.crc32(name + content))

    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', header)
        + chunk(b'IDAT', zlib.compress(b'\0' * 1000))
        + chunk(b'IEND', b'')
    )


def jpeg(width, height):
    content = cv2.imencode('.jpg', np.zeros((64, 64, 3), np.uint8))[1].tobytes()
    at = content.index(b'\xff\xc0')
    return content[: at + 5] + struct.pack('>HH', height, width) + content[at + 9 :]


@needs_proc
def test_images_that_declare_gigabytes_are_refused(tmp_path):
    images = png(60_000, 60_000), png(2**31 - 1, 2**31 - 1), jpeg(65_000, 65_000)
    for i, content in enumerate(images):
        assert len(content) < 2000
        (tmp_path / f'{i}.png').write_bytes(content)
    found = refusals(*(('decode.read_image', tmp_path / f'{i}.png') for i in range(3)))
    assert all('is not a readable image' in line for line in found)


@needs_proc
def test_16_gib_of_holes_are_not_read(tmp_path):
    path = tmp_path / 'sparse'
    with open(path, 'wb') as file:
        file.truncate(16 * 2**30)
    readers = 'decode.read_image', 'engine.log.read_log', 'networks.load', 'networks.load_teacher'
    assert all('sparse' in line for line in refusals(*((reader, path) for reader in readers)))


# --------------------------------------------------------------------------------------------------------- code


def test_code_in_cifars_pickles_is_not_run(tmp_path, monkeypatch):
    """torchvision compares checksums before it unpickles the files, and downloads them again if they differ."""
    folder, trace = tmp_path / 'cifar-10-batches-py', tmp_path / 'trace'
    folder.mkdir()
    for name in (
        'data_batch_1',
        'data_batch_2',
        'data_batch_3',
        'data_batch_4',
        'data_batch_5',
        'test_batch',
        'batches.meta',
    ):
        (folder / name).write_bytes(pickle.dumps(Trap(trace)))

    def offline(*_, **__):
        raise URLError('no network')

    monkeypatch.setattr(torchvision.datasets.utils, 'urlretrieve', offline, raising=False)
    monkeypatch.setattr('urllib.request.urlopen', offline)
    with pytest.raises((OSError, ValueError)):
        memory.load('CIFAR10', str(tmp_path))
    assert not trace.exists()
    pickle.loads(pickle.dumps(Trap(trace))).close()  # the trap does work
    assert trace.exists()


@pytest.mark.parametrize(
    'line', ['{"epoch": ' + '9' * 10_000 + '}', '{"epoch": 1e999}', '[' * 10**6, '{"a": "' + 'b' * 10**6]
)
def test_a_log_of_huge_numbers_or_depth_is_read_or_refused(tmp_path, line):
    log = tmp_path / 'log.txt'
    log.write_text(f'json_stats: {line}\njson_stats: {{"epoch": 2}}\n')
    try:
        assert read_log(log)[-1] == {'epoch': 2}
    except ValueError as error:
        assert str(error).startswith(f'{log}, line 1')


def test_a_checkpoint_that_no_run_wrote_is_not_resumed(train):
    assert train('--epochs 1 --save logs/run')[0] == 0
    state = networks.load('logs/run/model.pt7')
    progress = {'steps': 1, 'images': 16, 'seconds': 1.0, 'batch_size': 16, 'seed': 0, 'values': {}}
    progress['workers'] = [{'errors': {'n': 16, 'sum': {1: 9}}, 'bad': 0}]
    value = {**dict.fromkeys(vars(AverageValueMeter()), 1.0), 'value': 1.0}  # the last replaces a method
    for change in (
        {'epoch': -5},
        {'optimizer': dict.fromkeys(state['optimizer'], 3)},
        {'optimizer': {}},
        {'optimizer': {**state['optimizer'], 'state': {0: {'momentum_buffer': torch.zeros(3)}}}},
        {'optimizer': {**state['optimizer'], 'state': {999: {'momentum_buffer': torch.zeros(3)}}}},
        {'optimizer': {**state['optimizer'], 'state': {0: {'momentum_buffer': 3.0}}}},
        {'optimizer': {**state['optimizer'], 'state': [3]}},
        {'progress': progress},  # without a loss
        {'progress': {**progress, 'values': {'loss': value}}},
        {'progress': {**progress, 'steps': -1}},
        {'progress': {**progress, 'steps': 0, 'workers': [{'errors': {'n': 16, 'sum': {}}, 'bad': 0}]}},
        {'progress': {**progress, 'seed': [[]]}},
        {'epoch': 0, 'progress': {**progress, 'steps': 0, 'settings': {'lr': torch.ones(2)}}},
        {'epoch': 0, 'progress': {**progress, 'steps': 0, 'settings': [3]}},
    ):
        write.save('hostile.pt7', {**state, **change})
        assert refused(train('--epochs 2 --resume hostile.pt7'), 'hostile.pt7')


ESCAPE = '\x1b]0;title\x07' + 'long' * 999
LINES = [
    *({'epoch': 'x'}, {'epoch': [1]}, {'lr': 'fast', 'lr_decay_ratio': 1}, {'lr_decay_ratio': -1e300}),
    *({'epoch_step': 7}, {'epoch_step': '['}, {'epoch_step': '["a"]'}, {'test_acc': []}),
    *({'dataset': ESCAPE}, {'depth': ESCAPE}, {'width': float('inf')}),
]


@pytest.mark.parametrize('line', LINES)
def test_a_log_that_no_run_wrote_spoils_no_other_run(train, line):
    flags = '--epochs 1 --epoch_step []'
    assert train(flags, '--save logs/run')[0] == 0
    record = {**read_log('logs/run/log.txt')[0], **line}
    with open('logs/run/log.txt', 'w') as log:
        log.write(f'json_stats: {json.dumps(record)}\n')
    result = train(flags, '--save logs/run')
    assert refused(result, 'logs/run holds a run') and '\x1b' not in result[2] and len(result[2]) < 1000
    assert train('--epochs 2 --epoch_step [] --save logs/run --resume auto')[0] == 0
    with open('logs/run/log.txt', 'w') as log:
        log.write(f'json_stats: {json.dumps(record)}\n')
    status, _, err = train(flags, '--teacher_id run --alpha 0.5')
    assert status in (0, 2) and '\x1b' not in err  # the figure in its log may belong to another network


# --------------------------------------------------------------------------------------------- unusual, but allowed


def test_a_teacher_that_is_constant_and_one_that_equals_its_student_teach_nothing_and_break_nothing(train):
    flags = '--epochs 1 --epoch_step [] --lr 0.05 --seed 3'
    assert train(flags, '--save logs/start --lr 1e-12')[0] == 0
    state = networks.load('logs/start/model.pt7')
    os.makedirs('logs/constant')
    params = {k: v if 'running' in k else torch.zeros_like(v) for k, v in state['params'].items()}
    write.save('logs/constant/model.pt7', {'params': params})
    with open('logs/start/log.txt') as log:
        line = log.read()
    record = {**json.loads(line.removeprefix('json_stats: ')), 'test_acc': 100 / 3}
    for name in ('constant', 'start'):
        with open(f'logs/{name}/log.txt', 'w') as log:
            log.write(f'json_stats: {json.dumps(record | ({} if name == "constant" else {"test_acc": None}))}\n')
    for transfer in (
        '--beta 100',
        '--beta 1 --transfer gradient',
        '--beta 100 --transfer full',
        '--beta 1 --at_form paper',
    ):
        for teacher in ('constant', 'start'):
            status, _, err = train(flags, transfer, f'--alpha 0.5 --teacher_id {teacher} --save logs/run --overwrite')
            assert status == 0, err
            (found,) = read_log('logs/run/log.txt')
            assert np.isfinite(found['train_loss'])


def test_a_last_batch_of_one_image_trains(train):
    status, _, err = train('--epochs 1 --batch_size 59 --epoch_step [] --save logs/run')  # 60 images
    assert status == 0 and np.isfinite(read_log('logs/run/log.txt')[0]['train_loss']), err


def test_a_class_without_images_is_refused_by_name(script, photos, tmp_path):
    for part in ('train', 'test'):
        for name in ('ant', 'bee', 'empty'):
            (tmp_path / 'data' / part / name).mkdir(parents=True)
            if name != 'empty':
                (tmp_path / 'data' / part / name / '0.png').write_bytes(
                    (photos / 'train' / name / '0.png').read_bytes()
                )
    assert refused(script(cifar, SMALL, '--dataroot data'), 'empty')


def test_a_teacher_whose_logits_are_not_finite_is_refused_by_name(train):
    """Its weights are finite."""
    flags = '--epochs 1 --epoch_step [] --save logs/teacher'
    assert train(flags)[0] == 0
    state = networks.load('logs/teacher/model.pt7')
    state['params']['fc.weight'] = torch.full_like(state['params']['fc.weight'], 3e38)
    state['params']['bn.bias'] += 10  # features are 10 and more, so logits overflow
    write.save('logs/teacher/model.pt7', state)
    record = read_log('logs/teacher/log.txt')[-1]
    with open('logs/teacher/log.txt', 'w') as log:
        log.write(f'json_stats: {json.dumps(record | {"test_acc": None})}\n')
    assert refused(train('--epochs 1 --teacher_id teacher --alpha 0.5'), '--teacher_id teacher cannot teach', 'finite')


def test_read_only_folders_are_one_line(train, tmp_path, monkeypatch):
    """root may write anywhere, so the refusal is the system's own only if the user is not root."""
    (tmp_path / 'logs').mkdir()
    if os.geteuid():
        (tmp_path / 'logs').chmod(0o500)
    else:
        makedirs = os.makedirs

        def refuse(path, *rest, **more):
            if 'logs' in str(path):
                raise PermissionError(13, 'Permission denied', str(path))
            makedirs(path, *rest, **more)

        monkeypatch.setattr(os, 'makedirs', refuse)
    assert refused(train('--epochs 1 --save logs/run'), 'Permission denied', 'logs/run')
