"""The recipes of README.md run as they are written, on real image files; only sizes and epochs are smaller."""

import pathlib
import re
import shlex

import pytest
import torch
import torchvision
from conftest import refused, write_photographs

import checkpoint
import cifar
import finetune
import imagenet
from engine.log import read_log
from images import memory

ROOT = pathlib.Path(cifar.__file__).parent
SCRIPTS = {f'{module.__name__}.py': module for module in (cifar, imagenet, finetune, checkpoint)}
SMALL = {  # added to a command
    'finetune.py': '--image_size 32 --nthread 0 --batch_size 8',
    'imagenet.py': '--image_size 32 --nthread 0 --batch_size 8 --epochs 1 --epoch_step [] --width 0.0625',
    'checkpoint.py': '',
}


def commands(title):
    """The commands of the README below a recipe's title, up to the next recipe."""
    text = (ROOT / 'README.md').read_text(encoding='utf-8').split(f'**{title}')[1]
    blocks = re.findall(r'```\n(.*?)```', re.split(r'\n\*\*|\n## ', text)[0], re.S)
    return [line for block in blocks for line in block.splitlines()]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """torchvision's cache with a ResNet-18 of random weights in place of the trained one, which does not diverge."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'hub'))
    cache = tmp_path / 'hub' / 'hub' / 'checkpoints'
    cache.mkdir(parents=True)
    url = torchvision.models.get_model_weights('resnet18').DEFAULT.url
    network = torchvision.models.resnet18()
    for name, value in network.named_parameters():
        if name.endswith('bn2.weight'):
            value.data.fill_(0.2)  # with 1, activations grow from block to block, and some runs diverge
    torch.save(network.state_dict(), cache / url.rsplit('/')[-1])


def test_ones_own_resnet_teaches_on_ones_own_photographs(script, tmp_path, hub):
    torch.manual_seed(0)
    root = write_photographs(tmp_path / 'photos')
    torch.save(torchvision.models.resnet50(num_classes=2).state_dict(), 'my_resnet50.pth')
    (tmp_path / 'holiday.jpg').write_bytes((root / 'val' / 'ant' / '00.JPEG').read_bytes())
    lines, scores = commands('Your own ResNet'), []
    assert len(lines) == 5
    for line in lines:
        _, name, *words = shlex.split(line)
        epochs = '--epochs 1 --epoch_step []' if '--save' in words and name == 'finetune.py' else ''
        status, out, err = script(SCRIPTS[name], words, SMALL[name], epochs)
        assert status == 0, (line, err)
        scores += re.findall(r'^top-1 (\S+)%', out, re.M)
    assert re.fullmatch(r'holiday.jpg: (ant|bee) \d+.\d\d%, (ant|bee) \d+.\d\d%\n', out)
    (record,) = read_log('logs/photos/log.txt')
    assert record['beta'] == 1000 and record['at2'] > 0 and record['classes'] == ['ant', 'bee']
    assert len(scores) == 2 and scores[1] == f'{record["test_acc"][0]:.2f}'


def test_a_student_of_the_published_teacher_meets_its_teacher(script, monkeypatch):
    """Up to the comparison with its log: without a download, noise takes the place of CIFAR-10."""
    pixels = torch.randint(256, (64, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = memory.Images(pixels, torch.arange(64) % 10)
    monkeypatch.setitem(
        memory.DATASETS, 'CIFAR10', lambda **_: memory.Dataset(images, images, list('0123456789'), True)
    )
    (line,) = commands('A student of a published teacher')
    _, name, *words = shlex.split(line)
    published = ROOT / 'logs' / words[words.index('--teacher_id') + 1]
    assert (published / 'model.pt7').is_file()
    words[words.index('--teacher_id') + 1] = str(published)
    assert refused(script(SCRIPTS[name], words), 'on the test images, but 87.69% by its own log')
