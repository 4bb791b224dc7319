"""Functional ResNets for large images: `f, params = imagenet_resnet(depth, width, num_classes)`.

`f` and `params` are as in `resnet`.
"""

import itertools
import re

import torch
import torch.nn.functional as F

from layers import STATISTICS, batch_norm, conv2d, folded_conv
from utils import (
    bnparams,
    conv_params,
    flatten,
    linear_params,
    set_requires_grad_except_bn_,
)

# Blocks in each of the four groups, and the convolutions of a block: two (basic) or three (bottleneck).
IMAGENET_DEPTHS = {
    18: ((2, 2, 2, 2), 2),
    34: ((3, 4, 6, 3), 2),
    50: ((3, 4, 6, 3), 3),
    101: ((3, 4, 23, 3), 3),
    152: ((3, 8, 36, 3), 3),
}
AUTHORS_34 = (3, 4, 6, 5), 2  # the ResNet-34 of the authors' imagenet.py
NORM = ('weight', 'bias', *STATISTICS)


def imagenet_resnet(depth, width, num_classes):
    """The ResNet of He et al. 2015 for large images, as in fb.resnet.torch and torchvision: 18, 34, 50, 101 or 152.

    Returns (f, params). f takes images (N, 3, H, W) and gives logits (N, num_classes) and the outputs of the four
    groups, (N, 64wk, H/4, W/4) to (N, 512wk, H/32, W/32), halves rounded up; k is 4 for bottlenecks (50 and deeper), 1
    otherwise. It also takes folded params (`fold_batch_norm`). `base` is a prefix of the keys of `params`.
    Raises ValueError for another depth or a width below 1/64.
    """
    if depth not in IMAGENET_DEPTHS:
        raise ValueError(f'--depth {depth}: an ImageNet ResNet has {", ".join(map(str, IMAGENET_DEPTHS))} layers')
    if not 1 / 64 <= width <= 1024:
        raise ValueError(f'--width {width}: an ImageNet ResNet is 1/64 to 1024 times 64 channels wide')
    blocks, convs = IMAGENET_DEPTHS[depth]

    def block_params(ni, inner, no, stride):
        channels = [ni, inner, no] if convs == 2 else [ni, inner, inner, no]
        kernels = [3, 3] if convs == 2 else [1, 3, 1]
        shortcut = ni != no or stride != 1
        params = {f'conv{i}': conv_params(channels[i], channels[i + 1], kernels[i]) for i in range(convs)}
        params |= {f'bn{i}': bnparams(channels[i + 1]) for i in range(convs)}
        return params | {
            'convdim': conv_params(ni, no) if shortcut else None,
            'bndim': bnparams(no) if shortcut else None,
        }

    params, ni = {'conv0': conv_params(3, 64, 7), 'bn0': bnparams(64)}, 64
    for g, count in enumerate(blocks):
        inner = int(64 * 2**g * width)
        no = inner * (1 if convs == 2 else 4)
        stride = 2 if g else 1
        group = {f'block{i}': block_params(no if i else ni, inner, no, 1 if i else stride) for i in range(count)}
        params[f'group{g}'], ni = group, no
    params = flatten({**params, 'fc': linear_params(ni, num_classes)})
    set_requires_grad_except_bn_(params)
    return imagenet_forward, params


def imagenet_forward(x, params, mode, base=''):
    """The function of every ImageNet ResNet, whose blocks and widths are read from its params, folded or not.

    A shortcut may lack batch norm, as in the students of the authors' imagenet.py.
    """
    dtype = params[base + 'fc.weight'].dtype
    x = F.relu(_conv_bn(x.to(dtype), params, base, 'conv0', 'bn0', mode, 2, 3), inplace=True)
    x = F.max_pool2d(x, 3, 2, 1)
    groups = []
    for g in range(4):
        for i in itertools.count():
            block = f'{base}group{g}.block{i}.'
            if block + 'conv0' not in params and block + 'conv0.weight' not in params:
                break
            x = _imagenet_block(x, params, block, mode, 2 if g and not i else 1)
        groups.append(x)
    x = x.mean((2, 3))  # (N, C, H, W) -> (N, C)
    return F.linear(x, params[base + 'fc.weight'], params[base + 'fc.bias']), tuple(groups)


def _imagenet_block(x, params, base, mode, stride):
    bottleneck = base + 'conv2' in params or base + 'conv2.weight' in params
    strides = (1, stride, 1) if bottleneck else (stride, 1)
    y = x
    for i, s in enumerate(strides):
        y = _conv_bn(y, params, base, f'conv{i}', f'bn{i}', mode, s, int(not bottleneck or i == 1))
        if i < len(strides) - 1:
            y = F.relu(y, inplace=True)
    if base + 'convdim' in params or base + 'conv_dim.weight' in params:
        x = _conv_bn(x, params, base, 'convdim', 'bndim', mode, stride, 0)
    return F.relu(y.add_(x), inplace=True)


def _conv_bn(x, params, base, conv, bn, mode, stride, padding):
    if base + conv in params:
        x = conv2d(x, params[base + conv], stride=stride, padding=padding)
        return batch_norm(x, params, base + bn, mode) if f'{base}{bn}.weight' in params else x
    conv = base + FOLDED_NAMES.get(conv, conv)
    return conv2d(x, params[conv + '.weight'], params[conv + '.bias'], stride, padding)


FOLDED_NAMES = {'convdim': 'conv_dim'}  # convolutions that the authors' exports name differently


def fold_batch_norm(params):
    """Fold batch norm into the convolutions of an ImageNet ResNet, in the layout of the authors' exports.

    `conv0` and `bn0.*` become `conv0.weight` and `conv0.bias`, `convdim` and `bndim.*` become `conv_dim.weight` and
    `conv_dim.bias`, zero for a shortcut without batch norm; computed in float64, returned in the dtype of `params`.
    For evaluation only.
    """
    if not any(key.endswith(STATISTICS) for key in params):
        return params  # folded already
    folded = {}
    for key, value in params.items():
        parent, _, name = key.rpartition('.')
        base = parent + '.' if parent else ''
        if name.startswith('conv'):
            conv = base + FOLDED_NAMES.get(name, name)
            bn = f'{base}bn{name.removeprefix("conv")}'
            plain = value, value.new_zeros(len(value))
            normed = f'{bn}.weight' in params
            folded[conv + '.weight'], folded[conv + '.bias'] = folded_conv(value, params, bn) if normed else plain
        elif key.startswith('fc.'):
            folded[key] = value
    return {k: v.detach() for k, v in folded.items()}


def is_imagenet_resnet(params):
    """Whether a flat dictionary belongs to an ImageNet ResNet: four groups of blocks, or a stem with batch norm."""
    if 'group0.conv0' in params or not any(k.startswith('group') for k in params):
        return False
    return 'conv0.weight' in params or 'bn0.weight' in params or any(k.startswith('group3.') for k in params)


def imagenet_resnet_shape(params):
    """The depth of an ImageNet ResNet, its blocks in each group and the convolutions of a block: (34, (3, 4, 6, 3), 2).

    They are read from its flat params, folded or not. Raises ValueError if they are those of neither `IMAGENET_DEPTHS`
    nor `AUTHORS_34`.
    """
    pattern = re.compile(r'group(\d)\.block(\d{1,2})\.conv(\d)(\.weight)?')
    matches = [match.groups() for match in map(pattern.fullmatch, params) if match]
    counts = tuple(len({block for g, block, *_ in matches if g == str(group)}) for group in range(4))
    convs = len({conv for *_, conv, _ in matches})
    for depth, shape in (*IMAGENET_DEPTHS.items(), (34, AUTHORS_34)):
        if shape == (counts, convs):
            return depth, counts, convs
    raise ValueError(f'not an ImageNet ResNet: {counts} blocks of {convs} convolutions in its groups')


def imagenet_resnet_expected(loaded):
    """The function, {name: shape} and (depth, width) of the ImageNet ResNet that params should fit.

    Channels are read from the stem, the first block of each group and the last layer; all other shapes follow.
    Raises ValueError as `imagenet_resnet_shape` does, for a ResNeXt and without a last layer.
    """
    depth, counts, convs = imagenet_resnet_shape(loaded)
    if 'fc.weight' not in loaded:
        raise ValueError('a ResNet whose last layer is not one linear layer named fc')
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
            name = f'{base}{FOLDED_NAMES.get(f"conv{number}", f"conv{number}")}'
            shapes.update({f'{name}.weight': kernel, f'{name}.bias': torch.Size((no,))})
        else:
            normed = number != 'dim' or shortcut_norm
            norm = {f'{base}bn{number}.{part}': torch.Size((no,)) for part in NORM} if normed else {}
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
    return imagenet_forward, shapes, (depth, rows('group0.block0.conv0') / 64)


def _check_groups(loaded, depth):
    """Refuse a ResNeXt by name: its 3x3 convolutions are grouped."""
    weight = loaded.get('group0.block0.conv1')
    if weight is not None and weight.dim() == 4 and 1 <= weight.shape[1] < weight.shape[0] and weight.shape[2] == 3:
        groups, width = weight.shape[0] // weight.shape[1], weight.shape[1]
        raise ValueError(f'a ResNeXt-{depth} of {groups} groups of {width} channels (resnext{depth}_{groups}x{width}d)')


def describe_imagenet_resnet(params):
    """The network in words: its depth, what is unusual about it, its number of classes and its groups' channels."""
    depth, counts, convs = imagenet_resnet_shape(params)
    folded = 'conv0.weight' in params

    def channels(group, conv):
        return len(params[f'group{group}.block0.conv{conv}' + ('.weight' if folded else '')])

    # torchvision's wide_resnet50_2 has twice the inner channels of a ResNet-50.
    wide = 4 * channels(0, 0) / channels(0, 2) if convs == 3 else 1
    parts = [f'ResNet-{depth}' if wide == 1 else f'Wide ResNet-{depth}-{wide:g}']
    if counts != IMAGENET_DEPTHS[depth][0]:
        parts.append(f'{"-".join(map(str, counts))} blocks')
    if folded:
        parts.append('folded batch norm')
    elif not any('.bndim.' in key for key in params):
        parts.append('shortcuts without batch norm')
    parts.append(f'{len(params["fc.bias"]):,} classes')
    return ', '.join([*parts, f'widths {"/".join(str(channels(g, convs - 1)) for g in range(4))}'])
