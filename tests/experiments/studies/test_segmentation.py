"""What a config says reaches the model, the data, the head and the picture."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from experiments import cli, compare, optimizers, resume, runs, study
from experiments.configs import camvid
from experiments.data import dense
from experiments.models import segmenter, swin
from experiments.studies import segmentation
from tests.experiments import kinds, tiny_study

SWIN = tiny_study.CHECKPOINT.parent / 'swin'


@pytest.fixture
def config(noise, tiny_clip, tmp_path):
  config = kinds.tiny('segmentation', noise)
  config.update(output_dir=str(tmp_path), num_steps=4, eval_every=2)
  return config


@pytest.fixture
def of_swin(config):
  config.model.update(name='', pretrained=str(SWIN))
  config.update(decoder='mlp', augment=True, image_size=(21, 27))
  return config


def load(config):
  return study.load(config, study.check(config), cli.progress)


def test_theta_0_is_a_linear_probe_of_the_patches(config):
  new = load(config)
  assert not np.any(new.pretrained['head']['linear']['kernel'])
  chance = new.evaluate(new.pretrained, new.sets)['ID']
  config.head = 'linear_probe'
  fitted = load(config)
  found = fitted.evaluate(fitted.pretrained, fitted.sets)['ID']
  assert found['miou'] > chance['miou'] + 0.1
  assert found['pixel_accuracy'] > chance['pixel_accuracy'] + 0.1
  # Nothing else has moved.
  a, b = new.pretrained['backbone'], fitted.pretrained['backbone']
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_class_that_no_patch_has():
  """It has no logit, and the others those of a probe without it."""
  rng = np.random.default_rng(0)
  labels = rng.choice([0, 2, 3], 60)
  features = np.eye(4)[labels] + 0.1 * rng.normal(size=(60, 4))
  kernel, bias = segmentation._probe(
    (features, labels), (features, np.where(labels == 2, 1, labels)), 5
  )
  assert kernel.shape == (4, 5)
  assert not np.any(kernel[:, [1, 4]])
  assert not np.any(bias[[1, 4]])
  assert (features @ kernel + bias).argmax(1).tolist() == labels.tolist()


@pytest.mark.slow
def test_a_swin_is_trained_with_its_decoder(of_swin, capsys):
  """And SPD, by one of two rows, leaves the new decoder to itself."""
  of_swin.methods.free = of_swin.methods.spd_1.copy_and_resolve_references()
  of_swin.methods.free.anchor_head = False
  sources = compare.configure(of_swin, methods=['spd_1', 'free', 'adamw'])
  tuning = study.load(of_swin, sources, cli.progress)
  assert isinstance(tuning.task, segmentation.segmentation.Segmentation)
  before = tuning.pretrained['head']
  assert set(before) == {'norms', 'project', 'fuse', 'norm', 'classify'}
  saved = resume.Saved(of_swin, {})
  compare.run(of_swin, tuning, saved)
  found = saved.rows
  capsys.readouterr()
  assert {row['method'] for row in found} == {'spd_1', 'free', 'adamw'}
  for row in found:
    assert row['history']['deviation'][-1] > 0
    assert 0 < row['metrics']['ID']['miou'] < 1
  names = {}
  for name in ('spd_1', 'free'):
    method, _ = optimizers.from_config(of_swin, of_swin.methods[name])
    names[name] = method.layer_names(tuning.pretrained)
  of_head = {name for name in names['spd_1'] if 'head' in name}
  assert len(of_head) == 12
  assert set(names['spd_1']) - set(names['free']) == of_head


def test_a_picture_of_every_set(config):
  config.update(head='linear_probe', first_block=1)
  config.eval_sets['dark'] = {
    **config.eval_sets.ID,
    'limit': 3,
  }
  tuning = load(config)
  runs.row(
    config, tuning, 'zero_shot', 0, runs.run(config, tuning, 'zero_shot', 0)
  )
  file = f'{config.output_dir}/pictures/zero_shot_0.png'
  with Image.open(file) as image:
    pixels = np.asarray(image.convert('RGB'))
  assert pixels.shape[1] == 960
  figure = segmentation.draw(config, tuning, tuning.pretrained)
  lines = np.reshape(figure.axes, (2, 3))
  assert [line[0].get_ylabel() for line in lines] == ['ID', 'dark']
  assert [place.get_title() for place in lines[0]] == [
    *('image', 'truth', 'predicted')
  ]
  source = study.check(config)['ID']
  example = source[len(source) // 2]
  image, truth, predicted = (place.images[0].get_array() for place in lines[0])
  np.testing.assert_array_equal(image, example['image'])
  assert truth.shape == predicted.shape == (20, 16, 3)
  white = (truth == 255).all(-1)
  np.testing.assert_array_equal(white, example['mask'] == -1)
  model = nnx.merge(tuning.graphdef, tuning.pretrained, tuning.frozen)
  row = len(source) // 2
  batches = list(tuning.sets['ID'].batches(16))
  classes = tuning.task.predict(model, batches[row // 16])[row % 16]
  colors = {
    tuple(color) for color in np.c_[classes.ravel(), predicted.reshape(-1, 3)]
  }
  assert len(colors) == len(np.unique(classes)) > 1
  legend = [text.get_text() for text in figure.legends[0].get_texts()]
  assert legend == ['dark', 'middle', 'bright', 'void']


def test_which_of_many_sets_are_drawn():
  config = camvid.get_config()
  assert segmentation._shown(list(config.eval_sets)) == [
    *('Seq05VD', 'dusk', 'fog 3', 'defocus_blur 3'),
    *('gaussian_noise 3', 'brightness 3'),
  ]
  for number in range(7):
    names = list('abcdef'[:number])
    assert segmentation._shown(names) == names


def test_images_of_several_sizes(config, tmp_path, noise):
  """Each whole, at its own size, whatever else is in the batch."""
  root = tmp_path / 'data'
  for name in ('pixels', 'masks'):
    (root / name).mkdir(parents=True)
  rng = np.random.default_rng(0)
  sizes = [(20, 16), (40, 32), (33, 60), (60, 25)]
  for i in range(40):
    size = sizes[i % 4]
    pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(root / f'pixels/{i:02}.png')
    mask = rng.integers(0, 3, size).astype(np.uint8)
    Image.fromarray(mask).save(root / f'masks/{i:02}.png')
  (root / 'classes.txt').write_text('a\nb\nc\n')
  config.update(data_dir=str(root), batch_size=2, eval_size=(40, 40))
  tuning = load(config)
  sets = study.check(config)
  outputs = jax.jit(
    lambda batch: tuning.task.outputs(
      nnx.merge(tuning.graphdef, tuning.pretrained, tuning.frozen),
      batch,
    )
  )
  batch = next(tuning.sets['ID'].batches(8))
  assert batch['image'].shape == (8, 40, 40, 3)
  assert batch['mask'].shape == (8, 60, 60)
  confusion = outputs(batch)['confusion']
  for i, size in enumerate(sets['ID'].sizes):
    assert confusion[i].sum() == size.prod()
    alone = {key: value[i : i + 1] for key, value in batch.items()}
    np.testing.assert_array_equal(outputs(alone)['confusion'][0], confusion[i])
  config.eval_resize = False
  with pytest.raises(
    ValueError, match=r'images are larger than config\.eval_size, \(40, 40\), s'
  ):
    study.check(config)


def test_training_cuts_boxes_and_evaluation_does_not(of_swin):
  tuning = load(of_swin)
  batch = next(tuning.train(0, 0))
  assert batch['image'].shape == (16, 21, 27, 3)
  assert batch['mask'].shape == (16, 21, 27)
  assert batch['scale'].tolist() == [[1, 1]] * 16
  (fit,) = tuning.sets['val'].transforms
  assert fit == dense.Fit((21, 27), (20, 16), True)


def test_the_model_of_a_config(of_swin):
  of_swin.model.update(dtype='bfloat16', drop_path=0.1, remat=True)
  model = segmentation._model_config(of_swin)
  assert isinstance(model, swin.SwinConfig)
  assert (model.dtype, model.drop_path, model.remat) == ('bfloat16', 0.1, True)
  parts = study.shapes(of_swin)
  assert isinstance(parts.model.head, segmenter.MLPDecoder)
  assert parts.example['mask'].shape == (21, 27)
  assert parts.task.grid == (5, 6)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'num_classes': 4}, 'num_classes is 4, the training set has 3; set it to'),
    ({'metrics': ('auroc',)}, "metrics is 'auroc'; it must be one of miou, pi"),
    ({'head': 'zeros'}, "head is 'zeros'; it must be one of linear_probe, new"),
    ({'image_size': (21, 16)}, r'image_size is \(21, 16\); .* multiples of 4'),
    ({'eval_size': (20,)}, r'eval_size is \(20,\); it is a height and a width'),
    ({'decoder': 'mlp'}, "decoder is 'mlp'; of a ViT it is 'linear', of a Swi"),
    ({'first_block': 2}, 'first_block is 2; the model has blocks 0 to 1'),
    (
      {'first_block': 1, 'augment': True},
      'augment is True, but with config.fi',
    ),
    ({'first_block': 1, 'model.scan': True}, 'scan runs all blocks; set'),
    ({'augment': True, 'flip': 1.5}, r'flip is 1\.5; it is from 0 to 1'),
    ({'augment': True, 'crop_scale': (2.0, 1.0)}, 'crop_scale is .* above 0'),
    ({'flip': 0.1}, 'flip is 0.1, which has no effect: it is of augmentation'),
    ({'crop_scale': (1.0, 1.0)}, 'which has no effect: it is of augmentation'),
    ({'repeats': 3}, 'repeats is 3, which has no effect: the views of an im'),
    ({'model.pretrained': ''}, 'pretrained is empty; say where weights are'),
    ({'model.name': 'x'}, r"model\.name is 'x'; it must be one of .*swin_t"),
    (
      {'train': {'kind': 'elpv'}},
      "train.kind is 'elpv'; it must be one of mas",
    ),
  ],
)
def test_studies_that_could_not_end(config, changes, message):
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    study.check(config)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'decoder': 'linear'}, "decoder is 'linear'; of a ViT it is 'linear', of"),
    (
      {'head': 'linear_probe'},
      "head is 'linear_probe', which config.decoder =",
    ),
    ({'first_block': 1, 'augment': False}, 'of a Swin are of several shapes'),
    ({'model.scan': True}, 'of a Swin are of several shapes'),
  ],
)
def test_studies_of_a_swin_that_could_not_end(of_swin, changes, message):
  of_swin.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    study.check(of_swin)


def test_images_are_not_resized_without_their_masks(config):
  config.train.resize = 20
  with pytest.raises(ValueError, match='resize is of images without masks'):
    study.check(config)


def test_the_classes_of_a_run_are_written(config, noise):
  """As `experiments.main` does it, of any source that has some."""
  from experiments import main

  main.run(config, 'zero_shot', 0)
  folder = runs.folder(config, 'zero_shot', 0)
  names = json.loads((folder / runs.CLASSES).read_text())
  assert names == ['dark', 'middle', 'bright']
