"""Attention transfer between small networks on small images (sections 3 and 4.1 of the paper, tables 1 to 3).

    python cifar.py --save logs/resnet_16_2_teacher --depth 16 --width 2
    python cifar.py --save logs/at_16_1_16_2 --teacher_id resnet_16_2_teacher --beta 1e+3
    python cifar.py --save logs/kd_16_1_16_2 --teacher_id resnet_16_2_teacher --alpha 0.9

    python cifar.py --save logs/nin_thin --net nin --width 0.4375

In the paper, WRN-16-1 has a test error of 8.77% on CIFAR-10 alone, and of 7.93% with attention transfer from WRN-16-2.
"""

import os
from functools import partial

from engine import ending, flags, teacher
from engine.evaluate import report
from engine.loop import Data, count, fit, start
from engine.step import make_step
from engine.student import check, initialise, pair
from engine.workers import data_parallel, rank, say, world
from formats.networks import NETWORKS
from images import memory

# The flags that determine the test set, and their values for older logs that lack them.
TEST_SET = {'dataset': 'CIFAR10', 'holdout': 0, 'image_size': 32}


def parse():
    """The parsed flags. Raises ValueError if they contradict each other or no network has their shape or groups."""
    opt = flags.parse_cifar(__doc__)
    check(opt, network(opt))
    return opt


def network(opt):
    """The function that builds the student: num_classes -> (f, params)."""
    return NETWORKS[opt.net].network(opt)


def build_data(opt, device):
    """Small images on the device as `Data`, and a function that returns training images for int8 calibration."""
    source = opt.dataset, opt.dataroot, opt.image_size, opt.holdout, opt.nthread
    dataset = memory.load(*source, say, opt.follow_links)
    say(f'{opt.dataset}: {len(dataset.train.labels):,} training and {len(dataset.test.labels):,} test images')
    train, test = dataset.train.to(device), dataset.test.to(device)
    augment, share = (int(opt.randomcrop_pad), dataset.flip, opt.seed), (rank(), world())
    train_batches = partial(memory.TrainBatches, train, opt.batch_size, *augment, *share)
    test_batches = partial(memory.TestBatches, test, opt.batch_size, *share)
    image = next(iter(test_batches()))[0][:1]
    return Data(train_batches, test_batches, count(dataset), image), partial(memory.sample, dataset.train)


def build_teacher(opt, data, sample):
    """The teacher as x -> (logits, groups), checked against its own log; None if no teacher is named."""
    if not opt.teacher_id:
        return None
    network, record = teacher.find(opt.teacher_id)
    f, accuracies = teacher.build(opt, f'--teacher_id {opt.teacher_id}', network, data, sample)
    if accuracies:
        teacher.check_accuracy(record, accuracies[0], same_images(record, opt, data.counts), opt.teacher_dtype)
    return f


def same_images(record, opt, counts):
    """The number of test images if they are those of a log's record, else 0."""
    same = all(record.get(flag, default) == getattr(opt, flag) for flag, default in TEST_SET.items())
    if opt.dataset == 'folder':  # others have one test set, wherever it is
        same &= record.get('test_images') == counts['test_images']
        same &= os.path.abspath(str(record.get('dataroot', '.'))) == os.path.abspath(opt.dataroot)
    return same * counts['test_images']


def main():
    """Train a network on small images, or evaluate one."""
    opt = parse()
    device = start(opt)
    if opt.evaluate:
        return report(opt, device, build_data)
    data, sample = build_data(opt, device)
    student = initialise(network(opt), opt, data.num_classes, device)
    teacher = build_teacher(opt, data, sample)
    trained = pair(opt, student, teacher, data.image)
    learner = data_parallel(trained, student.params, sync_bn=opt.sync_bn)
    fit(opt, make_step(opt, learner, teacher, device), student, data)


if __name__ == '__main__':
    ending.run(main)
