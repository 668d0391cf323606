import importlib.util
import io
import pickle
import warnings

import numpy as np
import pytest
from PIL import Image

from experiments.data import images


def encode(image, file_format='PNG', **options):
  file = io.BytesIO()
  image.save(file, file_format, **options)
  return file.getvalue()


@pytest.fixture
def pixels():
  return np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def test_rgb_comes_back(pixels):
  decoded = images.decode(encode(Image.fromarray(pixels)), 'a.png')
  np.testing.assert_array_equal(decoded, pixels)
  assert decoded.dtype == np.uint8


def test_grey_becomes_three_equal_channels_or_stays_one(pixels):
  data = encode(Image.fromarray(pixels[..., 0]))
  rgb = images.decode(data, 'a.png')
  np.testing.assert_array_equal(rgb, np.stack([pixels[..., 0]] * 3, -1))
  np.testing.assert_array_equal(
    images.decode(data, 'a.png', 'L'), pixels[..., :1]
  )


def test_alpha_is_dropped(pixels):
  transparent = np.concatenate([pixels, np.zeros((5, 7, 1), np.uint8)], -1)
  decoded = images.decode(encode(Image.fromarray(transparent)), 'a.png')
  np.testing.assert_array_equal(decoded, pixels)


def test_palette_with_transparency_gives_its_colours():
  """Pillow warns about such a file, and warnings are errors here."""
  image = Image.new('P', (4, 2))
  image.putpalette([10, 20, 30, 200, 100, 0])
  image.putdata([0, 1, 0, 1, 1, 0, 1, 0])
  data = encode(image, transparency=bytes([0, 128]))
  decoded = images.decode(data, 'a.png')
  assert decoded.shape == (2, 4, 3)
  assert decoded[0, 0].tolist() == [10, 20, 30]
  assert decoded[0, 1].tolist() == [200, 100, 0]


def test_cmyk():
  data = encode(Image.new('CMYK', (8, 8), (255, 0, 0, 0)), 'JPEG', quality=95)
  decoded = images.decode(data, 'a.jpg')
  # Cyan. JPEG is lossy.
  np.testing.assert_allclose(decoded[4, 4], [0, 255, 255], atol=5)


def test_orientation_is_left_alone(pixels):
  exif = Image.Exif()
  exif[0x0112] = 6  # turn by 90 degrees
  decoded = images.decode(encode(Image.fromarray(pixels), exif=exif), 'a.png')
  assert decoded.shape == (5, 7, 3)


@pytest.mark.parametrize('file_format', ['PNG', 'JPEG'])
def test_truncated_file_is_named(file_format):
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  data = encode(Image.fromarray(noise), file_format)
  half = data[: len(data) // 2]
  with pytest.raises(OSError, match=r'cat/1\.jpg \(\d+ bytes\) is not readabl'):
    images.decode(half, 'cat/1.jpg')


def test_other_file_is_named():
  with pytest.raises(OSError, match=r'cat/1\.jpg \(5 bytes\) is not readable'):
    images.decode(b'hello', 'cat/1.jpg')


@pytest.mark.parametrize(
  ('data', 'reason'),
  [
    (b'', 'Pillow knows no such image format; replace it'),
    (b'RIFF\0\0\0\0WEBPVP8 ', 'replace it'),
    (
      b'P6 30000 10000 255\n',
      r'size \(300000000 pixels\) exceeds .* 178956970 pixels; resize it',
    ),
    (b'P6 10 10 255\n', 'replace it'),
    (b'qoif' + 9 * b'\0', 'replace it'),
  ],
)
def test_all_errors_are_a_line_of_one_kind(data, reason):
  match = rf'^cat/1\.jpg \({len(data)} bytes\) is not readable: .*{reason}.*\.$'
  with pytest.raises(OSError, match=match) as error:
    images.decode(data, 'cat/1.jpg')
  assert '<' not in str(error.value)
  assert '\n' not in str(error.value)


def test_large_images_below_pillows_limit(monkeypatch):
  """Pillow warns of them, and warnings are errors here."""
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 60)
  spec = importlib.util.find_spec('experiments.data.images')
  images = importlib.util.module_from_spec(spec)
  with warnings.catch_warnings():
    spec.loader.exec_module(images)
    assert images.decode(encode(Image.new('RGB', (10, 10))), 'a').shape[0] == 10
  data = encode(Image.new('RGB', (11, 11)))
  with pytest.raises(
    OSError, match=r'a .*\(121 pixels\) exceeds .* 120 pixels; resize it'
  ):
    images.decode(data, 'a')


def test_sixteen_bits_are_refused():
  """Pillow would clip them: nearly all white."""
  image = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
  with pytest.raises(ValueError, match=r"a\.png has pixels of mode 'I;16'"):
    images.decode(encode(image), 'a.png')


def test_files_are_read_when_asked_for(tmp_path, pixels):
  source = images.ImageFiles(
    tmp_path, ('a.png', 'b.png'), np.array([0, 1], np.int32), ('x', 'y')
  )
  Image.fromarray(pixels).save(tmp_path / 'b.png')
  assert len(source) == 2
  example = pickle.loads(pickle.dumps(source))[1]
  np.testing.assert_array_equal(example['image'], pixels)
  assert example['label'] == 1
  assert example['label'].dtype == np.int32
  with pytest.raises(FileNotFoundError, match=r'a\.png'):
    source[0]


@pytest.mark.parametrize('channels', [1, 3])
def test_to_pillow_and_back(pixels, channels):
  image = images.to_pillow(pixels[..., :channels])
  assert image.mode == ('L' if channels == 1 else 'RGB')
  np.testing.assert_array_equal(
    images.from_pillow(image), pixels[..., :channels]
  )
