import os

import numpy as np
import pytest
from PIL import Image

from experiments.data import folders, images


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
  make(tmp_path, *(f'{number}/1.png' for number in range(112)))
  source = folders.open_folder(tmp_path, '.')
  assert source.labels.tolist() == list(range(112))
  assert source.names[2] == '2/1.png'
  assert source.names[10] == '10/1.png'
  assert source.class_names == tuple(map(str, range(112)))


@pytest.mark.parametrize(
  'names',
  [
    ('1990', '2000', '2010'),
    ('1', '10', '11', '12', '2', '3', '4', '5', '6', '7', '8', '9'),
    ('0', '10', '2'),
    ('00', '01', '02'),
    ('0', '01', '2'),
    ('0', '1', 'cat'),
    ('\u0660', '\u0661'),  # Arabic digits, which int() reads, too
  ],
)
def test_other_numbers_are_names(tmp_path, names):
  make(tmp_path, *(f'{name}/1.png' for name in names))
  source = folders.open_folder(tmp_path, '.')
  assert source.class_names == names
  assert source.labels.tolist() == list(range(len(names)))
  (tmp_path / 'names').write_text('\n'.join(names[::-1]))
  source = folders.open_folder(tmp_path, '.', 'names')
  assert source.class_names == names[::-1]
  assert [name.split('/')[0] for name in source.names] == list(names[::-1])


def test_numbers_that_classes_name_are_names(tmp_path):
  make(tmp_path, '0/1.png', '1/1.png', '2/1.png')
  (tmp_path / 'names').write_text('2\n1\n0\n')
  source = folders.open_folder(tmp_path, '.', 'names')
  assert source.names == ('2/1.png', '1/1.png', '0/1.png')
  assert source.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize('zeros', ['', '0'])
def test_some_numbered_folders_of_named_classes(tmp_path, zeros):
  make(tmp_path / 'set', f'{zeros}1/1.png', f'{zeros}3/1.png')
  (tmp_path / 'names').write_text('a\nb\nc\nd\n')
  source = folders.open_folder(tmp_path, 'set', 'names')
  assert source.labels.tolist() == [1, 3]


@pytest.mark.parametrize(
  ('names', 'listed', 'message'),
  [
    ('0 1 2', '1 2 3', "0 is none of the 3 classes of 'names'"),
    ('1 2 3', 'a b c', '3 is none of the 3 classes'),
    ('0 1 b', 'a b c', '0 is none of the 3 classes'),
    ('\u0660 \u0661', 'a b', 'is none of the 2 classes'),
    ('1 01 2', 'a b c', 'two folders of one number, such as 1 and 01'),
  ],
)
def test_numbers_that_may_be_names_or_labels(tmp_path, names, listed, message):
  make(tmp_path / 'set', *(f'{name}/1.png' for name in names.split()))
  (tmp_path / 'names').write_text('\n'.join(listed.split()))
  with pytest.raises(ValueError, match=message):
    folders.open_folder(tmp_path, 'set', 'names')


@pytest.mark.parametrize('names', [('train', 'val'), ('Test',)])
def test_splits_are_no_classes(tmp_path, names):
  make(tmp_path, *(f'{name}/cat/1.png' for name in names))
  with pytest.raises(ValueError, match=f'{names[0]}.*which are splits'):
    folders.open_folder(tmp_path, '.')


def test_what_begins_with_a_dot_is_no_content(tmp_path, caplog):
  make(tmp_path, 'cat/1.png', '.ipynb_checkpoints/1.png', '.cat.png')
  make(tmp_path / 'cat', '._1.png', '.old/1.png', 'a/.b/1.png')
  source = folders.open_folder(tmp_path, '.')
  assert source.class_names == ('cat',)
  assert source.names == ('cat/1.png',)
  assert not caplog.records


def test_all_suffixes_of_pillow_and_deeper_folders(tmp_path, caplog):
  """As in Tiny-ImageNet; in the order of their paths."""
  names = [f'{s[1:]}/{i}/x{s.upper()}' for i, s in enumerate(images.SUFFIXES)]
  make(tmp_path, *(f'b/{name}' for name in names), 'a/images/2.JPEG', 'a/1.jpe')
  (tmp_path / 'a' / 'boxes.txt').touch()
  source = folders.open_folder(tmp_path, '.')
  assert source.names == (
    'a/1.jpe',
    'a/images/2.JPEG',
    *sorted(f'b/{name}' for name in names),
  )
  assert source.labels.tolist() == [0, 0] + [1] * len(names)
  for example in (source[i] for i in range(len(source))):
    assert example['image'].shape == (4, 4, 3)
  assert not caplog.records


def test_what_is_not_read_is_counted_and_named(tmp_path, caplog):
  make(tmp_path, 'cat/1.png', '2.png')
  for name in ('dog/a.heic', 'dog/b.HEIC', 'cat/c.npy', 'notes.md'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
  os.symlink('nowhere', tmp_path / 'cat' / '3.png')
  os.mkfifo(tmp_path / 'cat' / '4.jpg')
  for _ in range(2):  # as for the training and the validation part of it
    assert folders.open_folder(tmp_path, '.').names == ('cat/1.png',)
  (record,) = caplog.records
  line = record.getMessage()
  assert line.startswith(
    f'{tmp_path}: 6 files are not read (2 like 2.png, 1 like cat/4.jpg, 1 like '
    'cat/c.npy, 2 like dog/a.heic): an image lies in'
  )
  assert line.endswith('1 class folders have no image, dog.')
  assert '\n' not in line


def test_links(tmp_path, caplog):
  make(tmp_path, 'real/1.png', 'set/cat/2.png', 'set/cat/more/3.png')
  os.symlink('../../real', tmp_path / 'set' / 'cat' / 'link')
  os.symlink('../../real/1.png', tmp_path / 'set' / 'cat' / '4.png')
  for i, target in enumerate(('.', '..', '../..', 'more', 'loop4')):
    os.symlink(target, tmp_path / 'set' / 'cat' / f'loop{i}')
  source = folders.open_folder(tmp_path, 'set')
  assert source.names == (
    'cat/2.png',
    'cat/4.png',
    'cat/link/1.png',
    'cat/loop3/3.png',
  )
  assert '5 files are not read' in caplog.text  # with more, which loop3 was
  assert [
    os.path.relpath(i, os.path.realpath(tmp_path)) for i in source.ids
  ] == [
    'set/cat/2.png',
    'real/1.png',
    'real/1.png',
    'set/cat/more/3.png',
  ]


def test_home_and_data_dir(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  make(tmp_path / 'data' / 'set', 'cat/1.png', 'dog/2.png')
  (tmp_path / 'names').write_text('dog\ncat\n')
  (tmp_path / 'list').write_text('cat/1.png 1\n')
  for path in ('set', '~/data/set', tmp_path / 'data' / 'set'):
    source = folders.open_folder('~/data', path, '~/names')
    assert source[0]['label'] == 0
    assert source.class_names == ('dog', 'cat')
    source = folders.open_list('~/data', '~/list', path, '~/names')
    assert source[0]['image'].shape == (4, 4, 3)


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
  with pytest.raises(ValueError, match=r"list\.txt:2: 'a/2\.png' is not"):
    folders.open_list(tmp_path, 'list.txt')


@pytest.mark.parametrize('label', ['-1', '1.0', 'cat', '٣', '²'])
def test_list_with_what_is_no_label(tmp_path, label):
  make(tmp_path, 'a/1.png')
  (tmp_path / 'list.txt').write_text(f'a/1.png {label}\n', 'utf-8')
  with pytest.raises(ValueError, match=r'list\.txt:1: .*label from 0 on'):
    folders.open_list(tmp_path, 'list.txt')


def test_list_as_other_programs_write_it(tmp_path):
  make(tmp_path, 'a/ü 1.png', 'b/2.png')
  (tmp_path / 'list.txt').write_bytes(
    '\ufeffa/ü 1.png\t0 \r\nb/2.png  1\r\n\r\n'.encode()
  )
  source = folders.open_list(tmp_path, 'list.txt')
  assert source.names == ('a/ü 1.png', 'b/2.png')
  assert source.labels.tolist() == [0, 1]


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
  with pytest.raises(
    ValueError, match=r"names\.txt has a name twice: 'a', in lines 1"
  ):
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
