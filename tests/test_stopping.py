"""Runs that are killed, asked to stop, or started twice lose nothing and end with the same bits."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial

import paced
import pytest
from conftest import HANGS, SMALL, refused, started_by
from test_cifar import logged, same_weights

import cifar
from engine import stopping
from engine.log import read_log
from formats import networks, write

LONG = bool(os.environ.get('AT_LONG_TESTS'))
ROOT = os.path.dirname(os.path.abspath(cifar.__file__))
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': ROOT, 'PACED': 'cifar'}
EPOCHS = 8
FLAGS = [*SMALL.split(), '--batch_size', '2', '--lr', '0.01', '--epoch_step', '[3,5]']  # epochs of 30 steps


def begin(photos, name, *more, epochs=EPOCHS):
    """Start a run that waits at the end of each epoch for a line, or for `ended`."""
    words = [*FLAGS, '--dataroot', str(photos), '--save', f'logs/{name}', '--resume', 'auto', *more]
    command = [sys.executable, paced.__file__, *words, '--epochs', str(epochs)]
    pipes = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.PIPE)
    return subprocess.Popen(command, env=ENVIRONMENT, **pipes, text=True)


@pytest.fixture
def start(photos, tmp_path, monkeypatch):
    """Start a run in an empty folder: start('name', flags...) -> the process."""
    monkeypatch.chdir(tmp_path)
    return partial(begin, photos)


def ended(process):
    """Let a run continue to its end: its exit status, the rest of stdout, and stderr."""
    out, err = process.communicate(timeout=HANGS)
    return process.returncode, out, err


def go(process, epochs=1):
    """Let a run continue for so many epochs."""
    process.stdin.write('\n' * epochs)
    process.stdin.flush()


def wait_for_epoch(process, epoch):
    """Let a run continue until it waits at the end of an epoch, or of a later one if it is already past that."""
    for line in process.stdout:
        if line.startswith('epoch '):
            if int(line.split()[1].partition('/')[0]) >= epoch:
                return
            go(process)
    raise AssertionError(f'it ended before epoch {epoch}: {process.stderr.read()}')


@pytest.fixture(scope='module')
def whole(photos, tmp_path_factory):
    """The folder of an uninterrupted run: whole(workers, epochs) -> path."""
    there = {}

    def run(workers=1, epochs=EPOCHS):
        if (workers, epochs) not in there:
            folder, before = tmp_path_factory.mktemp('whole'), os.getcwd()
            os.chdir(folder)
            assert ended(begin(photos, 'whole', '--ngpu', str(workers), epochs=epochs))[0] == 0
            os.chdir(before)
            there[workers, epochs] = folder / 'logs' / 'whole'
        return there[workers, epochs]

    return run


def same_runs(name, whole, epochs=EPOCHS):
    assert sorted(os.listdir(f'logs/{name}')) == ['log.txt', 'model.pt7']
    with open(f'logs/{name}/log.txt') as log:
        assert len(log.readlines()) == epochs
    os.symlink(whole, 'logs/whole')
    assert logged(name) == logged('whole') and same_weights(name, 'whole')
    return True


@pytest.mark.parametrize('seed', range(3) if LONG else [0])
@pytest.mark.parametrize('workers', [1, 2])
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(start, whole, workers, seed):
    """All processes get SIGKILL: in the middle of an epoch, a checkpoint or a line of the log."""
    kills, epochs = (20, 120) if LONG else (3 - workers, EPOCHS)
    rng = random.Random(seed)
    for _ in range(kills):
        process = start('killed', '--ngpu', str(workers), '--save_every', '0.0003', epochs=epochs)
        while not re.match(r'[0-9,]+ trained', process.stdout.readline() or 'ended'):
            assert process.poll() is None
        go(process, epochs // (kills + 1))  # all kills come before the last epoch
        time.sleep((0.8 if LONG else 0.5) * rng.random())
        assert process.poll() is None
        kill(process)
    status, _, err = ended(start('killed', '--ngpu', str(workers), epochs=epochs))
    assert status == 0, err
    assert same_runs('killed', whole(workers, epochs), epochs)


def kill(process):
    """Send SIGKILL to a process and its workers."""
    for child in started_by(process.pid):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(child, signal.SIGKILL)
    process.kill()
    process.communicate()


@pytest.mark.parametrize('workers, signals', [(1, 'SIGTERM SIGINT SIGUSR1'), (2, 'SIGTERM')])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_in_the_middle_of_the_epoch(start, whole, workers, signals):
    status = {'SIGTERM': 143, 'SIGINT': 130, 'SIGUSR1': 0}
    for epoch, name in enumerate(('SIGTERM SIGINT SIGUSR1' if LONG else signals).split(), 2):
        process = start('run', '--ngpu', str(workers))
        wait_for_epoch(process, epoch)  # after epochs 2 and 4 the rate drops
        go(process)
        time.sleep(0.05)
        process.send_signal(signal.Signals[name])
        found, _, err = ended(process)
        assert found == status[name] and err.count('\n') == 1, err
        step, epoch = re.search(r'stopped after step (\d+) of epoch (\d); go on with --resume auto', err).groups()
        state = networks.load('logs/run/model.pt7')
        assert (state['epoch'], state['progress']['steps']) == (int(epoch) - 1, int(step))
    found, out, err = ended(start('run', '--ngpu', str(workers)))
    assert found == 0, err
    assert f'after step {step} of epoch {epoch}' in out
    assert same_runs('run', whole(workers))


SLOW_STEP = """
import os, signal, time
from engine import stopping
with stopping.Requests() as requests:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # the same request again, from a launcher and a terminal
    print(requests.signum, flush=True)
    time.sleep(stopping.AGAIN + 0.1)
    os.kill(os.getpid(), signal.SIGINT)
    print('still here')
"""


def test_a_second_signal_ends_the_process_at_once():
    ended = subprocess.run([sys.executable, '-c', SLOW_STEP], env=ENVIRONMENT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, '15\n', '')


def test_handlers_are_given_back_after_a_run():
    before = [signal.getsignal(signum) for signum in stopping.STATUS]
    with stopping.Requests():
        assert [signal.getsignal(signum) for signum in stopping.STATUS] != before
    assert [signal.getsignal(signum) for signum in stopping.STATUS] == before


def test_two_processes_do_not_train_into_one_folder_and_a_dead_one_holds_nothing(start):
    first = start('run')
    wait_for_epoch(first, 1)
    status, _, err = ended(start('run'))
    assert (status, err) == (2, 'paced.py: error: another process trains into logs/run\n')
    first.kill()
    first.communicate()
    status, out, _ = ended(start('run'))  # the lock ended with the process
    assert status == 0 and re.search(r'resumed from logs/run/model.pt7 after epoch 1\n', out)


def test_a_clock_that_goes_backwards_does_not_show(train, monkeypatch):
    now = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, 'time', lambda: float(next(now)))
    assert train('--epochs 2 --save logs/run')[0] == 0
    for record in read_log('logs/run/log.txt'):
        assert 0 < record['train_time'] < 60 and 0 < record['test_time'] < 60 and record['images_per_second'] > 0


def test_a_position_in_the_epoch_needs_the_workers_that_it_is_of(train, script, start):
    process = start('run')
    wait_for_epoch(process, 1)
    go(process)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143
    state = networks.load('logs/run/model.pt7')
    state['progress']['workers'] *= 2
    write.save('logs/other.pt7', state)
    assert refused(
        train('--epochs 8 --batch_size 2 --resume logs/other.pt7'),
        'in the middle of an epoch with --batch_size 2, --seed 0, 60 training images and 2 workers',
    )
    assert refused(train('--epochs 8 --batch_size 4 --resume logs/run/model.pt7'), 'with --batch_size 2')
    assert refused(train('--epochs 8 --batch_size 2 --holdout 6 --resume logs/run/model.pt7'), '60 training images')
    whole = {**state['progress'], 'workers': state['progress']['workers'][:1]}
    write.save('logs/other.pt7', {**state, 'epoch': 0, 'progress': whole})  # as if in the first epoch, before any log
    status, out, err = train('--epochs 1 --batch_size 2 --lr 0.03 --resume logs/other.pt7')
    assert status == 0 and 'note: logs/other.pt7 has other settings (' in out and 'not 0.03' in out, err
    for damaged in (
        {},
        {**whole, 'steps': 'x'},
        {**whole, 'workers': [{}]},
        {**whole, 'values': {'ce': {'n': 'x'}}},
        7,
    ):
        write.save('logs/other.pt7', {**state, 'progress': damaged})
        assert refused(train('--epochs 8 --batch_size 2 --resume logs/other.pt7'), 'logs/other.pt7')
