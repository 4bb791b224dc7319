"""Functional Network-in-Network (Lin et al. 2013) for small images: `f, params = nin(width, num_classes)`.

The paper's pair on CIFAR (tables 1 and 3) is NIN-wide, width 1, and NIN-thin, here width 0.4375 = 14/32. `f` and
`params` are as in `resnet`.
"""

import torch
import torch.nn.functional as F

from layers import batch_norm, folded_conv
from utils import (
    bnparams,
    conv_params,
    flatten,
    linear_params,
    set_requires_grad_except_bn_,
)

CHANNELS = ((6, 5, 3), (6, 6, 6), (6, 6, 6))  # of the convolutions of each block, in units of 32 * width
KERNELS = ((5, 1, 1), (5, 1, 1), (3, 1, 1))


def nin(width, num_classes, no_bn=False):
    """Three blocks of a spatial and two 1x1 convolutions, each with batch norm and ReLU.

    Returns (f, params). f takes images (N, 3, H, W) and gives logits (N, num_classes) and the outputs of the blocks,
    (N, 3u, H, W), (N, 6u, H/2, W/2) and (N, 6u, H/4, W/4), where u is 32 * width rounded down. Width 1 has 192-160-96 |
    192-192-192 | 192-192-192 channels with 1.0 million parameters, width 0.4375 has 0.2 million. With `no_bn` the
    convolutions have biases instead of batch norm. Raises ValueError for a width below 1/32.
    """
    if not 1 / 32 <= width <= 1024:
        raise ValueError(f'--width {width}: a Network-in-Network is 1/32 to 1024 times 192 channels wide')
    unit, ni, params = int(32 * width), 3, {}
    for g in range(3):
        block = {}
        for i in range(3):
            no = unit * CHANNELS[g][i]
            block[f'conv{i}'] = conv_params(ni, no, KERNELS[g][i])
            norm = bnparams(no)
            block |= {f'bias{i}': norm['bias']} if no_bn else {f'bn{i}': norm}
            ni = no
        params[f'group{g}'] = block
    params = flatten({**params, 'fc': linear_params(ni, num_classes)})
    set_requires_grad_except_bn_(params)
    return nin_forward, params


def nin_forward(x, params, mode, base=''):
    """The function of every Network-in-Network, with batch norm where its params have it."""
    x, groups = x.to(params[base + 'fc.weight'].dtype), []
    for g in range(3):
        for i in range(3):
            name = f'{base}group{g}.'
            bias = params.get(f'{name}bias{i}')
            x = F.conv2d(x, params[f'{name}conv{i}'], bias, padding=KERNELS[g][i] // 2)
            if bias is None:
                x = batch_norm(x, params, f'{name}bn{i}', mode)
            x = F.relu(x, inplace=True)
        groups.append(x)
        if g < 2:
            x = (F.max_pool2d, F.avg_pool2d)[g](x, 3, 2, ceil_mode=True)
    x = x.mean((2, 3))  # (N, C, H, W) -> (N, C)
    return F.linear(x, params[base + 'fc.weight'], params[base + 'fc.bias']), tuple(groups)


def fold_nin(params):
    """Fold a Network-in-Network's batch norm into its convolutions, as params of `no_bn`. For evaluation only."""
    if not any('.bn' in key for key in params):
        return params
    folded = {k: v.detach() for k, v in params.items() if '.bn' not in k}
    for conv in [k for k in folded if '.conv' in k]:
        bn, bias = (conv.replace('.conv', name) for name in ('.bn', '.bias'))
        folded[conv], folded[bias] = folded_conv(folded[conv], params, bn)
    return folded


def nin_shape(params):
    """The (width, num_classes, no_bn) of the Network-in-Network that a flat dictionary of parameters belongs to.

    Raises ValueError if they belong to none. Width is exact to 1/32.
    """
    first, fc = params.get('group0.conv0'), params.get('fc.weight')
    if first is None or fc is None or not first.dim() or not fc.dim():
        raise ValueError(f'not a Network-in-Network; its first parameters are {", ".join(list(params)[:3]) or "none"}')
    return first.shape[0] / 192, fc.shape[0], 'group0.bias0' in params


def is_nin(params):
    """Whether a flat dictionary belongs to a Network-in-Network: convolutions in groups, without blocks."""
    return 'group0.conv0' in params


def nin_expected(params):
    """The function, {name: shape} and (None, width) of the Network-in-Network that params should fit."""
    width, num_classes, no_bn = nin_shape(params)
    with torch.device('meta'):  # nothing is allocated, since the file may declare any size
        f, params = nin(width, num_classes, no_bn)
    return f, {k: v.shape for k, v in params.items()}, (None, width)


def describe_nin(params):
    """The network in words, like "NIN-0.4375, 10 classes"."""
    width, num_classes, no_bn = nin_shape(params)
    return f'NIN-{width:g}, {"no batch norm, " if no_bn else ""}{num_classes:,} classes'
