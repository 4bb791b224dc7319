"""Attention transfer (section 3.1) between any two torch.nn networks: a ResNet-50 teaches a MobileNetV3-Large.

    python examples/own_networks.py
    python examples/own_networks.py --teacher_weights DEFAULT     # torchvision's own weights, a download of 98 MB

Copy the block from PAIRS to `losses` into your own training loop, with the layers of your own networks.
The rest runs it on scikit-learn's digits, enlarged to 64x64: 20 steps in 15 seconds on one CPU core. Nothing is
saved, and so few steps say nothing about accuracy.
"""

import os
import sys
from functools import partial

import torch
import torch.nn.functional as F
from torchvision.models import mobilenet_v3_large, resnet50

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))

from engine.arguments import Parser, number, path
from engine.ending import run
from formats.read import read
from formats.torchvision import download
from images import memory, photographs
from utils import at_loss

# (the student's layer, the teacher's): here the last at strides 4, 8, 16, 32. `named_modules()` lists layers.
PAIRS = [('features.3', 'layer1'), ('features.6', 'layer2'), ('features.12', 'layer3'), ('features.16', 'layer4')]


def with_groups(student, teacher, pairs):
    """Two torch.nn modules as functions images -> (logits, groups): groups are the outputs (N, C, H, W) of the layers.

    They raise ValueError for a layer that is not called or has another output, and for an output that the next layer
    overwrites, as ReLU(inplace=True) does: pair that layer instead. In inference mode, outputs are copied. Of a layer
    that is called several times, the last output counts.
    """
    if not pairs:
        raise ValueError('no pairs of layers to compare')
    return [_hooked(network, layers) for network, layers in zip((student, teacher), zip(*pairs))]


def _hooked(network, layers):
    kept = {}

    def keep(name, _, __, output):
        if torch.is_tensor(output) and output.is_inference():
            kept[name] = output.clone(), None  # it would not show that the next layer overwrites it
        else:
            kept[name] = output, getattr(output, '_version', None)

    for name in layers:
        network.get_submodule(name).register_forward_hook(partial(keep, name))

    def f(images):
        kept.clear()
        logits = network(images)
        unused = [name for name in layers if name not in kept]
        if unused:
            raise ValueError(f'the network does not call {unused[0]}: pair another layer')
        groups = [kept[name] for name in layers]
        for name, (group, version) in zip(layers, groups):
            if not torch.is_tensor(group) or group.dim() != 4:
                raise ValueError(f'the output of {name} is no tensor (N, C, H, W): pair another layer')
            if version is not None and group._version != version:
                raise ValueError(f'the output of {name} is overwritten by the layer after it')
        return logits, [group for group, _ in groups]

    return f


def losses(student, teacher, images, labels):
    """The student's cross entropy, and the attention loss of each pair of layers, from one pass of each network."""
    with torch.no_grad():
        _, taught = teacher(images)
    logits, learned = student(images)
    return F.cross_entropy(logits, labels), [at_loss(a, b) for a, b in zip(learned, taught)]


def load_teacher(weights):
    """A torchvision ResNet-50 with random weights for '', torchvision's for 'DEFAULT', or those of a state_dict."""
    if not weights:
        print(
            'the teacher has random weights (see --teacher_weights): it teaches nothing, this only shows that it runs'
        )
        return resnet50()
    state = download('resnet50') if weights == 'DEFAULT' else read(weights)
    try:
        teacher = resnet50(num_classes=len(state['fc.bias']))
        teacher.load_state_dict(state)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError):
        raise ValueError(f'--teacher_weights {weights}: not a state_dict of torchvision.models.resnet50') from None
    return teacher


def main():
    """Train the student for some steps on handwritten digits."""
    parser = Parser(__doc__)
    weights = "a state_dict's file, or DEFAULT for torchvision's own"
    parser.add_argument('--teacher_weights', default='', type=path, help=weights)
    parser.add_argument('--steps', default=20, type=number(int, 1), help='number of steps')
    parser.add_argument('--batch_size', default=16, type=number(int, 1, 1000), help='images a step')
    parser.add_argument('--beta', default=1e3, type=number(float, 0), help='of the attention losses')
    opt = parser.parse_args()

    torch.manual_seed(0)
    teacher = load_teacher(opt.teacher_weights)
    digits = memory.load('digits', image_size=64)
    student = mobilenet_v3_large(num_classes=digits.num_classes)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    student, teacher = with_groups(student.train(), teacher.eval(), PAIRS)
    for step in range(opt.steps):
        index = torch.randperm(len(digits.train.labels))[: opt.batch_size]
        images = photographs.normalize(digits.train.pixels[index])  # as torchvision's weights expect
        ce, at = losses(student, teacher, images, digits.train.labels[index])
        optimizer.zero_grad()
        (ce + opt.beta * sum(at)).backward()
        optimizer.step()
        if step % 5 == 0 or step == opt.steps - 1:
            print(f'step {step}: ce {ce:.3f}', *(f'at{i} {value:.2e}' for i, value in enumerate(at)))


if __name__ == '__main__':
    run(main)
