"""Everything that this repository claims of GPUs, checked and measured in one command; it needs no download.

    python benchmarks/gpu.py                     # all parts, some ten minutes
    python benchmarks/gpu.py --skip tests --skip epoch
    AUTHORS=/path/to/attention-transfer python benchmarks/gpu.py     # the authors' own step too

Parts: `tests` (pytest), `steps` (step.py in several dtypes, compiled, with CUDA graphs), `authors` (their step),
`epoch` (epoch.py), `workers` (--ngpu over all GPUs), and `resume` (a killed run with --deterministic ends bit for bit
as an uninterrupted one). A part that fails is a line of the table, and the exit status is 1. The table is printed and
written to a file, with the hardware and the versions.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from datetime import date

import torch

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..')
sys.path.insert(0, ROOT)

from authors import step as authors_step
from measure import seconds

from engine import ending
from engine.arguments import Parser, path
from engine.log import commit, read_log
from formats.networks import load
from formats.write import write_whole

STEPS = {  # flags of step.py, and whether float32 products may be rounded to TensorFloat-32
    'float32': ('--dtype float --eager', False),
    'TensorFloat-32': ('--dtype float --eager', True),
    'TensorFloat-32, compiled': ('--dtype float', True),
    'bfloat16': ('--dtype bfloat16 --eager', True),
    'bfloat16, compiled': ('--dtype bfloat16', True),
    'bfloat16, compiled, CUDA graphs': ('--dtype bfloat16 --cuda_graphs', True),
}
CASES = 'student,teacher,at,kd,at_kd,gradient_at,imagenet_224'
TRAIN = 'cifar.py --dataset digits --depth 16 --width 1 --epochs 3 --epoch_step [2] --seed 0'.split()


def run(words, folder=ROOT, **environment):
    """The output of a script of the repository. Raises ValueError with its last line of errors if it fails."""
    return output([os.path.join(ROOT, words[0]), *words[1:]], folder, {**os.environ, **environment})


def output(words, folder, environment=None):
    """The output of Python with these arguments. Raises ValueError with its last line of errors if it fails."""
    text = {'encoding': 'utf-8', 'errors': 'replace'}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, **text)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise ValueError(f'status {done.returncode}: {"".join(last)}')
    return done.stdout


def tests():
    """Run all tests, those that need a GPU included."""
    output(['-m', 'pytest', '-q', '-p', 'no:cacheprovider'], ROOT)
    yield 'all tests', 'passed'


def steps():
    """Time training steps beside the plain ones."""
    for name, (flags, rounded) in STEPS.items():
        exact = {} if rounded else {'NVIDIA_TF32_OVERRIDE': '0'}
        words = ['benchmarks/step.py', '--only', CASES, '--json', *flags.split()]
        try:
            found = json.loads(run(words, **exact).splitlines()[-1])
        except ValueError as error:
            yield f'steps, {name}', f'failed: {error}'
            continue
        for case, r in found.items():
            ratio = f'{r["ratio"]:.2f} times as fast ({r["ratio_min"]:.2f} to {r["ratio_max"]:.2f})'
            yield f'step, {case}, {name}', f'{r["fast_ms"]:.2f} ms; the plain one {r["plain_ms"]:.2f} ms: {ratio}'


def authors():
    """The authors' own step of WRN-16-1 taught by WRN-16-2, from their cifar.py and utils.py."""
    if not os.environ.get('AUTHORS'):
        yield "the authors' step", 'left out: AUTHORS names no clone of szagoruyko/attention-transfer'
        return
    step = authors_step(os.environ['AUTHORS'], (16, 1, 10), (16, 2, 10), beta=1e3)
    images, labels = torch.randn(128, 3, 32, 32).cuda(), torch.randint(10, (128,)).cuda()
    times = [seconds(step, images, labels) for _ in range(60)]
    yield "the authors' step, AT, float32", f'{1000 * statistics.median(times[20:]):.2f} ms'


def epoch():
    """Time an epoch beside the plain one."""
    found = json.loads(run(['benchmarks/epoch.py', '--json']).splitlines()[-1])
    for part in ('train', 'test'):
        r = found[part]
        yield f'epoch of AT, {part}', f'{r["fast_s"]:.2f} s; the plain one {r["plain_s"]:.2f} s: ratio {r["ratio"]:.2f}'


def workers():
    """Train with one process and with one for each GPU."""
    for count in sorted({1, torch.cuda.device_count()}):
        with tempfile.TemporaryDirectory() as folder:
            run([*TRAIN, '--batch_size', str(64 * count), '--ngpu', str(count), '--save', 'run'], folder)
            last = read_log(os.path.join(folder, 'run', 'log.txt'))[-1]
        yield f'--ngpu {count}', f'{last["images_per_second"]:.0f} images/s, {last["test_acc"]:.2f} % right'


def resume():
    """Compare a run that is killed after an epoch, and resumed, with one that is not."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*TRAIN, '--deterministic', '--dtype', 'bfloat16']
        run([*words, '--save', 'whole'], folder)
        command = [sys.executable, '-u', os.path.join(ROOT, words[0]), *words[1:], '--save', 'part']
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, encoding='utf-8') as process:
            for line in process.stdout:
                if line.startswith('epoch 1/'):
                    process.send_signal(signal.SIGKILL)
        run([*words, '--save', 'part', '--resume', 'auto'], folder)
        whole, part = (load(os.path.join(folder, name, 'model.pt7'))['params'] for name in ('whole', 'part'))
    different = [key for key, value in whole.items() if not torch.equal(value, part[key])]
    if different:
        raise ValueError(f'{len(different)} of {len(whole)} parameters differ, for example {different[0]}')
    yield 'a killed and resumed run, --deterministic', f'all {len(whole)} parameters equal bit for bit'


PARTS = {part.__name__: part for part in (tests, steps, authors, epoch, workers, resume)}


def rows_of(part):
    """The rows of a part, (what, result): the last one says why it failed, if it did."""
    rows = []
    try:
        for row in PARTS[part]():
            print(': '.join(row), flush=True)
            rows.append(row)
    except (OSError, ValueError, KeyError, IndexError) as error:
        rows.append((part, f'failed: {error}'))
        print(': '.join(rows[-1]), flush=True)
    return rows


def main():
    """Run the parts one after another and write the table."""
    parser = Parser(__doc__)
    parser.add_argument('--skip', action='append', default=[], choices=list(PARTS), help='a part to leave out')
    parser.add_argument('--out', default='benchmarks/GPU.md', type=path, help='file for the table')
    opt = parser.parse_args()
    if not torch.cuda.is_available():
        raise ValueError('there is no GPU that this PyTorch can use')
    if not os.path.isdir(os.path.dirname(opt.out) or '.'):
        raise ValueError(f'--out {opt.out}: no such folder')
    names = ', '.join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    head = f'{names}; torch {torch.__version__}, CUDA {torch.version.cuda}, commit {commit()}, {date.today()}'
    rows = [row for part in PARTS if part not in opt.skip for row in rows_of(part)]
    table = [f'| {what} | {result.replace("|", "/")} |' for what, result in rows]
    text = '\n'.join([f'`python benchmarks/gpu.py` on {head}.', '', '| what | result |', '|---|---|', *table])
    write_whole(opt.out, f'{text}\n'.encode())
    print(f'table: {opt.out}')
    if any(result.startswith('failed: ') for _, result in rows):
        sys.exit(1)


if __name__ == '__main__':
    ending.run(main)
