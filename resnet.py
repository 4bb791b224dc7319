"""Functional residual networks: `f, params = wide_resnet(depth, width, num_classes)`.

`params` is a flat dictionary of tensors and `f(x, params, mode, base='') -> (logits, groups)` a pure function of it,
but for batch norm's running statistics, which it updates when `mode` is True (training).
"""

import itertools
import re

import torch.nn.functional as F

from layers import STATISTICS, batch_norm, conv2d, folded_conv
from utils import (
    bnparams,
    conv_params,
    flatten,
    linear_params,
    set_requires_grad_except_bn_,
)


def wide_resnet(depth, width, num_classes):
    """The wide ResNet of Zagoruyko & Komodakis 2016 for small images: three groups of (depth - 4) / 6 basic blocks.

    Returns (f, params). f takes images (N, 3, H, W) and gives logits (N, num_classes) and the raw outputs of the
    groups, (N, 16w, H, W), (N, 32w, H/2, W/2) and (N, 64w, H/4, W/4), halves rounded up. It takes folded params
    (`fold_wide_resnet`) too. `base` is a prefix of the keys of `params`. Raises ValueError for a depth that is not
    6n + 4 or a width below 1/16.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f'--depth {depth}: a wide ResNet has 6n + 4 layers: 10, 16, 22, 28, 34, 40, ...')
    if not 1 / 16 <= width <= 1024:
        raise ValueError(f'--width {width}: a wide ResNet is 1/16 to 1024 times 16 channels wide')
    blocks = (depth - 4) // 6
    widths = [int(channels * width) for channels in (16, 32, 64)]

    def block_params(ni, no):
        return {
            'conv0': conv_params(ni, no, 3),
            'conv1': conv_params(no, no, 3),
            'bn0': bnparams(ni),
            'bn1': bnparams(no),
            'convdim': conv_params(ni, no, 1) if ni != no else None,
        }

    def group_params(ni, no):
        return {f'block{i}': block_params(no if i else ni, no) for i in range(blocks)}

    params = flatten(
        {
            'conv0': conv_params(3, 16, 3),
            'group0': group_params(16, widths[0]),
            'group1': group_params(widths[0], widths[1]),
            'group2': group_params(widths[1], widths[2]),
            'bn': bnparams(widths[2]),
            'fc': linear_params(widths[2], num_classes),
        }
    )
    set_requires_grad_except_bn_(params)

    def group(x, params, base, mode, stride):
        for i in range(blocks):
            x = _wide_block(x, params, f'{base}.block{i}', mode, 1 if i else stride)
        return x

    def f(x, params, mode, base=''):
        weight = params[base + 'conv0']
        x = F.conv2d(x.to(weight.dtype), weight, params.get(base + 'bias0'), padding=1)
        g0 = group(x, params, base + 'group0', mode, 1)
        g1 = group(g0, params, base + 'group1', mode, 2)
        g2 = group(g1, params, base + 'group2', mode, 2)
        o = _norm_relu(g2, params, base + 'bn', mode)
        o = o.mean((2, 3))  # (N, C, H, W) -> (N, C)
        return F.linear(o, params[base + 'fc.weight'], params[base + 'fc.bias']), (g0, g1, g2)

    return f, params


def _wide_block(x, params, base, mode, stride):
    o = _norm_relu(x, params, base + '.bn0', mode)
    y = conv2d(o, params[base + '.conv0'], params.get(base + '.bias0'), stride, 1)
    y = _norm_relu(y, params, base + '.bn1', mode)
    y = F.conv2d(y, params[base + '.conv1'], padding=1)
    if base + '.convdim' in params:
        x = conv2d(o, params[base + '.convdim'], stride=stride)
    return y.add_(x)


def _norm_relu(x, params, bn, mode):
    if bn + '.weight' in params:  # or it is folded into the convolution before
        x = batch_norm(x, params, bn, mode)
    return F.relu(x, inplace=True)


def fold_wide_resnet(params):
    """Fold a wide ResNet's batch norm into the convolution before it wherever nothing else sees that one's output.

    These are `bn1` of each block, and `bn0` of the first where its shortcut is a convolution; `conv0` gets a bias,
    `bias0`, in their stead. For evaluation only.
    """
    pairs = {f'{k.removesuffix("conv0")}bn1': k for k in params if k.endswith('.conv0')}
    if 'group0.block0.convdim' in params:
        pairs['group0.block0.bn0'] = 'conv0'
    folded = {k: v.detach() for k, v in params.items() if k.rpartition('.')[0] not in pairs}
    for bn, conv in pairs.items():
        folded[conv], folded[f'{conv.removesuffix("conv0")}bias0'] = folded_conv(folded[conv], params, bn)
    return folded


def wide_resnet_shape(params):
    """The (depth, width, num_classes) of the wide ResNet that a flat dictionary of parameters belongs to.

    Raises ValueError where they belong to none. Width is exact to 1/64.
    """
    blocks = {key.split('.')[1] for key in params if key.startswith('group0.block')}
    last, fc = params.get('bn.weight'), params.get('fc.weight')
    if not blocks or last is None or fc is None or not last.dim() or not fc.dim():
        raise ValueError(f'no wide ResNet; its first parameters are {", ".join(list(params)[:3]) or "none"}')
    return 6 * len(blocks) + 4, last.shape[0] / 64, fc.shape[0]


# ------------------------------------------------------------------------------------------------------- ImageNet

# Blocks in each of the four groups, and the convolutions of a block: two (basic) or three (bottleneck).
IMAGENET_DEPTHS = {
    18: ((2, 2, 2, 2), 2),
    34: ((3, 4, 6, 3), 2),
    50: ((3, 4, 6, 3), 3),
    101: ((3, 4, 23, 3), 3),
    152: ((3, 8, 36, 3), 3),
}
AUTHORS_34 = (3, 4, 6, 5), 2  # the ResNet-34 of the authors' imagenet.py


def imagenet_resnet(depth, width, num_classes):
    """The ResNet of He et al. 2015 for large images, as in fb.resnet.torch and torchvision: 18, 34, 50, 101 or 152.

    Returns (f, params). f takes images (N, 3, H, W) and gives logits (N, num_classes) and the outputs of the four
    groups, (N, 64wk, H/4, W/4) to (N, 512wk, H/32, W/32), halves rounded up; k is 4 for bottlenecks (50 and deeper), 1
    otherwise. It takes folded params too (`fold_batch_norm`). `base` is a prefix of the keys of `params`.
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


FOLDED_NAMES = {'convdim': 'conv_dim'}  # what the authors' exports call a convolution otherwise


def fold_batch_norm(params):
    """Fold batch norm into the convolutions of an ImageNet ResNet, in the layout of the authors' exports.

    `conv0` and `bn0.*` become `conv0.weight` and `conv0.bias`, `convdim` and `bndim.*` become `conv_dim.weight` and
    `conv_dim.bias`, zero for a shortcut without batch norm; computed in float64, returned in the dtype that there was.
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


def imagenet_resnet_depth(params):
    """The depth of the ImageNet ResNet that a flat dictionary belongs to: see `imagenet_resnet_shape`."""
    return imagenet_resnet_shape(params)[0]


def imagenet_resnet_shape(params):
    """The depth of an ImageNet ResNet, its blocks in each group and the convolutions of a block: (34, (3, 4, 6, 3), 2).

    They are read from the flat dictionary that belongs to it, folded or not. Raises ValueError where they are those of
    neither `IMAGENET_DEPTHS` nor `AUTHORS_34`.
    """
    pattern = re.compile(r'group(\d)\.block(\d{1,2})\.conv(\d)(\.weight)?')
    found = [match.groups() for match in map(pattern.fullmatch, params) if match]
    counts = tuple(len({block for g, block, *_ in found if g == str(group)}) for group in range(4))
    convs = len({conv for *_, conv, _ in found})
    for depth, shape in (*IMAGENET_DEPTHS.items(), (34, AUTHORS_34)):
        if shape == (counts, convs):
            return depth, counts, convs
    raise ValueError(f'no ImageNet ResNet: {counts} blocks of {convs} convolutions in its groups')
