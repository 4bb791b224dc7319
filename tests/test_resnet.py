"""The functional networks against an independent one built from torch.nn modules."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import resnet
import utils


class Block(nn.Module):
    """The pre-activation basic block of wide ResNets, in torch.nn."""

    def __init__(self, ni, no, stride):
        super().__init__()
        self.bn0, self.bn1 = nn.BatchNorm2d(ni), nn.BatchNorm2d(no)
        self.conv0 = nn.Conv2d(ni, no, 3, stride, 1, bias=False)
        self.conv1 = nn.Conv2d(no, no, 3, 1, 1, bias=False)
        self.convdim = nn.Conv2d(ni, no, 1, stride, bias=False) if ni != no else None

    def forward(self, x):
        o = self.bn0(x).relu()
        shortcut = x if self.convdim is None else self.convdim(o)
        return self.conv1(self.bn1(self.conv0(o)).relu()) + shortcut


class WideResNet(nn.Module):
    def __init__(self, depth, width, num_classes):
        super().__init__()
        n, channels = (depth - 4) // 6, [16, *(int(c * width) for c in (16, 32, 64))]
        self.conv0 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        for g in range(3):
            blocks = [
                Block(channels[g] if i == 0 else channels[g + 1], channels[g + 1], 2 if g and not i else 1)
                for i in range(n)
            ]
            self.add_module(f'group{g}', nn.Sequential(*blocks))
        self.bn, self.fc = nn.BatchNorm2d(channels[3]), nn.Linear(channels[3], num_classes)

    def forward(self, x):
        g0 = self.group0(self.conv0(x))
        g1 = self.group1(g0)
        g2 = self.group2(g1)
        return self.fc(nn.functional.adaptive_avg_pool2d(self.bn(g2).relu(), 1).flatten(1)), (g0, g1, g2)


def module_key(key):
    """conv0 -> conv0.weight, group0.block1.bn0.bias -> group0.1.bn0.bias."""
    key = key.replace('block', '')
    return key + '.weight' if key.rsplit('.')[-1].startswith('conv') else key


@pytest.mark.parametrize('depth, width, classes', [(10, 1, 10), (16, 2, 7), (22, 0.5, 3)])
@pytest.mark.parametrize('training', [True, False])
def test_logits_groups_and_statistics_equal_those_of_modules(depth, width, classes, training):
    torch.manual_seed(0)
    f, params = resnet.wide_resnet(depth, width, classes)
    params = {k: v.detach().double() for k, v in params.items()}
    for key, value in params.items():
        if key.endswith('running_var') or key.endswith('bias'):
            value.uniform_(0.5, 1.5)
    module = WideResNet(depth, width, classes).double().train(training)
    missing = module.load_state_dict({module_key(k): v for k, v in params.items()}, strict=False)
    assert not missing.unexpected_keys and all(k.endswith('num_batches_tracked') for k in missing.missing_keys)
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    logits, groups = f(x, params, training)
    expected_logits, expected_groups = module(x)
    torch.testing.assert_close(logits, expected_logits)
    for group, expected in zip(groups, expected_groups):
        torch.testing.assert_close(group, expected)
    after = module.state_dict()
    for key, value in params.items():
        torch.testing.assert_close(value, after[module_key(key)])


@pytest.mark.parametrize(
    'depth, width, count', [(16, 1, 175_066), (16, 2, 691_674), (40, 1, 563_930), (40, 2, 2_243_546)]
)
def test_parameter_counts_are_those_of_the_paper(depth, width, count):
    assert utils.num_parameters(resnet.wide_resnet(depth, width, 10)[1]) == count


def test_keys_are_those_of_the_authors_and_a_prefix_is_followed():
    f, params = resnet.wide_resnet(16, 2, 10)
    assert {'conv0', 'group0.block0.conv0', 'group2.block1.bn1.running_var', 'group1.block0.convdim'} <= set(params)
    assert {'bn.weight', 'fc.weight', 'fc.bias'} <= set(params) and 'group0.block1.convdim' not in params
    x = torch.randn(2, 3, 32, 32)
    plain, groups = f(x, params, False)
    prefixed, _ = f(x, {f'teacher.{k}': v for k, v in params.items()}, False, 'teacher.')
    assert torch.equal(plain, prefixed)
    assert [g.shape[1:] for g in groups] == [(32, 32, 32), (64, 16, 16), (128, 8, 8)]


@pytest.mark.parametrize('depth', [-2, 0, 4, 15, 17, 41])
def test_depth_that_fits_no_network_is_one_clear_error(depth):
    with pytest.raises(ValueError, match=f'--depth {depth}: .*6n'):
        resnet.wide_resnet(depth, 1, 10)


@pytest.mark.parametrize('width', [0, 0.01, -1, float('nan'), float('inf')])
def test_width_that_fits_no_network_is_one_clear_error(width):
    with pytest.raises(ValueError, match='--width'):
        resnet.wide_resnet(10, width, 10)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.floats(1 / 16, 3), st.integers(1, 20))
def test_shape_is_read_back_from_the_parameters(n, width, classes):
    params = resnet.wide_resnet(6 * n + 4, width, classes)[1]
    depth, read_width, read_classes = resnet.wide_resnet_shape(params)
    assert (depth, read_classes) == (6 * n + 4, classes)
    again = resnet.wide_resnet(depth, read_width, classes)[1]
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in params.items()}


@pytest.mark.parametrize('params', [{}, {'x': torch.ones(1)}, {'group0.block0.conv0': torch.ones(1)}])
def test_parameters_of_no_wide_resnet_are_refused(params):
    with pytest.raises(ValueError, match='not a wide ResNet'):
        resnet.wide_resnet_shape(params)


@pytest.mark.parametrize('depth, width, left', [(16, 1, 7), (16, 2, 6), (10, 0.5, 3)])
def test_a_folded_network_computes_the_same_with_less_batch_norm(depth, width, left):
    torch.manual_seed(0)
    f, params = resnet.wide_resnet(depth, width, 10)
    params = {k: v.detach().double() for k, v in params.items()}
    for key, value in params.items():
        if key.endswith(('running_mean', 'running_var', 'bias')):
            value.uniform_(0.5, 1.5)
    before, folded = {k: v.clone() for k, v in params.items()}, resnet.fold_wide_resnet(params)
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    (y, groups), (z, folded_groups) = f(x, params, False), f(x, folded, False)
    torch.testing.assert_close(z, y, rtol=1e-10, atol=1e-10)
    for a, b in zip(folded_groups, groups):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert sum(k.endswith('running_mean') for k in folded) == left
    assert all(torch.equal(v, before[k]) for k, v in params.items())


NARROW = """
import torch, imagenet_resnet
f, params = imagenet_resnet.imagenet_resnet(18, 0.0625, 10)
for _ in range(5):
    f(torch.randn(8, 3, 224, 224).contiguous(memory_format=torch.channels_last), params, True)[0].sum().backward()
"""


def test_a_narrow_network_on_large_images_trains_and_does_not_crash():
    """PyTorch 2.14 writes out of bounds there: see layers.conv2d."""
    done = subprocess.run([sys.executable, '-c', NARROW], cwd=os.path.dirname(resnet.__file__), capture_output=True)
    assert done.returncode == 0, done.stderr
