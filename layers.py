"""Batch norm and convolutions, also in the forms that torch.compile, narrow networks and several workers need."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

STATISTICS = ('running_mean', 'running_var')
_synchronised = False


def synchronise(on):
    """Make batch norm in training use the statistics of all workers' batches, or, if not `on`, of its own worker's."""
    global _synchronised
    _synchronised = on


def keep_strides():
    """To be called before torch.compile: if Dynamo traced these functions, it would make the gradients of x contiguous.

    It is not a decorator since that imports Dynamo, which takes longer than all else that a script imports after torch.
    """
    torch.compiler.allow_in_graph([_normalize_batch, strided_conv])


def full(x):
    """x in the precision that losses are computed in: float32, or float64 where that is its dtype."""
    return x if x.dtype == torch.float64 else x.float()


def batch_norm(x, params, base, mode):
    """Batch norm of x (N, C, H, W) with the parameters under `base`.

    mode False normalises with the running statistics; True with those of the batch, or of the batches of all workers
    after `synchronise`, and updates the running ones.
    """
    names = ('running_mean', 'running_var', 'weight', 'bias')
    mean, var, weight, bias = (params[f'{base}.{name}'] for name in names)
    if mode and _synchronised:
        return _sync_batch_norm(x, mean, var, weight, bias)
    if mode and x.device.type == 'cpu' and torch.compiler.is_compiling():
        return compiled_batch_norm(x, mean, var, weight, bias)
    return F.batch_norm(x, mean, var, weight, bias, training=mode)


def compiled_batch_norm(x, running_mean, running_var, weight, bias, momentum=0.1, eps=1e-5):
    """F.batch_norm in training, written so that torch.compile turns it into few and short passes on a CPU."""
    n = x.numel() // x.shape[1]
    if n == 1:
        raise ValueError(f'batch norm of {tuple(x.shape)}: a single value of a channel has no variance')
    y, mean, var = _normalize_batch(x, weight, bias, eps)
    with torch.no_grad():
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * n / (n - 1), momentum)
    return y


def _normalize_batch(x, weight, bias, eps):
    return _BatchNorm.apply(x, weight, bias, eps)


class _BatchNorm(torch.autograd.Function):
    """Batch norm of x (N, C, H, W) with the statistics of the batch: (y, mean (C,), biased variance (C,)).

    Sums over positions come before those over samples: they are short, and the compiler keeps them in registers.
    Values per channel are `_stored`. Not differentiable twice.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        x32 = full(x)
        mean = _channel_mean(x32)
        var = _channel_mean((x32 - mean.view(-1, 1, 1)).square())
        inverse = (var + eps).rsqrt()
        scale = _stored(weight * inverse)
        shift = _stored(bias - mean * scale)
        ctx.save_for_backward(x, mean, inverse, scale)
        ctx.mark_non_differentiable(mean, var)
        return (x32 * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(x.dtype), mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, *_):
        x, mean, inverse, scale = ctx.saved_tensors
        g32, centred = full(g), full(x) - mean.view(-1, 1, 1)
        g_mean, covariance = _channel_mean(g32), _channel_mean(g32 * centred)
        slope, shift = _stored(scale * covariance * inverse.square()), _stored(scale * g_mean)
        g_x = g32 * scale.view(-1, 1, 1) - centred * slope.view(-1, 1, 1) - shift.view(-1, 1, 1)
        n = x.numel() // x.shape[1]
        return g_x.to(x.dtype), n * covariance * inverse, n * g_mean, None


def _channel_mean(x):
    return x.mean((2, 3)).mean(0)  # (N, C, H, W) -> (C,)


def _stored(x):
    """x itself, in a form that the compiler keeps in memory and does not recompute for each element of a batch."""
    return x.as_strided(x.shape, x.stride())


def conv2d(x, weight, bias=None, stride=1, padding=0):
    """F.conv2d, computed in another way on a CPU where the stride is 2 and oneDNN is slow or wrong.

    1x1 convolutions of fewer than 16 channels get stride 1 and every second position of x, since oneDNN's gradient of
    them writes out of bounds (seen with 8 channels and 56x56 positions, PyTorch 2.14, AVX-512). In bfloat16 with
    torch.compile all 1x1 ones do, and 3x3 ones are `_StridedConv`: oneDNN's gradients gain little from a second thread.
    """
    if stride == 2 and x.device.type == 'cpu' and isinstance(weight, torch.Tensor):  # else a stand-in: see int8
        compiled = x.dtype == torch.bfloat16 and torch.compiler.is_compiling()
        if (weight.shape[2], padding) == (1, 0) and (compiled or weight.shape[1] < 16):
            return F.conv2d(x[:, :, ::2, ::2], weight, bias)
        if compiled and (weight.shape[2], padding, bias) == (3, 1, None):
            return strided_conv(x, weight.to(x.dtype))
    return F.conv2d(x, weight, bias, stride, padding)


def strided_conv(x, weight):
    return _StridedConv.apply(x, weight)


class _StridedConv(torch.autograd.Function):
    """The 3x3 convolution with stride 2 and padding 1 of x (N, C, H, W) by weight (C', C, 3, 3), without a bias.

    The gradient of the weight's middle column is that of a convolution of the even columns of x, the gradient of its
    outer columns that of a convolution of the odd ones, both with stride (2, 1). Not differentiable twice.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, stride=2, padding=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight = ctx.saved_tensors

        def gradients(x, weight, stride, padding, wanted):
            options = (1, 1), False, (0, 0), 1, wanted  # dilation, not transposed, its output padding, groups
            return torch.ops.aten.convolution_backward(g, x, weight, None, stride, padding, *options)

        g_x = gradients(x, weight, (2, 2), (1, 1), (True, False, False))[0]
        even, odd = x[..., ::2], F.pad(x[..., 1::2], (1, x.shape[3] % 2))
        middle, outer = (
            gradients(columns, w, (2, 1), (1, 0), (False, True, False))[1]
            for columns, w in ((even, weight[..., 1:2]), (odd, weight[..., ::2]))
        )
        return g_x, torch.cat((outer[..., :1], middle, outer[..., 1:]), 3)


def _sync_batch_norm(x, running_mean, running_var, weight, bias, momentum=0.1, eps=1e-5):
    x32 = full(x)
    n = _SumOverWorkers.apply(x32.new_full((), x.numel() // x.shape[1]))  # filled on the device, not copied to it
    mean = _SumOverWorkers.apply(x32.sum((0, 2, 3))) / n
    centred = x32 - mean.view(-1, 1, 1)
    var = _SumOverWorkers.apply(centred.square().sum((0, 2, 3))) / n
    with torch.no_grad():
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * n / (n - 1), momentum)
    scale = weight * (var + eps).rsqrt()
    return (centred * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)).to(x.dtype)


class _SumOverWorkers(torch.autograd.Function):
    """The sum of a tensor over all workers, whose gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, g):
        return _SumOverWorkers.apply(g)


def folded_conv(weight, params, bn):
    """A convolution weight (C', C, k, k) with the batch norm `bn` after it folded in: (weight, bias (C',)).

    For evaluation, with the running statistics; computed in float64, returned in the dtype of `weight`.
    """
    gamma, beta, mean, var = (params[f'{bn}.{name}'].double() for name in ('weight', 'bias', *STATISTICS))
    scale = gamma / (var + 1e-5).sqrt()
    folded = weight.double() * scale.view(-1, 1, 1, 1)
    return folded.to(weight.dtype), (beta - mean * scale).to(weight.dtype)
