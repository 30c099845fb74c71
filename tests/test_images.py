"""nerf.datasets.images: each documented conversion, refusals, and area averaging."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from nerf.datasets.arrays import shrink, with_alpha
from nerf.datasets.images import list_images, read_image, read_images

HEIGHT, WIDTH = 5, 7


def noise(*channels, seed=0, high=256):
    return np.random.default_rng(seed).integers(0, high, (HEIGHT, WIDTH, *channels))


def save(folder, array, mode=None, name="picture.png", **settings):
    """``array`` as a picture file; ``mode`` only where its shape and type leave it open."""
    image = Image.fromarray(array)
    assert mode is None or image.mode == mode
    image.save(folder / name, **settings)
    return folder / name


# --------------------------------------------------------------------------------- conversions


def test_rgb_and_rgba_are_kept_as_they_are(tmp_path):
    for channels in (3, 4):
        pixels = noise(channels).astype(np.uint8)
        found = read_image(save(tmp_path, pixels))
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, pixels)


def test_gray_becomes_rgb(tmp_path):
    gray = noise().astype(np.uint8)
    found = read_image(save(tmp_path, gray, "L"))
    np.testing.assert_array_equal(found, np.repeat(gray[..., None], 3, -1))


def test_black_and_white_becomes_rgb(tmp_path):
    bits = noise(high=2).astype(bool)
    found = read_image(save(tmp_path, bits, "1"))
    np.testing.assert_array_equal(found, np.repeat(bits[..., None] * np.uint8(255), 3, -1))


def test_gray_with_alpha_becomes_rgba(tmp_path):
    pixels = noise(2).astype(np.uint8)
    found = read_image(save(tmp_path, pixels, "LA"))
    np.testing.assert_array_equal(found, pixels[..., [0, 0, 0, 1]])


@pytest.mark.parametrize("transparent", [None, 2])
def test_palette_becomes_rgb_or_rgba_where_transparent(tmp_path, transparent):
    colors = np.array([[255, 0, 0], [0, 128, 0], [10, 20, 30], [200, 200, 0]], np.uint8)
    index = noise(high=4).astype(np.uint8)
    image = Image.fromarray(index).copy()
    image.putpalette(colors.tobytes())
    assert image.mode == "P"
    settings = {} if transparent is None else {"transparency": transparent}
    image.save(tmp_path / "palette.png", **settings)
    found = read_image(tmp_path / "palette.png")
    np.testing.assert_array_equal(found[..., :3], colors[index])
    if transparent is None:
        assert found.shape[-1] == 3
    else:
        np.testing.assert_array_equal(found[..., 3], np.where(index == transparent, 0, 255))


def test_transparent_color_of_an_rgb_picture_becomes_alpha(tmp_path):
    pixels = noise(3).astype(np.uint8)
    key = tuple(int(value) for value in pixels[1, 2])
    found = read_image(save(tmp_path, pixels, transparency=key))
    expected = np.where((pixels == key).all(-1), 0, 255)
    np.testing.assert_array_equal(found[..., 3], expected)
    assert found[1, 2, 3] == 0


def test_cmyk_becomes_rgb(tmp_path):
    flat = Image.new("CMYK", (WIDTH, HEIGHT), (255, 0, 0, 0))
    flat.save(tmp_path / "cyan.jpg", quality=95)
    found = read_image(tmp_path / "cyan.jpg")
    assert found.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_allclose(found, np.broadcast_to([0, 255, 255], found.shape), atol=3)  # JPEG


def test_16_bit_gray_is_scaled(tmp_path):
    gray = noise(high=65536).astype(np.uint16)
    gray[0, :3] = [0, 128, 65535]
    found = read_image(save(tmp_path, gray, "I;16"))
    assert found.shape == (HEIGHT, WIDTH, 3)
    expected = np.round(gray / 65535.0 * 255.0)
    np.testing.assert_array_equal(found[..., 1], expected)
    assert found[0, :3, 0].tolist() == [0, 0, 255]


def test_16_bit_rgb_keeps_its_high_byte(tmp_path):
    wide = noise(3, high=65536).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    (tmp_path / "wide.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    np.testing.assert_array_equal(read_image(tmp_path / "wide.png"), wide // 256)


# ------------------------------------------------------------------------------------ refusals


def refusal(path) -> str:
    with pytest.raises(ValueError) as caught:
        read_image(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_missing_picture_is_named(tmp_path):
    assert "no such picture" in refusal(tmp_path / "absent.png")


def test_text_named_png_is_refused(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    refusal(tmp_path / "text.png")


def test_empty_file_and_folder_are_refused(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    refusal(tmp_path / "empty.png")
    refusal(tmp_path / "folder.png")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_picture_is_refused_wherever_it_breaks_off(tmp_path, suffix):
    pixels = noise(3).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    whole = save(tmp_path, pixels, name=f"whole.{suffix}").read_bytes()
    # The last 21 bytes of a PNG are checksums and the end mark; no pixel is missing without them.
    for length in range(0, len(whole) - 24, max(1, len(whole) // 60)):
        (tmp_path / f"cut.{suffix}").write_bytes(whole[:length])
        refusal(tmp_path / f"cut.{suffix}")


def test_damaged_picture_never_fails_otherwise(tmp_path):
    whole = bytearray(save(tmp_path, noise(4).astype(np.uint8)).read_bytes())
    for position in range(8, len(whole)):
        broken = whole.copy()
        broken[position] ^= 0x55
        (tmp_path / "broken.png").write_bytes(broken)
        try:
            read_image(tmp_path / "broken.png")
        except ValueError as error:
            assert "broken.png" in str(error)


def test_floating_point_pixels_are_refused(tmp_path):
    values = np.random.default_rng(0).random((HEIGHT, WIDTH)).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "float.tiff")
    assert "floating-point" in refusal(tmp_path / "float.tiff")


# ------------------------------------------------------------------------------------- folders


def test_list_is_sorted_pictures_only(tmp_path):
    for name in ("b.png", "a.JPG", "c.jpeg", ".hidden.png", "notes.txt", "d.npy"):
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["a.JPG", "b.png", "c.jpeg"]
    with pytest.raises(ValueError, match="absent"):
        list_images(tmp_path / "absent")


def test_mixed_sizes_name_both(tmp_path):
    first = save(tmp_path, np.zeros((4, 6, 3), np.uint8), name="first.png")
    second = save(tmp_path, np.zeros((4, 5, 3), np.uint8), name="second.png")
    with pytest.raises(ValueError) as caught:
        read_images([first, first, second])
    for part in ("second.png", "5x4", "first.png", "6x4"):
        assert part in str(caught.value)


def test_pictures_without_alpha_are_opaque_among_others(tmp_path):
    plain, clear = noise(3).astype(np.uint8), noise(4, seed=1).astype(np.uint8)
    first, second = save(tmp_path, plain, name="1.png"), save(tmp_path, clear, name="2.png")
    assert read_images([first, first]).shape == (2, HEIGHT, WIDTH, 3)
    both = read_images([first, second])
    np.testing.assert_array_equal(both[0, ..., :3], plain)
    assert (both[0, ..., 3] == 255).all()
    np.testing.assert_array_equal(both[1], clear)
    np.testing.assert_array_equal(with_alpha(clear), clear)


# -------------------------------------------------------------------------------------- shrink


def test_shrink_averages_premultiplied_colors():
    picture = np.random.default_rng(0).integers(0, 256, (6, 8, 4)).astype(np.uint8)
    picture[:2, :2, 3] = 0  # a block of nothing
    found = shrink(picture, 2)
    for y in range(3):
        for x in range(4):
            block = picture[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].reshape(4, 4).astype(float)
            alpha = block[:, 3].mean()
            color = (block[:, :3] * block[:, 3:]).mean(0) / alpha if alpha else np.zeros(3)
            np.testing.assert_allclose(found[y, x], [*color, alpha], rtol=0, atol=0.501)


def test_a_transparent_pixels_color_does_not_bleed():
    picture = np.zeros((2, 2, 4), np.uint8)
    picture[0, 0] = [200, 100, 50, 255]
    picture[1, 1] = [0, 255, 0, 0]
    assert shrink(picture, 2)[0, 0].tolist() == [200, 100, 50, 64]


def test_shrink_of_opaque_pictures_is_the_mean():
    picture = noise(3).repeat(2, 0).repeat(2, 1).astype(np.uint8)
    np.testing.assert_array_equal(shrink(picture, 2), picture[::2, ::2])
    assert shrink(picture, 1) is picture


@pytest.mark.parametrize("factor", [0, 3, 4, 100])
def test_shrink_refuses_what_does_not_divide(factor):
    with pytest.raises(ValueError, match=f"lego: 8x6 .* {factor} times"):
        shrink(np.zeros((6, 8, 3), np.uint8), factor, "lego")
