"""checkpoint.py predict: the classes of image files, as a test of the same network counts them."""

import json
import os

import pytest
import torch
from conftest import refused, write_photographs

import checkpoint
import imagenet
from engine import predict
from engine.log import read_log
from formats import networks, write
from images import memory
from images.decode import read_image
from images.folders import find_images


def predictions(out):
    return [json.loads(line) for line in out.splitlines()]


def test_a_small_network_predicts_what_its_log_counted(script, train, photos):
    assert train('--epochs 3 --epoch_step [] --lr 0.05 --save logs/run')[0] == 0
    last = read_log('logs/run/log.txt')[-1]
    assert last['classes'] == ['ant', 'bee', 'cat'] == networks.load('logs/run/model.pt7')['classes']
    names, files = find_images(photos, 'test')
    assert script(checkpoint, 'slim logs/run')[0] == 0
    os.unlink('logs/run/log.txt')  # the checkpoint alone has names and size
    status, out, err = script(checkpoint, 'predict run --json', [path for path, _ in files])
    assert status == 0, err
    found = predictions(out)
    right = [best['classes'][0]['class'] == names[label] for best, (_, label) in zip(found, files)]
    assert 100 * sum(right) / len(files) == pytest.approx(last['test_acc'])
    assert all(sum(c['probability'] for c in best['classes']) == pytest.approx(1, abs=1e-5) for best in found)
    best = found[0]['classes'][0]
    f, params, classes, size = predict.open_network('logs/run')  # as docs/own-code.md has it
    pixels = torch.from_numpy(memory.square(read_image(files[0][0]), size))[None]
    logits, groups = f(predict.normalized(pixels, imagenet=False), params, False)
    assert classes[logits.argmax()] == best['class'] and len(groups) == 3
    out = script(checkpoint, 'predict logs/run --top 1', [files[0][0]])[1]
    assert out == f'{files[0][0]}: {best["class"]} {100 * best["probability"]:.2f}%\n'


def test_photographs_are_predicted_with_the_names_of_the_log(script, tmp_path):
    root = write_photographs(tmp_path / 'photos')
    small = '--image_size 32 --batch_size 8 --nthread 0 --epochs 2 --epoch_step [] --width 0.0625'
    assert script(imagenet, small, '--save logs/run --dataroot', [root])[0] == 0
    last = read_log('logs/run/log.txt')[-1]
    names, files = find_images(root, 'val')
    state = networks.load('logs/run/model.pt7')
    write.save('logs/run/model.pt7', {'params': state['params']})  # as in older checkpoints
    status, out, err = script(checkpoint, 'predict logs/run/model.pt7 --json', [path for path, _ in files])
    assert status == 0, err
    right = [b['classes'][0]['class'] == names[label] for b, (_, label) in zip(predictions(out), files)]
    assert 100 * sum(right) / len(files) == pytest.approx(last['test_acc'][0])


def test_files_that_cannot_be_read_are_named_and_the_others_go_on(script, train, photos, tmp_path):
    assert train('--epochs 1 --save logs/run')[0] == 0
    (tmp_path / 'broken.jpg').write_bytes(b'\xff\xd8\xff nothing')
    good = photos / 'test' / 'ant' / '0.png'
    status, out, err = script(checkpoint, 'predict run', ['broken.jpg', good, 'none.png', good])
    assert status == 1 and out.count('\n') == 2 and out.startswith(f'{good}: ')
    lines = err.splitlines()
    assert len(lines) == 2 and 'broken.jpg is not a readable image' in lines[0] and 'none.png' in lines[1]


@pytest.mark.parametrize('classes', [['a'], 'abc', ['a', 2, 'c'], {}, None])
def test_names_that_do_not_fit_are_replaced_by_numbers(script, train, photos, classes):
    assert train('--epochs 1 --save logs/run')[0] == 0
    state = networks.load('logs/run/model.pt7')
    write.save('other.pt7', {**state, 'classes': classes, 'image_size': '16; rm'})
    status, out, err = script(checkpoint, 'predict other.pt7 --json', [photos / 'test' / 'ant' / '0.png'])
    assert status == 0 and sorted(c['class'] for c in predictions(out)[0]['classes']) == ['0', '1', '2'], err


def test_the_published_networks_name_the_classes_of_cifar_10(script, photos):
    published = os.path.join(os.path.dirname(checkpoint.__file__), 'logs', 'cifar10-e16', 'wrn-16-2-s0')
    status, out, err = script(checkpoint, 'predict', [published, photos / 'test' / 'ant' / '0.png'], '--top 10')
    assert status == 0 and 'airplane' in out and 'truck' in out, err


def test_hostile_names_print_as_plain_text(script, train, photos):
    assert train('--epochs 1 --save logs/run')[0] == 0
    state = networks.load('logs/run/model.pt7')
    write.save('other.pt7', {**state, 'classes': ['\x1b[2J', 'long' * 999, '\udcff']})
    status, out, err = script(checkpoint, 'predict other.pt7', [photos / 'test' / 'ant' / '0.png'])
    assert status == 0 and '\x1b' not in out and len(out) < 1000, err
    assert refused(script(checkpoint, 'predict none.pt7', [photos / 'test' / 'ant' / '0.png']), 'none.pt7')
