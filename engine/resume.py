"""Writes and reads the checkpoint from which a run continues exactly where it stopped."""

import contextlib
import math
import os

import torch
import torch.distributed as dist
from torchnet.meter import AverageValueMeter

from engine.log import read_log
from engine.meters import Meters
from engine.runs import changed_settings
from engine.workers import rank, say, world
from formats.networks import check_fit, checkpoint_of, load, restore_
from layers import STATISTICS

SETTING = str | int | float | None  # what a flag can be in a checkpoint


def state_of(params, updates, epochs, progress, data):
    """The checkpoint after `epochs` complete epochs of `data`; progress: that of an interrupted epoch, or None."""
    return {
        'params': {k: v.detach() for k, v in params.items()},
        'optimizer': updates.optimizer.state_dict(),
        'scaler': updates.scaler.state_dict(),
        'epoch': epochs,
        'progress': progress,
        'classes': data.counts['classes'],
        'image_size': data.image.shape[2],
    }


def resume_(opt, params, updates, data):
    """Load the checkpoint of --resume into params and updates; return its epoch and progress.

    The epoch is the number of complete ones; progress is that of an interrupted epoch, or None. Only the first worker
    reads the file and broadcasts it, since other machines may not have it.
    """
    loaded = list(_load_(opt, params, updates, data)) if rank() == 0 else [0, None, {}, {}]
    if world() > 1:
        dist.broadcast_object_list(loaded, 0)
        for value in params.values():
            dist.broadcast(value.detach(), 0)
    epoch, progress, scale, state = loaded
    if state:  # learning rate and weight decay come from the flags
        groups = updates.optimizer.state_dict()['param_groups']
        updates.optimizer.load_state_dict({'state': state, 'param_groups': groups})
    if scale and updates.scaler.is_enabled():
        updates.scaler.load_state_dict(scale)
    if progress and world() > 1:
        restore_(statistics(params), progress['workers'][rank()]['statistics'], opt.resume)
    return epoch, progress


def trained(params):
    return {k: v for k, v in params.items() if v.requires_grad}


def statistics(params):
    return {k: v for k, v in params.items() if k.endswith(STATISTICS)}


def _load_(opt, params, updates, data):
    path = os.path.join(opt.save, 'model.pt7') if opt.resume == 'auto' else checkpoint_of(opt.resume)
    if not path or (opt.resume == 'auto' and not os.path.exists(path)):
        return 0, None, {}, {}
    state = load(path, say)
    optimizer, epoch, progress = (state.get(key) for key in ('optimizer', 'epoch', 'progress'))
    if not isinstance(optimizer, dict) or type(epoch) is not int or not isinstance(progress, dict | None):
        raise ValueError(f'{path} holds only parameters, without optimizer and epoch: it can teach, but not be resumed')
    saved, own = ({k for k in names if k.startswith('adapter.')} for names in (state['params'], params))
    if saved != own:
        raise ValueError(f'{path} has other adapters: go on with the same --transfer, --groups and teacher')
    check_fit({k: v.shape for k, v in params.items()}, state['params'], path)
    inner = _optimizer_state(optimizer, updates.optimizer, list(trained(params)))
    if epoch < 0 or inner is None:
        raise ValueError(f'{path}: its optimizer or epoch does not fit this run')
    scale = state.get('scaler', {})  # empty except for float16, and in older checkpoints
    expected = _types(torch.amp.GradScaler('cpu').state_dict())
    if scale != {} and not (isinstance(scale, dict) and _types(scale) == expected and 0 < scale['scale'] < math.inf):
        raise ValueError(f'{path}: the scale of its float16 losses cannot be read')
    if progress is not None:
        _check_progress(progress, opt, params, path, data)
    restore_(params, state['params'], path)
    place = f'step {progress["steps"]} of epoch {epoch + 1}' if progress else f'epoch {epoch}'
    changed = changed_settings(opt, _records(opt, path, epoch, progress))
    if changed:
        say(f'note: {path} has other settings ({"; ".join(changed)}); the remaining steps use the new ones')
    say(f'resumed from {path} after {place}')
    return epoch, progress, scale, inner


def _records(opt, path, epoch, progress):
    """Records with the settings of a checkpoint, unless they have been compared: see `runs.check_save`."""
    if progress and not epoch:  # no line of the log has them yet
        return [progress['settings']] if 'settings' in progress else []
    folder, name = os.path.split(os.path.realpath(path))
    if name != 'model.pt7' or folder == os.path.realpath(opt.save):
        return []
    with contextlib.suppress(OSError, ValueError):  # the checkpoint is good without its log
        return read_log(os.path.join(folder, 'log.txt'))
    return []


def _optimizer_state(saved, optimizer, names):
    """The `state` of an optimizer's state_dict in a checkpoint, copied to the CPU; None if it does not fit.

    names: those of the trained parameters. Older checkpoints have {name: momentum} instead of SGD's state_dict.
    """
    try:
        if 'param_groups' not in saved:
            if list(saved) != names:
                return None
            saved = {
                'state': {i: {'momentum_buffer': buffer} for i, buffer in enumerate(saved.values())},
                'param_groups': optimizer.param_groups,
            }
        flags, own = (set(groups[0]) for groups in (saved['param_groups'], optimizer.param_groups))
        if flags - own and own - flags:  # another optimizer's; another version of PyTorch only adds some
            return None
        values = dict(enumerate(value for group in optimizer.param_groups for value in group['params']))
        return {i: _entries(state, values[i]) for i, state in saved['state'].items()}
    except (AttributeError, IndexError, KeyError, TypeError):
        return None


def _entries(state, param):
    """A parameter's part of an optimizer's state: tensors of its shape and strides, and the number of steps.

    A fused optimizer pairs values by their places in memory, whatever the strides are. Raises TypeError for anything
    else. A momentum of None, just after a drop of the learning rate, is left out.
    """
    state = {key: value for key, value in state.items() if value is not None}
    for key, value in state.items():
        steps = key == 'step' and (type(value) in (int, float) or torch.is_tensor(value) and value.dim() == 0)
        if not isinstance(key, str) or not (steps or torch.is_tensor(value) and value.shape == param.shape):
            raise TypeError
    tensors = {key: value for key, value in state.items() if torch.is_tensor(value) and value.dim()}
    return {**state, **{key: torch.empty_like(param, device='cpu').copy_(value) for key, value in tensors.items()}}


def _types(values):
    return {k: type(v) for k, v in values.items()}


def _check_progress(progress, opt, params, path, data):
    """Raise ValueError for progress that is damaged, or of other batches or another number of workers."""
    meters, shapes = Meters(torch.device('cpu'), data.topk), {k: v.shape for k, v in statistics(params).items()}
    now = [opt.batch_size, opt.seed, data.counts['train_images'], world()]
    try:
        images = progress.get('train_images', now[2])  # older checkpoints lack it, and the settings
        plain = [value for value in progress.get('settings', {}).values() if not isinstance(value, SETTING)]
        saved = [progress['batch_size'], progress['seed'], images, len(progress['workers'])]
        valid = all(type(v) is int for v in [*saved, progress['steps'], progress['images']]) and progress['steps'] >= 0
        if valid and saved != now:
            flags = '--batch_size {}, --seed {}, {:,} training images and {} workers'.format(*saved)
            raise ValueError(f'{path} was saved in the middle of an epoch with {flags}: go on with the same')
        for mine in progress['workers']:
            meters.restore(progress, mine)
            if world() > 1:
                check_fit(shapes, mine['statistics'], path)
            valid &= type(meters.bad) is type(meters.errors.n) is int and isinstance(meters.seconds, float)
            wrong = meters.errors.sum
            valid &= set(wrong) == set(data.topk) and all(type(n) is int for n in wrong.values())
        fields, values = set(vars(AverageValueMeter())), progress['values']
        valid &= not plain and (not progress['steps'] or 'loss' in values)
        valid &= all(set(v) == fields and all(type(n) is float for n in v.values()) for v in values.values())
    except (AttributeError, KeyError, TypeError):
        valid = False
    if not valid:
        raise ValueError(f'{path}: its position in the epoch cannot be read')
