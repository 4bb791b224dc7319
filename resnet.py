"""Functional residual networks: `f, params = wide_resnet(depth, width, num_classes)`.

`params` is a flat dictionary of tensors and `f(x, params, mode, base='') -> (logits, groups)` a pure function of it,
but for batch norm's running statistics, which it updates when `mode` is True (training).
"""

import torch.nn.functional as F

from utils import batch_norm, bnparams, conv_params, flatten, linear_params, set_requires_grad_except_bn_


def wide_resnet(depth, width, num_classes):
    """The wide ResNet of Zagoruyko & Komodakis 2016 for small images: three groups of (depth - 4) / 6 basic blocks.

    Returns (f, params). f takes images (N, 3, H, W) and gives logits (N, num_classes) and the raw outputs of the
    groups, (N, 16w, H, W), (N, 32w, H/2, W/2) and (N, 64w, H/4, W/4), halves rounded up. `base` is a prefix of the
    keys of `params`. Raises ValueError for a depth that is not 6n + 4 or a width below 1/16.
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

    def block(x, params, base, mode, stride):
        o = F.relu(batch_norm(x, params, base + '.bn0', mode), inplace=True)
        y = F.conv2d(o, params[base + '.conv0'], stride=stride, padding=1)
        y = F.relu(batch_norm(y, params, base + '.bn1', mode), inplace=True)
        y = F.conv2d(y, params[base + '.conv1'], padding=1)
        if base + '.convdim' in params:
            return y + F.conv2d(o, params[base + '.convdim'], stride=stride)
        return y + x

    def group(x, params, base, mode, stride):
        for i in range(blocks):
            x = block(x, params, f'{base}.block{i}', mode, 1 if i else stride)
        return x

    def f(x, params, mode, base=''):
        weight = params[base + 'conv0']
        x = F.conv2d(x.to(weight.dtype), weight, padding=1)
        g0 = group(x, params, base + 'group0', mode, 1)
        g1 = group(g0, params, base + 'group1', mode, 2)
        g2 = group(g1, params, base + 'group2', mode, 2)
        o = F.relu(batch_norm(g2, params, base + 'bn', mode), inplace=True)
        o = o.mean((2, 3))  # (N, C, H, W) -> (N, C)
        return F.linear(o, params[base + 'fc.weight'], params[base + 'fc.bias']), (g0, g1, g2)

    return f, params


def wide_resnet_shape(params):
    """The (depth, width, num_classes) of the wide ResNet that a flat dictionary of parameters belongs to.

    Raises ValueError where they belong to none. Width is exact to 1/64.
    """
    blocks = {key.split('.')[1] for key in params if key.startswith('group0.block')}
    last, fc = params.get('bn.weight'), params.get('fc.weight')
    if not blocks or last is None or fc is None or not last.dim() or not fc.dim():
        raise ValueError(f'no wide ResNet; its first parameters are {", ".join(list(params)[:3]) or "none"}')
    return 6 * len(blocks) + 4, last.shape[0] / 64, fc.shape[0]
