"""How reproduce.py starts its runs, waits for them and stops them."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ends, started_by
from test_reproduce import write_log

import reproduce
from engine import jobs

ROOT = pathlib.Path(reproduce.__file__).parent


def test_runs_side_by_side_on_gpus_share_the_cores(monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr('os.cpu_count', lambda: 8)
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    code = 'import os, sys; sys.exit(" ".join([os.environ["OMP_NUM_THREADS"], *sys.argv[1:]]))'
    with pytest.raises(ValueError, match='exit status 1: 2 --gpu_id 1$'):
        jobs.call([sys.executable, '-c', code], 3, 4)


def test_a_taught_run_waits_for_its_own_teacher_alone_and_runs_begin_in_order(capsys):
    """The slow teacher ends only after the quick one's pupil has run; each of two slots has one run at a time."""
    slots, quick_has_taught = [threading.Lock(), threading.Lock()], threading.Event()

    def run(name, job):
        if not slots[job].acquire(blocking=False):
            raise ValueError(f'slot {job} is taken')
        if name == 'slow' and not quick_has_taught.wait(5):
            raise ValueError('waited for more than its teacher')
        if name == 'pupil of quick':
            quick_has_taught.set()
        slots[job].release()
        return 'well'

    names = ['slow', 'quick', 'pupil of slow', 'pupil of quick', 'another of slow']
    assert jobs.run_all({name: name.split()[-1] if ' of ' in name else None for name in names}, run, 2) == []
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == sorted(f'[{i}/5] {name}{end}' for i, name in enumerate(names, 1) for end in ('', ': well'))
    began = [line[6:] for line in lines if not line.endswith(': well')]
    assert began == ['slow', 'quick', 'pupil of quick', 'pupil of slow', 'another of slow']


def test_a_failed_run_is_reported_and_the_others_go_on(script):
    pathlib.Path('logs/digits-holdout936-e1').mkdir(parents=True)
    pathlib.Path('logs/digits-holdout936-e1/wrn-16-2-s0').write_text('where the teacher would be saved')
    status, out, _ = script(reproduce, 'demo --methods teacher,student,kd --epochs 1 --seeds 1 --holdout 936')
    assert status == 1 and out.count('failed: exit status 2: cifar.py: error: --save logs/digits-') == 1
    assert 'failed: its teacher digits-holdout936-e1/wrn-16-2-s0 is not trained' in out
    assert '1 of 3 cells were run.' in out and re.search(r'\| student alone \| \d+\.\d\d \|  \| 0 \|', out)


@pytest.fixture
def instead(monkeypatch, tmp_path):
    """Run a shell script instead of cifar.py: instead('commands')."""

    def write(commands):
        path = tmp_path / 'instead'
        path.write_text(f'#!/bin/sh\n{commands}\n')
        path.chmod(0o700)
        monkeypatch.setattr('sys.executable', str(path))

    return write


def test_a_run_that_ends_well_before_its_last_epoch_was_stopped(script, instead):
    instead('exit 0')
    status, out, _ = script(reproduce, 'demo --methods student --seeds 1')
    assert status == 1 and ': failed: it was stopped\n' in out


def test_the_controls_are_runs_of_their_own_script_and_are_told_from_other_runs(script, instead):
    write_log('cifar10-e16/wrn-16-2-s0', 12.0)
    write_log('cifar10-e16/wrn-16-1-at-untrained-wrn-16-2-s0', 14.0, control='shifted')
    write_log('cifar10-e16/wrn-16-1-at-shifted-wrn-16-2-s1', 14.0)  # of cifar.py
    instead('echo "$@" >> began; exit 3')
    status, out, _ = script(reproduce, 'controls --dtype bfloat16 --methods at-shifted,at-untrained --seeds 2')
    began, other = pathlib.Path('began').read_text().splitlines()
    assert 'untrained --dataset' in other and '-s1 --resume' in other
    assert status == 1 and f'{ROOT}/examples/controls.py shifted --dataset CIFAR10' in began
    assert '--beta 1e+3 --teacher_id cifar10-e16/wrn-16-2-s0 --save' in began
    assert "holds a run with other settings (control 'shifted', not 'untrained'" in out
    assert "holds a run with other settings (control '', not 'shifted'" in out


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_passed_on_to_the_runs_and_no_other_begins(script, instead, tmp_path, signum):
    instead('trap "touch asked-$$; exit 143" TERM; touch began-$$; while :; do sleep 0.01; done')

    def ask():
        while len(list(tmp_path.glob('began-*'))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signum)

    threading.Thread(target=ask, daemon=True).start()
    status, out, err = script(reproduce, 'demo --methods teacher,student,kd --seeds 1')
    assert (status, err) == (130, 'reproduce.py: error: interrupted\n') and '[3/3]' not in out
    assert len(list(tmp_path.glob('asked-*'))) == len(list(tmp_path.glob('began-*'))) == 2


def test_runs_do_not_outlive_what_started_them(tmp_path):
    command = [sys.executable, reproduce.__file__, 'demo', '--methods', 'student', '--epochs', '1000', '--jobs', '1']
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        next(line for line in process.stdout if line.startswith('epoch 1/'))
        found = started_by(process.pid)
        process.kill()
        assert found and ends(found)
