"""Batch norm and convolutions against PyTorch's own, and their gradients."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_utils import X, tensor

import layers
import utils


def test_batch_norm_uses_the_batch_in_training_and_running_statistics_otherwise():
    params = utils.flatten({'bn': utils.bnparams(5)})
    x = torch.tensor(X, dtype=torch.float32)
    mean, var = X.mean((0, 2, 3)), X.var((0, 2, 3), ddof=1)
    params['bn.running_mean'] += 1
    fixed = layers.batch_norm(x, params, 'bn', False)
    expected = (x - 1) / math.sqrt(1 + 1e-5) * params['bn.weight'].view(-1, 1, 1)
    torch.testing.assert_close(fixed, expected)
    assert torch.equal(params['bn.running_mean'], torch.ones(5))
    layers.batch_norm(x, params, 'bn', True)
    np.testing.assert_allclose(params['bn.running_mean'], 0.9 + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(params['bn.running_var'], 0.9 + 0.1 * var, rtol=1e-5)


def test_batch_norm_for_the_compiler_equals_that_of_pytorch_and_so_do_its_gradients():
    results = []
    for norm in (layers.compiled_batch_norm, lambda *arguments: F.batch_norm(*arguments, training=True)):
        inputs = tensor(3 * X + 7, grad=True), tensor(np.arange(5.0) - 2, grad=True), tensor(np.arange(5.0), grad=True)
        statistics = tensor(np.arange(5.0)), tensor(1 + np.arange(5.0))
        y = norm(inputs[0], *statistics, *inputs[1:])
        gradients = torch.autograd.grad((y * tensor(np.cos(X))).sum(), inputs)
        results.append([y, *statistics, *gradients])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match='a single value'):
        layers.compiled_batch_norm(torch.ones(1, 5, 1, 1), *4 * [torch.ones(5)])


@pytest.mark.parametrize('size', [8, 9, 1])
def test_strided_convolution_for_the_compiler_equals_that_of_pytorch_and_so_do_its_gradients(size):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 4, 9, size), torch.randn(6, 4, 3, 3)
    inputs = [v.double().requires_grad_() for v in (x, weight)]
    results = []
    for conv in (layers.strided_conv, lambda *arguments: F.conv2d(*arguments, stride=2, padding=1)):
        y = conv(*inputs)
        results.append([y, *torch.autograd.grad((y * y.detach().cos()).sum(), inputs)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_compiled_convolutions_in_bfloat16_equal_the_eager_ones_and_so_do_their_gradients():
    torch.manual_seed(0)
    inputs = [
        v.requires_grad_() for v in (torch.randn(2, 16, 8, 8), torch.randn(16, 16, 3, 3), torch.randn(16, 16, 1, 1))
    ]

    def convolutions(x, weight, shortcut):
        with torch.autocast('cpu', torch.bfloat16):
            x = x.to(torch.bfloat16)
            return layers.conv2d(x, weight, stride=2, padding=1) + layers.conv2d(x, shortcut, stride=2)

    layers.keep_strides()
    results = []
    for f in (convolutions, torch.compile(convolutions)):
        y = f(*inputs)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
    for eager, compiled in zip(*results):
        assert compiled.dtype == eager.dtype
        torch.testing.assert_close(compiled, eager, rtol=0.02, atol=0.02 * eager.abs().max().item())
