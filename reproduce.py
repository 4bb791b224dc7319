"""A table of section 4.1 as a list of runs of cifar.py: train what is missing, then print ours beside the paper's.

    python reproduce.py demo                       # handwritten digits: needs no download, minutes on two cores
    python reproduce.py table1 --dataroot data     # table 1: 5 seeds of 200 epochs
    python reproduce.py table2 --dataroot data     # table 2: mapping functions, and one group only
    python reproduce.py table3 --dataroot data     # table 3: gradients, on networks without batch norm
    python reproduce.py table1 --show              # the table from the logs that are there

A finished run is skipped and a broken one resumed, so the same command goes on after an interruption. Without --epochs,
--show takes the table's own schedule, or where no run of that is finished, the longest of which one is.
"""

import argparse
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial

import torch

import ending
import engine
import options
from formats.networks import NETWORKS, fold, load
from formats.write import write_whole
from runs import changed_settings

# Of each row, student <- teacher, the methods with the paper's test error in percent: the median of 5 seeds.
TABLE1 = {
    ('nin-thin', 'nin-wide'): {'student': 9.38, 'at': 8.93, 'full': 9.05, 'kd': 8.55, 'at-kd': 8.33, 'teacher': 7.28},
    ('wrn-16-1', 'wrn-16-2'): {'student': 8.77, 'at': 7.93, 'full': 8.51, 'kd': 7.41, 'at-kd': 7.51, 'teacher': 6.31},
    ('wrn-16-1', 'wrn-40-1'): {'student': 8.77, 'at': 8.25, 'full': 8.62, 'kd': 8.39, 'at-kd': 8.01, 'teacher': 6.58},
    ('wrn-16-2', 'wrn-40-2'): {'student': 6.31, 'at': 5.85, 'full': 6.24, 'kd': 6.08, 'at-kd': 5.71, 'teacher': 5.23},
}
MAPPINGS = {'student': 8.77, 'at-sum1': 7.99, 'at': 7.93, 'at-sum4': 8.09, 'at-max1': 8.08}
TABLE2 = {('wrn-16-1', 'wrn-16-2'): {**MAPPINGS, 'at-group0': 8.11, 'at-group1': 7.96, 'at-group2': 7.97}}
GRADIENTS = {'student': 13.5, 'min-l2': 12.5, 'gradient': 12.1, 'kd': 12.1, 'symmetry': 11.8, 'at': 11.2}
TABLE3 = {('nin-thin-nobn', 'nin-wide-nobn'): GRADIENTS}
DEMO = {('wrn-16-1', 'wrn-16-2'): dict.fromkeys(('teacher', 'student', 'at', 'kd', 'at-kd'))}

METHODS = {  # the flags of each method, but for those that name the networks; BETA is the table's
    'teacher': [],
    'student': [],
    'min-l2': ['--penalty', 'min_l2', '--gamma', '0.1'],
    'symmetry': ['--penalty', 'symmetry', '--gamma', '0.1'],
    'gradient': ['--transfer', 'gradient', '--beta', '0.1'],
    'at': ['--beta', 'BETA'],
    'at-sum1': ['--beta', 'BETA', '--power', '1'],
    'at-sum4': ['--beta', 'BETA', '--power', '4'],
    'at-max1': ['--beta', 'BETA', '--mapping', 'max', '--power', '1'],
    'at-group0': ['--beta', 'BETA', '--groups', '0'],
    'at-group1': ['--beta', 'BETA', '--groups', '1'],
    'at-group2': ['--beta', 'BETA', '--groups', '2'],
    'full': ['--transfer', 'full', '--beta', '1e+5'],
    'kd': ['--alpha', '0.9'],
    'at-kd': ['--beta', 'BETA', '--beta_decay', 'linear', '--alpha', '0.9'],
}
LABELS = {  # in the order of the tables
    'teacher': 'teacher',
    'student': 'student alone',
    'min-l2': 'min-l2',
    'gradient': 'gradient-based AT',
    'symmetry': 'symmetry norm',
    'at-sum1': 'AT, sum of abs',
    'at': 'AT',
    'at-sum4': 'AT, sum of 4th powers',
    'at-max1': 'AT, max of abs',
    'at-group0': 'AT, group 1 only',
    'at-group1': 'AT, group 2 only',
    'at-group2': 'AT, group 3 only',
    'full': 'F-ActT',
    'kd': 'KD',
    'at-kd': 'AT+KD',
}
RUNNING = []  # the processes of cifar.py that train at the moment
STOPPED = []  # the signals that asked for an end
UNTAUGHT = ('teacher', 'student', 'min-l2', 'symmetry')
# What a line of a log has to say to stand in a table.
PROTOCOL = set('epoch test_acc dataset train_images test_images holdout epochs epoch_step'.split())
PROTOCOL |= set('lr_decay_ratio batch_size dtype device torch'.split())
CIFAR = {'dataset': 'CIFAR10', 'images': 50_000, 'epochs': 200, 'seeds': 5, 'beta': '1e+3', 'flags': []}
TABLES = {
    'table1': {**CIFAR, 'rows': TABLE1},
    'table2': {**CIFAR, 'rows': TABLE2},
    # Without batch norm, 1e+3 and 1e+2 diverge within an epoch; of 10 and 1, 10 did better on held-out images.
    'table3': {**CIFAR, 'rows': TABLE3, 'beta': '10'},
    'demo': {
        'dataset': 'digits',
        'images': 1000,
        'epochs': 10,
        'seeds': 1,
        'beta': '100',  # chosen on held-out training images: in 160 steps, 1e+3 leaves no time to learn the classes
        'flags': ['--batch_size', '64'],
        'rows': DEMO,
    },
}


def parse():
    """The flags, with rows and methods as lists; ValueError where the table has no such, or a file no markers."""
    parser = options.Parser(__doc__)
    flag = parser.add_argument
    flag('table', choices=list(TABLES))
    flag('--rows', default='', help="numbers of the table's rows from 1, like 1,3 (default: all)")
    flag('--methods', default='', help=f'some of {",".join(METHODS)} (default: all of the table)')
    flag('--seeds', type=options.number(int, 1, 1000), help='number of seeds, from 0 on (default: 5, demo: 1)')
    flag('--epochs', type=options.number(int, 1), help='the schedule scales with it (default: 200, demo: 10)')
    flag('--dataroot', default='.', type=options.path, help='as of cifar.py')
    flag('--holdout', default=0, type=options.number(int, 0), help='as of cifar.py: to choose between variants')
    flag('--dtype', default='', choices=['', *options.DTYPES], help='as of cifar.py')
    flag('--jobs', default=1, type=options.number(int, 1, 1024), help='runs at a time, one a GPU where there are GPUs')
    markdown = 'also write the table into FILE, between its markers'
    flag('--markdown', default='', type=options.path, metavar='FILE', help=markdown)
    flag = parser.add_mutually_exclusive_group().add_argument
    flag('--dry_run', action='store_true', help='print the commands that are left to run and their time, and stop')
    flag('--show', action='store_true', help='print the table from the logs that are there, and stop')
    opt = parser.parse_args()
    table = TABLES[opt.table]
    rows = list(table['rows'])
    if opt.holdout >= table['images']:
        raise ValueError(f'--holdout {opt.holdout}: there are {table["images"]:,} training images')
    opt.seeds = opt.seeds or table['seeds']
    methods = [m for m in LABELS if any(m in table['rows'][row] for row in rows)]
    opt.methods = opt.methods.split(',') if opt.methods else methods
    if not set(opt.methods) <= set(methods):
        raise ValueError(f'--methods {",".join(opt.methods)}: expected some of {",".join(methods)}')
    numbers = opt.rows.split(',') if opt.rows else [str(i + 1) for i in range(len(rows))]
    if not set(numbers) <= {str(i + 1) for i in range(len(rows))}:
        raise ValueError(f'--rows {opt.rows}: {opt.table} has rows 1 to {len(rows)}')
    opt.rows = [rows[int(i) - 1] for i in dict.fromkeys(numbers)]
    opt.epochs = opt.epochs or (opt.show and epochs_there(opt)) or table['epochs']
    if opt.markdown:
        around(opt.markdown, opt.table)  # a file without the markers is told before anything else begins
    return opt


# ----------------------------------------------------------------------------------------------------------- the runs


def network_flags(name):
    """The flags of cifar.py for one of the paper's networks."""
    kind, *rest = name.split('-')
    if kind == 'wrn':
        return ['--depth', rest[0], '--width', rest[1]]
    plain = ['--no_bn', '--weight_decay', '0', '--randomcrop_pad', '0'] if 'nobn' in rest else []
    return ['--net', 'nin', '--width', '0.4375' if 'thin' in rest else '1', *plain]


def run_name(opt, network, seed, method='', teacher=''):
    """The folder in logs/ of a run: like cifar10-e200-wrn-16-1-at-wrn-16-2-s0."""
    held_out = f'holdout{opt.holdout}' if opt.holdout else ''
    dataset = TABLES[opt.table]['dataset'].lower()
    parts = [dataset, held_out, f'e{opt.epochs}', network, method, teacher, f's{seed}']
    return '-'.join(part for part in parts if part)


def names(opt, row, method):
    """The folders in logs/ of a cell of the table, one a seed."""
    student, teacher = row
    parts = {'teacher': (teacher, '', ''), 'student': (student, '', '')}
    network, method, teacher = parts.get(method, (student, method, '' if method in UNTAUGHT else teacher))
    return [run_name(opt, network, seed, method, teacher) for seed in range(opt.seeds)]


def commands(opt):
    """The runs of a table, each once and teachers first: {name: arguments of cifar.py}.

    The teacher of seed 0 teaches the students of every seed, so their spread is their own.
    """
    table, runs = TABLES[opt.table], {}
    steps = [round(opt.epochs * part) for part in (0.3, 0.6, 0.8)]
    common = ['--dataset', table['dataset'], '--dataroot', opt.dataroot, '--epochs', str(opt.epochs)]
    common += ['--epoch_step', json.dumps(sorted({s for s in steps if s > 1}), separators=(',', ':')), *table['flags']]
    common += ['--holdout', str(opt.holdout)] if opt.holdout else []
    common += ['--dtype', opt.dtype] if opt.dtype else []
    for row in opt.rows:
        methods = [m for m in opt.methods if m in table['rows'][row]]
        taught = any(method not in UNTAUGHT for method in methods)
        for method in ['teacher'] * ('teacher' in methods or taught) + methods:
            seeds = opt.seeds if method in methods else 1
            for seed, name in enumerate(names(opt, row, method)[:seeds]):
                flags = [*network_flags(row[method == 'teacher']), '--seed', str(seed)]
                flags += [table['beta'] if word == 'BETA' else word for word in METHODS[method]]
                if method not in UNTAUGHT:
                    flags += ['--teacher_id', run_name(opt, row[1], 0)]
                runs.setdefault(name, [*common, *flags, '--save', f'logs/{name}', '--resume', 'auto'])
    teachers = {teacher_of(arguments) for arguments in runs.values()}
    return dict(sorted(runs.items(), key=lambda run: run[0] not in teachers))


def teacher_of(arguments):
    """The run whose network teaches in a run of these arguments of cifar.py, or None."""
    return arguments[arguments.index('--teacher_id') + 1] if '--teacher_id' in arguments else None


def results(name):
    """The log of a run in logs/, one dictionary an epoch; empty where it has not begun.

    Raises ValueError where it is damaged, or no log of cifar.py.
    """
    path = os.path.join('logs', name, 'log.txt')
    records = engine.read_log(path) if os.path.exists(path) else []
    if not all(PROTOCOL <= r.keys() and isinstance(r['test_acc'], float) for r in records):
        raise ValueError(f'{path} is no log of cifar.py')
    return records


def last_epoch(opt, name):
    """The last line of a finished run's log, or None."""
    records = results(name)
    return records[-1] if records and records[-1]['epoch'] == opt.epochs else None


def finished(opt, name):
    """Whether a run is at its end, by its log and by its checkpoint, if there is one: killed between, they differ."""
    path = os.path.join('logs', name, 'model.pt7')
    ended = last_epoch(opt, name)
    return ended and (not os.path.exists(path) or load(path).get('epoch') == opt.epochs)


def epochs_there(opt):
    """The longest schedule in logs/ of which a run of the table is finished, the table's own before any other; or None.

    Raises what `results` raises.
    """
    table, folders = TABLES[opt.table], os.listdir('logs') if os.path.isdir('logs') else []
    there = sorted({int(n) for folder in folders for n in re.findall(r'-e(\d+)-', folder)}, reverse=True)
    cells = [(row, method) for row in opt.rows for method in opt.methods if method in table['rows'][row]]
    for epochs in (table['epochs'], *there):
        scheduled = argparse.Namespace(**{**vars(opt), 'epochs': epochs})
        if any(last_epoch(scheduled, name) for cell in cells for name in names(scheduled, *cell)):
            return epochs
    return None


def draw(opt):
    """The network that the flags of cifar.py name: (f, params)."""
    return engine.draw(NETWORKS[opt.net].network(opt), opt, 10, device())


def device():
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def seconds(opt, left, runs):
    """How long the runs that are left would take here one after the other, from measured steps on random images."""
    measured, total, held = {}, 0, TABLES[opt.table]['images'] - opt.holdout
    for name, arguments in left.items():
        flags = options.parse_cifar('', arguments)
        kind = name.rpartition('-s')[0]
        if kind not in measured:
            images = torch.randn(flags.batch_size, 3, 32, 32, device=device())
            images = images.contiguous(memory_format=torch.channels_last)
            teacher = _untrained(runs[flags.teacher_id]) if flags.teacher_id else None
            measured[kind] = engine.seconds_a_step(flags, *draw(flags), teacher, images)
        total += (opt.epochs - len(results(name))) * math.ceil(held / flags.batch_size) * measured[kind]
    return total


def _untrained(arguments):
    flags = options.parse_cifar('', arguments)
    f, params = draw(flags)
    return partial(f, params=engine.freeze(fold(params), flags.dtype, device()), mode=False)


def run(opt, name, arguments, job):
    """Train a run to its end, where there are GPUs on that of the job's number; returns what is to be said of it.

    Raises ValueError where it cannot begin or fails, and KeyboardInterrupt where it was stopped.
    """
    flags = options.parse_cifar('', arguments)
    changed = changed_settings(flags, results(name))
    if changed:
        raise ValueError(f'logs/{name} holds a run of other settings ({"; ".join(changed)})')
    if finished(opt, name):
        return 'done'
    if flags.teacher_id and not last_epoch(opt, flags.teacher_id):
        raise ValueError(f'its teacher {flags.teacher_id} is not trained')
    here, environment = os.path.dirname(os.path.abspath(__file__)), {**os.environ, 'AT_PARENT': str(os.getpid())}
    command, alone = [sys.executable, os.path.join(here, 'cifar.py'), *arguments], opt.jobs == 1
    if not alone and torch.cuda.is_available():
        command += ['--gpu_id', str(job % torch.cuda.device_count())]
    elif not alone:
        environment.setdefault('OMP_NUM_THREADS', str(max(1, os.cpu_count() // opt.jobs)))
    text = {'encoding': 'utf-8', 'errors': 'replace'}
    pipes = {} if alone else {'stdout': subprocess.DEVNULL, 'stderr': subprocess.PIPE, **text}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        RUNNING.append(process)
        if STOPPED:
            process.terminate()  # `stop` came before this process was among those that it ends
        _, error = process.communicate()
        RUNNING.remove(process)
    if process.returncode in (130, 143, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    if process.returncode:
        reason = (error or '').strip().splitlines()[-1:]
        raise ValueError(': '.join([f'exit status {process.returncode}', *reason]))
    if not last_epoch(opt, name):
        raise ValueError('it was stopped')
    return f'{100 - last_epoch(opt, name)["test_acc"]:.2f}% test error'


def train(opt, runs):
    """Run what is not finished, opt.jobs at a time: in order, but a taught run not before its teacher has ended.

    Returns the names of those that failed. Raises KeyboardInterrupt where a run was stopped.
    """
    title = {name: f'[{number}/{len(runs)}] {name}' for number, name in enumerate(runs, 1)}
    left, jobs, running, failed = list(runs), list(range(opt.jobs)), {}, []
    pool = ThreadPoolExecutor(opt.jobs)
    STOPPED.clear()
    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        while left or running:
            unready = {*left, *(name for name, _ in running.values())}
            ready = [name for name in left if teacher_of(runs[name]) not in unready]
            for name in ready[: len(jobs)]:
                left.remove(name)
                print(title[name], flush=True)
                job = jobs.pop(0)
                running[pool.submit(run, opt, name, runs[name], job)] = name, job
            # A signal that comes just before a wait without a limit would be seen at its end alone.
            for ended in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                name, job = running.pop(ended)
                jobs.append(job)
                try:
                    outcome = ended.result()
                except (OSError, ValueError) as error:
                    failed.append(name)
                    outcome = f'failed: {error}'
                print(f'{title[name]}: {outcome}', flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
        for signum, handler in before.items():
            signal.signal(signum, handler)
    return failed


def stop(signum, _):
    """Ask the runs that train to save and to end: alone they would go on, and hold their folders."""
    STOPPED.append(signum)
    for process in list(RUNNING):
        process.terminate()


# ---------------------------------------------------------------------------------------------------------- the table


def table_lines(opt):
    """The table in Markdown: ours beside the paper's, last epoch's test error; what was not run stays blank."""
    lines = [
        '| student <- teacher | method | our error, % | spread | seeds | paper, % | difference |',
        '|---|---|---|---|---|---|---|',
    ]
    protocols = set()
    for row in opt.rows:
        methods = TABLES[opt.table]['rows'][row]
        for method in (m for m in LABELS if m in opt.methods and m in methods):
            done = [r for r in (last_epoch(opt, name) for name in names(opt, row, method)) if r]
            errors = sorted(100 - r['test_acc'] for r in done)
            protocols |= {protocol(r) for r in done}
            paper = methods[method]
            ours = statistics.median(errors) if errors else None
            cells = [
                f'{row[0]} <- {row[1]}'.upper(),
                LABELS[method],
                'not run' if ours is None else f'{ours:.2f}',
                f'{errors[0]:.2f} to {errors[-1]:.2f}' if len(errors) > 1 else '',
                str(len(errors) or ''),
                '' if paper is None else f'{paper:.2f}',
                '' if ours is None or paper is None else f'{ours - paper:+.2f}',
            ]
            lines.append(f'| {" | ".join(cells)} |')
    return [*lines, '', *(f'{p}.' for p in sorted(protocols))]


def protocol(record):
    """How a run was done, in a line for beside its numbers."""
    whole = {'CIFAR10': 10_000, 'CIFAR100': 10_000}.get(record['dataset'], record['test_images'])
    tested = f'{record["test_images"]:,}' + ('' if record['test_images'] == whole else f' of {whole:,}')
    if record['holdout']:
        tested = f'{record["test_images"]:,} held-out training'
    return (
        f'{record["dataset"]}: trained on {record["train_images"]:,} images for {record["epochs"]} epochs '
        f'(lr {record["lr_decay_ratio"]:g} times at {record["epoch_step"]}), batch {record["batch_size"]}, '
        f'{record["dtype"]}, last epoch, tested on {tested} images; {record["device"]}, torch {record["torch"]}'
    )


def around(path, table):
    """The bytes of a file up to the line <!-- table -->, and from <!-- /table --> on; ValueError without the two."""
    with open(path, 'rb') as file:
        text = file.read()
    begin, end = f'<!-- {table} -->', f'<!-- /{table} -->'
    lines, at = list(re.finditer(begin.encode() + rb'\r?\n', text)), text.find(end.encode())
    if len(lines) != 1 or text.count(end.encode()) != 1 or at < lines[0].start():
        raise ValueError(f'{path} has no lines {begin} and {end} to write between')
    return text[: lines[0].end()], text[at:]


def main():
    """Print the commands, or train what is missing and print the table, as the flags say."""
    opt = parse()
    runs = commands(opt)
    if opt.dry_run:
        left = {name: arguments for name, arguments in runs.items() if not last_epoch(opt, name)}
        print('\n'.join(shlex.join(['python', 'cifar.py', *arguments]) for arguments in left.values()))
        print(f'# {len(left)} runs, about {seconds(opt, left, runs) / 3600:.1f} hours here, one after the other')
        return
    failed = [] if opt.show else train(opt, runs)
    lines = table_lines(opt)
    print('\n'.join(lines))
    if opt.markdown:
        head, rest = around(opt.markdown, opt.table)
        end = b'\r\n' if head.endswith(b'\r\n') else b'\n'
        table = b''.join(line.encode(errors='backslashreplace') + end for line in lines)
        write_whole(opt.markdown, head + table + rest)
    if failed:
        sys.exit(1)


if __name__ == '__main__':
    ending.run(main)
