"""Checkpoints: written whole or not at all, read as data and never as code, ours and the authors'."""

import os
import pickle
import resource

import pytest
import torch
import torchvision

import checkpoint
import resnet
from engine.log import append_line
from formats import networks, write
from formats.torchvision import from_torchvision

STATE = {'params': {'a': torch.arange(5.0), 'b.c': torch.ones(2, 3)}, 'optimizer': {'a': torch.zeros(5)}, 'epoch': 3}


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / 'model.pt7'
    write.save(path, STATE)
    loaded = networks.load(path)
    assert loaded['epoch'] == 3 and set(loaded) == set(STATE)
    assert all(torch.equal(loaded['params'][k], v) for k, v in STATE['params'].items())
    assert os.listdir(tmp_path) == ['model.pt7']


def test_no_space_left_leaves_the_previous_checkpoint_whole(tmp_path):
    path = tmp_path / 'model.pt7'
    write.save(path, STATE)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # from here on the system refuses longer files
    try:
        with pytest.raises(OSError, match='model.pt7 could not be written: .*; the old file is unchanged'):
            write.save(path, {**STATE, 'params': {'a': torch.zeros(100_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['model.pt7']


def test_nothing_is_written_through_a_link(tmp_path):
    mine, path = tmp_path / 'mine', tmp_path / 'model.pt7'
    mine.write_text('mine')
    for link in (path, tmp_path / 'model.pt7.tmp', tmp_path / 'log.txt'):
        link.symlink_to(mine)
    write.save(path, STATE)
    with pytest.raises(OSError, match='log.txt could not be written'):
        append_line(str(tmp_path / 'log.txt'), 'line')
    assert mine.read_text() == 'mine' and networks.load(path)['epoch'] == 3


def test_a_checkpoint_cut_short_anywhere_is_refused(tmp_path):
    path = tmp_path / 'model.pt7'
    write.save(path, STATE)
    content = path.read_bytes()
    for tenth in range(10):
        path.write_bytes(content[: len(content) * tenth // 10])
        with pytest.raises(ValueError, match='model.pt7 is not a checkpoint'):
            networks.load(path)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    path, trace = tmp_path / 'model.pt7', tmp_path / 'trace'
    torch.save({'params': {'a': Touch(str(trace))}}, path)
    with pytest.raises(ValueError, match='is not a checkpoint'):
        networks.load(path)
    path.write_bytes(pickle.dumps(Touch(str(trace))))
    with pytest.raises(ValueError, match='is not a checkpoint'):
        networks.load(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    'state',
    [3, [], {}, {'params': 3}, {'params': [torch.ones(1)]}, {'params': {'a': 1}}, {'params': {3: torch.ones(1)}}],
)
def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path, state):
    torch.save(state, tmp_path / 'model.pt7')
    with pytest.raises(ValueError, match='model.pt7 is not a checkpoint'):
        networks.load(tmp_path / 'model.pt7')
    with pytest.raises(OSError, match='no such checkpoint'):
        networks.load(tmp_path / 'other.pt7')


def trained_wide_resnet(width=1):
    torch.manual_seed(0)
    f, params = resnet.wide_resnet(10, width, 4)
    return f, {k: torch.rand_like(v) + 0.5 for k, v in params.items()}


def same_logits(f, params, path):
    g, loaded = networks.load_teacher(path)
    x = torch.randn(2, 3, 16, 16)
    assert not any(v.requires_grad for v in loaded.values())
    return torch.equal(f(x, params, False)[0], g(x, loaded, False)[0])


@pytest.mark.parametrize('width', [1, 0.5, 1.03])
def test_a_teacher_is_rebuilt_from_its_parameters(tmp_path, width):
    f, params = trained_wide_resnet(width)
    write.save(tmp_path / 'model.pt7', {'params': params})
    assert same_logits(f, params, tmp_path / 'model.pt7')


def test_the_authors_layouts_are_read(tmp_path):
    f, params = trained_wide_resnet()
    both = {f'student.{k}': v for k, v in params.items()} | {f'teacher.{k}': v + 1 for k, v in params.items()}
    torch.save({'params': both, 'epoch': 200}, tmp_path / 'merged.pt7')
    assert same_logits(f, params, tmp_path / 'merged.pt7')
    apart = {
        'stats': {k: v for k, v in params.items() if 'running' in k},
        'params': {k: v for k, v in params.items() if 'running' not in k},
    }
    torch.save(apart, tmp_path / 'apart.pt7')
    assert same_logits(f, params, tmp_path / 'apart.pt7')
    merged = {part: {f'student.{k}': v for k, v in tensors.items()} for part, tensors in apart.items()}
    torch.save(merged, tmp_path / 'merged_apart.pt7')
    assert same_logits(f, params, tmp_path / 'merged_apart.pt7')


class Lightning(torch.nn.Module):
    """A module whose state_dict is like Lightning's: a network under a name that its author chose, and more."""

    def __init__(self, name, network, **more):
        super().__init__()
        self.loss = torch.nn.Linear(2, 2)
        for key, module in {name: network, **more}.items():
            self.add_module(key, module)


@pytest.fixture(scope='module')
def resnets():
    """Two torchvision ResNet-18 with different weights."""
    torch.manual_seed(0)
    return tuple(torchvision.models.resnet18(num_classes=5).eval() for _ in range(2))


def holds(path, network):
    """Whether a file is read bit for bit as a torchvision network."""
    _, params = networks.load_teacher(path)
    expected = from_torchvision(network.state_dict())
    return params.keys() == expected.keys() and all(torch.equal(params[k], v) for k, v in expected.items())


@pytest.mark.parametrize(
    'wrap',
    [
        torch.compile,
        torch.nn.DataParallel,
        lambda net: torch.nn.DataParallel(torch.compile(net)),
        lambda net: torch.compile(torch.nn.DataParallel(net)),
        lambda net: Lightning('model', net),
        lambda net: Lightning('net', torch.compile(net)),
        lambda net: torch.nn.DataParallel(torch.compile(Lightning('model', net))),
        lambda net: Lightning('backbone', Lightning('encoder', net)),
        lambda net: Lightning('model', net, teacher=torchvision.models.resnet18()),
        lambda net: Lightning('student', net, teacher_model=torch.nn.DataParallel(torchvision.models.resnet50())),
    ],
)
def test_what_wraps_a_network_is_taken_off_whatever_it_is_and_however_deep(tmp_path, resnets, wrap):
    network, _ = resnets
    state = wrap(network).state_dict()
    assert not set(state) & set(network.state_dict())
    torch.save({'state_dict': state}, tmp_path / 'a')
    torch.save(state, tmp_path / 'b')
    assert holds(tmp_path / 'a', network) and holds(tmp_path / 'b', network)


@pytest.mark.parametrize('names', ['net', 'model', 'state_dict', 'model_state_dict', 'model state_dict', 'net module'])
def test_the_dictionaries_that_people_save_params_in_are_opened(tmp_path, resnets, names):
    state = resnets[0].state_dict()
    for name in reversed(names.split()):
        state = {'epoch': 3, name: state, 'accuracy': 93.4, 'optimizer': {'state': {0: torch.ones(3)}}}
    torch.save(state, tmp_path / 'a')
    assert holds(tmp_path / 'a', resnets[0])


def test_of_plain_and_averaged_weights_the_averaged_are_taken_and_that_is_said(tmp_path, resnets, capfd):
    plain, averaged = (network.state_dict() for network in resnets)
    ema = torch.optim.swa_utils.AveragedModel(resnets[1]).state_dict()  # with a counter, n_averaged
    path = tmp_path / 'a'
    for i, (state, names) in enumerate(
        [
            ({'model': plain, 'model_ema': ema}, '(model) and averaged ones (model_ema)'),
            (
                {'state_dict': plain, 'state_dict_ema': {'state_dict': averaged}},
                '(state_dict) and averaged ones (st',
            ),
            (Lightning('model', resnets[0], ema=resnets[1]).state_dict(), '(model.) and averaged ones (ema.)'),
            ({'model_ema': averaged}, None),
            ({'model': averaged, 'model_ema': None}, None),
        ]
    ):
        torch.save(state, path)
        assert holds(path, resnets[1]), i
        note = f'note: {path} holds plain weights {names}'
        out = capfd.readouterr().out
        assert (out.count('\n') == 1 and out.startswith(note) and 'the latter are used' in out) if names else not out


def test_of_several_networks_none_is_guessed(tmp_path, resnets):
    torch.save(Lightning('left', resnets[0], right=resnets[1]).state_dict(), tmp_path / 'a')
    with pytest.raises(ValueError, match=r'a holds several networks \(left\.; right\.\): save the state_dict of one'):
        networks.load_teacher(tmp_path / 'a')
    state = {f'teacher{i}.layer1.0.conv1.weight': torch.ones(1) for i in range(10_000)}
    torch.save(state, tmp_path / 'many')
    with pytest.raises(ValueError, match='holds several networks'):
        networks.load_teacher(tmp_path / 'many')
    endless = {'epoch': 3}
    endless['model'] = endless
    torch.save(endless, tmp_path / 'endless')
    with pytest.raises(ValueError, match='is not a checkpoint: it has dictionaries in dictionaries without end'):
        networks.load_teacher(tmp_path / 'endless')


def test_networks_of_no_known_kind_are_refused_with_what_is_read(tmp_path):
    for network, named in {
        'mobilenet_v3_small': 'not a known network; its first parameters are features.0.0.weight, ',
        'resnext50_32x4d': 'a ResNeXt-50 of 32 groups of 4 channels (resnext50_32x4d)',
    }.items():
        torch.save(torchvision.models.get_model(network).state_dict(), tmp_path / 'a')
        with pytest.raises(ValueError) as error:
            networks.load_teacher(tmp_path / 'a')
        assert str(error.value).startswith(f'{tmp_path / "a"}: {named}')
        assert str(error.value).endswith(networks.supported())


@pytest.mark.slow
def test_a_wide_resnet_of_torchvision_is_read_and_named(script, tmp_path):
    torch.manual_seed(0)
    network, images = torchvision.models.wide_resnet50_2(num_classes=3).eval(), torch.randn(1, 3, 32, 32)
    torch.save(network.state_dict(), tmp_path / 'wide.pth')
    f, params = networks.load_teacher(tmp_path / 'wide.pth')
    with torch.no_grad():
        torch.testing.assert_close(f(images, params, False)[0], network(images))
    assert 'wide.pth: Wide ResNet-50-2, 3 classes, widths 256/' in script(checkpoint, 'info wide.pth')[1]


def test_what_does_not_fit_is_named(tmp_path):
    path, (_, params) = tmp_path / 'model.pt7', trained_wide_resnet()

    def message(changed):
        write.save(path, {'params': changed})
        with pytest.raises(ValueError) as error:
            networks.load_teacher(path)
        return str(error.value)

    without = {k: v for k, v in params.items() if k != 'group1.block0.conv1'}
    assert 'no group1.block0.conv1' in message(without)
    assert 'unknown extra' in message({**params, 'extra': torch.ones(1)})
    assert 'conv0 is (3, 3), not (16, 3, 3, 3)' in message({**params, 'conv0': torch.ones(3, 3)})
    assert 'conv0 is torch.int64' in message({**params, 'conv0': torch.ones(16, 3, 3, 3).long()})
    found = message({'weight': torch.ones(1)})
    assert 'not a known network; its first parameters are weight; supported are wide ResNets, Networks-in-' in found
    assert 'ResNet-18, 34, 50, 101 and 152; examples/own_networks.py pairs any two networks' in found
