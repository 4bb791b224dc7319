"""Image files of every kind have the pixels that PIL gives, and files without a whole image are refused."""

import os
import struct

import cv2
import numpy as np
import pytest
from conftest import difference, draw, smooth
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from images import decode, folders


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / 'pipe.png')  # no process writes to it
    (tmp_path / 'zero.png').symlink_to('/dev/zero')  # has no size and no end
    for name in ('pipe.png', 'zero.png'):
        with pytest.raises(ValueError, match=f'{name} is not a regular file of at most'):
            decode.read_image(tmp_path / name)


def test_grey_alpha_and_turned_images_are_read_as_they_are_stored(tmp_path):
    picture = draw(np.random.default_rng(1), 1, (20, 30))
    cv2.imwrite(str(tmp_path / 'grey.png'), picture[..., 0])
    np.testing.assert_array_equal(decode.read_image(tmp_path / 'grey.png'), np.repeat(picture[..., :1], 3, 2))
    cv2.imwrite(str(tmp_path / 'alpha.png'), np.concatenate([picture, picture[..., :1]], 2))
    np.testing.assert_array_equal(decode.read_image(tmp_path / 'alpha.png'), picture[..., ::-1])
    exif = b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0'  # orientation 6: a quarter turn
    plain = cv2.imencode('.jpg', picture)[1].tobytes()
    turned = plain[:2] + b'\xff\xe1' + (len(exif) + 2).to_bytes(2, 'big') + exif + plain[2:]
    (tmp_path / 'plain.jpg').write_bytes(plain)
    (tmp_path / 'turned.png').write_bytes(turned)  # with a wrong suffix, too
    np.testing.assert_array_equal(decode.read_image(tmp_path / 'turned.png'), decode.read_image(tmp_path / 'plain.jpg'))


def with_alpha(rng, channels, dtype=np.uint8, planar=False, alpha=2, order='<'):
    """Random pixels (20, 30, channels), the last channel alpha, and a TIFF of them; alpha=1: premultiplied."""
    pixels = rng.integers(0, np.iinfo(dtype).max, (20, 30, channels), endpoint=True, dtype=dtype)
    planes = (pixels.transpose(2, 0, 1) if planar else pixels).astype(np.dtype(dtype).newbyteorder(order)).tobytes()
    count = channels if planar else 1
    tags = {
        **{256: [30], 257: [20], 258: [pixels.itemsize * 8] * channels, 259: [1], 262: [2 if channels > 2 else 1]},
        **{273: [1000 + i * len(planes) // count for i in range(count)], 277: [channels], 278: [20]},
        **{279: [len(planes) // count] * count, 284: [1 + planar], 338: [alpha]},
    }
    entries, more, at = b'', b'', 8 + 2 + 12 * len(tags) + 4
    for tag, values in tags.items():
        value = struct.pack(f'{order}{len(values)}H', *values)
        if len(value) > 4:
            more, value = more + value, struct.pack(f'{order}I', at + len(more))
        entries += struct.pack(f'{order}HHI', tag, 3, len(values)) + value.ljust(4, b'\0')
    start = {'<': b'II*\0', '>': b'MM\0*'}[order] + struct.pack(f'{order}IH', 8, len(tags))
    return pixels, (start + entries + bytes(4) + more).ljust(1000, b'\0') + planes


@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('planar', [False, True])
@pytest.mark.parametrize('channels, dtype', [(2, np.uint8), (4, np.uint8), (4, np.uint16)])
def test_a_tiff_is_not_darkened_by_its_alpha(tmp_path, channels, dtype, planar, order):
    path = tmp_path / 'image.tif'
    pixels, content = with_alpha(np.random.default_rng(0), channels, dtype, planar, order=order)
    path.write_bytes(content)
    if planar and (channels == 2 or dtype == np.uint16):  # PIL refuses the one and mixes up the other
        with pytest.raises(ValueError, match='image.tif is not a readable image'):
            decode.read_image(path)
        return
    plain = np.broadcast_to(pixels[..., : channels - 1] >> 8 * (pixels.itemsize - 1), (20, 30, 3))
    found = decode.read_image(path)
    np.testing.assert_array_equal(found, plain)
    np.testing.assert_array_equal(decode.read_image(path, lambda height, width: (3, 4, 5, 6)), found[3:8, 4:10])


@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_colours_that_a_tiff_multiplied_by_its_alpha_are_divided_by_it_as_pil_does(tmp_path, dtype, order):
    path = tmp_path / 'image.tif'
    path.write_bytes(with_alpha(np.random.default_rng(0), 4, dtype, alpha=1, order=order)[1])
    np.testing.assert_array_equal(decode.read_image(path), np.asarray(Image.open(path).convert('RGB')))


MOVING = {'save_all': True, 'append_images': [Image.new('L', (30, 20), grey) for grey in (9, 99)]}
SAVED = {  # mode of the image, and arguments of PIL's save
    'packed.tif': ('RGBA', {'compression': 'tiff_lzw'}),
    'big.tif': ('RGBA', {'big_tiff': True}),
    'grey.tif': ('LA', {}),
    'image.bmp': ('RGBA', {}),
    'image.webp': ('RGBA', {'lossless': True, 'exact': True}),
    'image.png': ('RGBA', {}),
    'grey.png': ('LA', {}),
    'palette.png': ('P', {'transparency': 3}),
    'image.gif': ('P', {}),
    'clear.gif': ('P', {'transparency': 3, 'comment': b'before it'}),
    'woven.gif': ('P', {'transparency': 3, 'interlace': 1}),
    'grey.gif': ('L', {}),
    'moving.gif': ('P', {**MOVING, 'transparency': 3}),
    'moving.png': ('RGBA', MOVING),
    'first.png': ('RGBA', {**MOVING, 'default_image': True}),
    'first_palette.png': ('P', {**MOVING, 'default_image': True, 'transparency': 3}),
    'moving.webp': ('RGB', {**MOVING, 'lossless': True}),
    'moving.tif': ('RGB', MOVING),
    'image.jfif': ('RGB', {'format': 'JPEG'}),
}


@pytest.mark.parametrize('name', SAVED)
def test_every_kind_of_file_has_the_plain_colours_that_pil_gives(tmp_path, name):
    mode, options = SAVED[name]
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, 'RGBA')
    (image.convert('RGB').quantize(16) if mode == 'P' else image.convert(mode)).save(tmp_path / name, **options)
    assert name.endswith(folders.IMAGE_SUFFIXES)
    expected = np.asarray(Image.open(tmp_path / name).convert('RGB'))
    np.testing.assert_array_equal(decode.read_image(tmp_path / name), expected)
    if mode == 'RGBA':
        np.testing.assert_array_equal(expected, pixels[..., :3])


@pytest.mark.parametrize('kind', ['.jpg', '.png', '.bmp', '.webp', '.gif', '.tif'])
@pytest.mark.parametrize('part', [0, 0.1, 0.5, 0.9])
def test_an_image_cut_short_is_refused_by_name_alone(tmp_path, capfd, kind, part):
    picture = draw(np.random.default_rng(1), 1, (60, 80))
    content = cv2.imencode(kind, picture)[1].tobytes()
    path = tmp_path / f'cut{kind}'
    path.write_bytes(content)
    assert decode.read_image(path).shape == (60, 80, 3)
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=f'cut{kind} is not a readable image'):
        decode.read_image(path)
    assert kind == '.png' or capfd.readouterr().err == ''  # libpng has no switch for its messages


def test_a_cut_jpeg_is_refused_even_if_its_thumbnail_is_whole(tmp_path):
    picture = draw(np.random.default_rng(1), 1, (60, 80))
    thumbnail = cv2.imencode('.jpg', picture[::4, ::4])[1].tobytes()
    plain = cv2.imencode('.jpg', picture)[1].tobytes()
    content = plain[:2] + b'\xff\xe1' + (len(thumbnail) + 2).to_bytes(2, 'big') + thumbnail + plain[2:]
    (tmp_path / 'whole.jpg').write_bytes(content)
    assert decode.read_image(tmp_path / 'whole.jpg').shape == (60, 80, 3)
    (tmp_path / 'cut.jpg').write_bytes(content[:-200])
    with pytest.raises(ValueError, match='cut short'):
        decode.read_image(tmp_path / 'cut.jpg')


STARTS = [b'', b'\xff\xd8\xff\xe0', b'\x89PNG\r\n\x1a\n', b'BM', b'GIF89a', b'II*\0', b'MM\0+']


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(STARTS))
def test_bytes_that_are_no_image_are_refused(tmp_path_factory, content, start):
    path = tmp_path_factory.getbasetemp() / 'noise.jpg'
    path.write_bytes(start + content)
    with pytest.raises(ValueError, match='not a readable image'):
        decode.read_image(path)


JPEGS = {
    'usual': {},
    'full colour': {'subsampling': '4:4:4'},
    'half colour': {'subsampling': '4:2:2'},
    'with restarts': {'restart_marker_rows': 1},
    'optimal codes': {'optimize': True},
    'progressive': {'progressive': True},
}


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
@pytest.mark.parametrize('kind', JPEGS)
def test_a_part_of_a_jpeg_is_that_part_of_the_whole_with_fewer_rows_decoded(tmp_path, monkeypatch, capfd, mode, kind):
    path, rng, imdecode, rows = tmp_path / 'image.jpg', np.random.default_rng(1), cv2.imdecode, []
    options = {k: v for k, v in JPEGS[kind].items() if mode == 'RGB' or k != 'subsampling'}
    Image.fromarray(smooth(rng, 181, 150)).convert(mode).save(path, quality=90, **options)
    whole = decode.read_image(path)
    monkeypatch.setattr(cv2, 'imdecode', lambda *words: rows.append(len(imdecode(*words))) or imdecode(*words))
    for height in (1, 8, 17, 100, 133, 150, 165, 180, 181):
        top, left = int(rng.integers(181 - height + 1)), int(rng.integers(100))
        box = top, left, height, 50
        found = decode.read_image(path, lambda *shape, box=box: box if shape == (181, 150) else None)
        np.testing.assert_array_equal(found, whole[top : top + height, left : left + 50])
    assert len(rows) == 9 and max(rows) == 181
    assert (min(rows) == 181) == (kind in ('progressive', 'with restarts'))
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('transform', [0, 2])
def test_cmyk_jpegs_are_read_as_pil_reads_them(tmp_path, transform):
    path = tmp_path / 'print.jpg'
    Image.fromarray(smooth(np.random.default_rng(1), 60, 80, 4), 'CMYK').save(path, quality=95)
    content = path.read_bytes()
    at = content.index(b'Adobe') + 11  # this byte is 0 for CMYK and 2 for YCCK, as in most of ImageNet's
    path.write_bytes(content[:at] + bytes([transform]) + content[at + 1 :])
    with Image.open(path) as theirs:
        assert theirs.mode == 'CMYK'
        assert difference(decode.read_image(path), theirs.convert('RGB'))[1] <= 2


@pytest.mark.parametrize('mode', ['RGB', 'L', '1', 'P', 'LA', 'RGBA'])
def test_any_kind_of_png_named_jpeg_is_read_as_pil_reads_it(tmp_path, mode):
    path = tmp_path / 'picture.JPEG'
    Image.fromarray(smooth(np.random.default_rng(1), 60, 80)).convert(mode).save(path, format='PNG')
    with Image.open(path) as theirs:
        assert difference(decode.read_image(path), theirs.convert('RGB'))[1] == 0


@pytest.mark.parametrize('channels', [1, 3])
def test_16_bit_pngs_keep_their_upper_8_bits(tmp_path, channels):
    deep = np.random.default_rng(1).integers(0, 65536, (20, 30, channels), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / 'deep.png'), deep)
    expected = np.broadcast_to(deep[..., ::-1] >> 8, (20, 30, 3))
    np.testing.assert_array_equal(decode.read_image(tmp_path / 'deep.png'), expected)


def test_grey_progressive_and_turned_jpegs_are_read_as_pil_reads_them(tmp_path):
    image = Image.fromarray(smooth(np.random.default_rng(1), 60, 80))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn to the right
    image.save(tmp_path / 'turned.jpg', exif=exif)
    image.save(tmp_path / 'progressive.jpg', progressive=True)
    image.convert('L').save(tmp_path / 'grey.jpg')
    for path in tmp_path.iterdir():
        with Image.open(path) as theirs:
            assert difference(decode.read_image(path), theirs.convert('RGB'))[1] == 0
    grey = decode.read_image(tmp_path / 'grey.jpg')
    assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 0] == grey[..., 2]).all()


@pytest.mark.parametrize('name', ['a.gif', 'a.tif'])
def test_more_pixels_than_the_limit_are_refused_of_every_decoder(tmp_path, monkeypatch, name):
    Image.new('LA', (30, 20)).save(tmp_path / name)
    assert decode.read_image(tmp_path / name).shape == (20, 30, 3)
    monkeypatch.setattr(decode, 'MAX_PIXELS', 599)
    with pytest.raises(ValueError, match=f'{name} is not a readable image'):
        decode.read_image(tmp_path / name)


@pytest.mark.parametrize('chunk', [b'tEXt', b'IDAT', b'PLTE'])
def test_a_png_that_declares_more_than_it_holds_is_refused_before_memory_is_reserved(tmp_path, chunk):
    """OpenCV would take 4.5 GB for these 47 bytes."""
    header = b'\x89PNG\r\n\x1a\n' + (13).to_bytes(4, 'big') + b'IHDR' + (8).to_bytes(4, 'big') * 2 + b'\x08\x02\0\0\0'
    (tmp_path / 'a.png').write_bytes(header + bytes(4) + (0xFFFFFFF0).to_bytes(4, 'big') + chunk + b'data')
    with pytest.raises(ValueError, match='a.png is not a readable image: it is empty or cut short'):
        decode.read_image(tmp_path / 'a.png')


def test_what_follows_the_end_of_a_png_does_not_matter(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / 'a.png')
    content = (tmp_path / 'a.png').read_bytes()
    (tmp_path / 'a.png').write_bytes(content + b'more')
    assert np.array_equal(decode.read_image(tmp_path / 'a.png'), image)
    (tmp_path / 'a.png').write_bytes(content[:-6])
    with pytest.raises(ValueError, match='cut short'):
        decode.read_image(tmp_path / 'a.png')
