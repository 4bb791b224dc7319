"""The student: its initial parameters, and the pairing of its groups with the teacher's."""

from typing import NamedTuple

import torch

from engine.precision import place
from engine.transfer import chosen, group_numbers, of_groups
from engine.workers import rank, say
from utils import adapt, adapter_params, print_tensor_dict, set_requires_grad_except_bn_, without_adapters


class Network(NamedTuple):
    """A functional network: f(x, params, mode) -> (logits, groups)."""

    f: object
    params: dict[str, torch.Tensor]


def check(opt, build):
    """Raise ValueError for a shape of the network, or a number in --groups, that is impossible; nothing is allocated.

    build: num_classes -> (f, params).
    """
    with torch.device('meta'), torch.no_grad():
        f, params = build(2)
        if opt.groups:
            group_numbers(opt.groups, len(f(torch.empty(2, 3, opt.image_size, opt.image_size), params, False)[1]))


def initialise(build, opt, num_classes, device):
    """The network to train on the device, initialised from --seed; build: num_classes -> (f, params)."""
    torch.manual_seed(opt.seed)
    f, params = build(num_classes)
    params = place(params, opt.dtype, device)
    set_requires_grad_except_bn_(params)
    return Network(f, params)


def pair(opt, student, teacher, image):
    """Pair the groups of student and teacher, print the effect of beta, and return the function to train.

    student: a Network. teacher: x -> (logits, groups), or None. image: (1, 3, H, W). If --transfer adapts and the
    channels of student and teacher differ, the function has adapters, which are added to the student's params. Raises
    ValueError if the groups cannot be paired.
    """
    f, params = student
    transfer, pairs = of_groups(opt), {}
    if transfer:
        with torch.no_grad():
            groups, groups_t = f(image, params, False)[1], teacher(image)[1]
        if len(groups) != len(groups_t):
            raise ValueError(
                f'the student has {len(groups)} groups, the teacher {len(groups_t)}: they cannot be paired'
            )
        pairs = {i: (groups[i], groups_t[i]) for i in group_numbers(opt.groups, len(groups))}
        if transfer.adapts:
            adapters = place(adapter_params(groups, groups_t, list(pairs)), opt.dtype, image.device)
            set_requires_grad_except_bn_(adapters)
            params.update(adapters)
    if opt.cuda_graphs:
        for value in [*params.values(), *getattr(teacher, 'keywords', {}).get('params', {}).values()]:
            torch._dynamo.mark_static_address(value)  # it is only updated in place, so graphs need no copy of it
    if opt.verbose and rank() == 0:
        print_tensor_dict(params)
    if teacher and not (opt.alpha or opt.beta):
        say('note: the teacher teaches nothing: neither --alpha nor --beta is given')
    trained = sum(v.numel() for v in without_adapters(params).values() if v.requires_grad)
    say(f'{trained:,} trained parameters{" besides adapters" if len(without_adapters(params)) < len(params) else ""}')
    _say_weights(opt, pairs, image.shape)
    return _adapted(f) if transfer and transfer.adapts else f


def _say_weights(opt, pairs, image_shape):
    """Print how beta weights each loss; pairs: {group: (student's, teacher's activation)}."""
    transfer = chosen(opt)
    shapes = {i: (y.shape[1], *map(min, zip(x.shape[2:], y.shape[2:]))) for i, (x, y) in pairs.items()}
    if transfer and transfer.at_image:
        shapes = {'': image_shape[1:]}
    for i, shape in shapes.items():
        name, (weight, what) = f'{transfer.term}{i}', transfer.weighs(opt, *shape)
        if weight:
            say(f'{name}: beta {opt.beta:g} weights {what} by {weight:.4g}')
        else:
            say(f'note: {name} compares {what}: it is always 0 and teaches nothing (see --groups)')


def _adapted(f):
    def network(x, params, mode, base=''):
        logits, groups = f(x, params, mode, base)
        return logits, adapt(groups, params)

    return network
