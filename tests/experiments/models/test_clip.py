"""The text tower's numbers are tested with its checkpoint, test_safetensors."""

import pathlib

import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from experiments.models import clip
from experiments.pretrained import params as pretrained

TINY = clip.TextConfig(
  width=8,
  depth=2,
  num_heads=2,
  mlp_dim=12,
  projection=6,
  vocab_size=10,
  context_length=7,
)
WORDS = [
  'a',
  'photo',
  'of',
  'drawing',
  'cat',
  'dog',
  'wild',
  '{',
  '<',
  clip.END,
]
PROMPTS = pathlib.Path(clip.__file__).parents[1] / 'prompts'


@pytest.fixture(scope='module')
def text():
  def build():
    return clip.TextTower(TINY, rngs=nnx.Rngs(0))

  rng = np.random.default_rng(0)
  values = {
    path: rng.normal(path[-1] == 'scale', 0.3, shape).astype(np.float32)
    for path, shape in pretrained.shapes(build).items()
  }
  params = nnx.traversals.unflatten_mapping(values)
  return pretrained.with_params(build, params)


@pytest.fixture
def tokenizer():
  """Of words; '<' begins a text."""
  vocab = {word: i for i, word in enumerate(WORDS)}
  tokenizer = Tokenizer(models.WordLevel(vocab, unk_token='{'))
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f'< $A {clip.END}', special_tokens=[('<', 8), (clip.END, 9)]
  )
  tokenizer.enable_truncation(7)
  tokenizer.enable_padding(length=7, pad_id=9, pad_token=clip.END)
  return tokenizer


def test_a_text_ends_at_its_first_end_token(text):
  """What follows does not matter, what comes before does."""
  ids = np.array([[8, 0, 4, 9, 9, 9, 9], [8, 0, 4, 9, 0, 1, 9]])
  features = text(ids)
  assert features.shape == (2, TINY.projection)
  np.testing.assert_array_equal(features[0], features[1])
  for position in range(3):
    changed = ids.copy()
    changed[0, position] = 5
    assert np.abs(text(changed)[0] - features[0]).max() > 1e-2
    np.testing.assert_array_equal(text(changed)[1], features[1])


def test_zero_shot_head(text, tokenizer):
  prompts = ['a photo of {}', 'a drawing of {}', 'wild {}']
  names = ['cat', 'a dog', 'wild cat']
  kernel = clip.zero_shot_head(text, tokenizer, names, prompts, 20.0)
  assert kernel.shape == (6, 3)
  assert kernel.dtype == np.float32
  ids = {word: i for i, word in enumerate(WORDS)}
  for c, name in enumerate(names):
    directions = []
    for prompt in prompts:
      words = ['<', *prompt.format(name).split(), clip.END]
      words += [clip.END] * (7 - len(words))
      features = text(np.array([[ids[word] for word in words]]))[0]
      features = np.asarray(features, np.float64)
      directions.append(features / np.sqrt((features**2).sum()))
    mean = np.mean(directions, 0)
    expected = 20 * mean / np.sqrt((mean**2).sum())
    # Float32 rounding, of values up to 20; the three prompts differ by far.
    np.testing.assert_allclose(kernel[:, c], expected, atol=1e-4)
    assert np.abs(20 * directions[0] - expected).max() > 0.1


def test_names_may_hold_braces(text, tokenizer):
  """A prompt is no format string."""
  kernel = clip.zero_shot_head(text, tokenizer, ['{0} dog'], ['a {}'], 1.0)
  other = clip.zero_shot_head(text, tokenizer, ['{ dog'], ['a {}'], 1.0)
  np.testing.assert_array_equal(kernel, other)


def test_the_prompts_here_are_prompts():
  for path in PROMPTS.glob('*.txt'):
    assert len(clip.read_prompts(path)) > 3


def test_prompts(tmp_path):
  path = tmp_path / 'prompts.txt'
  path.write_text('a photo of {}.\n  ein Bild: {}, schön \n', 'utf-8')
  assert clip.read_prompts(path) == ['a photo of {}.', 'ein Bild: {}, schön']


@pytest.mark.parametrize(
  ('lines', 'message'),
  [
    ('a {}\na photo\n', r":2: 'a photo' needs one \{\}, where the class goes"),
    ('{} or {}\n', r":1: '\{\} or \{\}' needs one"),
    ('a {}\n\nthe {}\n', ':2: a blank line; remove it'),
    ('a {}\nthe {}\na {}\n', r":3: 'a \{\}' repeats line 1; drop one"),
    ('', ' is empty; write one entry a line'),
  ],
)
def test_files_that_are_no_prompts(tmp_path, lines, message):
  path = tmp_path / 'prompts.txt'
  path.write_text(lines)
  with pytest.raises(ValueError, match=f'{path}{message}'):
    clip.read_prompts(path)


def test_files_at_home(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'a.txt').write_bytes('\ufeffein {}, schön\r\n'.encode())
  assert clip.read_prompts('~/a.txt') == ['ein {}, schön']
  assert clip.read_class_names('~/a.txt') == ['ein {}, schön']


def test_class_names(tmp_path):
  path = tmp_path / 'names.txt'
  path.write_text('missile\nsunglasses, dark\nmissile\n')
  assert clip.read_class_names(path) == [
    'missile',
    'sunglasses, dark',
    'missile',
  ]
  path.write_text('missile\n\nmissile\n')
  with pytest.raises(ValueError, match=f'{path}:2: a blank line'):
    clip.read_class_names(path)
