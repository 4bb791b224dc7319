"""Whole runs of cifar.py on real image files: what they log, save, refuse and resume from."""

import os
import re
import resource
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

TIMES = {'train_time', 'test_time', 'images_per_second', 'save', 'save_every', 'resume'}


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
    assert lines[0].startswith("parsed options: {'dataset': 'folder'")
    assert lines[1] == 'folder: 60 training and 21 test images'
    assert any(re.match(r'\s+0  conv0\s+16x3x3x3  float32', line) for line in lines)
    assert '5,891 trained parameters' in lines
    assert [bool(re.match(rf'epoch {e}/2  lr 0\.[012]+  train \S+ \S+%  test', lines[e - 5])) for e in (1, 2)] == [
        True
    ] * 2
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
    assert refused(train(again, '--resume auto'), 'log.txt has 6 epochs, but the checkpoint has 0', '--overwrite')
    assert open('logs/teacher/log.txt').read() == before
    shutil.move('elsewhere.pt7', 'logs/teacher/model.pt7')
    assert train(again, '--resume auto')[0] == 0


def test_resume_from_another_run_leaves_that_run_alone(train, teacher):
    before = open('logs/teacher/model.pt7', 'rb').read()
    assert train('--epochs 7 --epoch_step [4] --lr 0.05 --save logs/on --resume logs/teacher/model.pt7')[0] == 0
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


# ----------------------------------------------------------------------------------------------- refusals


def test_unusable_teachers_are_refused_and_nothing_is_written(train, script, teacher):
    student = '--epochs 1 --beta 1 --save logs/student --teacher_id'
    shutil.copytree('logs/teacher', 'logs/no_model')
    os.unlink('logs/no_model/model.pt7')
    shutil.copytree('logs/teacher', 'logs/no_log')
    os.unlink('logs/no_log/log.txt')
    shutil.copytree('logs/teacher', 'logs/wrong_log')
    text = open('logs/wrong_log/log.txt').read()
    open('logs/wrong_log/log.txt', 'w').write(text.replace('"depth": 10', '"depth": 16'))
    shutil.copytree('logs/teacher', 'logs/boaster')
    open('logs/boaster/log.txt', 'w').write(re.sub(r'"test_acc": [\d.]+', '"test_acc": 99.9', text))
    shutil.copytree('logs/teacher', 'logs/empty_log')
    open('logs/empty_log/log.txt', 'w').close()
    shutil.copytree('logs/teacher', 'logs/damaged')
    open('logs/damaged/model.pt7', 'w').write('nothing')
    assert refused(train(student, 'nobody'), '--teacher_id nobody: there is no logs/nobody/log.txt')
    assert refused(train(student, 'no_model'), 'there is no logs/no_model/model.pt7')
    assert refused(train(student, 'no_log'), 'there is no logs/no_log/log.txt')
    assert refused(train(student, 'empty_log'), 'has no line of results')
    assert refused(train(student, 'damaged'), 'logs/damaged/model.pt7 is not a checkpoint')
    assert refused(train(student, 'wrong_log'), 'is a WRN-10-0.25, but its log names a WRN-16-0.25')
    assert refused(train(student, 'boaster'), '99.90% by its own log')
    other = '--dataset digits --image_size 16 --depth 10 --width 0.25'
    for flags in ('--alpha 0.5', '--transfer gradient'):
        classes = '--teacher_id teacher has 3 output classes, the data set has 10', flags.split()[0]
        assert refused(script(cifar, other, student, 'teacher', flags), *classes)
    assert not os.path.exists('logs/student')


@pytest.mark.parametrize('flags, term', [('', 'at2'), ('--transfer full', 'full2'), ('--groups 2', 'at2')])
def test_a_teacher_of_other_classes_teaches_by_its_activations_and_is_not_tested(script, teacher, flags, term):
    student = '--dataset digits --image_size 16 --randomcrop_pad 2 --depth 10 --width 0.125 --epochs 1 --epoch_step []'
    status, out, err = script(cifar, student, '--beta 1 --teacher_id teacher --save logs/run', flags)
    assert status == 0, err
    said = 'teacher: --teacher_id teacher has 3 output classes, the data set has 10; its logits are not used, and its '
    assert out.count(said) == 1 and 'by its log' not in out
    assert term in logged('run')[0]


def test_a_teacher_is_named_by_run_folder_or_model(train, teacher, tmp_path):
    shutil.copytree('logs/teacher', 'elsewhere/run')
    names = 'teacher', 'teacher/', 'logs/teacher', 'logs/teacher/model.pt7', 'elsewhere/run', 'elsewhere/run/model.pt7'
    for name in (*names, tmp_path / 'elsewhere' / 'run', './elsewhere/../logs/teacher'):
        status, out, err = train('--epochs 1 --beta 1 --teacher_id', [name])
        assert status == 0 and '% by its log' in out, (name, err)
    os.chdir('elsewhere/run')
    assert train('--epochs 1 --beta 1 --teacher_id model.pt7')[0] == 0


def test_a_teacher_that_is_not_there_is_told_before_any_data_are_read(script, teacher):
    nowhere = '--dataset folder --dataroot nowhere --beta 1 --teacher_id'
    shutil.copytree('logs/teacher', 'logs/no_log')
    os.unlink('logs/no_log/log.txt')
    os.makedirs('logs/no_model')
    shutil.copy('logs/teacher/log.txt', 'logs/no_model')
    shutil.copy('logs/teacher/model.pt7', 'weights.pth')
    files = 'imagenet.py and finetune.py (--teacher_params)'
    for name, told in {
        'taecher': 'there is no logs/taecher/log.txt; logs holds teacher',
        'logs/teachr': 'there is no logs/teachr/log.txt; logs holds teacher',
        'logs/teachr/model.pt7': 'there is no logs/teachr/log.txt; logs holds teacher',
        'x': 'there is no logs/x/log.txt\n',
        'no_log': 'there is no logs/no_log/log.txt',
        'logs/no_log/model.pt7': 'there is no logs/no_log/log.txt',
        'no_model': 'there is no logs/no_model/model.pt7',
        'weights.pth': files,
        'torchvision:resnet34': files,
    }.items():
        assert refused(script(cifar, nowhere, name), f'--teacher_id {name}: ', told)
    assert refused(script(cifar, '--dataroot nowhere --resume on.pt7'), '--resume on.pt7: no such checkpoint')
    named = script(cifar, '--teacher_params weights.pth')
    assert refused(named, '(here a teacher is named with --teacher_id)')


def test_unusable_data_is_refused_and_nothing_is_written(script, tmp_path):
    (tmp_path / 'empty').mkdir()
    assert refused(script(cifar, '--dataset folder --dataroot nowhere --save logs/run'), 'nowhere: no such folder')
    assert refused(script(cifar, '--dataset folder --dataroot empty --save logs/run'), "no folder 'train'")
    (tmp_path / 'empty' / 'cifar-10-batches-bin').mkdir()
    assert refused(script(cifar, '--dataroot empty --save logs/run'), 'data_batch_1.bin is missing')
    assert not os.path.exists('logs')


def test_unusable_checkpoints_are_refused(train, script, teacher):
    again = '--epochs 8 --epoch_step [4] --lr 0.05 --save logs/run --resume'
    open('broken.pt7', 'wb').write(open('logs/teacher/model.pt7', 'rb').read()[:5000])
    assert refused(train(again, 'broken.pt7'), 'broken.pt7 is not a checkpoint, or is damaged')
    assert refused(train(again, 'nowhere.pt7'), 'no such checkpoint')
    assert refused(train(again, 'logs/teacher/model.pt7 --depth 16'), 'does not fit the network')
    assert script(checkpoint, 'slim logs/teacher')[0] == 0
    assert refused(train(again, 'logs/teacher/model.pt7'), 'it can teach, but not be resumed')
    assert not os.path.exists('logs/run')
    assert train('--epochs 1 --beta 1 --teacher_id teacher')[0] == 0  # it can teach


def test_a_group_that_is_not_there_is_refused(train, teacher):
    assert refused(train('--epochs 1 --beta 1 --teacher_id teacher --groups 3'), 'the network has groups 0 to 2')


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_terms(train):
    status, _, err = train('--epochs 3 --lr 1e30 --save logs/run')
    assert status == 1 and err.count('\n') == 1
    assert re.search(r'epoch 1, step 2: the loss is not finite \(loss \S+, ce \S+\); try a lower --lr', err)
    assert not os.path.exists('logs/run/model.pt7')


@pytest.mark.parametrize(
    'flags, where',
    [
        ('--dtype float', 'epoch 7: the test loss is not finite (nan)'),
        ('--save_every 1e-9', 'epoch 7, step 1: the output of the network became infinite or NaN'),
        ('--lr 1e30 --weight_decay 1e30 --save_every 1e-9', 'epoch 7, step 1: conv0 and '),
        ('--lr 1e30 --weight_decay 1e30', 'epoch 7'),
    ],
)
def test_a_run_that_the_last_update_of_an_epoch_spoils_fails_and_replaces_nothing(train, teacher, flags, where):
    """No loss after that update shows it, since the epoch has a single step."""
    one_step = '--batch_size 60 --lr 1e20 --epochs 7 --epoch_step [4] --save logs/run --resume auto'
    shutil.copytree('logs/teacher', 'logs/run')
    before = {name: open(f'logs/run/{name}', 'rb').read() for name in ('model.pt7', 'log.txt')}
    status, _, err = train(one_step, flags)
    assert (status, err.count('\n')) == (1, 1), err
    assert where in err and 'try a lower --lr' in err
    assert before == {name: open(f'logs/run/{name}', 'rb').read() for name in before}


def test_float16_gradients_that_are_infinite_at_every_scale_end_a_run_of_short_epochs_too(train, teacher):
    status, _, err = train('--epochs 60 --dtype half --teacher_id teacher --beta 1e30 --lr 0.01')
    assert (status, err.count('\n')) == (1, 1) and 'the gradients in float16 are not finite at any scale' in err, err


def test_no_space_left_stops_the_run_and_leaves_its_last_checkpoint_whole(train, teacher):
    before = open('logs/teacher/model.pt7', 'rb').read()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # from here on the system refuses longer files
    try:
        status, _, err = train('--epochs 8 --epoch_step [4] --lr 0.05 --save logs/teacher --resume auto')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1 and err.count('\n') == 1
    assert 'logs/teacher/model.pt7 could not be written: ' in err and 'the old file is unchanged' in err
    assert open('logs/teacher/model.pt7', 'rb').read() == before
    assert sorted(os.listdir('logs/teacher')) == ['log.txt', 'model.pt7']
    assert train('--epochs 8 --epoch_step [4] --lr 0.05 --save logs/teacher --resume auto')[0] == 0
    assert [r['epoch'] for r in logged('teacher')] == list(range(1, 9))


def test_without_save_nothing_is_kept(train, tmp_path):
    status, out, _ = train('--epochs 1')
    assert status == 0 and 'without --save' in out and not list(tmp_path.iterdir())


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
    assert (records[-1]['test_acc'] * 21 / 100) % 1 == pytest.approx(0, abs=1e-6)
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
