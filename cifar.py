"""Attention transfer between small networks on small images (sections 3 and 4.1 of the paper, tables 1 to 3).

    python cifar.py --save logs/resnet_16_2_teacher --depth 16 --width 2
    python cifar.py --save logs/at_16_1_16_2 --teacher_id resnet_16_2_teacher --beta 1e+3
    python cifar.py --save logs/kd_16_1_16_2 --teacher_id resnet_16_2_teacher --alpha 0.9

    python cifar.py --save logs/nin_thin --net nin --width 0.4375

WRN-16-1 alone errs on 8.77% of CIFAR-10's test images in the paper, with attention transfer from WRN-16-2 on 7.93%.
"""

from functools import partial

import torch

import data
import ending
import engine
import options
import workers
from formats.networks import NETWORKS

# The flags that say which images are tested on, and their values where an older log does not hold them.
TEST_SET = {'dataset': 'CIFAR10', 'holdout': 0, 'image_size': 32}


def parse():
    """The flags; ValueError where they name no network or contradict each other."""
    opt = options.parse_cifar(__doc__)
    with torch.device('meta'):  # no memory: a shape that is none is told before anything else begins
        network(opt)(2)
    return opt


def network(opt):
    """What draws the student: num_classes -> (f, params)."""
    return NETWORKS[opt.net].network(opt)


def build_data(opt, device):
    """The data set, and train_batches(epoch) and test_batches() on the device."""
    source = opt.dataset, opt.dataroot, opt.image_size, opt.holdout, opt.nthread
    dataset = data.load(*source, workers.say, opt.follow_links)
    workers.say(f'{opt.dataset}: {len(dataset.train.labels):,} training and {len(dataset.test.labels):,} test images')
    train, test = dataset.train.to(device), dataset.test.to(device)
    augment = int(opt.randomcrop_pad), dataset.flip, opt.seed
    share = workers.rank(), workers.world()
    train_batches = partial(data.TrainBatches, train, opt.batch_size, *augment, *share)
    return dataset, train_batches, partial(data.TestBatches, test, opt.batch_size, *share)


def build_teacher(opt, dataset, test_batches, device):
    """The teacher as x -> (logits, groups), folded and checked against its own log; None where none is named.

    One of other classes is not checked, and teaches by its activations alone.
    """
    if not opt.teacher_id:
        return None
    f, params, record = engine.find_teacher(opt.teacher_id)
    same_classes = engine.check_classes(opt, f'--teacher_id {opt.teacher_id}', params, dataset.num_classes)
    params = engine.frozen(opt, f, params, partial(data.sample, dataset.train), device)
    if same_classes:
        evaluated = f, params, test_batches(), device, opt.dtype
        (accuracy,) = engine.evaluate_teacher(f'--teacher_id {opt.teacher_id}', *evaluated)
        same = all(record.get(flag, default) == getattr(opt, flag) for flag, default in TEST_SET.items())
        engine.check_teacher(record, accuracy, same, opt.teacher_dtype)
    return partial(f, params=params, mode=False)


def main():
    """Train a network on small images, as the flags say."""
    opt = parse()
    device = engine.start(opt)
    workers.say('parsed options:', vars(opt))
    dataset, train_batches, test_batches = build_data(opt, device)
    f, params = engine.draw(network(opt), opt, dataset.num_classes, device)
    teacher = build_teacher(opt, dataset, test_batches, device)
    trained = engine.prepare(opt, f, params, teacher, next(iter(test_batches()))[0][:1])
    student = workers.data_parallel(trained, params, sync_bn=opt.sync_bn)
    step = engine.make_step(opt, student, teacher, device)
    engine.fit(opt, step, f, params, train_batches, test_batches, device, engine.counts(dataset))


if __name__ == '__main__':
    ending.run(main)
