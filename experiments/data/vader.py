"""Sentences of four domains, whose sentiment people rated.

Reviews of products (amazon), tweets, editorials (nyt) and film reviews
(movies), each rated from -4 to 4 by twenty people: a natural shift with shared
labels. They come inside the source distribution of vaderSentiment 2.5 (MIT),
which is opened where it lies:

  pip download --no-deps --no-binary=:all: -d DIR vaderSentiment==2.5

and --config.data_dir=DIR. An installed vaderSentiment has them not.

References:
  Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment
  Analysis of Social Media Text", 2014
"""

import tarfile

import numpy as np

from experiments import files
from experiments.data import text

ARCHIVE = 'vaderSentiment-2.5.tar.gz'
_INNER = 'vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz'
_FILES = {
  'amazon': 'amazonReviewSnippets',
  'tweets': 'tweets',
  'nyt': 'nytEditorialSnippets',
  'movies': 'movieReviewSnippets',
}
_CLASSES = ('negative', 'positive')


def open_vader(data_dir, name, margin=0.5):
  """Reads a domain.

  Args:
    data_dir: the folder of the archive.
    name: 'amazon', 'tweets', 'nyt' or 'movies'.
    margin: sentences whose mean rating is less than this from 0 are left out.

  Returns:
    A `text.Examples`. Sentences of one review or editorial are one group.

  Raises:
    ValueError: there is no such domain, or the archive is another one.
    FileNotFoundError: there is no archive.
  """
  if name not in _FILES:
    raise ValueError(
      f'vaderSentiment has no domain {name!r}; it has {", ".join(_FILES)}.'
    )
  if not 0 <= margin < 4:
    raise ValueError(f'margin is {margin}; ratings are from -4 to 4.')
  file = files.expand(ARCHIVE, data_dir)
  if not file.is_file():
    raise FileNotFoundError(
      f'{file} is not there; get it with `pip download --no-deps '
      f'--no-binary=:all: -d {file.parent} vaderSentiment==2.5`.'
    )
  examples, ids, documents = [], [], []
  for number, line in enumerate(_lines(file, name), 1):
    try:
      key, rating, sentence = line.split('\t')
      rating = float(rating)
    except ValueError as error:
      raise ValueError(
        f'{file}: {_FILES[name]}_GroundTruth.txt:{number}: {line[:60]!r} is '
        'not an id, a rating and a text; get the archive anew.'
      ) from error
    if abs(rating) >= margin and rating:
      examples.append(_example(sentence.strip(), int(rating > 0)))
      ids.append(f'{name}:{key}')
      documents.append(key.partition('_')[0])
  groups = np.unique(documents, return_inverse=True)[1]
  return text.Examples(examples, ids, groups, _CLASSES)


def _lines(file, name):
  path = f'hutto_ICWSM_2014/{_FILES[name]}_GroundTruth.txt'
  try:
    with (
      tarfile.open(file) as outer,
      tarfile.open(fileobj=outer.extractfile(_INNER)) as inner,
    ):
      data = inner.extractfile(path).read()
  except (tarfile.TarError, KeyError, EOFError, OSError) as error:
    raise ValueError(
      f'{file} is broken, or not the source distribution of vaderSentiment '
      f'2.5: {error}; get it anew.'
    ) from error
  return data.decode('utf-8-sig').rstrip().split('\n')


def _example(sentence, label):
  return text.Example(
    sentence, sentence, '', _CLASSES, _CLASSES, _CLASSES[label], label
  )
