"""Functional wide residual networks: `f, params = wide_resnet(depth, width, num_classes)`.

`params` is a flat dictionary of tensors and `f(x, params, mode, base='') -> (logits, groups)` a pure function of it,
except for batch norm's running statistics, which it updates when `mode` is True (training).
"""

import torch
import torch.nn.functional as F

from layers import batch_norm, conv2d, folded_conv
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
    groups, (N, 16w, H, W), (N, 32w, H/2, W/2) and (N, 64w, H/4, W/4), halves rounded up. It also takes folded
    params (`fold_wide_resnet`). `base` is a prefix of the keys of `params`. Raises ValueError for a depth that is not
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
    if bn + '.weight' in params:  # otherwise it is folded into the convolution before it
        x = batch_norm(x, params, bn, mode)
    return F.relu(x, inplace=True)


def fold_wide_resnet(params):
    """Fold a wide ResNet's batch norm into the convolution before it wherever nothing else uses its output.

    These are `bn1` of each block, and `bn0` of the first block if its shortcut is a convolution; `conv0` gets a bias,
    `bias0`, instead. For evaluation only.
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

    Raises ValueError if they belong to none. Width is exact to 1/64.
    """
    blocks = {key.split('.')[1] for key in params if key.startswith('group0.block')}
    last, fc = params.get('bn.weight'), params.get('fc.weight')
    if not blocks or last is None or fc is None or not last.dim() or not fc.dim():
        raise ValueError(f'not a wide ResNet; its first parameters are {", ".join(list(params)[:3]) or "none"}')
    return 6 * len(blocks) + 4, last.shape[0] / 64, fc.shape[0]


def is_wide_resnet(params):
    """Whether a flat dictionary has groups, like a wide ResNet's; the other families are tried first."""
    return any(k.startswith('group') for k in params)


def wide_resnet_expected(params):
    """The function, {name: shape} and (depth, width) of the wide ResNet that params should fit."""
    depth, width, num_classes = wide_resnet_shape(params)
    with torch.device('meta'):  # nothing is allocated, since the file may declare any size
        f, params = wide_resnet(depth, width, num_classes)
    return f, {k: v.shape for k, v in params.items()}, (depth, width)


def describe_wide_resnet(params):
    """The network in words, like "WRN-16-1, 10 classes"."""
    depth, width, num_classes = wide_resnet_shape(params)
    return f'WRN-{depth}-{width:g}, {num_classes:,} classes'
