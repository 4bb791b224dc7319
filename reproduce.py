"""Reproduces a table: runs cifar.py where results are missing, then prints ours beside the published ones.

    python reproduce.py demo                       # handwritten digits: needs no download, minutes on two cores
    python reproduce.py table1 --dataroot data --dtype bfloat16 --compile  # table 1: 5 seeds of 200 epochs
    python reproduce.py table2 --dataroot data --dtype bfloat16 --compile  # table 2: mapping functions, one group only
    python reproduce.py table3 --dataroot data     # table 3: gradients, on networks without batch norm
    python reproduce.py tuning --dataroot data --dtype bfloat16 --compile  # betas of AT and F-ActT, on held-out images
    python reproduce.py controls --dataroot data --dtype bfloat16  # AT to another image's maps, an untrained teacher's
    python reproduce.py crd --dataroot data        # CIFAR-100, as papers on distillation do: 5 seeds of 240 epochs
    python reproduce.py table1 --show              # the table from the logs that are there

Finished runs are skipped and interrupted ones resumed, so the same command continues after an interruption. Without
--epochs, --show uses the table's own schedule, or if no run of it is finished, the longest one with a finished run.
"""

import argparse
import math
import os
import re
import shlex
import sys
from functools import partial

import torch

from engine import ending, jobs
from engine.arguments import Parser, number, path
from engine.flags import parse_cifar
from engine.paper import TABLES, columns, commands, methods_of, names
from engine.precision import freeze
from engine.runs import changed_settings
from engine.step import seconds_a_step
from engine.student import initialise
from engine.table import around, in_words, last_epoch, results, table_lines
from formats.networks import NETWORKS, fold, load
from formats.write import write_whole
from utils import DTYPES

FOLDER = os.path.dirname(os.path.abspath(__file__))
# What the hours of --dry_run come from.
MEASURED = 'steps times the median of 3 steps of each kind of run, measured now on random images; without evaluation'


def parse():
    """The parsed flags, with rows and methods as lists. Raises ValueError for unknown ones or missing markers."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag('table', choices=list(TABLES))
    flag('--rows', default='', help="numbers of the table's rows from 1, like 1,3 (default: all)")
    flag('--methods', default='', help=f'some of {",".join(methods_of("table1"))} (default: those of the table)')
    flag('--seeds', type=number(int, 1, 1000), help='number of seeds, from 0 on (default: 5, controls: 3, tuning: 1)')
    flag(
        '--epochs',
        type=number(int, 1),
        help='the schedule scales with it (default: 200, crd: 240, demo: 20, controls and tuning: 16)',
    )
    flag('--dataroot', default='.', type=path, help='as in cifar.py')
    held_out = 'as in cifar.py, to choose between variants (default: 0, tuning: 5000)'
    flag('--holdout', type=number(int, 0), help=held_out)
    flag('--dtype', default='', choices=list(DTYPES), help='as in cifar.py')
    jobs_at_a_time = 'runs at a time, one per GPU if there are GPUs (default: 1, demo: 2)'
    flag('--jobs', type=number(int, 1, 1024), help=jobs_at_a_time)
    markdown = 'also write the table into FILE, between its markers'
    flag('--markdown', default='', type=path, metavar='FILE', help=markdown)
    flag('--compile', action='store_true', help='as in cifar.py')
    flag('--cuda_graphs', action='store_true', help='as in cifar.py')
    flag('--all', action='store_true', help='also print the cells of the table that were not run')
    flag = parser.add_mutually_exclusive_group().add_argument
    flag('--dry_run', action='store_true', help='print the remaining commands and their time, and stop')
    flag('--show', action='store_true', help='print the table from the existing logs, and stop')
    opt = parser.parse_args()
    table = TABLES[opt.table]
    rows = list(table['rows'])
    opt.holdout = table['holdout'] if opt.holdout is None else opt.holdout
    if opt.holdout >= table['images']:
        raise ValueError(f'--holdout {opt.holdout}: there are {table["images"]:,} training images')
    opt.seeds = opt.seeds or table['seeds']
    opt.jobs = opt.jobs or (2 if opt.table == 'demo' else 1)
    methods = methods_of(opt.table)
    opt.methods = (
        opt.methods.split(',') if opt.methods else [m for m in methods if any(m in table['rows'][r] for r in rows)]
    )
    possible = argparse.Namespace(table=opt.table, methods=list(methods))
    allowed = [m for m in methods if any(m in columns(possible, row) for row in rows)]
    if not set(opt.methods) <= set(allowed):
        raise ValueError(f'--methods {",".join(opt.methods)}: expected some of {",".join(allowed)}')
    numbers = opt.rows.split(',') if opt.rows else [str(i + 1) for i in range(len(rows))]
    if not set(numbers) <= {str(i + 1) for i in range(len(rows))}:
        raise ValueError(f'--rows {opt.rows}: {opt.table} has rows 1 to {len(rows)}')
    opt.rows = [rows[int(i) - 1] for i in dict.fromkeys(numbers)]
    opt.epochs = opt.epochs or (opt.show and longest_schedule(opt)) or table['epochs']
    if opt.cuda_graphs and not opt.compile:
        raise ValueError('--cuda_graphs goes with --compile')
    if opt.markdown:
        around(opt.markdown, opt.table)  # a file without the markers is reported before training
    return opt


# ----------------------------------------------------------------------------------------------------------- the runs


def finished(opt, name):
    """Whether a run is complete by its log and its checkpoint, if any: they differ if it was killed in between."""
    path = os.path.join('logs', name, 'model.pt7')
    ended = last_epoch(opt, name)
    return ended and (not os.path.exists(path) or load(path).get('epoch') == opt.epochs)


def longest_schedule(opt):
    """The table's own number of epochs if one of its runs is finished, else the largest in logs/ with one; or None.

    Raises what `results` raises.
    """
    table, folders = TABLES[opt.table], os.listdir('logs') if os.path.isdir('logs') else []
    schedules = sorted({int(n) for folder in folders for n in re.findall(r'-e(\d+)$', folder)}, reverse=True)
    cells = [(row, method) for row in opt.rows for method in columns(opt, row)]
    for epochs in (table['epochs'], *schedules):
        scheduled = argparse.Namespace(**{**vars(opt), 'epochs': epochs})
        if any(last_epoch(scheduled, name) for cell in cells for name in names(scheduled, *cell)):
            return epochs
    return None


def initial_network(opt):
    """The initialised network for flags of cifar.py: (f, params)."""
    return initialise(NETWORKS[opt.net].network(opt), opt, 100 if opt.dataset == 'CIFAR100' else 10, device())


def device():
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def seconds(opt, missing, runs):
    """The seconds that the remaining runs would take here in sequence, from measured steps on random images."""
    measured, total, images_per_epoch = {}, 0, TABLES[opt.table]['images'] - opt.holdout
    for name, command in missing.items():
        flags = parse_cifar('', command.flags)
        kind = name.rpartition('-s')[0]
        if kind not in measured:
            images = torch.randn(flags.batch_size, 3, flags.image_size, flags.image_size, device=device())
            images = images.contiguous(memory_format=torch.channels_last)
            teacher = _untrained(runs[flags.teacher_id]) if flags.teacher_id else None
            measured[kind] = seconds_a_step(flags, initial_network(flags), teacher, images)
        total += (opt.epochs - len(results(name))) * math.ceil(images_per_epoch / flags.batch_size) * measured[kind]
    return total


def _untrained(command):
    flags = parse_cifar('', command.flags)
    f, params = initial_network(flags)
    return partial(f, params=freeze(fold(params), flags.dtype, device()), mode=False)


def check_settings(name, command, shown=False):
    """Raise ValueError if logs/ has the run with other settings than those of a Command, --cuda_graphs aside.

    If the run is only shown, precision and compilation may differ too, and flags that its log lacks.
    """
    flags, records = {**vars(parse_cifar('', command.flags)), 'control': command.control}, results(name)
    if records:
        last = {'control': '', 'cuda_graphs': False, **records[-1]}
        # CUDA graphs replay the same step, and need a GPU, which other runs of a table may lack.
        free = ('cuda_graphs', 'dtype', 'compile') if shown else ('cuda_graphs',)
        flags |= {flag: last[flag] for flag in free if flag in last}
        flags = {flag: value for flag, value in flags.items() if flag in last or not shown}
    changed = changed_settings(argparse.Namespace(**flags), records)
    if changed:
        raise ValueError(f'logs/{name} holds a run with other settings ({"; ".join(changed)})')


def print_refusals(runs):
    """Print which of the runs {name: Command} are in logs/ with other settings, so that they would fail."""
    for name, command in runs.items():
        try:
            check_settings(name, command)
        except ValueError as error:
            print(f'# {error}')


def run(opt, name, command, job):
    """Train a run to its end, on the GPU of its job number if there are GPUs; return the outcome to print.

    Raises ValueError if it cannot start or fails, and KeyboardInterrupt if it was stopped.
    """
    check_settings(name, command)
    if finished(opt, name):
        return 'done'
    if command.teacher and not last_epoch(opt, command.teacher):
        raise ValueError(f'its teacher {command.teacher} is not trained')
    script, *words = command.words
    jobs.call([sys.executable, os.path.join(FOLDER, script), *words], job, opt.jobs)
    if not last_epoch(opt, name):
        raise ValueError('it was stopped')
    return f'{100 - last_epoch(opt, name)["test_acc"]:.2f}% test error'


def print_conclusion(opt):
    """Print what the demo's table shows, and the paths of pictures of its curves and attention maps."""
    print('\n' + in_words(opt))
    (row,) = opt.rows
    shown = [names(opt, row, method)[0] for method in ('teacher', 'student', 'at', 'kd', 'at-kd')]
    runs = [os.path.join('logs', name) for name in shown if last_epoch(opt, name)]
    if len(runs) < len(shown):
        return
    print('The pictures show the runs of seed 0:')
    folder = os.path.dirname(runs[0])
    labelled = zip((runs[0], runs[2], runs[1]), ('teacher', 'student, AT', 'student alone'))
    models = [word for run, label in labelled for word in ('--model', run, '--label', label)]
    for out, words in {
        'curves.png': ['curves', *runs],
        'maps.png': ['attention', *models, '--images', 'digits', '--image_size', '8'],
    }.items():
        jobs.call([sys.executable, os.path.join(FOLDER, 'plot.py'), *words, '--out', os.path.join(folder, out)], 0, 1)


def main():
    """Print the commands, or train what is missing and print the table."""
    opt = parse()
    runs = commands(opt)
    if opt.dry_run:
        print_refusals(runs)
        missing = {name: command for name, command in runs.items() if not last_epoch(opt, name)}
        print('\n'.join(shlex.join(['python', *command.words]) for command in missing.values()))
        hours = seconds(opt, missing, runs) / 3600
        print(f'# {len(missing)} runs, about {hours:.1f} hours here, one after the other ({MEASURED})')
        return
    failed = []
    if opt.show:
        for name in runs:
            if last_epoch(opt, name):
                check_settings(name, runs[name], shown=True)
    else:
        waits_for = {name: command.teacher for name, command in runs.items()}
        failed = jobs.run_all(waits_for, lambda name, job: run(opt, name, runs[name], job), opt.jobs)
    lines = table_lines(opt)
    if opt.markdown:  # before the output, which may be a closed pipe
        head, tail = around(opt.markdown, opt.table)
        end = b'\r\n' if head.endswith(b'\r\n') else b'\n'
        table = b''.join(line.encode(errors='backslashreplace') + end for line in lines)
        write_whole(opt.markdown, head + table + tail)
    print('\n'.join(lines))
    if opt.table == 'demo':
        print_conclusion(opt)
    if failed:
        sys.exit(1)


if __name__ == '__main__':
    ending.run(main)
