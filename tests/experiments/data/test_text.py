import json

import pytest

from experiments.data import sources, text
from tests.experiments.data import questions


def read(tmp_path, records, name='a.json'):
  (tmp_path / name).write_text(json.dumps(records, indent=1))
  return text.open_questions(tmp_path, name)


def of(instruction, answer):
  output = f'the correct answer is {answer}'
  return {
    'instruction': instruction,
    'input': '',
    'output': output,
    'answer': answer,
  }


@pytest.mark.parametrize(
  ('instruction', 'names', 'options', 'question'),
  [
    (
      'Please choose the correct answer to the question: Why: so?\n\nAnswer1: '
      'a b. Answer2: c\n\nAnswer format: answer1/answer2',
      ('answer1', 'answer2'),
      ('a b.', 'c'),
      'Why: so?',
    ),
    (
      'Please choose the correct solution to the question: Boil an egg\n\n'
      'Solution1: In a: pot \n\nSolution2: Not\n\nAnswer format: '
      'solution1/solution2',
      ('solution1', 'solution2'),
      ('In a: pot', 'Not'),
      'Boil an egg',
    ),
    (
      'Please choose the correct answer to fill in the blank to complete the '
      'given sentence: The _ is big.\n\nOption1: ox Option2: ant Answer '
      'format: option1/option2',
      ('option1', 'option2'),
      ('ox', 'ant'),
      'The _ is big.',
    ),
    (
      'Please choose the correct ending to complete the given sentence: Food: '
      'she\n\nEnding1: eats. Ending2: sings. Ending3: [header] x\n\nAnswer '
      'format: ending1/ending2/ending3',
      ('ending1', 'ending2', 'ending3'),
      ('eats.', 'sings.', '[header] x'),
      'Food: she',
    ),
    (
      'Please answer the following question with true or false, question: is '
      'it?\n\nAnswer format: true/false',
      ('true', 'false'),
      ('true', 'false'),
      'is it?',
    ),
  ],
)
def test_options_are_read_from_the_instruction(
  tmp_path, instruction, names, options, question
):
  (example,) = read(tmp_path, [of(instruction, names[1])])
  assert (example.names, example.options) == (names, options)
  assert (example.question, example.answer) == (question, 1)
  assert example.instruction == instruction
  assert example.response(0) == f'the correct answer is {names[0]}'


def test_several_files_and_what_is_left_out(tmp_path):
  one, two, three = (
    questions.record(f'which {i}?', ['x', 'y'], 0) for i in range(3)
  )
  read(tmp_path, [one, two], 'a.json')
  read(tmp_path, [three, one], 'b.json')
  both = text.open_questions(tmp_path, ('a.json', 'b.json'))
  assert [e.question for e in both] == [f'which {i}?' for i in (0, 1, 2, 0)]
  # The same question, wherever it lies, is one example.
  assert both.ids[0] == both.ids[3] != both.ids[1]
  assert both.groups[0] == both.groups[3]
  rest = text.open_questions(tmp_path, 'b.json', without='a.json')
  assert [e.question for e in rest] == ['which 2?']
  assert rest.labels.tolist() == [0]


def test_equal_questions_are_in_one_part(tmp_path):
  records = [
    questions.record(f'which {i % 40}?', ['x', 'y'], i % 2) for i in range(80)
  ]
  (tmp_path / 'a.json').write_text(json.dumps(records))
  parts = [
    sources.open_source(
      {
        'kind': 'questions',
        'path': 'a.json',
        'part': {'shares': (0.7, 0.3), 'take': take, 'seed': 0},
      },
      tmp_path,
    )
    for take in (0, 1)
  ]
  assert len(parts[0]) == 56
  assert len(parts[1]) == 24
  assert not set(parts[0].ids) & set(parts[1].ids)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('{"a": 1}', r'a\.json:1: no list begins here; the file is a JSON list'),
    ('[\n{"a": 1},\n{"b" 2}]', r"a\.json:3: Expecting ':' delimiter"),
    ('[\n{"a": 1}\n{"b": 2}]', r'a\.json:3: a comma or the end of the list'),
    ('[{"a": 1}', r'a\.json:1: a comma or the end of the list is missing'),
    (
      '[\n\n{"instruction": "x"}]',
      r"a\.json:3: the object that begins here has no string 'input'; it has i",
    ),
    ('[\n3]', r'a\.json:2: 3 is no object'),
    (b'[\xff]', r'a\.json is not UTF-8'),
  ],
)
def test_a_broken_file(tmp_path, content, message):
  if isinstance(content, str):
    content = content.encode()
  (tmp_path / 'a.json').write_bytes(content)
  with pytest.raises(ValueError, match=message):
    text.open_questions(tmp_path, 'a.json')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      {'answer': 'answer3'},
      r"answer 'answer3' is none of the options, answer1",
    ),
    ({'output': 'it is so'}, r"'it is so' does not name the answer 'answer1'"),
    ({'instruction': 'Why?'}, r"does not end with its options, such as 'Answ"),
    (
      {'instruction': 'Why? Answer1: x Answer format: answer1/answer2'},
      r'the instruction has no option Answer2',
    ),
    (
      {
        'instruction': 'Why? Answer1: Answer2: x Answer format: answer1/answer2'
      },
      r'an option is empty',
    ),
  ],
)
def test_a_broken_question(tmp_path, change, message):
  good = questions.record('why?', ['x', 'y'], 0)
  with pytest.raises(ValueError, match=rf'a\.json:8: .*{message}'):
    read(tmp_path, [good, good | change])


def test_a_file_that_is_not_there(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'no\.json cannot be read.*LLM-'):
    text.open_questions(tmp_path, 'no.json')


def test_images_alone_are_resized(tmp_path):
  with pytest.raises(ValueError, match='resize and corruption are of images'):
    sources.open_source(
      {'kind': 'questions', 'path': 'a.json', 'resize': 3}, tmp_path
    )
