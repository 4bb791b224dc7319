"""Describes, uses, slims and exports a saved network.

    python checkpoint.py slim logs/RUN            # drop what only a resume needs, before publishing a run
    python checkpoint.py info FILE                # what network a file or a run holds
    python checkpoint.py predict logs/RUN a.jpg   # the most probable classes of images
    python checkpoint.py export logs/RUN --to torchvision resnet34.pth

A run is a folder that holds model.pt7, or its name in logs/. All but slim also take a file: a checkpoint of ours or of
the authors', their folded export (.pth, .hkl), a torchvision ResNet's state_dict, or a .safetensors of any of these.
Files are read as data, never as code: nothing in them can run or open another file.
"""

import hashlib
import json
import os
import sys

from engine import arguments, ending
from engine.log import epoch_of, read_log
from engine.predict import open_network, predict
from engine.runs import locked
from formats.networks import build, checkpoint_of, describe, load, load_params, load_teacher
from formats.write import WRITERS, save, write, write_whole
from utils import STATISTICS, num_parameters, without_adapters


def slim(run):
    """Reduce a run's checkpoint to its parameters; it can still teach, but no longer be resumed.

    Raises ValueError for a run that is training or, by the log beside it, not finished, and for one that was stopped
    within an epoch: its parameters are those of no line of its log.
    """
    path = checkpoint_of(run)
    log = os.path.join(os.path.dirname(path), 'log.txt')
    with locked((os.path.dirname(path) or '.') if os.path.isfile(path) else ''):
        state = load(path)
        if state.get('progress'):
            raise ValueError(f'{path} was stopped within an epoch: first finish the run with --resume auto')
        records = read_log(log) if os.path.isfile(log) else []
        last = records[-1] if records else {}
        left = last['epochs'] - epoch_of(last) if type(last.get('epochs')) is int else 0
        if left > 0:
            lacks = f'{path} lacks {left} of {last["epochs"]} epochs'
            raise ValueError(f'{lacks}: first finish the run with --resume auto, or slim a copy of the file')
        before = os.path.getsize(path)
        kept = {key: state[key] for key in ('epoch', 'classes', 'image_size') if key in state}
        save(path, {'params': without_adapters(state['params']), **kept})
    print(f'{path}: {before:,} bytes before, {os.path.getsize(path):,} now')


def export(run, to, out, image_size=None, overwrite=False):
    """Write the network of a run or file, whole or not at all, in one of the formats of `WRITERS`.

    Raises ValueError if `out` exists and `overwrite` is not set.
    """
    if image_size and to != 'onnx':
        raise ValueError('--image_size goes with --to onnx')
    if os.path.exists(out) and not overwrite:
        raise ValueError(f'{out} exists already; --overwrite replaces it')
    f, params = load_teacher(checkpoint_of(run))
    content = write(f, params, to, image_size)
    write_whole(out, content)
    print(f'{out}: {describe(params)} for {to}, {len(content):,} bytes')


def info(run):
    """Print the network in a run or file, the file's size and its SHA-256."""
    path = checkpoint_of(run)
    loaded = load_params(path)
    _, params = build(loaded, path)
    statistics = sum(v.numel() for k, v in params.items() if k.endswith(STATISTICS))
    dtypes = ', '.join(sorted({str(v.dtype).removeprefix('torch.') for v in loaded.values()}))
    print(f'{path}: {describe(params)}')
    print(f'{num_parameters(params):,} parameters and {statistics:,} running statistics, {dtypes}')
    if os.path.isfile(path):
        with open(path, 'rb') as file:
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
        print(f'{os.path.getsize(path):,} bytes, SHA-256 {digest}')


def print_predictions(run, images, top, image_size=None, as_json=False):
    """Print a line for each image file: its `top` most probable classes, or on stderr why it cannot be read.

    Exits with status 1 at the end if one could not be read.
    """
    f, params, classes, usual = open_network(run)
    failed = False
    for path in images:
        try:
            best = [(classes[i], i, p) for i, p in predict(f, params, path, image_size or usual, top)]
        except (OSError, ValueError) as error:
            ending.print_line(f'error: {error}')
            failed = True
            continue
        if as_json:
            found = [{'class': name, 'number': number, 'probability': p} for name, number, p in best]
            print(json.dumps({'image': path, 'classes': found}))
        else:
            line = f'{path}: ' + ', '.join(f'{name} {100 * p:.2f}%' for name, _, p in best)
            print(arguments.printable(line.replace('\n', '?')))
    if failed:
        sys.exit(1)


def main():
    """Run the subcommand: slim, info, predict or export."""
    parser = arguments.Parser(__doc__)
    commands = parser.add_subparsers(
        dest='command', required=True, metavar='COMMAND', parser_class=arguments.subcommand
    )
    command = commands.add_parser('slim', help="reduce a run's checkpoint to its parameters")
    command.add_argument('run', type=arguments.path, help='a folder that holds model.pt7')
    command = commands.add_parser('info', help='print what network a file or a run holds')
    command.add_argument('run', type=arguments.path, metavar='FILE', help='a file, or a folder that holds model.pt7')
    command = commands.add_parser('predict', help='print the most probable classes of images')
    command.add_argument('run', type=arguments.path, metavar='RUN', help='a folder that holds model.pt7, or a file')
    command.add_argument('images', nargs='+', type=arguments.path, metavar='IMAGE', help='an image file')
    command.add_argument('--top', default=5, type=arguments.number(int, 1), help='number of classes')
    size = "height and width (default: the network's)"
    command.add_argument('--image_size', type=arguments.number(int, 8, 1024), metavar='N', help=size)
    command.add_argument('--json', action='store_true', help='a line of JSON for each image')
    command = commands.add_parser('export', help='write the network in another format')
    command.add_argument('run', type=arguments.path, metavar='RUN', help='a folder that holds model.pt7, or a file')
    command.add_argument('out', type=arguments.path, metavar='OUT', help='the file to write')
    command.add_argument('--to', required=True, choices=list(WRITERS))
    image_size = arguments.number(int, 1, 4096)
    command.add_argument('--image_size', type=image_size, help='for onnx: height and width (default: 224, CIFAR 32)')
    command.add_argument('--overwrite', action='store_true', help='replace OUT where it exists')
    opt = parser.parse_args()
    if opt.command == 'export':
        export(opt.run, opt.to, opt.out, opt.image_size, opt.overwrite)
    elif opt.command == 'predict':
        print_predictions(opt.run, opt.images, opt.top, opt.image_size, opt.json)
    else:
        {'slim': slim, 'info': info}[opt.command](opt.run)


if __name__ == '__main__':
    ending.with_its_reader()
    ending.run(main)
