"""--tensorboard: event files beside the log, or one clear line without the package."""

import importlib.util
import os
import sys

import pytest
from conftest import refused

import cifar
from engine import loop
from engine.log import read_log

RUN = '--epoch_step [] --lr 0.05 --tensorboard --save logs/run'


def test_event_files_hold_the_results_of_the_log_once_also_after_a_resume(train):
    reader = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    assert train('--epochs 2', RUN)[0] == 0
    assert train('--epochs 3 --resume auto', RUN)[0] == 0
    records = read_log('logs/run/log.txt')
    accumulator = reader.EventAccumulator('logs/run')
    accumulator.Reload()
    names = set(accumulator.Tags()['scalars'])
    assert {'train_loss', 'test_acc', 'ce', 'lr_now', 'images_per_second'} <= names and 'seed' not in names
    for name in ('test_acc', 'ce'):
        found = [(event.step, event.value) for event in accumulator.Scalars(name)]
        assert [step for step, _ in found] == [1, 2, 3]
        assert [value for _, value in found] == pytest.approx([record[name] for record in records])


def test_without_the_package_or_a_folder_it_is_refused_before_data_are_read(script, monkeypatch):
    assert refused(script(cifar, '--dataroot nowhere --tensorboard'), '--tensorboard writes beside the log in --save')
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    told = '--tensorboard needs the package tensorboard: pip install tensorboard'
    assert refused(script(cifar, '--dataroot nowhere --tensorboard --save logs/run'), told)
    assert not os.path.exists('logs')


def test_a_run_that_fails_at_the_start_leaves_nothing(train, monkeypatch):
    pytest.importorskip('tensorboard')
    monkeypatch.setattr(loop, 'evaluate', lambda *_: [1][1])
    with pytest.raises(IndexError):
        train('--epochs 1', RUN)
    assert not os.path.exists('logs/run')


def test_a_broken_package_is_named_in_one_line(train, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    assert refused(train('--epochs 1', RUN), 'the package tensorboard cannot be imported')
    assert refused(train('--epochs 1 --tensorboard', ['--save', os.fsdecode(b'\xff')]), 'is not printable')
