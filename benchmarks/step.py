"""How fast a training step is, compared with the plain one of distillation repositories.

    python benchmarks/step.py                                      # every case, with every switch that makes it fast
    python benchmarks/step.py --only at,student --eager --teacher_dtype same     # without --compile and int8
    python benchmarks/step.py --only at --profile                  # the most expensive operators of the fast step
    python benchmarks/step.py --only student,at --authors ../attention-transfer  # beside the authors' own step

The plain step is float32, contiguous and eager, with the whole teacher under no_grad, losses as the authors write them
and .item() on every term. The fast one is the step of cifar.py and imagenet.py with --dtype bfloat16 where the machine
is fast in it, --compile, and on CPUs with VNNI --teacher_dtype int8. They run in turns on the same random images, and
each pair gives a ratio. The plain step has its own process, a new one for each case, since the fast step changes the
memory allocator of its process. FlopCounterMode counts the operations of the plain step; their rate is given as a
fraction of that of a product of two 2048x2048 matrices in the fast step's dtype.
"""

import functools
import json
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))

from authors import step as authors_step
from measure import device, fast_dtype, flops, matrix_rate, peak_memory, seconds, settled_seconds

from engine import ending, int8, workers
from engine.arguments import Parser, number, path
from engine.flags import parse_cifar
from engine.log import commit, environment
from engine.precision import place
from engine.step import make_update
from engine.student import Network
from engine.teacher import frozen
from imagenet_resnet import imagenet_resnet
from images import children
from resnet import wide_resnet
from utils import DTYPES, set_requires_grad_except_bn_

WARM_UP = 1  # pairs that are not counted


class Case(NamedTuple):
    """A step to be measured."""

    student: object  # () -> (f, params)
    teacher: object  # likewise, or None
    batch: int
    size: int  # of an image
    flags: str  # of cifar.py


WRN_16_1, WRN_16_2 = partial(wide_resnet, 16, 1, 10), partial(wide_resnet, 16, 2, 10)
RESNET_18, RESNET_34 = partial(imagenet_resnet, 18, 1, 1000), partial(imagenet_resnet, 34, 1, 1000)
AT, KD = '--teacher_id X --beta 1e+3', '--teacher_id X --alpha 0.9'
CASES = {
    'student': Case(WRN_16_1, None, 128, 32, ''),
    'teacher': Case(WRN_16_2, None, 128, 32, ''),
    'at': Case(WRN_16_1, WRN_16_2, 128, 32, AT),
    'kd': Case(WRN_16_1, WRN_16_2, 128, 32, KD),
    'at_kd': Case(WRN_16_1, WRN_16_2, 128, 32, f'{AT} --alpha 0.9'),
    'gradient_at': Case(WRN_16_1, WRN_16_2, 128, 32, '--teacher_id X --beta 0.1 --transfer gradient'),
    'imagenet_64': Case(RESNET_18, RESNET_34, 64, 64, AT),
    'imagenet_224': Case(RESNET_18, RESNET_34, 8, 224, AT),
}
WIDE = 'student', 'teacher', 'at', 'kd', 'at_kd'  # the cases that the authors' cifar.py has


def initialise(network, device):
    """A network from a fixed seed, whose batch norm has seen some images: (f, params)."""
    torch.manual_seed(0)
    f, params = network()
    params = place(params, 'float', device)
    with torch.no_grad():
        f(torch.randn(8, 3, 64, 64, device=device), params, True)
    set_requires_grad_except_bn_(params)
    return f, params


def plain_step(opt, case, device):
    """The step as it is usually written: step(images, labels)."""
    f, params = initialise(case.student, device)
    if case.teacher:
        g, fixed = initialise(case.teacher, device)
        fixed = {k: v.detach() for k, v in fixed.items()}
    optimizer = torch.optim.SGD(
        [v for v in params.values() if v.requires_grad], opt.lr, momentum=0.9, weight_decay=opt.weight_decay
    )

    def at(x):
        return F.normalize(x.pow(2).mean(1).flatten(1))

    def input_gradient(logits, images, labels, **options):
        return torch.autograd.grad(F.cross_entropy(logits, labels, reduction='sum'), images, **options)[0]

    def step(images, labels):
        gradient = opt.transfer == 'gradient'
        images = images.detach().requires_grad_(gradient)
        if case.teacher:
            with torch.set_grad_enabled(gradient):
                y_t, groups_t = g(images, fixed, False)
        y, groups = f(images, params, True)
        terms = {'ce': (1 - opt.alpha) * F.cross_entropy(y, labels)}
        if opt.alpha:
            p, q = (F.log_softmax(v / opt.temperature, 1) for v in (y, y_t))
            terms['kd'] = opt.alpha * opt.temperature**2 * F.kl_div(p, q, reduction='batchmean', log_target=True)
        if gradient:
            j, j_t = input_gradient(y, images, labels, create_graph=True), input_gradient(y_t, images, labels)
            terms['grad'] = opt.beta / 2 * (j - j_t).flatten(1).norm(dim=1).mean()
        elif opt.beta:
            at_losses = [(at(s) - at(t)).pow(2).mean() for s, t in zip(groups, groups_t)]
            terms |= {f'at{i}': opt.beta * loss for i, loss in enumerate(at_losses)}
        loss = sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item(), [term.item() for term in terms.values()]

    return step


def fast_step(opt, case, device):
    """The step that cifar.py and imagenet.py take: step(images, labels)."""
    f, params = initialise(case.student, device)
    teacher = None
    if case.teacher:
        g, fixed = initialise(case.teacher, device)
        sample = partial(torch.randn, case.batch, 3, case.size, case.size)
        teacher = partial(g, params=frozen(opt, Network(g, fixed), sample, device), mode=False)
    image = torch.zeros(1, 3, case.size, case.size, device=device)
    return make_update(opt, Network(f, params), teacher, image)


def batch(case):
    """Random images (N, 3, H, W) in channels-last order and labels (N,)."""
    torch.manual_seed(0)
    images = torch.randn(case.batch, 3, case.size, case.size, device=device())
    labels = torch.randint(0, 10, (case.batch,), device=device())
    return images.contiguous(memory_format=torch.channels_last), labels


def fast(name, opt):
    """The fast step of a case, and its batch."""
    case = CASES[name]
    words = [*case.flags.split(), '--batch_size', str(case.batch), '--dtype', opt.dtype]
    twice = name == 'gradient_at'  # a step that is differentiated twice can neither be compiled nor use integers
    words += ['--teacher_dtype', opt.teacher_dtype] if case.teacher and not twice else []
    if not (opt.eager or twice):
        words += ['--compile', '--cuda_graphs'] if opt.cuda_graphs else ['--compile']
    return fast_step(parse_cifar('', words), case, device()), *batch(case)


@functools.cache
def plain(name, authors):
    """The plain step of a case, or the authors' from a folder of their code, and its batch."""
    case = CASES[name]
    images, labels = batch(case)
    opt = parse_cifar('', case.flags.split())
    if authors:
        taught = case.teacher and case.teacher.args
        step = authors_step(authors, case.student.args, taught, opt.alpha, opt.beta)
    else:
        step = plain_step(opt, case, device())
    return step, images.contiguous(), labels


def of_plain(measured, name, authors):
    """Apply a measure to the plain step of a case, for a separate process to call."""
    return measured(*plain(name, authors))


def default_teacher_dtype(dtype):
    return 'int8' if DTYPES[dtype].itemsize == 2 and device().type == 'cpu' and int8.exact() else 'same'


def choose_arithmetic():
    """The fast arithmetic of a GPU, if there is one, as in cifar.py and in the authors' code."""
    if device().type == 'cuda':
        workers.choose_arithmetic(deterministic=False)


def own_process():
    """A new process for the plain step, with the default memory allocator."""
    spawn = multiprocessing.get_context('spawn')
    return ProcessPoolExecutor(1, spawn, initializer=_begin, initargs=(os.getpid(),))


def _begin(parent):
    children.end_with_parent(parent)
    choose_arithmetic()


def measure(name, opt, rates):
    """Measure a case; returns its entry in the JSON."""
    case, step = CASES[name], fast(name, opt)
    first = seconds(*step)
    with own_process() as process:

        def measure_plain(measured):
            return process.submit(of_plain, measured, name, opt.authors).result()

        pairs = [(measure_plain(settled_seconds), settled_seconds(*step)) for _ in range(WARM_UP + opt.pairs)][WARM_UP:]
        count, plain_bytes = measure_plain(flops), measure_plain(peak_memory)
    ratios = [plain / fast for plain, fast in pairs]
    ms = {kind: 1000 * statistics.median(times) for kind, times in zip(('plain', 'fast'), zip(*pairs))}
    return {
        'plain_ms': ms['plain'],
        'fast_ms': ms['fast'],
        'ratio': statistics.median(ratios),
        'ratio_min': min(ratios),
        'ratio_max': max(ratios),
        'images_per_second': 1000 * case.batch / ms['fast'],
        'gflop': count / 1e9,
        'peak_fraction': count / (ms['fast'] / 1000) / rates[opt.dtype],
        'plain_peak_fraction': count / (ms['plain'] / 1000) / rates['float'],
        'plain_mb': plain_bytes / 1e6,
        'fast_mb': peak_memory(*step) / 1e6,
        'first_fast_s': first,
    }


def profile(name, opt):
    """Print the ten most expensive operators of a case's fast step."""
    step, *batch = fast(name, opt)
    for _ in range(2):
        step(*batch)
    with torch.profiler.profile() as profiler:
        step(*batch)
    print(profiler.key_averages().table(sort_by=f'self_{device().type}_time_total', row_limit=10))


def main():
    """Measure the cases one after another and print a row for each."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag('--only', default=','.join(CASES), help=f'some of {",".join(CASES)} (default: all)')
    flag('--dtype', default=fast_dtype(), choices=list(DTYPES), help='of the fast step')
    flag('--eager', action='store_true', help='the fast step without --compile')
    flag('--cuda_graphs', action='store_true', help='the fast step with --cuda_graphs, on a GPU')
    integers = "of the fast step's teacher (default: int8 on a CPU with VNNI beside a 16-bit --dtype)"
    flag('--teacher_dtype', choices=['same', 'int8'], help=integers)
    flag('--pairs', default=11, type=number(int, 1, 10_000), help='pairs that are measured')
    theirs = 'a clone of szagoruyko/attention-transfer: its step in place of the plain one'
    flag('--authors', default='', type=path, metavar='FOLDER', help=theirs)
    flag('--json', action='store_true', help='end with a line of JSON')
    flag('--profile', action='store_true', help='show the most expensive operators of the fast step too')
    opt = parser.parse_args()
    names = opt.only.split(',')
    if not set(names) <= set(CASES):
        raise ValueError(f'--only {opt.only}: expected some of {",".join(CASES)}')
    if opt.authors and not os.path.isfile(os.path.join(opt.authors, 'cifar.py')):
        raise ValueError(f'--authors {opt.authors} holds no cifar.py')
    if opt.authors and not set(names) <= set(WIDE):
        raise ValueError(f'--authors: expected --only some of {",".join(WIDE)}')
    if opt.cuda_graphs and device().type != 'cuda':
        raise ValueError('--cuda_graphs: there is no GPU')
    opt.teacher_dtype = opt.teacher_dtype or default_teacher_dtype(opt.dtype)
    workers.keep_memory()
    choose_arithmetic()
    rates = {dtype: matrix_rate(DTYPES[dtype], device()) for dtype in {'float', opt.dtype}}
    print(f'{environment(device())["device"]}, torch {torch.__version__}, commit {commit()}')
    print(f'fast: --dtype {opt.dtype}{"" if opt.eager else " --compile"}, teacher_dtype {opt.teacher_dtype}')
    print('matrix product: ' + ', '.join(f'{dtype} {rate / 1e9:.0f} GFLOP/s' for dtype, rate in sorted(rates.items())))
    print(
        f'{"case":<14}{"batch":>12}{"plain ms":>10}{"fast ms":>9}{"images/s":>10}  ratio: median (min to max)'
        f'{"GFLOP":>8}  of matrix rate{"MB plain":>10}{"MB fast":>9}{"first step":>12}'
    )
    results = {}
    for name in names:
        case, r = CASES[name], measure(name, opt, rates)
        results[name] = {k: round(v, 4) for k, v in r.items()}
        print(
            f'{name:<14}{f"{case.batch}x{case.size}x{case.size}":>12}{r["plain_ms"]:>10.1f}{r["fast_ms"]:>9.1f}'
            f'{r["images_per_second"]:>10.0f}{r["ratio"]:>11.2f} ({r["ratio_min"]:.2f} to {r["ratio_max"]:.2f})'
            f'{r["gflop"]:>13.1f}{r["peak_fraction"]:>16.2f}{r["plain_mb"]:>10.0f}{r["fast_mb"]:>9.0f}'
            f'{r["first_fast_s"]:>10.1f} s',
            flush=True,
        )
        if opt.profile:
            profile(name, opt)
    if opt.json:
        print(json.dumps(results))


if __name__ == '__main__':
    ending.run(main)
