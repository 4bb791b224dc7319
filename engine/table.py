"""A table of the paper in Markdown, from logs alone: errors, paired differences and the protocols of the runs."""

import html
import os
import re
import statistics

from scipy.special import stdtrit  # comes with scikit-learn; scipy.stats takes half a second to import

from engine.arguments import printable
from engine.log import last_record, read_log
from engine.paper import TABLES, columns, methods_of, names
from formats.read import check_regular

DIFFERENCES = 'difference of errors', 'mean, points', '95 % t-interval, +-', 'pairs of seeds'
# What a log record needs for a table: its keys and their types.
PROTOCOL = {
    **dict.fromkeys('epoch train_images test_images holdout epochs batch_size'.split(), int),
    **dict.fromkeys('test_acc lr_decay_ratio'.split(), float),
    **dict.fromkeys('dataset epoch_step dtype device torch'.split(), str),
}


def results(name):
    """The log of a run in logs/, one dictionary per epoch; empty if it has not started.

    Raises ValueError if it is damaged, or not a log of cifar.py.
    """
    path = os.path.join('logs', name, 'log.txt')
    records = read_log(path) if os.path.exists(path) else []
    if not all(map(is_whole, records)):
        raise ValueError(f'{path} is not a log of cifar.py')
    return records


def is_whole(record):
    """Whether a log's record has what a table needs."""
    found = {key: record.get(key) for key in PROTOCOL}
    numbers = [value for key, value in found.items() if PROTOCOL[key] is not str]
    typed = all(type(found[key]) in ((int, float) if kind is float else (kind,)) for key, kind in PROTOCOL.items())
    return typed and all(abs(number) < 1e300 for number in numbers)  # NaN is not, and a float holds no larger integer


def last_epoch(opt, name):
    """The last record of a finished run's log, or None."""
    records = results(name)
    return last_record(records) if records and records[-1]['epoch'] == opt.epochs else None


def table_lines(opt):
    """The lines of the table: our test errors of the last epoch beside the paper's, then paired differences.

    Cells that were not run are left out unless opt.all. The difference to the paper is given only for its schedule.
    """
    methods, runs = methods_of(opt.table), finished_runs(opt)
    published = 'published, %' if opt.table == 'crd' else 'paper, %'
    paper = any(error for errors in TABLES[opt.table]['rows'].values() for error in errors.values())
    head = ['student <- teacher', 'method', 'our median error, %', 'spread', 'seeds', *[published] * paper]
    of_paper = paper and opt.epochs == TABLES[opt.table]['epochs'] and not opt.holdout
    lines = [line([*head, 'difference'] if of_paper else head), '|---' * (len(head) + of_paper) + '|']
    for (row, method), done in runs.items():
        if done or opt.all:
            cells = _cells(opt, row, method, methods[method].label, done, of_paper)
            lines.append(line(cells if paper else cells[:-1]))
    ran = sum(map(bool, runs.values()))
    if not ran and not opt.all:
        return [f'logs/ has no finished run of {opt.table} with {opt.epochs} epochs.']
    lines += [] if ran == len(runs) else ['', f'{ran} of {len(runs)} cells were run.']
    lines += differences(runs, {method: methods[method].label for _, method in runs})
    records = [record for done in runs.values() for record in done.values()]
    images = sorted({f'{record["test_images"]:,}' for record in records})
    if len(images) > 1:
        lines += ['', f'Not all of these runs were tested on the same images, but on {" or ".join(images)}.']
    return [*lines, '', *(f'{way}.' for way in protocols(records))]


def finished_runs(opt):
    """The finished runs of a table's cells, in order: {(row, method): {seed: last record of the log}}."""
    runs = {}
    for row in opt.rows:
        for method in columns(opt, row):
            last = {seed: last_epoch(opt, name) for seed, name in enumerate(names(opt, row, method))}
            runs[row, method] = {seed: record for seed, record in last.items() if record}
    return runs


def in_words(opt):
    """What a table of one row shows of its methods, and how surely, in a sentence; '' without two seeds in common."""
    done = {method: seeds for (_, method), seeds in finished_runs(opt).items()}
    labels = {method: known.label for method, known in methods_of(opt.table).items()}
    found = {method: _interval(_errors(seeds), _errors(done.get('student', {}))) for method, seeds in done.items()}
    known = {m: of for m, of in found.items() if of and m not in ('teacher', 'student')}
    signs = {method: (mean + half < 0) - (mean - half > 0) for method, (mean, half, _) in known.items()}
    less, more, unsure = ([labels[method] for method in signs if signs[method] == sign] for sign in (1, -1, 0))
    parts = [f'{" and ".join(less)} err{"s" * (len(less) == 1)} less than the student alone'] * bool(less)
    parts += [f'{" and ".join(more)} err{"s" * (len(more) == 1)} more than the student alone'] * bool(more)
    parts += [f'for {" and ".join(unsure)}, chance may explain the difference to the student alone'] * bool(unsure)
    if not parts:
        return ''
    record = next(iter(done['student'].values()))
    return (
        f'With {len(done["student"])} seeds and {record["test_images"]:,} test images, {"; ".join(parts)} '
        '(by the 95 % intervals above, which are about this one teacher and these images).'
    )


def _errors(done):
    return {seed: 100 - record['test_acc'] for seed, record in done.items()}


def _interval(errors, others):
    """Of paired differences of errors {seed: %}: mean, half the 95 % t-interval, pairs; None for fewer than two."""
    pairs = [errors[seed] - others[seed] for seed in sorted(errors.keys() & others.keys())]
    if len(pairs) < 2:
        return None
    half = float(stdtrit(len(pairs) - 1, 0.975)) * statistics.stdev(pairs) / len(pairs) ** 0.5
    return statistics.mean(pairs), half, len(pairs)


def paired(errors, others):
    """The cells of paired differences of errors {seed: %}, below `DIFFERENCES`; None for fewer than two pairs."""
    found = _interval(errors, others)
    return found and (f'{found[0]:+.2f}', f'{found[1]:.2f}', str(found[2]))


def summary(errors):
    """The cells of errors {seed: %}: their median, their spread and the seeds."""
    known = sorted(errors.values())
    spread = f'{known[0]:.2f} to {known[-1]:.2f}' if len(known) > 1 else ''
    return f'{statistics.median(known):.2f}' if known else 'not run', spread, ', '.join(map(str, errors))


def line(cells):
    """A line of a table in Markdown."""
    return f'| {" | ".join(cells)} |'


def _cells(opt, row, method, label, done, of_paper):
    errors, paper = _errors(done), TABLES[opt.table]['rows'][row].get(method)
    cells = [f'{row[0]} <- {row[1]}'.upper(), label, *summary(errors), '' if paper is None else f'{paper:.2f}']
    known = errors and paper is not None
    return cells + [f'{statistics.median(errors.values()) - paper:+.2f}' if known else ''] * of_paper


def differences(runs, labels):
    """The lines of a table of paired differences of errors: to the student alone and to AT, over common seeds.

    runs: {(row, method): {seed: last record of the log}}. Empty if no two methods have two seeds in common.
    """
    lines = []
    for (row, method), done in runs.items():
        for base in ('student', 'at'):
            others = runs.get((row, base), {}) if method not in ('teacher', 'student', base) else {}
            found = paired(_errors(done), _errors(others))
            if found:
                lines.append(line([f'{row[0]} <- {row[1]}'.upper(), f'{labels[method]} - {labels[base]}', *found]))
    return ['', line(['student <- teacher', *DIFFERENCES]), '|---' * 5 + '|', *lines] if lines else []


def protocols(records):
    """The protocols of runs, one line each; runs that differ only in the number of threads share a line."""
    threads = {}
    for record in records:
        model, _, number = str(record['device']).rpartition(', ')
        known = model and re.fullmatch('[0-9]{1,9} threads', number)
        way = protocol({**record, 'device': model if known else record['device']})
        threads.setdefault(way, set()).update([number.removesuffix(' threads')] if known else [])
    counts = {way: ' or '.join(sorted(numbers, key=int)) for way, numbers in threads.items()}
    return [f'{way}, {n} thread{"s" * (n != "1")}' if (n := counts[way]) else way for way in sorted(threads)]


def protocol(record):
    """The protocol of a run in one line, to print with its numbers."""
    full_size = {'CIFAR10': 10_000, 'CIFAR100': 10_000}.get(record['dataset'], record['test_images'])
    tested = f'{record["test_images"]:,}' + ('' if record['test_images'] == full_size else f' of {full_size:,}')
    if record['holdout']:
        tested = f'{record["test_images"]:,} held-out training'
    way = (
        f'{record["dataset"]}: trained on {record["train_images"]:,} images for {record["epochs"]} epochs '
        f'({_rate(record)} at {record["epoch_step"]}), batch {record["batch_size"]}, '
        f'{record["dtype"]}, last epoch, tested on {tested} images; torch {record["torch"]}, {record["device"]}'
    )
    return plain(way)


def plain(text):
    """A text from a log, which may be hostile, as a part of Markdown."""
    return html.escape(printable(text), quote=False).replace('|', '&#124;')


def _rate(record):
    """The learning rate at the start, if the log has it, and its factor."""
    known = type(record.get('lr')) in (int, float) and abs(record['lr']) < 1e300
    start = f' {record["lr"]:g},' if known else ''
    return f'lr{start} times {record["lr_decay_ratio"]:g}'


def around(path, table):
    """A file's bytes up to the line <!-- table -->, and from <!-- /table --> on. Raises ValueError without them."""
    check_regular(path)
    with open(path, 'rb') as file:
        text = file.read()
    begin, end = f'<!-- {table} -->', f'<!-- /{table} -->'
    lines, end_at = list(re.finditer(begin.encode() + rb'\r?\n', text)), text.find(end.encode())
    if len(lines) != 1 or text.count(end.encode()) != 1 or end_at < lines[0].start():
        raise ValueError(f'{path} has no lines {begin} and {end} to write between')
    return text[: lines[0].end()], text[end_at:]
