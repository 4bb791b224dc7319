"""A teacher in 8-bit integers: on CPUs with VNNI its convolutions take little more than half the time of bfloat16.

    python cifar.py --teacher_id resnet_16_2_teacher --beta 1e+3 --dtype bfloat16 --teacher_dtype int8

`quantize` returns objects that replace weights in a network's params. The network's function is unchanged: PyTorch's
functions call the `__torch_function__` of such an object.
"""

import functools
import re

import torch
import torch.nn.functional as F

LEVELS = 255  # the largest uint8


class _Weight:
    """Replaces a weight: F.conv2d(x, weight, ...) becomes weight.conv2d(x, ...), and batch_norm likewise."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), named=None):
        if function is F.conv2d:
            x, weight, *rest = arguments
            return weight.conv2d(x, *rest, **(named or {}))
        if function is F.batch_norm:
            x, mean, var = arguments
            return named['weight'].batch_norm(x, mean, var, named['bias'])
        return NotImplemented


class _Watched(_Weight):
    """A convolution's weight that records the largest input value."""

    def __init__(self, weight):
        self.weight, self.largest = weight, 0.0

    def conv2d(self, x, *rest, **named):
        self.largest = max(self.largest, x.max().item())
        return F.conv2d(x, self.weight, *rest, **named)


class _Int8(_Weight):
    """A (C', C, k, k) weight in int8, with one scale per output channel, for inputs of `step` times 0 to 255.

    The result is float32, or with `step_out` uint8 in steps of that, which includes a ReLU and the next rounding.
    """

    def __init__(self, weight, step, step_out=None):
        weight = weight.float()
        self.scales = weight.abs().amax((1, 2, 3)).clamp(min=1e-12) / 127
        self.weight = (weight / self.scales.view(-1, 1, 1, 1)).round().to(torch.int8)
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)
        self.step, self.out = step, (torch.float32, 1.0) if step_out is None else (torch.uint8, step_out)
        self.packed = None

    def conv2d(self, x, bias=None, stride=1, padding=0):
        shape = [stride] * 2, [padding] * 2, [1] * 2, 1
        if x.dtype != torch.uint8:
            x = _rounded(x, self.step)
        if self.packed is None:
            self.packed = torch.ops.onednn.qconv_prepack(self.weight, self.scales, self.step, 0, *shape, x.shape)
        weight = self.packed, self.scales, self.zeros, None if bias is None else bias.float()
        dtype, step = self.out
        return torch.ops.onednn.qconv2d_pointwise(x, self.step, 0, *weight, *shape, step, 0, dtype, 'none', [], '')


class _Uint8Norm(_Weight):
    """The weight of a batch norm whose result is uint8 in steps of `step`, which includes its ReLU and rounding."""

    def __init__(self, weight, step):
        self.weight, self.step = weight / step, step

    def batch_norm(self, x, mean, var, bias):
        return _to_uint8(F.batch_norm(x, mean, var, self.weight, bias / self.step + 0.5))


class _Rounded(_Weight):
    """The weight of the first convolution where a ReLU and int8 convolutions follow: its result is their input."""

    def __init__(self, weight, step):
        self.weight, self.dtype, self.step = weight, weight.dtype, step

    def conv2d(self, x, *rest, **named):
        return _rounded(F.conv2d(x, self.weight, *rest, **named), self.step)


def _rounded(x, step):
    return _to_uint8(torch.add(torch.tensor(0.5), x.float(), alpha=1 / step))


def _to_uint8(x):
    """x rounded down and clamped to 0 to 255, as uint8; overwrites x."""
    return x.clamp_(0, LEVELS).to(torch.int16).to(torch.uint8)  # PyTorch's direct conversion takes one number at a time


@functools.cache
def exact():
    """Whether this CPU adds int8 products exactly: without VNNI, oneDNN adds pairs in 16 bits, which saturate."""
    if not torch.backends.mkldnn.is_available():
        return False
    result = _Int8(torch.full((16, 16, 3, 3), 127.0), 1.0).conv2d(torch.full((1, 16, 8, 8), LEVELS, dtype=torch.uint8))
    return torch.allclose(result, torch.tensor(16.0 * 9 * 127 * LEVELS))


def quantize(f, params, images):
    """The weights {name: weight} that run all convolutions but the first of a folded network in int8.

    images: (N, 3, H, W), to find the largest input of each convolution; inputs come from a ReLU, so none is negative.
    Logits and groups become float32. Raises ValueError if the logits are not finite.
    """
    convolutions = [k for k, v in params.items() if v.dim() == 4]
    watched = params | {k: _Watched(params[k]) for k in convolutions if params[k].shape[1] > 3}
    with torch.no_grad():
        logits, _ = f(images, watched, False)
    if not logits.isfinite().all():
        raise ValueError('--teacher_dtype int8: the logits of the teacher on training images are not finite')
    steps = {k: max(v.largest, 1e-6) / LEVELS for k, v in watched.items() if isinstance(v, _Watched)}
    # In all of our networks, only a ReLU stands between two convolutions of a block.
    following = {k: re.sub(r'\bconv(\d)', lambda match: f'conv{int(match[1]) + 1}', k) for k in convolutions}
    step_out = {k: steps.get(name) for k, name in following.items() if name != k}
    if 'bias0' in params:  # a wide ResNet whose first batch norm is folded
        step_out['conv0'] = steps.get('group0.block0.conv0')
    weights = {k: _Int8(params[k], step, step_out.get(k)) for k, step in steps.items()}
    weights |= {k: _Rounded(params[k], step_out[k]) for k in convolutions if k not in steps and step_out.get(k)}
    # A batch norm that is not folded, bn0 of a wide ResNet's block, is followed by the block's ReLU and convolutions.
    norms = {k.replace('.conv0', '.bn0') + '.weight': step for k, step in steps.items() if k.endswith('.conv0')}
    return weights | {k: _Uint8Norm(params[k], step) for k, step in norms.items() if k in params}
