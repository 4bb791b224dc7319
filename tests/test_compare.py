"""Runs beside each other, from logs of any of the scripts."""

import json
import pathlib

import pytest
from conftest import refused
from test_reproduce import RECORD

import plot
from engine.log import line_of, read_log

PHOTOGRAPHS = {**RECORD, 'imagenetpath': 'data/birds', 'image_size': 64, 'depth': 18, 'width': 1.0, 'epochs': 2}
SMALL = {**RECORD, 'net': 'wrn', 'depth': 16, 'width': 1.0, 'epochs': 2}
del PHOTOGRAPHS['dataset']


@pytest.fixture
def run(tmp_path):
    """Write the log of a run of two epochs: run(name, error, record, ...) -> its folder."""

    def write(name, error, record, epochs=(1, 2), **more):
        (tmp_path / name).mkdir()
        accuracy = [100 - error, 99.0] if 'imagenetpath' in record else 100 - error
        records = [{'seed': 0, 'lr_now': 0.1, 'at0': 0.1, **record, **more, 'epoch': e} for e in epochs]
        lines = (f'json_stats: {json.dumps({**r, "test_acc": accuracy})}\n' for r in records)
        (tmp_path / name / 'log.txt').write_text(''.join(lines))
        return name

    return write


def shown(script, *runs):
    status, out, err = script(plot, 'table', runs)
    assert (status, err) == (0, '')
    return out.splitlines()


def test_methods_are_compared_in_pairs_of_seeds_and_named_by_what_differs(script, run):
    """Differences of 1, 2 and 3 have the mean 2 and the standard deviation 1; the quantile of t is 4.303."""
    runs = [run(f'at{s}', 9 - s, PHOTOGRAPHS, seed=s, beta=10.0, groups='2,3', nthread=s) for s in range(3)]
    runs += [run('all', 8, PHOTOGRAPHS, beta=10.0, groups=''), run('kd', 7, PHOTOGRAPHS, alpha=0.9)]
    runs += [run(f'alone{s}', 10, PHOTOGRAPHS, seed=s) for s in range(4)]
    runs += [run('teacher', 5, {**PHOTOGRAPHS, 'depth': 34}), run('killed', 6, PHOTOGRAPHS, epochs=[1], seed=9)]
    assert shown(script, *runs, runs[0], f'{runs[0]}/') == [
        '| network | method | median error, % | spread | seeds |',
        '|---|---|---|---|---|',
        '| ResNet-18 | alone | 10.00 | 10.00 to 10.00 | 0, 1, 2, 3 |',
        '| ResNet-18 | AT, groups 2,3 | 8.00 | 7.00 to 9.00 | 0, 1, 2 |',
        '| ResNet-18 | AT, groups default | 8.00 |  | 0 |',
        '| ResNet-18 | KD | 7.00 |  | 0 |',
        '| ResNet-34 | alone | 5.00 |  | 0 |',
        '',
        '| network | difference of errors | mean, points | 95 % t-interval, +- | pairs of seeds |',
        '|---|---|---|---|---|',
        '| ResNet-18 | AT, groups 2,3 - alone | -2.00 | 2.48 | 3 |',
        '',
        'birds at 64 pixels: trained on 50,000 images for 2 epochs (lr times 0.2 at [5,10,13]), batch 128, bfloat16, '
        'last epoch, tested on 9,980 images; torch 2, a machine.',
        'Not finished: killed.',
    ]


@pytest.mark.parametrize('decay, label', [('none', 'F-ActT, constant beta'), ('linear', 'F-ActT')])
def test_a_weight_that_does_not_fall_as_in_the_paper_is_named(script, run, decay, label):
    name = run('full', 9, SMALL, beta=1.0, transfer='full', beta_decay=decay)
    assert f'| WRN-16-1 | {label} | 9.00 |  | 0 |' in shown(script, name)


def test_methods_of_different_schedules_are_named_by_these(script, run):
    runs = [run(f'alone{s}', 10, {**SMALL, 'workers': 1}, seed=s) for s in range(2)]
    runs += [run(f'at{s}', 9, {**SMALL, 'batch_size': 64, 'workers': 2}, seed=s, beta=1.0) for s in range(2)]
    lines = shown(script, *runs)
    assert '| WRN-16-1 | AT, batch_size 64, workers 2 - alone, batch_size 128, workers 1 | -1.00 | 0.00 | 2 |' in lines


def test_runs_of_different_images_are_not_compared(script, run):
    runs = [run(f'digits{s}', 10, {**SMALL, 'dataset': 'digits'}, seed=s) for s in range(2)]
    runs += [run(f'cifar{s}', 20, SMALL, seed=s, beta=1e3) for s in range(2)]
    runs += [run(f'held{s}', 30, SMALL, seed=s, beta=1e3, holdout=5000, test_images=5000) for s in range(2)]
    lines = shown(script, *runs)
    rows = [line.split(' | ')[0].removeprefix('| ') for line in lines if line.startswith('| WRN')]
    assert rows == [
        f'WRN-16-1 on {data} images' for data in ('digits, 9,980', 'CIFAR10, 9,980', 'CIFAR10, 5,000 held-out')
    ]
    assert not any('difference' in line for line in lines)


def test_a_folder_is_other_images_at_another_size(script, run):
    folder = {**SMALL, 'dataset': 'folder', 'dataroot': 'my/photos'}
    runs = [run(f'alone{s}', 10, {**folder, 'image_size': 32}, seed=s) for s in range(2)]
    runs += [run(f'at{s}', 9, {**folder, 'image_size': 64}, seed=s, beta=1.0) for s in range(2)]
    lines = shown(script, *runs)
    assert any('WRN-16-1 on photos at 64 pixels' in line for line in lines) and not any(' - alone' in i for i in lines)
    shown(script, run('huge', 10, {**PHOTOGRAPHS, 'image_size': 10**400}))


def test_what_cannot_be_compared_is_named(script, run):
    one, two = run('one', 10, SMALL, nthread=1), run('two', 11, SMALL, nthread=2)
    assert refused(script(plot, f'table {one} {two}'), 'two: another run has the same settings and the seed 0')
    for i, change in enumerate(({'seed': None}, {'epochs': '2'}, {'depth': 'x'}, {'train_images': None})):
        log = run(f'bad{i}', 10, {**SMALL, **change})
        assert refused(script(plot, ['table', log]), log, 'lacks what a table needs')
    assert refused(script(plot, 'table nowhere'), 'nowhere')
    assert shown(script, run('begun', 10, SMALL, epochs=[1])) == ['Not finished: begun.']


def test_a_hostile_log_controls_neither_terminal_nor_markdown(script, run):
    evil = '\x1b[2J<b>|'
    runs = [
        run(f'run{i}', 10, SMALL, seed=i, beta=1.0, groups=f'{i}{evil}', dataset=evil, device=evil) for i in range(2)
    ]
    text = '\n'.join(shown(script, *runs, run('\x1b<b>', 10, SMALL, epochs=[1])))
    assert '?[2J&lt;b&gt;&#124;' in text and '\x1b' not in text and '<b>' not in text


def test_a_flag_that_an_older_log_lacks_has_its_default(script, run):
    old, new = run('old', 10, SMALL, beta=1.0), run('new', 9, SMALL, seed=1, beta=1.0, teacher_dtype='same', other=1)
    assert '| WRN-16-1 | AT | 9.50 | 9.00 to 10.00 | 0, 1 |' in shown(script, old, new)
    coarse = run('coarse', 8, SMALL, beta=1.0, teacher_dtype='int8')
    rows = [line.split(' | ')[1] for line in shown(script, old, coarse) if line.startswith('| WRN')]
    assert rows == ['AT, teacher_dtype same', 'AT, teacher_dtype int8']


def test_older_logs_have_the_rate_of_the_epoch_and_are_compared_by_that_of_the_first(script, run):
    old = run('old', 10, SMALL, beta=1.0)
    records = read_log('old/log.txt')
    for record, rate in zip(records, (0.05, 0.01)):
        del record['lr_now']
        record['lr'] = rate
    pathlib.Path('old/log.txt').write_text(''.join(map(line_of, records)))
    other, same = run('other', 9, SMALL, seed=1, beta=1.0, lr=0.1), run('same', 9, SMALL, seed=1, beta=1.0, lr=0.05)
    assert '| WRN-16-1 | AT | 9.50 | 9.00 to 10.00 | 0, 1 |' in shown(script, old, same)
    assert any('(lr 0.05, times 0.2 at' in line for line in shown(script, old))
    rows = [line.split(' | ')[1] for line in shown(script, old, other) if line.startswith('| WRN')]
    assert rows == ['AT, lr 0.05', 'AT, lr 0.1']


def test_long_values_that_begin_alike_are_told_apart(script, run):
    teachers = [f'{"folder/" * 20}{name}' for name in ('one', 'two')]
    runs = [run(f'run{i}', 10, PHOTOGRAPHS, seed=i, beta=1.0, teacher_params=path) for i, path in enumerate(teachers)]
    assert [line.split(' | ')[1][-4:] for line in shown(script, *runs) if '| ResNet' in line] == ['/one', '/two']


def test_the_published_runs_of_a_schedule_are_one_table(script, monkeypatch):
    monkeypatch.chdir(pathlib.Path(plot.__file__).parent)
    lines = shown(script, *map(str, pathlib.Path('logs/cifar10-e16').iterdir()))
    assert sum(line.startswith('| WRN-16-1 | ') for line in lines) > 8
    assert '| WRN-16-1 | AT - alone | -1.55 | 1.35 | 3 |' in lines
