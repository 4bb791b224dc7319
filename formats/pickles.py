"""Read torch files as data: archives and pickles are checked before torch reads them, and nothing in them runs."""

import collections
import io
import json
import pickletools
import re
import shlex
import zipfile

import torch

from formats.unwrap import AVERAGED, PARTS

MAX_UNFOLDED = 10_000_000  # objects of a pickle, each counted once for each reference to it
PICKLED = re.compile(  # all that a checkpoint's pickle needs to name; bytearray(2**34) would be short, but not small
    r'collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch\.nn\.parameter Parameter'
    r'|torch (\w+Storage|Size|device|bool|[a-z]+\d+)'
)
SETTINGS = re.compile(  # names of what training scripts save besides the weights
    r'(argparse|collections|datetime|easydict|lightning\w*|numpy|omegaconf|pathlib|pytorch_lightning|torch\.optim|yacs)'
    r'[. ].*|_codecs encode|(__builtin__|builtins) (dict|list|object|set)|copy_reg _reconstructor'
)
ADVISED = {name: (1, name) for name in (*AVERAGED, *PARTS, 'stats')}  # the size and text of an object on the stack
ONE = (1, None)  # an object whose text does not matter
MAX_REFUSED = 1000  # refused names in one pickle; the advice depends on all of them
MAX_NAME = 200  # characters of a module's or class's name in a pickle
MAX_GROWTH = 8  # of a pickle by rewriting, as a factor


def read_torch(path):
    """What torch.save wrote, read with weights_only=True after a check of its zip archive and pickles."""
    with open(path, 'rb') as file:
        content = io.BytesIO(file.read())
    if content.getbuffer()[:2] == b'PK':  # torch's own test of an archive, which differs from zipfile's
        content = _plain_archive(content, path)
    else:  # the format before archives: magic number, version, system, objects, names of storages, then their values
        pickles = b''.join(_checked_pickle(content, path) for _ in range(5))
        if pickles != content.getbuffer()[: content.tell()]:
            content = io.BytesIO(pickles + content.read())
    content.seek(0)
    return torch.load(content, map_location='cpu', weights_only=True)


def _plain_archive(content, path):
    """A zip archive rewritten as zipfile reads it: torch could find another directory in the same bytes."""
    plain, archive = io.BytesIO(), zipfile.ZipFile(content)
    unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > len(content.getbuffer()):  # torch.save does not compress
        raise ValueError(f'a zip archive that unpacks to {unpacked:,} bytes, more than its own size')
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise ValueError('a compressed zip archive')  # an entry can unpack to more than it declares
    with zipfile.ZipFile(plain, 'w') as rewritten:
        for entry in archive.infolist():
            values = archive.read(entry)
            if entry.filename.lower().endswith('.pkl'):
                values = _checked_pickle(io.BytesIO(values), path)
            rewritten.writestr(entry.filename, values)
    return plain


def _checked_pickle(stream, path):
    """The bytes of the next pickle of a stream, in protocol 2 and checked; advice calls the file `path`."""
    start = stream.tell()
    if stream.getbuffer()[start : start + 2] in (b'\x80\4', b'\x80\5'):
        content = _as_protocol_2(stream)
        _check_pickle(io.BytesIO(content), path)
        return content
    _check_pickle(stream, path)
    return bytes(stream.getbuffer()[start : stream.tell()])


def _as_protocol_2(stream):
    """The next pickle of a stream, rewritten from protocol 4 to protocol 2, the only one that torch reads.

    Protocol 4 names a class by two strings on the stack; protocol 2 has one operation, which replaces them. Operations
    that protocol 2 does not have are kept, for torch to refuse.
    """
    content, start, out = stream.getbuffer(), stream.tell(), bytearray()
    memo = {}  # number -> string, or None for other objects
    pushed = collections.deque(maxlen=2)  # (position in `out`, string) of the strings on top of the stack
    for code, value, at in pickletools.genops(stream):
        operation, name = bytes(content[at : stream.tell()]), code.name
        if name == 'FRAME':
            continue
        if name == 'PROTO':
            operation = b'\x80\2'
        elif name == 'MEMOIZE':
            value = len(memo)
            operation = b'r' + value.to_bytes(4, 'little')
        elif name == 'STACK_GLOBAL':
            (at, module), (_, attribute) = pushed
            if not (module + attribute).isprintable() or max(len(module), len(attribute)) > MAX_NAME:
                raise ValueError(f'{module[:MAX_NAME]!r} {attribute[:MAX_NAME]!r} in it is not a name')
            del out[at:]
            operation = f'c{module}\n{attribute}\n'.encode()
        elif name.endswith('GET') and memo.get(value) is not None:  # its first copy may have been deleted from `out`
            name, value = 'BINUNICODE', memo[value]
        if name.endswith('PUT') or name == 'MEMOIZE':
            memo[value] = pushed[-1][1] if pushed and len(pushed[-1][1]) <= MAX_NAME else None
        elif name.endswith(('BINUNICODE', 'BINUNICODE8')):
            text = value.encode('utf-8', 'surrogatepass')
            operation = b'X' + len(text).to_bytes(4, 'little') + text
            pushed.append((len(out), value))
        else:
            pushed.clear()
        out += operation
        if len(out) > MAX_GROWTH * (stream.tell() - start) + 2**20:
            raise ValueError(f'a pickle that grows {MAX_GROWTH}-fold in protocol 2')
    return bytes(out)


def _check_pickle(stream, path):
    """Refuse a pickle of anything but tensors in containers, or of nested tuples that take forever to hash.

    Nothing is unpickled: the stack holds (size, text) of each object, with text only if it may tell where the weights
    are, and None for a mark.
    """
    stack, memo, unfolded, marks, refused, keys = [], {}, 0, 0, [], set()
    for code, value, _ in pickletools.genops(stream):
        if code.name == 'GLOBAL' and not PICKLED.fullmatch(value):
            refused.append(value)
            if len(refused) > MAX_REFUSED:
                raise ValueError(f'{value!r} in it is neither a tensor nor a container of tensors')
        size, item = 1, ADVISED.get(value, ONE) if code.name.endswith('UNICODE') else ONE
        if pickletools.markobject in code.stack_before:
            while (top := stack.pop()) is not None:
                size += top[0]
            marks -= 1
            if code.name != 'TUPLE':
                stack.pop()  # the list or dictionary that takes them
        else:
            size += sum(stack.pop()[0] for _ in code.stack_before)
        unfolded += size
        if unfolded > MAX_UNFOLDED:
            raise ValueError(f'a pickle of more than {MAX_UNFOLDED:,} objects')
        if code.name.endswith('GET'):
            item = memo[value]
        elif size > 1:
            item = (size, None)
        # A key of the outermost dictionary follows the dictionary itself, or a mark and pairs of key and value.
        outermost = len(stack) == 1 or (marks == 1 and stack[1:2] == [None] and len(stack) % 2 == 0)
        if outermost and item and item[1]:
            keys.add(item[1])
        if code.name.endswith('PUT'):
            memo[value] = stack[-1]
        elif code.name == 'MARK':
            stack.append(None)
            marks += 1
        else:
            stack.extend(item for _ in code.stack_after)
    if refused:
        error = ValueError(f'{refused[0]!r} in it is neither a tensor nor a container of tensors')
        advice = _advice(refused, keys, path)
        if advice:
            error.add_note(advice)
        raise error


def _advice(names, keys, path):
    """Advice for a checkpoint with refused names, or None; keys: those of `ADVISED` in its outermost dictionary."""
    if any(name.startswith('torch.nn.modules.') for name in names):
        return (
            'it is a whole network, which only the code that made it can read; save its parameters there instead: '
            'torch.save(model.state_dict(), "weights.pth")'
        )
    if not all(map(SETTINGS.fullmatch, names)):
        return None
    part = next((key for key in (*AVERAGED, *PARTS) if key in keys), None)
    if part is None:
        return 'save the parameters alone: torch.save(model.state_dict(), "weights.pth")'
    kept = [part, 'stats'] if part == 'params' and 'stats' in keys else [part]
    program = (
        f'import torch; s = torch.load({json.dumps(str(path))}, map_location="cpu", weights_only=False); '
        f'torch.save({{k: s[k] for k in {json.dumps(kept)}}}, "weights.pth")'
    )
    return f'if you trust it, this extracts the weights, and may run code in the file: python -c {shlex.quote(program)}'
