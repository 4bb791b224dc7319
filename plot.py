"""Shows runs: convergence curves, tables and CSV files from logs, attention maps (section 3.1) from checkpoints.

    python plot.py curves logs/RUN logs/OTHER_RUN --out curves.png
    python plot.py table logs/student-s* logs/at-s*
    python plot.py csv logs/RUN logs/OTHER_RUN > runs.csv
    python plot.py attention --model logs/TEACHER --model logs/STUDENT --images CIFAR10 --dataroot data
    python plot.py attention --model torchvision:resnet34 --model logs/STUDENT --images photos --out attention.svg

A log is ours or the authors', a model is any that can teach (see checkpoint.py). This takes seconds on one core. The
suffix of --out, .png or .svg, sets the format, and the same input gives the same SVG, byte for byte.
"""

import argparse
import csv
import io
import itertools
import math
import os

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from engine import ending
from engine.arguments import Parser, number, path, printable, subcommand
from engine.compare import comparison
from engine.predict import normalized, open_network, read_pixels
from engine.series import errors, flat, loss_terms, name_of, names_of, rate_drops, read_run, shorten, term_of
from formats.networks import describe
from formats.write import write_whole
from imagenet_resnet import imagenet_forward
from images import memory
from images.folders import IMAGE_SUFFIXES, is_hidden
from utils import attention_map

ZOOMED = 10  # epochs: longer runs have a second panel for their last fifth
MOST_TERMS = 40  # panels of a picture
MAX_CELLS = 10_000_000  # of a table of logs, which may be hostile
WIDTH, DPI = 9, 160  # inches, and pixels per inch: sharp at the 900 pixels of a README
COLOURS = '#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000'.split()  # Okabe & Ito: safe for colour-blind eyes
MARKERS = ('', 'o', '^', 's', 'x')  # none for the first seven runs, a circle for the next seven, and so on
STYLE = {'font.size': 8, 'axes.titlesize': 8, 'axes.spines.top': False, 'axes.spines.right': False}
COLOUR_MAP = 'inferno'  # its lightness rises evenly: safe for colour-blind eyes, and in print
SIZE = 32  # pixels of the images of a data set in memory
NAMES = {2: ('teacher', 'student'), 3: ('teacher', 'student 1', 'student 2')}  # of networks beside each other
IMAGE_SETS = [name for name in memory.DATASETS if name != 'folder']


@matplotlib.rc_context(STYLE)
def draw_curves(paths, labels=(), training=True):
    """The Figure of runs' errors and loss terms over epochs, one colour per run.

    labels: their names, by default as in `names_of`. training: whether training errors are drawn too. The test errors
    of the last fifth of ten or more epochs have a second panel.

    An epoch's values are those at its end, so a learning rate that drops at the start of epoch n is drawn at n - 1: a
    dotted line, grey if several runs share it. The error axis ends at four times the last error of the worst run, to
    keep the ends of runs apart; the first epochs may lie above it. Raises what `read_run` raises.
    """
    runs = [read_run(path) for path in paths]
    terms = sorted({name for run in runs for name in loss_terms(run)}, key=term_of)
    if len(terms) > MOST_TERMS:
        raise ValueError(f'the logs have {len(terms):,} loss terms; at most {MOST_TERMS} are drawn')
    columns = 0 if not terms else 1 if len(terms) < 4 else 2
    rows = math.ceil(len(terms) / columns) if terms else 1
    last = [next((e for e in reversed(errors(run, 'test')) if e == e), math.nan) for run in runs]
    names = map(shorten, names_of(paths, runs, labels))
    labels = [name if math.isnan(e) else f'{name} ({e:.2f}%)' for name, e in zip(names, last)]
    end = max(record['epoch'] for run in runs for record in run)
    first = math.ceil(0.8 * end) if end >= ZOOMED else math.inf
    across = max(1, min(len(labels), int(WIDTH / (0.07 * max(map(len, labels)) + 0.5))))
    height = max(3.4 if first > end else 4.4, 1.45 * rows + 0.3) + 0.17 * math.ceil(len(labels) / across)
    figure = Figure(figsize=(WIDTH, height), layout='constrained')
    grid = figure.add_gridspec(rows, 1 + columns, width_ratios=[1.4, 1, 1][: 1 + columns])
    left = grid[:, 0].subgridspec(1 if first > end else 2, 1, height_ratios=[1.6, 1][: 1 if first > end else 2])
    axes = figure.add_subplot(left[0])
    _draw_errors(axes, runs, training)
    if first <= end:
        _draw_end(figure.add_subplot(left[1]), runs, first)
    for i, name in enumerate(terms):
        small = figure.add_subplot(grid[i // columns, 1 + i % columns], sharex=axes)
        _draw_term(small, runs, name)
        lowest = i + columns >= len(terms)
        small.set_xlabel('epochs trained' if lowest else '')
        small.tick_params(labelbottom=lowest)
    for panel in figure.axes:
        limits = panel.get_xlim()
        _draw_drops(panel, runs)
        panel.set_xlim(limits)
    handles = [Line2D([], [], **_look(number)) for number in range(len(runs))]
    figure.legend(handles, list(map(_plain, labels)), loc='outside lower center', ncols=across, frameon=False)
    return figure


def _plain(text):
    # A name may have any bytes, and matplotlib would take text between two dollars for mathematics.
    text = text.encode(errors='backslashreplace').decode().replace('$', r'\$')
    return ''.join(c if c.isprintable() else '?' for c in text)


def _look(number):
    return {'color': COLOURS[number % len(COLOURS)], 'marker': MARKERS[number // len(COLOURS) % len(MARKERS)]}


def _draw_line(axes, number, run, values, linestyle):
    look, thin = _look(number), linestyle != '-'
    if thin or len(run) == 1:
        look['marker'] = '.' if len(run) == 1 else ''  # a line of one point is invisible
    look |= {'linewidth': 0.5 if thin else 1.4, 'alpha': 0.6 if thin else 1, 'markersize': 4}
    axes.plot([record['epoch'] for record in run], values, linestyle, markevery=max(1, len(run) // 10), **look)


def _draw_errors(axes, runs, training):
    parts = ('train', 'test') if training else ('test',)
    for i, run in enumerate(runs):
        if training:
            _draw_line(axes, i, run, errors(run, 'train'), '--')
        _draw_line(axes, i, run, errors(run, 'test'), '-')
    of_runs = [[e for part in parts for e in errors(run, part) if e == e] or [0] for run in runs]
    low, high = min(map(min, of_runs)), min(max(map(max, of_runs)), 4 * max(values[-1] for values in of_runs))
    margin = 0.04 * (high - low) or 1
    axes.set(xlabel='epochs trained', ylabel='top-1 error, %', title='error')
    axes.set_ylim(max(low - margin, 0), high + margin)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    key = {'test': ('-', 1.4), 'training': ('--', 0.5), 'learning rate drops': (':', 0.8)}
    key = {name: look for name, look in key.items() if training or name != 'training'}
    if not any(map(rate_drops, runs)):
        del key['learning rate drops']
    axes.legend([Line2D([], [], color='0.3', linestyle=s, linewidth=w) for s, w in key.values()], key, loc='best')


def _draw_end(axes, runs, first):
    for i, run in enumerate(runs):
        late = [record for record in run if record['epoch'] >= first]
        if late:
            _draw_line(axes, i, late, errors(late, 'test'), '-')
    axes.set(xlabel='epochs trained', ylabel='top-1 error, %', title=f'test error from epoch {first} on')
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def _draw_term(axes, runs, name):
    lines = [(i, run, loss_terms(run)[name]) for i, run in enumerate(runs) if name in loss_terms(run)]
    for line in lines:
        _draw_line(axes, *line, '-')
    positive = [value for *_, values in lines for value in values if value == value]
    ratio = max(positive) / min(positive)
    locator = LogLocator(subs=(1,) if ratio > 100 else (1, 2, 5)) if ratio > 4 else MaxNLocator(4)
    axes.set(yscale='log', title=f'loss term {name}')
    axes.yaxis.set(major_locator=locator, major_formatter='{x:g}', minor_locator=NullLocator())


def _draw_drops(axes, runs):
    owners = {}
    for i, run in enumerate(runs):
        for step in rate_drops(run):
            owners.setdefault(step, []).append(i)
    for step, indices in owners.items():
        colour = _look(indices[0])['color'] if len(indices) == 1 < len(runs) else '0.3'
        axes.axvline(step - 1, color=colour, linestyle=':', linewidth=0.8, zorder=0)


def spread(labels, count):
    """The indices of `count` samples: the first of each label in label order, then the second of each, ..."""
    of_label = {}
    for i, label in enumerate(labels):
        of_label.setdefault(label, []).append(i)
    turns = itertools.zip_longest(*(of_label[label] for label in sorted(of_label)))
    return [i for turn in turns for i in turn if i is not None][:count]


def load_images(images, dataroot, count, image_size, imagenet):
    """Up to `count` images, (N, H, W, 3) uint8, of a data set's test part or a folder, spread over classes or folders.

    `images` is a data set of `memory.DATASETS`, or a folder; image_size is height and width. Files are read as
    `engine.predict.read_pixels` does. Raises ValueError or OSError if there are none or one cannot be read.
    """
    if images in IMAGE_SETS:
        test = memory.load(images, dataroot, image_size).test
        return test.pixels[spread(test.labels.tolist(), count)]
    if not os.path.isdir(images):
        raise OSError(f'--images {images}: no such folder, nor {", ".join(IMAGE_SETS)}')
    files = []
    for folder, folders, names in os.walk(images):
        folders[:] = [name for name in folders if not is_hidden(name)]
        files += [os.path.join(folder, name) for name in names if not is_hidden(name)]
    files = sorted(file for file in files if file.lower().endswith(IMAGE_SUFFIXES))
    if not files:
        raise ValueError(f'--images {images} holds no images ({" ".join(IMAGE_SUFFIXES)})')
    chosen = [files[i] for i in spread(map(os.path.dirname, files), count)]
    return torch.from_numpy(np.stack([read_pixels(file, image_size, imagenet) for file in chosen]))


def attention_maps(f, params, pixels, power=2, mapping='sum'):
    """The attention map of each group of a network in evaluation mode, (N, H', W'), on pixels (N, H, W, 3) uint8.

    Raises ValueError if a map is not finite.
    """
    with torch.no_grad():
        groups = f(normalized(pixels, f is imagenet_forward), params, False)[1]
    maps = [attention_map(group, power, mapping) for group in groups]
    for i, values in enumerate(maps):
        if not values.isfinite().all():
            raise ValueError(f'the attention map of group {i} is not finite; try a lower --power than {power:g}')
    return maps


def correlation(x, y):
    """The cosine (N,) of maps (N, H, W) and (N, H', W') less their means; the larger is average-pooled to the smaller.

    NaN where a map has the same value everywhere. Without removing the means, any two maps have a cosine near 1.
    """
    size = [min(a, b) for a, b in zip(x.shape[1:], y.shape[1:])]
    x, y = (F.adaptive_avg_pool2d(q.double(), size).flatten(1) for q in (x, y))  # (N, H, W) -> (N, H*W)
    x, y = (q - q.mean(1, keepdim=True) for q in (x, y))
    lengths = x.norm(dim=1) * y.norm(dim=1)
    return torch.where(lengths > 0, (x * y).sum(1) / lengths, math.nan)


@matplotlib.rc_context(STYLE)
def draw_attention(pixels, maps, names, captions):
    """The Figure of images (N, H, W, 3) uint8, one per row, overlaid with the maps of each group of each network.

    maps: those of `attention_maps` for each network, the teacher first, equally many; each is scaled from its least to
    its greatest value. Below a student's map is its `correlation` with the teacher's. names: of the networks, above
    their columns; captions: the lines above the images.
    """
    groups, networks = len(maps[0]), len(maps)
    near, far, text, top = 0.05, 0.15, 0.2, 0.19 * len(captions) + 0.48  # inches
    cell = (WIDTH - 2 * near - groups * ((networks - 1) * near + far)) / (1 + networks * groups)
    pitch = cell + text
    height = top + len(pixels) * pitch + text
    figure = Figure(figsize=(WIDTH, height))

    def label(x, y, words, **look):
        figure.text(x / WIDTH, 1 - y / height, _plain(words), **{'ha': 'center', 'va': 'center', **look})

    def panel(x, row):
        axes = figure.add_axes((x / WIDTH, 1 - (top + row * pitch + cell) / height, cell / WIDTH, cell / height))
        axes.set_axis_off()
        return axes

    for i, caption in enumerate(captions):
        label(near, 0.14 + 0.19 * i, caption, ha='left')
    label(near + cell / 2, top - 0.1, 'input')
    for row, image in enumerate(pixels):
        panel(near, row).imshow(image.numpy())
    for i, of_group in enumerate(zip(*maps)):
        left = near + cell + far + i * (networks * cell + (networks - 1) * near + far)
        label(left + (networks * cell + (networks - 1) * near) / 2, top - 0.28, f'group {i}', weight='bold')
        for j, values in enumerate(of_group):
            x = left + j * (cell + near)
            label(x + cell / 2, top - 0.1, names[j])
            for row, r in enumerate(correlation(values, of_group[0]).tolist()):
                _draw_overlay(panel(x, row), pixels[row], values[row])
                if j:
                    words = 'no r' if math.isnan(r) else f'r {r:.2f}'
                    label(x + cell / 2, top + row * pitch + cell + 0.09, words)
    bar = figure.add_axes((1 - (near + 1) / WIDTH, 0.07 / height, 1 / WIDTH, 0.1 / height))
    bar.imshow(np.linspace(0, 1, 100)[None], cmap=COLOUR_MAP, aspect='auto')
    bar.set_axis_off()
    label(WIDTH - near - 1.08, height - 0.12, 'each map from its least to its greatest value', ha='right')
    label(near, height - 0.12, "r: a map's correlation with the teacher's", ha='left')
    return figure


def _draw_overlay(axes, image, values):
    """Draw a map (H', W'), upsampled to the image (H, W, 3), over the image in grey."""
    values = F.interpolate(values[None, None], image.shape[:2], mode='bilinear', align_corners=False)[0, 0]
    axes.imshow(image.float().mean(2).numpy(), cmap='gray', vmin=0, vmax=255)
    axes.imshow(values.numpy(), cmap=COLOUR_MAP, alpha=0.7, interpolation='bilinear')


def attention(opt):
    """The Figure of the subcommand `attention`."""
    if not 2 <= len(opt.model) <= 3:
        raise ValueError(f'give --model two or three times, the teacher first; {len(opt.model)} found')
    if opt.label and len(opt.label) != len(opt.model):
        raise ValueError(f'--label: {len(opt.label)} labels for {len(opt.model)} models')
    opened = [open_network(model) for model in opt.model]
    networks = [network[:2] for network in opened]
    size = opt.image_size or (SIZE if opt.images in IMAGE_SETS else opened[0][3])
    pixels = load_images(opt.images, opt.dataroot, opt.count, size, networks[0][0] is imagenet_forward)
    maps = [attention_maps(f, params, pixels, opt.power, opt.mapping) for f, params in networks]
    for own in maps:
        if len(own) != len(maps[0]):
            raise ValueError(f'the teacher has {len(maps[0])} groups, a student {len(own)}: no maps to compare')
    names = opt.label or NAMES[len(opt.model)]
    captions = [
        f'{name}: {shorten(name_of(model))}, {describe(params)}'
        for name, model, (_, params) in zip(names, opt.model, networks)
    ]
    return draw_attention(pixels, maps, names, captions)


def picture(text):
    """An argparse type: the name of a .png or .svg in an existing folder."""
    text = path(text)
    folder = os.path.dirname(text) or '.'
    if not text.lower().endswith(('.png', '.svg')):
        raise argparse.ArgumentTypeError(f'{text!r} ends neither in .png nor in .svg')
    if os.path.isdir(text) or not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f'{text!r} is a folder' if os.path.isdir(text) else f'no folder {folder!r}')
    return text


def write(figure, out):
    """Write a Figure whole or not at all, in the format of its suffix."""
    kind, content = out.lower()[-3:], io.BytesIO()
    # Without a salt, an SVG's identifiers are random; layers combined into one image would be transparent twice.
    with matplotlib.rc_context({**STYLE, 'svg.hashsalt': 'attention-transfer', 'image.composite_image': False}):
        figure.savefig(content, format=kind, dpi=DPI, metadata={'Date': None} if kind == 'svg' else None)
    write_whole(out, content.getbuffer())


def write_csv(paths, out):
    """Write the logs of runs as one table, a line per epoch, to the file `out` or, without one, to the output."""
    runs = [read_run(path) for path in paths]
    rows = [{'run': '', **flat(record)} | {'run': path} for path, run in zip(paths, runs) for record in run]
    rows = [{printable(k): printable(v) if isinstance(v, str) else v for k, v in r.items()} for r in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if len(rows) * len(columns) > MAX_CELLS:
        raise ValueError(f'{len(rows):,} lines with {len(columns):,} different keys are too many for a table')
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator='\n')
    table.writeheader()
    table.writerows(rows)
    if out:
        write_whole(out, text.getvalue().encode())
    else:
        print(text.getvalue(), end='')


def main():
    """Run the subcommand: curves, table, csv or attention."""
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND', parser_class=subcommand)
    flag = commands.add_parser('curves', help='errors and loss terms of runs over epochs').add_argument
    flag('logs', nargs='+', type=path, metavar='LOG', help="a folder with log.txt, or a log, ours or the authors'")
    label = 'name of a run, once per log in the same order (default: its network and method)'
    flag('--label', action='append', default=[], metavar='NAME', help=label)
    flag('--out', default='curves.png', type=picture, help='.png or .svg')
    flag('--test_only', action='store_true', help='leave out the training errors')
    flag = commands.add_parser('table', help='errors by method, and paired differences, in Markdown').add_argument
    flag('logs', nargs='+', type=path, metavar='LOG', help='a folder with log.txt, or a log')
    flag = commands.add_parser('csv', help='logs as one table').add_argument
    flag('logs', nargs='+', type=path, metavar='LOG', help="a folder with log.txt, or a log, ours or the authors'")
    flag('--out', default='', type=path, help='file to write (default: print the table)')
    flag = commands.add_parser('attention', help='where a teacher and a student look').add_argument
    model = 'a run, a file or torchvision:NAME; two or three times, the teacher first'
    flag('--model', action='append', required=True, type=path, help=model)
    flag('--label', action='append', default=[], metavar='NAME', help='name of a network, once per --model')
    flag('--images', required=True, type=path, help=f'a folder of images, or {", ".join(IMAGE_SETS)}')
    flag('--dataroot', default='.', type=path, help='folder of the data set, as in cifar.py')
    flag('--count', default=4, type=number(int, 1, 32), help='number of images')
    size = number(int, 8, 1024)
    default = f"{SIZE}; for images in a folder, that of the teacher's training"
    flag('--image_size', type=size, metavar='N', help=f'height and width (default: {default})')
    flag('--mapping', default='sum', choices=['sum', 'max'], help='attention map: over channels (section 3.1)')
    flag('--power', default=2, type=number(float, 0, 16, above=True), help='p of |A|^p (section 3.1)')
    flag('--out', default='attention.png', type=picture, help='.png or .svg')
    opt = parser.parse_args()
    if opt.command == 'table':
        return print('\n'.join(comparison(opt.logs)))
    if opt.command == 'csv':
        return write_csv(opt.logs, opt.out)
    write(draw_curves(opt.logs, opt.label, not opt.test_only) if opt.command == 'curves' else attention(opt), opt.out)
    print(f'picture: {opt.out}')


if __name__ == '__main__':
    ending.with_its_reader()
    ending.run(main)
