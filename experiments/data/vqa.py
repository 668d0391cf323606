"""Questions about images: VQAv2 and nine sets that shift from it.

They are sources of `questions`. When one is opened, all that is wrong with its
files is told, and every image that is missing, empty or cut short.

The sets lie in local folders, in the files that their authors publish. Images
of COCO are ROOT/{train,val}2014/COCO_{train,val}2014_000000000042.jpg.

References:
  Goyal et al., "Making the V in VQA Matter", 2017 (VQAv2)
  Shah et al., "Cycle-Consistency for Robust Visual Question Answering", 2019
  Agrawal et al., "Don't Just Assume; Look and Answer", 2018 (VQA-CP)
  Dancette et al., "Beyond Question-Based Biases", 2021 (VQA-CE)
  Sheng et al., "Human-Adversarial Visual Question Answering", 2021 (AdVQA)
  Agarwal et al., "Towards Causal VQA", 2020 (IV-VQA, CV-VQA)
  Marino et al., "OK-VQA", 2019; Singh et al., "Towards VQA Models That Can
  Read", 2019 (TextVQA); Gurari et al., "VizWiz Grand Challenge", 2018
"""

import collections

import numpy as np

from experiments import files
from experiments.data import questions
from experiments.data.questions import Question

_HELD_OUT = 10_240  # questions of VQAv2's val that choose the step


def open_vqa(data_dir, name, path, root, split=''):
  """Opens one of the ten sets.

  Args:
    data_dir: where `path` and `root` start from.
    name: a key of `SETS`:
      'vqav2', with a split: 'train' is train2014; of val2014, 'val' are 10,240
        questions, all about images of their own, and 'test' all about the other
        images;
      'rephrasings': VQA-Rephrasings; originals are in the groups, not scored;
      'vqa_cp': VQA-CP v2's test, less what is of train2014, which VQAv2 trains
        on;
      'vqa_ce': `path` is VQAv2's, with counterexamples.json beside its files;
      'advqa'; 'ok_vqa'; 'textvqa', whose images are ROOT/train_images;
      'iv_vqa', 'cv_vqa': `path` has the folders original and edited, with
        VQAv2's files in each, and the edited images in edited/val2014;
      'vizwiz': PATH/annotations/val.json, images in ROOT/val.
    path: of the folder of the set's own files.
    root: of the folder that has the images' folders, COCO's where not said.
    split: see 'vqav2'; of the other sets there is one alone.

  Returns:
    A `questions.Questions`, in the order of the files.

  Raises:
    FileNotFoundError: of a file or folder that is not there, or it names every
      image that is not.
    ValueError: no such set or split; a file is damaged, a question without its
      annotation or twice, or answers that are not ten.
    OSError: it names every image that is empty or cut short.
  """
  if name not in SETS:
    raise ValueError(f'vqa: no set {name!r}; there are {", ".join(SETS)}.')
  splits = ('train', 'val', 'test') if name == 'vqav2' else ('',)
  if split not in splits:
    raise ValueError(
      f'vqa: {name} has no split {split!r}; it has '
      f'{", ".join(filter(None, splits)) or "one alone, without a name"}.'
    )
  folder = files.expand(data_dir)
  found = tuple(SETS[name](folder, path, root, split))
  if not found:
    raise ValueError(f'{folder / path}: no question is left of {name}.')
  questions.check_images(folder, [question.image for question in found])
  return questions.Questions(folder, found)


def _vqav2(folder, path, root, split):
  year = 'train2014' if split == 'train' else 'val2014'
  found = _years(folder, path, root, year)
  if split == 'train':
    return found
  held_out = _held_out(found)
  if split == 'val':
    return [found[row] for row in sorted(held_out)]
  pictures = {found[row].picture for row in held_out}
  return [question for question in found if question.picture not in pictures]


def _held_out(found):
  """Rows of all questions about images that are drawn with seed 0.

  Of the last image, as many as make the number full.
  """
  by_picture = collections.defaultdict(list)
  for row, question in enumerate(found):
    by_picture[question.picture].append(row)
  # RandomState's stream is frozen, unlike Generator's: a part stays a part.
  order = np.random.RandomState(0).permutation(sorted(by_picture))
  rows = [row for picture in order for row in by_picture[picture]]
  return rows[: min(_HELD_OUT, len(rows) // 2)]


def _years(folder, path, root, year):
  """VQAv2's own questions about COCO's images of a year."""
  pairs = questions.read(
    folder / path / f'v2_OpenEnded_mscoco_{year}_questions.json',
    folder / path / f'v2_mscoco_{year}_annotations.json',
  )
  return _of_coco(pairs, root, year)


def _of_coco(pairs, root, year='val2014'):
  return [
    _question(
      *pair, f'{root}/{year}/COCO_{year}_{int(pair[0]["image_id"]):012d}.jpg'
    )
    for pair in pairs
  ]


def _question(question, annotation, image):
  return Question(
    str(question['question_id']),
    image,
    question['question'],
    annotation['answers'],
    annotation.get('answer_type', ''),
  )


def _rephrasings(folder, path, root, split):
  del split
  pairs = questions.read(
    folder / path / 'v2_OpenEnded_mscoco_valrep2014_humans_og_questions.json',
    folder / path / 'v2_mscoco_valrep2014_humans_og_annotations.json',
  )
  found = _of_coco(pairs, root)
  originals = [question.get('rephrasing_of') for question, _ in pairs]
  return [
    question._replace(
      group=question.number if original is None else str(original),
      is_scored=original is not None,
    )
    for question, original in zip(found, originals, strict=True)
  ]


def _vqa_cp(folder, path, root, split):
  del split
  pairs = questions.read(
    folder / path / 'vqacp_v2_test_questions.json',
    folder / path / 'vqacp_v2_test_annotations.json',
  )
  pairs = [pair for pair in pairs if pair[0]['coco_split'] == 'val2014']
  return _of_coco(pairs, root)


def _vqa_ce(folder, path, root, split):
  del split
  file = folder / path / 'counterexamples.json'
  wanted = set(map(str, questions.entries(file, questions.load(file))))
  found = [
    question
    for question in _years(folder, path, root, 'val2014')
    if question.number in wanted
  ]
  if missing := wanted - {question.number for question in found}:
    raise ValueError(
      f'{file}: {len(missing)} of its {len(wanted)} questions are none of '
      f"VQAv2's val2014, such as {min(missing)}; is it of that set?"
    )
  return found


def _advqa(folder, path, root, split):
  del split
  pairs = questions.read(
    folder / path / 'v1_OpenEnded_mscoco_val2017_advqa_questions.json',
    folder / path / 'v1_mscoco_val2017_advqa_annotations.json',
  )
  return _of_coco(pairs, root)


def _ok_vqa(folder, path, root, split):
  del split
  pairs = questions.read(
    folder / path / 'OpenEnded_mscoco_val2014_questions.json',
    folder / path / 'mscoco_val2014_annotations.json',
  )
  return _of_coco(pairs, root)


def _edited(folder, path, root, split):
  """A question about an edited image has the number of its original."""
  del split
  place = folder / path / 'edited'
  pairs = questions.read(
    place / 'v2_OpenEnded_mscoco_val2014_questions.json',
    place / 'v2_mscoco_val2014_annotations.json',
    ('question_id', 'image_id'),
  )
  names = f'{path}/edited/val2014/COCO_val2014_{{}}.jpg'
  edited = [
    _question(*pair, names.format(pair[0]['image_id'])) for pair in pairs
  ]
  numbers = {question.number for question in edited}
  originals = [
    question._replace(is_scored=False)
    for question in _years(folder, f'{path}/original', root, 'val2014')
    if question.number in numbers
  ]
  if missing := numbers - {question.number for question in originals}:
    raise ValueError(
      f'{place}: {len(missing)} of its questions have no original in '
      f'{folder / path}/original, such as {min(missing)}.'
    )
  return [q._replace(group=q.number) for q in (*originals, *edited)]


def _textvqa(folder, path, root, split):
  del split
  file = folder / path / 'TextVQA_0.5.1_val.json'
  rows = questions.entries(file, questions.load(file), 'data')
  return [
    Question(
      str(row['question_id']),
      f'{root}/train_images/{row["image_id"]}.jpg',
      row['question'],
      questions.ten(file, row['question_id'], row['answers']),
    )
    for row in questions.unique(file, rows, ('question_id',)).values()
  ]


def _vizwiz(folder, path, root, split):
  del split
  file = folder / path / 'annotations/val.json'
  rows = questions.entries(file, questions.load(file))
  return [
    Question(
      row['image'],
      f'{root}/val/{row["image"]}',
      row['question'],
      questions.ten(file, row['image'], [a['answer'] for a in row['answers']]),
      row['answer_type'],
    )
    for row in questions.unique(file, rows, ('image',)).values()
  ]


SETS = {
  'vqav2': _vqav2,
  'rephrasings': _rephrasings,
  'vqa_cp': _vqa_cp,
  'vqa_ce': _vqa_ce,
  'advqa': _advqa,
  'iv_vqa': _edited,
  'cv_vqa': _edited,
  'ok_vqa': _ok_vqa,
  'textvqa': _textvqa,
  'vizwiz': _vizwiz,
}
