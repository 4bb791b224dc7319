"""The argument parser of every script, and the types of its flags."""

import argparse
import json
import math
import os
import re
import sys

TEACHERS = {'--teacher_id': '--teacher_params', '--teacher_params': '--teacher_id'}  # its name in other scripts
GPU = r'\d+|(GPU|MIG)-[\w/-]+'  # a GPU in CUDA_VISIBLE_DEVICES and --gpu_id
MOST = 1e30  # of a rate or a weight: a product of two fits into float32, or is reported as not finite


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Prints the description unwrapped, and every default, unless it is empty or the help names it."""

    def _get_help_string(self, action):
        empty = action.default in (None, '', []) or action.default is False
        return action.help if empty or 'default: ' in action.help else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser with an error of one line and exit status 2."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=_Formatter, allow_abbrev=False)

    def error(self, message):
        for flag, other in TEACHERS.items():
            if f' {flag}' in message.replace('=', ' ') and other in self._option_string_actions:
                message += f' (here a teacher is named with {other})'
        self.exit(2, f'{self.prog}: error: {message}\n')


def subcommand(prog, description=None, **_):
    """The `Parser` of a subcommand: the parser_class of add_subparsers."""
    parser = Parser(description)
    parser.prog = prog
    return parser


def listed(flags):
    """Parsed flags, {name: value}, as lines of name=value."""
    lines = ['parsed options:']
    for name, value in flags.items():
        item = f'{name}={value!r}'
        if len(lines) > 1 and len(lines[-1]) + len(item) < 100:
            lines[-1] += f'  {item}'
        else:
            lines.append(f'  {item}')
    return '\n'.join(lines)


def printable(text):
    """A text that may quote a hostile file, without what could control a terminal; lines stay lines."""
    return ''.join(c if c.isprintable() or c == '\n' else '?' for c in text)


def number(kind, low, high=math.inf, above=False):
    """An argparse type: an int or float from low to high, with `above` excluding low."""

    def parse(text):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f'{text!r} is not {"an integer" if kind is int else "a number"}') from None
        if not (low < value if above else low <= value) or not value <= high or not abs(value) <= sys.float_info.max:
            bounds = f'{"above" if above else "at least"} {low:g}' + ('' if high == math.inf else f', at most {high:g}')
            raise argparse.ArgumentTypeError(f'{text:.99} is out of range ({bounds})')
        return value

    return parse


def path(text):
    """An argparse type for every flag that names a file or folder: expands ~, also in --flag=~/folder."""
    return os.path.expanduser(text)


def epoch_list(text):
    """An argparse type: a JSON list of increasing epochs, returned as the text itself."""
    try:
        epochs = json.loads(text)
    except (ValueError, RecursionError):
        epochs = None
    valid = isinstance(epochs, list) and all(type(e) is int and e > 0 for e in epochs)
    if not valid or sorted(set(epochs)) != epochs:
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON list of increasing epochs, like [60,120,160]')
    return text


def group_list(text):
    """An argparse type: distinct group numbers from 0, separated by commas, returned as the text itself."""
    parts = text.split(',') if text else []
    if not all(p.isascii() and p.isdigit() and len(p) < 4 for p in parts) or len(set(map(int, parts))) != len(parts):
        raise argparse.ArgumentTypeError(f'{text!r} is not a list of group numbers like 0,2')
    return text


def gpu_list(text):
    """An argparse type: GPU numbers or identifiers separated by commas, as in CUDA_VISIBLE_DEVICES."""
    if text and not all(re.fullmatch(GPU, name) for name in text.split(',')):
        raise argparse.ArgumentTypeError(f'{text!r} is not a list of GPUs like 0,1')
    return text
