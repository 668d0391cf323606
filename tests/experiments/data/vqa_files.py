"""Writes the ten sets of questions in the formats of their authors."""

import json

import numpy as np
from PIL import Image

TEN = [*['yes'] * 6, *['no'] * 3, 'maybe']


def annotation(question, answers=TEN, **keys):
  """One of VQAv2's."""
  return {
    'question_type': 'is the',
    'multiple_choice_answer': answers[0],
    'answers': [
      {'answer': answer, 'answer_confidence': 'yes', 'answer_id': i}
      for i, answer in enumerate(answers, 1)
    ],
    'image_id': question['image_id'],
    'answer_type': 'yes/no',
    'question_id': question['question_id'],
    **keys,
  }


def write_json(file, content):
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(content))


def write_pair(folder, names, questions, annotations):
  """A file of questions and one of annotations, with the usual header."""
  header = {'info': {'version': '2.0'}, 'license': {}, 'data_type': 'mscoco'}
  for name, key, rows in zip(
    names, ('questions', 'annotations'), (questions, annotations), strict=True
  ):
    write_json(folder / name, {**header, key: rows})


def write_image(file, seed=0):
  rng = np.random.default_rng(seed)
  write_pixels(file, rng.integers(0, 256, (20, 24, 3), np.uint8))


def write_pixels(file, pixels):
  file.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(file)


def ask(image_id, number=0, text='is the cat red?', **keys):
  """A question of VQAv2, whose number is that of the image and one digit."""
  number = int(str(image_id)[:12]) * 1000 + number
  return {
    'image_id': image_id,
    'question': text,
    'question_id': number,
    **keys,
  }


def years(year):
  return (
    f'v2_OpenEnded_mscoco_{year}_questions.json',
    f'v2_mscoco_{year}_annotations.json',
  )


def write_vqav2(folder, year, images, per_image=2):
  """Questions about images of COCO, and the images."""
  questions = [
    ask(image, i, f'is cat {i} red?')
    for image in images
    for i in range(per_image)
  ]
  write_pair(
    folder / 'vqav2', years(year), questions, list(map(annotation, questions))
  )
  for image in images:
    write_image(
      folder / f'coco/{year}/COCO_{year}_{image:012d}.jpg', seed=image
    )


def write_all(folder):
  """All ten, on six images of train2014 and eight of val2014."""
  write_vqav2(folder, 'train2014', range(1, 7))
  write_vqav2(folder, 'val2014', range(42, 50))
  original = ask(42, 0, 'is the cat red?')
  again = ask(42, 1, 'is red the colour of the cat?', rephrasing_of=42000)
  write_pair(
    folder / 'rephrasings',
    (
      'v2_OpenEnded_mscoco_valrep2014_humans_og_questions.json',
      'v2_mscoco_valrep2014_humans_og_annotations.json',
    ),
    [original, again],
    [annotation(original), annotation(again, rephrasing_of=42000)],
  )
  questions = [
    ask(3, 0, coco_split='train2014'),
    ask(43, 1, coco_split='val2014'),
  ]
  write_json(folder / 'vqa_cp/vqacp_v2_test_questions.json', questions)
  write_json(
    folder / 'vqa_cp/vqacp_v2_test_annotations.json',
    [annotation(q, coco_split=q['coco_split']) for q in questions],
  )
  write_json(folder / 'vqav2/counterexamples.json', [42001, 45000])
  question = ask(44, 7, 'what is it not?')
  write_pair(
    folder / 'advqa',
    (
      'v1_OpenEnded_mscoco_val2017_advqa_questions.json',
      'v1_mscoco_val2017_advqa_annotations.json',
    ),
    [question],
    [annotation(question)],
  )
  for name, answer in (('iv_vqa', '2'), ('cv_vqa', '1')):
    original, other = ask(42, 0, 'how many?'), ask(43, 0, 'how many?')
    write_pair(
      folder / name / 'original',
      years('val2014'),
      [original, other],
      [annotation(q, ['2'] * 10) for q in (original, other)],
    )
    edited = [
      {**original, 'image_id': f'000000000042_{i:012d}'} for i in (70, 71)
    ]
    write_pair(
      folder / name / 'edited',
      years('val2014'),
      edited,
      [annotation(q, [answer] * 10) for q in edited],
    )
    for q in edited:
      write_image(
        folder / name / f'edited/val2014/COCO_val2014_{q["image_id"]}.jpg'
      )
  question = ask(45, 3, 'what sport is this?')
  stemmed = annotation(question, ['surf'] * 4 + ['swim'] * 6)
  for answer in stemmed['answers']:
    answer['raw_answer'] = f'{answer["answer"]}ing'
  write_pair(
    folder / 'ok_vqa',
    (
      'OpenEnded_mscoco_val2014_questions.json',
      'mscoco_val2014_annotations.json',
    ),
    [question],
    [stemmed],
  )
  write_json(
    folder / 'textvqa/TextVQA_0.5.1_val.json',
    {
      'dataset_type': 'val',
      'data': [
        {
          'question_id': 34602,
          'question': 'what is the brand of this camera?',
          'image_id': '003a8ae2ef43b901',
          'answers': ['nous les gosses', *['dakota'] * 9],
        }
      ],
    },
  )
  write_image(folder / 'openimages/train_images/003a8ae2ef43b901.jpg')
  write_json(
    folder / 'vizwiz/annotations/val.json',
    [
      {
        'image': 'VizWiz_val_00000000.png',
        'question': 'Ok. There is another picture I hope it is a better one.',
        'answers': [
          {'answer_confidence': 'yes', 'answer': answer}
          for answer in ('unanswerable', *['unanswerable'] * 7, '', 'a dog')
        ],
        'answer_type': 'unanswerable',
        'answerable': 0,
      }
    ],
  )
  write_image(folder / 'vizwiz/val/VizWiz_val_00000000.png')
