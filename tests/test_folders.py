"""Folders of real image files: what counts as a class and an image, what is skipped, and what is refused."""

import os
import shutil

import pytest
from conftest import TESTING, TRAINING, refused, write_folder, write_photographs
from PIL import Image

import cifar
from images import folders, memory, photographs


def test_classes_are_numbered_by_name_and_suffixes_are_read_in_any_case(folder):
    assert len(folder.train.paths) == TRAINING and len(folder.test.paths) == TESTING and folder.num_classes == 2
    for files in (folder.train, folder.test):
        assert files.labels.tolist() == [int(f'{os.sep}bee{os.sep}' in path) for path in files.paths]


def test_unusable_folders_are_refused_by_name(tmp_path):
    with pytest.raises(OSError, match='nowhere: no such folder'):
        memory.load('folder', str(tmp_path / 'nowhere'))
    (tmp_path / 'empty').mkdir()
    with pytest.raises(OSError, match="empty has no folder 'train'"):
        memory.load('folder', str(tmp_path / 'empty'))
    with pytest.raises(ValueError, match='only one class'):
        memory.load('folder', write_folder(tmp_path / 'one', train=['a']))
    with pytest.raises(ValueError, match='different classes; in one only: b, c'):
        memory.load('folder', write_folder(tmp_path / 'other', test=['a', 'c']))
    root = write_folder(tmp_path / 'bare')
    os.unlink(root / 'train' / 'b' / '0.png')
    with pytest.raises(ValueError, match='bare/train/b holds no images'):
        memory.load('folder', root)


def test_all_scripts_test_on_the_same_folder_and_a_note_says_which_of_several(tmp_path, capsys):
    root, last = write_photographs(tmp_path / 'photos'), 'val'
    for name in ('test', 'validation', 'valid', 'val'):
        (root / last).rename(root / name)
        last = name
        small = memory.load('folder', root)
        for load in (photographs.load, photographs.load_folder):
            large = load(root)
            assert len(small.test.labels) == len(large.test.labels) == TESTING
            assert small.classes == large.classes == ['ant', 'bee']
    assert not capsys.readouterr().out
    shutil.copytree(root / 'val', root / 'test')
    (root / 'test' / 'ant' / '00.JPEG').unlink()
    assert len(photographs.load(root).test.labels) == len(memory.load('folder', root).test.labels) == TESTING
    assert capsys.readouterr().out.splitlines() == [f'note: tested on the images of {root}/val, not of its test'] * 2


def refusal(kind, root):
    with pytest.raises(kind) as caught:
        photographs.load(str(root))
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_unusable_folders_are_refused_in_one_line_that_says_why(tmp_path):
    assert 'nowhere: no such folder' in refusal(OSError, tmp_path / 'nowhere')
    assert "has no folder 'train': expected train/<class>/*" in refusal(OSError, tmp_path)
    root = write_photographs(tmp_path / 'whole')
    (root / 'val').rename(root / 'tests')
    expected = (
        'has no folder to test on: expected val/<class>/*, valid/<class>/*, validation/<class>/* or test/<class>/*'
    )
    assert expected in refusal(OSError, root)
    (root / 'val').mkdir()
    Image.new('RGB', (9, 9)).save(root / 'val' / 'flat.jpg')
    assert f'{root / "val"} has no folders of classes' in refusal(ValueError, root)
    for name in ('ant', 'cow'):
        (root / 'val' / name).mkdir()
        (root / 'val' / name / 'readme.txt').touch()
    assert f'{root / "val"} holds no images' in refusal(ValueError, root)
    Image.new('RGB', (9, 9)).save(root / 'val' / 'cow' / '0.png')
    assert f'{root / "val" / "ant"} holds no images' in refusal(ValueError, root)
    Image.new('RGB', (9, 9)).save(root / 'val' / 'ant' / '0.png')
    assert 'train and val have different classes; in one only: bee, cow' in refusal(ValueError, root)
    alone = write_photographs(tmp_path / 'alone', train=1, test=1)
    assert "only one class, 'ant'" in refusal(ValueError, alone)


def test_of_many_different_classes_some_are_named(tmp_path):
    for part, names in (('train', 'abcdefghij'), ('val', 'ab')):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            Image.new('RGB', (9, 9)).save(tmp_path / part / name / '0.png')
    assert refusal(ValueError, tmp_path).endswith('in one only: c, d, e, f, g and 3 more')


HIDDEN = '.DS_Store .ipynb_checkpoints __MACOSX @eaDir Thumbs.db desktop.ini lost+found $RECYCLE.BIN .x'.split()


HIDDEN += ['System Volume Information', '._a']


@pytest.mark.parametrize('load, parts', [(photographs.load, ('train', 'val')), (memory.load, ('train', 'test'))])
def test_what_systems_leave_in_folders_is_neither_class_nor_image_at_any_depth(tmp_path, load, parts):
    root, notes = write_folder(tmp_path / 'root'), []
    (root / 'test').rename(root / parts[1])
    for top in (root / 'train', root / 'train' / 'a', root / 'train' / 'a' / 'deeper', root / parts[1]):
        top.mkdir(exist_ok=True)
        for i, name in enumerate(HIDDEN):
            (top / name).mkdir()
            shutil.copy(root / 'train' / 'a' / '0.png', top / name / '0.png')
            shutil.copy(root / 'train' / 'a' / '0.png', top / f'._{i}.png')
    (root / 'train' / 'b' / '.link').symlink_to('/')
    loaded = load(root, note=notes.append) if load is photographs.load else load('folder', root, note=notes.append)
    assert (loaded.num_classes, len(loaded.train.labels), len(loaded.test.labels), notes) == (2, 2, 2, [])


@pytest.mark.parametrize('load, parts', [(photographs.load, ('train', 'val')), (memory.load, ('train', 'test'))])
def test_files_that_are_passed_over_are_counted_in_one_line(tmp_path, load, parts):
    root, notes = write_folder(tmp_path / 'root'), []
    (root / 'test').rename(root / parts[1])
    for name in ('train/b/notes.txt', 'train/b/more/1.heic', 'train/0.png', f'{parts[1]}/a/raw.cr2'):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    load(root, note=notes.append) if load is photographs.load else load('folder', root, note=notes.append)
    expected = ' '.join(folders.IMAGE_SUFFIXES)
    assert notes == [
        f'note: 3 files in {root}/train are skipped, for example {root}/train/b/notes.txt: '
        f'expected train/<class>/* of {expected}',
        f'note: a file in {root}/{parts[1]} is skipped, for example {root}/{parts[1]}/a/raw.cr2: '
        f'expected {parts[1]}/<class>/* of {expected}',
    ]


@pytest.mark.parametrize(
    'train, test, words',
    [
        ('caf\u00e9', 'cafe\u0301', ['Unicode form', r"'caf\xe9'", r"'cafe\u0301'"]),
        ('Cat', 'cat', ["'Cat'", "'cat'", 'differ only in case']),
    ],
)
def test_classes_whose_names_only_look_alike_are_told_so(script, tmp_path, train, test, words):
    write_folder(tmp_path / 'root', train=('a', train), test=('a', test))
    assert refused(script(cifar, '--dataset folder --dataroot root'), 'root: the class', *words)


def test_links_out_of_the_folder_are_refused_unless_they_may_be_followed(tmp_path):
    root, other = write_folder(tmp_path / 'root'), write_folder(tmp_path / 'other')
    (root / 'train' / 'a' / 'again.png').symlink_to('0.png')
    assert len(memory.load('folder', root).train.labels) == 3
    for i, where in enumerate(('train', 'train/a', 'train/a/0.png')):
        root = write_folder(tmp_path / str(i))
        (root / where).rename(root / 'before')
        (root / where).symlink_to(other / where)
        with pytest.raises(ValueError, match=f'{root / where} is a link that leads out of {root}: --follow_links'):
            memory.load('folder', root)
        assert len(memory.load('folder', root, follow_links=True).train.labels) == 2


def test_links_to_folders_that_would_loop_for_ever_are_refused(tmp_path):
    root = write_folder(tmp_path / 'root')
    for name in ('x', 'y'):  # with two links, 2 ** 40 paths before the system stops
        (root / 'train' / 'a' / name).symlink_to('.')
    for follow_links in (False, True):
        with pytest.raises(ValueError, match='a link to a folder inside a class'):
            memory.load('folder', root, follow_links=follow_links)
