"""One worker and several compute the same; dead workers are reported, and a run resumes where it was."""

import os
import signal
import socket
import subprocess
import sys
import time

import cv2
import numpy as np
import paced
import pytest
import torch
from conftest import HANGS, SMALL, ends, refused, started_by
from test_stopping import ended, wait_for_epoch

import cifar
import imagenet
from engine import workers
from engine.log import read_log
from formats import networks

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': ROOT}


def torchrun(*words, **more):
    command = [sys.executable, '-m', 'torch.distributed.run', *map(str, words)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def finished(process):
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope='module')
def twenty_steps(tmp_path_factory):
    """The results of one worker and of two in each mode of twenty_steps.py: [{mode: result} of one, of two]."""
    folder, script = tmp_path_factory.mktemp('steps'), os.path.join(HERE, 'twenty_steps.py')
    both = torchrun('--standalone', '--nproc-per-node', 2, script, folder / 'two.pt')
    subprocess.run([sys.executable, script, folder / 'one.pt'], env=ENVIRONMENT, check=True)
    finished(both)
    return [torch.load(folder / name) for name in ('one.pt', 'two.pt')]


@pytest.mark.parametrize('mode', ['fixed', 'sync', 'full', 'gradient'])
def test_losses_gradients_and_weights_do_not_depend_on_the_number_of_workers(twenty_steps, mode):
    """Over 20 steps of KD and a transfer with uneven last batches; batch norm is fixed or synchronised."""
    one, two = (found[mode] for found in twenty_steps)
    assert len(one['losses']) == 20 and one['losses'][-1] < one['losses'][0]
    torch.testing.assert_close(two['losses'], one['losses'], rtol=1e-6, atol=0)
    for key, value in one['params'].items():
        torch.testing.assert_close(two['params'][key], value, rtol=1e-6, atol=1e-9)


def test_each_of_several_workers_normalises_by_the_statistics_of_its_own_share(twenty_steps):
    """Over 20 steps of AT and KD, two equal one worker that takes each batch in two shares, and not in one."""
    one, two = (found['own'] for found in twenty_steps)
    torch.testing.assert_close(two['losses'], one['losses'], rtol=1e-6, atol=0)
    for key, value in one['params'].items():
        if 'running' not in key:  # these do not affect training
            torch.testing.assert_close(two['params'][key], value, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(two['losses'], twenty_steps[0]['sync']['losses'], rtol=1e-3)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def test_two_machines_train_together(photos, tmp_path):
    """Two launchers connect over the network on this machine, as two nodes of one worker each."""
    words = [*SMALL.split(), '--dataroot', str(photos), '--epochs', '1', '--save', 'logs/run']
    port = free_port()
    nodes = [
        torchrun(
            *('--nnodes', 2, '--nproc-per-node', 1, '--node-rank', node, '--master-addr', '127.0.0.1'),
            *('--master-port', port, cifar.__file__, *words),
            cwd=tmp_path,
        )
        for node in (0, 1)
    ]
    out = [finished(node) for node in nodes]
    assert 'epoch 1/1' in out[0] and out[1] == ''
    (record,) = read_log(tmp_path / 'logs' / 'run' / 'log.txt')
    assert record['workers'] == 2 and record['train_images'] == 60


def alone(photos, folder, **environment):
    """Start one epoch with these environment variables, as a job operator or a shell may set them."""
    words = [*SMALL.split(), '--dataroot', str(photos), '--epochs', '1', '--save', 'logs/run']
    command, environment = [sys.executable, cifar.__file__, *words], {**ENVIRONMENT, **environment}
    pipes = dict.fromkeys(('stdout', 'stderr'), subprocess.PIPE)
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes, text=True)


def test_containers_that_know_rank_and_address_train_together(photos, tmp_path):
    """Without LOCAL_RANK, since operators start one process per container."""
    address = {'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}
    processes = [alone(photos, tmp_path, RANK=str(rank), **address) for rank in (0, 1)]
    out = [finished(process) for process in processes]
    assert 'epoch 1/1' in out[0] and out[1] == ''
    (record,) = read_log(tmp_path / 'logs' / 'run' / 'log.txt')
    assert record['workers'] == 2


@pytest.mark.parametrize('left', [{'RANK': '3'}, {'RANK': ''}, {'RANK': '1', 'WORLD_SIZE': '1'}, {'LOCAL_RANK': '5'}])
def test_a_variable_that_something_else_left_behind_does_not_bear_on_a_run(train, monkeypatch, left):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    status, out, err = train('--epochs 1 --save logs/run')
    assert status == 0 and 'epoch 1/1' in out, err
    assert read_log('logs/run/log.txt')[0]['workers'] == 1


@pytest.mark.parametrize(
    'left, word',
    [
        ({'RANK': '1', 'WORLD_SIZE': '2'}, 'without MASTER_ADDR, MASTER_PORT'),
        ({'WORLD_SIZE': '2', 'MASTER_ADDR': 'x', 'MASTER_PORT': '1'}, 'without RANK'),
        ({'RANK': '2', 'WORLD_SIZE': '2', 'MASTER_ADDR': 'x', 'MASTER_PORT': '1'}, 'without RANK below 2'),
    ],
)
def test_several_workers_that_cannot_find_each_other_are_refused(train, monkeypatch, left, word):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert refused(train('--epochs 1 --save logs/run'), word, 'torchrun', 'unset WORLD_SIZE')
    assert not os.path.exists('logs')


def test_ngpu_under_a_launcher_of_one_worker_is_refused(train, monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'x')
    assert refused(train('--epochs 1 --ngpu 2'), '--ngpu 2: torchrun (TORCHELASTIC_RUN_ID in the environment)')


@pytest.mark.parametrize(
    'address, word',
    [
        ({'MASTER_PORT': 'abc'}, 'MASTER_PORT=abc in the environment is not a number'),
        ({'MASTER_PORT': '{taken}'}, 'cannot meet the other workers at MASTER_ADDR 127.0.0.1, MASTER_PORT '),
        ({'MASTER_ADDR': 'no.such.host.invalid'}, 'cannot meet the other workers at MASTER_ADDR no.such'),
        ({'WORLD_SIZE': '-3'}, 'WORLD_SIZE=-3 in the environment is not a number'),
    ],
)
def test_an_address_that_is_none_is_refused_by_name(photos, tmp_path, address, word):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        usual = {'RANK': '0', 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}
        address = {k: v.format(taken=taken.getsockname()[1]) for k, v in address.items()}
        process = alone(photos, tmp_path, **{**usual, **address})
        out, err = process.communicate(timeout=HANGS)
    lines = [line for line in err.splitlines() if not line.startswith('[W')]  # PyTorch's own
    assert process.returncode == 2 and len(lines) == 1 and word in lines[0], err


def test_an_error_that_quotes_a_folder_of_gloo_is_still_told(script, tmp_path):
    (tmp_path / 'gloo' / 'x').mkdir(parents=True)
    assert refused(script(cifar, '--dataset folder --dataroot', [tmp_path / 'gloo' / 'x']), "no folder 'train'")


@pytest.mark.parametrize(
    'gpu_id, visible, expected',
    [
        ('0,1', None, '0,1'),
        ('0', '2,3', '2'),
        ('1,0', '2,3', '3,2'),
        ('GPU-b', 'GPU-abc,GPU-bcd', 'GPU-bcd'),
        ('1', 'MIG-1/2/3, MIG-4', 'MIG-4'),
        ('2', '2,3', None),
        ('1', '0,-1,1', None),
        ('1', '0,,1', None),
        ('0', 'NoDevFiles', None),
        ('0,0', '2,3', None),
        ('0', '', None),
        ('GPU-a', '2,3', None),
        ('GPU-', 'GPU-abc,GPU-bcd', None),
    ],
)
def test_gpus_are_chosen_among_those_that_are_visible(gpu_id, visible, expected):
    if expected is None:
        with pytest.raises(ValueError, match=f'--gpu_id {gpu_id}'):
            workers.chosen_gpus(gpu_id, visible)
    else:
        assert workers.chosen_gpus(gpu_id, visible) == expected


def test_workers_see_the_gpus_that_their_command_names(photos, tmp_path):
    """The choice is made once, and not again among the launcher's GPUs."""
    process = start(photos, tmp_path, '--ngpu', '2', '--gpu_id', '1,2', CUDA_VISIBLE_DEVICES='4,5,6')
    status, out, err = ended(process)
    assert status == 0 and 'CUDA_VISIBLE_DEVICES=5,6' in out, err


def start(photos, folder, *more, launcher=(), **environment):
    """Start cifar.py on a tiny network, under a launcher or by itself; it waits at the end of each epoch."""
    words = [*SMALL.split(), '--dataroot', str(photos), '--epochs', '5', '--lr', '0.01', '--save', 'logs/run', *more]
    command = [sys.executable, *launcher, paced.__file__, *words]
    pipes = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.PIPE)
    environment = {**ENVIRONMENT, 'PACED': 'cifar', **environment}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes, text=True)


def workers_of(launcher):
    """The workers that a launcher has started: {rank: pid}."""
    ranks = {f'RANK={rank}': rank for rank in range(2)}
    found = started_by(launcher.pid).items()
    return {ranks[e]: child for child, environment in found for e in environment if e in ranks}


def kill_second_worker(process, epoch):
    """Kill worker 1 while worker 0 waits at the end of an epoch."""
    wait_for_epoch(process, epoch)
    os.kill(workers_of(process)[1], signal.SIGKILL)


needs_proc = pytest.mark.skipif(not os.path.exists('/proc/self/environ'), reason='finds the worker to kill in /proc')


@pytest.fixture
def bad_image(tmp_path):
    """A folder of images with a damaged one that only the second of two workers reads."""
    for part in ('train', 'val'):
        for i in range(8):
            (tmp_path / part / 'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(tmp_path / part / 'ab'[i % 2] / f'{i}.png'), np.full((40, 40, 3), 9 * i, np.uint8))
    (tmp_path / 'val' / 'a' / '2.png').write_text('no image')  # the second test image by name
    return tmp_path


IMAGES = '--imagenetpath . --image_size 32 --width 0.0625 --batch_size 8 --epochs 1 --epoch_step [] --nthread 0'
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']


@pytest.mark.parametrize('launcher, seconds', [([], 0), ([], 3), (TORCHRUN, 3)], ids=['at once', 'slowly', 'torchrun'])
def test_what_the_second_worker_alone_meets_is_told_in_one_line(bad_image, launcher, seconds):
    """No matter how long that worker takes to end."""
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
    """The last worker's running variance becomes infinite at the end of epoch 3, after the test."""
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
def test_a_restart_before_the_run_was_opened_begins_the_new_run_and_not_the_old(photos, tmp_path):
    assert ended(start(photos, tmp_path, '--seed', '1'))[0] == 0
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
