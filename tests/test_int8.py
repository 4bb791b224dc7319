"""A teacher in 8-bit integers: its arithmetic, its error, and runs with it."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, VNNI

import cifar
import imagenet_resnet
import resnet
from engine import int8, step
from engine.flags import parse_cifar
from engine.log import read_log
from engine.precision import autocast
from engine.student import Network
from engine.teacher import frozen
from formats import networks
from nin import nin
from utils import at

NETWORKS = {
    'WRN': partial(resnet.wide_resnet, 16, 2, 10),
    'WRN without a first shortcut': partial(resnet.wide_resnet, 16, 1, 10),
    'NIN': partial(nin, 0.25, 10),
    'NIN without batch norm': partial(nin, 0.25, 10, True),
    'ResNet-18': partial(imagenet_resnet.imagenet_resnet, 18, 0.25, 10),
    'ResNet-50': partial(imagenet_resnet.imagenet_resnet, 50, 0.25, 10),
}


def pieces(network):
    """A network with statistics of random images, and its float and int8 params: (f, folded, integers, images)."""
    torch.manual_seed(0)
    f, params = network()
    images = torch.randn(32, 3, 32, 32)
    with torch.no_grad():
        for _ in range(20):
            f(images, params, True)
    folded = networks.fold({k: v.detach() for k, v in params.items()})
    return f, folded, folded | int8.quantize(f, folded, images), images


@VNNI
@pytest.mark.parametrize('stride, padding, kernel', [(1, 1, 3), (2, 1, 3), (2, 0, 1)])
@pytest.mark.parametrize('with_bias', [True, False])
def test_an_int8_convolution_is_that_of_the_rounded_numbers(stride, padding, kernel, with_bias):
    torch.manual_seed(0)
    x, weight = torch.rand(2, 16, 9, 9) * 3, torch.randn(24, 16, kernel, kernel)
    bias = torch.randn(24) if with_bias else None
    step, step_out = 2.5 / 255, 0.02
    own, as_uint8 = (
        F.conv2d(x, int8._Int8(weight, *steps), bias, stride=stride, padding=padding)
        for steps in ((step,), (step, step_out))
    )
    scales = weight.abs().amax((1, 2, 3)).view(-1, 1, 1, 1) / 127
    rounded = (x.double() / step + 0.5).floor().clamp(max=255) * step
    weight = (weight / scales).round().double() * scales.double()
    expected = F.conv2d(rounded, weight, None if bias is None else bias.double(), stride, padding)
    assert own.dtype == torch.float32 and (own - expected).abs().max() < 1e-4 * expected.abs().max()
    assert as_uint8.dtype == torch.uint8 and as_uint8.max() == 255 and as_uint8.min() == 0
    exact = (expected / step_out).clamp(0, 255)
    assert (as_uint8 - exact).abs().max() < 0.501


def test_an_int8_batch_norm_rounds_its_result_and_a_relu_leaves_it():
    torch.manual_seed(0)
    x, mean, var, weight, bias = torch.randn(2, 8, 5, 5), *torch.rand(4, 8)
    own = F.relu(F.batch_norm(x, mean, var, int8._Uint8Norm(weight, 0.01), bias))
    exact = (F.batch_norm(x, mean, var, weight, bias) / 0.01).clamp(0, 255)
    assert own.dtype == torch.uint8 and own.max() > 100 and (own - exact).abs().max() < 0.501


@pytest.mark.parametrize('name', NETWORKS)
def test_int8_maps_and_logits_are_close_to_those_of_float32(name):
    f, folded, integers, images = pieces(NETWORKS[name])
    first, *others = [k for k, v in folded.items() if v.dim() == 4]
    rounded = torch.Tensor if name == 'WRN without a first shortcut' or 'ResNet' in name else int8._Rounded
    assert isinstance(integers[first], rounded) and all(isinstance(integers[k], int8._Int8) for k in others)
    with torch.no_grad():
        (logits, groups), (own_logits, own_groups) = f(images, folded, False), f(images, integers, False)
    assert 0 < (own_logits - logits).norm() < 0.15 * logits.norm()
    for own, group in zip(own_groups, groups):
        assert own.dtype == torch.float32
        assert (at(own) * at(group)).sum(1).min() > 0.998


@pytest.mark.parametrize('name', ['WRN', 'NIN'])
@pytest.mark.parametrize('dtype', ['float', 'bfloat16'])
def test_rounding_the_first_convolution_at_once_or_before_each_of_the_next_gives_the_same_bits(name, dtype):
    f, folded, integers, images = pieces(NETWORKS[name])
    first = next(k for k, v in folded.items() if v.dim() == 4)
    with torch.no_grad(), autocast(images.device, dtype):
        (logits, groups), (own_logits, own_groups) = (
            f(images, params, False) for params in (integers | {first: folded[first]}, integers)
        )
    assert torch.equal(own_logits, logits) and all(map(torch.equal, own_groups, groups))


@pytest.mark.parametrize('flags', ['--beta 100', '--transfer full --beta 100', '--alpha 0.9'])
def test_a_batch_in_parts_is_the_whole_batch(flags, monkeypatch):
    f, _, integers, _ = pieces(NETWORKS['WRN'])
    flags = f'--teacher_id x --teacher_dtype int8 --batch_size 70 --width 1 {flags}'
    images, labels = torch.randn(70, 3, 32, 32), torch.arange(70) % 10

    def gradients(part):
        monkeypatch.setattr(step, 'PART', part)
        torch.manual_seed(0)
        student = Network(*resnet.wide_resnet(16, 1, 10))
        teacher = partial(f, params=integers, mode=False)
        step.make_update(parse_cifar('', flags.split()), student, teacher, images[:1])(images, labels)
        return student.params

    whole = gradients(70)
    for part in (64, 7):
        for name, value in gradients(part).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)


@VNNI
def test_a_run_with_an_int8_teacher_checks_it_learns_from_it_and_logs_it(train):
    assert train('--width 0.5 --epochs 12 --epoch_step [8] --lr 0.05 --save logs/teacher')[0] == 0
    taught = '--teacher_id teacher --teacher_dtype int8 --epochs 2 --epoch_step [] --lr 0.05 --dtype bfloat16'
    for name, flags in {'at': '--beta 100', 'kd': '--alpha 0.9', 'full': '--transfer full --beta 100'}.items():
        status, out, err = train(taught, flags, f'--save logs/{name}')
        assert status == 0, err
        assert 'by its log' in out
        record = read_log(f'logs/{name}/log.txt')[-1]
        assert record['teacher_dtype'] == 'int8' and record['train_loss'] > 0


def test_what_int8_cannot_do_is_refused(script):
    for flags, told in {
        '--teacher_dtype int8': '--teacher_id',
        '--teacher_dtype int8 --teacher_id x --beta 1 --transfer gradient': '--transfer gradient',
        '--teacher_dtype int8 --teacher_id x --beta 1 --dtype double': '--dtype double',
        '--teacher_dtype int4 --teacher_id x --beta 1': 'int8',
    }.items():
        status, _, err = script(cifar, SMALL, flags)
        assert status == 2 and told in err and err.count('\n') == 1, err


def test_a_teacher_that_overflows_is_not_hidden_by_rounding():
    f, params = resnet.wide_resnet(10, 0.25, 10)
    params = {k: v.detach() * (1e30 if '.conv1' in k else 1) for k, v in params.items()}
    with pytest.raises(ValueError, match='not finite'):
        int8.quantize(f, params, torch.randn(4, 3, 16, 16))


@pytest.mark.parametrize('device, exact', [('cpu', True), ('cpu', False), ('cuda', True)])
def test_int8_is_for_cpus_with_exact_sums_alone(device, exact, monkeypatch):
    monkeypatch.setattr(int8, 'exact', lambda: exact)
    f, params = resnet.wide_resnet(10, 0.25, 10)
    opt = parse_cifar('', '--teacher_id x --beta 1 --teacher_dtype int8'.split())
    make = partial(frozen, opt, Network(f, params), lambda: torch.randn(4, 3, 16, 16), torch.device(device))
    if device == 'cpu' and exact:
        assert isinstance(make()['group2.block0.conv1'], int8._Int8)
    else:
        with pytest.raises(ValueError, match='only on CPUs with VNNI'):
            make()


def test_sums_of_a_cpu_without_vnni_are_not_exact():
    words = [sys.executable, '-c', 'from engine import int8; print(int8.exact())']
    avx2 = os.environ | {'ONEDNN_MAX_CPU_ISA': 'AVX2', 'PYTHONPATH': os.path.dirname(cifar.__file__)}
    assert subprocess.check_output(words, env=avx2, text=True) == 'False\n'
