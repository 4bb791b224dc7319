"""The tables are made from logs only, and the README shows what the published logs say."""

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

import cifar
import reproduce
import resnet
from engine import transfer
from engine.flags import parse_cifar
from engine.log import read_log
from engine.loop import Run
from engine.step import seconds_a_step
from engine.student import Network

ROOT = pathlib.Path(reproduce.__file__).parent
RECORD = {
    'dataset': 'CIFAR10', 'train_images': 50_000, 'test_images': 9_980, 'holdout': 0, 'epochs': 16, 'dtype': 'bfloat16',
    'lr_decay_ratio': 0.2, 'epoch_step': '[5,10,13]', 'batch_size': 128, 'device': 'a machine', 'torch': '2',
}  # fmt: skip


def write_log(name, error, epochs=16, last=16, **more):
    folder = pathlib.Path('logs') / name
    folder.mkdir(parents=True)
    steps = json.dumps([round(epochs * part) for part in (0.3, 0.6, 0.8)], separators=(',', ':'))
    records = [
        {**RECORD, 'epoch_step': steps, **more, 'epochs': epochs, 'epoch': e, 'test_acc': 100 - error - (last - e)}
        for e in range(1, last + 1)
    ]
    (folder / 'log.txt').write_text(''.join(f'json_stats: {json.dumps(r)}\n' for r in records))


@pytest.fixture
def fast(monkeypatch):
    """Make every step take 0.01 s, without measuring it."""
    monkeypatch.setattr(reproduce, 'seconds_a_step', lambda *_: 0.01)


def test_dry_run_prints_the_commands_teachers_first_and_each_once(script, fast):
    status, out, _ = script(reproduce, 'table1 --dry_run --seeds 2 --dataroot there')
    *lines, last = out.splitlines()
    assert status == 0 and len(lines) == len(set(lines)) == 2 * (6 + 4 * 4)  # WRN-16-1 and WRN-16-2 appear twice
    assert (
        last
        == f'# 44 runs, about {44 * 200 * 391 * 0.01 / 3600:.1f} hours here, one after the other ({reproduce.MEASURED})'
    )
    assert all(line.startswith('python cifar.py --dataset CIFAR10 --dataroot there --epochs 200') for line in lines)
    assert all('[60,120,160]' in line for line in lines)
    saved = [re.search(r'--save logs/(\S+)', line)[1] for line in lines]
    for i, line in enumerate(lines):
        teacher = re.search(r'--teacher_id (\S+)', line)
        assert teacher is None or teacher[1] in saved[:i] and teacher[1].endswith('-s0')
    assert sum('--beta 1e+3' in line for line in lines) == sum('--alpha 0.9' in line for line in lines) == 16
    assert [sum(flag in line for line in lines) for flag in ('--beta_decay linear', '--transfer full')] == [16, 8]
    assert sum('--net nin --width 0.4375' in line for line in lines) == 10


@pytest.mark.parametrize(
    'name, runs',
    [
        ('table1', 6 + 4 * 4),
        ('table2', 2 + 7),
        ('table3', 2 + 2 + 3),
        ('tuning', 2 + 9),
        ('controls', 5),
        ('crd', 7),
        ('demo', 5),
    ],
)
def test_every_table_is_made_of_commands_that_are_understood(script, fast, name, runs):
    """Table 3 has NINs without batch norm and weight decay, and its images are only mirrored."""
    _, out, _ = script(reproduce, name, '--dry_run --seeds 1')
    lines = out.splitlines()[:-1]
    assert len(lines) == runs
    for line in lines:
        opt = parse_cifar('', shlex.split(line[line.index('--') :]))
        if name == 'crd':
            assert opt.dataset == 'CIFAR100' and (opt.epochs, opt.epoch_step) == (240, '[151,181,211]')
            assert (opt.lr, opt.lr_decay_ratio, opt.batch_size, opt.keep_momentum) == (0.05, 0.1, 64, True)
            assert opt.alpha in (0, 0.9) and opt.beta in (0, 1000) and opt.temperature == 4
        assert (opt.epochs, opt.holdout) == (16, 5000) if name == 'tuning' else not opt.holdout
        if name == 'demo':
            assert (opt.image_size, opt.randomcrop_pad, opt.batch_size, opt.epoch_step) == (8, 1, 32, '[6,12,16]')
        elif name == 'table3':
            assert opt.no_bn and opt.weight_decay == opt.randomcrop_pad == 0
        else:
            assert not opt.no_bn and opt.weight_decay == 5e-4 and opt.randomcrop_pad == 4


def test_methods_are_tuned_on_equally_many_weights_with_a_teacher_of_the_same_images(script, fast):
    _, out, _ = script(reproduce, 'tuning --dry_run')
    runs = [parse_cifar('', shlex.split(line)[2:]) for line in out.splitlines()[:-1]]
    betas = {}
    for opt in runs[2:]:
        betas.setdefault((opt.transfer, opt.beta_decay), []).append(opt.beta)
        assert opt.teacher_id == 'cifar10-holdout5000-e16/wrn-16-2-s0' and f'beta{opt.beta:.0f}-' in opt.save
    assert betas == {
        ('activation', 'none'): [300, 1000, 3000],
        ('full', 'linear'): [30_000, 100_000, 300_000],
        ('full', 'none'): [30_000, 100_000, 300_000],
    }
    _, out, _ = script(reproduce, 'tuning --show --all')
    assert '| AT, beta 1,000 |' in out and '| F-ActT, constant beta 30,000 |' in out


def test_the_teacher_of_one_seed_is_enough_to_teach(script, fast):
    _, out, _ = script(reproduce, 'table1 --rows 2 --methods at --seeds 3 --dry_run')
    assert out.count('cifar.py') == 1 + 3


def test_the_schedule_scales_with_the_epochs(script, fast):
    _, out, _ = script(reproduce, 'table1 --rows 2 --methods student --epochs 16 --seeds 1 --dtype bfloat16 --dry_run')
    assert out.splitlines()[0] == (
        "python cifar.py --dataset CIFAR10 --dataroot . --epochs 16 --epoch_step '[5,10,13]' --dtype bfloat16 "
        '--depth 16 --width 1 --seed 0 --save logs/cifar10-e16/wrn-16-1-s0 --resume auto'
    )
    graphs = '--compile --cuda_graphs --dry_run'
    _, out, _ = script(reproduce, f'table1 --rows 2 --methods student --epochs 16 --seeds 1 {graphs}')
    assert "--epoch_step '[5,10,13]' --compile --cuda_graphs --depth 16" in out.splitlines()[0]
    assert refused(script(reproduce, 'table1 --cuda_graphs --dry_run'), '--cuda_graphs goes with --compile')


def test_the_time_is_that_of_real_steps(script):
    write_log('digits-e2/wrn-16-2-s0', 10.0, epochs=2, last=2)
    status, out, _ = script(reproduce, 'demo --methods at --epochs 2 --seeds 1 --dry_run')
    hours = float(re.search('# 1 runs, about (.*) hours here', out)[1])
    assert status == 0 and out.count('cifar.py') == 1 and 0 <= hours < 1
    assert '# logs/digits-e2/wrn-16-2-s0 holds a run with other settings' in out
    opt = parse_cifar('', '--batch_size 8 --beta 1 --teacher_id x --transfer full --depth 10'.split())
    f, params = resnet.wide_resnet(10, 1, 10)
    g, fixed = resnet.wide_resnet(10, 2, 10)
    taught = partial(g, params={k: v.detach() for k, v in fixed.items()}, mode=False)
    before = params['conv0'].detach().clone()
    start = time.perf_counter()
    found = seconds_a_step(opt, Network(f, params), taught, torch.randn(8, 3, 32, 32), steps=3)
    assert 0 < 3 * found < 2 * (time.perf_counter() - start)
    assert not torch.equal(before, params['conv0']) and 'adapter.0' in params


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
        'table1 --show --dry_run',
        'table1 --dry_run --holdout 50000',
        'demo --markdown nowhere.md',
    ],
)
def test_wrong_flags_are_refused_before_any_run(script, tmp_path, flags):
    assert refused(script(reproduce, flags)) and not list(tmp_path.iterdir())


def test_a_broken_run_goes_on_and_several_at_a_time_end_as_one_after_the_other(script, fast, monkeypatch):
    flags = 'demo --methods student --epochs 2 --holdout 936 --seeds 2 --jobs 1'
    log = 'logs/digits-holdout936-e2/wrn-10-0.25-s1/log.txt'
    status, out, _ = script(reproduce, flags.replace('--jobs 1', '--jobs 2'))
    assert status == 0 and len(re.findall(r'-s[01]: \d+\.\d\d% test error', out)) == 2
    several = read_log(log)
    os.rename(os.path.dirname(log), 'elsewhere')

    command, _ = script(reproduce, flags, '--dry_run')[1].splitlines()
    keep = Run.keep_epoch

    def interrupted(run):
        keep(run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, 'keep_epoch', interrupted)
        assert script(cifar, shlex.split(command)[2:])[0] == 130
    (first,) = read_log(log)

    status, out, _ = script(reproduce, flags)
    assert status == 0 and out.count(': done') == 1
    alone = read_log(log)
    assert alone[0] == first and len(alone) == 2  # the first epoch was not repeated
    losses = [[record['train_loss'] for record in records] for records in (alone, several)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # other numbers of threads round differently


def test_a_run_of_other_settings_is_refused_and_left_alone(script):
    for name, changed in (('digits-e1/wrn-10-0.25-s0', {'beta': 5.0}), ('digits-e1/wrn-16-2-s0', {'batch_size': 64})):
        write_log(name, 12.0, epochs=1, last=1)
        log = pathlib.Path('logs', name, 'log.txt')
        log.write_text(f'json_stats: {json.dumps({**read_log(log)[0], "dataset": "digits", **changed})}\n')
    status, out, _ = script(reproduce, 'demo --methods teacher,student --epochs 1 --seeds 1')
    assert status == 1 and out.count('holds a run with other settings') == 2
    assert 'beta 5.0, not 0' in out and 'batch_size 64, not 32' in out


def test_a_published_run_that_named_its_teacher_without_a_folder_is_still_the_same_run(script, fast, monkeypatch):
    """Older logs call it cifar10-e16-wrn-16-2-s0; it is in logs/cifar10-e16/wrn-16-2-s0 now."""
    monkeypatch.chdir(ROOT)
    flags = 'table1 --rows 2 --methods at --epochs 16 --seeds 1 --dtype bfloat16 --dry_run'.split()
    monkeypatch.setattr('sys.argv', ['reproduce.py', *flags])
    opt = reproduce.parse()
    assert [reproduce.run(opt, *run, 0) for run in reproduce.commands(opt).items()] == ['done', 'done']


@pytest.mark.parametrize('more', ['', ' --cuda_graphs'])
def test_runs_with_and_without_cuda_graphs_make_one_table(monkeypatch, more):
    """They replay the compiled step. The published teacher had none, and its students had."""
    monkeypatch.chdir(ROOT)
    flags = f'table1 --rows 2 --methods teacher,student,at --seeds 3 --dtype bfloat16 --compile{more} --show'.split()
    monkeypatch.setattr('sys.argv', ['reproduce.py', *flags])
    opt = reproduce.parse()
    runs = {name: command for name, command in reproduce.commands(opt).items() if reproduce.last_epoch(opt, name)}
    assert len(runs) == 7 and {reproduce.run(opt, *run, 0) for run in runs.items()} == {'done'}


def test_a_new_transfer_is_a_method_of_the_tables(script, fast, monkeypatch):
    row = transfer.TRANSFERS['full']._replace(term='nst', label='NST', beta='7')
    monkeypatch.setitem(transfer.TRANSFERS, 'selectivity', row)
    _, out, _ = script(reproduce, 'table1 --rows 2 --methods at,nst --epochs 16 --seeds 1 --dry_run')
    assert '--transfer selectivity --beta 7' in out and 'logs/cifar10-e16/wrn-16-1-nst-wrn-16-2-s0' in out
    write_log('cifar10-e16/wrn-16-1-nst-wrn-16-2-s0', 11.0)
    _, out, _ = script(reproduce, 'table1 --rows 2 --methods at,nst --epochs 16 --seeds 1 --show')
    assert '| WRN-16-1 <- WRN-16-2 | NST | 11.00 |  | 0 |  |' in out


@pytest.mark.skipif(not (ROOT / 'data' / 'cifar-100-python').is_dir(), reason='data/cifar-100-python is not there')
def test_crd_trains_an_epoch_on_cifar_100(script):
    words = 'crd --rows 1 --methods student --seeds 1 --epochs 1 --dtype bfloat16 --dataroot'
    status, out, err = script(reproduce, words, [ROOT / 'data'])
    assert status == 0 and 'CIFAR100: trained on 50,000 images for 1 epochs (lr 0.05, ' in out, err
    assert read_log('logs/cifar100-e1/wrn-16-2-s0/log.txt')[0]['test_acc'] > 3  # 1 by chance


def test_crd_names_the_published_errors_as_such_and_its_rate(script):
    settings = {'epoch_step': '[151,181,211]', 'lr': 0.05, 'lr_decay_ratio': 0.1, 'batch_size': 64}
    for name in ('wrn-40-2-s0', 'wrn-16-2-s0', 'wrn-16-2-at-wrn-40-2-s0'):
        write_log(f'cifar100-e240/{name}', 25.0, epochs=240, last=1, **settings)
        path = pathlib.Path('logs', 'cifar100-e240', name, 'log.txt')
        (record,) = read_log(path)
        record |= {'epoch': 240, 'dataset': 'CIFAR100', 'lr_now': 5e-5, 'test_images': 10_000}
        path.write_text(f'json_stats: {json.dumps(record)}\n')
    _, out, _ = script(reproduce, 'crd --show --rows 1 --seeds 1')
    assert '| WRN-16-2 <- WRN-40-2 | AT | 25.00 |  | 0 | 25.92 | -0.92 |' in out and 'published, %' in out
    assert 'for 240 epochs (lr 0.05, times 0.1 at' in out and '3 of 4 cells were run' in out
