"""Students of the authors' imagenet.py: read, folded, exported, and teachers of ours."""

import os

import pytest
import torch
import torchvision
from conftest import VNNI, refused
from test_imagenet import folder, train  # noqa: F401

import checkpoint
import imagenet_resnet
from formats import networks
from formats.torchvision import from_torchvision


def authors_student(blocks, classes=6, stats_apart=True):
    """A student as the authors' imagenet.py makes and saves it, and the same network of torchvision's classes."""
    torch.manual_seed(0)
    network = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, blocks, num_classes=classes).eval()
    for layer in (network.layer2, network.layer3, network.layer4):
        layer[0].downsample[1] = torch.nn.Identity()  # its shortcuts have no batch norm
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.8, 1.2) if name.endswith('var') else buffer.normal_(0, 0.1)
    params = {f'student.{k}': v for k, v in from_torchvision(network.state_dict()).items()}
    params |= {
        f'teacher.{k}': v
        for k, v in imagenet_resnet.fold_batch_norm(imagenet_resnet.imagenet_resnet(18, 0.125, 6)[1]).items()
    }
    stats = {k: params.pop(k) for k in [*params] if stats_apart and 'running' in k}
    return network, {'params': params, 'stats': stats, 'epoch': 100}


AUTHORS = pytest.mark.parametrize(
    'depth, blocks, said', [(18, [2, 2, 2, 2], 'ResNet-18, '), (34, [3, 4, 6, 5], 'ResNet-34, 3-4-6-5 blocks, ')]
)


@pytest.mark.slow
@AUTHORS
def test_students_of_the_authors_are_read_folded_and_exported(script, depth, blocks, said):
    network, state = authors_student(blocks)
    torch.save(state, 'model.pt7')
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(images)

    def assert_near(logits):
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()

    f, params = networks.load_teacher('model.pt7')
    assert f'{said}shortcuts without batch norm, 6 classes, widths 64/' in script(checkpoint, 'info model.pt7')[1]
    assert_near(f(images, params, False)[0])
    assert_near(f(images, networks.fold(params), False)[0])
    for to in ('upstream', 'safetensors', 'hkl'):
        status, out, err = script(checkpoint, f'export model.pt7 {to} --to {to}')
        assert status == 0 and said in out, err
        assert_near(f(images, networks.load_teacher(to)[1], False)[0])
    for file in ('model.pt7', 'upstream'):
        result = script(checkpoint, f'export {file} {file}.pth --to torchvision')
        if depth == 34:
            assert refused(result, "torchvision's resnet34 has 3-4-6-3 blocks, not 3-4-6-5; --to upstream")
            assert not os.path.exists(f'{file}.pth')
        else:
            usual = torchvision.models.resnet18(num_classes=6).eval()
            usual.load_state_dict(torch.load(f'{file}.pth'), strict=True)
            with torch.no_grad():
                assert_near(usual(images))


@AUTHORS
@pytest.mark.parametrize(
    'flags', ['--transfer full', pytest.param('--teacher_dtype int8', marks=VNNI), '--transfer gradient']
)
def test_students_of_the_authors_teach(train, depth, blocks, said, flags):
    torch.save(authors_student(blocks, stats_apart=False)[1], 'model.pt7')
    status, _, err = train('--epochs 1 --teacher_params model.pt7 --beta 10 --alpha 0.5', flags)
    assert status == 0, err
