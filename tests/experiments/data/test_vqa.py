import json
import os

import numpy as np
import pytest

from experiments.data import images, questions, sources, vqa
from tests.experiments.data import vqa_files

ROOTS = {'textvqa': 'openimages', 'vizwiz': 'vizwiz'}
PATHS = {'vqa_ce': 'vqav2'}


@pytest.fixture
def folder(tmp_path):
  vqa_files.write_all(tmp_path)
  return tmp_path


def open_set(folder, name, split=''):
  return vqa.open_vqa(
    folder, name, PATHS.get(name, name), ROOTS.get(name, 'coco'), split
  )


def change(file, function):
  content = json.loads(file.read_text())
  function(content)
  file.write_text(json.dumps(content))


def test_training_is_all_of_train2014(folder):
  source = open_set(folder, 'vqav2', 'train')
  assert len(source) == 12
  assert {question.picture for question in source.questions} == {
    f'{i:012d}' for i in range(1, 7)
  }
  example = source[0]
  file = folder / 'coco/train2014/COCO_train2014_000000000001.jpg'
  np.testing.assert_array_equal(
    example['image'], images.decode(file.read_bytes(), file)
  )
  assert (example['question'], example['answer']) == ('is cat 0 red?', 'yes')
  assert source.questions[0].answers == tuple(vqa_files.TEN)
  assert source.questions[0].kind == 'yes/no'
  assert source.ids[1] == f'{os.path.realpath(file)}: is cat 1 red?'


def test_questions_of_a_group_or_an_image_belong_together(tmp_path):
  asked = tuple(
    questions.Question(str(i), image, '?', ('yes',), group=group)
    for i, (image, group) in enumerate(
      [('a.png', ''), ('b.png', ''), ('a.png', ''), ('a.png', '7')]
    )
  )
  found = questions.Questions(tmp_path, asked).groups.tolist()
  assert [found.index(group) for group in found] == [0, 1, 0, 3]


@pytest.mark.parametrize('held_out', [5, 6])
def test_validation_is_held_out_by_image(folder, held_out, monkeypatch):
  monkeypatch.setattr(vqa, '_HELD_OUT', held_out)
  val, test = (open_set(folder, 'vqav2', part) for part in ('val', 'test'))
  pictures = [{q.picture for q in part.questions} for part in (val, test)]
  assert not pictures[0] & pictures[1]
  assert len(pictures[0]) == 3
  # All questions about an image, but for those beyond the number.
  assert (len(val), len(test)) == (held_out, 10)
  again = open_set(folder, 'vqav2', 'val')
  assert again.questions == val.questions
  assert list(val.ids) == sorted(val.ids)


def test_rephrasings_are_scored_and_originals_are_not(folder):
  original, again = open_set(folder, 'rephrasings').questions
  assert (original.group, again.group) == ('42000', '42000')
  assert (original.is_scored, again.is_scored) == (False, True)
  assert again.text == 'is red the colour of the cat?'


def test_vqa_cp_leaves_out_what_vqav2_trains_on(folder):
  (question,) = open_set(folder, 'vqa_cp').questions
  assert question.picture == f'{43:012d}'


def test_vqa_ce_is_a_part_of_val(folder):
  found = open_set(folder, 'vqa_ce').questions
  assert [question.number for question in found] == ['42001', '45000']
  assert found[0].text == 'is cat 1 red?'
  vqa_files.write_json(folder / 'vqav2/counterexamples.json', [42001, 7])
  with pytest.raises(
    ValueError, match=r'1 of its 2 questions .* such as 7; is'
  ):
    open_set(folder, 'vqa_ce')


def test_advqa_is_of_val2014(folder):
  (question,) = open_set(folder, 'advqa').questions
  assert question.image == 'coco/val2014/COCO_val2014_000000000044.jpg'


@pytest.mark.parametrize(('name', 'answer'), [('iv_vqa', '2'), ('cv_vqa', '1')])
def test_edited_images_stand_beside_their_originals(folder, name, answer):
  original, *edited = open_set(folder, name).questions
  assert [question.is_scored for question in edited] == [True, True]
  assert not original.is_scored
  assert {q.group for q in (original, *edited)} == {'42000'}
  assert {q.picture for q in (original, *edited)} == {f'{42:012d}'}
  assert (original.answer, edited[0].answer) == ('2', answer)
  assert edited[1].image.endswith('COCO_val2014_000000000042_000000000071.jpg')


def test_an_edited_question_has_an_original(folder):
  file = folder / 'iv_vqa/original' / vqa_files.years('val2014')[0]
  other = folder / 'iv_vqa/original' / vqa_files.years('val2014')[1]
  change(file, lambda c: c['questions'].pop(0))
  change(other, lambda c: c['annotations'].pop(0))
  with pytest.raises(ValueError, match=r'1 of its questions have no original'):
    open_set(folder, 'iv_vqa')


def test_ok_vqa_is_scored_on_what_is_stemmed(folder):
  (question,) = open_set(folder, 'ok_vqa').questions
  assert question.answers == ('surf',) * 4 + ('swim',) * 6
  assert question.answer == 'swim'


def test_textvqa(folder):
  (question,) = open_set(folder, 'textvqa').questions
  assert (question.answer, question.number) == ('dakota', '34602')


def test_vizwiz_has_empty_answers_and_none(folder):
  (question,) = open_set(folder, 'vizwiz').questions
  assert question.answer == question.kind == 'unanswerable'
  assert '' in question.answers


def test_questions_go_with_their_rows(folder):
  spec = {'kind': 'vqa', 'name': 'vqav2', 'path': 'vqav2', 'root': 'coco'}
  spec |= {'split': 'train', 'limit': 3, 'resize': 10}
  source = sources.open_source(spec, folder)
  assert len(source) == len(source.questions) == 3
  example = source[2]
  assert example['image'].shape == (10, 10, 3)
  assert example['question'] == source.questions[2].text


def test_every_missing_image_is_named(folder):
  for i in (2, 5):
    (folder / f'coco/train2014/COCO_train2014_{i:012d}.jpg').unlink()
  with pytest.raises(FileNotFoundError) as error:
    open_set(folder, 'vqav2', 'train')
  text = str(error.value)
  assert '2 of 6 images cannot be used' in text
  assert '_000000000002.jpg: it is not there' in text
  assert '_000000000005.jpg: it is not there' in text


@pytest.mark.parametrize(
  ('damage', 'reason'),
  [
    (lambda data: data[:-40], 'runcated'),
    (lambda data: b'', r'\(0 bytes\) is not readable'),
    (lambda data: b'<html>', 'no such image format'),
  ],
)
def test_a_damaged_image_is_named(folder, damage, reason):
  file = folder / 'coco/train2014/COCO_train2014_000000000002.jpg'
  file.write_bytes(damage(file.read_bytes()))
  with pytest.raises(
    OSError, match=rf'(?s)1 of 6 images.*_000000000002.*{reason}'
  ):
    open_set(folder, 'vqav2', 'train')


def test_bytes_behind_an_image_do_no_harm(folder):
  file = folder / 'coco/train2014/COCO_train2014_000000000002.jpg'
  file.write_bytes(file.read_bytes() + b'\0' * 16)
  assert len(open_set(folder, 'vqav2', 'train')) == 12


@pytest.mark.parametrize(
  ('part', 'harm', 'message'),
  [
    (
      0,
      lambda c: c['questions'].pop(),
      r'train2014_annotations.json: 1 of its entries have none in v2_OpenEnded_'
      r'mscoco_train2014_questions.json, such as question_id 6001; are both of',
    ),
    (
      1,
      lambda c: c['annotations'].pop(),
      r'train2014_questions.json: 1 of its entries have none in v2_mscoco_train'
      r'2014_annotations.json, such as question_id 6001;',
    ),
    (
      0,
      lambda c: c['questions'].append(c['questions'][0]),
      r'questions.json: question_id 1000 is there twice; take one out',
    ),
    (
      1,
      lambda c: c['annotations'][3]['answers'].clear(),
      r'annotations.json: question 2001 has 0 answers, not 10; mend it',
    ),
    (
      1,
      lambda c: c['annotations'][3]['answers'].pop(),
      r'annotations.json: question 2001 has 9 answers, not 10; mend it',
    ),
    (
      0,
      lambda c: c['questions'][4].pop('question_id'),
      r'questions.json: entry 4 has no question_id: ',
    ),
    (
      0,
      lambda c: c.pop('questions'),
      r'questions.json is no list of questions',
    ),
  ],
)
def test_damaged_files_are_refused(folder, part, harm, message):
  change(folder / 'vqav2' / vqa_files.years('train2014')[part], harm)
  with pytest.raises(ValueError, match=message):
    open_set(folder, 'vqav2', 'train')


def test_a_file_that_is_cut_short_is_refused(folder):
  file = folder / 'vqav2' / vqa_files.years('train2014')[0]
  file.write_bytes(file.read_bytes()[:-9])
  with pytest.raises(ValueError, match=r'questions.json is cut short or damag'):
    open_set(folder, 'vqav2', 'train')
  file.unlink()
  with pytest.raises(
    FileNotFoundError, match=r'questions.json is no file; set d'
  ):
    open_set(folder, 'vqav2', 'train')


def test_unknown_sets_and_splits_are_refused(folder):
  with pytest.raises(ValueError, match=r"no set 'gqa'; there are vqav2, reph"):
    open_set(folder, 'gqa')
  with pytest.raises(
    ValueError, match=r"vqav2 has no split ''; it has train, v"
  ):
    open_set(folder, 'vqav2')
  with pytest.raises(
    ValueError, match=r'advqa has no split .* one alone, without'
  ):
    open_set(folder, 'advqa', 'val')


def test_a_set_that_is_empty_is_refused(folder):
  for part in ('questions', 'annotations'):
    change(
      folder / f'vqa_cp/vqacp_v2_test_{part}.json', lambda rows: rows.pop()
    )
  with pytest.raises(ValueError, match='no question is left of vqa_cp'):
    open_set(folder, 'vqa_cp')
