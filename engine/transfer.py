"""The table of transfer methods and penalties: flags, step, log, printed weights and plots follow its lines.

A new method is a function of two activations and a line of TRANSFERS.
"""

from collections.abc import Callable
from typing import NamedTuple

import utils
from engine.arguments import number


class Transfer(NamedTuple):
    """A transfer method; beta weights the sum of its losses."""

    term: str  # its name in the log; a group's number follows (at0, at1, ...), unless at_image
    title: str  # for --help
    paper: str  # section, equation, table
    label: str  # its name in tables and plots
    loss: Callable  # (the student's activation, what is kept of the teacher's, flags) -> a scalar
    # (flags, the teacher's C, the smaller H and W) -> (weight of a part of the loss, that part in words); 0: no effect
    weighs: Callable
    # (the teacher's activation (N, C, H, W), flags) -> the tensor (N, ...) that stays in memory, of each sample by
    # itself, since an int8 teacher sees parts of a batch
    keep: Callable = lambda x, opt: x
    adapts: bool = False  # whether 1x1 convolutions give the student's groups the teacher's channels
    beta: str = '1'  # its weight in reproduce.py's tables
    beta_decay: str = 'none'  # how its weight falls in these tables
    at_image: bool = False  # whether it compares input gradients (N, 3, H, W) instead of activations
    flags: dict[str, dict] = {}  # its own: {name: arguments of add_argument, including a default}


class Penalty(NamedTuple):
    """A loss of the student's input gradient, without a teacher; gamma weights it."""

    title: str
    paper: str
    label: str
    loss: Callable  # (input gradient j (N, 3, H, W), gradient: images -> their input gradient, images) -> a scalar
    gamma: str = '0.1'  # its weight in reproduce.py's tables


def attention_weight(opt, channels, height, width):
    """The weight from beta for attention maps; 0 for 1x1 maps, which are all equal once normalised."""
    if height == width == 1:
        return 0, '1x1 maps, which are all equal'
    if opt.at_form == 'code':
        return opt.beta / (opt.batch_size * height * width), f'each element of the {height}x{width} maps'
    return opt.beta / (2 * opt.batch_size), f'the distance of two {height}x{width} maps'


def activation_weight(opt, channels, height, width):
    """The weight from beta for whole activations."""
    weight = opt.beta / (opt.batch_size * channels * height * width)
    return weight, f'each element of the {channels}x{height}x{width} activations'


TRANSFERS = {
    'activation': Transfer(
        term='at',
        title='attention maps',
        paper='section 3.1, eq. 2',
        label='AT',
        loss=lambda x, kept, opt: utils.at_loss(x, kept, opt.power, opt.mapping, opt.at_form),
        keep=lambda x, opt: utils.attention_map(x, opt.power, opt.mapping, relative=True),
        weighs=attention_weight,
        flags={
            'at_form': {'default': 'code', 'choices': ['code', 'paper'], 'help': "the authors' code, or eq. 2"},
            'mapping': {'default': 'sum', 'choices': ['sum', 'max'], 'help': 'of a map, over channels (table 2)'},
            'power': {'default': 2, 'type': number(float, 0, 16, above=True), 'help': 'p of |A|^p (table 2)'},
        },
    ),
    'full': Transfer(
        term='full',
        title='whole activations',
        paper='F-ActT, section 4.1, table 1',
        label='F-ActT',
        loss=lambda x, kept, opt: utils.full_activation_loss(x, kept),
        weighs=activation_weight,
        beta='1e+5',  # weights a sample's squared distance about as 1e+3 does in attention transfer
        beta_decay='linear',
        adapts=True,
    ),
    'gradient': Transfer(
        term='grad',
        title='input gradients',
        paper='section 3.2, eq. 5, table 3',
        label='gradient-based AT',
        loss=lambda j, kept, opt: utils.gradient_loss(j, kept),
        weighs=lambda opt, *shape: (opt.beta / (2 * opt.batch_size), 'the distance of two input gradients'),
        beta='0.1',
        at_image=True,
    ),
}

PENALTIES = {
    'symmetry': Penalty(
        title='between the input gradients of an image and of its mirror image',
        paper='section 3.2, eq. 6, table 3',
        label='symmetry norm',
        loss=lambda j, gradient, images: utils.gradient_loss(j, gradient(images.flip(3)).flip(3)),
    ),
    'min_l2': Penalty(
        title='the norm of input gradients',
        paper='Drucker & LeCun 1992, table 3',
        label='min-l2',
        loss=lambda j, gradient, images: utils.gradient_loss(j),
    ),
}


def described(table):
    """The lines of a table in words, for --help."""
    return '; '.join(f'{name}: {row.title} ({row.paper})' for name, row in table.items())


def chosen(opt):
    """The transfer method that the flags select, or None."""
    return TRANSFERS[opt.transfer] if opt.beta > 0 else None


def of_groups(opt):
    """The selected method if it compares activations, else None."""
    transfer = chosen(opt)
    return None if transfer is None or transfer.at_image else transfer


def of_image(opt):
    """The selected method if it compares input gradients, else None."""
    transfer = chosen(opt)
    return transfer if transfer and transfer.at_image else None


def group_numbers(groups, number):
    """The numbers of the groups to compare, out of `number` groups. Raises ValueError for one that does not exist."""
    numbers = [int(g) for g in groups.split(',')] if groups else list(range(number))
    if max(numbers) >= number:
        raise ValueError(f'--groups {groups}: the network has groups 0 to {number - 1}')
    return numbers


def kept(opt, groups):
    """What the losses need from a teacher's groups, (N, C, H, W) each: {name of the loss: what is kept}."""
    transfer = of_groups(opt)
    numbers = group_numbers(opt.groups, len(groups)) if transfer else ()
    return {f'{transfer.term}{i}': transfer.keep(groups[i], opt) for i in numbers}


def losses(opt, groups, taught):
    """The losses between a student's groups and what is `kept` of the teacher's: {name: scalar}."""
    transfer = of_groups(opt)
    numbers = group_numbers(opt.groups, len(groups)) if transfer else ()
    return {f'{transfer.term}{i}': transfer.loss(groups[i], taught[f'{transfer.term}{i}'], opt) for i in numbers}


def check(opt):
    """Raise ValueError for flags of one method with another, or of a method or penalty without its weight."""
    if (opt.penalty == 'none') != (opt.gamma == 0):
        raise ValueError('--penalty and its weight --gamma go together')
    transfer = TRANSFERS[opt.transfer]
    if opt.transfer != 'activation' and not opt.beta:
        raise ValueError(f'--transfer {opt.transfer} needs its weight, --beta')
    for name, row in TRANSFERS.items():
        changed = [flag for flag, words in row.flags.items() if getattr(opt, flag) != words['default']]
        if changed and row is not transfer:
            raise ValueError(f'--{changed[0]} belongs to --transfer {name} alone, not to --transfer {opt.transfer}')
        if changed and not opt.beta:
            raise ValueError(f'--{changed[0]} does nothing without the weight of the transfer, --beta')
    if transfer.at_image and opt.groups:
        raise ValueError('--groups: gradients are transferred at the image, not from groups')
    if opt.compile and (opt.penalty != 'none' or transfer.at_image):
        raise ValueError('--compile: torch.compile cannot differentiate twice, as input gradients need')
