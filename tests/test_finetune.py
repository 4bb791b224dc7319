"""Fine-tuning on lists in the published form of CUB-200-2011 and MIT Indoor-67: what is read, trained and refused."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from conftest import draw, refused
from PIL import Image
from torchvision import transforms

import cifar
import finetune
import imagenet_resnet
import resnet
import utils
from engine.log import read_log
from formats import networks, write
from images import crops, photographs

SIZE = 32
SMALL = f'--image_size {SIZE} --epochs 1 --batch_size 8 --nthread 0'
CLASSES, TRAINING, TESTING = ('001.Ant', '002.Bee', '003.Cat'), 6, 3  # images of a class


def box_of(i):
    return 3.0 + i, 2.0, 30.0, 25.0 + i


@pytest.fixture
def cub(tmp_path):
    """Images as in CUB_200_2011, numbered by class, each with a box; every third is a test image."""
    root, rng = tmp_path / 'CUB_200_2011', np.random.default_rng(0)
    lists, number = {'images': [], 'train_test_split': [], 'bounding_boxes': [], 'image_class_labels': []}, 0
    for label, name in enumerate(CLASSES):
        (root / 'images' / name).mkdir(parents=True)
        for i in range(TRAINING + TESTING):
            number += 1
            Image.fromarray(draw(rng, label, (40 + i, 50 - i))).save(root / 'images' / name / f'{i}.jpg', quality=95)
            lists['images'].append(f'{number} {name}/{i}.jpg')
            lists['train_test_split'].append(f'{number} {int(i % 3 > 0)}')
            lists['bounding_boxes'].append(f'{number} {" ".join(map(str, box_of(i)))}')
            lists['image_class_labels'].append(f'{number} {label + 1}')
    for name, lines in lists.items():
        (root / f'{name}.txt').write_text('\n'.join(lines) + '\n')
    return root


@pytest.fixture
def scenes(cub):
    """The same images as in MIT Indoor-67."""
    root = cub.parent / 'indoor'
    shutil.copytree(cub / 'images', root / 'Images')
    names = [f'{name}/{i}.jpg' for name in CLASSES for i in range(TRAINING + TESTING)]
    (root / 'TrainImages.txt').write_text('\n'.join(n for n in names if n[-5] not in '036'))
    (root / 'TestImages.txt').write_text('\n'.join(n for n in names if n[-5] in '036') + '\n\n')
    return root


@pytest.fixture
def pretrained(tmp_path):
    """A small ResNet-18 of ten other classes, with running statistics of random images."""
    torch.manual_seed(1)
    f, params = imagenet_resnet.imagenet_resnet(18, 0.0625, 10)
    with torch.no_grad():
        f(torch.randn(16, 3, SIZE, SIZE), params, True)
    path = tmp_path / 'pretrained.pt7'
    write.save(path, {'params': {k: v.detach() for k, v in params.items()}})
    return path


@pytest.fixture
def tune(script, pretrained):
    return lambda root, *words: script(finetune, SMALL, ['--dataroot', root, '--pretrained', pretrained], *words)


@pytest.mark.parametrize('dataset', ['cub', 'scenes'])
def test_lists_are_read_as_published(request, dataset):
    root = request.getfixturevalue(dataset)
    loaded = photographs.DATASETS[dataset](root)
    assert (len(loaded.train.paths), len(loaded.test.paths), loaded.num_classes) == (18, 9, 3)
    assert loaded.train.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert [os.path.basename(path) for path in loaded.test.paths] == ['0.jpg', '3.jpg', '6.jpg'] * 3
    assert all(
        os.path.basename(os.path.dirname(p)) == CLASSES[i] for p, i in zip(loaded.test.paths, loaded.test.labels)
    )
    assert loaded.test.boxes == ([box_of(0), box_of(3), box_of(6)] if dataset == 'cub' else [None] * 3) * 3


def test_boxes_are_cropped_then_scaled_then_the_centre_is_taken_or_to_train_any_part(cub):
    """As in PIL and torchvision, up to rounding of pixels."""
    files = photographs.load_cub(cub).train
    path, (left, top, width, height) = files.paths[3], files.boxes[3]
    part = Image.open(path).crop((int(left), int(top), round(left + width), round(top + height)))
    scaled = np.asarray(transforms.Resize(round(SIZE * 256 / 224))(part)).astype(int)
    (found,), _, _ = photographs.read_batch(files, SIZE, None, [3])
    y, x = (round((side - SIZE) / 2) for side in scaled.shape[:2])
    assert np.abs(found.numpy() - scaled[y : y + SIZE, x : x + SIZE]).max() <= 1
    places = set()
    for epoch in range(40):
        (found,), _, _ = photographs.read_batch(files, SIZE, (0, epoch), [3])
        options = {
            (y, x, m): np.abs(found.numpy()[:, :: 1 - 2 * m] - scaled[y : y + SIZE, x : x + SIZE]).max()
            for y in range(scaled.shape[0] - SIZE + 1)
            for x in range(scaled.shape[1] - SIZE + 1)
            for m in (0, 1)
        }
        place = min(options, key=options.get)
        assert options[place] <= 1
        places.add(place)
    for i, most in enumerate((scaled.shape[0] - SIZE, scaled.shape[1] - SIZE, 1)):
        assert {place[i] for place in places} == set(range(most + 1))


def test_a_box_is_cut_to_its_image_and_one_outside_of_it_is_a_bad_image(cub):
    path = str(cub / 'images' / CLASSES[0] / '0.jpg')  # 50x40 pixels
    whole = crops.test_crop(path, SIZE)
    assert np.array_equal(crops.test_crop(path, SIZE, (0.0, 0.0, 999.0, 999.0)), whole)
    with pytest.raises(ValueError, match='none of which its box'):
        crops.test_crop(path, SIZE, (50.0, 0.0, 10.0, 10.0))


def test_a_part_too_thin_to_be_scaled_is_a_bad_image(cub):
    path = str(cub / 'images' / CLASSES[0] / '0.jpg')
    Image.fromarray(np.zeros((2, 500, 3), np.uint8)).save(path)
    for box in (None, (0.0, 0.0, 400.0, 2.0)):
        with pytest.raises(ValueError, match='too thin'):
            crops.test_crop(path, SIZE, box)
    assert crops.test_crop(path, SIZE, (0.0, 0.0, 200.0, 2.0)).shape == (SIZE, SIZE, 3)


def test_batch_norm_stem_and_first_group_stay_and_all_else_learns(tune, cub, pretrained):
    status, out, err = tune(cub, '--save logs/run')
    assert status == 0, err
    before, after = networks.load(pretrained)['params'], networks.load('logs/run/model.pt7')['params']
    assert before.keys() == after.keys()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    norms = {k for k in before if k.split('.')[-2:][0].startswith('bn')}
    assert changed == {k for k in before if not k.startswith(('conv0', 'group0.'))} - norms
    assert after['fc.weight'].shape[0] == 3
    trained = sum(after[k].numel() for k in changed)
    assert f'{trained:,} trained parameters' in out
    (record,) = read_log('logs/run/log.txt')
    assert (record['train_images'], record['test_images'], record['num_classes']) == (18, 9, 3)
    assert (record['depth'], record['pretrained']) == (18, str(pretrained))
    _, _, err = tune(cub, '--save logs/all --fixed_groups 0')
    everything = networks.load('logs/all/model.pt7')['params']
    assert {k for k in before if not torch.equal(before[k], everything[k])} == set(before) - norms, err


def test_a_step_normalises_with_the_statistics_of_pretraining(cub, pretrained, monkeypatch):
    """The first step's logits are those of the evaluated network, with a last layer drawn from the seed."""
    monkeypatch.setattr('sys.argv', ['finetune.py', '--pretrained', str(pretrained), '--dataroot', str(cub)])
    f, params = finetune.build_student(finetune.parse(), 3, torch.device('cpu'))
    images = torch.randn(5, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)  # as they are read
    labels = torch.tensor([0, 1, 2, 0, 1])
    logits, _ = f(images, params, False)
    torch.manual_seed(0)
    new = utils.linear_params(params['fc.weight'].shape[1], 3)
    old = networks.load(pretrained)['params'] | {'fc.weight': new['weight'], 'fc.bias': new['bias']}
    assert torch.equal(logits, imagenet_resnet.imagenet_forward(images, old, False)[0])
    torch.nn.functional.cross_entropy(logits, labels).backward()
    assert {k for k, v in params.items() if v.grad is not None} == {k for k, v in params.items() if v.requires_grad}


def test_a_student_learns_from_a_fine_tuned_teacher_by_its_last_two_groups_and_resumes(tune, scenes):
    status, _, err = tune(scenes, '--dataset scenes --save logs/teacher')
    assert status == 0, err
    words = '--dataset scenes --teacher_params logs/teacher/model.pt7 --beta 1e+3 --alpha 0.5'
    status, out, err = tune(scenes, words, '--epochs 2 --save logs/run')
    assert status == 0 and 'teacher: top-1 ' in out, err
    whole = read_log('logs/run/log.txt')
    assert (whole[0]['depth'], whole[0]['width']) == (18, 0.0625)
    assert {k for k in whole[0] if k.startswith(('at', 'kd')) and k[-1].isdigit() or k == 'kd'} == {'at2', 'at3', 'kd'}
    assert tune(scenes, words, '--save logs/half')[0] == 0
    status, out, err = tune(scenes, words, '--epochs 2 --save logs/half --resume auto')
    assert status == 0 and 'resumed from' in out, err
    first, second = (networks.load(f'logs/{run}/model.pt7')['params'] for run in ('run', 'half'))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_the_other_transfers_and_penalties_can_be_fine_tuned_with(tune, cub):
    assert tune(cub, '--save logs/teacher')[0] == 0
    words = '--teacher_params logs/teacher/model.pt7 --beta 0.1'
    for flags, terms in {
        f'{words} --transfer gradient': {'grad'},
        f'{words} --transfer full': {'full2', 'full3'},
        '--penalty symmetry --gamma 0.1': {'symmetry'},
    }.items():
        status, _, err = tune(cub, flags, '--save logs/run --overwrite')
        assert status == 0, err
        assert terms <= set(read_log('logs/run/log.txt')[0])
    assert refused(tune(cub, f'{words} --transfer gradient --groups 1'), '--groups')


def test_two_workers_learn_what_one_does(tune, cub):
    """With fixed batch norm, up to rounding of sums."""
    assert tune(cub, '--dtype double --save logs/1')[0] == 0
    words = f'{SMALL} --dtype double --ngpu 2 --save logs/2 --pretrained pretrained.pt7 --dataroot {cub}'
    command = [sys.executable, finetune.__file__, *words.split()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    one, two = (networks.load(f'logs/{n}/model.pt7')['params'] for n in (1, 2))
    assert all(torch.allclose(one[k], two[k], rtol=1e-9, atol=1e-12) for k in one)


def test_ones_own_folder_is_cropped_in_the_same_way(cub, tmp_path):
    for part in ('train', 'val'):
        shutil.copytree(cub / 'images', tmp_path / 'photos' / part)
    assert photographs.load_folder(tmp_path / 'photos').train.scaled


@pytest.mark.parametrize('dataset', ['cub', 'scenes'])
def test_held_out_training_images_of_every_class_are_tested_on_with_their_boxes(request, tune, dataset):
    root = request.getfixturevalue(dataset)
    train = photographs.DATASETS[dataset](root).train
    held = photographs.hold_out(photographs.DATASETS[dataset](root), 6)
    assert held.test.labels.tolist() == [0, 0, 1, 1, 2, 2] and held.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for part in (held.train, held.test):
        where = [train.paths.index(path) for path in part.paths]
        assert part.boxes == [train.boxes[i] for i in where] and part.labels.tolist() == train.labels[where].tolist()
    assert sorted(held.train.paths + held.test.paths) == sorted(train.paths)
    found = photographs.read_batch(held.test, SIZE, None, [0])[0][0]
    assert np.array_equal(found, crops.test_crop(held.test.paths[0], SIZE, held.test.boxes[0]))
    status, _, err = tune(root, f'--dataset {dataset} --holdout 6 --save logs/run')
    assert status == 0, err
    (record,) = read_log('logs/run/log.txt')
    assert (record['holdout'], record['train_images'], record['test_images']) == (6, 12, 6)
    assert refused(tune(root, f'--dataset {dataset} --holdout 16'), '--holdout 16: at most 15 of the 18', 'keep none')


@pytest.mark.parametrize('words, group', [('--groups 0,2', 0), ('--fixed_groups 4', 2), ('--fixed_groups 3', 2)])
def test_groups_that_are_not_trained_learn_nothing_from_a_teacher(tune, cub, pretrained, words, group):
    said = tune(cub, words, '--beta 1 --teacher_params', [pretrained])
    assert refused(said, f'--groups: group {group} is not trained (--fixed_groups')


def test_a_fine_tuned_network_teaches_in_another_script_with_a_note(tune, script, cub, photos):
    assert tune(cub, '--save logs/tuned')[0] == 0
    words = '--dataset folder --image_size 32 --depth 10 --width 0.25 --epochs 1 --alpha 0.9 --teacher_id tuned'
    status, out, err = script(cifar, words, ['--dataroot', photos])
    assert status == 0 and 'note: networks like --teacher_id tuned are trained by imagenet.py' in out, err


def test_networks_that_cannot_be_fine_tuned_are_refused(script, tune, cub, pretrained):
    write.save('wide.pt7', {'params': {k: v.detach() for k, v in resnet.wide_resnet(10, 0.25, 3)[1].items()}})
    assert refused(tune(cub, '--pretrained wide.pt7'), 'WRN-10-0.25', 'expected an ImageNet ResNet')
    folded = imagenet_resnet.fold_batch_norm(networks.load(pretrained)['params'])
    torch.save(folded, 'folded.pth')
    assert refused(tune(cub, '--pretrained folded.pth'), 'batch norm folded')
    assert refused(tune(cub, '--pretrained none.pth'), 'none.pth')
    for flag in ('--pretrained', '--teacher_params', '--resume'):
        told = f'{flag} wide.pt: no such checkpoint; . holds wide.pt7'
        assert refused(tune('nowhere', flag, 'wide.pt --beta 1' if 'teacher' in flag else 'wide.pt'), told)
    other = tune(cub, '--teacher_params', [pretrained], '--beta 1 --alpha 0.5')
    assert refused(other, 'has 10 output classes, the data set has 3', '(--alpha 0 lets it teach attention)')
    assert refused(tune(cub, '--sync_bn'), '--sync_bn', 'fixed')
    assert refused(tune(cub, '--fixed_groups 5'), '--fixed_groups')
    assert refused(tune(cub, '--dataset birds'), '--dataset')
    assert refused(tune('nowhere'), 'nowhere', 'images.txt')


def test_torchvisions_networks_can_be_fine_tuned(script, cub):
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=7).state_dict(), 'torchvision.pth')
    words = f'{SMALL} --lr 1e-6 --pretrained torchvision.pth --dataroot {cub} --save logs/run'
    status, out, err = script(finetune, words)
    assert status == 0 and '11,011,587 trained parameters' in out, err


def test_a_student_of_the_authors_is_fine_tuned_by_a_teacher_of_other_classes(tune, cub, pretrained):
    """Its shortcuts have no batch norm, and are trained."""
    state = networks.load(pretrained)['params']
    torch.save({'params': {f'student.{k}': v for k, v in state.items() if 'bndim' not in k}}, 'authors.pt7')
    flags = '--pretrained authors.pt7 --beta 1 --save logs/run --teacher_params'
    status, out, err = tune(cub, flags, [pretrained])
    assert status == 0 and 'has 10 output classes, the data set has 3; its logits are not used' in out, err
    after = networks.load('logs/run/model.pt7')['params']
    assert not torch.equal(after['group3.block0.convdim'], state['group3.block0.convdim'])
