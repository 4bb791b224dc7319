"""The launcher: one line for the first error, no process that outlives the others, and restarts."""

import argparse
import atexit
import os
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import paced
import pytest
import torch
from conftest import HANGS, ends, refused, started_by
from test_stopping import ended, wait_for_epoch
from test_workers import ENVIRONMENT, start

import imagenet
from engine import ending, launch
from engine.log import read_log
from formats import networks


def workers_of(launcher):
    """The workers that a launcher has started: {rank: pid}."""
    ranks = {f'RANK={rank}': rank for rank in range(2)}
    found = started_by(launcher.pid).items()
    return {ranks[e]: child for child, environment in found for e in environment if e in ranks}


def kill_second_worker(process, epoch):
    """Kill worker 1 while the first waits at the end of an epoch."""
    wait_for_epoch(process, epoch)
    os.kill(workers_of(process)[1], signal.SIGKILL)


needs_proc = pytest.mark.skipif(not os.path.exists('/proc/self/environ'), reason='finds the worker to kill in /proc')


@pytest.fixture
def bad_image(tmp_path):
    """A folder of images of which one that only the second of two workers reads is damaged."""
    for part in ('train', 'val'):
        for i in range(8):
            (tmp_path / part / 'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(tmp_path / part / 'ab'[i % 2] / f'{i}.png'), np.full((40, 40, 3), 9 * i, np.uint8))
    (tmp_path / 'val' / 'a' / '2.png').write_text('no image')  # the second test image in the order of names
    return tmp_path


IMAGES = '--imagenetpath . --image_size 32 --width 0.0625 --batch_size 8 --epochs 1 --epoch_step [] --nthread 0'
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']


@pytest.mark.parametrize('launcher, seconds', [([], 0), ([], 3), (TORCHRUN, 3)], ids=['at once', 'slowly', 'torchrun'])
def test_what_the_second_worker_alone_meets_is_told_in_one_line(bad_image, launcher, seconds):
    """However long that worker takes to end."""
    command = [sys.executable, *launcher, paced.__file__, *IMAGES.split(), *([] if launcher else ['--ngpu', '2'])]
    environment = {**ENVIRONMENT, 'PACED': 'imagenet', 'SLOW_END': str(seconds)}
    pipes = {'stdin': subprocess.DEVNULL, 'capture_output': True, 'text': True}
    done = subprocess.run(command, cwd=bad_image, env=environment, timeout=HANGS, **pipes)
    assert done.stdout.count('note: without --save') == 1
    err, told = done.stderr, 'paced.py: error: ./val/a/2.png is not a readable image'
    assert err.count(told) == err.count('error: ./val') == 1 and '--skip_bad' in err, err
    if not launcher:  # torchrun adds a report of its own
        assert done.returncode == 2 and err.count('\n') == 1, err


@needs_proc
def test_a_dead_worker_ends_the_others_with_one_message(photos, tmp_path):
    process = start(photos, tmp_path, '--ngpu', '2')
    kill_second_worker(process, 2)
    status, _, err = ended(process)
    assert (status, err) == (1, 'worker 1 died (signal 9) and all were stopped; go on with --resume auto\n')


@needs_proc
@pytest.mark.parametrize('launcher', [[], TORCHRUN], ids=['ngpu', 'torchrun'])
def test_workers_do_not_outlive_their_launcher(photos, tmp_path, launcher):
    process = start(photos, tmp_path, *([] if launcher else ['--ngpu', '2']), launcher=launcher)
    wait_for_epoch(process, 1)
    found = workers_of(process)
    assert len(found) == 2
    process.kill()
    assert ends(found.values())
    process.communicate()


@needs_proc
def test_workers_that_are_still_importing_do_not_outlive_their_launcher_either(photos, tmp_path):
    process = start(photos, tmp_path, '--ngpu', '2', '--epochs', '100000', SLOW_START='3')
    while len(found := workers_of(process)) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert ends(found.values())
    process.communicate()


@needs_proc
def test_one_worker_that_is_asked_to_stop_stops_all_and_none_begins_again(photos, tmp_path):
    process = start(photos, tmp_path, '--ngpu', '2', '--max_restarts', '1')
    wait_for_epoch(process, 2)
    os.kill(workers_of(process)[1], signal.SIGTERM)
    status, out, err = ended(process)
    assert status == 143 and err.count('\n') == 1 and 'stopped after step' in err, err
    assert 'resumed' not in out


@pytest.mark.parametrize('ngpu', ['1', '2'])
def test_what_one_worker_knows_to_be_spoilt_none_saves_or_logs(photos, tmp_path, ngpu):
    """The last worker's running variance is infinite at the end of epoch 3, after the test."""
    status, _, err = ended(start(photos, tmp_path, '--ngpu', ngpu, SPOIL='3'))
    assert status == 1 and err.count('\n') == 1 and 'epoch 3, step 4: bn.running_var became infinite or NaN' in err, err
    assert [r['epoch'] for r in read_log(tmp_path / 'logs' / 'run' / 'log.txt')] == [1, 2]
    state = networks.load(tmp_path / 'logs' / 'run' / 'model.pt7')
    assert state['epoch'] == 2 and state['params']['bn.running_var'].isfinite().all()


def test_a_restart_does_not_repeat_an_error_that_no_restart_mends(bad_image):
    command = [sys.executable, imagenet.__file__, *IMAGES.split(), '--ngpu', '2', '--max_restarts', '2']
    done = subprocess.run(command, cwd=bad_image, env=ENVIRONMENT, timeout=HANGS, capture_output=True, text=True)
    assert refused((done.returncode, done.stdout, done.stderr), './val/a/2.png is not a readable image')
    assert done.stdout.count('8 training and 8 validation images') == 1


@needs_proc
def test_a_restart_before_the_run_was_opened_begins_the_new_run_and_not_the_old(train, photos, tmp_path):
    assert train('--epochs 5 --seed 1 --save logs/run')[0] == 0
    more = '--seed', '2', '--overwrite', '--ngpu', '2', '--max_restarts', '1'
    status, out, err = ended(start(photos, tmp_path, *more, DIES_ONCE=str(tmp_path / 'died')))
    assert status == 0 and (tmp_path / 'died').exists() and 'resumed' not in out, err
    assert [r['seed'] for r in read_log(tmp_path / 'logs' / 'run' / 'log.txt')] == [2] * 5


def begins_again(process, folder):
    kill_second_worker(process, 3)
    status, out, err = ended(process)
    assert status == 0, err
    assert 'resumed from logs/run/model.pt7 after epoch 3\n' in out
    records = read_log(folder / 'logs' / 'run' / 'log.txt')
    return [r['epoch'] for r in records] == list(range(1, 6)) and records[-1]['workers'] == 2


@needs_proc
def test_a_run_begins_again_where_it_was_when_a_worker_dies(photos, tmp_path):
    assert begins_again(start(photos, tmp_path, '--ngpu', '2', '--max_restarts', '1'), tmp_path)


@needs_proc
def test_a_run_under_torchrun_begins_again_too(photos, tmp_path):
    launcher = [*TORCHRUN, '--max-restarts', '1']
    process = start(photos, tmp_path, '--resume', 'auto', launcher=launcher, TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')
    assert begins_again(process, tmp_path)


def test_a_launcher_whose_restarts_would_hang_is_refused(train, monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_MAX_RESTARTS', '2')
    monkeypatch.setenv('TORCHELASTIC_USE_AGENT_STORE', 'True')
    assert refused(train('--epochs 1'), '--max-restarts 2', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1')


ENDS = """
import atexit, torch
from engine import ending
class Late:
    def __del__(self):
        print('the interpreter ended by itself')
late = Late()
atexit.register(print, 'at exit')
def main():
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    raise ValueError('wrong')
ending.run(main)
"""


def test_a_worker_that_has_joined_ends_without_the_interpreters_own_end():
    """There, gloo's threads would now and then abort it: signal 6 instead of its status."""
    done = subprocess.run([sys.executable, '-c', ENDS], env=ENVIRONMENT, timeout=HANGS, capture_output=True, text=True)
    assert refused((done.returncode, done.stdout, done.stderr), 'wrong') and done.stdout == 'at exit\n'


@pytest.mark.parametrize('backend', ['nccl', 'gloo'])
@pytest.mark.parametrize('status', [0, 1, 143])
def test_a_worker_that_fails_does_not_wait_until_the_others_end(monkeypatch, status, backend):
    """With nccl, leaving the group means waiting until all others leave it."""
    done = []
    monkeypatch.setattr(torch.distributed, 'get_backend', lambda: backend)
    monkeypatch.setattr(torch.distributed, 'destroy_process_group', lambda: done.append('waits'))
    monkeypatch.setattr(atexit, '_run_exitfuncs', lambda: None)
    monkeypatch.setattr(os, '_exit', done.append)
    ending.leave(status)
    assert done == ['waits'] * (status == 0 or backend == 'gloo') + [status]


def test_workers_have_an_hour_to_save_after_a_signal(monkeypatch):
    """The launcher's own limit of 30 seconds is less than a test of many images, or 20 steps, may take."""
    found = []
    monkeypatch.delenv('TORCH_ELASTIC_SHUTDOWN_TIMEOUT', raising=False)
    monkeypatch.setattr(
        'torch.distributed.launcher.api.elastic_launch', lambda config, _: found.append(config) or print
    )
    monkeypatch.setattr('logging.disable', lambda _: None)
    for name in ('OMP_NUM_THREADS', 'TORCH_CPP_LOG_LEVEL', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE', 'AT_PARENT'):
        monkeypatch.setenv(name, '1')
    assert launch.launch(argparse.Namespace(ngpu=2, max_restarts=0, save='')) == 0
    assert found[0].shutdown_timeout == 3600
