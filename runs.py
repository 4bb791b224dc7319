"""A run's folder: its log, and who may write to it."""

import contextlib
import difflib
import fcntl
import json
import math
import os
import subprocess

import launch
from formats.torchvision import check_name
from formats.write import not_written, write_whole
from schedules import lr_at
from workers import rank, say

MAX_NAMES = 10_000  # in a folder that is searched for what was meant
MAX_LOG = 2**28  # characters; an epoch takes 2,000
NOT_SETTINGS = set(
    'save resume overwrite save_every nthread gpu_id dataroot imagenetpath follow_links max_restarts'.split()
)


def read_log(path):
    """Read a log, ours or the authors': one dictionary an epoch. A last line that was cut short is left out.

    Raises OSError where there is no such file and ValueError where another line cannot be read.
    """
    with open(path, encoding='utf-8', errors='replace') as file:
        text = file.read(MAX_LOG + 1)
    if len(text) > MAX_LOG:
        raise ValueError(f'{path} has more than {MAX_LOG:,} characters: it is no log')
    if text.startswith('\ufffd\ufffd'):  # FE FF or FF FE, which are no UTF-8
        raise ValueError(f'{path} is a text in UTF-16: save it in UTF-8')
    lines = [line.lstrip('\ufeff') for line in text.splitlines()]  # without byte order marks
    records = []
    for number, line in enumerate(lines, 1):
        if not line.startswith('json_stats'):
            continue
        try:
            record = json.loads(line[line.index(':') + 1 :])
            if not isinstance(record, dict):
                raise ValueError
            records.append(record)
        except (ValueError, RecursionError):
            if number < len(lines):
                raise ValueError(f'{path}, line {number}: json_stats is not followed by a JSON object') from None
    return records


def line_of(record):
    """A line of a log, strict JSON behind its mark."""

    def plain(value):  # JSON has no infinity: the deviation of one value, for one
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else None
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return 'json_stats: ' + json.dumps({k: plain(v) for k, v in record.items()}, allow_nan=False) + '\n'


def append_line(path, line):
    """Add a line to a log and flush it to the disk; OSError where that fails."""
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
    """The commit of this code, with '-dirty' where tracked files differ from it; None outside a repository."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = 'git describe --always --dirty --abbrev=12'.split()
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, check=True)
        return done.stdout.decode(errors='replace').strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def find(teacher_id):
    """The paths of a run's log and model: of logs/<teacher_id>, or of a run's folder or model.pt7 that it leads to.

    Raises OSError where one of them is missing, and says which run of logs/ has nearly that name.
    """
    names_model = os.path.basename(teacher_id) == 'model.pt7'
    folder = os.path.normpath(os.path.dirname(teacher_id) if names_model else teacher_id)
    places = [folder] if names_model and os.path.isfile(teacher_id) else [os.path.join('logs', folder), folder]
    run = next((place for place in places if os.path.isdir(place)), folder if os.sep in folder else places[0])
    log, model = (os.path.join(run, name) for name in ('log.txt', 'model.pt7'))
    missing = next((path for path in (log, model) if not os.path.isfile(path)), None)
    if missing:
        advice = _nearest(os.path.basename(folder), os.path.dirname(folder) or 'logs')
        if ':' in teacher_id or (os.path.isfile(teacher_id) and not names_model):
            advice = (
                '; a run with its log teaches here, a file teaches in imagenet.py and finetune.py (--teacher_params)'
            )
        raise OSError(f'--teacher_id {teacher_id}: there is no {missing}{advice}')
    return log, model


def _nearest(name, folder):
    """A hint at what a folder holds of nearly the name that is missing; empty where it holds nothing of the kind."""
    with contextlib.suppress(OSError):
        near = difflib.get_close_matches(name, sorted(os.listdir(folder))[:MAX_NAMES])
        if near:
            return f'; {folder} holds {", ".join(near)}'
    return ''


def check_files(opt):
    """Refuse a teacher, pretrained network or checkpoint that is not there, before any data are read.

    Raises OSError, and ValueError for a name that torchvision does not have. The checkpoint to go on from concerns the
    first worker alone, who reads it.
    """
    if getattr(opt, 'teacher_id', ''):
        find(opt.teacher_id)
    resumed = opt.resume if opt.resume != 'auto' and rank() == 0 else ''
    for flag, path in {**vars(opt), 'resume': resumed}.items():
        if flag not in ('teacher_params', 'pretrained', 'resume') or not path or os.path.isfile(path):
            continue
        if path.startswith('torchvision:') and flag != 'resume':
            check_name(path.removeprefix('torchvision:'))
            continue
        runs = (os.path.join(base, path, 'model.pt7') for base in ('', 'logs'))
        model = next((run for run in runs if os.path.isfile(run)), None)
        advice = f'; did you mean {model}?' if model else _nearest(os.path.basename(path), os.path.dirname(path) or '.')
        raise OSError(f'--{flag} {path}: no such checkpoint{advice}')


def check_save(opt):
    """Refuse a --save that holds another run, unless that run is resumed or may be overwritten; nothing is written."""
    if not opt.save:
        say('note: without --save, neither log nor parameters will be kept')
        return
    log, model = (os.path.join(opt.save, name) for name in ('log.txt', 'model.pt7'))
    if os.path.exists(opt.save) and not os.path.isdir(opt.save):
        raise ValueError(f'--save {opt.save} is not a folder')
    if opt.overwrite or not (os.path.exists(log) or os.path.exists(model)):
        return
    changed = changed_settings(opt, read_log(log)) if os.path.exists(log) else []
    settings = f' of other settings ({"; ".join(changed)})' if changed else ''
    if not _resumes_own(opt):
        raise ValueError(
            f'--save {opt.save} holds a run{settings}: continue it with --resume auto, '
            'replace it with --overwrite, or save elsewhere'
        )
    if changed:
        say(f'note: {opt.save} is a run{settings}; the epochs to come use the new ones')


def changed_settings(opt, records):
    """How the flags differ from those that a log's last line holds: ['lr 0.1, not 0.05', ...]."""
    if not records:
        return []
    before = dict(records[-1])
    if before.get('lr') and before.get('lr_decay_ratio'):  # the log has the rate of the epoch, not the flag
        try:
            steps = json.loads(before.get('epoch_step', '[]'))
            lr = before['lr'] / lr_at(before.get('epoch', 1), 1, steps, before['lr_decay_ratio'])
            before['lr'] = float(f'{lr:.12g}')
        except (ArithmeticError, TypeError, ValueError):
            del before['lr']  # a log that no run wrote
    now = {k: v for k, v in vars(opt).items() if k not in NOT_SETTINGS}
    return [f'{k} {before[k]!r:.99}, not {v!r:.99}' for k, v in now.items() if k in before and before[k] != v]


def _resumes_own(opt):
    own = os.path.join(opt.save, 'model.pt7')
    return opt.resume == 'auto' or (opt.resume and os.path.realpath(opt.resume) == os.path.realpath(own))


@contextlib.contextmanager
def locked(opt):
    """Hold the folder --save; ValueError where another process trains into it. The lock ends with its process."""
    if not opt.save or rank():
        yield
        return
    new = not os.path.isdir(opt.save)
    os.makedirs(opt.save, exist_ok=True)
    folder = os.open(opt.save, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f'another process trains into --save {opt.save}') from None
    try:
        yield
    finally:
        os.close(folder)
        if new:
            with contextlib.suppress(OSError):
                os.rmdir(opt.save)  # if nothing came of it


def open_run(opt, done):
    """Make --save ready for what follows after `done` epochs: later lines, broken ones and an old run go."""
    if not opt.save or rank():
        return
    os.makedirs(opt.save, exist_ok=True)
    log, model = (os.path.join(opt.save, name) for name in ('log.txt', 'model.pt7'))
    if opt.overwrite and os.path.exists(model):
        os.unlink(model)
    if os.path.lexists(log):
        epochs = [(_epoch(record), record) for record in ([] if opt.overwrite else read_log(log))]
        last = max((epoch for epoch, _ in epochs), default=0)
        if last > done + 1:  # a run that is killed logs one epoch more than it saves
            raise ValueError(
                f'{log} tells of {last} epochs, but {done} are in the checkpoint: '
                'put the right model.pt7 beside it, or begin anew with --overwrite'
            )
        kept = [record for epoch, record in epochs if epoch <= done]
        write_whole(log, ''.join(map(line_of, kept)).encode())
    launch.note_opened()


def _epoch(record):
    return record['epoch'] if isinstance(record.get('epoch'), int) else 0
