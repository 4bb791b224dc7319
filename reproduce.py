"""A table of the paper as a list of runs of cifar.py: train what is missing, then print ours beside the paper's.

    python reproduce.py demo                       # handwritten digits: needs no download, minutes on two cores
    python reproduce.py table1 --dataroot data     # table 1, wide ResNets: 5 seeds of 200 epochs
    python reproduce.py table1 --show              # the table from the logs that are there

A finished run is skipped and a broken one resumed, so the same command goes on after an interruption.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys

import engine
import options

# Median test error in percent on CIFAR-10 over 5 seeds: table 1 of the paper.
TABLE1 = {
    ('wrn-16-1', 'wrn-16-2'): {'student': 8.77, 'at': 7.93, 'kd': 7.41, 'at-kd': 7.51, 'teacher': 6.31},
    ('wrn-16-1', 'wrn-40-1'): {'student': 8.77, 'at': 8.25, 'kd': 8.39, 'at-kd': 8.01, 'teacher': 6.58},
    ('wrn-16-2', 'wrn-40-2'): {'student': 6.31, 'at': 5.85, 'kd': 6.08, 'at-kd': 5.71, 'teacher': 5.23},
}
METHODS = {  # the flags of each method, but for those that name the networks; BETA is the table's
    'teacher': [],
    'student': [],
    'at': ['--beta', 'BETA'],
    'kd': ['--alpha', '0.9'],
    'at-kd': ['--beta', 'BETA', '--beta_decay', 'linear', '--alpha', '0.9'],
}
LABELS = {'teacher': 'teacher', 'student': 'student alone', 'at': 'AT', 'kd': 'KD', 'at-kd': 'AT+KD'}
TABLES = {
    'table1': {'rows': list(TABLE1), 'dataset': 'CIFAR10', 'epochs': 200, 'seeds': 5, 'beta': '1e+3', 'flags': []},
    'demo': {
        'rows': [('wrn-16-1', 'wrn-16-2')],
        'dataset': 'digits',
        'epochs': 10,
        'seeds': 1,
        'beta': '100',  # chosen on held-out training images: in 160 steps, 1e+3 leaves no time to learn the classes
        'flags': ['--batch_size', '64'],
    },
}


def parse():
    parser = options.Parser(__doc__)
    flag = parser.add_argument
    flag('table', choices=list(TABLES))
    flag('--rows', default='', help="numbers of the table's rows from 1, like 1,3 (default: all)")
    flag('--methods', default=','.join(METHODS), help='some of %(default)s (default: all)')
    flag('--seeds', type=options.number(int, 1, 1000), help='number of seeds, from 0 on (default: 5, demo: 1)')
    flag('--epochs', type=options.number(int, 1), help='the schedule scales with it (default: 200, demo: 10)')
    flag('--dataroot', default='.', help='as of cifar.py')
    flag('--holdout', default=0, type=options.number(int, 0), help='as of cifar.py: to choose between variants')
    flag('--dtype', default='', choices=['', *options.DTYPES], help='as of cifar.py')
    flag('--dry_run', action='store_true', help='print the commands that are left to run, and stop')
    flag('--show', action='store_true', help='print the table from the logs that are there, and stop')
    flag('--markdown', default='', metavar='FILE', help='also write the table into FILE, between its markers')
    opt = parser.parse_args()
    table = TABLES[opt.table]
    opt.seeds, opt.epochs = opt.seeds or table['seeds'], opt.epochs or table['epochs']
    opt.methods = opt.methods.split(',')
    if not set(opt.methods) <= set(METHODS):
        raise ValueError(f'--methods {",".join(opt.methods)}: expected some of {",".join(METHODS)}')
    numbers = opt.rows.split(',') if opt.rows else [str(i + 1) for i in range(len(table['rows']))]
    if not set(numbers) <= {str(i + 1) for i in range(len(table['rows']))}:
        raise ValueError(f'--rows {opt.rows}: {opt.table} has rows 1 to {len(table["rows"])}')
    opt.rows = [table['rows'][int(i) - 1] for i in numbers]
    return opt


def run_name(opt, network, seed, method='', teacher=''):
    """The folder in logs/ of a run: like cifar10-e200-wrn-16-1-at-wrn-16-2-s0."""
    held_out = f'holdout{opt.holdout}' if opt.holdout else ''
    dataset = TABLES[opt.table]['dataset'].lower()
    parts = [dataset, held_out, f'e{opt.epochs}', network, method, teacher, f's{seed}']
    return '-'.join(part for part in parts if part)


def names(opt, row, method):
    """The folders in logs/ of a cell of the table, one a seed."""
    student, teacher = row
    network = {'student': (student,), 'teacher': (teacher,)}.get(method)
    seeds = range(opt.seeds)
    return [run_name(opt, *network, s) if network else run_name(opt, student, s, method, teacher) for s in seeds]


def commands(opt):
    """The runs of a table, each once and teachers first: {name: arguments of cifar.py}.

    The teacher of seed 0 teaches the students of every seed, so their spread is their own.
    """
    table, runs = TABLES[opt.table], {}
    steps = [round(opt.epochs * part) for part in (0.3, 0.6, 0.8)]
    common = ['--dataset', table['dataset'], '--dataroot', opt.dataroot, '--epochs', str(opt.epochs)]
    common += ['--epoch_step', json.dumps(sorted({s for s in steps if s}), separators=(',', ':')), *table['flags']]
    common += ['--holdout', str(opt.holdout)] if opt.holdout else []
    common += ['--dtype', opt.dtype] if opt.dtype else []
    transfers = [method for method in opt.methods if method not in ('teacher', 'student')]
    for method in ['teacher'] * ('teacher' in opt.methods or bool(transfers)) + opt.methods:
        for row in opt.rows:
            teachers_needed = opt.seeds if method in opt.methods else 1
            for seed, name in enumerate(names(opt, row, method)[:teachers_needed]):
                network = row[1] if method == 'teacher' else row[0]
                _, depth, width = network.split('-')
                flags = ['--depth', depth, '--width', width, '--seed', str(seed)]
                flags += [table['beta'] if word == 'BETA' else word for word in METHODS[method]]
                if method in transfers:
                    flags += ['--teacher_id', run_name(opt, row[1], 0)]
                runs.setdefault(name, [*common, *flags, '--save', f'logs/{name}', '--resume', 'auto'])
    return runs


def results(name):
    """The log of a run in logs/, one dictionary an epoch; empty where it has not begun."""
    path = os.path.join('logs', name, 'log.txt')
    return engine.read_log(path) if os.path.exists(path) else []


def last_epoch(opt, name):
    """The last line of a finished run's log, or None."""
    records = results(name)
    return records[-1] if records and records[-1]['epoch'] == opt.epochs else None


def table_lines(opt):
    """The table in Markdown: ours beside the paper's, last epoch's test error; what was not run stays blank."""
    lines = [
        '| student <- teacher | method | our error, % | spread | seeds | paper, % | difference |',
        '|---|---|---|---|---|---|---|',
    ]
    protocols = set()
    for row in opt.rows:
        for method in sorted(opt.methods, key=list(LABELS).index):
            done = [r for r in (last_epoch(opt, name) for name in names(opt, row, method)) if r]
            errors = sorted(100 - r['test_acc'] for r in done)
            protocols |= {protocol(r) for r in done}
            paper = TABLE1[row][method] if opt.table == 'table1' else None
            ours = statistics.median(errors) if errors else None
            cells = [
                f'{row[0]} <- {row[1]}'.upper(),
                LABELS[method],
                '' if ours is None else f'{ours:.2f}',
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


def write_markdown(path, table, lines):
    """Replace what stands between <!-- table --> and <!-- /table --> in a file."""
    with open(path) as file:
        text = file.read()
    begin, end = f'<!-- {table} -->\n', f'<!-- /{table} -->'
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f'{path} has no lines {begin.strip()} and {end} to write between')
    head, rest = text.split(begin)
    content = f'{head}{begin}{os.linesep.join(lines)}\n{end}{rest.split(end)[1]}'
    engine.checkpoint.write_whole(path, content.encode())


def train(opt, runs):
    """Run what is not finished, one after the other; returns the names of those that failed."""
    failed = []
    for number, (name, arguments) in enumerate(runs.items(), 1):
        if last_epoch(opt, name):
            print(f'[{number}/{len(runs)}] {name}: done', flush=True)
            continue
        print(f'[{number}/{len(runs)}] {name}', flush=True)
        here = os.path.dirname(os.path.abspath(__file__))
        status = subprocess.run([sys.executable, os.path.join(here, 'cifar.py'), *arguments]).returncode
        if status == 130:
            raise KeyboardInterrupt
        if status:
            failed.append(name)
            print(f'[{number}/{len(runs)}] {name} failed with exit status {status}', flush=True)
    return failed


def main():
    opt = parse()
    runs = commands(opt)
    if opt.dry_run:
        left = [arguments for name, arguments in runs.items() if not last_epoch(opt, name)]
        print('\n'.join(shlex.join(['python', 'cifar.py', *arguments]) for arguments in left))
        return
    failed = [] if opt.show else train(opt, runs)
    lines = table_lines(opt)
    print('\n'.join(lines))
    if opt.markdown:
        write_markdown(opt.markdown, opt.table, lines)
    if failed:
        sys.exit(1)


if __name__ == '__main__':
    options.run(main)
