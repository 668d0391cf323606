"""From a run's folder to one that a study starts from; what is refused."""

import json
import shutil
import subprocess
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from experiments import export, main, study
from experiments.configs import base
from tests.experiments import tiny_study


@pytest.fixture
def config(noise, tiny_clip, tmp_path):
  config = tiny_study.get_config(str(noise))
  config.update(output_dir=str(tmp_path), num_steps=4, eval_every=2)
  return config


def row(config, method):
  return main.run(config, method, 0)[0]


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'first_block': 1, 'head': 'linear_probe'},
    {'head': 'zero_shot', 'ema': 0.5},
    {'model.scan': True},
  ],
)
def test_a_study_starts_from_what_a_run_chose(config, tmp_path, changes):
  config.update_from_flattened_dict(changes)
  ended = row(config, 'adamw')
  run = tmp_path / 'adamw_0'
  folder, files, step = export.export(run, 'safetensors')
  assert folder == run / 'safetensors'
  held = {path.name for path in folder.iterdir()}
  assert held == {*files, 'run.json'}
  assert step == ended['step']
  labels = json.loads((folder / 'config.json').read_text())['id2label']
  assert labels == {'0': 'a', '1': 'b', '2': 'c'}
  # Where only a part was trained, the rest is theta_0's.
  theta_0 = load_file(tiny_study.CHECKPOINT / 'model.safetensors')
  tensors = load_file(folder / 'model.safetensors')
  same = {k for k in tensors if (tensors[k] == theta_0[k]).all()}
  lower = {
    key
    for key in tensors
    if 'embeddings' in key or 'pre_lay' in key or 'layers.0.' in key
  }
  assert same == (lower if config.first_block else set())
  config.update(head='pretrained', output_dir=str(tmp_path / 'next'))
  config.model.update(pretrained=str(folder), name='')
  start = row(config, 'zero_shot')
  # The same images and the same numbers, to the last bit.
  assert start['metrics'] == ended['metrics']


@pytest.mark.parametrize('changes', [{}, {'model.scan': True}])
def test_a_run_of_lora_is_merged_or_its_adapters_alone(
  config, tmp_path, changes
):
  config.methods.lora_spd = base.method(
    'LoRA', optimizer='adam', lora=2, spd=1.0, anchor='origin', rate=10.0
  )
  config.update_from_flattened_dict(changes)
  ended = row(config, 'lora_spd')
  run = tmp_path / 'lora_spd_0'
  folder, _, _ = export.export(run, 'peft')
  adapters = load_file(folder / 'adapter_model.safetensors')
  written = [name for name in adapters if 'lora_B' in name]
  assert len(written) == 4  # queries and values of two blocks
  assert all(np.any(adapters[name]) for name in written)
  folder, _, _ = export.export(run, 'safetensors')
  config.update(head='pretrained', output_dir=str(tmp_path / 'next'))
  config.model.update(pretrained=str(folder), name='')
  start = row(config, 'zero_shot')
  # The product A B is added to the weights instead of to what they make.
  assert start['metrics'] == ended['metrics']


def test_it_is_the_step_that_was_chosen_and_its_average(config, tmp_path):
  config.update(ema=0.5, keep=3)
  row(config, 'adamw')
  run = tmp_path / 'adamw_0'
  (path,) = (run / 'checkpoints/4').rglob('run/metadata')
  kept = json.loads(path.read_text())
  kept['about']['best_step'] = 2
  path.write_text(json.dumps(kept))
  with ocp.StandardCheckpointer() as reader:
    state = reader.restore(run / 'checkpoints/2/state')
  folder, _, step = export.export(run, 'safetensors')
  assert step == 2
  bias = load_file(folder / 'head.safetensors')['classifier.bias']
  average = state['average']['head']['bias']['value']
  np.testing.assert_array_equal(bias, average)
  assert (bias != state['params']['head']['bias']['value']).any()


def test_it_is_replaced_by_the_same_run_alone(config, tmp_path):
  row(config, 'adamw')
  run, to = tmp_path / 'adamw_0', tmp_path / 'to'
  for _ in range(2):
    export.export(run, 'safetensors', to)
  config.learning_rate *= 2
  config.output_dir = str(tmp_path / 'other')
  row(config, 'adamw')
  with pytest.raises(ValueError, match=r'to holds something else.*--to'):
    export.export(tmp_path / 'other/adamw_0', 'safetensors', to)


def test_weights_that_were_moved(config, tmp_path):
  moved = tmp_path / 'moved'
  shutil.copytree(tiny_study.CHECKPOINT, moved)
  config.model.pretrained = str(moved)
  row(config, 'adamw')
  run = tmp_path / 'adamw_0'
  export.export(run, 'safetensors')
  moved.rename(tmp_path / 'here')
  with pytest.raises(FileNotFoundError, match='moved: no such file or folder'):
    export.export(run, 'safetensors')
  export.export(run, 'safetensors', pretrained=str(tmp_path / 'here'))
  other = tiny_study.CHECKPOINT.parent / 'vit'
  with pytest.raises(ValueError, match=r'vit/config\.json: .* but the model'):
    export.export(run, 'safetensors', pretrained=str(other))


def test_a_head_of_other_classes_is_told_before_images_are_read(config):
  config.head = 'pretrained'
  with pytest.raises(ValueError, match=r'clip: .* the 0 classes of its config'):
    study.check(config)


class TestRefusals:
  def refuses(self, run, message, *args, error=ValueError):
    with pytest.raises(error, match=message) as raised:
      export.export(run, *args or ['safetensors'])
    assert '\n' not in str(raised.value)

  def test_what_is_no_run(self, tmp_path):
    for run in (tmp_path, tmp_path / 'x'):
      self.refuses(run, f'{run} is no run: ', error=FileNotFoundError)

  def test_theta_0(self, config, tmp_path):
    row(config, 'zero_shot')
    self.refuses(tmp_path / 'zero_shot_0', 'trained nothing: .* theta_0')

  def test_a_run_that_cannot_be_read_as_a_whole(self, config, tmp_path):
    row(config, 'adamw')
    run = tmp_path / 'adamw_0'
    self.refuses(run, 'no LoRA adapters', 'peft')
    (run / 'classes.json').write_text('["a", "b"]')
    self.refuses(run, r'trained head\.\w+ .*3.*, but the model has .*2')
    (run / 'classes.json').unlink()
    self.refuses(run, r'classes\.json cannot be read.*experiments\.main again')
    row(config, 'adamw')  # of the run that has ended
    export.export(run, 'safetensors')
    steps = run / 'checkpoints'
    shutil.rmtree(steps / '4')
    self.refuses(run, 'has not ended: it is at step 3 of 4; go on')
    for step in steps.iterdir():
      shutil.rmtree(step)
    self.refuses(run, 'has not ended: it is at step 0 of its budget; go on')


@pytest.mark.slow
def test_the_command(config, tmp_path):
  config.model.name = ''  # which the tiny model has in this process alone
  row(config, 'adamw')
  run = tmp_path / 'adamw_0'
  for arguments, code, printed in (
    ([run], 0, f'{run}/safetensors/: config.json, head.safetensors, model.saf'),
    ([], 1, 'export: name one run, the folder of it, not 0; see --help.'),
    ([run, '--format=x'], 1, 'export: flag --format=x: value should be one of'),
  ):
    done = subprocess.run(
      [sys.executable, '-m', 'experiments.export', *map(str, arguments)],
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.stderr.count('\n') == (code > 0), done.stderr
    assert done.returncode == code
    assert (done.stderr or done.stdout).startswith(printed)
