"""The examples run as a reader would run them, and compute what they say."""

import math
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, refused
from torchvision.models import mobilenet_v3_large, resnet50
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import cifar
from engine.flags import parse_cifar
from engine.log import read_log
from engine.student import initialise
from examples import controls, own_networks
from examples.own_networks import PAIRS, losses


def run_script(folder, *flags):
    """Run the example from another folder in its own process: (exit status, stdout, stderr)."""
    command = [sys.executable, os.path.abspath(own_networks.__file__), *flags]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope='module')
def networks():
    """A student and a teacher with random weights."""
    torch.manual_seed(0)
    return mobilenet_v3_large(num_classes=10), resnet50()


@pytest.fixture(scope='module')
def batch():
    """Images (4, 3, 64, 64) and labels."""
    torch.manual_seed(1)
    return torch.randn(4, 3, 64, 64), torch.tensor([0, 3, 9, 3])


def traced(network, layers, images):
    """The outputs of some layers of a network, and its own, by torch.fx: ([activation, ...], logits)."""
    extractor = create_feature_extractor(network, [*layers, get_graph_node_names(network)[1][-1]])
    *found, logits = extractor(images).values()
    return found, logits


def test_script_runs_from_anywhere_and_prints_finite_terms_of_all_pairs(tmp_path):
    status, out, err = run_script(tmp_path, '--steps', '2', '--batch_size', '4')
    assert status == 0, err
    notice, *lines = out.splitlines()
    assert 'random weights' in notice and len(lines) == 2
    for step, line in enumerate(lines):
        terms = dict(re.findall(r'(\w+) ([-+.\w]+)(?: |$)', line.split(': ')[1]))
        assert line.startswith(f'step {step}: ') and list(terms) == ['ce', 'at0', 'at1', 'at2', 'at3']
        assert all(math.isfinite(float(value)) and float(value) > 0 for value in terms.values()), line
    assert not list(tmp_path.iterdir())


def test_weights_of_a_file_become_the_teacher_whatever_its_number_of_classes(tmp_path, capsys):
    torch.manual_seed(2)
    saved = resnet50(num_classes=3)
    torch.save(saved.state_dict(), tmp_path / 'teacher.pth')
    loaded = own_networks.load_teacher(str(tmp_path / 'teacher.pth')).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in saved.state_dict().items())
    assert 'random' not in capsys.readouterr().out


def test_losses_equal_those_of_activations_that_torch_fx_finds(networks, batch):
    images, labels = batch
    student, teacher = networks[0].train(), networks[1].eval()
    torch.manual_seed(3)  # for dropout
    ce, at = losses(*own_networks.with_groups(student, teacher, PAIRS), images, labels)

    torch.manual_seed(3)
    learned, logits = traced(student, [layer for layer, _ in PAIRS], images)
    taught, _ = traced(teacher, [layer for _, layer in PAIRS], images)
    torch.testing.assert_close(ce, F.cross_entropy(logits, labels))
    assert len(at) == len(PAIRS)
    for loss, pair in zip(at, zip(learned, taught)):
        maps = [F.normalize(a.square().sum(1).flatten(1)) for a in pair]
        torch.testing.assert_close(loss, (maps[0] - maps[1]).square().mean())


def test_attention_trains_the_student_itself_and_leaves_the_teacher_alone(networks, batch):
    student, teacher = networks[0].train(), networks[1].eval()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    _, at = losses(*own_networks.with_groups(student, teacher, PAIRS), *batch)
    sum(at).backward()
    reached = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {name for name, p in student.named_parameters() if p.dim() == 4} <= reached
    assert not any(name.startswith('classifier.') for name in reached)
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    student.zero_grad()


def test_a_layer_can_be_in_two_pairs(networks, batch):
    student, _ = own_networks.with_groups(*networks, [('features.3', 'layer1'), ('features.3', 'layer2')])
    for _ in range(2):
        first, second = student(batch[0])[1]
        assert first is second and first.shape[0] == 4


def test_a_layer_whose_output_is_overwritten_is_refused_by_name(networks, batch):
    student, _ = own_networks.with_groups(networks[0].train(), networks[1].eval(), [('features.0.1', 'bn1')])
    with pytest.raises(ValueError, match='the output of features.0.1 is overwritten by the layer after it'):
        student(batch[0])


def test_compared_layers_have_equal_strides_and_are_the_last_of_theirs(networks):
    images = torch.zeros(1, 3, 64, 64)
    student, teacher = networks[0].eval(), networks[1].eval()
    blocks = [f'features.{i}' for i in range(17)]
    with torch.no_grad():
        taught, _ = traced(teacher, [layer for _, layer in PAIRS], images)
        outputs, _ = traced(student, blocks, images)
    last = {64 // activation.shape[-1]: layer for layer, activation in zip(blocks, outputs)}
    assert [64 // activation.shape[-1] for activation in taught] == [4, 8, 16, 32]
    assert [last[stride] for stride in (4, 8, 16, 32)] == [layer for layer, _ in PAIRS]


@pytest.mark.parametrize(
    'flags, words',
    [
        ('--steps 0', ['--steps', 'at least 1']),
        ('--beta nan', ['--beta', 'out of range']),
        ('--batch_size many', ['--batch_size', 'not an integer']),
        ('--teacher_weights student.pth', ['--teacher_weights student.pth', 'not a state_dict', 'resnet50']),
        ('--teacher_weights noise.pth', ['noise.pth', 'damaged']),
        ('--teacher resnet34', ['unrecognized arguments']),
    ],
)
def test_wrong_use_is_refused_in_one_line(script, networks, tmp_path, flags, words):
    torch.save(networks[0].state_dict(), tmp_path / 'student.pth')
    (tmp_path / 'noise.pth').write_bytes(b'no network')
    assert refused(script(own_networks, flags), *words)


def test_the_script_itself_refuses_missing_weights(tmp_path):
    result = run_script(tmp_path, '--teacher_weights', 'missing.pth')
    assert refused(result, 'own_networks.py: error: ', 'missing.pth', 'no such')


def test_controls_train_as_cifar_does_with_another_teacher(script, train, photos):
    assert train('--epochs 2 --lr 0.05 --width 0.5 --save logs/teacher')[0] == 0
    words = '--epochs 1 --lr 0.01 --teacher_id teacher --beta 100'
    assert train(words, '--save logs/at')[0] == 0
    log = pathlib.Path('logs/teacher/log.txt')
    log.write_text(log.read_text().replace('"net": "wrn"', '"net": ["nin"]'))  # the family is that of the parameters
    first = {'at': read_log('logs/at/log.txt')[0]}
    for control in controls.CONTROLS:
        flags = f'{control} {SMALL} {words} --save logs/{control}'
        status, out, err = script(controls, flags, '--dataroot', [photos])
        assert status == 0 and 'at0: beta 100' in out, err
        first[control] = read_log(f'logs/{control}/log.txt')[0]
    assert len({record['at2'] for record in first.values()}) == 3
    assert [record.get('control') for record in first.values()] == [None, *controls.CONTROLS]
    opt = parse_cifar('', f'{SMALL} {words} --dataroot {photos}'.split())
    data, sample = cifar.build_data(opt, torch.device('cpu'))
    _, own = initialise(cifar.network(opt), opt, data.num_classes, data.device)
    taught = controls.build_teacher('untrained', opt, data, sample).keywords['params']
    filters, others = (F.normalize(params['conv0'].flatten(1)) for params in (own, taught))
    assert not (filters * others).sum(1).isclose(torch.ones(16)).any()
    log.write_text(log.read_text().replace('"width": 0.5, ', ''))  # as of older ones of finetune.py
    assert controls.build_teacher('untrained', opt, data, sample)
    settings = [{k: v for k, v in r.items() if k in ('seed', 'beta', 'lr', 'teacher_id')} for r in first.values()]
    assert settings[0] == settings[1] == settings[2]


def test_what_is_no_control_is_refused(script):
    assert refused(script(controls, 'other'), "'other' is not a control: expected shifted or untrained")
    for flags in ('--alpha 0.5', '--transfer gradient'):
        refusal = 'takes --beta, and neither --alpha nor --transfer'
        assert refused(script(controls, 'shifted --teacher_id x --beta 1', flags), refusal)
    assert 'CIFAR10' in script(controls, '--help')[1]


class Odd(torch.nn.Module):
    """A layer with two outputs, one that is flat, and one that is not called."""

    def __init__(self):
        super().__init__()
        self.pair, self.flat, self.unused = torch.nn.Identity(), torch.nn.Flatten(), torch.nn.Identity()

    def forward(self, x):
        self.pair((x, x))
        return self.flat(x)


@pytest.mark.parametrize(
    'layer, reason',
    [('pair', 'pair is no tensor'), ('flat', 'flat is no tensor'), ('unused', 'does not call unused')],
)
def test_a_layer_that_has_no_activation_to_compare_is_named(layer, reason):
    student, _ = own_networks.with_groups(Odd(), torch.nn.Identity(), [(layer, '')])
    with pytest.raises(ValueError, match=reason):
        student(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match='no pairs'):
        own_networks.with_groups(Odd(), Odd(), [])


def test_a_teacher_may_run_in_inference_mode(batch):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Identity())
    _, teacher = own_networks.with_groups(net, net, [('0', '0')])
    with torch.inference_mode():
        assert teacher(batch[0])[1][0].shape[1] == 4


def test_a_layer_whose_output_is_overwritten_keeps_it_in_inference_mode(batch):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU(inplace=True))
    _, teacher = own_networks.with_groups(net, net, [('0', '0')])
    with torch.inference_mode():
        (group,) = teacher(batch[0])[1]
        assert group.min() < 0 and torch.equal(group, net[0](batch[0]))
