"""What cifar.py refuses, and how a run that fails ends: one line, and nothing is lost."""

import errno
import os
import pathlib
import re
import resource
import shutil

import pytest
from conftest import SMALL, refused
from test_cifar import logged, teacher  # noqa: F401

import checkpoint
import cifar
import imagenet
from engine import log
from engine.teacher import check_accuracy


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
    assert refused(train(student, 'no_model'), 'there is no logs/no_model/model.pt7; the run has its log alone')
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


def test_a_teacher_is_held_against_its_log_on_the_same_images_alone(script, teacher, photos, tmp_path):
    log = pathlib.Path('logs/teacher/log.txt')
    log.write_text(re.sub(r'"test_acc": [\d.]+', '"test_acc": 99.9', log.read_text()))
    shutil.copytree(photos, 'other')
    student = f'{SMALL} --epochs 1 --epoch_step [] --teacher_id teacher --beta 1 --dataroot'
    assert refused(script(cifar, student, [photos]), '99.90% by its own log')
    status, out, err = script(cifar, student, 'other')
    assert status == 0 and 'its log has no accuracy on the same ones' in out, err
    log.write_text(log.read_text().replace(str(photos), str(tmp_path / 'other')))
    assert refused(script(cifar, student, 'other'), '99.90% by its own log')
    os.unlink('other/test/ant/0.png')
    assert script(cifar, student, 'other')[0] == 0


@pytest.mark.parametrize('images, allowed', [(797, 1.7), (9_980, 0.5), (50_000, 0.5)])
def test_a_teacher_may_differ_from_its_log_by_what_rounding_does(images, allowed):
    check_accuracy({'test_acc': 56.0}, 56 - allowed, images)
    for accuracy in (56 - allowed - 0.1, 56 + allowed + 0.1, float('nan')):
        with pytest.raises(ValueError, match='by its own log'):
            check_accuracy({'test_acc': 56.0}, accuracy, images)


@pytest.mark.parametrize('flags, term', [('', 'at2'), ('--transfer full', 'full2'), ('--groups 2', 'at2')])
def test_a_teacher_of_other_classes_teaches_by_its_activations_and_is_not_tested(script, teacher, flags, term):
    student = '--dataset digits --image_size 16 --randomcrop_pad 2 --depth 10 --width 0.125 --epochs 1 --epoch_step []'
    status, out, err = script(cifar, student, '--beta 1 --teacher_id teacher --save logs/run', flags)
    assert status == 0, err
    said = 'teacher: --teacher_id teacher has 3 output classes, the data set has 10; its logits are not used, and its '
    assert out.count(said) == 1 and 'by its log' not in out
    assert term in logged('run')[0]


def test_a_teacher_is_not_replaced_by_its_student(train, teacher):
    before = open('logs/teacher/model.pt7', 'rb').read()
    for name in ('teacher', './logs/teacher', 'logs/teacher/model.pt7'):
        for how in ('--overwrite', '--resume auto'):
            said = train(f'--epochs 7 --save logs/teacher --beta 1 --teacher_id {name} {how}')
            assert refused(said, f'--teacher_id {name} is the run in --save logs/teacher', 'save elsewhere')
    assert open('logs/teacher/model.pt7', 'rb').read() == before


def test_a_resume_needs_the_adapters_of_the_checkpoint(train, teacher):
    words = '--width 0.5 --beta 1 --teacher_id teacher --save logs/run'
    assert train(words, '--epochs 1 --transfer full')[0] == 0
    said = train(words, '--epochs 2 --resume auto')
    assert refused(said, 'has other adapters: go on with the same --transfer, --groups and teacher')


def test_a_teacher_is_named_by_run_folder_or_model(train, teacher, tmp_path):
    shutil.copytree('logs/teacher', 'elsewhere/run')
    names = 'teacher', 'teacher/', 'logs/teacher', 'logs/teacher/model.pt7', 'elsewhere/run', 'elsewhere/run/model.pt7'
    names += 'logs/teacher/log.txt', './elsewhere/run/log.txt'
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
    assert train('--epochs 1 --beta 1 --teacher_id teacher')[0] == 0  # it does teach


def test_a_group_that_is_not_there_is_refused_before_data_are_read(script):
    assert refused(script(cifar, '--dataroot nowhere --groups 3'), 'the network has groups 0 to 2')
    assert refused(script(imagenet, '--imagenetpath nowhere --groups 4'), '--groups 4: the network has groups 0 to 3')


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
    """No loss after that update shows it: the epoch is one step long."""
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
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the system refuses longer files from here on
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


@pytest.mark.parametrize('error', [errno.ESTALE, errno.EROFS, errno.EMFILE, errno.ENOTCONN])
def test_what_the_machine_does_to_a_run_is_a_failed_run(train, monkeypatch, error):
    def fails(path, line):
        raise log.not_written(path, OSError(error, os.strerror(error)))

    monkeypatch.setattr(log, 'append_line', fails)
    status, _, err = train('--epochs 1 --epoch_step [] --save logs/run')
    assert status == 1 and err == f'cifar.py: error: logs/run/log.txt could not be written: {os.strerror(error)}\n'


def test_a_drop_of_the_rate_that_no_epoch_reaches_is_noted(train):
    said = train('--epochs 2 --epoch_step [2,3,40]')[1]
    assert 'note: --epochs 2 ends before the learning rate drops at [3, 40] (--epoch_step)\n' in said
    assert 'ends before' not in train('--epochs 2 --epoch_step [2]')[1]


def test_without_save_nothing_is_kept(train, tmp_path):
    status, out, _ = train('--epochs 1')
    assert status == 0 and 'without --save' in out and not list(tmp_path.iterdir())


def test_a_setting_that_an_older_log_lacks_has_its_default(train, teacher):
    log = pathlib.Path('logs/teacher/log.txt')
    log.write_text(log.read_text().replace('"keep_momentum": false, ', ''))
    words = '--save logs/teacher --epochs 6 --lr 0.05 --epoch_step [4]'
    assert refused(train(words), 'holds a run:')
    assert refused(train(words, '--keep_momentum'), '(keep_momentum False, not True)')


def test_a_folder_that_cannot_be_made_is_refused_before_any_data_are_read(script, monkeypatch):
    pathlib.Path('file').touch()
    nowhere = '--dataset folder --dataroot nowhere --save'
    assert refused(script(cifar, nowhere, 'file'), '--save file is not a folder')
    assert refused(script(cifar, nowhere, 'file/logs/run'), '--save file/logs/run: file is not a folder')
    os.symlink('away', 'link')
    assert refused(script(cifar, nowhere, 'link/run'), '--save link/run: link is not a folder')
    monkeypatch.setattr(os, 'access', lambda *_: False)  # as for another user than root
    assert refused(script(cifar, nowhere, 'new/run'), '--save new/run: . cannot be written to')
