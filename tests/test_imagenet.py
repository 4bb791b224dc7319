"""Whole runs of imagenet.py on real image files: several kinds of teacher, workers, refusals."""

import errno
import os
import re
import shutil

import numpy as np
import pytest
import torch
import torchvision
from conftest import VNNI, draw, refused
from PIL import Image
from test_cifar import logged, same_weights

import imagenet
import imagenet_resnet
from engine.log import read_log
from engine.loop import Run
from formats import networks, write
from formats.torchvision import from_torchvision
from images import photographs

SMALL = '--image_size 32 --depth 18 --width 0.0625 --batch_size 8 --lr 0.02 --epoch_step [] --nthread 0'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """An ImageNet-like folder of 6 classes with 6 training and 3 validation JPEGs each."""
    root, rng = tmp_path_factory.mktemp('imagenet'), np.random.default_rng(0)
    for part, count in (('train', 6), ('val', 3)):
        for label in range(6):
            place = root / part / f'n{label:08d}'
            place.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draw(rng, label % 4, (40 + i, 48 - i))).save(place / f'{i}.JPEG', quality=90)
    return root


@pytest.fixture
def train(script, folder):
    return lambda *words: script(imagenet, SMALL, ['--imagenetpath', folder], *words)


def write_teacher(path, classes=6, depth=34):
    """Write a torchvision network with random batch norm statistics and the given number of classes."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(f'resnet{depth}', num_classes=classes, width_per_group=64)
    torch.save(network.state_dict(), path)


def test_a_baseline_trains_and_logs_top1_and_top5(train):
    status, out, err = train('--epochs 6 --lr 0.005 --save logs/run')
    assert status == 0, err
    first, *_, last = read_log('logs/run/log.txt')
    assert all(len(r[k]) == 2 and r[k][0] <= r[k][1] <= 100 for r in (first, last) for k in ('train_acc', 'test_acc'))
    assert last['bad_images'] == 0 and last['train_images'] == 36 and last['num_classes'] == 6
    assert last['train_loss'] < first['train_loss']
    assert last['test_acc'][0] * 18 / 100 == pytest.approx(round(last['test_acc'][0] * 18 / 100))


@pytest.mark.parametrize('depth, flags', [(18, ''), (50, ''), pytest.param(18, '--teacher_dtype int8', marks=VNNI)])
def test_students_learn_from_torchvision_teachers_basic_and_bottleneck(train, depth, flags):
    write_teacher('teacher.bin', depth=depth)
    status, out, err = train('--epochs 1 --teacher_params teacher.bin --beta 1e+3 --alpha 0.5 --save logs/run', flags)
    assert status == 0, err
    assert re.search(r'teacher: top-1 [\d.]+%, top-5 [\d.]+%', out)
    assert 'at2: beta 1000 weights each element of the 2x2 maps by 31.25' in out
    (record,) = read_log('logs/run/log.txt')
    assert {'ce', 'kd', 'at0', 'at1', 'at2', 'at3'} <= set(record)


def test_last_two_groups_alone_and_the_teacher_unchecked(train):
    write_teacher('teacher.bin', depth=18)
    _, out, _ = train(
        '--epochs 1 --teacher_params teacher.bin --skip_teacher_check --beta 10 --groups 2,3 --save logs/run'
    )
    assert 'top-1' not in out.split('trained parameters')[0]
    assert [k for k in read_log('logs/run/log.txt')[0] if re.fullmatch(r'at\d', k)] == ['at2', 'at3']


def test_a_teacher_that_is_not_checked_and_spoils_the_loss_is_seen_at_the_first_step(train):
    write_teacher('teacher.bin', depth=18)
    state = torch.load('teacher.bin')
    torch.save({**state, 'fc.bias': state['fc.bias'] + 3e38, 'fc.weight': state['fc.weight'] + 3e38}, 'teacher.bin')
    flags = '--epochs 1 --teacher_params teacher.bin --alpha 0.5'
    assert refused(train(flags), 'teacher.bin cannot teach: its logits on the test images are not finite')
    status, _, err = train(flags, '--skip_teacher_check')
    assert status == 1 and 'epoch 1, step 1: the loss is not finite' in err and 'kd nan' in err and err.count('\n') == 1


def test_an_own_checkpoint_teaches(train):
    assert train('--epochs 1 --depth 34 --save logs/teacher')[0] == 0
    status, _, err = train('--epochs 1 --beta 10 --teacher_params logs/teacher/model.pt7 --save logs/student')
    assert status == 0, err


def test_a_folded_teacher_gives_what_the_unfolded_gives():
    torch.manual_seed(0)
    f, params = imagenet_resnet.imagenet_resnet(34, 0.125, 6)
    params = {k: v.detach().double() for k, v in params.items()}
    for key, value in params.items():
        if key.endswith(('running_mean', 'running_var', 'bias')):
            value.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    (y, groups), (z, folded) = f(x, params, False), f(x, imagenet_resnet.fold_batch_norm(params), False)
    torch.testing.assert_close(y, z)
    for a, b in zip(groups, folded):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('depth', [18, 34, 50, 101, 152])
def test_logits_equal_those_of_torchvision_with_the_same_weights(depth):
    torch.manual_seed(0)
    network = torchvision.models.get_model(f'resnet{depth}', num_classes=7).eval()
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.8, 1.2) if name.endswith('var') else buffer.normal_(0, 0.1)
    f, params = imagenet_resnet.imagenet_resnet(depth, 1, 7)
    converted = from_torchvision(network.state_dict())
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in params.items()}
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(x)
        for p in (converted, imagenet_resnet.fold_batch_norm(converted)):
            logits = f(x, p, False)[0]
            assert (logits - expected).norm() <= 1e-5 * expected.norm()


def test_a_last_batch_of_one_image_is_left_out_where_batch_norm_needs_two(train):
    """There are 36 training images; at 32 pixels the last maps are 1x1."""
    assert train('--epochs 1 --batch_size 7 --save logs/run')[0] == 0
    (record,) = read_log('logs/run/log.txt')
    assert record['images_per_second'] * record['train_time'] == pytest.approx(35)
    assert train('--epochs 1 --batch_size 7 --image_size 33 --save logs/larger')[0] == 0
    (record,) = read_log('logs/larger/log.txt')
    assert record['images_per_second'] * record['train_time'] == pytest.approx(36)


def test_maps_of_one_position_are_said_to_teach_nothing(train):
    write_teacher('teacher.bin', depth=18)
    out = train('--epochs 1 --teacher_params teacher.bin --beta 10')[1]
    assert 'note: at3 compares 1x1 maps, which are all equal: it is always 0 and teaches nothing' in out
    assert out.count('teaches nothing') == 1


def test_a_teacher_that_guesses_and_a_test_loss_far_above_guessing_are_said_once(train):
    f, params = imagenet_resnet.imagenet_resnet(18, 0.0625, 6)
    params['fc.bias'].detach()[0] = 1e6  # always predicts the first class, which is right for a sixth
    write.save('teacher.pt7', {'params': {k: v.detach() for k, v in params.items()}})
    assert train('--epochs 2 --lr 1e-9 --save logs/run')[0] == 0
    state = networks.load('logs/run/model.pt7')
    state['params']['fc.bias'][0] = 1e6
    write.save('start.pt7', state)
    out = train('--epochs 4 --lr 1e-9 --resume start.pt7 --beta 1e-9 --teacher_params teacher.pt7')[1]
    assert out.count('note: teacher.pt7 has an accuracy of 16.67%, hardly better than guessing among 6 classes') == 1
    assert len(re.findall(r'note: a test loss of \S+e\+05 is far above that of guessing', out)) == 1


def test_a_resumed_run_equals_an_uninterrupted_one(train, monkeypatch):
    assert train('--epochs 3 --epoch_step [3] --save logs/whole')[0] == 0
    keep = Run.keep_epoch

    def interrupted(run):
        keep(run)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, 'keep_epoch', interrupted)
    assert train('--epochs 3 --epoch_step [3] --save logs/part')[0] == 130
    monkeypatch.setattr(Run, 'keep_epoch', keep)
    assert train('--epochs 3 --epoch_step [3] --save logs/part --resume auto --nthread 1')[0] == 0
    whole, part = (networks.load(f'logs/{run}/model.pt7') for run in ('whole', 'part'))
    assert all(torch.equal(whole['params'][k], part['params'][k]) for k in whole['params'])


def test_an_image_that_cannot_be_tested_costs_no_training(train, script, folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / 'photos')
    image = root / 'val' / 'n00000005' / '2.JPEG'
    image.write_bytes(b'no image')
    words = '--epochs 2 --epoch_step [2] --save logs/part --imagenetpath', [root]
    assert refused(script(imagenet, SMALL, *words), f'{image} is not a readable image')
    shutil.copy(folder / 'val' / 'n00000005' / '2.JPEG', image)
    status, out, err = script(imagenet, SMALL, *words, '--resume auto')
    assert status == 0 and 'after step 5 of epoch 1' in out, err
    assert train('--epochs 2 --epoch_step [2] --save logs/whole')[0] == 0
    whole = [{**record, 'imagenetpath': str(root)} for record in logged('whole')]
    assert logged('part') == whole
    assert same_weights('part', 'whole')


@pytest.mark.parametrize('nthread', [0, 1])
def test_a_failure_to_read_in_mid_epoch_costs_a_single_worker_no_step(train, monkeypatch, nthread):
    words = '--epochs 2 --epoch_step [2] --save logs/part --resume auto --nthread', [nthread]
    good, read = photographs._read, []

    def failing(*given):
        for batch in good(*given):
            read.append(batch)
            if len(read) == 12:  # 5 to train on, 3 to test on, and the fourth of the second epoch
                raise OSError(errno.ESTALE, 'Stale file handle', 'train')
            yield batch

    monkeypatch.setattr(photographs, '_read', failing)
    status, out, err = train(*words)
    assert status == 1 and err.endswith("Stale file handle: 'train'\n"), err
    assert out.endswith('stopped after step 3 of epoch 2; go on with --resume auto\n')
    monkeypatch.setattr(photographs, '_read', good)
    status, out, err = train(*words)
    assert status == 0 and 'after step 3 of epoch 2' in out, err
    assert train('--epochs 2 --epoch_step [2] --save logs/whole --nthread', [nthread])[0] == 0
    assert logged('part') == logged('whole') and same_weights('part', 'whole')


def test_what_cannot_be_read_at_first_leaves_no_run_behind(train, monkeypatch):
    def failing(*_):
        raise OSError(errno.ESTALE, 'Stale file handle', 'train')

    good = photographs._read
    monkeypatch.setattr(photographs, '_read', failing)
    assert train('--epochs 1 --save logs/run')[0] == 1
    monkeypatch.setattr(photographs, '_read', good)
    assert train('--epochs 1 --save logs/run')[0] == 0


def test_held_out_training_images_of_every_class_take_the_place_of_the_validation(train):
    status, out, err = train('--epochs 1 --holdout 12 --save logs/run')
    assert status == 0 and '24 training and 12 validation images' in out, err
    (record,) = read_log('logs/run/log.txt')
    assert (record['holdout'], record['train_images'], record['test_images']) == (12, 24, 12)
    assert refused(train('--holdout 31'), '--holdout 31: at most 30 of the 36 training images')
    assert refused(train('--holdout 5'), '--holdout 5: at least 6, one image of each class')


def test_unusable_input_is_refused_in_one_line_and_nothing_is_written(script, train, folder, tmp_path):
    run = '--epochs 1 --beta 1 --save logs/run --teacher_params'
    assert refused(script(imagenet, '--imagenetpath nowhere --save logs/run'), 'nowhere')
    (tmp_path / 'empty').mkdir()
    assert refused(script(imagenet, '--imagenetpath empty --save logs/run'), 'train')
    assert refused(train('--depth 20'), '--depth 20: an ImageNet ResNet has 18, 34, 50, 101, 152 layers')
    assert refused(train('--image_size 16'), '--image_size')
    assert refused(train('--beta 1'), 'needs a teacher: name one with --teacher_params')
    assert refused(train(run, 'nowhere.pth'), 'nowhere.pth')
    (tmp_path / 'text.pth').write_text('nothing')
    assert refused(train(run, 'text.pth'), 'text.pth')
    write_teacher('other.pth', classes=7, depth=18)
    classes = 'other.pth has 7 output classes, the data set has 6', '(--alpha 0 lets it teach attention)'
    assert refused(train(run, 'other.pth --alpha 0.5'), *classes)
    state = torch.load('other.pth')
    del state['layer2.0.conv2.weight']
    torch.save(state, 'missing.pth')
    assert refused(train(run, 'missing.pth'), 'group1.block0.conv1')
    assert not os.path.exists('logs')


@pytest.mark.parametrize(
    'flags, terms',
    [
        ('--beta 1', {'ce', 'at0', 'at1', 'at2', 'at3'}),
        ('--beta 1 --transfer full', {'ce', 'full0', 'full1', 'full2', 'full3'}),
        pytest.param('--beta 1 --teacher_dtype int8', {'ce', 'at0', 'at1', 'at2', 'at3'}, marks=VNNI),
    ],
)
def test_a_teacher_of_other_classes_teaches_attention_unchecked(train, flags, terms):
    write_teacher('other.pth', classes=7, depth=18)
    status, out, err = train('--epochs 1 --save logs/run --teacher_params other.pth', flags)
    assert status == 0, err
    said = 'teacher: other.pth has 7 output classes, the data set has 6; its logits are not used, and its accuracy is'
    assert out.count(said) == 1 and 'top-1' not in out.split('trained parameters')[0]
    (record,) = read_log('logs/run/log.txt')
    assert terms == {k for k in record if re.fullmatch(r'ce|kd|grad|(at|full)\d', k)}


def test_a_teacher_of_other_classes_has_no_logits_to_teach_with(train):
    write_teacher('other.pth', classes=7, depth=18)
    run = '--epochs 1 --beta 1 --teacher_params other.pth'
    assert refused(train(run, '--alpha 0.1'), 'has 7 output classes', '(--alpha 0 lets it teach attention)')
    assert refused(train(run, '--transfer gradient'), 'has 7 output classes', '--transfer gradient differentiates')


def test_files_that_are_not_there_are_told_before_any_data_are_read(script, tmp_path):
    nowhere = '--imagenetpath nowhere --beta 1 --teacher_params'
    (tmp_path / 'logs' / 'resnet_34').mkdir(parents=True)
    (tmp_path / 'logs' / 'resnet_34' / 'model.pt7').touch()
    (tmp_path / 'resnet-34-export.hkl').touch()
    for missing, advice in {
        'resnet-34-exprot.hkl': '; . holds resnet-34-export.hkl',
        'logs/resnet_43': '; logs holds resnet_34',
        'far/from/anything.pth': '',
    }.items():
        told = f'--teacher_params {missing}: no such checkpoint{advice}\n'
        assert refused(script(imagenet, nowhere, [missing]), told)
    assert refused(script(imagenet, nowhere, 'resnet_34'), 'nowhere: no such folder')  # the teacher's run is there
    os.unlink('logs/resnet_34/model.pt7')
    assert refused(
        script(imagenet, nowhere, 'resnet_34'), '--teacher_params resnet_34: there is no logs/resnet_34/model.pt7'
    )
    assert refused(script(imagenet, nowhere, 'torchvision:resnet7'), 'torchvision:resnet7: expected one of torchvision')
    assert refused(script(imagenet, '--imagenetpath nowhere --resume on.pt7'), '--resume on.pt7: no such checkpoint')
    assert refused(script(imagenet, '--imagenetpath nowhere --ngpu 2 --resume on.pt7'), '--resume on.pt7: no such')
    assert refused(script(imagenet, '--teacher_id resnet_34'), '(here a teacher is named with --teacher_params)')
