"""Pictures of attention maps: what is drawn, and over which images."""

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_pictures import IMAGENET, overlays, small_network, texts

import plot
import utils
from images import crops, decode, memory, photographs

PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))


def groups_of(network, images):
    with torch.no_grad():
        return network[0](images, network[1], False)[1]


def test_the_layer_over_an_image_is_its_attention_map_upsampled():
    networks = small_network(1), small_network(2)
    maps = [plot.attention_maps(*network, PIXELS, 4, 'max') for network in networks]
    figure = plot.draw_attention(PIXELS, maps, 'ab', ['caption'])
    expected = []
    groups = [groups_of(network, memory.normalize(PIXELS)) for network in networks]
    for pair in zip(*groups):
        for group in pair:
            for row in range(2):
                small = utils.attention_map(group, 4, 'max')[row : row + 1, None]
                expected.append(F.interpolate(small, (32, 32), mode='bilinear', align_corners=False)[0, 0])
    assert len(overlays(figure)) == len(expected) == 12
    for layer, values in zip(overlays(figure), expected):
        np.testing.assert_allclose(layer, values, rtol=1e-6)
    inputs = [axes.images[0].get_array() for axes in figure.axes if len(axes.images) == 1][:2]
    assert all(np.array_equal(shown, pixels) for shown, pixels in zip(inputs, PIXELS))


def test_the_printed_correlations_are_those_of_the_maps():
    networks = small_network(1), small_network(2, shape=(10, 1, 10)), small_network(3)
    figure = plot.draw_attention(PIXELS, [plot.attention_maps(*network, PIXELS) for network in networks], 'abc', [])
    expected = []
    for teacher, *students in zip(*(groups_of(network, memory.normalize(PIXELS)) for network in networks)):
        x, *ys = ((group.double() ** 2).sum(1).reshape(2, -1).numpy() for group in (teacher, *students))
        expected += [f'r {np.corrcoef(a, b)[0, 1]:.2f}' for y in ys for a, b in zip(x, y)]
    assert [text for text in texts(figure) if text.startswith('r ')] == expected
    assert len(set(expected)) > 6


def test_the_larger_map_is_average_pooled_to_the_smaller():
    small, large = torch.rand(2, 3, 4), torch.rand(2, 6, 8)
    pooled = large.reshape(2, 3, 2, 4, 2).mean((2, 4))
    expected = torch.tensor([np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(small, pooled)])
    for pair in ((small, large), (large, small)):
        torch.testing.assert_close(plot.correlation(*pair), expected.double(), rtol=1e-6, atol=1e-6)


def test_equal_networks_agree_everywhere_and_maps_of_one_value_with_none():
    maps = plot.attention_maps(*small_network(), PIXELS)
    figure = plot.draw_attention(PIXELS, [maps, maps], 'ab', [])
    assert [text for text in texts(figure) if text.startswith('r ')] == ['r 1.00'] * 6
    assert plot.correlation(torch.ones(2, 1, 1), torch.rand(2, 4, 4)).isnan().all()
    flat = [torch.ones(2, 1, 1)]
    assert texts(plot.draw_attention(PIXELS, [flat, flat], 'ab', [])).count('no r') == 2


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


@pytest.mark.parametrize('imagenet, networks', [(False, 2), (False, 3), (True, 2), (True, 3)])
def test_no_text_of_an_attention_picture_leaves_it_or_covers_another(imagenet, networks):
    maps = [plot.attention_maps(*small_network(**(IMAGENET if imagenet else {})), PIXELS)] * networks
    figure = plot.draw_attention(PIXELS, maps, plot.NAMES[networks], ['teacher: ' + 'm' * 60, 'student: one'])
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
    pixels = plot.load_images(str(photos / 'test' / 'ant'), '.', 9, 32, imagenet=False)
    assert pixels.shape == (7, 32, 32, 3)
    assert np.array_equal(pixels[0], memory.square(decode.read_image(first[0]), 32))  # whole, not its centre


def test_hidden_files_are_not_looked_at(photos, tmp_path):
    for name in ('._0.png', '.thumbnails/0.png', '__MACOSX/0.png', 'b/0.png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((photos / 'test' / 'ant' / '0.png').read_bytes() if name == 'b/0.png' else b'')
    assert plot.load_images(str(tmp_path), '.', 9, 16, imagenet=False).shape == (1, 16, 16, 3)


def test_images_of_a_folder_are_drawn_at_the_size_of_the_training(script, train, photos, monkeypatch):
    assert train('--epochs 1 --save logs/run')[0] == 0
    shapes, load = [], plot.load_images
    monkeypatch.setattr(plot, 'load_images', lambda *given: shapes.append(load(*given)) or shapes[-1])
    for images, flags in ((photos, ''), (photos, '--image_size 24'), ('digits', '')):
        status, _, err = script(plot, 'attention --model run --model run --count 1', flags, '--images', [images])
        assert status == 0, err
    assert [pixels.shape[1:3] for pixels in shapes] == [(16, 16), (24, 24), (32, 32)]
