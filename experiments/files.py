"""Paths and text files that a user names."""

import codecs
import os
import pathlib


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
