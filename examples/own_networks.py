"""Attention transfer (section 3.1) between any two torch.nn networks: a ResNet-50 teaches a MobileNetV3-Large.

    python examples/own_networks.py
    python examples/own_networks.py --teacher_weights DEFAULT     # torchvision's own weights, a download of 98 MB

Copy the block from TEACHER to `losses` into your own training loop, with the layers of your own networks; where
torch.fx cannot trace one, forward hooks give the same activations.
The rest runs it on scikit-learn's digits, enlarged to 64x64: 20 steps in 15 seconds on one CPU core. Nothing is
saved, and so few steps say nothing about accuracy.
"""

import os
import sys

import torch
import torch.nn.functional as F
from torchvision.models import mobilenet_v3_large, resnet50
from torchvision.models.feature_extraction import create_feature_extractor

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))

from engine.arguments import Parser, number, path
from engine.ending import run
from formats.read import read
from formats.torchvision import download
from images import memory, photographs
from utils import at_loss

# Layers of the same name are compared: here the last at strides 4, 8, 16, 32. `get_graph_node_names(network)` lists
# layers; take none before an in-place layer such as ReLU(inplace=True), which overwrites its activation.
TEACHER = {'layer1': 'at0', 'layer2': 'at1', 'layer3': 'at2', 'layer4': 'at3'}
STUDENT = {'features.3': 'at0', 'features.6': 'at1', 'features.12': 'at2', 'features.16': 'at3', 'classifier': 'logits'}


def extractors(student, teacher):
    """Both networks as functions images -> {name: activation}; they share their parameters with the networks."""
    return create_feature_extractor(student, STUDENT).train(), create_feature_extractor(teacher, TEACHER).eval()


def losses(student, teacher, images, labels):
    """The student's cross entropy, and {name: attention loss} of each pair of layers, from one pass of each network."""
    with torch.no_grad():
        taught = teacher(images)
    learned = student(images)
    at = {name: at_loss(learned[name], taught[name]) for name in taught}
    return F.cross_entropy(learned['logits'], labels), at


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
    student, teacher = extractors(student, teacher)
    for step in range(opt.steps):
        index = torch.randperm(len(digits.train.labels))[: opt.batch_size]
        images = photographs.normalize(digits.train.pixels[index])  # as torchvision's weights expect
        ce, at = losses(student, teacher, images, digits.train.labels[index])
        optimizer.zero_grad()
        (ce + opt.beta * sum(at.values())).backward()
        optimizer.step()
        if step % 5 == 0 or step == opt.steps - 1:
            print(f'step {step}: ce {ce:.3f}', *(f'{name} {value:.2e}' for name, value in at.items()))


if __name__ == '__main__':
    run(main)
