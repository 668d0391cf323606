"""Paths and text files that a user names, and files of arrays."""

import codecs
import os
import pathlib

import numpy as np


def expand(path, folder=''):
  """A path, from `folder` on where it is relative; `~` is the user's home."""
  return pathlib.Path(os.path.expanduser(folder), os.path.expanduser(path))


def read_lines(file):
  """Reads a text file of one entry a line, UTF-8 whatever the locale.

  A byte-order mark, the kind of line end, blanks round an entry and blank lines
  at the very end are no part of it.

  Args:
    file: its path.

  Returns:
    A list of strings, none of them empty; the first is of line 1, and so on.

  Raises:
    OSError: it cannot be read.
    ValueError: a line is blank or is not UTF-8, or there is none. It names the
      line.
  """
  data = pathlib.Path(file).read_bytes().removeprefix(codecs.BOM_UTF8)
  lines = []
  for number, line in enumerate(data.rstrip().splitlines(), 1):
    try:
      entry = line.decode('utf-8').strip()
    except UnicodeDecodeError:
      entry = '\0'
    if '\0' in entry:  # UTF-16 has them, and no text in UTF-8
      raise ValueError(
        f'{file}:{number}: {line[:40]!r} is not UTF-8; save the file as UTF-8.'
      )
    if not entry:
      raise ValueError(
        f'{file}:{number}: a blank line; remove it, since the entries are '
        'counted by lines.'
      )
    lines.append(entry)
  if not lines:
    raise ValueError(f'{file} is empty; write one entry a line.')
  return lines


def write_arrays(path, arrays, *, compressed=True):
  """Writes an .npz file whole or not at all, and the folder that it is in.

  Args:
    path: a pathlib.Path.
    arrays: `{name: array}`.
    compressed: whether small files are worth the time; params hardly shrink.

  Raises:
    OSError: it cannot be written.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix('.partial')
  with open(partial, 'wb') as file:
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
  os.replace(partial, path)
