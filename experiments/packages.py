"""Files that come inside installed Python packages."""

import importlib.util
import pathlib


def package_file(package, path, requirement):
  """Where a file of an installed package lies; the package is not imported.

  Args:
    package: the top-level import name, `'elpv_dataset'`.
    path: of the file or folder, relative to the package.
    requirement: what pip calls the package, `'elpv-dataset==1.0.0.post1'`.

  Returns:
    A `pathlib.Path` that exists.

  Raises:
    ModuleNotFoundError: the package is not installed.
    FileNotFoundError: it is, without that file.
  """
  remedy = f"`pip install {requirement}`, or this project's extra `.[demo]`"
  spec = importlib.util.find_spec(package)
  if spec is None:
    raise ModuleNotFoundError(f'{package} is not installed: {remedy}.')
  file = pathlib.Path(spec.submodule_search_locations[0], path)
  if not file.exists():
    raise FileNotFoundError(f'{file} is missing: {remedy}.')
  return file
