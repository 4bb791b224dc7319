"""torchvision's networks keep their logits here, names convert back, and weights are downloaded."""

import errno
import os
import pickle
import re
import urllib.error

import pytest
import safetensors.torch
import torch
import torchvision
from saved import Touch, assert_near, logits_of, reason

import imagenet_resnet
from formats import networks
from formats.torchvision import from_torchvision, to_torchvision


def test_a_torchvision_state_gives_torchvisions_logits_however_it_is_wrapped(torchvision_net, images, tmp_path):
    net, depth = torchvision_net
    path, state, expected = tmp_path / 'model', net.state_dict(), net(images)
    torch.save(state, path)
    assert_near(logits_of(path, images), expected)
    safetensors.torch.save_file(state, path)
    assert_near(logits_of(path, images), expected)
    assert imagenet_resnet.imagenet_resnet_shape(networks.load_params(path))[0] == depth
    if depth == 18:
        torch.save({'epoch': 3, 'state_dict': {f'module.{k}': v for k, v in state.items()}}, path)
        assert_near(logits_of(path, images), expected)
        torch.save({'model': state, 'args': {'lr': 0.1}}, path)
        assert_near(logits_of(path, images), expected)


def transformers_name(key):
    """The name of a torchvision parameter in Hugging Face's ResNetForImageClassification."""
    for ours, theirs in (
        (r'^conv1\.', 'embedder.embedder.convolution.'),
        (r'^bn1\.', 'embedder.embedder.normalization.'),
        (r'^layer(\d)\.(\d+)\.', lambda m: f'encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.'),
        (r'downsample\.0', 'shortcut.convolution'),
        (r'downsample\.1', 'shortcut.normalization'),
        (r'\.conv(\d)\.', lambda m: f'.layer.{int(m[1]) - 1}.convolution.'),
        (r'\.bn(\d)\.', lambda m: f'.layer.{int(m[1]) - 1}.normalization.'),
    ):
        key = re.sub(ours, theirs, key)
    return key.replace('fc.', 'classifier.1.') if key.startswith('fc.') else f'resnet.{key}'


def test_files_of_timm_and_hugging_face_give_torchvisions_logits(torchvision_net, images, tmp_path):
    """As they are saved: timm shares torchvision's names, transformers has its own."""
    net, _ = torchvision_net
    state = net.state_dict()
    renamed = {transformers_name(key): value for key, value in state.items()}
    assert 'resnet.encoder.stages.1.layers.0.shortcut.convolution.weight' in renamed
    assert {'resnet.encoder.stages.0.layers.0.layer.1.normalization.running_var', 'classifier.1.bias'} < set(renamed)
    for content in (state, renamed):
        safetensors.torch.save_file(content, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
        torch.save(content, tmp_path / 'pytorch_model.bin')
        for name in ('model.safetensors', 'pytorch_model.bin'):
            assert_near(logits_of(tmp_path / name, images), net(images))


def test_a_last_layer_after_dropout_is_read_and_any_other_head_is_named(torchvision_net, images, tmp_path):
    net, depth = torchvision_net
    state = {k.replace('fc.', 'fc.1.'): v for k, v in net.state_dict().items()}
    torch.save(state, tmp_path / 'dropout.pth')
    assert_near(logits_of(tmp_path / 'dropout.pth', images), net(images))
    headless = {k: v for k, v in state.items() if not k.startswith('fc.')}
    two = {**state, 'fc.3.weight': torch.zeros(7, 7), 'fc.3.bias': torch.zeros(7)}
    for wrong in (headless, two):
        torch.save(wrong, tmp_path / 'wrong.pth')
        assert 'last layer is not one linear layer named fc' in reason(tmp_path / 'wrong.pth')


def test_two_names_for_one_parameter_of_hugging_face_are_refused(tmp_path, torchvision_net):
    state = {transformers_name(key): value for key, value in torchvision_net[0].state_dict().items()}
    torch.save({**state, 'fc.bias': torch.zeros(7)}, tmp_path / 'both')
    assert 'fc.bias appears twice' in reason(tmp_path / 'both')


def test_torchvisions_names_become_ours_and_come_back(torchvision_net):
    net, _ = torchvision_net
    state = net.state_dict()
    params = from_torchvision(state)
    assert {'conv0', 'bn0.running_var', 'group1.block0.convdim', 'group1.block0.bndim.bias', 'fc.bias'} <= set(params)
    assert {'group0.block0.conv0', 'group3.block1.bn1.weight'} <= set(params)
    assert not any('tracked' in key for key in params)
    back = to_torchvision(params)
    assert set(back) == set(state) and all(torch.equal(back[k], v) for k, v in state.items())


def test_two_names_for_one_array_are_refused(tmp_path, torchvision_net):
    state = {**torchvision_net[0].state_dict(), 'conv0': torch.zeros(64, 3, 7, 7)}
    torch.save(state, tmp_path / 'both')
    assert 'conv0 appears twice' in reason(tmp_path / 'both')


def test_torchvisions_own_weights_are_asked_for_by_name(tmp_path, images, torchvision_net, monkeypatch):
    net, depth = torchvision_net
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    cache = tmp_path / 'hub' / 'checkpoints'
    cache.mkdir(parents=True)
    url = torchvision.models.get_model_weights(f'resnet{depth}').DEFAULT.url
    torch.save(net.state_dict(), cache / url.rsplit('/')[-1])
    assert_near(logits_of(f'torchvision:resnet{depth}', images), net(images))


def test_without_network_torchvisions_weights_are_one_clear_error(tmp_path, monkeypatch, trace):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))

    def offline(*_, **__):
        raise urllib.error.URLError('no route to host')

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch.hub, 'urlopen', offline)
    with pytest.raises(OSError, match='torchvision:resnet34: https://.* could not be fetched .*no route to host') as e:
        networks.load_teacher('torchvision:resnet34')
    assert '\n' not in str(e.value)
    monkeypatch.setattr(torch.hub, 'urlopen', full)
    with pytest.raises(OSError, match='could not be fetched or read .*No space left') as e:
        networks.load_teacher('torchvision:resnet34')
    assert e.value.errno == errno.ENOSPC
    (tmp_path / 'hub/checkpoints/resnet34-b627a593.pth').write_bytes(pickle.dumps(Touch(trace)))
    with pytest.raises(OSError, match='could not be fetched or read'):
        networks.load_teacher('torchvision:resnet34')
    assert 'torchvision:resnet18, torchvision:resnet34' in reason('torchvision:resnet7')
