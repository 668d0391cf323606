import collections

import numpy as np
import pytest

from experiments.data import easy_vqa, images


@pytest.fixture(scope='module')
def splits():
  return {split: easy_vqa.open_easy_vqa('', split) for split in easy_vqa.SPLITS}


def pictures(source):
  return {question.image for question in source.questions}


def test_counts(splits):
  counts = {name: len(source) for name, source in splits.items()}
  assert counts == {
    'broad': 12586,
    'broad_val': 1416,
    'train': 1126,
    'val': 243,
    'test': 740,
    'pairs': 688,
    'forms': 3903,
  }


def test_no_image_is_in_two_splits_of_the_training_images(splits):
  names = ('broad', 'broad_val', 'train', 'val')
  seen = collections.Counter(
    image for name in names for image in pictures(splits[name])
  )
  assert set(seen.values()) == {1}
  assert all(image.startswith('train/') for image in seen)
  for name in ('test', 'pairs', 'forms'):
    assert all(i.startswith('test/') for i in pictures(splits[name]))


def test_the_narrow_part_is_narrow(splits):
  for name in ('train', 'val', 'test'):
    asked = {question.text for question in splits[name].questions}
    assert {'what color is the shape?', 'what shape is in the image?'} < asked
    others = asked - {'what color is the shape?', 'what shape is in the image?'}
    assert all(text.startswith('is there a ') for text in others)
    assert not any('image' in text for text in others)
    answers = {question.answer for question in splits[name].questions}
    assert not answers & {'teal', 'yellow', 'triangle'}


def test_ood_splits_differ_in_one_thing(splits):
  asked = {question.text for question in splits['test'].questions}
  assert {question.text for question in splits['pairs'].questions} == asked
  assert not asked & {question.text for question in splits['forms'].questions}
  assert pictures(splits['forms']) & pictures(splits['test'])
  assert not pictures(splits['forms']) & pictures(splits['pairs'])


def test_the_colour_of_an_image_is_what_its_pixels_say():
  """Of a mean colour that only the shape moves away from the background."""
  source = easy_vqa.open_easy_vqa('', 'test')
  red = next(i for i, q in enumerate(source.questions) if q.answer == 'red')
  image = source[red]['image'].astype(int)
  shape = image[np.abs(image - image[0, 0]).sum(-1) > 90]
  assert shape[:, 0].mean() > shape[:, 1:].mean() + 60


def test_inverted_images_ask_for_shapes_alone():
  source = easy_vqa.open_easy_vqa('', 'test', inverted=True)
  assert {question.kind for question in source.questions} == {'shape'}
  file = source.folder / source.questions[3].image
  clean = images.decode(file.read_bytes(), file)
  np.testing.assert_array_equal(source[3]['image'], 255 - clean)


def test_the_broad_part_has_every_view(splits):
  source = splits['broad']
  found = collections.Counter()
  for i in range(40):
    file = source.folder / source.questions[i].image
    clean = images.decode(file.read_bytes(), file).astype(int)
    image = source[i]['image'].astype(int)
    if np.array_equal(image, clean):
      found['clean'] += 1
    elif np.array_equal(image, clean[:, ::-1]):
      found['flipped'] += 1
    elif np.array_equal(image, 255 - clean):
      found['inverted'] += 1
      assert source.questions[i].kind == 'shape'
    else:
      assert 10 < np.std(image - clean) < 30
      found['noisy'] += 1
    np.testing.assert_array_equal(image, source[i]['image'])
  assert set(found) == {'clean', 'flipped', 'inverted', 'noisy'}


def test_kinds_of_answers(splits):
  question = splits['train'].questions[0]
  assert question.answers == (question.answer,) * 10
  assert [easy_vqa.kind(a) for a in ('teal', 'circle', 'no')] == [
    'color',
    'shape',
    'yes/no',
  ]


def test_an_unknown_split_is_refused():
  with pytest.raises(ValueError, match="no split 'dev'; it has broad, broad_v"):
    easy_vqa.open_easy_vqa('', 'dev')
