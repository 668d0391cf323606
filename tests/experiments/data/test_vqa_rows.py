import numpy as np
import pytest

from experiments.data import vqa_rows
from experiments.pretrained import paligemma as pretrained
from tests.experiments import tiny_vqa


@pytest.fixture
def encode():
  tokenizer = pretrained.load_tokenizer(
    tiny_vqa.PALIGEMMA, str(tiny_vqa.CHECKPOINT)
  )
  return vqa_rows.Encode(tokenizer, 'answer en {}', '\n', 12, 32, 4)


def test_a_prompt_and_its_answer(encode):
  image = np.full((20, 8, 3), 77, np.uint8)
  row = encode.map({'image': image, 'question': 'is it?', 'answer': 'no'})
  assert row['image'].shape == (12, 12, 3)
  assert (row['image'] == 77).all()
  n, end = row['prefix'], row['length']
  assert row['ids'].dtype == np.int32
  ids = row['ids'].tolist()
  # <bos>, the prompt, the line end as a token of its own, the answer, <eos>.
  assert (ids[0], ids[n - 1], ids[end - 1]) == (2, 5, 1)
  decode = encode.tokenizer.decode
  assert decode(ids[1 : n - 1]) == 'answer en is it?'
  assert decode(ids[n : end - 1]) == 'no'
  assert not any(ids[end:])


def test_a_long_answer_is_cut(encode):
  image = np.zeros((12, 12, 1), np.uint8)
  row = encode.map({'image': image, 'question': 'what?', 'answer': 'abcdefg'})
  ids = row['ids'][row['prefix'] : row['length']]
  assert encode.tokenizer.decode(ids) == 'abcd'
  assert row['image'].shape == (12, 12, 3)
