"""What the commands share: their flags, their folders, their progress bar."""

import importlib.util
import pathlib
import re
import sys
import traceback

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_dict, config_flags
from ml_collections.config_flags import config_path
from tqdm import tqdm

from experiments.configs import base

_CONFIGS = pathlib.Path(__file__).parent / 'configs'
_HELP = 'The study; --config.KEY=VALUE changes it.'
# Python's tracker of shared memory, a process of its own, clears up after a run
# that an error ends, and should not talk after the line that says why.
sys.warnoptions.append('ignore:resource_tracker:UserWarning')


def define_config(program, default='elpv', unread=()):
  """Defines --config: a study by name, or the path of a file; and reads it.

  Args:
    program: what errors begin with.
    default: the study; None for none.
    unread: the keys that the program does not read, and cannot be told to
      change.
  """
  try:
    flags_in_files = flags.FLAGS.read_flags_from_files
    arguments = flags_in_files(sys.argv[1:], force_gnu=False)
    study, sys.argv[1:] = _take_study(arguments, default)
    if study is None:
      flags.DEFINE_string('config', None, _HELP)
      return
    config = _read_study(study)
    keys = _changed_keys(sys.argv)
    for key in keys:
      if any(f'{key}.'.startswith(f'{other}.') for other in unread):
        raise ValueError(
          f'--config.{key} has no effect: {program} does not read it.'
        )
    _make_room(config, keys)
    config_flags.DEFINE_config_dict('config', config, _HELP)
  except (flags.Error, ValueError, OSError) as error:
    sys.exit(f'{program}: {_line(error)}')
  flags.FLAGS['config'].default_as_str = repr(study)


# What the flags raise for a key that is not there, or a value of another type.
_PARSING = (flags.Error, AttributeError, LookupError, TypeError, ValueError)


def run(program, main):
  """`app.run`, but for flags that cannot be read: they end it with a line."""

  def parse(arguments):
    try:
      return flags.FLAGS(arguments)
    except _PARSING as error:
      sys.exit(f'{program}: {_line(error)} See --help.')

  app.run(main, flags_parser=parse)


def _line(error):
  """What an error says, in a line."""
  while error.args and isinstance(error.args[0], Exception):
    error = error.args[0]
  text = error.args[0] if isinstance(error, KeyError) else error
  text = ' '.join(str(text).split())
  if text.startswith("'"):  # of a ConfigDict: the name alone, and a like one
    text = f'no key of the config is {text}'
  return text if text.endswith(('.', '?')) else f'{text}.'


def _take_study(arguments, default):
  """The study of --config=STUDY or --config STUDY, and the other arguments."""
  study, others = default, []
  arguments = iter(arguments)
  for argument in arguments:
    if argument in ('-config', '--config'):
      study = next(arguments, '')
    elif argument.startswith(('-config=', '--config=')):
      study = argument.partition('=')[2]
    else:
      others.append(argument)
  return study, others


def _read_study(study):
  """The config of NAME[:ARG] or FILE[:ARG].

  Raises:
    ValueError, OSError: of the file, in whose code anything can go wrong.
  """
  name, colon, arg = study.partition(':')
  file = _CONFIGS / f'{name}.py'
  if not file.exists():
    file = pathlib.Path(name).expanduser()
  if file.suffix != '.py' or not file.is_file():
    files = _CONFIGS.glob('*.py')
    studies = [f.stem for f in files if 'def get_config(' in f.read_text()]
    raise ValueError(
      f'--config={study} is no study: neither one of '
      f'{", ".join(sorted(studies))} nor the path of a .py file.'
    )
  spec = importlib.util.spec_from_file_location('config_of_the_study', file)
  module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config(*[arg] if colon else [])
  except (ValueError, OSError):
    raise
  except Exception as error:
    places = traceback.extract_tb(error.__traceback__)
    lines = [place.lineno for place in places if place.filename == spec.origin]
    where = f'{file}, line {lines[-1]}' if lines else f'--config={study}'
    what = str(error)
    if isinstance(error, SyntaxError):  # perhaps of a file that it imports
      where, what = f'{error.filename}, line {error.lineno}', error.msg
    raise ValueError(f'{where}: {type(error).__name__}: {what}') from error
  if not isinstance(config, ConfigDict):
    raise ValueError(
      f'{file}: get_config returned {type(config).__name__}; it returns the '
      'config of experiments.configs.base, changed.'
    )
  return config


def _changed_keys(arguments):
  """The KEY of every --config.KEY=VALUE."""
  found = (re.match(r'--?(?:no)?config\.([^=]+)', a) for a in arguments)
  return [match[1] for match in found if match]


def _make_room(config, keys):
  """Adds the keys of sources that are to be set and are not there yet.

  Each kind of source takes other keys, and a flag can only change one that is
  there.

  Raises:
    ValueError: a key is neither there nor one of a source.
  """
  for key in keys:
    root, *path = key.split('.')
    found, known = config.get(root), base.SOURCE
    if root == 'eval_sets' and path:
      found = found.get(path.pop(0))
    if root not in ('train', 'val', 'eval_sets'):
      path = []
    for name in path:
      if not isinstance(found, ConfigDict) or name not in known:
        break
      known = known[name]
      if name not in found:
        is_dict = isinstance(known, dict)
        found[name] = (
          ConfigDict() if is_dict else config_dict.placeholder(known)
        )
      found = found[name]
    try:
      config_path.get_type(key, config)
    except _PARSING as error:
      raise ValueError(f'--config.{key}: {_line(error)} See --help.') from error


def keep_programs(folder):
  """Lets the next run of a study start without compiling it again.

  `JAX_COMPILATION_CACHE_DIR` in the environment goes before `folder`.
  """
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update('jax_compilation_cache_dir', folder)


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


def progress(total, description, unit):
  return tqdm(
    total=total,
    disable=jax.process_index() > 0,
    desc=description,
    unit=unit,
    smoothing=0.1,
    dynamic_ncols=True,
    mininterval=0.5,
  )
