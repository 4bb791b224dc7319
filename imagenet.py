"""Attention transfer between ResNets on ImageNet (section 4.2.2 of the paper, table 5).

    python imagenet.py --imagenetpath ~/ILSVRC2012 --depth 18 --width 1 --teacher_params resnet-34-export.hkl \\
        --gpu_id 0,1 --ngpu 2 --beta 1e+3

In the paper, ResNet-18 has a top-1 error of 30.4% and a top-5 error of 10.8% alone, and 29.3% and 10.0% with attention
transfer from ResNet-34 (26.1% and 8.3%). This experiment has not been run with this code.
"""

from functools import partial

from engine import ending, flags, photographs
from engine.arguments import Parser, path
from engine.evaluate import report
from engine.loop import fit, start
from engine.step import make_step
from engine.student import check, initialise, pair
from engine.workers import data_parallel, say, world
from formats.networks import NETWORKS
from images.photographs import load


def parse():
    """The parsed flags, with defaults from section 4.2.2. Raises ValueError if they contradict each other."""
    parser = Parser(__doc__)
    flag = parser.add_argument_group('data and teacher (section 4.2.2)').add_argument
    root = 'folder that holds train/<class>/* and val/<class>/* (or validation/, test/)'
    flag('--imagenetpath', '--dataroot', default='.', type=path, help=root)
    photographs.add_flags(flag)
    flags.common_flags(
        parser,
        '4.2.2',
        depth=18,
        batch_size=256,
        epochs=100,
        epoch_step='[30,60,90]',
        lr_decay_ratio=0.1,
        weight_decay=0.0001,
    )
    opt = flags.parse(parser, ('image_size', 'holdout', 'dtype'))
    flags.check(opt, opt.teacher_params, '--teacher_params')
    check(opt, NETWORKS['resnet'].network(opt))
    return opt


def build_data(opt, device):
    """Photographs from a folder as `Data`, and a function that returns training images for int8 calibration."""
    # At 32 pixels the last maps are 1x1, and their batch norm needs two images: per worker, or with --sync_bn in all.
    least = (2 if opt.sync_bn else 2 * world()) if opt.image_size == 32 else 1
    return photographs.build_data(opt, partial(load, opt.imagenetpath, opt.follow_links, say), device, least)


def main():
    """Train a ResNet on a folder of photographs, or evaluate one."""
    opt = parse()
    device = start(opt)
    if opt.evaluate:
        return report(opt, device, build_data)
    data, sample = build_data(opt, device)
    student = initialise(NETWORKS['resnet'].network(opt), opt, data.num_classes, device)
    teacher = photographs.build_teacher(opt, data, sample)
    trained = pair(opt, student, teacher, data.image)
    learner = data_parallel(trained, student.params, sync_bn=opt.sync_bn)
    fit(opt, make_step(opt, learner, teacher, device), student, data)


if __name__ == '__main__':
    ending.run(main)
