"""The flags of the training scripts, and their checks."""

import argparse
import json
import math
import os
import re

from formats.networks import NETWORKS
from schedules import BETA_DECAYS
from utils import DTYPES

TRANSFERS = (
    'attention maps (section 3.1, eq. 2), all activations (F-ActT, section 4.1, table 1) '
    'or input gradients (section 3.2, eq. 5; table 3)'
)
TEACHERS = {'--teacher_id': '--teacher_params', '--teacher_params': '--teacher_id'}  # what the other scripts call it
HOLDOUT = 'test on N training images instead'
GPU = r'\d+|(GPU|MIG)-[\w/-]+'  # how CUDA_VISIBLE_DEVICES and --gpu_id name one
MOST = 1e30  # of a rate or a weight: products of two stay below what float32 holds, or are seen as not finite


class Parser(argparse.ArgumentParser):
    """An argument parser that shows a description as it is written, and an error in one line with exit status 2."""

    def __init__(self, description):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message):
        for flag, other in TEACHERS.items():
            if f' {flag}' in message.replace('=', ' ') and other in self._option_string_actions:
                message += f' (here a teacher is named with {other})'
        self.exit(2, f'{self.prog}: error: {message}\n')


def subcommand(prog, description=None, **_):
    """What add_subparsers takes as parser_class."""
    parser = Parser(description)
    parser.prog = prog
    return parser


def number(kind, low, high=math.inf, above=False):
    """An argparse type: an int or float from low (or above it) to high."""

    def parse(text):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f'{text!r} is not {"an integer" if kind is int else "a number"}') from None
        if not (low < value if above else low <= value) or not value <= high or not math.isfinite(value):
            bounds = f'{"above" if above else "at least"} {low:g}' + ('' if high == math.inf else f', at most {high:g}')
            raise argparse.ArgumentTypeError(f'{text} is out of range ({bounds})')
        return value

    return parse


def path(text):
    """An argparse type, of every flag that names a file or folder: ~ is the home folder, also behind an =."""
    return os.path.expanduser(text)


def epoch_list(text):
    """An argparse type: a JSON list of rising epochs, kept as the text that it was."""
    try:
        epochs = json.loads(text)
    except (ValueError, RecursionError):
        epochs = None
    rising = isinstance(epochs, list) and all(type(e) is int and e > 0 for e in epochs)
    if not rising or sorted(set(epochs)) != epochs:
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON list of rising epochs, like [60,120,160]')
    return text


def group_list(text):
    """An argparse type: distinct group numbers from 0, separated by commas, kept as the text that it was."""
    parts = text.split(',') if text else []
    if not all(p.isascii() and p.isdigit() and len(p) < 4 for p in parts) or len(set(map(int, parts))) != len(parts):
        raise argparse.ArgumentTypeError(f'{text!r} is not a list of group numbers like 0,2')
    return text


def gpu_list(text):
    """An argparse type: what CUDA_VISIBLE_DEVICES takes, numbers or identifiers separated by commas."""
    if text and not all(re.fullmatch(GPU, name) for name in text.split(',')):
        raise argparse.ArgumentTypeError(f'{text!r} is not a list of GPUs like 0,1')
    return text


def common_flags(
    parser, section, *, depth, batch_size, epochs, epoch_step, lr_decay_ratio, weight_decay, lr=0.1, groups=''
):
    """Add the shared flags, with the defaults of the paper's section, under upstream's names and early spellings.

    With depth None the network's shape is no matter of flags.
    """
    flag = parser.add_argument_group(f'network (section {section})').add_argument
    if depth is not None:
        flag('--depth', default=depth, type=number(int, 1, 10_000), help='layers of the network (default: %(default)s)')
        flag('--width', default=1, type=number(float, 0, 100, above=True), help='times the base width (default: 1)')
    flag('--dtype', default='float', choices=list(DTYPES), help='compute dtype; parameters and losses stay float32')
    integers = "int8: the teacher's convolutions in integers, on CPUs (default: same, as --dtype)"
    flag('--teacher_dtype', default='same', choices=['same', 'int8'], help=integers)
    flag('--compile', action='store_true', help='compile the student and its losses with torch.compile at the start')
    flag('--cuda_graphs', action='store_true', help='with --compile on a single GPU: replay the step as CUDA graphs')

    flag = parser.add_argument_group(f'training (section {section})').add_argument
    flag('--epochs', default=epochs, type=number(int, 1), metavar='N', help='default: %(default)s')
    size, decay = 'of all workers together (default: %(default)s)', 'default: %(default)s'
    flag('--batch_size', '--batchSize', default=batch_size, type=number(int, 2, 2**31), help=size)
    flag('--lr', default=lr, type=number(float, 0, MOST, above=True), help='learning rate (default: %(default)s)')
    flag('--epoch_step', default=epoch_step, type=epoch_list, help='lr drops as these begin (default: %(default)s)')
    flag('--lr_decay_ratio', default=lr_decay_ratio, type=number(float, 0, 1), help='times lr (default: %(default)s)')
    flag('--weight_decay', '--weightDecay', default=weight_decay, type=number(float, 0, MOST), help=decay)
    flag('--seed', default=0, type=number(int, 0, 2**63 - 1), help='of initialisation, order and augmentation')

    flag = parser.add_argument_group('transfer from a teacher').add_argument
    flag('--alpha', default=0, type=number(float, 0, 1), help='weight of knowledge distillation (section 4.1: 0.9)')
    beta = 'weight of --transfer (section 4.1: 1e+3 for attention maps)'
    flag('--temperature', default=4, type=number(float, 1e-6, 1000), help='of distillation (section 4.1: 4)')
    flag('--beta', default=0, type=number(float, 0, MOST), help=beta)
    flag('--beta_decay', default='none', choices=list(BETA_DECAYS), help='how beta falls to 0 (section 4.1: AT+KD)')
    flag('--transfer', default='activation', choices=['activation', 'full', 'gradient'], help=TRANSFERS)
    flag('--at_form', default='code', choices=['code', 'paper'], help="the authors' code, or eq. 2 (section 3.1)")
    flag('--mapping', default='sum', choices=['sum', 'max'], help='attention map over channels (section 3.1, table 2)')
    flag('--power', default=2, type=number(float, 0, 16, above=True), help='p of |A|^p (section 3.1, table 2)')
    only = f'only these, like 0,2 (section 4.1, table 2; default: {groups or "all"})'
    flag('--groups', default=groups, type=group_list, help=only)

    flag = parser.add_argument_group('penalty, without a teacher').add_argument
    penalties = ['none', 'symmetry', 'min_l2']
    flag('--penalty', default='none', choices=penalties, help='on input gradients (section 3.2, eq. 6; table 3)')
    flag('--gamma', default=0, type=number(float, 0, MOST), help='weight of --penalty (section 3.2)')

    flag = parser.add_argument_group('run').add_argument
    flag('--save', default='', type=path, help='folder for log.txt and model.pt7; without it, nothing is kept')
    resume = "a checkpoint to go on from, or 'auto' for the one in --save, if there is one"
    flag('--resume', default='', type=path, help=resume)
    flag(
        '--save_every', default=0, type=number(float, 0), metavar='MINUTES', help='also within an epoch (default: not)'
    )
    flag('--overwrite', action='store_true', help='replace the run that --save holds')
    flag('--nthread', default=4, type=number(int, 0, 1024), help='threads that decode images (default: 4)')
    flag('--ngpu', default=1, type=number(int, 1, 1024), help='workers: one a GPU, or CPU processes without GPUs')
    flag('--sync_bn', action='store_true', help="batch norm over all workers' images, not each worker's share")
    flag('--max_restarts', default=0, type=number(int, 0, 1000), help='begin again so often when a worker dies')
    flag('--gpu_id', default='', type=gpu_list, help='like 0,1 (default: all that CUDA_VISIBLE_DEVICES allows)')


def parse_cifar(description, words=None):
    """The flags of cifar.py, from `words` or the command line, with the recipe of section 4.1 as defaults."""
    parser = Parser(description)
    flag = parser.add_argument_group('data and teacher (section 4.1)').add_argument
    flag('--dataset', default='CIFAR10', help='CIFAR10 (default), CIFAR100, folder or digits')
    flag('--dataroot', '--data_root', default='.', type=path, help='where the data set is, or is to be downloaded')
    flag('--follow_links', action='store_true', help='of a folder, read images that links out of it lead to')
    flag('--image_size', default=32, type=number(int, 8, 512), help='for folder and digits (default: 32)')
    pad = number(float, 0, 511)
    flag('--randomcrop_pad', default=4, type=pad, help='pixels around an image to crop from (default: 4; table 3: 0)')
    held = f'{HOLDOUT}: the last, of a folder the same part of each class'
    flag('--holdout', default=0, type=number(int, 0), metavar='N', help=held)
    flag('--teacher_id', default='', type=path, help='run that teaches: its name in logs/, its folder or model.pt7')
    flag = parser.add_argument_group('kind of network (section 4.1)').add_argument
    offered = {name: family for name, family in NETWORKS.items() if family.script == 'cifar.py'}
    kinds = ' or '.join(family.plural for family in offered.values())
    flag('--net', default='wrn', choices=list(offered), help=f'{kinds} (table 1)')
    flag('--no_bn', action='store_true', help='a Network-in-Network with biases instead of batch norm (table 3)')
    common_flags(
        parser,
        '4.1',
        depth=16,
        batch_size=128,
        epochs=200,
        epoch_step='[60,120,160]',
        lr_decay_ratio=0.2,
        weight_decay=0.0005,
    )
    opt = parser.parse_args(words)
    check(opt, opt.teacher_id, '--teacher_id')
    if opt.randomcrop_pad % 1 or opt.randomcrop_pad >= opt.image_size:
        raise ValueError(f'--randomcrop_pad {opt.randomcrop_pad:g}: expected whole pixels, fewer than the image has')
    if opt.no_bn and 'no_bn' not in offered[opt.net].flags:
        others = ' or '.join(name for name, family in offered.items() if 'no_bn' in family.flags)
        raise ValueError(f'--no_bn: {offered[opt.net].plural} have batch norm; --net {others} can do without')
    if 'depth' not in offered[opt.net].flags:
        opt.depth = None
    return opt


def check(opt, teacher, flag):
    """Refuse flags that contradict each other; `teacher` is the value of `flag`, which names one."""
    if (opt.alpha or opt.beta) and not teacher:
        raise ValueError(f'--{"alpha" if opt.alpha else "beta"} needs a teacher: name one with {flag}')
    if (opt.penalty == 'none') != (opt.gamma == 0):
        raise ValueError('--penalty and its weight --gamma go together')
    if opt.transfer != 'activation' and not opt.beta:
        raise ValueError(f'--transfer {opt.transfer} needs its weight, --beta')
    if opt.transfer != 'activation' and (opt.mapping, opt.power, opt.at_form) != ('sum', 2, 'code'):
        raise ValueError(f'--mapping, --power and --at_form are of attention maps, not of --transfer {opt.transfer}')
    if opt.transfer == 'gradient' and opt.groups:
        raise ValueError('--groups: gradients are transferred at the image, not from groups')
    if opt.compile and (opt.penalty != 'none' or opt.transfer == 'gradient'):
        raise ValueError('--compile: torch.compile cannot differentiate twice, as input gradients need')
    if opt.cuda_graphs and not opt.compile:
        raise ValueError('--cuda_graphs goes with --compile')
    if opt.teacher_dtype == 'int8' and (not teacher or opt.transfer == 'gradient' or DTYPES[opt.dtype].itemsize == 8):
        raise ValueError(f'--teacher_dtype int8: with {flag}, but not with --transfer gradient or --dtype double')
    if opt.resume and opt.overwrite:
        raise ValueError('--resume and --overwrite contradict each other')
    if opt.resume == 'auto' and not opt.save:
        raise ValueError('--resume auto continues the run in --save, which is not given')
