"""The lists of CUB and Scenes: damaged, hostile, and in any encoding."""

import os
import shutil

import numpy as np
import pytest
from conftest import refused
from test_finetune import CLASSES, cub, pretrained, scenes, tune  # noqa: F401

from images import photographs


@pytest.mark.parametrize(
    'name, change, words',
    [
        ('images.txt', lambda text: text.replace('1 001.Ant/0.jpg', '1 001.Ant/../../../secret.jpg'), ['images.txt']),
        ('images.txt', lambda text: text.replace('1 001.Ant/0.jpg', '1 ../0.jpg'), ['../0.jpg']),
        ('images.txt', lambda text: text.replace('1 001.Ant/0.jpg', '1 001.Ant/none.jpg'), ['none.jpg', 'missing']),
        ('images.txt', lambda text: text.replace('1 001.Ant/0.jpg', '1 001.Ant/0.txt'), ['0.txt']),
        ('images.txt', lambda text: text.replace('1 001.Ant/0.jpg', '1 001.Ant/._0.jpg'), ['._0.jpg']),
        ('images.txt', lambda text: text + '99 001.Ant/0.jpg\n', ['same images']),
        ('images.txt', lambda text: text + 'x\n', ['wrong form', "'x'"]),
        ('images.txt', lambda text: '', ['images.txt']),
        ('train_test_split.txt', lambda text: text.replace(' 0', ' 1'), ['0 images to test']),
        ('train_test_split.txt', lambda text: text.replace(' 1', ' 2'), ['train_test_split.txt', "'2 2'"]),
        ('bounding_boxes.txt', lambda text: text.replace('3.0', '-3.0', 1), ['bounding_boxes.txt']),
        ('bounding_boxes.txt', lambda text: text.replace('3.0', '9' * 400, 1), ['bounding_boxes.txt']),
    ],
)
def test_lists_that_do_not_fit_are_refused_in_one_line(tune, cub, name, change, words):
    (cub / name).write_text(change((cub / name).read_text()))
    assert refused(tune(cub), *words)


def test_any_bytes_in_the_lists_are_read_or_refused(cub, scenes):
    rng, refusals = np.random.default_rng(0), 0
    for load, root in ((photographs.load_cub, cub), (photographs.load_scenes, scenes)):
        for path in sorted(root.glob('*.txt')):
            content = path.read_bytes()
            for _ in range(60):
                broken = bytearray(content)
                for at in rng.integers(0, len(content), rng.integers(1, 4)):
                    broken[at] = rng.integers(256)
                path.write_bytes(broken)
                try:
                    load(root)
                except (ValueError, OSError) as error:
                    assert str(error)
                    refusals += 1
            path.write_bytes(content)
    assert refusals > 100


@pytest.mark.parametrize('dataset', ['cub', 'scenes'])
@pytest.mark.parametrize('encoding', ['latin-1', 'utf-8', 'utf-8-sig'])
def test_lists_of_windows_or_of_names_in_any_encoding_find_their_files(request, tune, dataset, encoding):
    """With CRLF at the end of each line, and a byte order mark where the encoding has one."""
    root, name = request.getfixturevalue(dataset), '002.B\u00ead'.encode(encoding.removesuffix('-sig'))
    folder = root / {'cub': 'images', 'scenes': 'Images'}[dataset]
    (folder / CLASSES[1]).rename(folder / os.fsdecode(name))
    for path in root.glob('*.txt'):
        content = path.read_bytes().replace(CLASSES[1].encode(), name).replace(b'\n', b'\r\n')
        path.write_bytes((b'\xef\xbb\xbf' if encoding == 'utf-8-sig' else b'') + content)
    loaded = photographs.DATASETS[dataset](root)
    assert loaded.train.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    status, _, err = tune(root, f'--dataset {dataset}')
    assert status == 0, err


def test_a_list_in_utf_16_is_refused_by_that_name(tune, cub):
    (cub / 'images.txt').write_bytes((cub / 'images.txt').read_text(encoding='utf-8').encode('utf-16'))
    assert refused(tune(cub), 'images.txt is a text in UTF-16: save it in UTF-8')


def test_links_out_of_the_folder_are_refused_unless_allowed(tune, cub, tmp_path):
    folder = cub / 'images' / CLASSES[1]
    shutil.move(folder, tmp_path / 'elsewhere')
    folder.symlink_to(tmp_path / 'elsewhere')
    assert refused(tune(cub), 'leads out of', CLASSES[1])
    assert tune(cub, '--follow_links')[0] == 0
