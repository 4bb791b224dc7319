"""Save, resume and import parameters.

    python checkpoint.py slim logs/RUN            # drop what only a resume needs, before publishing a run

A checkpoint is a dictionary of tensors, numbers and strings that torch.load reads with weights_only=True, so that a
file from a stranger is data and never code.
"""

import io
import os
import warnings

import torch

import options
import resnet


def save(path, state):
    """Write a checkpoint whole or not at all: to a file beside it, flushed to the disk, then renamed over it.

    Raises OSError (no space, no permission) and leaves the checkpoint that was there as it was.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getbuffer())


def write_whole(path, content):
    """Replace a file's content (bytes) so that a reader, or a crash, sees the old or the new, never a part."""
    temporary = f'{path}.tmp'
    try:
        with open(temporary, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise OSError(f'{path} could not be written: {error.strerror}; what was there before is whole') from None


def load(path):
    """Read a checkpoint, ours or one of the authors' (`student.` prefixes, or running statistics apart).

    Returns a dictionary with `params`, flat and without prefix, and whatever else the file holds. Raises OSError
    where there is none and ValueError where the file is not a checkpoint.
    """
    if not os.path.isfile(path):
        raise OSError(f'{path}: no such checkpoint')
    with open(path, 'rb') as file:
        content = io.BytesIO(file.read())
    try:
        with warnings.catch_warnings():  # about unusual pickles; what matters becomes an error
            warnings.simplefilter('ignore')
            state = torch.load(content, map_location='cpu', weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes the reader raise, it is not a checkpoint
        raise ValueError(f'{path} is not a checkpoint, or is damaged ({_first_line(error)})') from None
    if not isinstance(state, dict) or not isinstance(state.get('params'), dict):
        raise ValueError(f'{path} is not a checkpoint: it holds no dictionary of params')
    params = {**state['params'], **(state.pop('stats', None) or {})}
    if any(str(key).startswith('student.') for key in params):
        params = {k.removeprefix('student.'): v for k, v in params.items() if k.startswith('student.')}
    for key, value in params.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f'{path} is not a checkpoint: params[{key!r}] is not a named tensor')
    return {**state, 'params': params}


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0].split('. ')[0][:120]


def restore_(params, loaded, path):
    """Copy loaded parameters into a network's, in place; ValueError names what is missing, left over or misshapen."""
    wrong = [f'no {k}' for k in params if k not in loaded] + [f'unknown {k}' for k in loaded if k not in params]
    for key in params.keys() & loaded.keys():
        if params[key].shape != loaded[key].shape:
            wrong.append(f'{key} is {tuple(loaded[key].shape)}, not {tuple(params[key].shape)}')
        elif not loaded[key].is_floating_point():
            wrong.append(f'{key} is {loaded[key].dtype}')
    if wrong:
        more = f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''
        raise ValueError(f'{path} does not fit the network: {"; ".join(wrong[:3])}{more}')
    with torch.no_grad():
        for key, value in params.items():
            value.copy_(loaded[key])


def load_teacher(path, shape=None):
    """Read a trained network whatever its shape: (f, params), as of `resnet`, with params that need no gradient.

    Depth, width and number of classes are read from the parameters; `shape` is the (depth, width) that they must
    have, if any. Raises as `load` and `restore_` do, and ValueError for parameters of no known network.
    """
    loaded = load(path)['params']
    try:
        depth, width, num_classes = resnet.wide_resnet_shape(loaded)
        f, params = resnet.wide_resnet(depth, width, num_classes)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    restore_(params, loaded, path)
    if shape is not None and tuple(shape) != (depth, width):
        raise ValueError(f'{path} is a WRN-{depth}-{width:g}, but its log speaks of a WRN-{shape[0]}-{shape[1]}')
    for value in params.values():
        value.requires_grad_(False)
    return f, params


def slim(run):
    """Reduce a run's checkpoint to its parameters; it can still teach, but no longer be resumed."""
    path = os.path.join(run, 'model.pt7')
    state = load(path)
    before = os.path.getsize(path)
    save(path, {'params': state['params'], 'epoch': state.get('epoch')})
    print(f'{path}: {before:,} bytes before, {os.path.getsize(path):,} now')


def main():
    parser = options.Parser(__doc__)
    parser.add_argument('action', choices=['slim'])
    parser.add_argument('run', help='a folder that holds model.pt7')
    opt = parser.parse_args()
    slim(opt.run)


if __name__ == '__main__':
    options.run(main)
