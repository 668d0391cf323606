"""Checkpoints: of which run, how many, on how many devices; what is refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from experiments import checkpoint, main, parallel, report, train
from optax_spd import adam_spd
from tests.experiments import test_train, tiny_study

METHOD = dataclasses.replace(test_train.SPD, num_steps=12)
HYPERPARAMS = test_train.hyperparams(spd=1.0)
RUN = {'learning_rate': 1e-2, 'model': {'name': 'x'}, 'layout': 'fsdp'}


class Stopping(checkpoint.Checkpoints):
  """Asks the run to stop after the sixth step."""

  def stop_wanted(self, step):
    return step == 6


def tuning(layout=None, **changes):
  changes = {'num_steps': 12, 'eval_every': 4, 'save_every': 2} | changes
  return test_train.fine_tuning(layout=layout, **changes)


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
  """The folder of a run on eight devices, stopped after the sixth step."""
  folder = tmp_path_factory.mktemp('stopped') / 'checkpoints'
  layout = parallel.layout('fsdp:4', jax.devices())
  checkpoints = Stopping(folder, RUN)
  with pytest.raises(train.Stopped, match='after step 6 of 12'):
    tuning(layout).run(METHOD, HYPERPARAMS, 0, checkpoints=checkpoints)
  return folder


@pytest.fixture
def copied(stopped, tmp_path):
  return shutil.copytree(stopped, tmp_path / 'checkpoints')


@pytest.mark.parametrize('number', [1, 4])
def test_it_goes_on_with_fewer_devices(copied, number):
  layout = parallel.layout('fsdp', jax.devices()[:number])
  seen = []
  run = tuning(layout).run(
    METHOD,
    HYPERPARAMS,
    0,
    callback=lambda history, layers: seen.append(len(history)),
    checkpoints=checkpoint.Checkpoints(copied, RUN),
  )
  assert seen == list(range(7, 13))
  whole = tuning(layout).run(METHOD, HYPERPARAMS, 0)
  # Sums in another order, before the stop.
  np.testing.assert_allclose(
    run.history['loss'], whole.history['loss'], atol=1e-5
  )
  assert run.history['decayed'].mean() > 0.05
  assert run.step == whole.step
  for mine, theirs in zip(
    jax.tree.leaves(run.params), jax.tree.leaves(whole.params), strict=True
  ):
    assert len(mine.sharding.device_set) == number
    np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_the_best_and_the_last_ones_are_kept(tmp_path):
  class Falling(train.FineTuning):
    """Its first evaluation is its best."""

    quality = 1.0

    def evaluate(self, params, sets):
      Falling.quality /= 2
      return {'val': {'auroc': Falling.quality}}

  checkpoints = checkpoint.Checkpoints(tmp_path, RUN, keep=3)
  run = Falling(**vars(tuning())).run(
    METHOD, HYPERPARAMS, 0, checkpoints=checkpoints
  )
  assert run.step == 4
  kept = {path.name for path in tmp_path.iterdir()}
  assert kept == {'4', '8', '10', '12'}
  # A process that comes later reads the best out of its checkpoint.
  again = Falling(**vars(tuning())).run(
    METHOD,
    HYPERPARAMS,
    0,
    checkpoints=checkpoint.Checkpoints(tmp_path, RUN, keep=3),
  )
  assert again.step == 4
  assert again.seconds == run.seconds
  jax.tree.map(np.testing.assert_array_equal, again.params, run.params)


def test_another_run_is_refused_and_another_place_is_not(copied):
  other = {**RUN, 'model': {'name': 'y'}, 'layout': 'pmap'}
  message = r"6 is of another run: model\.name was 'x', now 'y'\. Use its"
  with pytest.raises(ValueError, match=message):
    checkpoint.Checkpoints(copied, other)
  checkpoint.Checkpoints(copied, {**RUN, 'layout': 'pmap'}).close()


def test_a_folder_with_something_else_in_it(tmp_path):
  (tmp_path / 'thesis.tex').touch()
  with pytest.raises(ValueError, match=r'holds thesis\.tex, which is no check'):
    checkpoint.Checkpoints(tmp_path, RUN)
  assert (tmp_path / 'thesis.tex').exists()


@pytest.mark.parametrize('broken', ['state', 'run/metadata'])
def test_one_that_cannot_be_read_leaves_the_others(copied, broken):
  for file in sorted((copied / '6').rglob('*')):
    if file.is_file() and broken in str(file):
      file.write_bytes(b'x')

  def restore():
    tuning().run(
      METHOD, HYPERPARAMS, 0, checkpoints=checkpoint.Checkpoints(copied, RUN)
    )

  with pytest.raises(ValueError, match=r'/6 cannot be read: .*Move it away'):
    restore()
  assert {path.name for path in copied.iterdir()} == {'4', '6'}
  shutil.rmtree(copied / '6')
  restore()
  assert '12' in {path.name for path in copied.iterdir()}


def test_one_of_another_model_is_refused(copied):
  wider = dataclasses.replace(test_train.TINY, mlp_dim=64)
  other = test_train.fine_tuning(
    model_config=wider, num_steps=12, eval_every=4, save_every=2
  )
  message = r'of another model: .*\.fc1\.bias\.value is \(32,\), here \(64,\)\.'
  with pytest.raises(ValueError, match=message):
    other.run(
      METHOD, HYPERPARAMS, 0, checkpoints=checkpoint.Checkpoints(copied, RUN)
    )


def test_a_disk_without_room(tmp_path, monkeypatch):
  usage = type('Usage', (), {'free': 1000})
  monkeypatch.setattr(checkpoint.shutil, 'disk_usage', lambda path: usage)
  with pytest.raises(OSError, match=r'has room for 0\.0 GB'):
    tuning().run(
      METHOD, HYPERPARAMS, 0, checkpoints=checkpoint.Checkpoints(tmp_path, RUN)
    )


def test_the_anchor_is_where_the_params_start():
  params = tuning().pretrained
  moved = jax.tree.map(lambda x: x + 1, params)
  tx = METHOD.make(**HYPERPARAMS)
  assert train.is_anchored(tx.init(params), params)
  assert not train.is_anchored(tx.init(moved), params)
  # A head without an anchor, and Adam, have nothing to compare.
  headless = dataclasses.replace(METHOD, anchor_head=False)
  tx = headless.make(**HYPERPARAMS)
  assert train.is_anchored(tx.init(params), params)
  assert not train.is_anchored(tx.init(moved), params)
  tx = test_train.METHOD.make(**HYPERPARAMS)
  assert train.is_anchored(tx.init(moved), params)

  class Elsewhere(type(METHOD)):
    def make(self, **hyperparams):
      return adam_spd(1e-3, moved)

  with pytest.raises(RuntimeError, match='anchor is not where the params sta'):
    tuning().init(Elsewhere(**vars(METHOD)), HYPERPARAMS, params)


class TestMain:
  """`experiments.main`, but for its flags."""

  @pytest.fixture
  def config(self, noise, tiny_clip, tmp_path):
    config = tiny_study.get_config(str(noise))
    config.update(output_dir=str(tmp_path), num_steps=8, eval_every=4)
    return config

  def test_its_rows_are_those_of_a_table(self, config, tmp_path):
    config.tensorboard = True
    adamw, wise_ft = main.run(config, 'adamw', 1)
    assert (adamw['method'], adamw['seed'], adamw['step']) == ('adamw', 1, 8)
    assert wise_ft['label'] == 'WiSE-FT 0.5'
    assert wise_ft['deviation'] == pytest.approx(
      adamw['deviation'] / 2, rel=1e-4
    )
    folder = tmp_path / 'adamw_1'
    rows = report.read_jsonl(folder / 'rows.jsonl')
    assert report.table(rows, rows[0]['means']).count('\n') == 3
    assert list((folder / 'tensorboard').iterdir())
    assert not (folder / 'layers.jsonl').exists()
    # What starts from it starts at what it chose.
    (after,) = main.run(config, 'after', 1)
    assert after['decayed'] > 0
    assert after['history']['deviation'][0] > adamw['deviation'] / 2
    names, *lines = [
      json.loads(line)
      for line in (tmp_path / 'after_1/layers.jsonl').read_text().splitlines()
    ]
    assert 'head/kernel' in names['layers']
    assert [line['step'] for line in lines] == [2, 4, 6, 8]
    for line in lines:
      assert len(line['ratio']) == len(names['layers'])
    (start,) = main.run(config, 'zero_shot', 1)
    assert start['deviation'] == 0
    assert start['seconds'] is None

  def test_a_run_that_starts_from_one_that_has_not_ended(self, config):
    message = 'run --method=adamw --seed=3'
    with pytest.raises(FileNotFoundError, match=message):
      main.run(config, 'after', 3)
    main.run(config, 'adamw', 3)
    shutil.rmtree(f'{config.output_dir}/adamw_3/checkpoints/8')
    with pytest.raises(FileNotFoundError, match=message):
      main.run(config, 'after', 3)

  @pytest.mark.parametrize('name', ['wise_ft', 'x'])
  def test_methods_that_it_does_not_run(self, config, name):
    message = f'--method={name} is none .* one of zero_shot, adamw, spd_1, aft'
    with pytest.raises(ValueError, match=message):
      main.run(config, name, 0)

  def test_a_profile(self, config, tmp_path):
    config.profile = 3
    main.run(config, 'adamw', 0)
    assert list((tmp_path / 'adamw_0/profile').rglob('*.xplane.pb'))

  def test_a_loss_that_is_not_finite_keeps_what_is_there(
    self, config, tmp_path
  ):
    main.run(config, 'adamw', 0)
    steps = tmp_path / 'adamw_0' / 'checkpoints'
    before = {path.name for path in steps.iterdir()}
    for last in ('8', '6'):
      shutil.rmtree(steps / last, ignore_errors=True)
    config.learning_rate = 1e38
    for path in steps.rglob('run/metadata'):
      kept = json.loads(path.read_text())
      kept['run']['learning_rate'] = 1e38
      path.write_text(json.dumps(kept))
    left = {path.name for path in steps.iterdir()}
    assert left < before
    with pytest.raises(FloatingPointError, match=r'at step \d, where the lear'):
      main.run(config, 'adamw', 0)
    assert left <= {path.name for path in steps.iterdir()}
