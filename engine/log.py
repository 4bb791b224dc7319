"""A run's log: one line of JSON per epoch after `json_stats:`; the authors' logs can be read too."""

import json
import math
import os
import re
import subprocess

import torch

from engine.schedules import beta_at, lr_at
from engine.workers import world
from formats.read import check_regular
from formats.write import not_written, write_whole

MAX_LOG = 2**26  # characters; an epoch takes 2,000, and the names of its classes


def read_log(path):
    """The records of a log, ours or the authors': one dictionary per epoch, without a truncated last line.

    Raises OSError if there is no such file and ValueError if another line cannot be read.
    """
    return [record for _, record in _lines(path) if record is not None]


def cut_log(path, epochs):
    """Remove the records of later epochs than `epochs`, and a truncated last line; other lines stay."""
    kept = [line for line, record in _lines(path) if record is None or epoch_of(record) <= epochs]
    write_whole(path, ''.join(f'{line}\n' for line in kept).encode())


def epoch_of(record):
    """The epoch of a record; 0 if it names none."""
    return record['epoch'] if isinstance(record.get('epoch'), int) else 0


def _lines(path):
    """The lines of a log with their records, None for lines without one; a truncated last line is left out."""
    check_regular(path)
    with open(path, encoding='utf-8', errors='replace') as file:
        text = file.read(MAX_LOG + 1)
    if len(text) > MAX_LOG:
        raise ValueError(f'{path} has more than {MAX_LOG:,} characters: it is not a log')
    if text.startswith('\ufffd\ufffd'):  # FE FF or FF FE, which are not UTF-8
        raise ValueError(f'{path} is a text in UTF-16: save it in UTF-8')
    lines = [line.lstrip('\ufeff') for line in text.splitlines()]  # without byte order marks
    if lines and not text.endswith('\n') and 'json_stats'.startswith(lines[-1]):
        del lines[-1]
    found = []
    for number, line in enumerate(lines, 1):
        if not line.startswith('json_stats'):
            found.append((line, None))
            continue
        try:
            record = json.loads(line[line.index(':') + 1 :])
            if not isinstance(record, dict):
                raise ValueError
            found.append((line, record))
        except (ValueError, RecursionError):
            if number < len(lines):
                raise ValueError(f'{path}, line {number}: json_stats is not followed by a JSON object') from None
    return found


def last_record(records):
    """The last record of a log, with the rate at the start as `lr`: in older logs, `lr` is that of the epoch."""
    first, last = records[0], dict(records[-1])
    if 'lr_now' not in last and 'lr' in last:
        last['lr_now'] = last.pop('lr')
        last |= {'lr': first['lr']} if first.get('epoch') == 1 and 'lr' in first else {}
    return last


def line_of(record):
    """The log line of a record: `json_stats: ` and strict JSON."""

    def plain(value):  # JSON has no infinity, like the deviation of a single value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else None
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return 'json_stats: ' + json.dumps({k: plain(v) for k, v in record.items()}, allow_nan=False) + '\n'


def append_line(path, line):
    """Append a line to a log and flush it to disk. Raises OSError if that fails."""
    try:
        with open(path, 'a', encoding='utf-8', opener=_open_no_link) as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise not_written(path, error) from None


def _open_no_link(path, flags):
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def commit():
    """The commit of this code, with '-dirty' if tracked files differ from it; None outside a repository."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = 'git describe --always --dirty --abbrev=12'.split()
    try:
        described = subprocess.run(command, cwd=folder, capture_output=True, check=True)
        return described.stdout.decode(errors='replace').strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def results(opt, epoch, meters, trained_for, tested, tested_for):
    """The results of an epoch for its log line; tested: from `evaluate`, times in seconds."""
    values = {name: meter.value() for name, meter in meters.values.items()}
    return {
        'epoch': epoch,
        'train_loss': values['loss'][0],
        'train_acc': _one_or_list(meters.accuracy()),
        'test_loss': tested[0],
        'test_acc': _one_or_list(tested[1]),
        'train_time': trained_for,
        'test_time': tested_for,
        'at_losses': [v for k, v in values.items() if re.fullmatch(r'at\d+', k)],
        **{k: v[0] for k, v in values.items() if k != 'loss'},
        'lr_now': lr_at(epoch, opt.lr, json.loads(opt.epoch_step), opt.lr_decay_ratio),
        'beta_now': beta_at(epoch, opt.epochs, opt.beta, opt.beta_decay),
        'images_per_second': meters.images / trained_for,
    }


def _one_or_list(accuracies):
    return accuracies[0] if len(accuracies) == 1 else accuracies


def environment(device):
    """The PyTorch version, hardware and commit of a run, for its log."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else _processor()
    return {'torch': torch.__version__, 'device': name, 'workers': world(), 'commit': commit()}


def _processor():
    try:
        with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as file:
            model = next((line.split(':')[1].strip() for line in file if line.startswith('model name')), 'CPU')
    except OSError:
        model = 'CPU'
    return f'{model}, {torch.get_num_threads()} threads'
