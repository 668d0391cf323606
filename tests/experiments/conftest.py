import jax
import pytest

from experiments import parallel, runs
from experiments.models import clip, vision_language, vit
from tests.experiments import (
  kinds,
  tiny_questions,
  tiny_segmentation,
  tiny_study,
  tiny_vqa,
)

# Where programs are judged, or run for longer than they compile.
_OPTIMIZED = ('benchmark', 'compare', 'topology')


@pytest.fixture(scope='module', autouse=True)
def optimized(request):
  quick = jax.config.values['jax_disable_most_optimizations']
  if request.module.__name__.endswith(_OPTIMIZED):
    jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', quick)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """What a study runs on, unless a test says otherwise."""
  devices = jax.devices()[:1]
  monkeypatch.setattr(parallel, 'all_devices', lambda: devices)


@pytest.fixture
def tiny_clip(monkeypatch):
  """Checkpoints of `make_reference`, in the place of CLIP and PaliGemma."""
  monkeypatch.setitem(
    vision_language.CONFIGS, 'paligemma_3b', tiny_vqa.PALIGEMMA
  )
  monkeypatch.setitem(vit.CONFIGS, 'clip_b16', tiny_study.CLIP)
  monkeypatch.setitem(clip.CONFIGS, 'clip_b16', tiny_study.TEXT)
  return tiny_study.CHECKPOINT


@pytest.fixture
def started(monkeypatch):
  """The runs that were started; the one after `lives` of them ends it all."""

  class Started(list):
    lives = None

  started, run = Started(), runs.run

  def counted(config, tuning, name, seed, *args):
    if started.lives == 0:
      raise kinds.Stop
    if started.lives is not None:
      started.lives -= 1
    started.append((name, seed))
    return run(config, tuning, name, seed, *args)

  monkeypatch.setattr(runs, 'run', counted)
  return started


@pytest.fixture(scope='session')
def noise(tmp_path_factory):
  """The files of all tiny studies."""
  folder = tmp_path_factory.mktemp('noise')
  tiny_study.write_images(folder)
  tiny_segmentation.write_masks(folder)
  tiny_questions.write(folder)
  tiny_vqa.write_questions(folder)
  return folder
