"""Decode image files with OpenCV: unrotated, with the colours that PIL gives; truncated files are refused."""

import os
import stat

os.environ.setdefault('OPENCV_IO_MAX_IMAGE_PIXELS', str(2**27))  # a header of a few bytes can declare any size

import cv2  # noqa: E402
import numpy as np  # noqa: E402

cv2.setNumThreads(0)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # `read_image` names the bad file

MAX_BYTES = 2**28  # of an image file
TIFF_ALPHA, TIFF_BITS, TIFF_PLANES = 338, 258, 284  # tags: ExtraSamples, BitsPerSample, PlanarConfiguration
PREMULTIPLIED, PLAIN_ALPHA, SEPARATE = 1, 2, 2  # two values of ExtraSamples and one of PlanarConfiguration
MAX_TAGS = 2**16
MAX_GIF_HEADER = 2**20  # bytes


def read_image(path, box=None):
    """Decode an image file to (H, W, 3) uint8, red, green, blue, unrotated as PIL gives it.

    With `box`, a function (height, width) -> (top, left, height, width), only that part; the rows of a JPEG below it
    are not decoded. Raises ValueError naming the file if it is unreadable or truncated (which OpenCV alone accepts).
    """
    with open(path, 'rb', buffering=0, opener=_open_at_once) as file:  # a buffer would only be one more copy
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            raise ValueError(f'{path} is not a regular file of at most {MAX_BYTES:,} bytes: it is not read')
        content = file.read()
    whole, frame = _scan_jpeg(content) if content.startswith(b'\xff\xd8') else (_has_whole_chunks(content), None)
    image = None
    if whole and box and frame:
        image = _decode_box(content, frame, box)
        if image is not None:
            return image
    if whole:
        image = _decode_opaque(content)
    if image is None:
        raise ValueError(f'{path} is not a readable image{"" if whole else ": it is empty or cut short"}')
    return _part(image, box(*image.shape[:2])) if box else image


def _open_at_once(path, flags):
    return os.open(path, flags | os.O_NONBLOCK)  # otherwise a named pipe waits for a writer


def _decode(content, flags=cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION):
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:  # for example, more pixels than OpenCV's limit
        return None


def _decode_opaque(content):
    """Decode to colours without applying alpha, as PIL's convert('RGB') does.

    OpenCV does so too, except for GIF and TIFF, which it darkens: their headers are changed to declare no alpha.
    """
    if content.startswith((b'GIF87a', b'GIF89a')):
        return _decode(_opaque_gif(content))
    if not content.startswith((b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')):
        return _decode(content)
    (alpha, where), (bits, _) = (_tiff_tag(content, tag) for tag in (TIFF_ALPHA, TIFF_BITS))
    if alpha == PREMULTIPLIED and bits in (8, 16):
        image = _decode(content, cv2.IMREAD_UNCHANGED)
        if image is not None and image.ndim == 3 and image.shape[2] == 4:  # OpenCV drops the alpha of grey images
            if bits == 16 and _tiff_tag(content, TIFF_PLANES)[0] == SEPARATE:
                return None  # OpenCV mixes up such planes
            return _unmultiplied(image >> 8 if image.dtype == np.uint16 else image)
    return _decode(content[:where] + b'\0\0' + content[where + 2 :] if alpha == PLAIN_ALPHA else content)


def _opaque_gif(content):
    """A GIF whose first picture has no transparent colour; only the first MiB of extensions is searched."""
    at = 13 + (3 << (content[10] & 7) + 1 if content[10:11] >= b'\x80' else 0)  # after the header and its palette
    while content[at : at + 1] == b'!' and at < MAX_GIF_HEADER:
        if content[at + 1 : at + 3] == b'\xf9\x04':  # the lowest bit of the next byte marks such a colour
            flags = int.from_bytes(content[at + 3 : at + 4])
            return content[: at + 3] + bytes([flags & ~1]) + content[at + 4 :]
        at += 2
        while content[at : at + 1] > b'\0' and at < MAX_GIF_HEADER:
            at += 1 + content[at]
        at += 1
    return content


def _tiff_tag(content, tag):
    """The first number of a 16-bit tag in the first directory of a TIFF, and its position; (0, 0) if there is none."""
    order = 'little' if content.startswith(b'II') else 'big'

    def number(at, size):
        return int.from_bytes(content[at : at + size], order)

    size, entry = (8, 20) if number(2, 2) == 43 else (4, 12)  # bytes of an offset and of an entry; 43: BigTIFF
    directory = number(size, size)
    first = directory + (8 if size == 8 else 2)
    count = min(number(directory, first - directory), MAX_TAGS)
    at = next((at for at in range(first, first + entry * count, entry) if number(at, 2) == tag), None)
    if at is None or number(at + 2, 2) != 3:  # not a 16-bit type
        return 0, 0
    where = at + 4 + size  # of the value, or of the offset to values that do not fit
    where = where if 2 * number(at + 4, size) <= size else number(where, size)
    return number(where, 2), where


def _unmultiplied(image):
    """Undo multiplication by alpha: (H, W, 4) blue, green, red, alpha -> (H, W, 3) red, green, blue."""
    alpha, colours = image[..., 3:], image[..., 2::-1].astype(np.uint16)
    colours *= np.where(alpha, 255, 0).astype(np.uint16)
    colours //= np.maximum(alpha, 1)
    return np.minimum(colours, 255, out=colours).astype(np.uint8)


def _part(image, box):
    top, left, height, width = box
    return image[top : top + height, left : left + width]


def _scan_jpeg(content):
    """Whether a JPEG has an end marker after its first scan (one inside a thumbnail does not count), and its frame.

    The frame is the position of the frame header of a baseline image without restart markers, None for other JPEGs.
    """
    at, segments = 2, {}
    while content[at : at + 1] == b'\xff' and at + 4 <= len(content):
        marker = content[at + 1]
        if marker == 0xDA:  # start of scan: from here on, FF D9 is the end of the image
            frame = None if 0xDD in segments else segments.get(0xC0)
            return content.rfind(b'\xff\xd9', at) >= 0, frame  # backwards: it should be the last two bytes
        segments[marker] = at
        at += 1 if marker == 0xFF else 2 + int.from_bytes(content[at + 2 : at + 4], 'big')  # FF FF: a fill byte
    return False, None


def _has_whole_chunks(content):
    """Whether a file is not empty and, if a PNG, holds all its chunks: OpenCV reserves the memory that one declares."""
    if not content.startswith(b'\x89PNG\r\n\x1a\n'):
        return bool(content)
    at = 8
    while at + 12 <= len(content):  # length (4 bytes), name (4), data, checksum (4)
        end = at + 12 + int.from_bytes(content[at : at + 4], 'big')
        if end > len(content):
            return False
        if content[at + 4 : at + 8] == b'IEND':
            return True
        at = end
    return False


def _decode_box(content, frame, box):
    """A box of a baseline JPEG, without decoding the rows below it; None if that is impossible or saves too little.

    The decoder gets a header with fewer rows, and no end marker, which it would search for and warn about.
    """
    # frame: FF C0, length (2 bytes), precision, height (2), width (2), components, 3 bytes for each component
    height, width = (int.from_bytes(content[frame + i : frame + i + 2], 'big') for i in (5, 7))
    components = int.from_bytes(content[frame + 9 : frame + 10], 'big')
    sampling = content[frame + 11 : frame + 10 + 3 * components : 3]
    unit = 8 * max((s & 15 for s in sampling), default=0)  # rows that are encoded together
    if not (unit and height and width):
        return None
    top, left, box_height, box_width = box(height, width)
    rows = top + box_height + unit  # one unit more, since colour is interpolated from neighbouring rows
    if rows > height - 2 * unit:
        return None
    shorter = content[: frame + 5] + rows.to_bytes(2, 'big') + content[frame + 7 : content.rfind(b'\xff\xd9')]
    image = _decode(shorter)
    if image is None or image.shape[:2] != (rows, width):
        return None
    return _part(image, (top, left, box_height, box_width))
