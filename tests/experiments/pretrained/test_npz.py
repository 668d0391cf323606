"""AugReg's format, with the weights that transformers' outputs are known of."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.pretrained import load, npz, safetensors


@pytest.mark.parametrize('head', [False, True])
def test_the_model_is_the_one_of_the_reference(
  reference, configs, tensors, tmp_path, head
):
  if head:
    for name in ('head', 'pre_logits'):
      tensors[f'{name}/kernel'] = np.zeros((16, 3), np.float32)
      tensors[f'{name}/bias'] = np.zeros(3, np.float32)
  path = tmp_path / 'B_16.npz'
  np.savez(path, **tensors)
  found = npz.load_vit_params(configs['vit'], path)
  # Whose outputs are tested.
  expected = safetensors.load_vit_params(configs['vit'], reference / 'vit')
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_check_reads_headers_alone(configs, tensors, tmp_path, monkeypatch):
  path = tmp_path / 'B_16.npz'
  np.savez_compressed(path, **tensors)
  monkeypatch.setattr(np, 'load', None)
  npz.check(configs['vit'], path)


def test_outputs_are_those_of_transformers(
  reference, configs, tensors, tmp_path
):
  np.savez(tmp_path / 'B_16.npz', **tensors)
  model = load.load_vit(configs['vit'], str(tmp_path / 'B_16.npz'))
  outputs = np.load(reference / 'vit' / 'outputs.npz')
  hidden = model(outputs['images'].astype(np.float32))
  # Float32 against float64: 6e-7 was seen, of values with deviation 1.
  np.testing.assert_allclose(hidden, outputs['hidden'], atol=1e-5)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      {'Transformer/encoderblock_1/LayerNorm_2/bias': None},
      r'missing Transformer/encoderblock_1/LayerNorm_2/bias, surplus nothing',
    ),
    ({'opt/step': np.zeros(1)}, r'missing nothing, surplus opt/step;'),
    (
      {'cls': np.zeros((1, 1, 17))},
      r'cls has shape \(17,\) .* cls_token \(16,\)',
    ),
    ({'cls': np.zeros((1, 1, 16), np.int8)}, 'cls is int8; what is read is fl'),
  ],
)
def test_tensors_that_do_not_fit(configs, tensors, tmp_path, change, message):
  tensors |= change
  tensors = {name: t for name, t in tensors.items() if t is not None}
  path = tmp_path / 'B_16.npz'
  np.savez(path, **tensors)
  for read in (npz.check, npz.load_vit_params):
    with pytest.raises(ValueError, match=f'{path}: .*{message}'):
      read(configs['vit'], path)


def test_another_number_of_heads(configs, tensors, tmp_path):
  path = tmp_path / 'B_16.npz'
  np.savez(path, **tensors)
  config = dataclasses.replace(configs['vit'], num_heads=4)
  for read in (npz.check, npz.load_vit_params):
    with pytest.raises(
      ValueError, match=r'2 heads, its ViTConfig num_heads=4;'
    ):
      read(config, path)


def test_truncated_file(configs, tensors, tmp_path):
  path = tmp_path / 'B_16.npz'
  np.savez(path, **tensors)
  path.write_bytes(path.read_bytes()[:-100])
  for read in (npz.check, npz.load_vit_params):
    with pytest.raises(
      ValueError, match=rf'{path} \(\d+ bytes\) is not an .npz'
    ):
      read(configs['vit'], path)


@pytest.mark.parametrize('whole', [False, True])
def test_pickles_are_not_loaded(configs, tmp_path, whole):
  class Harmful:
    def __reduce__(self):
      return pytest.fail, ('the pickle was loaded',)

  path = tmp_path / 'B_16.npz'
  harmful = np.array([Harmful()], object)
  if whole:
    harmful.dump(path)
  else:
    np.savez(path, cls=harmful)
  for read in (npz.check, npz.load_vit_params):
    with pytest.raises(ValueError, match=r'is not an \.npz of plain arrays'):
      read(configs['vit'], path)
