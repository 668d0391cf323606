"""What the commands share: their flags, their folders, their progress bar."""

import importlib
import pathlib
import sys

import jax
from ml_collections import config_flags
from tqdm import tqdm

_CONFIGS = pathlib.Path(__file__).parent / 'configs'
# Python's tracker of shared memory, a process of its own, clears up after a run
# that an error ends, and should not talk after the line that says why.
sys.warnoptions.append('ignore:resource_tracker:UserWarning')


def define_config(program, default='elpv'):
  """Defines --config: a study by name, or the path of a file.

  Args:
    program: what errors begin with.
    default: the study; None for none.
  """
  if '--config' in sys.argv[:-1]:  # --config NAME
    i = sys.argv.index('--config')
    sys.argv[i : i + 2] = [f'--config={sys.argv[i + 1]}']
  sys.argv[1:] = [_with_path(program, argument) for argument in sys.argv[1:]]
  try:
    config_flags.DEFINE_config_file(
      'config',
      default and str(_CONFIGS / f'{default}.py'),
      'The study; --config.KEY=VALUE changes it.',
    )
  except (AttributeError, KeyError) as error:  # it has read sys.argv already
    while isinstance(error.args[0], Exception):
      error = error.args[0]
    message = ' '.join(error.args[0].split())
    sys.exit(f'{program}: no key of the config is {message} See --help.')
  except (OSError, ValueError) as error:
    sys.exit(f'{program}: {error}')


def _with_path(program, argument):
  """--config=NAME[:ARG] names a study; the flag wants the path of its file."""
  flag, equals, value = argument.partition('=')
  if flag.lstrip('-') != 'config':
    return argument
  name, colon, arg = value.partition(':')
  file = _CONFIGS / f'{name}.py'
  if not file.exists():
    if pathlib.Path(name).exists():
      return argument
    studies = [f.stem for f in _CONFIGS.glob('[!_]*.py') if f.stem != 'base']
    sys.exit(
      f'{program}: --config={value} is no study: neither one of '
      f'{", ".join(sorted(studies))} nor the path of a file.'
    )
  if colon:  # else the flag shows a traceback of what it refuses
    try:
      importlib.import_module(f'experiments.configs.{name}').get_config(arg)
    except ValueError as error:
      sys.exit(f'{program}: {error}')
  return f'{flag}{equals}{file}{colon}{arg}'


def keep_programs(folder):
  """Lets the next run of a study start without compiling it again.

  `JAX_COMPILATION_CACHE_DIR` in the environment goes before `folder`.
  """
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update(
      'jax_compilation_cache_dir', str(pathlib.Path(folder).expanduser())
    )


def check_output(folder):
  """Makes the output folder; an OSError where nothing can be written to it."""
  if '://' in str(folder):
    raise OSError(
      f'config.output_dir {str(folder)!r} is no folder; mount the bucket, and '
      'set --config.output_dir to where it is.'
    )
  folder = pathlib.Path(folder)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / '.writable'
    probe.touch()
    probe.unlink(missing_ok=True)  # another process may have been faster
  except OSError as error:
    raise OSError(
      f'config.output_dir {str(folder)!r} cannot be written: '
      f'{error.strerror}; set --config.output_dir to a folder that can.'
    ) from error


def progress(total, description, unit='image'):
  return tqdm(
    total=total,
    disable=jax.process_index() > 0,
    desc=description,
    unit=unit,
    smoothing=0.1,
    dynamic_ncols=True,
    mininterval=0.5,
  )
