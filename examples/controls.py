"""Two controls of attention transfer (section 3.1): does it matter where this teacher looks in this image?

    python examples/controls.py shifted --teacher_id cifar10-e16/wrn-16-2-s0 --beta 1e+3 --dataroot data \\
        --epochs 16 --epoch_step '[5,10,13]' --save logs/shifted
    python examples/controls.py untrained --teacher_id cifar10-e16/wrn-16-2-s0 --beta 1e+3 --dataroot data \\
        --epochs 16 --epoch_step '[5,10,13]' --save logs/untrained

`shifted` compares each image's maps with the teacher's of another image of its batch. `untrained` takes a teacher of
the same shape with initial weights, whose batch norm has its initial statistics too. All else is as in cifar.py, whose
flags this program takes: compare its run with the student alone and with attention transfer of the same seed, as
`python reproduce.py controls --dtype bfloat16` does with three seeds. It also shows how to train with any function of
images that returns (logits, groups) as the teacher.
"""

import os
import sys
from argparse import Namespace
from functools import partial

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))

from cifar import build_data, network
from engine import ending, flags, teacher
from engine.loop import fit, start
from engine.step import make_step
from engine.student import Network, initialise, pair
from engine.workers import data_parallel
from formats.networks import family_of

CONTROLS = 'shifted', 'untrained'
OTHER = 10**6  # is added to the seed: with the student's own, the teacher would begin with the student's filters


def build_teacher(control, opt, data, sample):
    """The teacher of a control as a function of images (N, 3, H, W) that returns (logits, groups)."""
    trained, record = teacher.find(opt.teacher_id)
    if control == 'untrained':
        other = Namespace(**{**vars(opt), 'seed': opt.seed + OTHER})
        family = family_of(trained.params)
        depth, width = family.expected(trained.params)[2]
        build = family.network(Namespace(**{'no_bn': False, **record, 'depth': depth, 'width': width}))
        trained = initialise(build, other, data.num_classes, data.device)
    fixed = Network(trained.f, {name: value.detach() for name, value in trained.params.items()})
    taught = partial(fixed.f, params=teacher.frozen(opt, fixed, sample, data.device), mode=False)
    return taught if control == 'untrained' else lambda images: taught(images.roll(1, 0))


def main():
    """Train a student as cifar.py does, with the teacher of a control."""
    control, *words = sys.argv[1:] or ['']
    if control not in CONTROLS and control not in ('-h', '--help'):
        raise ValueError(f'{control!r} is not a control: expected {" or ".join(CONTROLS)}, then the flags of cifar.py')
    opt = flags.parse_cifar(__doc__, words if control in CONTROLS else [control])
    opt.control = control  # for the log
    if not opt.beta or opt.alpha or opt.transfer != 'activation':
        raise ValueError('a control compares attention maps: it takes --beta, and neither --alpha nor --transfer')
    device = start(opt)
    data, sample = build_data(opt, device)
    student = initialise(network(opt), opt, data.num_classes, device)
    taught = build_teacher(control, opt, data, sample)
    trained = pair(opt, student, taught, data.image)
    learner = data_parallel(trained, student.params, sync_bn=opt.sync_bn)
    fit(opt, make_step(opt, learner, taught, device), student, data)


if __name__ == '__main__':
    ending.run(main)
