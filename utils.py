"""The parameters and losses that every network and script of this repository is built from.

Parameters are flat dictionaries of tensors (`conv0`, `group0.block0.bn0.weight`, ...) and networks are functions of
them. The losses of the paper come after them, each short enough to be checked against its equation.
"""

import torch
import torch.nn.functional as F

from layers import STATISTICS, full

DTYPES = {
    'float': torch.float32,
    'float32': torch.float32,
    'double': torch.float64,
    'float64': torch.float64,
    'half': torch.float16,
    'float16': torch.float16,
    'bfloat16': torch.bfloat16,
}


# ---------------------------------------------------------------------------------------------------- parameters


def conv_params(ni, no, k=1):
    """A (no, ni, k, k) convolution weight, Kaiming-normal (He et al. 2015, eq. 10), without a bias."""
    return _kaiming_normal(no, ni, k, k)


def linear_params(ni, no):
    """The (no, ni) Kaiming-normal weight and zero (no,) bias of a linear layer."""
    return {'weight': _kaiming_normal(no, ni), 'bias': torch.zeros(no)}


def _kaiming_normal(*shape):
    x = torch.empty(shape)
    return x if x.is_meta else torch.nn.init.kaiming_normal_(x)  # on meta it would import Dynamo


def bnparams(n):
    """Batch norm over n channels: weight ~ U(0, 1) as the authors draw it, bias 0, running mean 0 and variance 1."""
    return {
        'weight': torch.rand(n),
        'bias': torch.zeros(n),
        'running_mean': torch.zeros(n),
        'running_var': torch.ones(n),
    }


def flatten(params, base=''):
    """Turn nested dictionaries into a flat one with dotted keys, leaving out None."""
    flat = {}
    for key, value in params.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f'{base}{key}.'))
        elif value is not None:
            flat[base + key] = value
    return flat


def cast(params, dtype='float', device=None):
    """A tensor, or every tensor of a dictionary, as a leaf of a dtype (a name in `DTYPES`) on a device.

    What already is of that dtype and there keeps its memory.
    """
    if isinstance(params, dict):
        return {k: cast(v, dtype, device) for k, v in params.items()}
    return params.detach().to(device=device, dtype=DTYPES[dtype])


def set_requires_grad_except_bn_(params):
    """Make every tensor of a flat dictionary trainable in place, except batch norm's running statistics."""
    for key, value in params.items():
        if not key.endswith(STATISTICS):
            value.requires_grad_()


def num_parameters(params):
    """The number of values in a network's flat dictionary, fixed ones too: no running statistics, no adapters."""
    return sum(v.numel() for k, v in without_adapters(params).items() if not k.endswith(STATISTICS))


def adapter_params(groups, teacher_groups, numbers):
    """The 1x1 convolutions of full-activation transfer: {'adapter.0': (C_T, C_S, 1, 1), ...}, where channels differ.

    `numbers` are the indices of the groups, (N, C, H, W) each, that are compared.
    """
    channels = {i: (groups[i].shape[1], teacher_groups[i].shape[1]) for i in numbers}
    return {f'adapter.{i}': conv_params(ni, no) for i, (ni, no) in channels.items() if ni != no}


def adapt(groups, params):
    """Student activations, with the teacher's number of channels where `params` has an adapter for a group."""
    named = ((group, params.get(f'adapter.{i}')) for i, group in enumerate(groups))
    return tuple(group if weight is None else F.conv2d(group, weight) for group, weight in named)


def without_adapters(params):
    """A flat dictionary without the adapters of full-activation transfer, which are no part of the network."""
    return {k: v for k, v in params.items() if not k.startswith('adapter.')}


def print_tensor_dict(params):
    """Print a table of the names, shapes and dtypes of a flat dictionary of tensors."""
    width = max(map(len, params))
    for i, (key, value) in enumerate(params.items()):
        shape = 'x'.join(map(str, value.shape))
        dtype = str(value.dtype).removeprefix('torch.')
        print(f'{i:4d}  {key:{width}s}  {shape:>14s}  {dtype}{"" if value.requires_grad else "  not trained"}')


# -------------------------------------------------------------------------------------------------------- losses


def attention_map(x, p=2, mapping='sum', relative=False):
    """Collapse activations to one map over positions (eq. 1 and section 3.1).

    x is (N, C, H, W); the result is (N, H, W) in at least float32: sum_c |x_c|^p, or max_c |x_c|^p for
    mapping='max'. With `relative` and a p other than 2, |x| is divided by its largest value in each sample, so that no
    power over- or underflows; normalised maps and their gradients stay the same. The gradient of |x|^p for p < 1,
    infinite at zero, is set to zero there. Raises ValueError for another shape or mapping, or p <= 0.
    """
    if x.dim() != 4:
        raise ValueError(f'attention map: expected activations (N, C, H, W), not {tuple(x.shape)}')
    if mapping not in ('sum', 'max') or not p > 0:
        raise ValueError(f"attention map: mapping is 'sum' or 'max' and p > 0, not {mapping!r} and {p}")
    if (p, mapping) == (2, 'sum'):
        return _SumOfSquares.apply(x)
    x = full(x)
    if p == 2:
        x = x.square()
    else:
        x = x.abs()
        if relative:
            largest = x.detach().amax((1, 2, 3), keepdim=True)
            x = x / torch.where(largest >= torch.finfo(x.dtype).tiny, largest, 1)
        x = x.pow(p) if p >= 1 else _root(x, p)
    return x.sum(1) if mapping == 'sum' else x.amax(1)


def _root(x, p):
    """x^p for x >= 0 and p < 1, with a gradient of zero where it would be unbounded."""
    flat = x < 1e-12
    return torch.where(flat, x.detach().pow(p), torch.where(flat, 1, x).pow(p))


class _SumOfSquares(torch.autograd.Function):
    """sum_c x_c^2 in at least float32, (N, C, H, W) -> (N, H, W), keeping only x for the backward.

    Plain autograd would also keep x in float32, and write squares of the whole batch to memory.
    """

    generate_vmap_rule = True  # of torch.func

    @staticmethod
    def forward(x):
        if x.device.type != 'cpu' or torch.compiler.is_compiling():
            return full(x).square().sum(1)
        return torch.cat([full(part).square().sum(1) for part in x.split(32)])  # parts that fit a cache

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (x * (2 * g).unsqueeze(1)).to(x.dtype)


def at(x, p=2, mapping='sum'):
    """The attention map of x, flattened and L2-normalised per sample: (N, H*W).

    x is an activation (N, C, H, W), or its map already, (N, H, W). Raises what `attention_map` raises.
    """
    return F.normalize(_map(x, p, mapping).flatten(1))


def _map(x, p, mapping):
    return full(x) if x.dim() == 3 else attention_map(x, p, mapping, relative=True)


def at_loss(x, y, p=2, mapping='sum', form='code'):
    """The distance of the attention maps of two activations x (N, C, H, W) and y (N, C', H', W'); a scalar.

    y may also be a map from `attention_map`, (N, H', W'), which is all that has to be kept of a teacher.
    form='code' is what the authors' code computes, mean((Q_x - Q_y)^2) over samples and positions. form='paper' is
    eq. 2, 1/2 mean_n ||Q_x - Q_y||_2. Both are to be multiplied by beta; they are not proportional to each other.
    If the maps differ in size, the larger is average-pooled to the smaller before it is normalised. With a single
    position, all normalised maps are equal: the loss is 0 and teaches nothing.
    Raises ValueError for an unknown form or other shapes, and what `attention_map` raises.
    """
    if x.dim() != 4:  # three dimensions would be taken for a map
        raise ValueError(f'attention loss: expected activations (N, C, H, W), not {tuple(x.shape)}')
    x, y = _pooled(_map(x, p, mapping), _map(y, p, mapping))
    q_x, q_y = at(x), at(y)  # (N, H, W) -> (N, H*W)
    if form == 'code':
        return (q_x - q_y).square().mean()
    if form == 'paper':
        return torch.linalg.vector_norm(q_x - q_y, dim=1).mean() / 2
    raise ValueError(f"attention loss: form is 'code' or 'paper', not {form!r}")


def _pooled(x, y):
    """Two batches (N, ..., H, W), average-pooled to the smaller size of the two. Raises ValueError if N differs."""
    if len(x) != len(y):
        raise ValueError(f'{len(x)} samples of the student are not the {len(y)} of the teacher')
    size = [min(a, b) for a, b in zip(x.shape[-2:], y.shape[-2:])]
    return (a if list(a.shape[-2:]) == size else F.adaptive_avg_pool2d(a, size) for a in (x, y))


def _check_equal(x, y, what):
    if x.shape != y.shape:  # a single sample or class would be broadcast
        raise ValueError(f'{what} {tuple(x.shape)} of the student, but {tuple(y.shape)} of the teacher')


def full_activation_loss(x, y):
    """Full-activation transfer (F-ActT, section 4.1): the distance of activations, not of their maps; a scalar.

    The mean squared difference of x and y (N, C, H, W), each L2-normalised per sample, in at least float32. The larger
    is first average-pooled to the size of the smaller. Raises ValueError if N or C differ: see `adapt`.
    """
    if x.shape[1] != y.shape[1]:
        raise ValueError(f'full-activation transfer: {x.shape[1]} channels are not {y.shape[1]}')
    x, y = (F.normalize(a.flatten(1)) for a in _pooled(full(x), full(y)))  # (N, C, H, W) -> (N, C*H*W)
    return (x - y).square().mean()


def input_gradient(logits, images, labels, create_graph=False):
    """Gradient-based attention (eq. 4): the gradient of each sample's cross entropy by its image, (N, 3, H, W).

    `logits` are those of `images`, which require gradients. With `create_graph` the result can be differentiated. Batch
    norm in training mode couples the samples of a batch; then it is the gradient of the batch's sum.
    """
    loss = F.cross_entropy(logits, labels, reduction='sum')
    return torch.autograd.grad(loss, images, create_graph=create_graph)[0]


def gradient_loss(j, teacher_j=0.0):
    """Gradient-based attention transfer (eq. 5): 1/2 mean_n ||J_S - J_T||_2 of two input gradients; a scalar.

    If `teacher_j` is the student's gradient of the mirrored images, mirrored back, it is the symmetry norm (eq. 6); if
    it is zero, the min-l2 penalty of Drucker & LeCun 1992. To be multiplied by beta.
    Raises ValueError if their shapes differ.
    """
    if isinstance(teacher_j, torch.Tensor):
        _check_equal(j, teacher_j, 'input gradients')
    return torch.linalg.vector_norm((j - teacher_j).flatten(1), dim=1).mean() / 2  # (N, 3, H, W) -> (N, 3*H*W)


def kd_loss(y, teacher_y, temperature):
    """Hinton et al. 2015, section 2: T^2 KL(softmax(y_T / T) || softmax(y / T)) of logits (N, classes); a scalar.

    The divergence is summed over classes and averaged over samples, in the dtype of the logits. Raises ValueError if
    shapes differ.
    """
    _check_equal(y, teacher_y, 'logits')
    log_p = F.log_softmax(y / temperature, dim=1)
    log_q = F.log_softmax(teacher_y / temperature, dim=1)
    return F.kl_div(log_p, log_q, reduction='batchmean', log_target=True) * temperature**2


def distillation(y, teacher_y, labels, temperature, alpha):
    """(1 - alpha) * cross entropy + alpha * `kd_loss`, of logits (N, classes) and labels (N,); a scalar."""
    return (1 - alpha) * F.cross_entropy(y, labels) + alpha * kd_loss(y, teacher_y, temperature)
