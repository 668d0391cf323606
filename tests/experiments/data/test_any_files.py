"""Whatever files there are: every image is read once and rightly, or named."""

import numpy as np
import pytest
from PIL import Image

from experiments.data import folders

_LETTERS = 'aBz09-_.+ßéñЖ漢字😀\u0301 '
_FORMATS = {  # suffixes, and modes that Pillow writes
  'PNG': ('.png .PNG .apng', '1 L LA P RGB RGBA I;16'),
  'JPEG': ('.jpg .JPEG .jpe .jfif', 'L RGB CMYK YCbCr'),
  'TIFF': ('.tif .TIFF', '1 L LA P RGB RGBA RGBX CMYK YCbCr I;16 I F'),
  'GIF': ('.gif', 'L P RGB'),
  'BMP': ('.bmp .dib', '1 L P RGB'),
  'PPM': ('.ppm .pgm .pnm', '1 L RGB'),
  'TGA': ('.tga', 'L LA P RGB RGBA'),
  'WEBP': ('.webp', 'L RGB RGBA'),
  'JPEG2000': ('.jp2', 'L RGB RGBA'),
}
_DEEP = ('I;16', 'I', 'F')


class _Files:
  """Random class folders of random images, and what lies beside them."""

  def __init__(self, root, seed):
    self.rng = np.random.default_rng(seed)
    self.root = root
    C = int(self.rng.integers(2, 13))
    start, zeros = self.rng.integers(0, 2), self.rng.choice(['d', '02d', '04d'])
    self.classes = [f'{i:{zeros}}' for i in range(start, start + C)]
    if self.rng.random() < 0.6:
      self.classes = list(dict.fromkeys(self.name() for _ in range(C)))
    self.images, self.unread, self.left = {}, set(), set()
    for folder in self.classes:
      (root / folder).mkdir(parents=True)
      for _ in range(self.rng.integers(0, 4)):
        self.write_image(folder)
    self.write_image(self.classes[0], readable=True)
    for suffix in ('.heic', '.svg', '', '.npy'):
      name = f'{self.choose(self.classes)}/{self.name()}x{suffix}'
      self.write(name, b'x')
      self.left.add(name)
    for name in (
      '.DS_Store',
      '.git/1.png',
      f'{self.classes[0]}/.1.png',
      'a.md',
    ):
      self.write(name, b'x')

  def choose(self, values):
    return values[self.rng.integers(len(values))]

  def name(self):
    letters = [self.choose(_LETTERS) for _ in range(self.rng.integers(1, 9))]
    return 'n' + ''.join(letters).strip() + 'm'

  def write(self, name, data):
    (self.root / name).parent.mkdir(parents=True, exist_ok=True)
    (self.root / name).write_bytes(data)

  def write_image(self, folder, readable=False):
    file_format = self.choose(list(_FORMATS))
    suffixes, modes = (text.split() for text in _FORMATS[file_format])
    modes = [mode for mode in modes if not (readable and mode in _DEEP)]
    names = [self.name() for _ in range(self.rng.integers(1, 4))]
    name = '/'.join([folder, *names]) + self.choose(suffixes)
    mode, grey = self.choose(modes), int(self.choose([0, 255]))
    (self.root / name).parent.mkdir(parents=True, exist_ok=True)
    image = Image.new('L', (9, 7), grey)
    image = image.convert('RGB') if mode == 'CMYK' else image
    image.convert(mode).save(self.root / name, file_format)
    if not readable and self.rng.random() < 0.15:
      data = (self.root / name).read_bytes()
      (self.root / name).write_bytes(data[: self.rng.integers(len(data) // 3)])
      self.unread.add(name)
    elif mode in _DEEP:
      self.unread.add(name)
    self.images[name] = (folder, grey)

  def check(self, source, label_of):
    """Each image is there once, with its label and colour, or is refused."""
    assert sorted(source.names) == sorted(self.images)
    for i, name in enumerate(source.names):
      folder, grey = self.images[name]
      assert source.class_names[source.labels[i]] == label_of[folder]
      if name in self.unread:
        with pytest.raises((OSError, ValueError)) as error:
          source[i]
        assert str(self.root / name) in str(error.value)
        assert '\n' not in str(error.value)
      else:
        image = source[i]['image']
        assert image.shape == (7, 9, 3)
        # Black or white, but for what JPEG and inks lose.
        np.testing.assert_allclose(image.astype(int), grey, atol=8)


def encode(rng, lines):
  """A text file as some program writes it, and whether it is UTF-8."""
  end = ('\n', '\r\n', ' \n', '\t\r\n')[rng.integers(4)]
  text = end.join(lines) + ('', end, 3 * end)[rng.integers(3)]
  encoding = ('utf-8', 'utf-8-sig', 'utf-16', 'utf-16-be')[rng.integers(4)]
  return text.encode(encoding), encoding.startswith('utf-8')


def expect(is_utf8, file, function, *args):
  if is_utf8:
    return function(*args)
  with pytest.raises(ValueError, match='is not UTF-8; save the file') as error:
    function(*args)
  assert str(file) in str(error.value)
  return None


@pytest.mark.parametrize('seed', range(40))
def test_any_files(tmp_path, seed, caplog):
  """Class folders, alone or with a list of classes, and a list of the files."""
  made = _Files(tmp_path / 'images', seed)
  numbers = list(map(str, range(len(made.classes))))
  source = folders.open_folder(tmp_path, 'images')
  in_order = numbers if sorted(numbers) == sorted(made.classes) else None
  assert source.class_names == tuple(in_order or sorted(made.classes))
  made.check(source, dict(zip(made.classes, made.classes, strict=True)))
  for name in made.left:  # by one of its kind
    suffix = (tmp_path / 'images' / name).suffix.lower()
    alike = [n for n in made.left if n.lower().endswith(suffix)]
    assert any(n in caplog.text for n in alike)
  counts = np.bincount(source.labels, minlength=len(made.classes))
  assert f'{np.sum(counts == 0)} class folders have' in caplog.text or all(
    counts
  )

  shuffled = list(made.rng.permutation(made.classes))
  named, is_utf8 = encode(made.rng, shuffled)
  (tmp_path / 'names').write_bytes(named)
  source = expect(
    *(is_utf8, tmp_path / 'names', folders.open_folder),
    *(tmp_path, 'images', 'names'),
  )
  if source:
    assert source.class_names == tuple(shuffled)
    made.check(source, dict(zip(made.classes, made.classes, strict=True)))

  (tmp_path / 'names').write_text('\n'.join(shuffled), 'utf-8')
  listed, is_utf8 = encode(
    made.rng,
    [f'{n} {shuffled.index(folder)}' for n, (folder, _) in made.images.items()],
  )
  (tmp_path / 'list').write_bytes(listed)
  source = expect(
    *(is_utf8, tmp_path / 'list', folders.open_list),
    *(tmp_path, 'list', 'images', 'names'),
  )
  if source:
    assert source.names == tuple(made.images)
    made.check(source, dict(zip(made.classes, made.classes, strict=True)))
    assert sorted(source.ids) == sorted(
      folders.open_folder(tmp_path, 'images').ids
    )
