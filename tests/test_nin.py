"""Network-in-Network against the same network in torch.nn modules, and its shape read from its parameters."""

import pytest
import torch
from torch import nn

import utils
from formats import networks, write
from nin import fold_nin, nin, nin_shape


def modules(params, no_bn):
    """The network as a chain of modules with the parameters of `params`, and the positions of its three groups."""
    layers, places = [], []
    for g in range(3):
        for i in range(3):
            weight = params[f'group{g}.conv{i}']
            no, ni, k, _ = weight.shape
            conv = nn.Conv2d(ni, no, k, padding=(k - 1) // 2, bias=no_bn)
            conv.weight.data = weight.detach()
            if no_bn:
                conv.bias.data = params[f'group{g}.bias{i}'].detach()
            layers.append(conv)
            if not no_bn:
                norm = nn.BatchNorm2d(no)
                norm.load_state_dict(
                    {
                        k: params[f'group{g}.bn{i}.{k}'].clone()
                        for k in ('weight', 'bias', 'running_mean', 'running_var')
                    }
                    | {'num_batches_tracked': torch.tensor(0)}
                )
                layers.append(norm)
            layers.append(nn.ReLU())
        places.append(len(layers))
        layers.append(
            [nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(3, 2, ceil_mode=True), nn.AdaptiveAvgPool2d(1)][g]
        )
    fc = nn.Linear(params['fc.weight'].shape[1], params['fc.weight'].shape[0])
    fc.load_state_dict({k: params[f'fc.{k}'].detach() for k in ('weight', 'bias')})
    return nn.Sequential(*layers, nn.Flatten(), fc), places


@pytest.mark.parametrize('no_bn', [False, True])
@pytest.mark.parametrize('training', [False, True])
def test_logits_and_groups_equal_those_of_modules(no_bn, training):
    torch.manual_seed(0)
    f, params = nin(4 / 32, 7, no_bn)
    for key, value in params.items():
        if key.endswith(('running_mean', 'bias', *('bias0', 'bias1', 'bias2'))):
            value.data.normal_()
    network, places = modules(params, no_bn)
    network.train(training)
    x = torch.randn(5, 3, 32, 32)
    logits, groups = f(x, params, training)
    torch.testing.assert_close(logits, network(x), rtol=1e-4, atol=1e-5)
    network.train(False)
    if not training:
        for group, place in zip(groups, places, strict=True):
            torch.testing.assert_close(group, network[:place](x), rtol=1e-4, atol=1e-5)
    assert [tuple(g.shape) for g in groups] == [(5, 12, 32, 32), (5, 24, 16, 16), (5, 24, 8, 8)]


@pytest.mark.parametrize(
    'width, no_bn, count', [(1, False, 1_005_642), (0.4375, False, 197_298), (0.4375, True, 196_598)]
)
def test_parameter_counts_are_about_those_of_the_paper(width, no_bn, count):
    _, params = nin(width, 10, no_bn)
    assert utils.num_parameters(params) == count
    assert nin_shape(params) == (width, 10, no_bn)


@pytest.mark.parametrize('width', [0, 0.03, -1, float('nan'), float('inf')])
def test_width_that_fits_no_network_is_one_clear_error(width):
    with pytest.raises(ValueError, match='--width'):
        nin(width, 10)


@pytest.mark.parametrize('no_bn', [False, True])
def test_a_file_is_recognised_and_what_is_missing_in_it_is_named(tmp_path, no_bn):
    f, params = nin(0.25, 10, no_bn)
    path = tmp_path / 'model.pt7'
    write.save(path, {'params': {k: v.detach() for k, v in params.items()} | {'adapter.0': torch.ones(1, 1, 1, 1)}})
    g, loaded = networks.load_teacher(path, (None, 0.25))
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(g(x, loaded, False)[0], f(x, params, False)[0].detach(), rtol=0, atol=0)
    assert set(loaded) == set(params)
    assert networks.describe(loaded) == f'NIN-0.25, {"no batch norm, " if no_bn else ""}10 classes'
    with pytest.raises(ValueError, match='is a NIN-0.25, but its log names a NIN-0.5'):
        networks.load_teacher(path, (None, 0.5))
    del params['group1.conv2']
    write.save(path, {'params': {k: v.detach() for k, v in params.items()}})
    with pytest.raises(ValueError, match='no group1.conv2'):
        networks.load_teacher(path)


def test_a_folded_network_computes_the_same_without_batch_norm():
    torch.manual_seed(0)
    f, params = nin(0.125, 5)
    params = {k: v.detach().double() for k, v in params.items()}
    for key, value in params.items():
        if key.endswith(('running_mean', 'running_var', 'bias')):
            value.uniform_(0.5, 1.5)
    folded, x = fold_nin(params), torch.randn(3, 3, 12, 12, dtype=torch.float64)
    (y, groups), (z, folded_groups) = f(x, params, False), f(x, folded, False)
    torch.testing.assert_close(z, y, rtol=1e-10, atol=1e-10)
    for a, b in zip(folded_groups, groups):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert set(folded) == set(nin(0.125, 5, no_bn=True)[1])
    assert fold_nin(folded) is folded
