"""The fast step against the plain one: results, memory, and whether the host waits for the device."""

import json
import os
import sys
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cifar
import imagenet_resnet
import resnet
from engine import workers
from formats import networks
from nin import nin

sys.path.insert(0, os.path.join(os.path.dirname(cifar.__file__), 'benchmarks'))
import step as benchmark  # noqa: E402

from engine.flags import parse_cifar
from engine.meters import Meters
from engine.precision import freeze
from engine.step import make_step

CPU = torch.device('cpu')
# With 32 images of 16x16, beta 60 weighs the elements of a map like 1e+3 does with 128 images of 32x32.
TAUGHT = '--teacher_id x --beta 60', '--teacher_id x --alpha 0.9', '--teacher_id x --alpha 0.9 --beta 60'


def case(words, batch=16, depth=10, widths=(1, 2)):
    """A small benchmark case: (flags, case)."""
    opt = parse_cifar('', [*words.split(), '--batch_size', str(batch)])
    student, teacher = (partial(resnet.wide_resnet, depth, width, 10) for width in widths)
    return opt, benchmark.Case(student, teacher if opt.teacher_id else None, batch, 16, words)


@pytest.fixture
def steps(monkeypatch):
    """The plain and the fast step of a case, each with the params that it trains."""

    def make(opt, case):
        made, initialise = [], benchmark.initialise

        def remember(*arguments):
            made.append(initialise(*arguments))
            return made[-1]

        monkeypatch.setattr(benchmark, 'initialise', remember)
        plain = benchmark.plain_step(opt, case, CPU), made[0][1]
        made.clear()
        return plain, (benchmark.fast_step(opt, case, CPU), made[0][1])

    return make


@pytest.mark.parametrize('words', ['', *TAUGHT, f'{TAUGHT[2]} --compile'])
def test_fast_float32_equals_plain_float32_over_20_steps(steps, monkeypatch, words):
    opt, small = case(words + ' --lr 0.001', batch=32)
    (plain, params), (fast, fast_params) = steps(opt, small)
    losses, added = [], Meters.add
    monkeypatch.setattr(
        Meters, 'add', lambda self, terms, *rest: losses.append(terms['loss']) or added(self, terms, *rest)
    )
    torch.manual_seed(1)
    images, labels = torch.randn(32, 3, 16, 16), torch.arange(32) % 10
    expected = []
    for _ in range(20):
        expected.append(plain(images, labels)[0])
        fast(images.contiguous(memory_format=torch.channels_last), labels)
    assert expected[-1] < 0.99 * expected[0]  # the student learns
    assert torch.stack(losses).tolist() == pytest.approx(expected, rel=1e-5)
    ours, theirs = (torch.cat([v.detach().flatten() for v in p.values()]) for p in (fast_params, params))
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


class HostWaits(TorchDispatchMode):
    """Fails if a tensor's value or a copy of it on another device is requested; counts the operators it sees."""

    seen = 0

    def __torch_dispatch__(self, f, types, arguments=(), kwargs=None):
        self.seen += 1
        kwargs = kwargs or {}
        assert f is not torch.ops.aten._local_scalar_dense.default, 'the host asks for a value'
        assert f is not torch.ops.aten._to_copy.default or not kwargs.get('device'), 'a tensor changes its device'
        return f(*arguments, **kwargs)


METHODS = [
    *('', *TAUGHT, '--teacher_id x --beta 1 --transfer full', '--teacher_id x --beta 1 --transfer gradient'),
    *('--penalty symmetry --gamma 1', '--penalty min_l2 --gamma 1', '--teacher_id x --beta 1 --at_form paper'),
]


@pytest.mark.parametrize('words', METHODS)
def test_a_step_makes_the_host_wait_for_nothing(words):
    opt, small = case(words, 4)
    update = benchmark.fast_step(opt, small, CPU)
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    with pytest.MonkeyPatch.context() as patch, HostWaits() as watched:
        for name in ('item', 'cpu', 'numpy', 'tolist', '__float__', '__int__', '__bool__'):
            patch.setattr(torch.Tensor, name, None)
        for _ in range(3):
            update(images, labels)
    assert watched.seen > 300  # each of which could have failed


def test_the_waits_of_the_plain_step_are_seen():
    opt, small = case('', 4)
    with pytest.raises(AssertionError, match='the host asks for a value'), HostWaits():
        benchmark.plain_step(opt, small, CPU)(torch.randn(4, 3, 16, 16), torch.arange(4))


@pytest.mark.parametrize('dtype', ['float', 'bfloat16'])
def test_attention_transfer_takes_at_most_the_documented_share_more_memory(dtype):
    peaks = []
    for words in ('', TAUGHT[0]):
        opt, paper = case(f'{words} --dtype {dtype}', 32, depth=16)
        update = benchmark.fast_step(opt, paper, CPU)
        batch = torch.randn(32, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.arange(32) % 10
        update(*batch)  # also allocates the momentum
        peaks.append(benchmark.peak_memory(update, *batch))
    alone, taught = peaks
    # Without AVX-512, PyTorch unfolds the images of a bfloat16 convolution: each pixel is copied nine times.
    unfolded = dtype == 'bfloat16' and not torch.cpu.get_capabilities().get('avx512_f')
    assert alone > 10e6 and taught <= (1.4 if unfolded else 1.3) * alone, peaks


def test_a_frozen_teacher_holds_weights_in_the_compute_dtype_and_batch_norm_in_float32():
    for f, params in (resnet.wide_resnet(10, 1, 10), imagenet_resnet.imagenet_resnet(18, 0.125, 10), nin(0.125, 10)):
        frozen = freeze(networks.fold({k: v.detach() for k, v in params.items()}), 'bfloat16', CPU)
        logits, groups = f(torch.randn(2, 3, 64, 64), frozen, False)
        assert {a.dtype for a in (logits, *groups)} == {torch.bfloat16}
        norms = {v.dtype for k, v in frozen.items() if '.bn' in k or k.startswith('bn')}
        assert norms <= {torch.float32} and frozen['fc.bias'].dtype == torch.bfloat16


def test_a_compiled_step_equals_the_eager_one():
    """Also for a last batch of another size."""
    results = []
    for more in ('', ' --compile'):
        opt, small = case(TAUGHT[2] + more, 8, widths=(0.25, 0.5))
        assert opt.compile == bool(more)
        f, params = benchmark.initialise(small.student, CPU)
        g, fixed = benchmark.initialise(small.teacher, CPU)
        step = make_step(opt, partial(f, params=params, mode=True), partial(g, params=fixed, mode=False), CPU)
        torch.manual_seed(0)
        batch = torch.randn(8, 3, 16, 16), torch.arange(8)
        for n in (8, 8, 3):
            logits, losses = step(batch[0][:n], batch[1][:n])
            losses.total(1, 1).backward()
        results.append(
            [
                *losses.named().values(),
                logits,
                *(v.grad for v in params.values() if v.requires_grad),
                params['bn.running_mean'],
            ]
        )
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_cuda_graphs_without_a_gpu_are_refused_in_one_line(script):
    status, _, err = script(cifar, '--dataset digits --compile --cuda_graphs')
    assert status == 2 and err.count('\n') == 1 and '--cuda_graphs: only for a single worker with a GPU' in err


def test_freed_memory_stays_with_the_process():
    resource = pytest.importorskip('resource')
    workers.keep_memory()

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(2**22)  # 16 MiB, 4096 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < 4096


@pytest.mark.parametrize('capability, dtype', [('AVX2', 'float'), ('AVX512', 'bfloat16'), ('DEFAULT', 'bfloat16')])
def test_benchmarks_take_the_dtype_that_is_fast_on_the_cpu(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    assert benchmark.fast_dtype() == dtype


def test_the_benchmark_ends_with_a_line_of_json(script):
    status, out, err = script(benchmark, '--only student --pairs 1 --json --dtype float --eager')
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])['student']
    assert found['ratio'] > 0 and found['gflop'] == pytest.approx(20.4, abs=0.1) and found['fast_mb'] > 0
    assert script(benchmark, '--only studnet')[0] == 2
