"""Curves show what the logs say, attention maps what the networks compute, and both are legible."""

import json
import math
import resource

import cv2
import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused

import imagenet_resnet
import nin
import plot
import resnet
import utils
from formats import write
from images import crops, decode, memory, photographs

NAN = math.nan


def ours(epoch, **more):
    """A line of one of our logs: AT and KD, with a rate that drops at the start of epochs 3 and 5."""
    settings = {'epoch': epoch, 'epoch_step': '[3,5,60]', 'lr': 0.1, 'beta_now': 1000.0, 'at_losses': [[9.0, 0.1]]}
    results = {'train_loss': 2.0, 'test_loss': 1.0, 'train_acc': 50.0 + epoch, 'test_acc': 60.0 + epoch}
    return {**settings, **results, 'ce': 1.0 / epoch, 'kd': 2.0 / epoch, 'at1': 1e-4 / epoch, **more}


def authors(epoch, **more):
    """A line of a log of the authors' imagenet.py: accuracies are pairs, terms have no names."""
    return {
        'epoch': epoch, 'epoch_step': '[3]', 'lr': 0.1, 'train_loss': 2.0, 'test_loss': 1.0,
        'train_acc': [40.0 + epoch, 80.0], 'test_acc': [45.0 + epoch, 85.0],
        'at_losses': [[1e-5 * epoch, 1e-7], [NAN, NAN], [0.0, 0.0]], **more,
    }  # fmt: skip


@pytest.fixture
def log(tmp_path):
    """Write a run's log: log(name, records) -> its folder."""

    def write(name, records):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / 'log.txt').write_text(''.join(f'json_stats: {json.dumps(r)}\n' for r in records))
        return str(folder)

    return write


def lines(axes, style):
    return [line for line in axes.get_lines() if line.get_linestyle() == style]


def drops(axes):
    return {line.get_xdata()[0]: line.get_color() for line in lines(axes, ':')}


def panels(figure):
    return {axes.get_title(): axes for axes in figure.axes}


# ----------------------------------------------------------------------------------------------------------- curves


def test_errors_are_100_minus_the_accuracies_of_both_kinds_of_log(log):
    paths = [log('a', [ours(e) for e in range(1, 8)]), log('b', [authors(e) for e in range(1, 5)])]
    axes = panels(plot.draw_curves(paths))['error']
    (test_a, test_b), (train_a, train_b) = lines(axes, '-'), lines(axes, '--')
    assert list(test_a.get_xdata()) == list(range(1, 8)) and list(test_b.get_xdata()) == list(range(1, 5))
    assert list(test_a.get_ydata()) == [40 - e for e in range(1, 8)]
    assert list(train_a.get_ydata()) == [50 - e for e in range(1, 8)]
    assert list(test_b.get_ydata()) == [55 - e for e in range(1, 5)]  # top-1
    assert list(train_b.get_ydata()) == [60 - e for e in range(1, 5)]
    assert test_a.get_color() == train_a.get_color() != test_b.get_color() == train_b.get_color()
    assert test_a.get_linewidth() > train_a.get_linewidth()


def test_the_last_errors_of_all_runs_are_within_the_axis(log):
    falling = [ours(e, test_acc=100 - max(90 - 20 * e, 8), train_acc=100 - max(90 - 20 * e, 0.1)) for e in range(1, 9)]
    axes = panels(plot.draw_curves([log('a', falling), log('b', [ours(1, test_acc=90, train_acc=95)])]))['error']
    low, high = axes.get_ylim()
    assert 0 <= low <= 0.1 and 10 < high < 70  # the first epochs lie above


def test_each_named_term_has_a_logarithmic_panel_in_order(log):
    more = {'full0': 0.1, 'at0': 0.2, 'grad': 0.3, 'min_l2': 0.4, 'symmetry': 0.5, 'beta_now': 1.0, 'attempt1': 1.0}
    path = log('a', [ours(e, **more) for e in (1, 2)])
    shown = panels(plot.draw_curves([path]))
    terms = ['ce', 'kd', 'at0', 'at1', 'full0', 'grad', 'symmetry', 'min_l2']
    assert list(shown) == ['error'] + [f'loss term {name}' for name in terms]
    assert all(axes.get_yscale() == 'log' for name, axes in shown.items() if name != 'error')
    (line,) = lines(shown['loss term ce'], '-')
    assert list(line.get_ydata()) == [1.0, 0.5]


def test_the_terms_of_an_authors_log_are_the_means_of_its_at_losses_where_they_are_numbers(log):
    shown = panels(plot.draw_curves([log('a', [authors(e) for e in (1, 2, 3)])]))
    assert list(shown) == ['error', 'loss term at0']  # the others are NaN, or 0, which a logarithmic axis cannot show
    assert list(lines(shown['loss term at0'], '-')[0].get_ydata()) == [1e-5 * e for e in (1, 2, 3)]
    alone = [authors(e, at_losses=[[NAN, NAN]] * 3) for e in (1, 2)]
    assert list(panels(plot.draw_curves([log('b', alone)]))) == ['error']


def test_the_lowest_panel_of_each_column_names_its_axis_and_no_tick_covers_another(log):
    """With five terms the second column has one panel less; a term that falls far has one tick per decade."""
    more = {'at0': 0.2, 'at2': 0.3}
    figure = plot.draw_curves([log('a', [ours(e, **more, kd=10.0 ** (1 - e)) for e in range(1, 7)])])
    named = {title for title, axes in panels(figure).items() if axes.get_xlabel()}
    assert named == {'error', 'loss term at1', 'loss term at2'}
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [tick.label1.get_window_extent() for tick in axes.yaxis.get_major_ticks() if tick.label1.get_text()]
        boxes = [box for box in boxes if axes.bbox.y0 <= box.y0 + box.height / 2 <= axes.bbox.y1]
        assert len(boxes) > 1 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_run_stands_only_in_the_panels_of_its_own_terms(log):
    student = [{k: v for k, v in ours(e).items() if k not in ('kd', 'at1')} for e in (1, 2)]
    shown = panels(plot.draw_curves([log('student', student), log('at', [ours(1), ours(2)])]))
    assert len(lines(shown['loss term ce'], '-')) == 2 and len(lines(shown['loss term kd'], '-')) == 1
    assert lines(shown['loss term kd'], '-')[0].get_color() == lines(shown['error'], '-')[1].get_color()


def test_a_value_that_is_not_finite_is_a_gap(log):
    values = [1.0, None, 3.0, NAN, 10**400]
    path = log('a', [ours(e, ce=v, test_acc=v) for e, v in enumerate(values, 1)])
    shown = panels(plot.draw_curves([path]))
    np.testing.assert_array_equal(lines(shown['error'], '-')[0].get_ydata(), [99, NAN, 97, NAN, NAN])
    np.testing.assert_array_equal(lines(shown['loss term ce'], '-')[0].get_ydata(), [1, NAN, 3, NAN, NAN])


def test_the_rate_drops_where_the_epoch_before_ends_and_only_within_the_run(log):
    figure = plot.draw_curves([log('a', [ours(e) for e in range(1, 8)])])
    assert all(set(drops(axes)) == {2, 4} for axes in figure.axes) and len(figure.axes) == 4


def test_a_drop_of_one_run_among_several_has_its_colour(log):
    paths = [log('a', [ours(e) for e in range(1, 8)]), log('b', [authors(e) for e in range(1, 5)])]
    axes = panels(plot.draw_curves(paths))['error']
    assert drops(axes) == {2: '0.3', 4: lines(axes, '-')[0].get_color()}


def test_of_a_repeated_epoch_the_last_line_counts(log):
    path = log('a', [ours(1), ours(3), ours(2, test_acc=1), ours(2, test_acc=70)])
    (line,) = lines(panels(plot.draw_curves([path]))['error'], '-')
    assert list(line.get_xdata()) == [1, 2, 3] and list(line.get_ydata()) == [39, 30, 37]


def test_a_single_epoch_can_be_seen(log):
    axes = panels(plot.draw_curves([log('a', [ours(1)])]))['error']
    assert all(line.get_marker() == '.' for line in lines(axes, '-') + lines(axes, '--'))
    assert all(tick % 1 == 0 for tick in axes.get_xticks())


def test_a_label_is_the_name_of_the_folder_and_the_last_test_error(log):
    path = log('cost_$5$', [ours(1), ours(2, test_acc=91.234)])
    for given in (path, path + '/', path + '/log.txt'):
        (legend,) = plot.draw_curves([given]).legends
        assert [text.get_text() for text in legend.get_texts()] == [r'cost_\$5\$ (8.77%)']


@pytest.mark.parametrize(
    ('paths', 'labels', 'names'),
    [
        (['logs/alone', 'logs/at/log.txt'], [], ['alone', 'at']),
        (['one/run', 'two/run'], [], ['one/run', 'two/run']),
        (['a', 'x' * 100], [], ['a', 'x' * 30 + '…' + 'x' * 30]),
        (['one/run', 'two/run'], ['AT', 'KD'], ['AT', 'KD']),
    ],
)
def test_runs_are_called_by_their_labels_or_by_their_folders(paths, labels, names):
    assert plot.names_of(paths, labels) == names


def test_a_label_for_each_log_stands_in_the_legend(script, log):
    paths = [log(name, [ours(1), ours(2)]) for name in ('a', 'b')]
    labels = ['--label', 'F-ActT, 5 $', '--label', 'KD']
    assert script(plot, 'curves', paths, labels, '--out curves.svg')[0] == 0
    words = open('curves.svg', encoding='utf-8').read()
    assert 'F-ActT, 5 $' in words and 'KD (' in words
    assert refused(script(plot, 'curves', paths, labels[:2]), '--label: 1 labels for 2 logs')


def test_ten_runs_look_different_and_no_text_leaves_the_picture_or_covers_another(log):
    paths = [log(f'run-{"abcdefghij"[i]}-with-a-rather-long-name-{i}', [ours(e) for e in (1, 2)]) for i in range(10)]
    figure = plot.draw_curves(paths)
    looks = {(h.get_color(), h.get_marker()) for h in figure.legends[0].get_lines()}
    assert len(looks) == 10
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.legends[0].get_texts()]
    boxes += [axes.get_tightbbox() for axes in figure.axes]
    assert all(figure.bbox.x0 <= b.x0 and b.x1 <= figure.bbox.x1 for b in boxes)
    assert all(figure.bbox.y0 <= b.y0 and b.y1 <= figure.bbox.y1 for b in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        ('', ['has no line of results']),
        ('no results here\n', ['has no line of results']),
        ('json_stats: {bad\njson_stats: {}\n', ['line 1', 'json_stats is not followed by a JSON object']),
        ('json_stats: {"test_acc": 90}\n', ['has a line without an epoch']),
        ('json_stats: {"epoch": [1], "test_acc": 90}\n', ['has a line without an epoch']),
        ('json_stats: {"epoch": 1, "train_acc": null}\n', ['neither train_acc nor test_acc']),
        ('json_stats: {"epoch": 1, "test_acc": 9, "epoch_step": "[6"}\n', ['epoch_step is not a JSON list']),
        ('json_stats: {"epoch": 1, "test_acc": 9, "epoch_step": 60}\n', ['epoch_step is not a JSON list']),
    ],
)
def test_a_log_without_results_is_refused_by_name(script, tmp_path, content, words):
    (tmp_path / 'some.txt').write_text(content)
    assert refused(script(plot, 'curves some.txt'), 'some.txt', *words)
    assert not (tmp_path / 'curves.png').exists()


# -------------------------------------------------------------------------------------------------------- attention


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
PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))


def groups_of(network, images):
    with torch.no_grad():
        return network[0](images, network[1], False)[1]


def texts(figure):
    return [text.get_text() for text in figure.texts]


def overlays(figure):
    """The map layers of a figure, in the order group, row, teacher and student."""
    return [axes.images[1].get_array() for axes in figure.axes if len(axes.images) == 2]


def test_the_layer_over_an_image_is_its_attention_map_upsampled():
    networks = small_network(1), small_network(2)
    maps = [plot.attention_maps(*network, PIXELS, 4, 'max') for network in networks]
    figure = plot.draw_attention(PIXELS, *maps, ['caption'])
    expected = []
    groups = [groups_of(network, memory.normalize(PIXELS)) for network in networks]
    for pair in zip(*groups):
        for row in range(2):
            for group in pair:
                small = utils.attention_map(group, 4, 'max')[row : row + 1, None]
                expected.append(F.interpolate(small, (32, 32), mode='bilinear', align_corners=False)[0, 0])
    assert len(overlays(figure)) == len(expected) == 12
    for layer, values in zip(overlays(figure), expected):
        np.testing.assert_allclose(layer, values, rtol=1e-6)
    inputs = [axes.images[0].get_array() for axes in figure.axes if len(axes.images) == 1][:2]
    assert all(np.array_equal(shown, pixels) for shown, pixels in zip(inputs, PIXELS))


def test_the_printed_cosines_are_those_of_the_maps():
    networks = small_network(1), small_network(2, shape=(10, 1, 10))
    figure = plot.draw_attention(PIXELS, *(plot.attention_maps(*network, PIXELS) for network in networks), [])
    expected = []
    for pair in zip(*(groups_of(network, memory.normalize(PIXELS)) for network in networks)):
        x, y = ((group.double() ** 2).sum(1).reshape(2, -1).numpy() for group in pair)
        expected += [f'cosine {a @ b / np.linalg.norm(a) / np.linalg.norm(b):.2f}' for a, b in zip(x, y)]
    assert [text for text in texts(figure) if text.startswith('cosine')] == expected
    assert len(set(expected)) > 2


def test_the_larger_map_is_average_pooled_to_the_smaller():
    small, large = torch.rand(2, 3, 4), torch.rand(2, 6, 8)
    pooled = large.reshape(2, 3, 2, 4, 2).mean((2, 4))
    expected = F.cosine_similarity(small.flatten(1), pooled.flatten(1))
    torch.testing.assert_close(plot.similarity(small, large), expected)
    torch.testing.assert_close(plot.similarity(large, small), expected)


def test_equal_networks_agree_everywhere():
    maps = plot.attention_maps(*small_network(), PIXELS)
    cosines = [text for text in texts(plot.draw_attention(PIXELS, maps, maps, [])) if text.startswith('cosine')]
    assert cosines == ['cosine 1.00'] * 6


def test_imagenet_networks_see_images_normalised_as_in_their_training():
    network = small_network(**IMAGENET)
    expected = [utils.attention_map(group) for group in groups_of(network, photographs.normalize(PIXELS))]
    for values, right in zip(plot.attention_maps(*network, PIXELS), expected):
        torch.testing.assert_close(values, right)


def test_looking_changes_no_network():
    f, params = small_network()
    before = {key: value.clone() for key, value in params.items()}
    plot.attention_maps(f, params, PIXELS)
    assert all(torch.equal(params[key], value) for key, value in before.items())


@pytest.mark.parametrize('imagenet', [False, True])
def test_no_text_of_an_attention_picture_leaves_it_or_covers_another(imagenet):
    maps = plot.attention_maps(*small_network(**(IMAGENET if imagenet else {})), PIXELS)
    figure = plot.draw_attention(PIXELS, maps, maps, ['Teacher: ' + 'm' * 60, 'Student: one'])
    with matplotlib.rc_context(plot.STYLE):
        figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.texts] + [axes.get_window_extent() for axes in figure.axes]
    assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= figure.bbox.x1 and b.y1 <= figure.bbox.y1 for b in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_picks_are_spread_over_classes():
    assert plot.spread([1, 0, 1, 0, 2, 0], 3) == [1, 0, 4]
    assert plot.spread([1, 0, 1, 0, 2, 0], 9) == [1, 0, 4, 3, 2, 5]
    digits = memory.load('digits', image_size=8).test
    pixels = plot.load_images('digits', '.', 10, 8, False)
    assert all(torch.equal(pixels[c], digits.pixels[digits.labels == c][0]) for c in range(10))


def test_a_folder_gives_the_first_images_of_each_of_its_folders(photos):
    first = [sorted((photos / 'test' / name).iterdir())[0] for name in ('ant', 'bee', 'cat')]
    pixels = plot.load_images(str(photos / 'test'), '.', 3, 16, imagenet=True)
    assert all(np.array_equal(shown, crops.test_crop(path, 16)) for shown, path in zip(pixels, first))
    pixels = plot.load_images(str(photos / 'test' / 'ant'), '.', 9, None, imagenet=False)
    assert pixels.shape == (7, 32, 32, 3)
    assert np.array_equal(pixels[0], crops.resize(decode.read_image(first[0]), 32, 32))  # all of it, not its centre


def test_hidden_files_are_not_looked_at(photos, tmp_path):
    for name in ('._0.png', '.thumbnails/0.png', '__MACOSX/0.png', 'b/0.png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((photos / 'test' / 'ant' / '0.png').read_bytes() if name == 'b/0.png' else b'')
    assert plot.load_images(str(tmp_path), '.', 9, 16, imagenet=False).shape == (1, 16, 16, 3)


def test_the_default_size_is_that_of_the_network(photos):
    assert plot.load_images(str(photos), '.', 1, None, imagenet=True).shape == (1, 224, 224, 3)
    assert plot.load_images('digits', '.', 1, None, imagenet=False).shape == (1, 32, 32, 3)


# ---------------------------------------------------------------------------------------------------------- command


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
    layers = content.count(b'<image')  # in a joined image, matplotlib would apply the transparency of the map twice
    assert layers == 1 + 3 * 2 * 2 + 1


def test_the_caption_names_both_models_and_what_they_are(script, model, monkeypatch):
    figures = []
    monkeypatch.setattr(plot, 'write', lambda figure, out: figures.append(figure))
    model('big', small_network(shape=(16, 1, 10)))
    model('thin', small_network(kind=nin.nin, shape=(0.125, 10)))
    assert script(plot, 'attention --model big --model thin/model.pt7 --images digits --count 1')[0] == 0
    words = texts(figures[0])
    assert words[:2] == ['Teacher: big, WRN-16-1, 10 classes', 'Student: thin, NIN-0.125, 10 classes']
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
    assert refused(script(plot, 'attention --model net', images), 'give --model twice, the teacher first; 1 found')
    assert refused(script(plot, 'attention --model net --model net --model net', images), '3 found')
    wrong = script(plot, 'attention --model deep --model net --image_size 32', images)
    assert refused(wrong, 'the teacher has 4 groups, the student 3')
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
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # from here on the system refuses longer files
    try:
        status, _, err = script(plot, ['curves', run])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1 and err.count('\n') == 1 and 'curves.png could not be written' in err
    assert not list(tmp_path.glob('*.tmp'))
    assert (tmp_path / 'curves.png').read_bytes() == b'before'
