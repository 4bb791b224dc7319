"""Time of an epoch and memory against batch size, width and number of processes, measured on whole runs of cifar.py.

    python benchmarks/scale.py --out benchmarks/scale.svg

WRN-16 learns from one of twice its width by attention transfer, on 1,000 images of 32x32 (handwritten digits). Each row
is a separate run; its speed is that of the last epoch, and its memory the peak of its largest process.
"""

import os
import subprocess
import sys
import tempfile

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
import torch

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..')
sys.path.insert(0, ROOT)

from measure import fast_dtype

from engine import ending
from engine.arguments import Parser, path
from engine.log import read_log
from utils import DTYPES

BATCHES, WIDTHS, PROCESSES = (32, 64, 128, 256, 512), (0.5, 1, 2, 4), (1, 2)
AXES = {'batch size': ('batch_size', BATCHES), 'width': ('width', WIDTHS), 'processes': ('ngpu', PROCESSES)}


def run(folder, dtype, batch_size=128, width=1, ngpu=1):
    """Train a run in a folder; returns its last log line and the peak megabytes of its largest process."""
    common = [sys.executable, os.path.join(ROOT, 'cifar.py'), '--dataset', 'digits', '--dtype', dtype]
    teacher, student = f't{width}', f's{batch_size}-{width}-{ngpu}'
    if not os.path.exists(os.path.join(folder, 'logs', teacher)):
        call([*common, '--epochs', '1', '--width', str(2 * width), '--save', f'logs/{teacher}'], folder)
    words = ['--epochs', '3', '--width', width, '--batch_size', batch_size, '--ngpu', ngpu, '--save', f'logs/{student}']
    megabytes = call([*common, *map(str, words), '--teacher_id', teacher, '--beta', '1e+3'], folder)
    return read_log(os.path.join(folder, 'logs', student, 'log.txt'))[-1], megabytes


def call(command, folder):
    """Run a command under a process that only waits for it; returns the peak megabytes of its largest process."""
    watch = (
        'import resource, subprocess, sys\n'
        'done = subprocess.run(sys.argv[1:], stdout=sys.stderr)\n'
        'print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n'
        'sys.exit(done.returncode)'
    )
    watched = [sys.executable, '-I', '-c', watch, *command]
    done = subprocess.run(watched, cwd=folder, capture_output=True, encoding='utf-8', errors='replace')
    if done.returncode:
        raise ValueError(f'{" ".join(command)} failed: {done.stderr.strip().splitlines()[-1]}')
    unit = 1 if sys.platform == 'darwin' else 1024  # bytes on macOS, kilobytes elsewhere
    return int(done.stdout) * unit / 1e6


def plot(results, path):
    """Speed and memory against each axis, as one picture."""
    figure, axes = plt.subplots(1, len(AXES), figsize=(11, 3.2), layout='constrained')
    for axis, (name, rows) in zip(axes, results.items()):
        values = [str(value) for value, *_ in rows]
        axis.plot(values, [speed for _, speed, _ in rows], 'o-', color='tab:blue')
        axis.set(xlabel=name, ylim=(0, 1.1 * axis.get_ylim()[1]))
        axis.set_ylabel('images/s', color='tab:blue')
        memory = axis.twinx()
        memory.plot(values, [megabytes for *_, megabytes in rows], 's--', color='tab:orange')
        memory.set(ylim=(0, 1.1 * memory.get_ylim()[1]))
        memory.set_ylabel('MB of the largest process', color='tab:orange')
    figure.savefig(path)


def main():
    """Train a run for each row, print the table and plot it."""
    parser = Parser(__doc__)
    parser.add_argument('--dtype', default=fast_dtype(), choices=list(DTYPES), help='compute dtype')
    parser.add_argument('--out', type=path, metavar='FILE', help='also draw a picture, .svg or .png')
    opt = parser.parse_args()
    print('| batch size | width | processes | images/s | seconds an epoch of 50,000 | MB of the largest process |')
    print('|---|---|---|---|---|---|')
    results, measured = {name: [] for name in AXES}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (flag, values) in AXES.items():
            for value in values:
                setting = {'batch_size': 128, 'width': 1, 'ngpu': 1, flag: value}
                if flag == 'ngpu' and value > (torch.cuda.device_count() or os.cpu_count()):
                    continue
                key = tuple(setting.values())
                if key not in measured:
                    record, megabytes = measured[key] = run(folder, opt.dtype, **setting)
                    speed = record['images_per_second']
                    cells = *key, f'{speed:.0f}', f'{50_000 / speed:.0f}', f'{megabytes:.0f}'
                    print(f'| {" | ".join(map(str, cells))} |', flush=True)
                record, megabytes = measured[key]
                results[name].append((value, record['images_per_second'], megabytes))
    print(f'\n{record["device"]}, torch {record["torch"]}, {opt.dtype}, commit {record["commit"]}')
    if opt.out:
        plot(results, opt.out)


if __name__ == '__main__':
    ending.run(main)
