"""Whole runs of cifar.py on real image files: what they log, save, refuse and resume from."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import SMALL, refused

import checkpoint
import cifar
import nin
from engine.log import line_of, read_log
from engine.loop import Run
from formats import networks, write

TIMES = {'train_time', 'test_time', 'images_per_second', 'save', 'save_every', 'resume', 'commit'}


def logged(run):
    """The lines of a run's log, without values that differ between two equal runs."""
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_log(f'logs/{run}/log.txt')]


def weights(run):
    state = networks.load(f'logs/{run}/model.pt7')
    return {
        **state['params'],
        **{f'momentum {i}': v['momentum_buffer'] for i, v in state['optimizer']['state'].items()},
    }


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def teacher(train):
    assert train('--epochs 6 --epoch_step [4] --lr 0.05 --save logs/teacher')[0] == 0


def test_a_teacher_learns_and_what_a_run_writes_is_complete(teacher):
    assert sorted(os.listdir('logs/teacher')) == ['log.txt', 'model.pt7']
    records = read_log('logs/teacher/log.txt')
    assert [r['epoch'] for r in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1]['train_acc'] > 60 and records[-1]['test_acc'] > 60  # 33 by chance
    fields = 'train_loss train_acc test_loss test_acc train_time test_time at_losses n_parameters num_classes'
    ours = 'ce lr beta_now images_per_second seed torch device commit train_images test_images'
    flags = 'depth width dataset dataroot teacher_id batch_size epochs epoch_step weight_decay temperature alpha beta'
    assert set(f'{fields} {ours} {flags}'.split()) <= set(records[0])
    assert records[0]['n_parameters'] == sum(v.numel() for k, v in weights('teacher').items() if k.startswith('mom'))
    assert not any(k.startswith(('student', 'teacher')) for k in weights('teacher'))


def test_at_kd_and_both_learn_from_a_teacher_and_log_their_terms(train, teacher):
    for name, flags, terms in (
        ('at', '--beta 1000', ['ce', 'at0', 'at1', 'at2']),
        ('kd', '--alpha 0.9', ['ce', 'kd']),
        ('both', '--beta 1000 --alpha 0.9 --beta_decay linear --groups 1,2', ['ce', 'kd', 'at1', 'at2']),
        ('paper', '--beta 10 --at_form paper --mapping max --power 1', ['ce', 'at0', 'at1', 'at2']),
    ):
        status, out, err = train(
            '--epochs 2 --teacher_id teacher --epoch_step [] --lr 0.05', flags, f'--save logs/{name}'
        )
        assert status == 0, err
        first, last = read_log(f'logs/{name}/log.txt')
        assert [k for k in last if k in ('ce', 'kd') or re.fullmatch(r'at\d', k)] == terms
        assert last['train_loss'] < first['train_loss']
        expected = {'ce': 1 - last['alpha'], 'kd': last['alpha']}
        total = sum(expected.get(k, last['beta_now']) * last[k] for k in terms)
        assert last['train_loss'] == pytest.approx(total, rel=1e-5)
        assert [m for m, _ in last['at_losses']] == [last[k] for k in terms if k.startswith('at')]
        assert re.search(r'teacher: (\S+)% on the test images, \1% by its log', out)
        if name == 'at':
            assert 'at0: beta 1000 weights each element of the 16x16 maps by 0.2441' in out
            assert 'at2: beta 1000 weights each element of the 4x4 maps by 3.906' in out


NIN = '--net nin --width 0.125 --lr 0.02 --epoch_step []'


@pytest.fixture
def nin_teacher(train):
    assert train(NIN, '--epochs 3 --save logs/teacher')[0] == 0


def test_a_network_in_network_learns_and_teaches_in_every_way(train, nin_teacher):
    accuracy = read_log('logs/teacher/log.txt')[-1]['test_acc']
    assert read_log('logs/teacher/log.txt')[-1]['depth'] is None and accuracy > 50  # 33 by chance
    for name, flags, terms in (
        ('full', '--transfer full --beta 1000 --beta_decay cosine', ['ce', 'full0', 'full1', 'full2']),
        ('gradient', '--transfer gradient --beta 1', ['ce', 'grad']),
        (
            'both',
            '--transfer gradient --beta 1 --alpha 0.5 --penalty symmetry --gamma 2',
            ['ce', 'kd', 'grad', 'symmetry'],
        ),
        ('alone', '--penalty min_l2 --gamma 2 --no_bn --weight_decay 0 --randomcrop_pad 0', ['ce', 'min_l2']),
    ):
        teacher = '' if name == 'alone' else '--teacher_id teacher'
        status, out, err = train(NIN, '--width 0.0625 --epochs 2', teacher, flags, f'--save logs/{name}')
        assert status == 0, err
        record = read_log(f'logs/{name}/log.txt')[-1]
        assert [k for k in record if k in 'ce kd grad symmetry min_l2' or re.fullmatch(r'(at|full)\d', k)] == terms
        weight = {'ce': 1 - record['alpha'], 'kd': record['alpha'], record['penalty']: record['gamma']}
        total = sum(weight.get(k, record['beta_now']) * record[k] for k in terms)
        assert record['train_loss'] == pytest.approx(total, rel=1e-5)


def test_adapters_are_resumed_but_are_no_part_of_the_student(train, nin_teacher):
    flags = f'{NIN} --width 0.0625 --teacher_id teacher --transfer full --beta 1000'
    assert train(flags, '--epochs 2 --save logs/whole')[0] == 0
    assert train(flags, '--epochs 1 --save logs/part')[0] == 0
    assert train(flags, '--epochs 2 --save logs/part --resume auto')[0] == 0
    assert same_weights('part', 'whole') and 'adapter.2' in weights('whole')
    assert logged('whole')[0]['n_parameters'] == sum(
        v.numel() for v in nin.nin(0.0625, 3)[1].values() if v.requires_grad
    )
    checkpoint.slim('logs/whole')
    assert not any('adapter' in k for k in networks.load('logs/whole/model.pt7')['params'])
    assert train(NIN, '--width 0.0625 --teacher_id part --alpha 0.9 --epochs 1 --save logs/next')[0] == 0


def test_what_one_sees_is_readable_without_a_terminal(train):
    status, out, err = train('--epochs 2 --epoch_step [2] --save logs/run')
    assert (status, err) == (0, '') and '\r' not in out and '\x1b' not in out
    lines = out.splitlines()
    assert lines[0] == 'parsed options:' and lines[1].startswith("  dataset='folder'  dataroot=")
    assert lines.count('folder: 60 training and 21 test images') == lines.count('5,891 trained parameters') == 1
    assert 'conv0' not in out and max(map(len, lines)) < 160
    table = train('--epochs 1 --verbose')[1].splitlines()
    assert any(re.match(r'\s+0  conv0\s+16x3x3x3  float32', line) for line in table)
    for epoch in (1, 2):
        assert re.match(rf'epoch {epoch}/2  lr 0\.[012]+  train loss \S+ acc \S+%  test loss', lines[epoch - 5])
    assert lines[-2:] == ['log: logs/run/log.txt', 'model: logs/run/model.pt7']


@pytest.mark.parametrize('dtype', ['float', 'bfloat16', 'half', 'double'])
def test_every_dtype_trains_and_keeps_its_parameters_precise(train, dtype):
    assert train('--epochs 2 --epoch_step [] --lr 0.05 --save logs/run', '--dtype', dtype)[0] == 0
    first, last = read_log('logs/run/log.txt')
    assert last['train_loss'] < first['train_loss']
    expected = torch.float64 if dtype == 'double' else torch.float32
    assert {v.dtype for v in weights('run').values()} == {expected}


def test_dtypes_agree_on_the_first_epoch(train):
    losses = {}
    for dtype in ('float', 'double', 'bfloat16', 'half'):
        assert train('--epochs 1 --lr 0.01 --save', f'logs/{dtype} --dtype {dtype}')[0] == 0
        losses[dtype] = read_log(f'logs/{dtype}/log.txt')[0]['train_loss']
    assert losses['float'] == pytest.approx(losses['double'], rel=1e-5)
    assert losses['half'] == pytest.approx(losses['double'], rel=1e-2)
    assert losses['bfloat16'] == pytest.approx(losses['double'], rel=2e-2)


@pytest.mark.parametrize('capability', ['AVX2', 'AVX512'])
@pytest.mark.parametrize('dtype', ['bfloat16', 'half', 'float'])
def test_a_note_says_where_16_bits_are_slow(train, monkeypatch, dtype, capability):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    status, out, err = train('--epochs 1 --dtype', dtype)
    assert status == 0 and (f'faster than {dtype}' in out) == (dtype != 'float' and capability == 'AVX2'), err


# ----------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize('dtype', ['float', 'bfloat16'])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(train, teacher, monkeypatch, dtype):
    flags = (
        f'--epochs 4 --epoch_step [2,4] --teacher_id teacher --alpha 0.5 --beta 100 --beta_decay linear --dtype {dtype}'
    )
    assert train(flags, '--save logs/whole --resume auto')[0] == 0
    keep = Run.keep_epoch
    for stop in (1, 2, 3):

        def interrupted(run, stop=stop):
            keep(run)
            if run.epoch == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(Run, 'keep_epoch', interrupted)
        status, _, err = train(flags, f'--save logs/part{stop} --resume auto')
        assert status == 130 and err == 'cifar.py: error: interrupted\n'
        monkeypatch.setattr(Run, 'keep_epoch', keep)
        with open(f'logs/part{stop}/log.txt', 'a') as log:  # as after a kill between log and checkpoint
            log.write(line_of({**logged('whole')[-1], 'epoch': stop + 1}) + 'json_stats: {"dep')
        status, out, _ = train(flags, f'--save logs/part{stop} --resume auto')
        assert status == 0 and f'after epoch {stop}' in out
        assert logged(f'part{stop}') == logged('whole')
        assert same_weights(f'part{stop}', 'whole')


def test_resume_of_a_finished_run_changes_nothing(train, teacher):
    before = os.stat('logs/teacher/model.pt7').st_mtime_ns, open('logs/teacher/log.txt').read()
    status, out, _ = train('--epochs 6 --epoch_step [4] --lr 0.05 --save logs/teacher --resume auto')
    assert status == 0 and 'nothing to do: 6 of 6 epochs are done' in out
    assert before == (os.stat('logs/teacher/model.pt7').st_mtime_ns, open('logs/teacher/log.txt').read())


def test_a_log_of_more_epochs_than_the_checkpoint_is_not_cut_silently(train, teacher):
    before = open('logs/teacher/log.txt').read()
    shutil.move('logs/teacher/model.pt7', 'elsewhere.pt7')
    again = '--epochs 6 --epoch_step [4] --lr 0.05 --save logs/teacher'
    assert refused(train(again, '--resume auto'), 'log.txt has 6 epochs, but there is no model.pt7', '--overwrite')
    assert open('logs/teacher/log.txt').read() == before
    shutil.move('elsewhere.pt7', 'logs/teacher/model.pt7')
    assert train(again, '--resume auto')[0] == 0


def test_resume_from_another_run_leaves_that_run_alone(train, teacher):
    before = open('logs/teacher/model.pt7', 'rb').read()
    status, out, err = train('--epochs 7 --epoch_step [4] --lr 0.03 --save logs/on --resume logs/teacher/model.pt7')
    assert status == 0 and 'note: logs/teacher/model.pt7 has other settings (epochs 6, not 7; lr 0.05, not 0.03)' in out
    assert [r['epoch'] for r in logged('on')] == [7]
    assert open('logs/teacher/model.pt7', 'rb').read() == before


def test_a_run_is_not_overwritten_unless_one_says_so(train, teacher):
    before = open('logs/teacher/log.txt').read(), open('logs/teacher/model.pt7', 'rb').read()
    assert refused(
        train('--save logs/teacher --epochs 6 --lr 0.02 --epoch_step [4]'), 'lr 0.05, not 0.02', '--overwrite'
    )
    assert refused(train('--save logs/teacher --epochs 6 --lr 0.05 --epoch_step [4]'), 'holds a run:', '--resume auto')
    assert before == (open('logs/teacher/log.txt').read(), open('logs/teacher/model.pt7', 'rb').read())
    status, out, _ = train('--save logs/teacher --epochs 7 --lr 0.05 --epoch_step [4] --resume auto')
    assert status == 0 and 'epochs 6, not 7' in out and len(logged('teacher')) == 7
    assert train('--save logs/teacher --epochs 1 --lr 0.02 --overwrite')[0] == 0
    assert [r['lr'] for r in logged('teacher')] == [0.02]


# ----------------------------------------------------------------------------------------- several processes


def run_real(photos, *words, **more):
    command = [sys.executable, cifar.__file__, *SMALL.split(), '--dataroot', str(photos), *words]
    return subprocess.run(command, capture_output=True, text=True, **more)


def test_two_workers_write_one_log_and_test_every_image_once(photos, tmp_path):
    words = '--epochs 2 --epoch_step [2] --lr 0.02 --save logs/two --ngpu 2'.split()
    done = run_real(photos, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('parsed options') == 1 and done.stdout.count('epoch 1/2') == 1
    records = read_log(tmp_path / 'logs' / 'two' / 'log.txt')
    assert [r['epoch'] for r in records] == [1, 2] and records[0]['workers'] == 2
    assert records[-1]['test_acc'] * 21 / 100 == pytest.approx(round(records[-1]['test_acc'] * 21 / 100))
    state = networks.load(tmp_path / 'logs' / 'two' / 'model.pt7')
    assert not any('/' in key for key in state['params'])


def test_bad_input_to_several_workers_is_still_one_line_and_status_2(tmp_path):
    done = run_real('nowhere', '--ngpu', '2', cwd=tmp_path)
    assert refused((done.returncode, done.stdout, done.stderr), 'nowhere: no such folder')


def test_more_workers_than_the_machine_has_are_refused(script):
    assert refused(script(cifar, '--dataset digits --ngpu 999 --batch_size 1000'), '--ngpu 999: there are')


def test_a_checkpoint_of_before_with_momentum_by_name_is_resumed_bit_for_bit(train):
    """Older checkpoints have {name: momentum} instead of the optimizer's state_dict, and no scaler."""
    flags = '--epochs 2 --epoch_step [] --lr 0.05 --save'
    assert train(flags, 'logs/whole')[0] == 0
    assert train('--epochs 1 --epoch_step [] --lr 0.05 --save logs/old')[0] == 0
    state = networks.load('logs/old/model.pt7')
    trained = [k for k in state['params'] if 'running' not in k]
    momentum = state['optimizer']['state']
    state['optimizer'] = {k: momentum[i]['momentum_buffer'] for i, k in enumerate(trained)}
    del state['scaler']
    write.save('logs/old/model.pt7', state)
    status, out, err = train(flags, 'logs/old --resume auto')
    assert status == 0 and 'after epoch 1' in out, err
    assert logged('old')[-1] == logged('whole')[-1] and same_weights('old', 'whole')


def test_another_optimizer_is_resumed_bit_for_bit_too(train, monkeypatch):
    """As CONTRIBUTING.md says. AdamW has a scalar in its state, besides tensors like the parameters."""
    flags, sgd = '--epochs 2 --epoch_step [] --lr 0.01 --save', torch.optim.SGD
    assert train('--epochs 1 --save logs/sgd')[0] == 0
    monkeypatch.setattr(torch.optim, 'SGD', lambda trained, lr, **_: torch.optim.AdamW(trained, lr))
    assert train(flags, 'logs/whole')[0] == 0
    assert train('--epochs 1 --epoch_step [] --lr 0.01 --save logs/part')[0] == 0
    assert train(flags, 'logs/part --resume auto')[0] == 0
    whole, part = (networks.load(f'logs/{run}/model.pt7') for run in ('whole', 'part'))
    assert logged('part')[-1] == logged('whole')[-1]
    assert set(whole['optimizer']['state'][0]) == {'step', 'exp_avg', 'exp_avg_sq'}
    for i, state in whole['optimizer']['state'].items():
        assert all(torch.equal(value, part['optimizer']['state'][i][key]) for key, value in state.items())
    assert refused(train(flags, 'logs/sgd --resume auto'), 'its optimizer or epoch does not fit')
    monkeypatch.setattr(torch.optim, 'SGD', sgd)
    assert refused(train('--epochs 3 --lr 0.01 --save logs/whole --resume auto'), 'its optimizer or epoch')
