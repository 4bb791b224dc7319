"""The table of network families, and a network of any family from a file: (f, params).

A new family of `cifar.py` is a file with its functions, like `nin`, and a line of `NETWORKS`. For large images there is
one family, `imagenet_resnet`, which `imagenet.py`, `finetune.py`, predictions and pictures know by name.
"""

import os
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

import imagenet_resnet as imagenet
import nin
import resnet
from formats.read import read
from formats.torchvision import download, from_torchvision, from_transformers
from formats.unwrap import flat_params, some
from utils import without_adapters

# A name of Hugging Face's ResNets.
TRANSFORMERS = r'resnet\.encoder\.stages\.0\.layers\.0\.layer\.0\.convolution\.weight'


class Family(NamedTuple):
    """What the rest of the code needs from a family of networks."""

    title: str  # before depth and width, as in WRN-16-1
    plural: str  # for --help and error messages
    script: str  # that trains it; --net of cifar.py offers the families of cifar.py
    flags: tuple  # those of --depth, --width and --no_bn that it has
    network: Callable  # flags -> a function num_classes -> (f, params)
    first: str  # a pattern that matches one name of each network, in its first block
    owns: Callable  # flat params -> whether they belong to the family
    expected: Callable  # flat params -> (f, {name: shape}, (depth, width)) of the network they should fit; ValueError
    unit: int  # width is exact to 1 / unit
    fold: Callable  # params -> params with batch norm folded into the convolution before it, where there is one
    describe: Callable  # params -> the network in words


NETWORKS = {
    'wrn': Family(
        title='WRN',
        plural='wide ResNets',
        script='cifar.py',
        flags=('depth', 'width'),
        network=lambda opt: partial(resnet.wide_resnet, opt.depth, opt.width),
        first=r'group0\.block0\.conv[01]',
        owns=resnet.is_wide_resnet,
        expected=resnet.wide_resnet_expected,
        unit=64,
        fold=resnet.fold_wide_resnet,
        describe=resnet.describe_wide_resnet,
    ),
    'nin': Family(
        title='NIN',
        plural='Networks-in-Network',
        script='cifar.py',
        flags=('width', 'no_bn'),
        network=lambda opt: partial(nin.nin, opt.width, no_bn=opt.no_bn),
        first=r'group0\.conv0',
        owns=nin.is_nin,
        expected=nin.nin_expected,
        unit=32,
        fold=nin.fold_nin,
        describe=nin.describe_nin,
    ),
    'resnet': Family(
        title='ResNet',
        plural='ResNet-18, 34, 50, 101 and 152',
        script='imagenet.py',
        flags=('depth', 'width'),
        network=lambda opt: partial(imagenet.imagenet_resnet, opt.depth, opt.width),
        first=rf'layer1\.0\.conv1\.weight|{TRANSFORMERS}|group0\.block0\.conv[01](?:\.weight)?',
        owns=imagenet.is_imagenet_resnet,
        expected=imagenet.imagenet_resnet_expected,
        unit=64,
        fold=imagenet.fold_batch_norm,
        describe=imagenet.describe_imagenet_resnet,
    ),
}


def family_of(params):
    """The family that flat params belong to, or None. The last line of the table is tried first: it is the newest."""
    return next((family for family in reversed(NETWORKS.values()) if family.owns(params)), None)


def supported():
    """The networks that can be read, in words."""
    *others, last = (family.plural for family in NETWORKS.values())
    return f'supported are {", ".join(others)} and {last}; examples/own_networks.py pairs any two networks'


def load(path, note=print):
    """Read a checkpoint, ours or one of the authors' (`student.` prefixes, or separate running statistics).

    Returns a dictionary with `params`, flat and without prefix, and everything else in the file. Raises OSError if
    there is no file and ValueError if it is not a checkpoint. `note` takes a line for the user.
    """
    state = read(path)
    if not isinstance(state, dict) or not isinstance(state.get('params'), dict):
        raise ValueError(f'{path} is not a checkpoint: it holds no dictionary of params')
    weights = {k: v for k, v in state.items() if k in ('params', 'stats')}
    others = {k: v for k, v in state.items() if k not in weights}
    return {**others, 'params': flat_params(weights, path, _first(), note)}


def _first():
    return [family.first for family in NETWORKS.values()]


def load_params(path, note=print):
    """Read flat params, under the names used here, from any file that `load_teacher` takes.

    Raises OSError and ValueError as `read` and `download` do, and ValueError if the file holds no named tensors.
    """
    if str(path).startswith('torchvision:'):
        return from_torchvision(download(str(path).removeprefix('torchvision:')))
    params = flat_params(read(path), path, _first(), note)
    try:
        if any(re.fullmatch(TRANSFORMERS, k) for k in params):
            params = from_transformers(params)
        return from_torchvision(params) if any(k.startswith('layer1.') for k in params) else params
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def load_teacher(path, shape=None, note=print):
    """Read a trained network of any shape: (f, params), as in `resnet`, with params that need no gradient.

    `path` is a checkpoint of ours or of the authors', their folded export, the state_dict of a ResNet of torchvision,
    timm or Hugging Face, a .safetensors or .hkl of any of these, recognised by content, or `torchvision:resnet34`.
    Depth, widths and number of classes are read from the params; `shape` is the (depth, width) that they must have, if
    any. Params are float32.
    Raises as `load_params` does, and ValueError for params that belong to no known network, do not fit it or are not
    finite.
    """
    return build(load_params(path, note), path, shape)


def build(loaded, path, shape=None):
    """The network (f, params) that flat params belong to; errors call them `path`. See `load_teacher`."""
    loaded = without_adapters(loaded)
    try:
        family = family_of(loaded)
        if family is None:
            first = ', '.join(key[:99] for key in [*loaded][:3]) or 'none'
            raise ValueError(f'not a known network; its first parameters are {first}')
        f, shapes, (depth, width) = family.expected(loaded)
    except ValueError as error:
        raise ValueError(f'{path}: {error}; {supported()}') from None
    check_fit(shapes, loaded, path)
    if shape is not None and not _has_shape(shape, depth, width, family.unit):
        actual, logged = (_name(family.title, *numbers) for numbers in ((depth, width), shape))
        raise ValueError(f'{path} is a {actual}, but its log names a {logged}')
    params = {key: loaded[key].detach().to(torch.float32, copy=True).contiguous() for key in shapes}
    wrong = [f'{k} is empty' for k, v in params.items() if not v.numel()]
    wrong += [f'{k} has values that are not finite' for k, v in params.items() if not v.isfinite().all()]
    wrong += [f'{k} is negative' for k, v in params.items() if k.endswith('running_var') and (v < 0).any()]
    if wrong:
        raise ValueError(f'{path}: {some(wrong)}')
    return f, params


def fold(params):
    """Params from `build` with batch norm folded into the convolution before it, where there is one."""
    return family_of(params).fold(params)


def describe(params):
    """The network that params from `build` belong to, in words."""
    return family_of(params).describe(params)


def _name(*title_depth_width):
    parts = (part for part in title_depth_width if part is not None)
    return '-'.join(f'{part:g}' if isinstance(part, float) else str(part) for part in parts)


def _has_shape(shape, depth, width, unit):
    """Whether a shape is (depth, width), up to rounding to whole channels."""
    return shape[0] == depth and isinstance(shape[1], int | float) and 0 <= unit * shape[1] - int(unit * width) < 1


def restore_(params, loaded, path):
    """Copy loaded params into a network's, in place; raises ValueError naming missing, unknown or misshapen ones."""
    check_fit({k: v.shape for k, v in params.items()}, loaded, path)
    with torch.no_grad():
        for key, value in params.items():
            value.copy_(loaded[key])


def check_fit(shapes, loaded, path):
    """Refuse tensors {name: tensor} whose names or shapes differ from {name: shape}, or that are not floats."""
    wrong = [f'no {k}' for k in shapes if k not in loaded] + [f'unknown {k}' for k in loaded if k not in shapes]
    for key in shapes:
        if key in loaded and loaded[key].shape != shapes[key]:
            wrong.append(f'{key} is {tuple(loaded[key].shape)}, not {tuple(shapes[key])}')
        elif key in loaded and not loaded[key].is_floating_point():
            wrong.append(f'{key} is {loaded[key].dtype}')
    if wrong:
        raise ValueError(f'{path} does not fit the network: {some(wrong)}')


def checkpoint_of(run):
    """The path of a run's checkpoint; see `file_of`."""
    return file_of(run, 'model.pt7')


def file_of(run, name):
    """The path of a file of a run, for its folder or its name in logs/; other paths are returned as they are."""
    named = [] if not run or os.path.isfile(run) else [run, os.path.join('logs', run)]
    paths = [os.path.join(folder, name) for folder in named if os.path.isdir(folder)]
    return next(filter(os.path.isfile, paths), paths[0] if paths else run)
