"""Networks come and go in the formats of others with the same logits, and hostile files are refused unharmed."""

import argparse
import itertools
import json
import pickle
import re
import shlex
import struct
import subprocess
import sys
import time
import tracemalloc
import urllib.error
import zipfile
import zlib

import h5py
import hickle
import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
import torchvision
from conftest import refused

import checkpoint
import imagenet_resnet
import nin
import resnet
from formats import networks, read, write
from formats.torchvision import from_torchvision, to_torchvision


class Touch:
    """What leaves a trace where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')


@pytest.fixture
def trace(tmp_path):
    """A path that must not exist after the test: code that ran would have made it."""
    path = tmp_path / 'trace'
    yield path
    assert not path.exists()


def reason(path):
    """Why a file is refused as a teacher: one line, and never anything but a ValueError."""
    with pytest.raises(ValueError) as error:
        networks.load_teacher(path)
    assert '\n' not in str(error.value) and str(error.value).startswith(str(path))
    return str(error.value)


# ------------------------------------------------------------------------------------------------- networks at hand


@pytest.fixture(scope='module')
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module', params=[18, 50])
def torchvision_net(request):
    """A torchvision ResNet with random weights and random statistics, and its depth."""
    torch.manual_seed(0)
    net = torchvision.models.get_model(f'resnet{request.param}', num_classes=7).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2),
            ):
                torch.nn.init.uniform_(tensor, low, high)
    return net.requires_grad_(False), request.param


def small_export(widths=(2, 3, 4, 5), classes=10):
    """The folded export of a ResNet-34 as the authors wrote it, of odd widths: {name: float32 array}."""
    rng, arrays, ni = np.random.default_rng(0), {}, widths[0]

    def conv(name, ni, no, k):
        arrays[f'{name}.weight'] = rng.normal(size=(no, ni, k, k)).astype('f') * (2 / (ni * k * k)) ** 0.5
        arrays[f'{name}.bias'] = rng.normal(size=no).astype('f')

    conv('conv0', 3, ni, 7)
    for g, (blocks, no) in enumerate(zip((3, 4, 6, 3), widths)):
        for i in range(blocks):
            conv(f'group{g}.block{i}.conv0', ni, no, 3)
            conv(f'group{g}.block{i}.conv1', no, no, 3)
            if ni != no or (g and not i):
                conv(f'group{g}.block{i}.conv_dim', ni, no, 1)
            ni = no
    arrays['fc.weight'], arrays['fc.bias'] = rng.normal(size=(classes, ni)).astype('f'), np.zeros(classes, 'f')
    return arrays


def tensors(arrays):
    return {k: torch.from_numpy(v) for k, v in arrays.items()}


def wide_resnet(depth=10):
    torch.manual_seed(0)
    f, params = resnet.wide_resnet(depth, 1, 4)
    return f, {k: torch.rand_like(v) * 0.2 + (0.5 if 'running_var' in k else -0.1) for k, v in params.items()}


def logits_of(path, images):
    f, params = networks.load_teacher(path)
    assert all(v.dtype == torch.float32 and not v.requires_grad for v in params.values())
    return f(images, params, False)[0]


def assert_near(logits, expected):
    """Equal to 1e-5 of the largest logit."""
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


# ---------------------------------------------------------------------------------------------------------- reading


def test_a_torchvision_state_gives_torchvisions_logits_however_it_is_wrapped(torchvision_net, images, tmp_path):
    net, depth = torchvision_net
    path, state, expected = tmp_path / 'model', net.state_dict(), net(images)
    torch.save(state, path)
    assert_near(logits_of(path, images), expected)
    safetensors.torch.save_file(state, path)
    assert_near(logits_of(path, images), expected)
    assert imagenet_resnet.imagenet_resnet_depth(networks.load_params(path)) == depth
    if depth == 18:
        torch.save({'epoch': 3, 'state_dict': {f'module.{k}': v for k, v in state.items()}}, path)
        assert_near(logits_of(path, images), expected)
        torch.save({'model': state, 'args': {'lr': 0.1}}, path)
        assert_near(logits_of(path, images), expected)


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
    assert 'conv0 is there twice' in reason(tmp_path / 'both')


@pytest.mark.parametrize('widths, classes', [((2, 3, 4, 5), 10), ((8, 8, 8, 8), 3)])
def test_the_authors_folded_export_is_read_from_torch_safetensors_and_hkl_files(tmp_path, images, widths, classes):
    arrays = small_export(widths, classes)
    expected = imagenet_resnet.imagenet_forward(images, tensors(arrays), False)[0]
    torch.save(tensors(arrays), tmp_path / 'a.hkl')  # the name tells nothing
    safetensors.torch.save_file(tensors(arrays), tmp_path / 'b.pth')
    hickle.dump(arrays, str(tmp_path / 'c.pth'), mode='w')
    hickle.dump(arrays, str(tmp_path / 'd.pth'), mode='w', compression='gzip', shuffle=True)
    for name in ('a.hkl', 'b.pth', 'c.pth', 'd.pth'):
        assert torch.equal(logits_of(tmp_path / name, images), expected)


def hickle_1(file, arrays):
    file['type'] = np.array([b'dict'])
    for key, value in arrays.items():
        file[f'data/{key}'], file[f'data/_{key}'] = value, np.array([b'ndarray'])


def hickle_2(file, arrays, quote='', root='data_0', inner='data_0', kind='type'):
    file.attrs.update({'CLASS': 'hickle', 'VERSION': 2, 'type': [b'hickle']})
    group = file.create_group(root)
    group.attrs[kind] = [b'dict']
    for key, value in arrays.items():
        item = group.create_group(f'{quote}{key}{quote}')
        item.attrs[kind] = [b'dict_item']
        item.create_dataset(inner, data=value).attrs[kind] = [b'ndarray']


def hickle_3(file, arrays):
    hickle_2(file, arrays, quote="'")


def hickle_4(file, arrays):
    hickle_2(file, arrays, quote="'", root='data', inner='data', kind='base_type')


@pytest.mark.parametrize('layout', [hickle_1, hickle_2, hickle_3, hickle_4])
@pytest.mark.parametrize('dtype', ['f', '>f4', 'd', 'e'])
def test_historical_hickle_files_are_read(tmp_path, layout, dtype):
    arrays = {k: v.astype(dtype) for k, v in small_export().items()}
    with h5py.File(tmp_path / 'old.hkl', 'w') as file:
        layout(file, arrays)
    _, params = networks.load_teacher(tmp_path / 'old.hkl')
    assert set(params) == set(arrays)
    assert all(np.array_equal(params[k].numpy(), v.astype('f')) for k, v in arrays.items())


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

    monkeypatch.setattr(torch.hub, 'urlopen', offline)
    with pytest.raises(OSError, match='torchvision:resnet34: https://.* could not be fetched .*no route to host') as e:
        networks.load_teacher('torchvision:resnet34')
    assert '\n' not in str(e.value)
    (tmp_path / 'hub/checkpoints/resnet34-b627a593.pth').write_bytes(pickle.dumps(Touch(trace)))
    with pytest.raises(OSError, match='could not be fetched or read'):
        networks.load_teacher('torchvision:resnet34')
    assert 'torchvision:resnet18, torchvision:resnet34' in reason('torchvision:resnet7')


# ---------------------------------------------------------------------------------------------------------- writing


@pytest.fixture
def run(tmp_path, torchvision_net):
    """A run of ours whose network is a torchvision ResNet's."""
    run = tmp_path / 'run'
    run.mkdir()
    write.save(run / 'model.pt7', {'params': from_torchvision(torchvision_net[0].state_dict())})
    return run


def exported(script, run, to, out='out', *flags):
    status, said, err = script(checkpoint, 'export', [run, out], f'--to {to}', *flags)
    assert status == 0 and f'for {to}' in said, err
    return out


def test_an_imagenet_resnet_goes_to_each_format_and_is_the_same_there(script, run, torchvision_net, images):
    net, depth = torchvision_net
    expected = net(images)

    torchvision_out = torchvision.models.get_model(f'resnet{depth}', num_classes=7).eval()
    state = torch.load(exported(script, run, 'torchvision', 'tv.pth'), weights_only=True)
    torchvision_out.load_state_dict(state, strict=True)
    assert_near(torchvision_out(images), expected)

    folded = torch.load(exported(script, run, 'upstream', 'folded.pth'), weights_only=True)
    assert {'conv0.weight', 'conv0.bias', 'group1.block0.conv_dim.weight', 'group1.block0.conv_dim.bias'} <= set(folded)
    assert not any('bn' in key for key in folded)
    assert_near(imagenet_resnet.imagenet_forward(images, folded, False)[0], expected)

    hickled = hickle.load(exported(script, run, 'hkl', 'folded.hkl'))
    assert set(hickled) == set(folded) and all(np.array_equal(hickled[k], v.numpy()) for k, v in folded.items())
    assert_near(logits_of('folded.hkl', images), expected)

    plain = safetensors.torch.load_file(exported(script, run, 'safetensors', 'plain.safetensors'))
    params = networks.load(run / 'model.pt7')['params']
    assert set(plain) == set(params) and all(torch.equal(plain[k], v) for k, v in params.items())

    # A folded file goes back to torchvision too.
    torchvision_out.load_state_dict(torch.load(exported(script, 'folded.hkl', 'torchvision'), weights_only=True))
    assert_near(torchvision_out(images), expected)


def onnx_logits(path, images):
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    (logits,) = session.run(['logits'], {'images': images.numpy()})
    return torch.from_numpy(logits)


@pytest.mark.parametrize('torchvision_net', [18], indirect=True)
def test_onnx_gives_the_logits_of_an_imagenet_resnet_for_any_batch(script, run, torchvision_net, images):
    net, _ = torchvision_net
    path = exported(script, run, 'onnx', 'net.onnx', '--image_size 64')
    for batch in (images, images[:1], torch.cat([images, images[:1]])):
        assert_near(onnx_logits(path, batch), net(batch))


def test_a_wide_resnet_keeps_its_params_in_every_format(script, tmp_path):
    f, params = wide_resnet(16)
    write.save(tmp_path / 'model.pt7', {'params': params})
    for to in ('upstream', 'hkl', 'safetensors'):
        _, loaded = networks.load_teacher(exported(script, tmp_path, to, f'wide.{to}'))
        assert list(loaded) == list(params) and all(torch.equal(loaded[k], v) for k, v in params.items())
    assert all(np.array_equal(v, params[k]) for k, v in hickle.load('wide.hkl').items())
    assert refused(
        script(checkpoint, 'export', [tmp_path, 'wide.pth'], '--to torchvision'), 'torchvision has no wide ResNets'
    )
    images = torch.randn(3, 3, 32, 32)
    assert_near(onnx_logits(exported(script, tmp_path, 'onnx', 'wide.onnx'), images), f(images, params, False)[0])


def test_an_existing_file_is_only_replaced_when_told_so(script, tmp_path):
    write.save(tmp_path / 'model.pt7', {'params': wide_resnet()[1]})
    out = tmp_path / 'mine'
    out.write_text('mine')
    assert refused(script(checkpoint, 'export', [tmp_path, out], '--to hkl'), 'mine exists already', '--overwrite')
    assert out.read_text() == 'mine'
    exported(script, tmp_path, 'hkl', out, '--overwrite')
    assert set(hickle.load(str(out))) == set(wide_resnet()[1])


def test_what_cannot_be_exported_leaves_no_file(script, tmp_path, monkeypatch):
    out = tmp_path / 'out'
    assert refused(script(checkpoint, 'export', [tmp_path / 'none', out], '--to hkl'), 'no such checkpoint')
    assert refused(script(checkpoint, 'export', [tmp_path, out], '--to pickle'), 'invalid choice')
    write.save(tmp_path / 'model.pt7', {'params': wide_resnet()[1]})
    write.save(tmp_path / 'nin.pt7', {'params': nin.nin(1 / 32, 4)[1]})
    small = script(checkpoint, 'export', [tmp_path / 'nin.pt7', out], '--to onnx --image_size 1')
    assert refused(small, '--image_size 1 is too small for the network')
    monkeypatch.setitem(sys.modules, 'onnxscript', None)  # as if it were not installed
    assert refused(script(checkpoint, 'export', [tmp_path, out], '--to onnx'), 'needs onnxscript: pip install')
    assert not out.exists()


def test_info_says_what_a_file_holds(script, tmp_path, torchvision_net, run):
    write.save(tmp_path / 'model.pt7', {'params': wide_resnet(16)[1]})
    status, out, _ = script(checkpoint, 'info', [tmp_path])
    assert status == 0 and 'WRN-16-1, 4 classes' in out and '174,676 parameters' in out and 'float32' in out
    hickle.dump({k: v.astype('e') for k, v in small_export().items()}, 'small.hkl', mode='w')
    _, out, _ = script(checkpoint, 'info', 'small.hkl')
    assert 'ResNet-34, folded batch norm, 10 classes, widths 2/3/4/5' in out and 'float16' in out
    assert f'{(tmp_path / "small.hkl").stat().st_size:,} bytes, SHA-256 ' in out
    widths = {18: '64/128/256/512', 50: '256/512/1024/2048'}[torchvision_net[1]]
    assert f'ResNet-{torchvision_net[1]}, 7 classes, widths {widths}' in script(checkpoint, 'info', [run])[1]
    assert refused(script(checkpoint, 'info', 'nothing.pth'), 'no such checkpoint')


# ------------------------------------------------------------------------------------------- files that do not fit


def test_what_does_not_fit_an_imagenet_resnet_is_named(tmp_path):
    path, arrays = tmp_path / 'export.pth', tensors(small_export())

    def message(changed):
        torch.save({k: v for k, v in {**arrays, **changed}.items() if v is not None}, path)
        return reason(path)

    assert 'no group1.block0.conv_dim.bias' in message({'group1.block0.conv_dim.bias': None})
    assert 'unknown extra' in message({'extra': torch.ones(1)})
    assert 'fc.weight is (10, 6), not (10, 5)' in message({'fc.weight': torch.ones(10, 6)})
    assert 'conv0.weight is (), not (' in message({'conv0.weight': torch.tensor(1.0)})
    assert 'conv0.weight is (2, 4, 7, 7), not (2, 3, 7, 7)' in message({'conv0.weight': torch.ones(2, 4, 7, 7)})
    assert 'conv0.bias is torch.int64' in message({'conv0.bias': torch.ones(2, dtype=torch.int64)})
    assert 'fc.bias has values that are not finite' in message({'fc.bias': torch.full((10,), torch.nan)})
    assert 'conv0.bias has values that are not finite' in message({'conv0.bias': torch.tensor([1, torch.inf])})
    assert 'fc.weight is empty' in message({'fc.weight': torch.ones(0, 5), 'fc.bias': torch.ones(0)})
    assert 'no ImageNet ResNet' in message({k: None for k in arrays if 'group3.block1' in k})
    assert 'and 3 more' in message({f'extra{i}': torch.ones(1) for i in range(6)})


def test_wide_resnets_that_are_not_finite_or_too_large_to_be_true_are_refused(tmp_path):
    path, (_, params) = tmp_path / 'model.pt7', wide_resnet()
    write.save(path, {'params': {**params, 'bn.running_var': -torch.ones(64)}})
    assert 'bn.running_var is negative' in reason(path)
    write.save(path, {'params': {**params, 'conv0': params['conv0'] * torch.nan}})
    assert 'conv0 has values that are not finite' in reason(path)
    write.save(path, {'params': {**params, 'bn.weight': torch.ones(65536)}})  # of 150 GB, if that were so
    assert 'does not fit the network' in reason(path)


def test_a_log_that_speaks_of_another_shape_is_believed_no_more_than_the_file(tmp_path):
    path, arrays = tmp_path / 'model.pt7', tensors(small_export())
    torch.manual_seed(0)
    write.save(path, {'params': resnet.wide_resnet(10, 1.03, 4)[1]})
    networks.load_teacher(path, (10, 1.03))
    for shape in ((16, 1.03), (10, 2), (None, None), ('10', '1')):
        with pytest.raises(ValueError, match='is a WRN-10-1.01562, but its log speaks of a WRN'):
            networks.load_teacher(path, shape)
    torch.save(arrays, path)
    with pytest.raises(ValueError, match='is a ResNet-34-0.03125, but its log speaks of a ResNet-18-1'):
        networks.load_teacher(path, (18, 1))


# ------------------------------------------------------------------------------------------ files of training scripts


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('protocol', [3, 4, 5])
def test_newer_pickles_are_read_as_the_usual_ones(tmp_path, zipped, protocol):
    arrays = tensors(small_export())
    more = {'note': 'conv0.weight', 'list': ['storage', 'cpu', 2.5, None, True, (1, 2, 3, 4)], 'long': 'x' * 70_000}
    state = {'net': {k: torch.nn.Parameter(v) for k, v in arrays.items()}, **more, 'dtype': torch.float16}
    torch.save(state, tmp_path / 'a', pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    found = read.read(tmp_path / 'a')
    assert {k: v for k, v in found.items() if k in more} == more and found['dtype'] == torch.float16
    _, params = networks.load_teacher(tmp_path / 'a')
    assert all(torch.equal(params[k], v) for k, v in arrays.items())


@pytest.mark.parametrize('zipped', [True, False])
def test_a_whole_network_is_refused_with_what_to_save_instead(tmp_path, zipped, torchvision_net):
    for state in (torchvision_net[0], {'model': torch.nn.Sequential(torch.nn.Linear(2, 2))}):
        for protocol in (2, 4):
            torch.save(state, tmp_path / 'a', pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
            assert 'torch.save(model.state_dict(), "weights.pth")' in reason(tmp_path / 'a')


@pytest.mark.parametrize('name', ['a.pth', 'it\'s $(touch trace) `touch trace`; touch trace \\ "; touch trace; #.pth'])
@pytest.mark.parametrize('key', ['state_dict', 'model', 'net', 'params'])
@pytest.mark.parametrize('protocol', [2, 4])
def test_a_command_takes_the_weights_out_of_what_a_training_script_saved(script, tmp_path, trace, name, key, protocol):
    """Their names are as a shell takes them, and only whoever runs the command runs what is in the file."""
    arrays, path = tensors(small_export()), tmp_path / name
    statistics = {'unused.running_mean': torch.ones(1)} if key == 'params' else {}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
    state = {
        'args': argparse.Namespace(model='resnet34', net=0.1),
        'best': np.float64(93),
        'x': np.ones(2),
        key: arrays,
    }
    torch.save({**state, 'optimizer': optimizer, 'stats': statistics}, path, pickle_protocol=protocol)
    status, out, err = script(checkpoint, 'info', [path])
    assert refused((status, out, err), "'argparse Namespace' in it is neither a tensor", 'if you trust it')
    command = re.search('python -c .*', err)[0]
    assert shlex.split(command)[:2] == ['python', '-c'] and not (tmp_path / 'weights.pth').exists()
    subprocess.run(command.replace('python', sys.executable, 1), shell=True, check=True, cwd=tmp_path)
    params = networks.load_params(tmp_path / 'weights.pth')
    assert params.keys() == arrays.keys() | statistics.keys()
    assert all(torch.equal(params[k], v) for k, v in arrays.items())


def test_a_file_of_other_things_gets_no_such_command(tmp_path, trace):
    arrays = tensors(small_export())
    for state in ({'state_dict': arrays, 'x': np.float64(3), 'y': Touch(trace)}, {'model': arrays, 'y': Touch(trace)}):
        torch.save(state, tmp_path / 'a')
        assert 'python' not in reason(tmp_path / 'a')
    torch.save({'weights': arrays, 'x': np.float64(3)}, tmp_path / 'a')
    assert reason(tmp_path / 'a').endswith('save the parameters alone: torch.save(model.state_dict(), "weights.pth")')


# ---------------------------------------------------------------------------------------------------- hostile files


def test_code_in_a_torch_file_is_not_run(tmp_path, trace):
    path = tmp_path / 'model.pth'
    for state in ({'conv0.weight': Touch(trace)}, {'state_dict': Touch(trace)}, Touch(trace)):
        for zipped, protocol in itertools.product((True, False), (2, 4, 5)):
            torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
            assert "open' in it is neither a tensor" in reason(path)
        path.write_bytes(pickle.dumps(state))
        assert 'is not a checkpoint' in reason(path)


def test_tensors_larger_than_their_file_are_refused(tmp_path):
    state = {**tensors(small_export()), 'conv0.weight': torch.ones(1).expand(10**5, 10**5, 7, 7)}
    torch.save(state, tmp_path / 'stride')
    assert "'conv0.weight' in it is not a named tensor" in reason(tmp_path / 'stride')
    torch.save({'conv0.weight': torch.ones(10**5, 10**5, device='meta')}, tmp_path / 'meta')
    assert '_rebuild_meta_tensor_no_storage' in reason(tmp_path / 'meta')
    torch.save({'conv0.weight': torch.ones(2, 2).to_sparse()}, tmp_path / 'sparse')
    assert 'is not a checkpoint' in reason(tmp_path / 'sparse')


def test_a_zip_bomb_is_refused(tmp_path):
    torch.save({'conv0.weight': torch.zeros(5_000_000)}, tmp_path / 'plain')
    with zipfile.ZipFile(tmp_path / 'plain') as plain, zipfile.ZipFile(tmp_path / 'bomb', 'w', 8) as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    assert torch.load(tmp_path / 'bomb', weights_only=True)  # torch would unpack it
    assert 'a zip archive that unpacks to 20,' in reason(tmp_path / 'bomb')
    with open(tmp_path / 'bomb', 'ab') as bomb:
        bomb.write(b'PK\5\6')  # zipfile takes it for the end of an archive and finds none; torch looks further
    assert torch.load(tmp_path / 'bomb', weights_only=True)
    assert 'not a zip file' in reason(tmp_path / 'bomb')


def with_pickle(path, content):
    """Save a checkpoint and put another pickle in the place of its own."""
    torch.save({'a': torch.ones(1)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w') as archive:
        for name, value in entries.items():
            archive.writestr(name, content if name.endswith('data.pkl') else value)
    return path


def legacy(path, content):
    """A checkpoint from before there were archives, with another pickle in the place of its own."""
    start = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {'little_endian': True})]
    path.write_bytes(b''.join([*start, content, pickle.dumps([], 2)]))
    return path


HUGE = b'\x80\x02cbuiltins\nbytearray\n\x8a\x05' + (2**34).to_bytes(5, 'little') + b'\x85R.'  # bytearray(2**34)
DOUBLED = b'\x80\x02' + b'c_codecs\nencode\n' * 31 + b'X\1\0\0\0aX\5\0\0\0utf-8\x86R' + b'X\3\0\0\0hex\x86R' * 30 + b'.'
NESTED = (  # t = (t, t, t), thirty times, as a key: to hash it is to visit 3 ** 30 objects
    b'\x80\x02})q\0' + b''.join(b'h%ch%ch%c\x87q%c' % (i, i, i, i + 1) for i in range(30)) + b'K\1s.'
)


def words(*texts):
    """The operations that push and memoize texts in protocol 4."""
    return b''.join(b'\x8c%c%s\x94' % (len(text), text) for text in texts)


HUGE_4 = b'\x80\4' + words(b'builtins', b'bytearray') + b'\x93\x8a\5' + (2**34).to_bytes(5, 'little') + b'\x85R.'
HIDDEN_4 = b'\x80\4' + words(b'torch', b'Size\nR.cbuiltins\nbytearray') + b'\x93.'
NESTED_4 = b'\x80\4' + NESTED[2:].replace(b'})q\0', b'})\x94')
LONG_4 = b'\x80\4' + words(b'x' * 199) + b'h\0' * 2**20 + b'.'  # 2 bytes each, 200 in its place


@pytest.mark.parametrize('write', [with_pickle, legacy])
@pytest.mark.parametrize(
    'content, message',
    [
        (HUGE_4, "'builtins bytearray' in it is neither"),
        (HIDDEN_4, "'Size\\nR.cbuiltins\\nbytearray' in it is no name"),
        (NESTED_4, '10,000,000 objects'),
        (LONG_4, 'grows 8-fold'),
        (b'\x80\4' + words(b'torch') + b'\x93.', 'is not a checkpoint'),
        (b'\x80\4' + words(b'torch') + b'}\x93.', 'is not a checkpoint'),
        (b'\x80\4' + words(b'torch', b'Size') + b'K\1\x93.', 'is not a checkpoint'),
    ],
)
def test_a_hostile_pickle_of_protocol_4_is_refused_as_one_of_protocol_2(tmp_path, write, content, message):
    since = time.process_time()
    assert message in reason(write(tmp_path / 'pickle', content))
    assert time.process_time() - since < 60


@pytest.mark.parametrize('write', [with_pickle, legacy])
@pytest.mark.parametrize(
    'content, message',
    [
        (HUGE, "'builtins bytearray' in it is neither"),
        (DOUBLED, "'_codecs encode' in it"),
        (NESTED, '10,000,000 objects'),
    ],
)
def test_a_short_pickle_of_gigabytes_or_years_is_refused_at_once(tmp_path, write, content, message):
    assert len(content) < 2000
    since = time.process_time()
    assert message in reason(write(tmp_path / 'pickle', content))
    assert time.process_time() - since < 10  # of the processor, whatever else it does


def test_a_second_directory_in_an_archive_is_not_what_torch_reads(tmp_path):
    """The end of an archive points at its directory; zipfile reads the one just before the end instead."""
    path = with_pickle(tmp_path / 'two', pickle.dumps({'a': 1}, 2))
    content = path.read_bytes()
    end = content.rindex(b'PK\5\6')
    size, start = struct.unpack('<II', content[end + 12 : end + 20])
    directory = content[start : start + size]
    other = directory.replace(b'data.pkl', b'atad.pkl')
    path.write_bytes(content[:start] + directory + other + content[end:])
    assert torch.load(path, weights_only=True) == {'a': 1}
    with pytest.raises(ValueError, match='is not a checkpoint'):
        read.read(path)


@pytest.fixture
def hkl(tmp_path):
    """Make an .hkl in the layout of hickle 5 and hand it to a function: hkl(change) -> path."""

    def make(change):
        path = tmp_path / 'hostile.hkl'
        hickle.dump(small_export(), str(path), mode='w')
        with h5py.File(path, 'r+') as file:
            change(file['data'])
        return path

    return make


def test_links_in_hdf5_are_not_followed(hkl, tmp_path):
    with h5py.File(tmp_path / 'other.h5', 'w') as other:
        other['secret'] = np.ones(3, 'f')

    def put(link):
        def change(data):
            data['"x"'] = link

        return change

    for link in (h5py.SoftLink('/data/"fc.bias"'), h5py.SoftLink('/nowhere'), h5py.ExternalLink('other.h5', '/secret')):
        assert 'is a link to elsewhere' in reason(hkl(put(link)))
    with h5py.File(tmp_path / 'root.hkl', 'w') as file:
        file['data'] = h5py.ExternalLink('other.h5', '/')
    assert 'is a link to elsewhere' in reason(tmp_path / 'root.hkl')


def test_values_in_other_files_are_not_read(hkl, tmp_path):
    secret = tmp_path / 'secret'
    secret.write_bytes(bytes(12))
    layout = h5py.VirtualLayout((3,), 'f')
    layout[:] = h5py.VirtualSource(str(tmp_path / 'other.h5'), 'secret', (3,))
    external = hkl(lambda data: data.create_dataset('"x"', (3,), 'f', external=[(str(secret), 0, 12)]))
    assert "'x' keeps its values in other files" in reason(external)
    virtual = hkl(lambda data: data.create_virtual_dataset('"x"', layout))
    assert "'x' keeps its values in other files" in reason(virtual)


def test_hard_link_loops_and_nested_groups_end(hkl):
    def loop(data):
        data['"x"'] = data

    def inner_loop(data):
        data.create_group('"x"')['data'] = data

    def root(data):
        data['"x"'] = data.file['/']

    def alias(data):
        data['"x"'] = data['"fc.weight"']

    for change in (loop, inner_loop, root, alias):
        assert 'leads to what was there before' in reason(hkl(change))
    assert 'a group of other things' in reason(hkl(lambda data: data.create_group('"x"/data/data/data')))
    assert 'a group of other things' in reason(hkl(lambda data: data.create_group('"x"')))


def test_a_group_of_countless_objects_is_refused(hkl, monkeypatch):
    monkeypatch.setattr('formats.hdf5.MAX_NODES', 20)
    assert '74 objects in one group; at most 20' in reason(hkl(lambda data: None))


def test_huge_declared_shapes_are_refused_before_memory_is_taken(hkl):
    def declare(shape, **how):
        return lambda data: data.create_dataset('"x"', shape, 'f', **how)

    changes = [
        declare((2**16, 2**16)),  # 16 GiB, of which nothing was ever written
        declare((2**16, 2**16), chunks=(2**10, 2**10)),
        declare((2**16, 2**16), chunks=(2**10, 2**10), compression='gzip'),
        declare((2**20,)),  # 4 MiB from some kilobytes
        declare((2**63 - 1,), chunks=(1,)),
        declare((2**20,), chunks=(1,), compression='gzip'),
        declare((8,), chunks=(2**28,), maxshape=(None,)),
    ]
    for change in changes:
        path = hkl(change)
        tracemalloc.start()
        message = reason(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert "'x' declares" in message or "'x' is cut into" in message
        assert peak < 3e6


def test_arrays_that_together_exceed_the_budget_are_refused(hkl, monkeypatch):
    monkeypatch.setattr('formats.read.MAX_BYTES', 10_000)
    path = hkl(lambda data: None)
    assert 'it has' in reason(path) and 'at most 10,000 are read' in reason(path)
    monkeypatch.setattr('formats.read.MAX_BYTES', path.stat().st_size)
    zeros = hkl(lambda data: data.create_dataset('"x"', data=np.zeros(400_000, 'f'), compression='gzip'))
    monkeypatch.setattr('formats.read.MAX_BYTES', zeros.stat().st_size)
    assert 'and what is before it declare more than' in reason(zeros)


def test_a_chunk_that_unpacks_to_more_than_its_share_is_refused(hkl):
    def bomb(data):
        x = data.create_dataset('"x"', (64,), 'f', chunks=(64,), compression='gzip')
        x.id.write_direct_chunk((0,), zlib.compress(bytes(50_000_000)))

    assert 'a chunk that unpacks to more than its 256 bytes' in reason(hkl(bomb))


def test_other_filters_and_types_than_known_ones_are_refused(hkl):
    x = np.ones((4, 4), 'f')
    for how in ({'compression': 'lzf'}, {'scaleoffset': 2}, {'fletcher32': True}):
        assert 'in another way than gzip' in reason(hkl(lambda data: data.create_dataset('"x"', data=x, **how)))  # noqa: B023
    for array in (x.astype('i4'), x.astype(bool), x.astype('c8'), np.array([b'abc']), h5py.Empty('f')):
        assert 'not an array of floats' in reason(hkl(lambda data: data.create_dataset('"x"', data=array)))  # noqa: B023
    text = hkl(lambda data: data.create_dataset('"x"', data='text', dtype=h5py.string_dtype()))
    assert 'not an array of floats' in reason(text)


@pytest.mark.filterwarnings('ignore:.*not understood')
def test_what_hickle_pickled_is_not_unpickled(hkl, tmp_path, trace):
    path = str(tmp_path / 'pickled.hkl')
    hickle.dump({**small_export(), 'x': Touch(trace)}, path, mode='w')
    assert "'x' is uint8, not an array of floats; what is pickled is not read" in reason(path)
    hickle.dump(Touch(trace), path, mode='w')
    assert 'is no dictionary of arrays' in reason(path)
    code = pickle.dumps(Touch(trace))
    with h5py.File(path, 'w') as file:  # hickle 3
        hickle_3(file, {**small_export(), 'x': np.array([code])})
    assert 'what is pickled is not read' in reason(path)
    with h5py.File(path, 'w') as file:  # hickle 4 pickles the types of arrays
        hickle_4(file, small_export())
        for group in file['data'].values():
            group['data'].attrs['type'] = np.void(code)
    networks.load_teacher(path)


def test_hdf5_that_holds_something_else_is_refused(tmp_path):
    path = tmp_path / 'other.h5'
    with h5py.File(path, 'w') as file:
        file['weights'] = np.ones(3)
    assert 'without the dictionary that hickle writes' in reason(path)
    with h5py.File(path, 'w') as file:
        file['data/a'], file["data/'a'"] = np.ones(3), np.ones(3)
    assert "'a' is there twice" in reason(path)


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    arrays, path = small_export((2, 2, 2, 2)), tmp_path / 'cut'
    hickle.dump(arrays, str(tmp_path / 'hkl'), mode='w')
    with h5py.File(tmp_path / 'old', 'w') as file:
        hickle_2(file, arrays)
    torch.save(tensors(arrays), tmp_path / 'pth')
    torch.save(tensors(arrays), tmp_path / 'legacy', _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(tensors(arrays), tmp_path / 'safetensors')
    for kind in ('hkl', 'old', 'pth', 'legacy', 'safetensors'):
        content = (tmp_path / kind).read_bytes()
        for tenth in range(10):
            path.write_bytes(content[: len(content) * tenth // 10])
            assert 'is not a checkpoint' in reason(path)


def test_a_safetensors_header_that_lies_is_refused(tmp_path):
    path = tmp_path / 'lying.safetensors'

    def write(header, data=bytes(8), length=None):
        text = json.dumps(header).encode()
        path.write_bytes((len(text) if length is None else length).to_bytes(8, 'little') + text + data)

    def entry(shape=(2,), offsets=(0, 8), dtype='F32'):
        return {'dtype': dtype, 'shape': list(shape), 'data_offsets': list(offsets)}

    write({'x': entry()})
    assert torch.equal(read.read(path)['x'], torch.zeros(2))
    lies = [
        ({'x': entry(shape=(2**16, 2**16))}, {}),
        ({'x': entry(shape=(2**16, 2**16), offsets=(0, 2**34))}, {}),
        ({'x': entry(offsets=(0, 16), shape=(4,))}, {}),
        ({'x': entry(offsets=(-8, 0))}, {}),
        ({'x': entry(shape=(2**62, 4))}, {}),
        ({'x': entry(), 'y': entry()}, {}),
        ({'x': entry(dtype='pickle')}, {}),
        ({'x': entry()}, {'length': 2**63}),
        ({'x': entry()}, {'length': 10**6}),
        ({'x': entry()}, {'data': bytes(100)}),
        ([1], {}),
    ]
    for header, how in lies:
        write(header, **how)
        assert 'is not a checkpoint' in reason(path)


@pytest.mark.parametrize('content', [b'', b'{}', b'PK\x03\x04', b'\x89HDF\r\n\x1a\n', b'<html>404</html>', b'\0' * 99])
def test_what_is_no_network_at_all_is_refused(tmp_path, content):
    path = tmp_path / 'file'
    path.write_bytes(content)
    assert 'is not a checkpoint' in reason(path)
    with pytest.raises(OSError, match='no such checkpoint'):
        networks.load_teacher(tmp_path)


@pytest.mark.parametrize('state', [3, [torch.ones(1)], {'a\nb': torch.ones(1)}, {3: torch.ones(1)}, {'a': 1}])
def test_a_torch_file_without_named_tensors_is_refused(tmp_path, state):
    torch.save(state, tmp_path / 'file')
    assert 'is not a checkpoint' in reason(tmp_path / 'file')
