import io
import tarfile

import pytest

from experiments.data import sources, vader

LINES = {
  'amazonReviewSnippets': [
    f'{i}_{j}\t{(-1) ** (i + j) * (0.2 + j)}\tnumber {i} {j}.'
    for i in range(1, 21)
    for j in range(1, 6)
  ],
  'tweets': ['1\t0.49\tmeh', '2\t-0.5\tNo &amp; no', '3\t2.5\tYes', '4\t0\tx'],
  'nytEditorialSnippets': ['1_1\t1.5\tGood.'],
  'movieReviewSnippets': ['1\t-3\tBad.'],
}


def add(archive, name, data):
  info = tarfile.TarInfo(name)
  info.size = len(data)
  archive.addfile(info, io.BytesIO(data))


def write(folder, lines=LINES):
  """An archive in an archive, as it is served."""
  inner = io.BytesIO()
  with tarfile.open(fileobj=inner, mode='w:gz') as archive:
    for name, own in lines.items():
      data = '\r\n'.join(own).encode()
      add(archive, f'hutto_ICWSM_2014/{name}_GroundTruth.txt', data)
  with tarfile.open(folder / vader.ARCHIVE, 'w:gz') as archive:
    add(archive, vader._INNER, inner.getvalue())


def test_a_domain(tmp_path):
  write(tmp_path)
  source = vader.open_vader(tmp_path, 'tweets')
  # What is rated near 0 is left out.
  assert [e.question for e in source] == ['No &amp; no', 'Yes']
  assert source.labels.tolist() == [0, 1]
  assert source.class_names == ('negative', 'positive')
  assert source[1].options[source[1].answer] == 'positive'
  assert source.ids == ['tweets:2', 'tweets:3']
  assert len(vader.open_vader(tmp_path, 'tweets', margin=0)) == 3


def test_a_review_is_in_one_part(tmp_path):
  write(tmp_path)
  parts = [
    sources.open_source(
      {
        'kind': 'vader',
        'name': 'amazon',
        'part': {'shares': (0.6, 0.2, 0.2), 'take': take, 'seed': 0},
      },
      tmp_path,
    )
    for take in range(3)
  ]
  assert [len(part) for part in parts] == [60, 20, 20]
  documents = [
    {key.partition(':')[2].partition('_')[0] for key in part.ids}
    for part in parts
  ]
  assert not documents[0] & documents[1]
  assert not (documents[0] | documents[1]) & documents[2]
  assert set.union(*documents) == {str(i) for i in range(1, 21)}


def test_what_is_wrong_is_told(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'tar\.gz is not there; get it'):
    vader.open_vader(tmp_path, 'tweets')
  with pytest.raises(ValueError, match=r"no domain 'books'; it has amazon"):
    vader.open_vader(tmp_path, 'books')
  write(tmp_path, {'tweets': ['1\t0.7\tYes', '2 0.7 No']})
  with pytest.raises(ValueError, match=r"tweets_GroundTruth\.txt:2: '2 0\.7 N"):
    vader.open_vader(tmp_path, 'tweets')
  with pytest.raises(ValueError, match='margin is 5; ratings are from -4 to 4'):
    vader.open_vader(tmp_path, 'tweets', margin=5)
  with pytest.raises(ValueError, match='is broken, or not the source distri'):
    vader.open_vader(tmp_path, 'amazon')
  (tmp_path / vader.ARCHIVE).write_bytes(b'no')
  with pytest.raises(ValueError, match='is broken, or not the source distri'):
    vader.open_vader(tmp_path, 'tweets')
