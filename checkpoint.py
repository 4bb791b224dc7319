"""Slims, describes and exports a saved network.

    python checkpoint.py slim logs/RUN            # drop what only a resume needs, before publishing a run
    python checkpoint.py info FILE                # what network a file or a run holds
    python checkpoint.py export logs/RUN --to torchvision resnet34.pth

A run is a folder that holds model.pt7; export and info also take a file: a checkpoint of ours or of the authors',
their folded export (.pth, .hkl), a torchvision ResNet's state_dict, or a .safetensors of any of these.
Files are read as data, never as code: nothing in them can run or open another file.
"""

import hashlib
import os

from engine import arguments, ending
from formats.networks import build, checkpoint_of, describe, load, load_params, load_teacher
from formats.write import WRITERS, save, write, write_whole
from utils import STATISTICS, num_trained, without_adapters


def slim(run):
    """Reduce a run's checkpoint to its parameters; it can still teach, but no longer be resumed."""
    path = os.path.join(run, 'model.pt7')
    state = load(path)
    before = os.path.getsize(path)
    save(path, {'params': without_adapters(state['params']), 'epoch': state.get('epoch')})
    print(f'{path}: {before:,} bytes before, {os.path.getsize(path):,} now')


def export(run, to, out, image_size=None, overwrite=False):
    """Write the network of a run or file, whole or not at all, in one of the formats of `WRITERS`.

    Raises ValueError if `out` exists and `overwrite` is not set.
    """
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
    print(f'{num_trained(params):,} parameters and {statistics:,} running statistics, {dtypes}')
    if os.path.isfile(path):
        with open(path, 'rb') as file:
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
        print(f'{os.path.getsize(path):,} bytes, SHA-256 {digest}')


def main():
    """Run the subcommand: slim, info or export."""
    parser = arguments.Parser(__doc__)
    commands = parser.add_subparsers(
        dest='command', required=True, metavar='COMMAND', parser_class=arguments.subcommand
    )
    command = commands.add_parser('slim', help="reduce a run's checkpoint to its parameters")
    command.add_argument('run', type=arguments.path, help='a folder that holds model.pt7')
    command = commands.add_parser('info', help='print what network a file or a run holds')
    command.add_argument('run', type=arguments.path, metavar='FILE', help='a file, or a folder that holds model.pt7')
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
    else:
        {'slim': slim, 'info': info}[opt.command](opt.run)


if __name__ == '__main__':
    ending.run(main)
