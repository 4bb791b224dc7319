"""Networks in other formats keep their logits, and nothing is written by halves."""

import os
import sys

import hickle
import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
import torchvision
from conftest import refused
from saved import assert_near, logits_of, small_export, wide_resnet

import checkpoint
import imagenet_resnet
import nin
from engine.log import read_log
from engine.table import around
from formats import networks, write
from formats.torchvision import from_torchvision


@pytest.fixture
def run(tmp_path, torchvision_net):
    """One of our runs whose network is a torchvision ResNet's."""
    run = tmp_path / 'run'
    run.mkdir()
    write.save(run / 'model.pt7', {'params': from_torchvision(torchvision_net[0].state_dict())})
    return run


def exported(script, run, to, out='out', *flags):
    status, said, err = script(checkpoint, 'export', [run, out], f'--to {to}', *flags)
    assert status == 0 and f'for {to}' in said, err
    return out


@pytest.mark.slow
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

    # A folded file can be written for torchvision too.
    torchvision_out.load_state_dict(torch.load(exported(script, 'folded.hkl', 'torchvision'), weights_only=True))
    assert_near(torchvision_out(images), expected)


def onnx_logits(path, images):
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    (logits,) = session.run(['logits'], {'images': images.numpy()})
    return torch.from_numpy(logits)


@pytest.mark.slow
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
        script(checkpoint, 'export', [tmp_path, 'wide.pth'], '--to torchvision'),
        'torchvision has no network like WRN-16-1, 4 classes',
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
    _, _, err = result = script(checkpoint, 'export', [tmp_path, tmp_path / 'no' / 'out'], '--to hkl')
    assert refused(result, 'no/out could not be written: No such file or directory') and 'the old file' not in err


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


@pytest.mark.parametrize(
    'use', [lambda path: write.write_whole(path, b'x'), read_log, lambda path: around(path, 'table1')]
)
def test_pipes_and_devices_are_neither_replaced_nor_waited_for(tmp_path, use):
    os.mkfifo(tmp_path / 'pipe')
    for path in (tmp_path / 'pipe', '/dev/full'):
        with pytest.raises(OSError, match='is a folder, device or pipe'):
            use(str(path))
        assert not os.path.isfile(path)


def test_a_folder_in_the_way_of_a_checkpoint_is_told(tmp_path):
    (tmp_path / 'model.pt7.tmp').mkdir()
    with pytest.raises(OSError, match='model.pt7 could not be written: Is a directory'):
        write.save(tmp_path / 'model.pt7', {'params': {}})


def test_only_onnx_has_a_size_of_images(script, tmp_path):
    write.save(tmp_path / 'model.pt7', {'params': {}})
    said = script(checkpoint, 'export', [tmp_path, tmp_path / 'a.hkl'], '--to hkl --image_size 64')
    assert refused(said, '--image_size goes with --to onnx')
