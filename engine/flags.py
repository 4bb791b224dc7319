"""The flags of the training scripts, and their checks."""

import os
from argparse import ArgumentTypeError

from engine import events, transfer
from engine.arguments import MOST, Parser, epoch_list, gpu_list, group_list, number, path
from engine.log import read_log
from engine.schedules import BETA_DECAYS
from engine.transfer import PENALTIES, TRANSFERS
from formats.networks import NETWORKS, checkpoint_of
from images.memory import DATASETS
from utils import DTYPES

HOLDOUT = 'test on N training images instead'


def common_flags(
    parser, section, *, depth, batch_size, epochs, epoch_step, lr_decay_ratio, weight_decay, lr=0.1, groups=''
):
    """Add the shared flags under upstream's names and early spellings, with defaults from a section of the paper.

    With depth None there are no flags for the network's shape.
    """
    flag = parser.add_argument_group(f'network (section {section})').add_argument
    if depth is not None:
        flag('--depth', default=depth, type=number(int, 1, 10_000), help='layers of the network')
        flag('--width', default=1, type=number(float, 0, 100, above=True), help='times the base width')
    flag('--dtype', default='float', choices=list(DTYPES), help='compute dtype; parameters and losses stay float32')
    integers = "int8: the teacher's convolutions in integers, on CPUs with VNNI (same: as --dtype)"
    flag('--teacher_dtype', default='same', choices=['same', 'int8'], help=integers)
    flag('--compile', action='store_true', help='compile the student and its losses with torch.compile at the start')
    flag('--cuda_graphs', action='store_true', help='with --compile on a single GPU: replay the step as CUDA graphs')

    flag = parser.add_argument_group(f'training (section {section})').add_argument
    flag('--epochs', default=epochs, type=number(int, 1), metavar='N', help='number of epochs')
    size, decay = 'images a step, of all workers together', 'of all trained parameters'
    flag('--batch_size', '--batchSize', default=batch_size, type=number(int, 2, 2**31), help=size)
    flag('--lr', default=lr, type=number(float, 0, MOST, above=True), help='learning rate')
    flag(
        '--epoch_step',
        default=epoch_step,
        type=epoch_list,
        help='epochs at whose start the learning rate drops',
    )
    flag(
        '--lr_decay_ratio',
        default=lr_decay_ratio,
        type=number(float, 0, 1),
        help='times the learning rate, where it drops',
    )
    keep = 'do not restart momentum from zero where the learning rate drops, as the authors do'
    flag('--keep_momentum', action='store_true', help=keep)
    flag('--weight_decay', '--weightDecay', default=weight_decay, type=number(float, 0, MOST), help=decay)
    flag('--seed', default=0, type=number(int, 0, 2**63 - 1), help='seed of initialisation, order and augmentation')

    _transfer_flags(parser, groups)
    _run_flags(parser)


def _transfer_flags(parser, groups):
    flag = parser.add_argument_group('transfer from a teacher').add_argument
    flag('--alpha', default=0, type=number(float, 0, 1), help='weight of knowledge distillation (section 4.1: 0.9)')
    beta = 'weight of --transfer (section 4.1: 1e+3 for attention maps)'
    flag('--temperature', default=4, type=number(float, 1e-6, 1000), help='of distillation (section 4.1: 4)')
    flag('--beta', default=0, type=number(float, 0, MOST), help=beta)
    flag('--beta_decay', default='none', choices=list(BETA_DECAYS), help='how beta falls to 0 (section 4.1: AT+KD)')
    flag('--transfer', default='activation', choices=list(TRANSFERS), help=transfer.described(TRANSFERS))
    for name, row in TRANSFERS.items():
        for own, words in row.flags.items():
            flag(f'--{own}', **{**words, 'help': f'{words["help"]} (of --transfer {name}, {row.paper})'})
    only = f'only these groups, like 0,2 (section 4.1, table 2; default: {groups or "all"})'
    flag('--groups', default=groups, type=group_list, help=only)

    flag = parser.add_argument_group('penalty, without a teacher').add_argument
    flag('--penalty', default='none', choices=['none', *PENALTIES], help=transfer.described(PENALTIES))
    flag('--gamma', default=0, type=number(float, 0, MOST), help='weight of --penalty (section 3.2)')


def _run_flags(parser):
    flag = parser.add_argument_group('evaluation').add_argument
    flag('--evaluate', type=path, metavar='RUN', help='print the test scores of a run or a network file')
    flag('--json', action='store_true', help='with --evaluate: as JSON, in the last line')

    flag = parser.add_argument_group('run').add_argument
    flag('--save', default='', type=path, help='folder for log.txt and model.pt7; without it, nothing is kept')
    resume = "a checkpoint to go on from, or 'auto' for the one in --save, if there is one"
    flag('--resume', default='', type=path, help=resume)
    exact = 'on GPUs: the same bits in every run, as an exact resume needs; slower. CPUs always compute so'
    flag('--deterministic', action='store_true', help=exact)
    flag('--save_every', default=0, type=number(float, 0), metavar='MINUTES', help='also within an epoch; 0: not')
    flag('--overwrite', action='store_true', help='replace the run that --save holds')
    flag('--tensorboard', action='store_true', help='also write event files for TensorBoard beside the log')
    flag('--verbose', action='store_true', help='also print the shape of every parameter')
    flag('--nthread', default=4, type=number(int, 0, 1024), help='threads or processes that decode images')
    flag('--ngpu', default=1, type=number(int, 1, 1024), help='workers: one a GPU, or CPU processes without GPUs')
    flag('--sync_bn', action='store_true', help="batch norm over all workers' images, not each worker's share")
    flag(
        '--max_restarts',
        default=0,
        type=number(int, 0, 1000),
        help='restart up to N times after a worker dies',
        metavar='N',
    )
    flag('--gpu_id', default='', type=gpu_list, help='like 0,1 (default: all that CUDA_VISIBLE_DEVICES allows)')


def parse_cifar(description, words=None):
    """The parsed flags of cifar.py, from `words` or the command line, with defaults from section 4.1."""
    parser = Parser(description)
    flag = parser.add_argument_group('data and teacher (section 4.1)').add_argument
    flag('--dataset', default='CIFAR10', choices=list(DATASETS), help='the data set')
    flag('--dataroot', '--data_root', default='.', type=path, help='folder of the data set, or to download it into')
    flag('--follow_links', action='store_true', help='read images through links that lead out of the folder')
    flag('--image_size', default=32, type=number(int, 8, 512), help='height and width of the images')
    pad = number(float, 0, 511)
    flag('--randomcrop_pad', default=4, type=pad, help='pixels around an image to crop from (table 3: 0)')
    held = f'{HOLDOUT}: the last ones, or the same part of each class of a folder'
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
    opt = parse(parser, ('dataset', 'image_size', 'holdout', 'dtype'), words)
    check(opt, opt.teacher_id, '--teacher_id')
    if opt.randomcrop_pad % 1 or opt.randomcrop_pad >= opt.image_size:
        raise ValueError(f'--randomcrop_pad {opt.randomcrop_pad:g}: expected whole pixels, fewer than the image has')
    if opt.no_bn and 'no_bn' not in offered[opt.net].flags:
        others = ' or '.join(name for name, family in offered.items() if 'no_bn' in family.flags)
        raise ValueError(f'--no_bn: {offered[opt.net].plural} have batch norm; --net {others} can do without')
    if 'depth' not in offered[opt.net].flags:
        opt.depth = None
    return opt


def parse(parser, logged, words=None):
    """The parsed flags; with --evaluate, the run's log gives the defaults of the flags in `logged`."""
    opt = parser.parse_args(words)
    if opt.evaluate == '':
        raise ValueError('--evaluate is empty: name a run or a file')
    opt.evaluate = opt.evaluate or ''
    folder, name = os.path.split(checkpoint_of(opt.evaluate))
    log = os.path.join(folder, 'log.txt')
    if name == 'model.pt7' and os.path.isfile(log):
        *_, last = read_log(log) or [{}]
        actions = {action.dest: action for action in parser._actions}
        texts = {flag: str(last[flag]) for flag in logged if type(last.get(flag)) in (str, int)}
        parser.set_defaults(**{flag: text for flag, text in texts.items() if _is_valid(actions[flag], text)})
        opt = parser.parse_args(words)
    opt.dtype = next(name for name in DTYPES if DTYPES[name] is DTYPES[opt.dtype])  # float32 is logged as float
    return opt


def _is_valid(action, text):
    """Whether a flag takes a text that a log has for it, which may be of another script, or damaged."""
    try:
        value = action.type(text) if action.type else text
    except (ArgumentTypeError, ValueError):
        return False
    return not action.choices or value in action.choices


def check(opt, teacher, flag):
    """Raise ValueError for flags that contradict each other; `teacher` is the value of `flag`, the teacher's name."""
    if opt.json and not opt.evaluate:
        raise ValueError('--json goes with --evaluate')
    if opt.evaluate:
        training = 'save resume overwrite alpha beta gamma compile cuda_graphs teacher_id teacher_params'.split()
        conflicting = [name for name in training if getattr(opt, name, False)]
        if conflicting:
            raise ValueError(f'--evaluate tests a network, --{conflicting[0]} is for training one')
    if (opt.alpha or opt.beta) and not teacher:
        raise ValueError(f'--{"alpha" if opt.alpha else "beta"} needs a teacher: name one with {flag}')
    transfer.check(opt)
    events.check(opt)
    if opt.max_restarts and opt.ngpu == 1:
        raise ValueError('--max_restarts goes with --ngpu; to go on after a single worker has died, --resume auto')
    if opt.cuda_graphs and not opt.compile:
        raise ValueError('--cuda_graphs goes with --compile')
    if opt.teacher_dtype == 'int8' and (not teacher or transfer.of_image(opt) or DTYPES[opt.dtype].itemsize == 8):
        raise ValueError(f'--teacher_dtype int8 needs {flag}, and neither --transfer gradient nor --dtype double')
    if opt.resume and opt.overwrite:
        raise ValueError('--resume and --overwrite contradict each other')
    if opt.resume == 'auto' and not opt.save:
        raise ValueError('--resume auto continues the run in --save, which is not given')
