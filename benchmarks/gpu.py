"""Checks and measures on a GPU, in one command, what is claimed of GPUs; it needs no download.

    python benchmarks/gpu.py                     # or make gpu
    python benchmarks/gpu.py --skip tests --skip epoch
    AUTHORS=/path/to/attention-transfer python benchmarks/gpu.py     # beside the authors' own step too

Parts: `tests` (those that need a GPU; with pytest, from requirements-dev.txt), `steps` (step.py in several dtypes,
compiled, with CUDA graphs), `authors` (step.py beside their step), `epoch` (epoch.py), `workers` (--ngpu over all
GPUs), and `resume` (a killed run with --deterministic ends bit for bit as an uninterrupted one). What fails is a line
of the table, its output goes to stderr, and the exit status is 1. The table has the hardware and the versions, and is
written to a file after each line.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from datetime import date

import torch

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..')
sys.path.insert(0, ROOT)

from step import WIDE

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
TRAIN = 'cifar.py --dataset digits --depth 16 --width 1 --epochs 5 --epoch_step [4] --lr 0.05 --seed 0'.split()
ENVIRONMENT = dict(os.environ)  # before `ending.run` changes where Python imports from
LIMIT = 1200  # seconds, for a program that waits for ever
GUESSING = 25  # percent of the digits right that a training has to exceed


def run(words, folder=ROOT, **environment):
    """The output of a script of the repository. Raises ValueError with the reason if it fails."""
    done = call([os.path.join(ROOT, words[0]), *words[1:]], folder, {**os.environ, **environment})
    if done.returncode:
        raise ValueError(f'status {done.returncode}: {reason(done.stderr or done.stdout)}')
    return done.stdout


def call(words, folder, environment):
    """Python with these arguments, when it has ended. If it fails, all that it printed goes to stderr.

    Raises ValueError if it does not end within LIMIT seconds.
    """
    text = {'encoding': 'utf-8', 'errors': 'replace', 'capture_output': True, 'timeout': LIMIT}
    try:
        done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, **text)
    except subprocess.TimeoutExpired as error:
        for printed in filter(None, (error.stdout, error.stderr)):  # bytes, whatever the encoding
            print(printed.decode(errors='replace'), end='', file=sys.stderr, flush=True)
        raise ValueError(f'it did not end within {LIMIT} seconds') from None
    if done.returncode:
        print(done.stdout, done.stderr, sep='', file=sys.stderr, flush=True)
    return done


def reason(text):
    """The last line that names an error, since PyTorch ends with advice; else the last line."""
    lines = text.strip().splitlines() or ['it printed nothing']
    return next((line for line in reversed(lines) if re.match(r'[\w.]+(Error|Exception)\b', line)), lines[-1])


def tests():
    """Run the tests that need a GPU."""
    environment = {name: value for name, value in ENVIRONMENT.items() if name != 'AT_QUICK_TESTS'}
    words = '-m pytest -v -m gpu -p no:cacheprovider --color=no'.split()  # -v: names, should the time run out
    done = call(words, ROOT, {**environment, 'AT_GPU_TESTS': '1', 'COLUMNS': '400'})
    lines = (done.stdout or done.stderr).splitlines() or ['it printed nothing']
    for line in lines:
        if line.startswith(('FAILED', 'ERROR')):
            yield 'tests', f'failed: {line}'
    summary = lines[-1]
    if done.returncode not in (0, 1) or 'passed' not in summary or 'skipped' in summary:
        raise ValueError(f'status {done.returncode}: {summary}')
    yield 'tests that need a GPU', summary


def steps():
    """Time training steps beside the plain ones."""
    for name, (flags, rounded) in STEPS.items():
        cases = [*WIDE, 'imagenet_224', *(['gradient_at'] if '--eager' in flags else [])]  # that is never compiled
        yield from compared(name, 'the plain one', cases, flags.split(), rounded)


def compared(name, other, cases, flags, rounded):
    """A row for each case that step.py measures with these flags; `other` is what it compares our step with."""
    exact = {} if rounded else {'NVIDIA_TF32_OVERRIDE': '0'}
    try:
        out = run(['benchmarks/step.py', '--json', '--only', ','.join(cases), *flags], **exact)
        found = json.loads(out.splitlines()[-1])
        rows = [(f'step, {case}, {name}', _in_words(found[case], other)) for case in cases]
    except Exception as error:
        if len(cases) == 1:
            rows = [(f'step, {cases[0]}, {name}', _failed(error))]
        else:  # the others of these cases may run
            rows = [row for case in cases for row in compared(name, other, [case], flags, rounded)]
    yield from rows


def _in_words(r, other):
    ratio = f'{r["ratio"]:.2f} times as fast ({r["ratio_min"]:.2f} to {r["ratio_max"]:.2f})'
    return f'{r["fast_ms"]:.2f} ms; {other} {r["plain_ms"]:.2f} ms: {ratio}'


def authors():
    """Time our step in bfloat16, compiled, beside the authors' own, from their cifar.py and utils.py."""
    if not os.environ.get('AUTHORS'):
        yield "the authors' step", 'left out: AUTHORS names no clone of szagoruyko/attention-transfer'
        return
    flags = ['--authors', os.path.abspath(os.environ['AUTHORS'])]
    for dtype, rounded in {'float32': False, 'TensorFloat-32': True}.items():
        yield from compared(f'bfloat16, compiled, beside {dtype}', "the authors' own", WIDE, flags, rounded)


def epoch():
    """Time an epoch beside the plain one."""
    found = json.loads(run(['benchmarks/epoch.py', '--json']).splitlines()[-1])
    for part in ('train', 'test'):
        r = found[part]
        yield f'epoch of AT, {part}', f'{r["fast_s"]:.2f} s; the plain one {r["plain_s"]:.2f} s: ratio {r["ratio"]:.2f}'


def workers():
    """Train with one process and with one for each GPU."""
    for count in sorted({1, torch.cuda.device_count()}):
        for more in '', '--sync_bn', '--sync_bn --compile --dtype bfloat16':
            with tempfile.TemporaryDirectory() as folder:
                size = str(32 // count * count or count)
                run([*TRAIN, '--batch_size', size, '--ngpu', str(count), *more.split(), '--save', 'run'], folder)
                right = read_log(os.path.join(folder, 'run', 'log.txt'))[-1]['test_acc']
            result = f'{right:.2f} % of the digits right'
            yield f'--ngpu {count} {more}'.strip(), result if right > GUESSING else f'failed: {result}'


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
    try:
        yield from PARTS[part]()
    except Exception as error:
        yield part, _failed(error)


def _failed(error):
    kind = '' if isinstance(error, ValueError | OSError) else f'{type(error).__name__}: '
    return f'failed: {kind}{" ".join(str(error).split())}'


def main():
    """Run the parts one after another and write the table."""
    parser = Parser(__doc__)
    parser.add_argument('--skip', action='append', default=[], choices=list(PARTS), help='a part to leave out')
    parser.add_argument('--out', default='benchmarks/GPU.md', type=path, help='file for the table')
    opt = parser.parse_args()
    if not torch.cuda.is_available():
        raise ValueError('there is no GPU that this PyTorch can use')
    names = ', '.join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    head = f'{names}; torch {torch.__version__}, CUDA {torch.version.cuda}, commit {commit()}, {date.today()}'
    lines = [f'`python benchmarks/gpu.py` on {head}.', '', '| what | result |', '|---|---|']
    write_whole(opt.out, '\n'.join([*lines, '']).encode())  # if that is impossible, it is told before anything runs
    failed = False
    for part in PARTS:
        for what, result in rows_of(part) if part not in opt.skip else ():
            print(f'{what}: {result}', flush=True)
            lines.append(f'| {what} | {result.replace("|", "/")} |')
            write_whole(opt.out, '\n'.join([*lines, '']).encode())
            failed |= result.startswith('failed: ')
    print(f'table: {opt.out}')
    if failed:
        sys.exit(1)


if __name__ == '__main__':
    ending.run(main)
