"""Training steps for GPUs, without one: on fake CUDA tensors, and on the meta device with real gradients.

A fake tensor has a device and a shape, but no values: an operation on tensors of two devices fails, and so does what
makes the host wait for a value. Without a driver, fake CUDA tensors can be neither differentiated nor given to the
fused optimizer.
"""

import os
import types

import pytest
import torch
from conftest import refused
from every_method import METHODS, SHAPES, prepared
from torch._subclasses import FakeTensorMode

from engine import workers
from engine.meters import Meters
from engine.precision import freeze
from engine.step import total_loss
from formats.networks import fold
from images import batches, memory
from utils import without_adapters

METHODS = [*METHODS, '--beta 1 --mapping max', '--beta 1 --at_form paper --power 3', '--beta 1 --groups 1,2']


@pytest.fixture(scope='module')
def mode():
    return FakeTensorMode()


@pytest.fixture
def cuda(monkeypatch, mode):
    """The CUDA device of fake tensors; what is differentiated has gradients of no values."""
    monkeypatch.setattr(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)  # else no autocast
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *_: True)
    monkeypatch.setattr(torch.autograd, 'grad', lambda of, images, **_: [torch.zeros_like(images) * of])
    batches._rows.cache_clear()  # it would give fake tensors to those who ask for real ones
    with mode:
        yield torch.device('cuda')
    batches._rows.cache_clear()


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('family', SHAPES)
@pytest.mark.parametrize('dtype', ['float', 'double', 'bfloat16', 'half'])
def test_a_step_stays_on_the_gpu_and_never_waits_for_it(cuda, family, method, dtype):
    opt, student, step = prepared(family, method, dtype, cuda)
    size = SHAPES[family][2]
    images = memory.Images(torch.zeros(10, size, size, 3, dtype=torch.uint8), torch.zeros(10, dtype=torch.long))
    sample = next(iter(memory.TrainBatches(images.to(cuda), 4, 2, True, 0, 0, 1, 1)))
    meters = Meters(cuda, (1,))
    loss, logits = total_loss(opt, step, sample, 1, meters)
    assert logits.device.type == loss.device.type == 'cuda' and logits.shape == (4, 10)
    assert loss.dtype == logits.dtype == (torch.float64 if dtype == 'double' else torch.float32)
    assert all(rows.device.type == 'cuda' for rows, *_ in meters.pending)
    with torch.no_grad():
        tested = next(iter(memory.TestBatches(images.to(cuda), 4)))
        assert student.f(tested[0].to(loss.dtype), student.params, False)[0].device.type == 'cuda'


@pytest.mark.parametrize('family', SHAPES)
@pytest.mark.parametrize('dtype', ['float', 'double', 'bfloat16', 'half'])
def test_convolution_weights_on_a_gpu_are_channels_last_except_in_float64(cuda, family, dtype):
    """The student's, its adapters' and the folded teacher's."""
    _, student, _ = prepared(family, '--beta 1 --transfer full', dtype, cuda)
    frozen = freeze(fold(without_adapters(student.params)), dtype, cuda)
    weights = [v for v in (*student.params.values(), *frozen.values()) if v.dim() == 4]
    order = torch.contiguous_format if dtype == 'double' else torch.channels_last
    assert 'adapter.0' in student.params
    assert all(v.stride() == torch.empty_like(v, memory_format=order).stride() for v in weights)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('family', SHAPES)
@pytest.mark.parametrize('dtype', ['float', 'double'])
def test_a_step_on_the_meta_device_has_gradients_of_all_trained_parameters(family, method, dtype):
    meta = torch.device('meta')
    with meta:
        opt, student, step = prepared(family, method, dtype, meta)
        size = SHAPES[family][2]
        images = torch.zeros(4, 3, size, size, dtype=torch.float64 if dtype == 'double' else torch.float32)
        sample = images, torch.zeros(4, dtype=torch.long), 4
    loss, _ = total_loss(opt, step, sample, 1, Meters(meta, (1,)))
    loss.backward()
    for name, value in student.params.items():
        assert (value.grad is not None) == value.requires_grad, name


@pytest.fixture
def arithmetic():
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.get_float32_matmul_precision()
    yield
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, precision = before
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('deterministic', [False, True])
def test_a_gpu_computes_fast_or_with_the_same_bits(arithmetic, monkeypatch, deterministic):
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG', raising=False)
    workers.choose_arithmetic(deterministic)
    assert torch.backends.cudnn.benchmark is not deterministic and torch.backends.cudnn.deterministic is deterministic
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert ('CUBLAS_WORKSPACE_CONFIG' in os.environ) is deterministic


def test_without_a_deterministic_algorithm_the_run_is_refused_in_one_line(script):
    def main():
        raise RuntimeError('adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but\nmore')

    greedy = types.SimpleNamespace(__name__='cifar', main=main)
    assert refused(script(greedy), '--deterministic: adaptive_avg_pool2d_backward_cuda does not have')
