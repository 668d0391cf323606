"""How answers to questions about images are scored, as VQA's authors do.

References:
  Antol et al., "VQA: Visual Question Answering", 2015;
  https://visualqa.org/evaluation.html
  Shah et al., "Cycle-Consistency for Robust Visual Question Answering", 2019
  Agarwal et al., "Towards Causal VQA", 2020
"""

import math
import re

import numpy as np

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r'\d,\d')
# The official expression, whose look-ahead is to be a look-behind: a period
# goes unless a digit follows it, whatever stands before it.
_PERIOD = re.compile(r'(?!<=\d)(\.)(?!\d)')
_MOST_PERIODS = 32  # re.UNICODE, passed in the place of a count
_WORDS = 'zero one two three four five six seven eight nine ten'
_NUMBERS = {word: str(i) for i, word in enumerate(_WORDS.split())}
_NUMBERS['none'] = '0'
_ARTICLES = ('a', 'an', 'the')
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've
it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd
something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll
who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_one(word):
  """A contraction without one of its apostrophes, each of them in turn."""
  places = [i for i, letter in enumerate(word) if letter == "'"]
  return [word[:i] + word[i + 1 :] for i in places]


# The official table: an apostrophe that is missing comes back. Its entries for
# I'm, I've and I'd've have a capital, which no answer has by then, and one goes
# the other way.
_WITH_APOSTROPHE = {
  short: word for word in _CONTRACTIONS.split() for short in _without_one(word)
} | {"somebody'd": 'somebodyd'}


def normalise(answer):
  """An answer in lower case, without punctuation, articles and number words."""
  removes_all = _COMMA_IN_NUMBER.search(answer)
  text = answer
  for mark in _PUNCTUATION:
    # At the edge of a word it goes, between two letters it is a blank.
    at_edge = f'{mark} ' in answer or f' {mark}' in answer
    text = text.replace(mark, '' if at_edge or removes_all else ' ')
  text = _PERIOD.sub('', text, count=_MOST_PERIODS)
  words = [_NUMBERS.get(word, word) for word in text.lower().split()]
  words = [word for word in words if word not in _ARTICLES]
  return ' '.join(_WITH_APOSTROPHE.get(word, word) for word in words)


def accuracy(prediction, answers):
  """VQA accuracy: the mean over the answers, each left out in turn, of

    min(1, matches among the others / 3).

  Where the answers differ, they and the prediction are normalised; where they
  are all the same, what was said has to be exactly that.

  Args:
    prediction: a string.
    answers: that people gave, ten of them.
  """
  prediction = prediction.replace('\n', ' ').replace('\t', ' ').strip()
  answers = [a.replace('\n', ' ').replace('\t', ' ').strip() for a in answers]
  if len(set(answers)) > 1:
    prediction = normalise(prediction)
    answers = list(map(normalise, answers))
  same = np.array([answer == prediction for answer in answers])
  return float(np.minimum(1, (same.sum() - same) / 3).mean())


def consensus(scores, groups, size):
  """The share of all subsets of `size` questions that are answered right.

  A question is right where its accuracy is above 0. The mean over the groups
  that have so many questions.

  Args:
    scores: [N], accuracies.
    groups: N strings; questions that ask for the same are in one group.
    size: of the subsets.

  Returns:
    A float, NaN where no group is large enough.
  """
  right = {}
  for score, group in zip(scores, groups, strict=True):
    right.setdefault(group, []).append(score > 0)
  shares = [
    math.comb(sum(group), size) / math.comb(len(group), size)
    for group in right.values()
    if len(group) >= size
  ]
  return float(np.mean(shares)) if shares else math.nan


def flips(predictions, truths, groups, is_edited):
  """The share of edited images whose answer does not go with the original's.

  Where the truth stays, the answer has to stay; where it is a number that
  differs, the answer has to differ by as much.

  Args:
    predictions: N strings.
    truths: N strings.
    groups: N strings, one for an original and what was made of it.
    is_edited: N bools; each group has one original.
  """
  rows = list(
    zip(
      map(normalise, predictions),
      map(normalise, truths),
      groups,
      is_edited,
      strict=True,
    )
  )
  originals = {
    group: (said, truth) for said, truth, group, edited in rows if not edited
  }
  flipped = [
    said != _expected(*originals[group], truth)
    for said, truth, group, edited in rows
    if edited
  ]
  return float(np.mean(flipped))


def _expected(said, truth, new_truth):
  if truth == new_truth or not all(
    map(str.isdecimal, (said, truth, new_truth))
  ):
    return said
  return str(int(said) + int(new_truth) - int(truth))
