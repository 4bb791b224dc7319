"""The table is made of logs alone, and the README shows what the published logs say."""

import json
import os
import pathlib
import re
import shlex
import time
from functools import partial

import pytest
import torch
from conftest import refused

import engine
import options
import reproduce
import resnet

ROOT = pathlib.Path(reproduce.__file__).parent
RECORD = {
    'dataset': 'CIFAR10', 'train_images': 50_000, 'test_images': 9_980, 'holdout': 0, 'epochs': 16, 'dtype': 'bfloat16',
    'lr_decay_ratio': 0.2, 'epoch_step': '[5,10,13]', 'batch_size': 128, 'device': 'a machine', 'torch': '2',
}  # fmt: skip


def write_log(name, error, epochs=16, last=16):
    folder = pathlib.Path('logs') / name
    folder.mkdir(parents=True)
    records = [
        {**RECORD, 'epochs': epochs, 'epoch': e, 'test_acc': 100 - error - (last - e)} for e in range(1, last + 1)
    ]
    (folder / 'log.txt').write_text(''.join(f'json_stats: {json.dumps(r)}\n' for r in records))


@pytest.fixture
def fast(monkeypatch):
    """Every step takes 0.01 s, without being measured."""
    monkeypatch.setattr(engine, 'seconds_a_step', lambda *_: 0.01)


def test_dry_run_prints_the_commands_teachers_first_and_each_once(script, fast):
    status, out, _ = script(reproduce, 'table1 --dry_run --seeds 2 --dataroot there')
    *lines, last = out.splitlines()
    assert status == 0 and len(lines) == len(set(lines)) == 2 * (6 + 4 * 4)  # WRN-16-1 and WRN-16-2 appear twice
    assert last == f'# 44 runs, about {44 * 200 * 391 * 0.01 / 3600:.1f} hours here, one after the other'
    assert all(line.startswith('python cifar.py --dataset CIFAR10 --dataroot there --epochs 200') for line in lines)
    assert all('[60,120,160]' in line for line in lines)
    saved = [re.search(r'--save logs/(\S+)', line)[1] for line in lines]
    for i, line in enumerate(lines):
        teacher = re.search(r'--teacher_id (\S+)', line)
        assert teacher is None or teacher[1] in saved[:i] and teacher[1].endswith('-s0')
    assert sum('--beta 1e+3' in line for line in lines) == sum('--alpha 0.9' in line for line in lines) == 16
    assert sum('--beta_decay linear' in line for line in lines) == sum('--transfer full' in line for line in lines) == 8
    assert sum('--net nin --width 0.4375' in line for line in lines) == 10


@pytest.mark.parametrize('table, runs', [('table1', 6 + 4 * 4), ('table2', 2 + 7), ('table3', 2 + 2 + 3), ('demo', 5)])
def test_every_table_is_made_of_commands_that_are_understood(script, fast, table, runs):
    """Table 3's are NINs without batch norm and weight decay, and its images are only mirrored."""
    _, out, _ = script(reproduce, table, '--dry_run --seeds 1')
    lines = out.splitlines()[:-1]
    assert len(lines) == runs
    for line in lines:
        opt = options.parse_cifar('', shlex.split(line)[2:])
        if table == 'table3':
            assert opt.no_bn and opt.weight_decay == opt.randomcrop_pad == 0
        else:
            assert not opt.no_bn and opt.weight_decay == 5e-4 and opt.randomcrop_pad == 4


def test_the_teacher_of_one_seed_is_enough_to_teach(script, fast):
    _, out, _ = script(reproduce, 'table1 --rows 2 --methods at --seeds 3 --dry_run')
    assert out.count('cifar.py') == 1 + 3


def test_the_schedule_scales_with_the_epochs(script, fast):
    _, out, _ = script(reproduce, 'table1 --rows 2 --methods student --epochs 16 --seeds 1 --dtype bfloat16 --dry_run')
    assert out.splitlines()[0] == (
        "python cifar.py --dataset CIFAR10 --dataroot . --epochs 16 --epoch_step '[5,10,13]' --dtype bfloat16 "
        '--depth 16 --width 1 --seed 0 --save logs/cifar10-e16-wrn-16-1-s0 --resume auto'
    )


def test_the_time_is_that_of_real_steps(script):
    write_log('digits-e2-wrn-16-2-s0', 10.0, epochs=2, last=2)
    status, out, _ = script(reproduce, 'demo --methods at --epochs 2 --dry_run')
    hours = float(re.search('# 1 runs, about (.*) hours here', out)[1])
    assert status == 0 and out.count('cifar.py') == 1 and 0 <= hours < 1
    opt = options.parse_cifar('', '--batch_size 8 --beta 1 --teacher_id x --transfer full --depth 10'.split())
    f, params = resnet.wide_resnet(10, 1, 10)
    g, fixed = resnet.wide_resnet(10, 2, 10)
    taught = partial(g, params={k: v.detach() for k, v in fixed.items()}, mode=False)
    before = params['conv0'].detach().clone()
    start = time.perf_counter()
    found = engine.seconds_a_step(opt, f, params, taught, torch.randn(8, 3, 32, 32), steps=3)
    assert 0 < 3 * found < 2 * (time.perf_counter() - start)
    assert not torch.equal(before, params['conv0']) and 'adapter.0' in params


def test_the_table_shows_median_spread_and_difference_and_marks_what_was_not_run(script):
    for seed, error in enumerate((13.0, 12.0, 12.5)):
        write_log(f'cifar10-e16-wrn-16-1-s{seed}', error)
    write_log('cifar10-e16-wrn-16-1-at-wrn-16-2-s0', 11.0)
    write_log('cifar10-e16-wrn-16-1-kd-wrn-16-2-s0', 10.0, last=15)  # not finished
    status, out, _ = script(reproduce, 'table1 --rows 2 --epochs 16 --show')
    rows = {line.split(' | ')[1]: line for line in out.splitlines() if line.startswith('| WRN')}
    assert status == 0
    assert (
        rows['student alone'] == '| WRN-16-1 <- WRN-16-2 | student alone | 12.50 | 12.00 to 13.00 | 3 | 8.77 | +3.73 |'
    )
    assert rows['AT'] == '| WRN-16-1 <- WRN-16-2 | AT | 11.00 |  | 1 | 7.93 | +3.07 |'
    assert rows['KD'] == '| WRN-16-1 <- WRN-16-2 | KD | not run |  |  | 7.41 |  |'
    assert list(rows) == ['teacher', 'student alone', 'AT', 'F-ActT', 'KD', 'AT+KD']
    assert 'bfloat16, last epoch, tested on 9,980 of 10,000 images' in out


def test_the_table_is_written_between_its_markers_alone(script, tmp_path):
    write_log('cifar10-e16-wrn-16-1-s0', 12.0)
    (tmp_path / 'a.md').write_text('before\n<!-- table1 -->\nold\n<!-- /table1 -->\nafter\n')
    assert script(reproduce, 'table1 --rows 2 --epochs 16 --show --markdown a.md')[0] == 0
    text = (tmp_path / 'a.md').read_text()
    assert text.startswith('before\n<!-- table1 -->\n| student') and text.endswith('\n<!-- /table1 -->\nafter\n')
    assert 'old' not in text and '| 12.00 |' in text
    (tmp_path / 'b.md').write_text('no markers')
    assert refused(script(reproduce, 'table1 --show --markdown b.md'), 'b.md has no lines <!-- table1 -->')
    assert refused(script(reproduce, 'table1 --show --markdown nowhere.md'), 'nowhere.md')


@pytest.mark.parametrize(
    'flags',
    [
        'table9',
        'table1 --rows 5',
        'table2 --methods kd',
        'demo --jobs 0',
        'table1 --rows x',
        'table1 --methods at,foo',
        'demo --epochs 0',
    ],
)
def test_wrong_flags_are_refused(script, flags):
    assert refused(script(reproduce, flags))


def test_a_failed_run_is_reported_and_the_others_go_on(script):
    status, out, _ = script(reproduce, 'demo --methods teacher,student,kd --epochs 1 --holdout 1000 --jobs 2')
    assert status == 1 and out.count('failed: exit status 2: cifar.py: error: --holdout 1000') == 2
    assert '| WRN-16-1 <- WRN-16-2 | teacher | not run' in out
    assert 'failed: its teacher digits-holdout1000-e1-wrn-16-2-s0 is not trained' in out


def test_several_runs_at_a_time_end_as_one_after_the_other(script):
    flags = 'demo --methods student --epochs 1 --holdout 936 --seeds 2'
    status, out, _ = script(reproduce, flags, '--jobs 2')
    assert status == 0 and len(re.findall(r'-s[01]: \d+\.\d\d% test error', out)) == 2
    (several,) = engine.read_log('logs/digits-holdout936-e1-wrn-16-1-s1/log.txt')
    os.rename('logs/digits-holdout936-e1-wrn-16-1-s1', 'elsewhere')
    status, out, _ = script(reproduce, flags)
    assert status == 0 and out.count(': done') == 1
    (alone,) = engine.read_log('logs/digits-holdout936-e1-wrn-16-1-s1/log.txt')
    assert alone['train_loss'] == pytest.approx(several['train_loss'], rel=1e-3)  # other threads, other rounding


def test_a_run_of_other_settings_is_refused_and_left_alone(script):
    for name, changed in (('digits-e1-wrn-16-1-s0', {'beta': 5.0}), ('digits-e1-wrn-16-2-s0', {'batch_size': 32})):
        write_log(name, 12.0, epochs=1, last=1)
        log = pathlib.Path('logs', name, 'log.txt')
        log.write_text(f'json_stats: {json.dumps({**engine.read_log(log)[0], "dataset": "digits", **changed})}\n')
    status, out, _ = script(reproduce, 'demo --methods teacher,student --epochs 1')
    assert status == 1 and out.count('holds a run of other settings') == 2
    assert 'beta 5.0, not 0' in out and 'batch_size 32, not 64' in out


def test_the_readme_shows_what_the_published_logs_say(script, monkeypatch):
    command = re.search(r'table: .*\n\t\S+ reproduce.py (.*) --markdown README.md', (ROOT / 'Makefile').read_text())[1]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr('sys.argv', ['reproduce.py', *command.split()])
    lines = reproduce.table_lines(reproduce.parse())
    shown = re.search(r'<!-- table1 -->\n(.*)\n<!-- /table1 -->', (ROOT / 'README.md').read_text(), re.S)[1]
    assert shown == '\n'.join(lines)


@pytest.mark.parametrize('log', sorted((ROOT / 'logs').glob('*/log.txt')), ids=lambda path: path.parent.name)
def test_published_logs_are_whole_and_name_no_place(log):
    records = engine.read_log(log)
    assert [r['epoch'] for r in records] == list(range(1, records[-1]['epochs'] + 1))
    assert not any(isinstance(v, str) and v.startswith('/') for r in records for v in r.values())
    assert all(r['commit'] and not r['commit'].endswith('-dirty') for r in records)
