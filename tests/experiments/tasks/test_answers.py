import itertools
import math

import pytest

from experiments.tasks import answers


@pytest.mark.parametrize(
  ('matches', 'expected'),
  [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (5, 1.0), (10, 1.0)],
)
def test_accuracy_by_the_number_of_matches(matches, expected):
  """By hand: of three that match, leaving one out leaves two, three times."""
  given = ['red'] * matches + [f'other {i}' for i in range(10 - matches)]
  assert answers.accuracy('red', given) == pytest.approx(expected)


@pytest.mark.parametrize('matches', range(11))
def test_accuracy_is_the_mean_over_all_sets_of_nine(matches):
  given = ['red'] * matches + ['blue'] * (10 - matches)
  nines = [
    min(1, sum(answer == 'red' for answer in nine) / 3)
    for nine in itertools.combinations(given, 9)
  ]
  assert answers.accuracy('red', given) == pytest.approx(sum(nines) / 10)


# By hand, with the rules of visualqa.org/evaluation.html and the official code.
@pytest.mark.parametrize(
  ('answer', 'expected'),
  [
    ('Yes', 'yes'),
    ('a dog', 'dog'),
    ('The dog and an owl', 'dog and owl'),
    ('two', '2'),
    ('none', '0'),
    ('eleven', 'eleven'),
    ('dont know', "don't know"),
    ("couldnt've", "couldn't've"),
    ("couldn'tve", "couldn't've"),
    ("somebody'd", 'somebodyd'),
    ('Im', 'im'),  # the official table has a capital here, which never comes
    ('yes.', 'yes'),
    ('1.5', '1.5'),
    # The quirk: a period after a digit goes too, though it was meant to stay.
    ('5.', '5'),
    ('p.m.', 'pm'),
    ('.5', '.5'),
    ('1,000', '1000'),
    ('black/white', 'black white'),
    ('black / white', 'black white'),
    ('t-shirt', 't shirt'),
    # The comma in the number takes the hyphen away, without a blank.
    ('1,000-2', '10002'),
    ('well- done', 'well done'),
    ('what?!', 'what'),
    ("it's", "it's"),
    ('a an the', ''),
    ('\\ back', 'back'),
    ('.' * 40, '.' * 8),  # 32 periods go at the most
  ],
)
def test_normalised_answers(answer, expected):
  assert answers.normalise(answer) == expected


def test_answers_that_are_all_the_same_are_taken_as_they_are():
  assert answers.accuracy('Two', ['two'] * 10) == 0
  assert answers.accuracy('2', ['two'] * 10) == 0
  assert answers.accuracy('two\n', ['two'] * 10) == 1
  assert answers.accuracy('2', ['two'] * 9 + ['three']) == 1


def test_consensus():
  """By hand: of a group with 2 of 3 right, one pair of three is all right."""
  scores = [1, 0.3, 0, 1, 1, 0]
  groups = ['a', 'a', 'a', 'b', 'b', 'c']
  assert answers.consensus(scores, groups, 1) == pytest.approx(
    (2 / 3 + 1 + 0) / 3
  )
  assert answers.consensus(scores, groups, 2) == pytest.approx((1 / 3 + 1) / 2)
  assert answers.consensus(scores, groups, 3) == 0
  assert math.isnan(answers.consensus(scores, groups, 4))


def test_flips():
  said = ['2', 'Two', '3', 'red', 'a red', 'blue']
  truths = ['2'] * 3 + ['green'] * 3
  groups = ['a', 'a', 'a', 'b', 'b', 'b']
  edited = [False, True, True, False, True, True]
  assert answers.flips(said, truths, groups, edited) == 0.5
  # One object fewer: of 2 and 3, neither is 1; of 1 and 2, one is.
  truths = ['5', '4', '4']
  for three, expected in ((['2', 'two', '3'], 1), (['two', '1', '2'], 0.5)):
    assert answers.flips(three, truths, 'aaa', edited[:3]) == expected
  assert answers.flips(['no', 'no'], ['2', '1'], 'aa', [False, True]) == 0
