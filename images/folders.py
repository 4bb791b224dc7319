"""Folders and lists of images: which files are images, and of which class."""

import codecs
import os
import re
import unicodedata

IMAGE_SUFFIXES = tuple('.png .jpg .jpeg .jfif .bmp .gif .webp .tif .tiff .ppm .pgm'.split())
# What operating systems create in folders, besides names that begin with a dot.
SYSTEM_NAMES = {*'__macosx @eadir thumbs.db desktop.ini lost+found $recycle.bin'.split(), 'system volume information'}
TEST_PARTS = 'val', 'valid', 'validation', 'test'  # folders of test images; the first that is there is used
MAX_LIST = 2**26  # bytes of a list of images


def find_parts(root, follow_links=False, note=print):
    """The class names, and the images (see `find_images`) of root/train and of the folder to test on: `TEST_PARTS`.

    Raises what `find_images` raises, OSError if a folder is missing, and ValueError if the two have different classes.
    """
    if not os.path.isdir(root):
        raise OSError(f'{root}: no such folder')
    classes, files = find_images(root, 'train', follow_links, note)
    parts = 'train', _test_part(root, note)
    other_classes, other_files = find_images(root, parts[1], follow_links, note)
    unshared = sorted(set(classes) ^ set(other_classes))
    alike = {}
    for name in unshared:
        alike.setdefault(unicodedata.normalize('NFC', name).casefold(), []).append(name)
    pair = next((pair for pair in alike.values() if len(pair) == 2 and len(set(pair) & set(classes)) == 1), None)
    if pair:
        a, b = sorted(pair, key=lambda name: name in other_classes)
        same = len({unicodedata.normalize('NFC', name) for name in pair}) == 1
        raise ValueError(
            f'{root}: the class {a} ({ascii(a)}) of {parts[0]} and {b} ({ascii(b)}) of {parts[1]} differ only '
            f'in {"the Unicode form of their letters (NFC or NFD)" if same else "case"}: rename one of them'
        )
    if unshared:
        more = f' and {len(unshared) - 5} more' if len(unshared) > 5 else ''
        names = ' and '.join(parts)
        raise ValueError(f'{root}: {names} have different classes; in one only: {", ".join(unshared[:5])}{more}')
    return classes, files, other_files


def _test_part(root, note):
    """The folder of `root` to test on; a note says which of several it is."""
    present = [part for part in TEST_PARTS if os.path.isdir(os.path.join(root, part))]
    if not present:
        *others, last = (f'{part}/<class>/*' for part in TEST_PARTS)
        raise OSError(f'{root} has no folder to test on: expected {", ".join(others)} or {last}')
    if len(present) > 1:
        note(f'note: tested on the images of {root}/{present[0]}, not of its {" or ".join(present[1:])}')
    return present[0]


def is_hidden(name):
    """Whether a file or folder belongs to the operating system, or is hidden by a dot before its name."""
    return name.startswith('.') or name.lower() in SYSTEM_NAMES


def find_images(root, part, follow_links=False, note=print):
    """The images root/part/<class>/...: (class names, [(path, class number), ...]), sorted by name.

    Hidden files and folders are ignored. `note` takes a line on how many other files are skipped. Raises OSError or
    ValueError, with a message for the user, if there are no images, and ValueError for a link that leads out of
    `root`, unless `follow_links` is set, and for any link to a folder inside a class, which may loop.
    """
    folder = os.path.join(root, part)
    if not os.path.isdir(folder):
        raise OSError(f'{root} has no folder {part!r}: expected {part}/<class>/*')
    entries = [entry for entry in os.scandir(folder) if not is_hidden(entry.name)]
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise ValueError(f'{folder} has no folders of classes: expected {part}/<class>/*')
    tops, allowed = [os.path.join(folder, name) for name in classes], None if follow_links else root
    for path in (folder, *tops):
        check_link(path, allowed)
    below = [(path, label) for label, top in enumerate(tops) for path in files_below(top, allowed)]
    files = [file for file in below if file[0].lower().endswith(IMAGE_SUFFIXES)]
    expected = f'{part}/<class>/* of {" ".join(IMAGE_SUFFIXES)}'
    others = [path for path, _ in below if not path.lower().endswith(IMAGE_SUFFIXES)]
    others += sorted(entry.path for entry in entries if not entry.is_dir())
    if others:
        many = f'{len(others):,} files in {folder} are' if len(others) > 1 else f'a file in {folder} is'
        note(f'note: {many} skipped, for example {others[0]}: expected {expected}')
    if not files:
        raise ValueError(f'{folder} holds no images: expected {expected}')
    if len(classes) < 2:
        raise ValueError(f'{folder} has only one class, {classes[0]!r}: nothing to learn')
    empty = set(range(len(classes))) - {label for _, label in files}
    if empty:
        raise ValueError(f'{tops[min(empty)]} holds no images')
    return classes, files


def files_below(folder, allowed):
    """Yield the paths of all files below a folder, except hidden ones, sorted by name.

    Raises ValueError for a link that leads out of the folder `allowed`, if one is given, or to a folder.
    """
    pending = [folder]
    while pending:
        entries = sorted((e for e in os.scandir(pending.pop()) if not is_hidden(e.name)), key=lambda entry: entry.name)
        for entry in entries:
            if entry.is_symlink():  # known from the listing, without a stat of each of a million files
                check_link(entry.path, allowed)
                if entry.is_dir():
                    raise ValueError(f'{entry.path} is a link to a folder inside a class: it is not followed')
        folders = {entry.path for entry in entries if entry.is_dir()}
        pending += sorted(folders, reverse=True)
        yield from (entry.path for entry in entries if entry.path not in folders)


def check_link(path, allowed):
    """Refuse a link that leads out of the folder `allowed`; None allows all."""
    if allowed is not None and os.path.islink(path):
        tree = os.path.realpath(allowed)
        if os.path.commonpath([tree, os.path.realpath(path)]) != tree:
            raise ValueError(f'{path} is a link that leads out of {allowed}: --follow_links allows it')


def read_list(root, name, pattern):
    """The groups that a pattern matches in each line of a list of images."""
    path = os.path.join(root, name)
    if not os.path.isfile(path):
        raise OSError(f'--dataroot {root} has no {name}; your own images are --dataset folder')
    if os.path.getsize(path) > MAX_LIST:
        raise ValueError(f'{path} has more than {MAX_LIST:,} bytes: it is not a list of images')
    with open(path, 'rb') as file:
        content = file.read().removeprefix(codecs.BOM_UTF8)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f'{path} is a text in UTF-16: save it in UTF-8')
    # To the system, names are bytes in any encoding.
    lines = [os.fsdecode(line.strip()) for line in content.splitlines() if line and not line.isspace()]
    matches = [re.fullmatch(pattern, line) for line in lines]
    if not all(matches):
        wrong = lines[matches.index(None)]
        raise ValueError(f'{path} has a line of the wrong form: {wrong[:100]!r}')
    return [match.groups() for match in matches]


def find_listed(root, folder, train, test, follow_links):
    """What `find_parts` returns, for two lists ['<class>/<file>' in a folder of `root`, ...]; classes sorted by name.

    Raises ValueError if a list names something other than an image of a training class, OSError if a file is missing.
    """
    top, allowed, parts = os.path.join(root, folder), None if follow_links else root, []
    classes = sorted({name.partition('/')[0] for name in train})
    numbers = {name: i for i, name in enumerate(classes)}
    if len(classes) < 2 or not test:
        raise ValueError(f'{root} lists {len(classes)} classes to train on and {len(test)} images to test')
    check_link(top, allowed)
    for name in classes:
        check_link(os.path.join(top, name), allowed)
    for listed in (train, test):
        files = []
        for name in listed:
            label, path = name.partition('/')[0], os.path.join(top, name)
            hidden = any(map(is_hidden, name.split('/')))
            if label not in numbers or hidden or not name.lower().endswith(IMAGE_SUFFIXES):
                raise ValueError(f'{root} lists {name[:200]!r}, which is not an image of a class to train on')
            check_link(path, allowed)
            if not os.path.isfile(path):
                raise OSError(f'{path} is missing')
            files.append((path, numbers[label]))
        parts.append(files)
    return classes, *parts
