"""A network of any family is read back from its file, and a file that fits none is refused with the reason."""

import hickle
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import refused
from saved import logits_of, reason, small_export, tensors, wide_resnet

import checkpoint
import cifar
import imagenet_resnet
import resnet
from formats import networks, write
from layers import batch_norm, folded_conv
from utils import bnparams, conv_params, flatten, linear_params, set_requires_grad_except_bn_


@pytest.mark.parametrize('widths, classes', [((2, 3, 4, 5), 10), ((8, 8, 8, 8), 3)])
def test_the_authors_folded_export_is_read_from_torch_safetensors_and_hkl_files(tmp_path, images, widths, classes):
    arrays = small_export(widths, classes)
    expected = imagenet_resnet.imagenet_forward(images, tensors(arrays), False)[0]
    torch.save(tensors(arrays), tmp_path / 'a.hkl')  # the suffix does not matter
    safetensors.torch.save_file(tensors(arrays), tmp_path / 'b.pth')
    hickle.dump(arrays, str(tmp_path / 'c.pth'), mode='w')
    hickle.dump(arrays, str(tmp_path / 'd.pth'), mode='w', compression='gzip', shuffle=True)
    for name in ('a.hkl', 'b.pth', 'c.pth', 'd.pth'):
        assert torch.equal(logits_of(tmp_path / name, images), expected)


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
    assert 'not an ImageNet ResNet' in message({k: None for k in arrays if 'group3.block1' in k})
    assert 'and 3 more' in message({f'extra{i}': torch.ones(1) for i in range(6)})


def test_wide_resnets_that_are_not_finite_or_too_large_to_be_true_are_refused(tmp_path):
    path, (_, params) = tmp_path / 'model.pt7', wide_resnet()
    write.save(path, {'params': {**params, 'bn.running_var': -torch.ones(64)}})
    assert 'bn.running_var is negative' in reason(path)
    write.save(path, {'params': {**params, 'conv0': params['conv0'] * torch.nan}})
    assert 'conv0 has values that are not finite' in reason(path)
    write.save(path, {'params': {**params, 'bn.weight': torch.ones(65536)}})  # which would have 150 GB
    assert 'does not fit the network' in reason(path)


def test_a_log_that_speaks_of_another_shape_is_believed_no_more_than_the_file(tmp_path):
    path, arrays = tmp_path / 'model.pt7', tensors(small_export())
    torch.manual_seed(0)
    write.save(path, {'params': resnet.wide_resnet(10, 1.03, 4)[1]})
    networks.load_teacher(path, (10, 1.03))
    for shape in ((16, 1.03), (10, 2), (None, None), ('10', '1')):
        with pytest.raises(ValueError, match='is a WRN-10-1.01562, but its log names a WRN'):
            networks.load_teacher(path, shape)
    torch.save(arrays, path)
    with pytest.raises(ValueError, match='is a ResNet-34-0.03125, but its log names a ResNet-18-1'):
        networks.load_teacher(path, (18, 1))


# ------------------------------------------------------------------------------------------------ a family of one's own


def plain(width, num_classes):
    """Three convolutions with batch norm: a family that the table does not have."""
    ni, params = 3, {}
    for i in range(3):
        no = int(8 * width) * 2**i
        params[f'stage{i}'] = {'conv': conv_params(ni, no, 3), 'bn': bnparams(no)}
        ni = no
    params = flatten({**params, 'fc': linear_params(ni, num_classes)})
    set_requires_grad_except_bn_(params)
    return plain_forward, params


def plain_forward(x, params, mode, base=''):
    groups = []
    for stage in (f'{base}stage{i}.' for i in range(3)):
        x = F.conv2d(x, params[stage + 'conv'], params.get(stage + 'bias'), 1 if groups == [] else 2, 1)
        x = F.relu(batch_norm(x, params, stage + 'bn', mode) if stage + 'bias' not in params else x)
        groups.append(x)
    return F.linear(x.mean((2, 3)), params[base + 'fc.weight'], params[base + 'fc.bias']), tuple(groups)


def plain_expected(params):
    width = len(params['stage0.conv']) / 8
    params = plain(width, len(params['fc.bias']))[1]
    return plain_forward, {k: v.shape for k, v in params.items()}, (None, width)


def fold_plain(params):
    folded = {k: v for k, v in params.items() if '.bn.' not in k}
    for stage in ('stage0.', 'stage1.', 'stage2.'):
        folded[stage + 'conv'], folded[stage + 'bias'] = folded_conv(params[stage + 'conv'], params, stage + 'bn')
    return folded


PLAIN = networks.Family(
    title='Plain',
    plural='plain networks',
    script='cifar.py',
    flags=('width',),
    network=lambda opt: lambda num_classes: plain(opt.width, num_classes),
    first=r'stage0\.conv',
    owns=lambda params: 'stage0.conv' in params,
    expected=plain_expected,
    unit=8,
    fold=fold_plain,
    describe=lambda params: f'Plain-{len(params["stage0.conv"]) / 8:g}, {len(params["fc.bias"])} classes',
)


def test_a_line_of_the_table_is_all_that_a_family_needs_to_be_trained_and_to_teach(script, train, monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, 'plain', PLAIN)
    once = '--epochs 1 --epoch_step []'
    status, _, err = train('--net plain', once, '--save logs/plain')
    assert status == 0, err
    f, params = networks.load_teacher('logs/plain/model.pt7', (None, 0.25))
    assert f is plain_forward and params.keys() == plain(0.25, 3)[1].keys()
    assert 'logs/plain/model.pt7: Plain-0.25, 3 classes' in script(checkpoint, 'info logs/plain')[1]
    torch.save({'state_dict': {f'module.{k}': v for k, v in params.items()}}, 'wrapped.pth')
    wrapped = networks.load_teacher('wrapped.pth')[1]
    assert all(torch.equal(wrapped[k], v) for k, v in params.items())
    status, out, err = train('--teacher_id plain --beta 100 --alpha 0.5', once, '--save logs/student')
    assert status == 0 and 'teacher: ' in out, err
    assert networks.describe(networks.load_teacher('logs/student/model.pt7')[1]) == 'WRN-10-0.25, 3 classes'


def test_a_family_is_offered_where_networks_are_named(script, train, tmp_path, monkeypatch):
    assert refused(train('--net plain'), "invalid choice: 'plain' (choose from 'wrn', 'nin')")
    monkeypatch.setitem(networks.NETWORKS, 'plain', PLAIN)
    assert refused(train('--net plain --no_bn'), '--no_bn: plain networks have batch norm; --net nin can do without')
    out = script(cifar, '--help')[1]
    assert '--net {wrn,nin,plain}' in out and 'or plain networks' in ' '.join(out.split())
    torch.save({'x': torch.ones(1)}, tmp_path / 'x.pth')
    assert '101 and 152 and plain networks; examples/' in reason(tmp_path / 'x.pth')
