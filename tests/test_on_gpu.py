"""What only a GPU can show. `python benchmarks/gpu.py` runs these tests; `make test` leaves them out."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import refused, write_photographs
from test_speed import METHODS, TAUGHT, benchmark, case

import cifar
import imagenet
from engine.log import read_log
from engine.step import FLUSH, make_update
from engine.student import Network

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')]
GPUS = torch.cuda.device_count()
PATIENCE = 300  # seconds; a worker that waits for a dead one under nccl would wait for half an hour
PHOTOS = f'--imagenetpath photos --depth 18 --width 0.25 --image_size 64 --batch_size {4 * GPUS} --epochs 2 --nthread 2'


@pytest.mark.parametrize('dtype', ['float', 'bfloat16'])
@pytest.mark.parametrize('words', METHODS)
def test_a_step_on_a_gpu_does_not_wait_for_it(words, dtype):
    opt, small = case(f'{words} --dtype {dtype}', 4)
    device = torch.device('cuda')
    update = benchmark.fast_step(opt, small, device)
    images, labels = torch.randn(4, 3, 16, 16, device=device), torch.arange(4, device=device)
    update(images, labels)
    torch.cuda.set_sync_debug_mode('error')
    try:
        with pytest.raises(RuntimeError):
            labels.sum().item()  # this waits
        assert update(images, labels) is None
    finally:
        torch.cuda.set_sync_debug_mode('default')


def test_steps_of_cuda_graphs_equal_the_eager_ones():
    """In float64, since TensorFloat-32 rounds too coarsely for a comparison of parameters one by one."""
    results = []
    for more in ('', ' --compile --cuda_graphs'):
        opt, small = case(f'{TAUGHT[2]} --lr 0.001 --dtype double{more}', 8)
        device = torch.device('cuda')
        f, params = doubled(*benchmark.initialise(small.student, device))
        g, fixed = doubled(*benchmark.initialise(small.teacher, device))
        torch.manual_seed(0)
        images, labels = torch.randn(8, 3, 16, 16, device=device).double(), torch.arange(8, device=device)
        update = make_update(opt, Network(f, params), partial(g, params=fixed, mode=False), images[:1])
        for step in range(2 * FLUSH + 1):
            update(images, labels) if step % 5 else update(images[:3], labels[:3])
        results.append({k: v.detach().cpu() for k, v in params.items()})
    assert not torch._dynamo.utils.counters['inductor']['cudagraph_skips']
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


def doubled(f, params):
    return f, {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in params.items()}


def train(folder, script, words):
    """Run a script in a folder, on all GPUs: (exit status, stdout, stderr)."""
    command = [sys.executable, script.__file__, *words.split(), '--ngpu', str(GPUS)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize('more', ['', '--sync_bn --compile --dtype bfloat16', '--dtype half', '--deterministic'])
def test_photographs_train_on_all_gpus(tmp_path, more):
    write_photographs(tmp_path / 'photos', 8 * GPUS, 8 * GPUS)
    status, _, err = train(tmp_path, imagenet, f'{PHOTOS} {more} --save teacher')
    assert status == 0, err
    taught = '--beta 1 --alpha 0.5 --teacher_params teacher'
    status, _, err = train(tmp_path, imagenet, f'{PHOTOS} {more} {taught} --save student')
    assert status == 0, err
    last = read_log(tmp_path / 'student' / 'log.txt')[-1]
    assert last['epoch'] == 2 and last['workers'] == GPUS and {'ce', 'kd', 'at3'} <= last.keys()


@pytest.mark.parametrize('dtype', ['float', 'half', 'bfloat16'])
def test_cifar_trains_on_all_gpus(tmp_path, dtype):
    schedule = f'--epochs 5 --epoch_step [4] --lr 0.05 --batch_size {32 // GPUS * GPUS or GPUS}'
    words = f'--dataset digits {schedule} --depth 10 --dtype {dtype} --save run'
    status, _, err = train(tmp_path, cifar, words)
    assert status == 0, err
    assert read_log(tmp_path / 'run' / 'log.txt')[-1]['test_acc'] > 50


@pytest.mark.parametrize('worker', [0, 1])
def test_a_worker_that_fails_alone_ends_all_with_one_line(tmp_path, worker):
    write_photographs(tmp_path / 'photos', 8 * GPUS, 8 * GPUS)
    bad = sorted((tmp_path / 'photos' / 'val' / 'ant').iterdir())[worker]  # workers take test images in turns
    bad.write_bytes(b'no image')
    assert refused(train(tmp_path, imagenet, f'{PHOTOS} --save run'), f'{bad.name} is not a readable image')


def test_an_int8_teacher_is_refused_in_one_line(tmp_path):
    words = f'--dataset digits --epochs 1 --depth 10 --batch_size {64 // GPUS * GPUS or GPUS}'
    assert train(tmp_path, cifar, f'{words} --save teacher')[0] == 0
    taught = f'{words} --teacher_id teacher --beta 1 --teacher_dtype int8'
    assert refused(train(tmp_path, cifar, taught), '--teacher_dtype int8: only on CPUs')
