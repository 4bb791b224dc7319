"""One worker and several compute the same; dead workers are reported, and a run resumes where it was."""

import json
import os
import socket
import subprocess
import sys

import paced
import pytest
import torch
from conftest import HANGS, SMALL, refused
from test_stopping import ended

import cifar
from engine import workers
from engine.log import read_log

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


def test_two_workers_train_every_parameter_and_keep_it_equal_bit_for_bit(tmp_path):
    """By every method, each on half of a batch; every trained parameter has a gradient in every step and changes."""
    finished(torchrun('--standalone', '--nproc-per-node', 2, os.path.join(HERE, 'every_method.py'), tmp_path))
    one, two = (json.loads((tmp_path / f'{rank}.json').read_text()) for rank in (0, 1))
    for case, found in one.items():
        assert found == two[case] and not found['without gradient'], case
        assert all(found['after'][name] != value for name, value in found['before'].items()), case
        assert all(found['state'].values()), case


def test_three_workers_resume_bit_for_bit(tmp_path):
    """Of three summands, unlike of two, the order matters: of gradients, and of losses that are logged together."""
    script = os.path.join(HERE, 'resumed_steps.py')
    finished(torchrun('--standalone', '--nproc-per-node', 3, script, tmp_path / 'found.json'))
    whole, resumed = json.loads((tmp_path / 'found.json').read_text())
    assert whole == resumed and len(whole['losses']) == 6


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
        ({'RANK': '0', 'WORLD_SIZE': '2', 'MASTER_ADDR': 'x', 'MASTER_PORT': 'abc'}, 'MASTER_PORT=abc'),
        ({'RANK': '0', 'WORLD_SIZE': '-3', 'MASTER_ADDR': 'x', 'MASTER_PORT': '1'}, 'WORLD_SIZE=-3'),
        ({'RANK': '2', 'WORLD_SIZE': '2', 'MASTER_ADDR': 'x', 'MASTER_PORT': '1'}, 'without RANK below 2'),
    ],
)
def test_several_workers_that_cannot_find_each_other_are_refused(train, monkeypatch, left, word):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    advice = ['is not a number'] if '=' in word else ['torchrun', 'unset WORLD_SIZE']
    assert refused(train('--epochs 1 --save logs/run'), word, *advice)
    assert not os.path.exists('logs')


def test_ngpu_under_a_launcher_of_one_worker_is_refused(train, monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'x')
    assert refused(train('--epochs 1 --ngpu 2'), '--ngpu 2: torchrun (TORCHELASTIC_RUN_ID in the environment)')


@pytest.mark.parametrize(
    'address, word',
    [
        ({'MASTER_PORT': '{taken}'}, 'cannot meet the other workers at MASTER_ADDR 127.0.0.1, MASTER_PORT '),
        ({'MASTER_ADDR': 'no.such.host.invalid'}, 'cannot meet the other workers at MASTER_ADDR no.such'),
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
