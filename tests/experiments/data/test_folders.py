import numpy as np
import pytest
from PIL import Image

from experiments.data import folders


def make(root, *files):
  """Images of 4 x 4, each of its own grey."""
  for i, name in enumerate(files):
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (4, 4), (i, i, i)).save(file)


def test_classes_and_files_are_sorted(tmp_path):
  make(tmp_path / 'set', 'dog/2.png', 'cat/b.JPEG', 'dog/1.png', 'cat/a.png')
  (tmp_path / 'set/cat/Thumbs.db').touch()
  (tmp_path / 'set/README.txt').touch()
  source = folders.open_folder(tmp_path, 'set')
  assert source.class_names == ('cat', 'dog')
  assert source.names == ('cat/a.png', 'cat/b.JPEG', 'dog/1.png', 'dog/2.png')
  assert source.labels.tolist() == [0, 0, 1, 1]
  assert source.labels.dtype == np.int32
  assert source[3]['image'][0, 0].tolist() == [0, 0, 0]
  assert source[3]['label'] == 1


def test_numbered_folders_are_class_numbers(tmp_path):
  """ImageNet-V2's trap: sorted as text, '10' comes before '2'."""
  numbers = [*range(12), 111]
  make(tmp_path, *(f'{number}/1.png' for number in numbers))
  source = folders.open_folder(tmp_path, '.')
  assert source.labels.tolist() == numbers
  assert source.names[2] == '2/1.png'
  assert source.names[10] == '10/1.png'
  assert source.class_names == tuple(map(str, range(112)))


def test_numbered_folders_of_named_classes(tmp_path):
  make(tmp_path, '0/1.png', '2/1.png', '10/1.png', '999/1.png')
  source = folders.open_folder(tmp_path, '.', 'imagenet')
  assert source.labels.tolist() == [0, 2, 10, 999]
  assert source.class_names == folders.read_classes('imagenet')
  make(tmp_path, '1000/1.png')
  with pytest.raises(
    ValueError, match=r"1000 is none of the 1000 .*'imagenet'"
  ):
    folders.open_folder(tmp_path, '.', 'imagenet')


def test_some_of_the_named_classes(tmp_path):
  """As ImageNet-A and -R: labels are those of all the classes."""
  make(tmp_path / 'set', 'n01531178/1.png', 'n01443537/1.png')
  source = folders.open_folder(tmp_path, 'set', 'imagenet')
  assert source.names == ('n01443537/1.png', 'n01531178/1.png')
  assert source.labels.tolist() == [1, 11]  # goldfish, goldfinch
  assert len(source.class_names) == 1000


def test_classes_out_of_a_file_in_its_order(tmp_path):
  make(tmp_path / 'set', 'a/1.png', 'b/1.png')
  (tmp_path / 'names.txt').write_text('c\nb\na\n')
  source = folders.open_folder(tmp_path, 'set', 'names.txt')
  assert source.class_names == ('c', 'b', 'a')
  assert source.names == ('b/1.png', 'a/1.png')
  assert source.labels.tolist() == [1, 2]


def test_folder_that_is_no_class(tmp_path):
  make(tmp_path, 'n01443537/1.png', 'fish/1.png')
  with pytest.raises(ValueError, match=r'fish is none of the 1000 classes'):
    folders.open_folder(tmp_path, '.', 'imagenet')


def test_no_folder(tmp_path):
  with pytest.raises(
    FileNotFoundError, match=r'nowhere is no folder.*data_dir'
  ):
    folders.open_folder(tmp_path, 'nowhere')


def test_folder_without_folders(tmp_path):
  make(tmp_path, '1.png')
  with pytest.raises(FileNotFoundError, match=r'has no folders'):
    folders.open_folder(tmp_path, '.')


def test_folder_without_images(tmp_path):
  (tmp_path / 'cat').mkdir()
  (tmp_path / 'cat' / '1.txt').touch()
  with pytest.raises(FileNotFoundError, match=r'1 folders and no image.*\.jpg'):
    folders.open_folder(tmp_path, '.')


def test_list(tmp_path):
  make(tmp_path, 'clipart/cat/2.png', 'clipart/a dog/1.png')
  (tmp_path / 'clipart_train.txt').write_text(
    'clipart/a dog/1.png 1\nclipart/cat/2.png 0\n'
  )
  source = folders.open_list(tmp_path, 'clipart_train.txt')
  assert source.names == ('clipart/a dog/1.png', 'clipart/cat/2.png')
  assert source.labels.tolist() == [1, 0]
  assert source.labels.dtype == np.int32
  assert source.class_names == ('cat', 'a dog')
  assert source[1]['image'].shape == (4, 4, 3)


def test_list_with_root_and_classes(tmp_path):
  make(tmp_path / 'images', 'real/zigzag/1.png')
  (tmp_path / 'real.txt').write_text('real/zigzag/1.png 344\n')
  source = folders.open_list(tmp_path, 'real.txt', 'images', 'domainnet')
  assert source.class_names[source[0]['label']] == 'zigzag'
  assert len(source.class_names) == 345


def test_list_with_a_line_without_label(tmp_path):
  make(tmp_path, 'a/1.png')
  (tmp_path / 'list.txt').write_text('a/1.png 0\na/2.png\n')
  with pytest.raises(ValueError, match=r"list\.txt, line 2: 'a/2\.png' is not"):
    folders.open_list(tmp_path, 'list.txt')


def test_list_of_missing_images(tmp_path):
  make(tmp_path, 'a/1.png')
  (tmp_path / 'list.txt').write_text('a/1.png 0\na/2.png 0\na/3.png 0\n')
  with pytest.raises(
    FileNotFoundError, match=r'a/2\.png is missing, 2 of the 3 .*list\.txt'
  ):
    folders.open_list(tmp_path, 'list.txt')


@pytest.mark.parametrize(
  'lines', ['a/1.png 0\nb/1.png 2\n', 'a/1.png 0\nb/1.png 0\n']
)
def test_list_that_does_not_name_its_classes(tmp_path, lines):
  """A label without images, or with two folders."""
  make(tmp_path, 'a/1.png', 'b/1.png')
  (tmp_path / 'list.txt').write_text(lines)
  with pytest.raises(ValueError, match=r'list\.txt: .*in `classes`'):
    folders.open_list(tmp_path, 'list.txt')


def test_list_with_a_label_beyond_the_classes(tmp_path):
  make(tmp_path, 'a/1.png')
  (tmp_path / 'list.txt').write_text('a/1.png 345\n')
  with pytest.raises(ValueError, match=r"label 345, 'domainnet' 345 names"):
    folders.open_list(tmp_path, 'list.txt', classes='domainnet')


def test_list_that_is_missing_or_empty(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'list\.txt is no file'):
    folders.open_list(tmp_path, 'list.txt')
  (tmp_path / 'list.txt').touch()
  with pytest.raises(ValueError, match=r'list\.txt is empty'):
    folders.open_list(tmp_path, 'list.txt')


@pytest.mark.parametrize(
  ('name', 'number'),
  [
    ('imagenet', 1000),
    ('imagenet_a', 200),
    ('imagenet_r', 200),
    ('domainnet', 345),
  ],
)
def test_lists_that_come_along(name, number):
  assert len(folders.read_classes(name)) == number


def test_classes_named_twice(tmp_path):
  (tmp_path / 'names.txt').write_text('a\nb\na\n')
  with pytest.raises(ValueError, match=r'names\.txt has a name twice'):
    folders.read_classes('names.txt', tmp_path)


def test_imagenet_classes_are_sorted_wordnet_ids():
  names = folders.read_classes('imagenet')
  assert list(names) == sorted(names)
  assert names[0] == 'n01440764'  # tench
  assert names[999] == 'n15075141'  # toilet tissue


@pytest.mark.parametrize(
  ('name', 'first', 'last'),
  [
    ('imagenet_a', [6, 11, 13, 15, 17, 22], 988),
    ('imagenet_r', [1, 2, 4, 6, 8, 9], 988),
  ],
)
def test_class_masks(name, first, last):
  """Class numbers as in the evaluation scripts of the two sets' authors."""
  mask = folders.class_mask(name)
  assert mask.shape == (1000,)
  assert mask.dtype == bool
  assert mask.sum() == 200
  assert np.flatnonzero(mask)[:6].tolist() == first
  assert np.flatnonzero(mask)[-1] == last


def test_class_mask_of_other_classes():
  with pytest.raises(ValueError, match=r"'The_Eiffel_Tower' is no class of"):
    folders.class_mask('domainnet')
