"""What a run fine-tuned, as files that transformers or PEFT reads.

python -m experiments.export RUN [--format=safetensors|peft] [--to=FOLDER]

RUN is the folder of a run of `experiments.main`, config.output_dir/METHOD_SEED,
that has ended. Writes the params of the step that it chose to RUN/FORMAT, or to
FOLDER:

  safetensors   the whole model in float32, LoRA merged: model.safetensors in
                the names of transformers, config.json with the classes, and
                preprocessor_config.json. The head of a CLIP, which
                transformers has none of, is in head.safetensors.
  peft          of a run with LoRA the adapters and the head alone:
                adapter_model.safetensors and adapter_config.json, for PEFT on
                transformers 5, and head.json with the classes.

--config.model.pretrained=FOLDER starts another study from the first of them,
and with --config.head=pretrained from its head too.
"""

import hashlib
import json
import pathlib
import sys

import jax
from absl import flags, logging
from flax import nnx
from ml_collections import ConfigDict

from experiments import checkpoint, cli, runs, study
from experiments.configs import base
from experiments.models import blocks
from experiments.pretrained import save

_FORMATS = ('safetensors', 'peft')


def export(run, format_, to='', pretrained=''):
  """Writes what a run fine-tuned.

  Args:
    run: its folder.
    format_: one of `_FORMATS`.
    to: the folder to write, '' for one in the run's.
    pretrained: where theta_0's weights are, '' for where the run had them.

  Returns:
    The folder that was written, a pathlib.Path, the names of its files, and the
    step that was chosen.

  Raises:
    ValueError, OSError, ModuleNotFoundError: saying what to change.
  """
  about, step, params = _chosen(pathlib.Path(run))
  config = _nested(about)
  kind = study.kind(config)
  if not hasattr(kind, 'exported'):
    raise ValueError(
      f'{run} is of a study of {config.task}, whose models are not exported.'
    )
  if pretrained:
    config.model.pretrained = pretrained
  (method,) = config.methods.values()

  def trained(model):
    trainable = blocks.from_block(config.first_block)
    model, _ = runs.adapt_model(model, trainable, method, config.seed)
    return _with_params(model, params)

  files = kind.exported(config, pathlib.Path(run), trained, format_)
  to = pathlib.Path(to or pathlib.Path(run) / format_)
  same = {key: about[key] for key in about.keys() - set(base.FREE)}
  digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode())
  save.write(to, files, {'sha256': digest.hexdigest()})
  return to, list(files), step


def _chosen(run):
  """What the last checkpoint says of the run; the step it chose; its params."""
  folder = run / 'checkpoints'
  if not folder.is_dir():
    if (run / 'rows.jsonl').exists():
      raise ValueError(
        f'{run} trained nothing: its params are theta_0, as its config.model '
        'and config.head make them.'
      )
    raise FileNotFoundError(
      f'{run} is no run: it has no checkpoints; name the folder of a run of '
      'experiments.main, config.output_dir/METHOD_SEED.'
    )
  checkpoints = checkpoint.Checkpoints(folder, None, read_only=True)
  last = checkpoints.last_step
  about = {} if last is None else checkpoints.run(last)
  if last is None or last < about['num_steps']:
    raise ValueError(
      f'{run} has not ended: it is at step {last or 0} of '
      f'{about.get("num_steps", "its budget")}; go on with it by the command '
      'that it was started with.'
    )
  step = checkpoints.about(last).best_step
  return about, step, checkpoints.eval_params(step)


def _nested(about):
  """The config of a run, of what its checkpoint says, a flat dict."""
  flat = {tuple(key.split('.')): value for key, value in about.items()}
  return ConfigDict(nnx.traversals.unflatten_mapping(flat))


def _with_params(model, params):
  """The model with a checkpoint's params, `{path of strings: array}`, in it."""
  state = nnx.state(model)
  leaves = {
    tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)
  }
  for path, array in params.items():
    leaf = leaves.get(path)
    if leaf is None or leaf.shape != array.shape:
      raise ValueError(
        f'The run trained {".".join(path)} {array.shape}, but the model has '
        f'{"no such parameter" if leaf is None else leaf.shape}; are '
        'config.model.pretrained and the classes as they were?'
      )
    leaf[...] = array
  nnx.update(model, state)
  return model


def main(argv):
  values = flags.FLAGS
  try:
    if len(argv) != 2:
      raise ValueError(
        f'name one run, the folder of it, not {len(argv) - 1}; see --help.'
      )
    # No accelerator is needed, and another process may hold it.
    jax.config.update('jax_platforms', 'cpu')
    folder, names, step = export(
      argv[1], values.format, values.to, values.pretrained
    )
  except (ValueError, OSError, ModuleNotFoundError) as error:
    sys.exit(f'export: {error}')
  print(f'{folder}/: {", ".join(sorted(names))}; of step {step}')


if __name__ == '__main__':
  logging.set_verbosity(logging.ERROR)
  flags.DEFINE_enum('format', 'safetensors', _FORMATS, 'What is written.')
  flags.DEFINE_string('to', '', 'The folder to write; RUN/FORMAT if empty.')
  flags.DEFINE_string(
    'pretrained',
    '',
    "Where theta_0's weights are now; as the run had them if empty.",
  )
  cli.run('export', main)
