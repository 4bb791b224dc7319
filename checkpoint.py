"""Save, resume, import and export parameters.

    python checkpoint.py slim logs/RUN            # drop what only a resume needs, before publishing a run
    python checkpoint.py info FILE                # what network a file or a run holds
    python checkpoint.py export logs/RUN --to torchvision resnet34.pth

A run is a folder that holds model.pt7; export and info also take a file: a checkpoint of ours or of the authors',
their folded export (.pth, .hkl), a torchvision ResNet's state_dict, or a .safetensors of any of these.
It is read as data and never as code: nothing in it can run, or open another file.
"""

import hashlib
import io
import os
import re

import torch

import formats
import resnet
from engine import arguments, ending
from engine.workers import say
from nin import fold_nin, nin, nin_shape
from utils import STATISTICS, num_trained, without_adapters

# What every network that is read has in its first block, and what stands before its names: module._orig_mod. and so on.
FIRST = re.compile(
    r'(.*\.|)(?:layer1\.0\.conv1\.weight|group0\.block0\.conv[01](?:\.weight)?|group0\.conv0)', re.DOTALL
)
MAX_NETWORKS = 10  # in one file
SUPPORTED = (
    'read are wide ResNets, Networks-in-Network and ResNet-18, 34, 50, 101 and 152; '
    'examples/own_networks.py pairs any two networks'
)


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
        if os.path.lexists(temporary):
            os.unlink(temporary)  # of a killed run, or a link that somebody laid there to be written through
        with open(temporary, 'xb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise not_written(path, error, '; what was there before is whole') from None


def not_written(path, error, more=''):
    """The OSError that says so for the user, with the errno of `error`."""
    told = OSError(f'{path} could not be written: {error.strerror}{more}')
    told.errno = error.errno
    return told


def load(path):
    """Read a checkpoint, ours or one of the authors' (`student.` prefixes, or running statistics apart).

    Returns a dictionary with `params`, flat and without prefix, and whatever else the file holds. Raises OSError
    where there is none and ValueError where the file is not a checkpoint.
    """
    state = formats.read(path)
    if not isinstance(state, dict) or not isinstance(state.get('params'), dict):
        raise ValueError(f'{path} is not a checkpoint: it holds no dictionary of params')
    rest = {k: v for k, v in state.items() if k not in ('params', 'stats')}
    return {**rest, 'params': _flat_params({k: v for k, v in state.items() if k in ('params', 'stats')}, path)}


def load_params(path):
    """Read the flat params, in the names of `resnet`, from a file of any of the kinds that `load_teacher` takes.

    Raises OSError and ValueError as `formats.read` and `formats.download` do, and ValueError where the file holds no
    named tensors.
    """
    if str(path).startswith('torchvision:'):
        return formats.from_torchvision(formats.download(str(path).removeprefix('torchvision:')))
    params = _flat_params(formats.read(path), path)
    try:
        return formats.from_torchvision(params) if any(k.startswith('layer1.') for k in params) else params
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def _flat_params(state, path):
    """The params of the network in what a file holds, in whatever dictionaries and behind whatever prefixes."""
    if not isinstance(state, dict):
        raise ValueError(f'{path} is not a checkpoint: it holds a {type(state).__name__}, not a dictionary')
    params = _unwrapped(state, path)
    for key, value in params.items():
        if not isinstance(key, str) or not key.isprintable() or not _is_plain(value):
            raise ValueError(f'{path} is not a checkpoint: {str(key)[:100]!r} in it is not a named tensor')
    return _without_prefix(params, path)


def _unwrapped(state, path):
    """The innermost dictionary under the names that files hold params under, with the statistics beside it.

    Weights that are averaged over training are taken before plain ones, as timm does, which is said where both are.
    """
    for _ in range(MAX_NETWORKS):  # of a dictionary that holds itself, there is no innermost
        parts = [k for k in formats.PARTS if isinstance(state.get(k), dict)]
        averaged = [k for k in formats.AVERAGED if isinstance(state.get(k), dict) and state[k]]
        if averaged and parts:
            _say_averaged(path, averaged[0], parts[0])
        if not averaged + parts:
            return state
        stats = state.get('stats')
        state = {**state[(averaged + parts)[0]], **(stats if isinstance(stats, dict) else {})}
    raise ValueError(f'{path} is not a checkpoint: it has dictionaries in dictionaries without end')


def _without_prefix(params, path):
    """The network among flat params, by its own names.

    Wrappers put words before them (DataParallel `module.`, torch.compile `_orig_mod.`, Lightning those of the user's
    attributes), and may hold other things beside it: losses, a teacher, an average of the network. Raises ValueError
    where several networks are left.
    """
    found = {match[1] for match in map(FIRST.fullmatch, params) if match}
    if not found:
        return params
    chosen = {p for p in found if 'teacher' not in p} or found
    averaged = {p for p in chosen if re.search(r'(^|[._])ema[._]', p)}
    if averaged and averaged != chosen:
        _say_averaged(path, min(averaged), min(chosen - averaged))
    chosen = sorted(averaged or chosen)
    if len(found) > MAX_NETWORKS or (len(chosen) > 1 and '' not in chosen):
        raise ValueError(
            f'{path} holds several networks ({_some([p[:99] for p in chosen])}): save the state_dict of one of them'
        )
    prefix = chosen[0]
    others = tuple(p for p in found if len(p) > len(prefix) and p.startswith(prefix))
    return {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix) and not k.startswith(others)}


def _say_averaged(path, averaged, plain):
    say(f'note: {path} holds plain weights ({plain[:99]}) and averaged ones ({averaged[:99]}): the averaged are taken')


def _is_plain(value):
    """Whether a value is a tensor on the CPU with a byte in the file for each of its own."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != 'cpu':
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def restore_(params, loaded, path):
    """Copy loaded parameters into a network's, in place; ValueError names what is missing, left over or misshapen."""
    check_fit({k: v.shape for k, v in params.items()}, loaded, path)
    with torch.no_grad():
        for key, value in params.items():
            value.copy_(loaded[key])


def check_fit(shapes, loaded, path):
    """Refuse arrays {name: tensor} of other names or shapes than {name: shape}, or that are no floats."""
    wrong = [f'no {k}' for k in shapes if k not in loaded] + [f'unknown {k}' for k in loaded if k not in shapes]
    for key in shapes:
        if key in loaded and loaded[key].shape != shapes[key]:
            wrong.append(f'{key} is {tuple(loaded[key].shape)}, not {tuple(shapes[key])}')
        elif key in loaded and not loaded[key].is_floating_point():
            wrong.append(f'{key} is {loaded[key].dtype}')
    if wrong:
        raise ValueError(f'{path} does not fit the network: {_some(wrong)}')


def _some(wrong):
    return '; '.join(wrong[:3]) + (f' and {len(wrong) - 3} more' if len(wrong) > 3 else '')


def load_teacher(path, shape=None):
    """Read a trained network whatever its shape: (f, params), as of `resnet`, with params that need no gradient.

    `path` names a checkpoint of ours or of the authors', their folded export, a torchvision ResNet's state_dict, a
    .safetensors or .hkl of any of these, told apart by content, or is `torchvision:resnet34`. Depth, widths and number
    of classes are read from the parameters; `shape` is the (depth, width) that they must have, if any. Params are
    float32. Raises as `load_params` does, and ValueError for parameters of no known network, or that do not fit it or
    are not finite.
    """
    return build(load_params(path), path, shape)


def build(loaded, path, shape=None):
    """The network (f, params) that flat params belong to; `path` is what errors call them. See `load_teacher`."""
    loaded = without_adapters(loaded)
    try:
        if not any(k.startswith('group') for k in loaded):
            first = ', '.join(key[:99] for key in [*loaded][:3]) or 'none'
            raise ValueError(f'no network that is known here; its first parameters are {first}')
        f, shapes, found = _READERS[_kind(loaded)](loaded)
    except ValueError as error:
        raise ValueError(f'{path}: {error}; {SUPPORTED}') from None
    check_fit(shapes, loaded, path)
    if shape is not None and not _has_shape(shape, found):
        raise ValueError(f'{path} is a {_name(found)}, but its log speaks of a {_name((found[0], *shape))}')
    params = {key: loaded[key].detach().to(torch.float32, copy=True).contiguous() for key in shapes}
    wrong = [f'{k} is empty' for k, v in params.items() if not v.numel()]
    wrong += [f'{k} has values that are not finite' for k, v in params.items() if not v.isfinite().all()]
    wrong += [f'{k} is negative' for k, v in params.items() if k.endswith('running_var') and (v < 0).any()]
    if wrong:
        raise ValueError(f'{path}: {_some(wrong)}')
    return f, params


def fold(params):
    """A network's params, as `build` returns them, with batch norm folded where a convolution is before it."""
    folders = {'NIN': fold_nin, 'ResNet': resnet.fold_batch_norm, 'WRN': resnet.fold_wide_resnet}
    return folders[_kind(params)](params)


def _name(kind_depth_width):
    parts = (part for part in kind_depth_width if part is not None)
    return '-'.join(f'{part:g}' if isinstance(part, float) else str(part) for part in parts)


def _has_shape(shape, found):
    """Whether (depth, width) is that of (kind, depth, width), to the channel."""
    kind, depth, width = found
    unit = 32 if kind == 'NIN' else 64
    return shape[0] == depth and isinstance(shape[1], int | float) and 0 <= unit * shape[1] - int(unit * width) < 1


def _kind(params):
    if 'group0.conv0' in params:
        return 'NIN'
    imagenet = 'conv0.weight' in params or 'bn0.weight' in params or any(k.startswith('group3.') for k in params)
    return 'ResNet' if imagenet else 'WRN'


def _wide_resnet(loaded):
    depth, width, num_classes = resnet.wide_resnet_shape(loaded)
    with torch.device('meta'):  # shapes without memory, since those that the file names may be of any size
        f, params = resnet.wide_resnet(depth, width, num_classes)
    return f, {k: v.shape for k, v in params.items()}, ('WRN', depth, width)


def _network_in_network(loaded):
    width, num_classes, no_bn = nin_shape(loaded)
    with torch.device('meta'):
        f, params = nin(width, num_classes, no_bn)
    return f, {k: v.shape for k, v in params.items()}, ('NIN', None, width)


def _imagenet_resnet(loaded):
    """The function, {name: shape} and (kind, depth, width) of the ImageNet ResNet that params should be those of.

    Channels are those of the stem's, each group's and the last layer's first array; everything else follows.
    """
    depth, counts, convs = resnet.imagenet_resnet_shape(loaded)
    folded, shapes = 'conv0.weight' in loaded, {}
    shortcut_norm = any('.bndim.' in k for k in loaded)
    if convs == 3:
        _check_groups(loaded, depth)

    def rows(name):
        value = loaded.get(f'{name}.weight' if folded or name == 'fc' else name)
        return 0 if value is None or not value.dim() else value.shape[0]

    def conv_bn(base, number, ni, no, k=1):
        name, kernel = f'{base}conv{number}', torch.Size((no, ni, k, k))
        if folded:
            name = f'{base}{resnet.FOLDED_NAMES.get(f"conv{number}", f"conv{number}")}'
            shapes.update({f'{name}.weight': kernel, f'{name}.bias': torch.Size((no,))})
        else:
            normed = number != 'dim' or shortcut_norm
            norm = {f'{base}bn{number}.{part}': torch.Size((no,)) for part in formats.NORM} if normed else {}
            shapes.update({name: kernel, **norm})

    ni = rows('conv0')
    conv_bn('', 0, 3, ni, 7)
    for g, count in enumerate(counts):
        inner, no = rows(f'group{g}.block0.conv0'), rows(f'group{g}.block0.conv{convs - 1}')
        for i in range(count):
            base, channels = f'group{g}.block{i}.', (ni, *[inner] * (convs - 1), no)
            for c in range(convs):
                conv_bn(base, c, channels[c], channels[c + 1], 3 if convs == 2 or c == 1 else 1)
            if ni != no or (g and not i):
                conv_bn(base, 'dim', ni, no)
            ni = no
    shapes |= {'fc.weight': torch.Size((rows('fc'), ni)), 'fc.bias': torch.Size((rows('fc'),))}
    return resnet.imagenet_forward, shapes, ('ResNet', depth, rows('group0.block0.conv0') / 64)


def _check_groups(loaded, depth):
    """Refuse a ResNeXt by name: its 3x3 convolutions are of groups of channels."""
    weight = loaded.get('group0.block0.conv1')
    if weight is not None and weight.dim() == 4 and 1 <= weight.shape[1] < weight.shape[0] and weight.shape[2] == 3:
        groups, width = weight.shape[0] // weight.shape[1], weight.shape[1]
        raise ValueError(f'a ResNeXt-{depth} of {groups} groups of {width} channels (resnext{depth}_{groups}x{width}d)')


_READERS = {'NIN': _network_in_network, 'ResNet': _imagenet_resnet, 'WRN': _wide_resnet}


def slim(run):
    """Reduce a run's checkpoint to its parameters; it can still teach, but no longer be resumed."""
    path = os.path.join(run, 'model.pt7')
    state = load(path)
    before = os.path.getsize(path)
    save(path, {'params': without_adapters(state['params']), 'epoch': state.get('epoch')})
    print(f'{path}: {before:,} bytes before, {os.path.getsize(path):,} now')


def checkpoint_of(run):
    """The checkpoint that a run's folder holds, or the file itself where a file is named."""
    return os.path.join(run, 'model.pt7') if os.path.isdir(run) else run


def export(run, to, out, image_size=None, overwrite=False):
    """Write the network of a run or file, whole or not at all, in one of the formats of `formats.write`.

    Raises ValueError where `out` exists already, unless `overwrite` is set.
    """
    if os.path.exists(out) and not overwrite:
        raise ValueError(f'{out} exists already; --overwrite replaces it')
    f, params = load_teacher(checkpoint_of(run))
    content = formats.write(f, params, to, image_size)
    write_whole(out, content)
    print(f'{out}: {describe(params)} for {to}, {len(content):,} bytes')


def describe(params):
    """What network params are those of, in words; they are as `build` returns them."""
    classes = f'{len(params["fc.bias"]):,} classes'
    kind = _kind(params)
    if kind == 'NIN':
        width, _, no_bn = nin_shape(params)
        return f'NIN-{width:g}, {"no batch norm, " if no_bn else ""}{classes}'
    if kind == 'WRN':
        depth, width, _ = resnet.wide_resnet_shape(params)
        return f'WRN-{depth}-{width:g}, {classes}'
    depth, counts, convs = resnet.imagenet_resnet_shape(params)
    folded = 'conv0.weight' in params

    def channels(group, conv):
        return len(params[f'group{group}.block0.conv{conv}' + ('.weight' if folded else '')])

    # torchvision's wide_resnet50_2 has twice the inner channels of a ResNet-50.
    wide = 4 * channels(0, 0) / channels(0, 2) if convs == 3 else 1
    parts = [f'ResNet-{depth}' if wide == 1 else f'Wide ResNet-{depth}-{wide:g}']
    if counts != resnet.IMAGENET_DEPTHS[depth][0]:
        parts.append(f'{"-".join(map(str, counts))} blocks')
    if folded:
        parts.append('folded batch norm')
    elif not any('.bndim.' in key for key in params):
        parts.append('shortcuts without batch norm')
    return ', '.join([*parts, classes, f'widths {"/".join(str(channels(g, convs - 1)) for g in range(4))}'])


def info(run):
    """Print what network a run or a file holds, its size and its SHA-256."""
    path = checkpoint_of(run)
    loaded = load_params(path)
    _, params = build(loaded, path)
    statistics = sum(v.numel() for k, v in params.items() if k.endswith(STATISTICS))
    dtypes = ', '.join(sorted({str(v.dtype).removeprefix('torch.') for v in loaded.values()}))
    print(f'{path}: {describe(params)}')
    print(f'{num_trained(params):,} parameters and {statistics:,} running statistics, {dtypes}')
    if os.path.isfile(path):
        with open(path, 'rb') as file:
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
        print(f'{os.path.getsize(path):,} bytes, SHA-256 {digest}')


def main():
    """Do what the command line asks of a file: slim, info or export."""
    parser = arguments.Parser(__doc__)
    commands = parser.add_subparsers(
        dest='command', required=True, metavar='COMMAND', parser_class=arguments.subcommand
    )
    command = commands.add_parser('slim', help="reduce a run's checkpoint to its parameters")
    command.add_argument('run', type=arguments.path, help='a folder that holds model.pt7')
    command = commands.add_parser('info', help='say what network a file or a run holds')
    command.add_argument('run', type=arguments.path, metavar='FILE', help='a file, or a folder that holds model.pt7')
    command = commands.add_parser('export', help='write the network in another format')
    command.add_argument('run', type=arguments.path, metavar='RUN', help='a folder that holds model.pt7, or a file')
    command.add_argument('out', type=arguments.path, metavar='OUT', help='the file to write')
    command.add_argument('--to', required=True, choices=list(formats.WRITERS))
    image_size = arguments.number(int, 1, 4096)
    command.add_argument('--image_size', type=image_size, help='for onnx: height and width (default: 224, CIFAR 32)')
    command.add_argument('--overwrite', action='store_true', help='replace OUT where it exists')
    opt = parser.parse_args()
    if opt.command == 'export':
        export(opt.run, opt.to, opt.out, opt.image_size, opt.overwrite)
    else:
        {'slim': slim, 'info': info}[opt.command](opt.run)


if __name__ == '__main__':
    ending.run(main)
