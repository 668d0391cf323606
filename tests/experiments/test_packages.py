import sys

import pytest

from experiments import packages


def test_finds_a_file_without_importing_its_package():
  file = packages.package_file(
    'elpv_dataset', 'data/labels.csv', 'elpv-dataset'
  )
  assert 'images/cell0001.png' in file.read_text()
  assert 'elpv_dataset' not in sys.modules


def test_package_not_installed():
  with pytest.raises(
    ModuleNotFoundError, match=r'no_such_thing .*`pip install no-such-thing==1`'
  ):
    packages.package_file('no_such_thing', 'data', 'no-such-thing==1')


def test_installed_package_without_the_file():
  with pytest.raises(FileNotFoundError, match=r'no_file .*`pip install onnx=='):
    packages.package_file('onnx', 'no_file', 'onnx==1')
