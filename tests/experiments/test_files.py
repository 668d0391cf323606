import numpy as np
import pytest

from experiments import files


@pytest.mark.parametrize(
  'data',
  [
    'größe\nein Hund',
    'größe\nein Hund\n\n \t\n',
    '\ufeffgröße\nein Hund\n',
    ' größe \r\nein Hund\t\r\n\r\n',
    'größe\rein Hund\r',
  ],
)
def test_lines(tmp_path, data):
  file = tmp_path / 'list.txt'
  file.write_bytes(data.encode())
  assert files.read_lines(file) == ['größe', 'ein Hund']


def test_only_line_ends_end_a_line(tmp_path):
  """str.splitlines has eight more kinds of them."""
  (tmp_path / 'list.txt').write_text('a\x0bb\x85c\u2028d\n', 'utf-8')
  assert files.read_lines(tmp_path / 'list.txt') == ['a\x0bb\x85c\u2028d']


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    (b'a\n\nb\n', ':2: a blank line; remove it'),
    (b'\na\n', ':1: a blank line'),
    (b'\xef\xbb\xbf\r\na', ':1: a blank line'),
    (b'', ' is empty; write one entry a line'),
    (b'\xef\xbb\xbf \r\n\n', ' is empty'),
    ('a\nü\n'.encode('latin-1'), r":2: b'\\xfc' is not UTF-8; save the file"),
    ('a\nü\n'.encode('utf-16'), ':1: .* is not UTF-8; save the file as'),
    ('a\nü\n'.encode('utf-16-le'), ':1: .* is not UTF-8'),
    ('a\nü\n'.encode('utf-32'), ':1: .* is not UTF-8'),
    (b'a\nb\0c\n', r":2: b'b\\x00c' is not UTF-8"),
  ],
)
def test_what_is_no_list(tmp_path, data, message):
  file = tmp_path / 'list.txt'
  file.write_bytes(data)
  with pytest.raises(ValueError, match=f'^{file}{message}'):
    files.read_lines(file)


def test_paths(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  for path, folder, expanded in (
    ('a/b', '', 'a/b'),
    ('a/b', '~/data', '/home/me/data/a/b'),
    ('~/a', '/data', '/home/me/a'),
    ('/a', '~/data', '/a'),
    ('a~', 'data', 'data/a~'),
  ):
    assert str(files.expand(path, folder)) == expanded


@pytest.mark.parametrize('compressed', [True, False])
def test_arrays_are_written_whole_or_not_at_all(tmp_path, compressed):
  path = tmp_path / 'new' / 'a.npz'

  class Full:
    """An array that there is no room for."""

    def __array__(self, *args, **keys):
      raise OSError('full')

  files.write_arrays(path, {'x': np.arange(3)}, compressed=compressed)
  with pytest.raises(OSError, match='full'):
    files.write_arrays(path, {'x': Full()}, compressed=compressed)
  with np.load(path) as arrays:
    np.testing.assert_array_equal(arrays['x'], [0, 1, 2])
  files.write_arrays(path, {'x': np.zeros(2)}, compressed=compressed)
  assert [file.name for file in path.parent.iterdir()] == ['a.npz']
