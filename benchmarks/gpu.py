"""Checks and measures on a GPU, in one command, what is claimed of GPUs; it needs no download.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --skip tests --skip epoch
    AUTHORS=/path/to/attention-transfer python benchmarks/gpu.py     # beside the authors' own step too

Parts: `tests` (those that need a GPU), `steps` (step.py in several dtypes, compiled, with CUDA graphs), `authors`
(step.py beside their step), `epoch` (epoch.py), `workers` (--ngpu over all GPUs), and `resume` (a killed run with
--deterministic ends bit for bit as an uninterrupted one). What fails is a line of the table, and the exit status is 1.
The table is printed and written to a file after each part, with the hardware and the versions.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from datetime import date

import torch

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..')
sys.path.insert(0, ROOT)

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
CASES = 'student', 'teacher', 'at', 'kd', 'at_kd', 'imagenet_224'
ENVIRONMENT = dict(os.environ)  # before `ending.run` changes where Python imports from
TRAIN = 'cifar.py --dataset digits --depth 16 --width 1 --epochs 3 --epoch_step [2] --seed 0'.split()


def run(words, folder=ROOT, **environment):
    """The output of a script of the repository. Raises ValueError with its last line of errors if it fails."""
    done = call([os.path.join(ROOT, words[0]), *words[1:]], folder, {**os.environ, **environment})
    if done.returncode:
        raise ValueError(f'status {done.returncode}: {last_line(done.stderr or done.stdout)}')
    return done.stdout


def call(words, folder, environment):
    """Python with these arguments, when it has ended."""
    text = {'encoding': 'utf-8', 'errors': 'replace'}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, **text)


def last_line(text):
    return ''.join(text.strip().splitlines()[-1:])


def tests():
    """Run the tests that need a GPU."""
    words = '-m pytest -m gpu -p no:cacheprovider --color=no'.split()
    done = call(words, ROOT, {**ENVIRONMENT, 'AT_GPU_TESTS': '1'})
    failures = [line for line in done.stdout.splitlines() if line.startswith(('FAILED', 'ERROR'))]
    for line in failures:
        yield 'tests', f'failed: {line}'
    if done.returncode and not failures:
        raise ValueError(f'status {done.returncode}: {last_line(done.stderr or done.stdout)}')
    yield 'tests that need a GPU', last_line(done.stdout)


def steps():
    """Time training steps beside the plain ones."""
    for name, (flags, rounded) in STEPS.items():
        cases = [*CASES, 'gradient_at'] if '--eager' in flags else CASES  # it is never compiled
        yield from compared(name, 'the plain one', ['--only', ','.join(cases), *flags.split()], rounded)


def compared(name, other, flags, rounded):
    """A row for each case that step.py measures with these flags; `other` is what it compares our step with."""
    exact = {} if rounded else {'NVIDIA_TF32_OVERRIDE': '0'}
    try:
        found = json.loads(run(['benchmarks/step.py', '--json', *flags], **exact).splitlines()[-1])
    except ValueError as error:
        yield f'steps, {name}', f'failed: {error}'
        return
    for case, r in found.items():
        ratio = f'{r["ratio"]:.2f} times as fast ({r["ratio_min"]:.2f} to {r["ratio_max"]:.2f})'
        yield f'step, {case}, {name}', f'{r["fast_ms"]:.2f} ms; {other} {r["plain_ms"]:.2f} ms: {ratio}'


def authors():
    """Time our step in bfloat16, compiled, beside the authors' own, from their cifar.py and utils.py."""
    if not os.environ.get('AUTHORS'):
        yield "the authors' step", 'left out: AUTHORS names no clone of szagoruyko/attention-transfer'
        return
    flags = ['--only', 'student,teacher,at,kd,at_kd', '--authors', os.path.abspath(os.environ['AUTHORS'])]
    for name, rounded in {'float32': False, 'TensorFloat-32': True}.items():
        yield from compared('bfloat16, compiled', f"the authors' own in {name}", flags, rounded)


def epoch():
    """Time an epoch beside the plain one."""
    found = json.loads(run(['benchmarks/epoch.py', '--json']).splitlines()[-1])
    for part in ('train', 'test'):
        r = found[part]
        yield f'epoch of AT, {part}', f'{r["fast_s"]:.2f} s; the plain one {r["plain_s"]:.2f} s: ratio {r["ratio"]:.2f}'


def workers():
    """Train with one process and with one for each GPU; the batch is the same, so accuracies are alike."""
    for count in sorted({1, torch.cuda.device_count()}):
        for more in '', '--sync_bn', '--sync_bn --compile --dtype bfloat16':
            with tempfile.TemporaryDirectory() as folder:
                size = str(64 // count * count or count)
                run([*TRAIN, '--batch_size', size, '--ngpu', str(count), *more.split(), '--save', 'run'], folder)
                last = read_log(os.path.join(folder, 'run', 'log.txt'))[-1]
            yield f'--ngpu {count} {more}'.strip(), f'{last["test_acc"]:.2f} % of the digits right'


def resume():
    """Compare a run with AT that is killed after an epoch, and resumed, with one that is not."""
    with tempfile.TemporaryDirectory() as folder:
        run([*TRAIN, '--save', 'teacher'], folder)
        words = [*TRAIN, *'--epochs 20 --deterministic --dtype bfloat16 --teacher_id teacher --beta 10'.split()]
        run([*words, '--save', 'whole'], folder)
        command = [sys.executable, '-u', os.path.join(ROOT, words[0]), *words[1:], '--save', 'part']
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, encoding='utf-8') as process:
            for line in process.stdout:
                if line.startswith('epoch 1/'):
                    process.send_signal(signal.SIGKILL)
        resumed = run([*words, '--save', 'part', '--resume', 'auto'], folder)
        if process.returncode != -signal.SIGKILL or 'resumed from part' not in resumed:
            raise ValueError(f'the run was not killed and resumed: status {process.returncode}')
        whole, part = (load(os.path.join(folder, name, 'model.pt7'))['params'] for name in ('whole', 'part'))
    different = [key for key, value in whole.items() if not torch.equal(value, part[key])]
    if different:
        raise ValueError(f'{len(different)} of {len(whole)} parameters differ, for example {different[0]}')
    yield 'a killed and resumed run, --deterministic', f'all {len(whole)} parameters equal bit for bit'


PARTS = {part.__name__: part for part in (tests, steps, authors, epoch, workers, resume)}


def rows_of(part):
    """The rows of a part, (what, result): the last one says why it failed, if it did, for whatever reason."""
    rows = []
    try:
        for row in PARTS[part]():
            print(': '.join(row), flush=True)
            rows.append(row)
    except Exception as error:
        kind = '' if isinstance(error, ValueError | OSError) else f'{type(error).__name__}: '
        rows.append((part, f'failed: {kind}{" ".join(str(error).split())}'))
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
    rows, lines = [], [f'`python benchmarks/gpu.py` on {head}.', '', '| what | result |', '|---|---|']
    for part in PARTS:
        if part not in opt.skip:
            rows += rows_of(part)
            table = [f'| {what} | {result.replace("|", "/")} |' for what, result in rows]
            write_whole(opt.out, '\n'.join([*lines, *table, '']).encode())
    print(f'table: {opt.out}')
    if any(result.startswith('failed: ') for _, result in rows):
        sys.exit(1)


if __name__ == '__main__':
    ending.run(main)
