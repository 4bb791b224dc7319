"""plot.py as a command: the files that it writes, and what it refuses."""

import resource
import xml.dom.minidom

import cv2
import numpy as np
import pytest
import torch
from conftest import refused
from test_plot import log, ours  # noqa: F401

import imagenet_resnet
import nin
import plot
import resnet
from formats import write


def small_network(seed=0, kind=resnet.wide_resnet, shape=(10, 0.25, 10)):
    torch.manual_seed(seed)
    return kind(*shape)


@pytest.fixture
def model(tmp_path):
    """Save a network as a run: model(name, f_and_params) -> its folder."""

    def save(name, network):
        (tmp_path / name).mkdir()
        write.save(tmp_path / name / 'model.pt7', {'params': {k: v.detach() for k, v in network[1].items()}})
        return tmp_path / name

    return save


IMAGENET = {'kind': imagenet_resnet.imagenet_resnet, 'shape': (18, 1 / 16, 10)}


def texts(figure):
    return [text.get_text() for text in figure.texts]


def overlays(figure):
    """The map layers of a figure, in the order group, network, row."""
    return [axes.images[1].get_array() for axes in figure.axes if len(axes.images) == 2]


def test_a_label_of_any_characters_makes_a_picture_that_can_be_read(script, log):
    paths = [log(name, [ours(1), ours(2)]) for name in 'ab']
    labels = ['--label', 'a\x01b --> c', '--label', '<&$\n']
    status, _, err = script(plot, 'curves', paths, labels, '--out curves.svg')
    assert status == 0 and not err
    assert xml.dom.minidom.parse('curves.svg')


def test_both_commands_write_both_kinds_of_picture_and_the_same_svg_twice(script, log, model, tmp_path):
    run, network = log('run', [ours(1), ours(2)]), model('net', small_network())
    attention = ['attention', '--model', network, '--model', network, '--images', 'digits', '--count', 1]
    for name, command in (('curves', ['curves', run]), ('attention', [*attention, '--image_size', 16])):
        status, out, err = script(plot, command)
        assert (status, out, err) == (0, f'picture: {name}.png\n', '')
        assert cv2.imread(f'{name}.png').shape[1] == plot.WIDTH * plot.DPI
        for again in 'ab':
            assert script(plot, command, f'--out {again}.SVG')[0] == 0
        content = (tmp_path / 'a.SVG').read_bytes()
        assert content.startswith(b'<?xml') and len(content) > 10_000
        assert content == (tmp_path / 'b.SVG').read_bytes()
    layers = content.count(b'<image')  # joined to one image, matplotlib would apply the transparency of the map twice
    assert layers == 1 + 3 * 2 * 2 + 1


def test_the_caption_names_both_models_and_what_they_are(script, model, monkeypatch):
    figures = []
    monkeypatch.setattr(plot, 'write', lambda figure, out: figures.append(figure))
    model('big', small_network(shape=(16, 1, 10)))
    model('thin', small_network(kind=nin.nin, shape=(0.125, 10)))
    assert script(plot, 'attention --model big --model thin/model.pt7 --images digits --count 1')[0] == 0
    assert script(plot, 'attention --model big --model thin --model big --images digits --count 1')[0] == 0
    labels = ['--label', 'A', '--label', 'student, AT', '--label', 'B']
    assert script(plot, 'attention --model big --model thin --model big --images digits', labels)[0] == 0
    assert texts(figures[1]).count('student 2') == 3 and texts(figures[2])[1].startswith('student, AT: thin, NIN')
    words = texts(figures[0])
    assert words[:2] == ['teacher: big, WRN-16-1, 10 classes', 'student: thin, NIN-0.125, 10 classes']
    assert words.count('teacher') == words.count('student') == 3 and 'group 2' in words


def test_power_and_mapping_are_those_of_the_flags(script, model, monkeypatch):
    figures, network = [], small_network()
    monkeypatch.setattr(plot, 'write', lambda figure, out: figures.append(figure))
    model('net', network)
    flags = '--images digits --count 1 --image_size 16'
    for more, how in (('', (2, 'sum')), ('--power 3', (3, 'sum')), ('--mapping max --power 1', (1, 'max'))):
        assert script(plot, 'attention --model net --model net', flags, more)[0] == 0
        maps = plot.attention_maps(*network, plot.load_images('digits', '.', 1, 16, False), *how)
        np.testing.assert_allclose(overlays(figures[-1])[0], maps[0][0], rtol=1e-5)  # group 0 is as large as the image


def test_what_is_no_pair_of_networks_is_refused(script, model, photos, tmp_path):
    model('net', small_network())
    model('deep', small_network(**IMAGENET))
    f, params = small_network()
    model('loud', (f, {**params, 'conv0': params['conv0'] * 1e15}))
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / '1.png').write_bytes(b'not an image')
    images = ['--images', photos / 'test']
    assert refused(
        script(plot, 'attention --model net', images), 'give --model two or three times, the teacher first; 1 found'
    )
    assert refused(script(plot, 'attention', '--model net ' * 4, images), '4 found')
    wrong = script(plot, 'attention --model net --model net --label one', images)
    assert refused(wrong, '--label: 1 labels for 2 models')
    wrong = script(plot, 'attention --model deep --model net --image_size 32', images)
    assert refused(wrong, 'the teacher has 4 groups, a student 3')
    assert refused(script(plot, 'attention --model net --model empty', images), 'empty/model.pt7')
    assert refused(script(plot, 'attention --model net --model net --images empty'), 'empty holds no images')
    assert refused(script(plot, 'attention --model net --model net --images nowhere'), 'nowhere: no such folder')
    assert refused(script(plot, 'attention --model net --model net --images broken'), 'broken/1.png')
    assert refused(script(plot, 'attention --model loud --model net --power 4', images), 'group 0 is not finite')
    assert not (tmp_path / 'attention.png').exists()


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        ('', 'COMMAND'),
        ('curves', 'LOG'),
        ('curves nowhere', 'nowhere: no such log'),
        ('curves .', './log.txt: no such log'),
        ('curves nowhere --out curves.jpg', "'curves.jpg' ends neither in .png nor in .svg"),
        ('curves nowhere --out curves', 'ends neither'),
        ('curves nowhere --out no/curves.png', "no folder 'no'"),
        ('attention --images digits', '--model'),
        ('attention --model a --model b', '--images'),
        ('attention --model a --model b --images digits --out a.pdf', 'ends neither'),
        ('attention --model a --model b --images digits --count 0', 'out of range'),
        ('attention --model a --model b --images digits --power 0', 'out of range'),
        ('attention --model a --model b --images digits --mapping mean', '--mapping'),
    ],
)
def test_wrong_use_is_refused_before_any_work(script, flags, words):
    assert refused(script(plot, flags), words)


def test_a_folder_named_like_a_picture_is_refused(script, tmp_path):
    (tmp_path / 'a.png').mkdir()
    assert refused(script(plot, 'curves nowhere --out a.png'), "'a.png' is a folder")


def test_a_picture_that_cannot_be_written_leaves_the_one_before(script, log, tmp_path):
    run = log('run', [ours(1)])
    (tmp_path / 'curves.png').write_bytes(b'before')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # the system refuses longer files from here on
    try:
        status, _, err = script(plot, ['curves', run])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1 and err.count('\n') == 1 and 'curves.png could not be written' in err
    assert not list(tmp_path.glob('*.tmp'))
    assert (tmp_path / 'curves.png').read_bytes() == b'before'
