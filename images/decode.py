"""Decode image files with OpenCV: unrotated, with the colours that PIL gives; truncated files are refused."""

import io
import os
import stat
import warnings

os.environ.setdefault('OPENCV_IO_MAX_IMAGE_PIXELS', str(2**27))  # a header of a few bytes can declare any size

import cv2  # noqa: E402
import numpy as np  # noqa: E402

cv2.setNumThreads(0)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # `read_image` names the bad file

warnings.filterwarnings('ignore', module=r'PIL\.')  # about metadata

MAX_BYTES = 2**28  # of an image file
LIMIT = os.environ['OPENCV_IO_MAX_IMAGE_PIXELS']
MAX_PIXELS = int(LIMIT) if LIMIT.isdecimal() else 2**27  # OpenCV also takes units, like 512MB
EXTRA_SAMPLES, BITS, PLANES, SEPARATE = 338, 258, 284, 2  # tags of a TIFF, and a value of the last one


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
        image = _decode_plain(content)
    if image is None:
        raise ValueError(f'{path} is not a readable image{"" if whole else ": it is empty or cut short"}')
    return _part(image, box(*image.shape[:2])) if box else image


def _open_at_once(path, flags):
    return os.open(path, flags | os.O_NONBLOCK)  # otherwise a named pipe waits for a writer


def _decode(content):
    try:
        colours = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        return cv2.imdecode(np.frombuffer(content, np.uint8), colours)
    except cv2.error as error:  # for example, more pixels than OpenCV's limit
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError('to decode an image') from None
        return None


def _decode_plain(content):
    """Decode to colours without applying alpha, as PIL's convert('RGB') does.

    OpenCV does so too, except for GIF and TIFF, which it darkens: PIL reads GIFs, and TIFFs with alpha. PIL also reads
    animated PNGs, of which OpenCV passes over a first picture that is not part of the animation.
    """
    if not content.startswith((b'GIF8', b'II', b'MM')) and not 0 < content.find(b'acTL') < content.find(b'IDAT'):
        return _decode(content)
    from PIL import Image  # slow to import, and rarely needed

    Image.MAX_IMAGE_PIXELS = None  # they are counted here
    try:
        image = Image.open(io.BytesIO(content), formats=('GIF', 'TIFF', 'PNG'))
        tags = image.tag_v2 if image.format == 'TIFF' else {}
        if tags and EXTRA_SAMPLES not in tags:
            return _decode(content)
        mixed_up = tags.get(PLANES) == SEPARATE and max(tags.get(BITS)) > 8  # by PIL
        if image.width * image.height > MAX_PIXELS or mixed_up:
            return None
        return np.array(image.convert('RGB'))
    except MemoryError:
        raise
    except Exception:  # a damaged file can make PIL raise anything
        return None


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
