import json

import numpy as np
import pytest

from experiments.data import prompts, rows, text
from tests.experiments.data import questions

BLANKS = ' ' * 16


@pytest.fixture
def example(tmp_path):
  record = questions.record('why?', ['x yz', 'u'], 1)
  (tmp_path / 'a.json').write_text(json.dumps([record]))
  return text.open_questions(tmp_path, 'a.json')[0]


def encoder(template='question', response='option'):
  return rows.Encoder(questions.Letters(), template, response)


def test_the_templates(example):
  asked = example.instruction
  head = 'Below is an instruction that describes a task'
  write = '. Write a response that appropriately completes the request.'
  with_input = ', paired with an input that provides further context'

  def prompt(name, training, context=''):
    one = example._replace(context=context)
    return prompts.TEMPLATES[name](one, training)

  # Copied from LLM-Adapters' finetune.py and commonsense_evaluate.py.
  assert prompt('exact', True) == (
    f'{head}{write}  # noqa: E501\n\n{BLANKS}### Instruction:\n{BLANKS}{asked}'
    f'\n{BLANKS}\n{BLANKS}### Response:\n{BLANKS}'
  )
  assert prompt('exact', False) == (
    f'{head}{write} \n\n{BLANKS}### Instruction:\n{BLANKS}{asked}\n\n{BLANKS}'
    f'### Response:\n{BLANKS}'
  )
  assert prompt('exact', True, 'so') == (
    f'{head}{with_input}{write}  # noqa: E501\n\n{BLANKS}### Instruction:\n'
    f'{BLANKS}{asked}\n{BLANKS}\n{BLANKS}### Input:\n{BLANKS}so\n{BLANKS}\n'
    f'{BLANKS}### Response:\n{BLANKS}'
  )
  assert prompt('exact', False, 'so') == (
    f'{head}{with_input}{write}\n\n{BLANKS}### Instruction:\n{BLANKS}{asked}'
    f'\n\n{BLANKS}### Input:\n{BLANKS}so\n\n{BLANKS}### Response:\n{BLANKS}'
  )
  assert (
    prompt('trimmed', True)
    == prompt('trimmed', False)
    == (f'{head}{write}\n\n### Instruction:\n{asked}\n\n### Response:\n')
  )
  assert prompt('trimmed', True, 'so') == (
    f'{head}{with_input}{write}\n\n### Instruction:\n{asked}\n\n### Input:\nso'
    '\n\n### Response:\n'
  )
  assert prompt('question', True) == 'Question: why?\nAnswer: '
  assert prompt('sentiment', True) == 'Text: why?\nSentiment: '


def test_prompt_and_answer_are_one_text(example):
  """The blank before the answer is a part of the answer's first token."""
  encode = questions.Letters().encode
  prompt, options = encoder().options(example)
  assert prompt == encode('Question: why?\nAnswer:')
  assert options == [encode(' x yz'), encode(' u')]
  ids, start, whole = encoder().training(example, 99)
  assert ids == encode('Question: why?\nAnswer: u')
  assert (start, whole) == (len(prompt), len(ids))
  ids, _, whole = encoder(response='output').training(example, 99)
  assert ids[start:] == [*encode(' the correct answer is answer2'), 1]
  assert whole == len(ids) - 1
  _, options = encoder(response='output').options(example)
  assert options == [
    encode(f' the correct answer is answer{i}') for i in (1, 2)
  ]
  ids = encoder().prompt(example)
  assert ids == encode('Question: why?\nAnswer: ')


def test_the_end_is_added_where_there_is_room(example):
  ids, start, whole = encoder(response='output').training(example, 99)
  for length in (whole + 1, whole, whole - 1, start - 2):
    cut, prompt, number = encoder(response='output').training(example, length)
    assert cut == ids[:length]
    assert (prompt, number) == (start, whole)


@pytest.mark.parametrize('spread', [0.1, 0.3, 0.6])
def test_little_is_wasted(spread):
  """Of lengths such as those of a benchmark: 85 tokens, more or less."""
  rng = np.random.default_rng(0)
  lengths = np.exp(rng.normal(np.log(85), spread, 2000)).astype(int)
  lengths = np.clip(lengths, 10, 256).tolist()
  packed = rows.pack(lengths, 256)
  assert sorted(i for row in packed for i in row) == list(range(2000))
  sums = [sum(lengths[i] for i in row) for row in packed]
  assert max(sums) <= 256
  assert 1 - sum(sums) / (256 * len(packed)) < 0.15
  assert packed == rows.pack(lengths, 256)


@pytest.mark.parametrize('on_prompts', [True, False])
def test_every_target_is_predicted_by_the_token_before_it(on_prompts):
  rng = np.random.default_rng(0)
  sequences = [
    (rng.integers(0, 50, n).tolist(), n // 2) for n in (9, 5, 7, 3, 2, 8, 4)
  ]
  columns = rows.training(sequences, 12, on_prompts)
  assert columns['ids'].shape == (4, 12)
  found, total = [], 0
  for row in range(4):
    one = {name: column[row] for name, column in columns.items()}
    for number in range(1, one['example'].max() + 1):
      own = np.flatnonzero(one['example'] == number)
      np.testing.assert_array_equal(one['positions'][own], range(own.size))
      found.append(one['ids'][own].tolist())
    used = one['weight'] > 0
    source, target = one['source'][used], one['target'][used]
    np.testing.assert_array_equal(one['ids'][source + 1], target)
    # None is predicted out of another example.
    np.testing.assert_array_equal(
      one['example'][source], one['example'][source + 1]
    )
    prompts_of = {tuple(ids): prompt for ids, prompt in sequences}
    for place in source:
      number = one['example'][place]
      ids = tuple(one['ids'][one['example'] == number])
      first = 1 if on_prompts else prompts_of[ids]
      assert one['positions'][place] + 1 >= first
    total += used.sum()
  assert sorted(found) == sorted(ids for ids, _ in sequences)
  expected = sum(
    len(ids) - (1 if on_prompts else prompt) for ids, prompt in sequences
  )
  assert total == expected
  assert columns['weight'].sum() / 4 == pytest.approx(1)
  assert rows.padding(columns) == pytest.approx(1 - 38 / 48)


def test_options_follow_one_prompt():
  encoded = [([5, 6], [[7, 8], [9]]), ([4], [[3]]), ([5], [[6], [7], [8, 9]])]
  # The longest first, each where the least room is left, or it is used last.
  columns = rows.scoring(encoded, [1, 0, 2], 8, 3)
  found = {name: column.tolist() for name, column in columns.items()}
  assert found['ids'] == [[5, 6, 7, 8, 9, 0, 0, 0], [5, 6, 7, 8, 9, 4, 3, 0]]
  assert found['positions'][0] == [0, 1, 2, 3, 2, 0, 0, 0]
  assert found['positions'][1] == [0, 1, 1, 1, 2, 0, 1, 0]
  assert found['example'][1] == [1, 1, 1, 1, 1, 2, 2, 0]
  assert found['option'][0] == [0, 0, 1, 1, 2, 0, 0, 0]
  assert found['option'][1] == [0, 1, 2, 3, 3, 0, 1, 0]
  assert found['source'][0] == [1, 2, 1, 0, 0, 0, 0, 0]
  assert found['source'][1] == [0, 0, 0, 3, 5, 0, 0, 0]
  assert found['target'][1] == [6, 7, 8, 9, 3, 0, 0, 0]
  assert found['weight'][1] == [1, 1, 0.5, 0.5, 1, 0, 0, 0]
  assert found['choice'] == [[1, 1, 2, 0, 0, 0, 0, 0], [1, 2, 3, 3, 4, 0, 0, 0]]
  assert found['answer'] == [[1, -1], [2, 0]]


def test_sets_of_one_shape():
  one = rows.scoring([([5, 6], [[7, 8], [9]])] * 4, [0, 1, 0, 1], 16, 2)
  other = rows.scoring([([5] * 3, [[6], [7] * 9])], [1], 16, 2)
  filled = rows.alike([one, other])
  for name, column in one.items():
    assert filled[0][name].shape[1:] == filled[1][name].shape[1:]
    np.testing.assert_array_equal(filled[0][name][:, : column.shape[1]], column)
  assert filled[1]['answer'].tolist() == [[1, -1, -1]]
  assert filled[0]['source'].shape == (2, 16)
  assert not filled[0]['weight'][:, 9:].any()


def test_prompts_to_be_continued():
  columns = rows.generation([[5, 6, 7], [8]], [0, 1])
  assert columns['ids'][:, :4].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
  assert columns['length'].tolist() == [3, 1]
  assert columns['answer'].tolist() == [0, 1]


def test_texts_begin_with_the_start(example):
  tokenizer = questions.Letters()
  plain = rows.Encoder(tokenizer, 'question', 'option')
  tokenizer = questions.Letters()
  tokenizer.start = 99
  begun = rows.Encoder(tokenizer, 'question', 'option')
  assert begun.prompt(example) == [99, *plain.prompt(example)]
  prompt, options = plain.options(example)
  assert begun.options(example) == ([99, *prompt], options)
  assert begun.training(example, 999)[0] == [
    99,
    *plain.training(example, 999)[0],
  ]
