"""--evaluate: the score of a saved network, on the data named in its own log."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import HANGS, draw, refused
from test_workers import ENVIRONMENT
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import cifar
import finetune
import imagenet
import resnet
from engine.evaluate import evaluate
from engine.log import read_log
from engine.step import FLUSH
from engine.student import Network
from formats import networks, write


def scores(out):
    return json.loads(out.splitlines()[-1])


class Calls(TorchDispatchMode, list):
    """The names of the operators that are called within it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.append(str(function))
        return function(*args, **kwargs or {})


def test_a_run_scores_what_its_log_says(script, train, photos):
    assert train('--epochs 2 --lr 0.05 --holdout 6 --dtype bfloat16 --save logs/run')[0] == 0
    last = read_log('logs/run/log.txt')[-1]
    status, out, err = script(cifar, '--evaluate logs/run --json --dataroot', [photos])
    assert status == 0 and 'logs/run/model.pt7: WRN-10-0.25, 3 classes' in out, err
    found = scores(out)
    assert found['top1'] == last['test_acc'] and found['loss'] == pytest.approx(last['test_loss'], rel=1e-6)
    assert found['images'] == last['test_images'] == 6 and found['images_per_second'] > 0
    assert f'top-1 {last["test_acc"]:.2f}%' in out and 'note: without --save' not in out
    assert "dtype='bfloat16'" in out and 'depth=' not in out  # the network has a shape of its own
    whole = scores(script(cifar, '--evaluate logs/run --json --holdout 0 --dataroot', [photos])[1])  # the flag wins
    assert whole['images'] == 21
    file = (
        '--dataset folder --image_size 16 --holdout 6 --dtype bfloat16 --evaluate logs/run/model.pt7 --json --dataroot'
    )
    assert scores(script(cifar, file, [photos])[1])['top1'] == found['top1']


def test_the_host_waits_once_for_many_batches():
    f, params = resnet.wide_resnet(10, 0.25, 10)
    torch.manual_seed(0)
    batches = [(torch.randn(n, 3, 8, 8), torch.randint(10, (n,)), n) for n in (3,) * 2 * FLUSH + (1,)]
    with Calls() as calls:
        loss, (top1, top5) = evaluate(Network(f, params), batches, torch.device('cpu'), topk=(1, 5))
    assert calls.count('aten.topk.default') == 3 and 'aten._local_scalar_dense.default' not in calls
    with torch.no_grad():
        logits = [f(images, params, False)[0] for images, *_ in batches]
    losses = [F.cross_entropy(y, sample[1], reduction='sum').item() for y, sample in zip(logits, batches)]
    logits, labels = torch.cat(logits), torch.cat([sample[1] for sample in batches])
    right = (logits.topk(5)[1] == labels[:, None]).cumsum(1).sum(0)
    assert loss == sum(losses) / len(labels)
    assert [top1, top5] == pytest.approx([100 * int(right[k]) / len(labels) for k in (0, 4)])


def test_a_network_of_another_script_is_noted(script, train, photos):
    assert train('--epochs 1 --save logs/run')[0] == 0
    assert 'note: networks like' not in script(cifar, '--evaluate logs/run --dataroot', [photos])[1]
    for module in (imagenet, finetune):
        words = '--image_size 32 --nthread 0 --evaluate logs/run --dataroot', [photos]
        status, out, err = script(module, *words, *(['--dataset folder'] if module is finetune else []))
        said = 'are trained by cifar.py, which crops and normalises images in another way\n'
        assert status == 0 and f'note: networks like logs/run/model.pt7 {said}' in out, err
    words = '--image_size 32 --nthread 0 --width 0.0625 --batch_size 8 --epochs 1 --epoch_step [] --lr 0.01'
    status, out, err = script(imagenet, words, '--alpha 0.9 --teacher_params logs/run --dataroot', [photos])
    assert status == 0 and f'note: networks like logs/run {said}' in out, err


@pytest.mark.parametrize('size', [True, 99999999999999, 10**400, '16; rm', 'x', None])
def test_what_a_log_has_wrong_is_not_taken(script, train, photos, size):
    assert train('--epochs 1 --save logs/run')[0] == 0
    (record,) = read_log('logs/run/log.txt')
    with open('logs/run/log.txt', 'w', encoding='utf-8') as log:
        log.write(f'json_stats: {json.dumps({**record, "image_size": size, "dtype": "float9"})}\n')
    status, out, err = script(cifar, '--evaluate logs/run/model.pt7 --dataroot', [photos])
    assert status == 0 and 'image_size=32' in out and '21 images' in out, err


def test_photographs_are_scored_by_the_scripts_that_train_on_them(script, tmp_path):
    root, rng = tmp_path / 'photos', np.random.default_rng(0)
    for part, count in (('train', 6), ('val', 5)):
        for label, name in enumerate('ab'):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                cv2.imwrite(str(root / part / name / f'{i}.jpg'), draw(rng, label, (40 + i, 50)))
    small = '--image_size 32 --batch_size 4 --nthread 0 --epochs 1 --epoch_step []'
    assert script(imagenet, small, '--width 0.0625 --save logs/run --imagenetpath', [root])[0] == 0
    last = read_log('logs/run/log.txt')[-1]
    for module, flag in ((imagenet, '--imagenetpath'), (finetune, '--dataset folder --dataroot')):
        status, out, err = script(module, '--evaluate logs/run --nthread 0 --json', flag, [root])
        assert status == 0, err
        assert [scores(out)[f'top{k}'] for k in (1, 2)] == last['test_acc']
    assert refused(script(cifar, '--dataset digits --evaluate logs/run --image_size 32'), '2 output classes', '10')
    for i, file in enumerate(sorted(root.glob('val/*/*'))):
        file.write_text('no image')
        if i == 2:
            _, out, _ = script(
                imagenet, '--evaluate logs/run --nthread 0 --json --skip_bad_images --imagenetpath', [root]
            )
            assert scores(out)['images'] == 7 and ', 7 images, ' in out
    status, _, err = script(imagenet, '--evaluate logs/run --nthread 0 --skip_bad_images --imagenetpath', [root])
    assert status == 2 and err.endswith('imagenet.py: error: no test image can be read\n')


@pytest.mark.parametrize(
    'flags, words',
    [
        ('--json', '--json goes with --evaluate'),
        ('--evaluate nowhere', '--evaluate nowhere: no such checkpoint'),
        ('--evaluate text.pt7', 'text.pt7'),
        ('--evaluate text.pt7 --save logs/x', '--save is for training'),
        ('--evaluate text.pt7 --beta 1 --teacher_id x', '--beta is for training'),
    ],
)
def test_what_cannot_be_scored_is_refused(script, tmp_path, flags, words):
    (tmp_path / 'text.pt7').write_text('no network')
    assert refused(script(cifar, '--dataset digits', flags), words)


def test_two_workers_score_as_one(script, train, photos, tmp_path):
    assert train('--epochs 1 --save logs/run')[0] == 0
    words = '--evaluate', 'logs/run', '--json', '--dataroot', str(photos)
    one = scores(script(cifar, words)[1])
    command, pipes = [sys.executable, cifar.__file__, *words, '--ngpu', '2'], {'capture_output': True, 'text': True}
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, timeout=HANGS, **pipes)
    assert done.returncode == 0, done.stderr
    two = scores(done.stdout)
    assert one['top1'] == two['top1'] and one['loss'] == pytest.approx(two['loss'], rel=1e-6)


def test_an_output_that_is_not_finite_is_no_score(script, train, photos):
    """Finite weights can overflow."""
    assert train('--epochs 1 --save logs/run')[0] == 0
    state = networks.load('logs/run/model.pt7')
    write.save('loud.pt7', {'params': {k: v * 1e38 if k == 'conv0' else v for k, v in state['params'].items()}})
    words = '--dataset folder --image_size 16 --evaluate loud.pt7 --json --dataroot'
    status, out, err = script(cifar, words, [photos])
    assert status == 1 and 'loud.pt7: the test loss is not finite' in err and err.count('\n') == 1 and 'NaN' not in out
    status, out, err = script(checkpoint, 'predict loud.pt7', [photos / 'test' / 'ant' / '0.png'])
    assert status == 1 and not out and '0.png: the output of the network is not finite' in err


def test_a_folder_without_a_network_hides_no_run_of_its_name(script, train, photos, tmp_path):
    assert train('--epochs 1 --save logs/run')[0] == 0
    (tmp_path / 'run').mkdir()
    assert script(cifar, '--evaluate run --dataroot', [photos])[0] == 0


def test_a_network_that_cannot_be_read_is_reported_before_data_are_read(script, tmp_path):
    (tmp_path / 'bad.pt7').write_bytes(b'x' * 99)
    (tmp_path / 'logs' / 'students').mkdir(parents=True)
    assert refused(script(cifar, '--dataroot nowhere --evaluate bad.pt7'), 'bad.pt7 is not a checkpoint')
    assert refused(script(cifar, '--dataroot nowhere --evaluate student'), 'no such checkpoint; logs/ holds students')
    assert refused(script(cifar, '--dataroot nowhere', '--evaluate='), '--evaluate is empty')


def test_a_run_without_the_flag_logs_an_empty_name_as_older_runs_did(train):
    assert train('--epochs 1 --save logs/run')[0] == 0
    assert read_log('logs/run/log.txt')[0]['evaluate'] == ''
