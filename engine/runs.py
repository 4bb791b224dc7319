"""A run's folder: what it holds, and which process may write to it."""

import contextlib
import difflib
import fcntl
import os

from engine import launch
from engine.flags import parse_cifar
from engine.log import cut_log, epoch_of, last_record, read_log
from engine.workers import rank, say
from formats.networks import checkpoint_of
from formats.torchvision import check_name
from formats.write import write_whole

MAX_NAMES = 10_000  # of a folder that are compared with a missing name
NOT_SETTINGS = {
    *'save resume overwrite save_every tensorboard verbose nthread gpu_id max_restarts'.split(),
    *'dataroot imagenetpath follow_links skip_teacher_check'.split(),
}


def find(teacher_id):
    """The paths (log, model) of a run; teacher_id is its name in logs/, its folder, its model.pt7 or its log.txt.

    Raises OSError if one of them is missing; the message suggests similar names.
    """
    names_file = os.path.basename(teacher_id) in ('model.pt7', 'log.txt')
    folder = os.path.normpath(os.path.dirname(teacher_id) if names_file else teacher_id)
    model = os.path.join(folder, 'model.pt7') if names_file and os.path.isfile(teacher_id) else checkpoint_of(folder)
    if model == folder:  # it does not exist
        model = os.path.join(folder if os.sep in folder else os.path.join('logs', folder), 'model.pt7')
    log = os.path.join(os.path.dirname(model), 'log.txt')
    missing = next((path for path in (log, model) if not os.path.isfile(path)), None)
    if missing:
        nearby = os.path.normpath(os.path.join('logs', os.path.dirname(folder)))
        place = nearby if os.path.isdir(nearby) else os.path.dirname(folder)
        alone = '; the run has its log alone, without parameters'
        advice = alone if os.path.isfile(log) else _nearest(os.path.basename(folder), place)
        if ':' in teacher_id or (os.path.isfile(teacher_id) and not names_file):
            advice = (
                '; cifar.py takes a run with its log, a file teaches in imagenet.py and finetune.py (--teacher_params)'
            )
        raise OSError(f'--teacher_id {teacher_id}: there is no {missing}{advice}')
    return log, model


def _nearest(name, folder):
    """A hint with the names in a folder that are similar to a missing one; empty if there are none."""
    with contextlib.suppress(OSError):
        near = difflib.get_close_matches(name, _networks(folder)[:MAX_NAMES])
        if near:
            return f'; {folder} holds {", ".join(near)}'
    return ''


def _networks(folder):
    """The names in a folder that may be of a run or of a network's file."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() or not e.name.endswith(('.py', '.md', '.txt')))


def check_files(opt):
    """Raise OSError for a missing teacher, pretrained network or checkpoint, before any data are read.

    Raises ValueError for a name that torchvision does not have. Only the first worker checks --resume, as only it reads
    that file.
    """
    if getattr(opt, 'teacher_id', ''):
        find(opt.teacher_id)
    resumed = opt.resume if opt.resume != 'auto' and rank() == 0 else ''
    for flag, name in {**vars(opt), 'resume': resumed}.items():
        if flag not in ('teacher_params', 'pretrained', 'resume', 'evaluate'):
            continue
        path = checkpoint_of(name)
        if not path or os.path.isfile(path):
            continue
        if path.startswith('torchvision:') and flag != 'resume':
            check_name(path.removeprefix('torchvision:'))
            continue
        missing = f'there is no {path}' if path != name else 'no such checkpoint'
        folder = os.path.dirname(name)
        nearby = [folder] if os.path.isdir(folder) else [os.path.join('logs', folder), '.']
        advice = filter(None, (_nearest(os.path.basename(name), place) for place in nearby))
        raise OSError(f'--{flag} {name}: {missing}{next(advice, "")}')


def check_save(opt):
    """Raise ValueError if --save holds a run that is neither resumed nor overwritten; nothing is written."""
    if not opt.save:
        if not opt.evaluate:
            say('note: without --save, neither log nor parameters will be kept')
        return
    log, model = (os.path.join(opt.save, name) for name in ('log.txt', 'model.pt7'))
    for flag in ('teacher_id', 'teacher_params', 'pretrained'):
        name = getattr(opt, flag, '')
        if name and os.path.realpath(checkpoint_of(name)) == os.path.realpath(model):
            raise ValueError(f'--{flag} {name} is the run in --save {opt.save}, and would be replaced: save elsewhere')
    parent = os.path.abspath(opt.save)
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        where = '' if parent == os.path.abspath(opt.save) else f': {os.path.relpath(parent)}'
        raise ValueError(f'--save {opt.save}{where} is not a folder')
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f'--save {opt.save}: {os.path.relpath(parent)} cannot be written to')
    if opt.overwrite or not (os.path.exists(log) or os.path.exists(model)):
        return
    changed = changed_settings(opt, read_log(log)) if os.path.exists(log) else []
    settings = f' with other settings ({"; ".join(changed)})' if changed else ''
    if not _resumes_own(opt):
        raise ValueError(
            f'--save {opt.save} holds a run{settings}: continue it with --resume auto, '
            'replace it with --overwrite, or save elsewhere'
        )
    if changed:
        say(f'note: {opt.save} is a run{settings}; the remaining epochs use the new ones')


def changed_settings(opt, records):
    """The differences of the flags from a log's last line: ['lr 0.1, not 0.05', ...]."""
    if not records:
        return []
    logged, now = settings(last_record(records)), settings(vars(opt))
    if 'net' in now:  # of cifar.py: a flag that an older log lacks has its default
        logged = settings(vars(parse_cifar('', []))) | logged
    return [f'{k} {logged[k]!r:.99}, not {v!r:.99}' for k, v in now.items() if k in logged and logged[k] != v]


def settings(record):
    """A log's `last_record` without the flags that do not bear on results; what older logs have is as in newer ones."""
    found = {'control': '', **{key: value for key, value in record.items() if key not in NOT_SETTINGS}}
    if isinstance(found.get('teacher_id'), str):  # in older logs, the protocol was a part of the name
        found['teacher_id'] = found['teacher_id'].replace('/', '-')
    return found


def _resumes_own(opt):
    own = os.path.join(opt.save, 'model.pt7')
    return opt.resume == 'auto' or (opt.resume and os.path.realpath(checkpoint_of(opt.resume)) == os.path.realpath(own))


@contextlib.contextmanager
def locked(folder):
    """Lock a run's folder, if one is named. Raises ValueError if another process trains into it.

    A lock ends with its process.
    """
    if not folder or rank():
        yield
        return
    new = not os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f'another process trains into {folder}') from None
    try:
        yield
    finally:
        os.close(opened)
        if new:
            with contextlib.suppress(OSError):
                os.rmdir(folder)  # if nothing was saved


def open_run(opt, done):
    """Prepare --save for training after `done` epochs: remove later and broken log lines, or with --overwrite a run."""
    if not opt.save or rank():
        return
    os.makedirs(opt.save, exist_ok=True)
    log, model = (os.path.join(opt.save, name) for name in ('log.txt', 'model.pt7'))
    if opt.overwrite and os.path.exists(model):
        os.unlink(model)
    if os.path.lexists(log):
        last = max(map(epoch_of, [] if opt.overwrite else read_log(log)), default=0)
        if last > done + 1:  # a killed run can log one epoch more than it saves
            has = f'the checkpoint has {done}' if done or os.path.exists(model) else 'there is no model.pt7'
            raise ValueError(
                f'{log} has {last} epochs, but {has}: put the right model.pt7 beside it, or start over with --overwrite'
            )
        if opt.overwrite:
            write_whole(log, b'')
        else:
            cut_log(log, done)
    launch.note_opened()
