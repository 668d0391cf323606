import pickle
import sys
from concurrent import futures

import numpy as np
import pytest

from experiments.data import corruptions

pytest.importorskip(
  'imagecorruptions',
  reason='OpenCV does not load: libGL is not installed',
  exc_type=ImportError,
)

# Of Hendrycks and Dietterich, 2019.
_NAMES = (
  'gaussian_noise',
  'shot_noise',
  'impulse_noise',
  'defocus_blur',
  'glass_blur',
  'motion_blur',
  'zoom_blur',
  'snow',
  'frost',
  'fog',
  'brightness',
  'contrast',
  'elastic_transform',
  'pixelate',
  'jpeg_compression',
)
_RANDOM = set(_NAMES) - {
  'defocus_blur',
  'zoom_blur',
  'brightness',
  'contrast',
  'pixelate',
  'jpeg_compression',
}


@pytest.fixture(scope='module')
def image():
  """Smooth waves and noise of three colours."""
  rng = np.random.default_rng(0)
  y, x = np.mgrid[:48, :40]
  waves = (
    128
    + 60 * np.sin(y / 4)[..., None] * np.cos(x / [[[3]], [[5]]])[0, :, :, None]
  )
  return np.uint8(np.clip(waves + rng.normal(0, 20, (48, 40, 3)), 0, 255))


@pytest.mark.parametrize('name', _NAMES)
def test_the_index_alone_seeds_it(name, image):
  corrupt = corruptions.Corruption(name, 3)
  np.random.seed(1)
  once = corrupt(image, 5)
  state = np.random.get_state()
  twice = pickle.loads(pickle.dumps(corrupt))(image, np.int64(5))
  assert once.shape == image.shape
  assert once.dtype == np.uint8
  assert not np.array_equal(once, image)
  np.testing.assert_array_equal(twice, once)
  assert np.array_equal(corrupt(image, 6), once) == (name not in _RANDOM)
  # Others' random numbers are what they were.
  np.testing.assert_array_equal(np.random.get_state()[1], state[1])
  assert np.random.get_state()[2] == state[2]


def test_severity_is_imagenet_cs(image):
  """Contrast: deviations from the mean colour times .4, .3, .2, .1, .05."""
  del image
  pixels = np.full((32, 32, 3), 50, np.uint8)
  pixels[16:] = 250
  for severity, factor in enumerate((0.4, 0.3, 0.2, 0.1, 0.05), start=1):
    corrupted = corruptions.Corruption('contrast', severity)(pixels, 0)
    assert np.unique(corrupted).tolist() == [
      150 - int(100 * factor),
      150 + int(100 * factor),
    ]


def test_noise_is_imagenet_cs():
  """Severity 2 of Gaussian noise: a standard deviation of .12."""
  grey = np.full((64, 64, 3), 128, np.uint8)
  noisy = corruptions.Corruption('gaussian_noise', 2)(grey, 0).astype(float)
  # 12,288 draws: a standard error of 0.2 on 30.6.
  assert np.std(noisy) == pytest.approx(0.12 * 255, abs=0.8)
  assert np.mean(noisy) == pytest.approx(128, abs=1.2)


@pytest.mark.parametrize('name', ['gaussian_noise', 'frost'])
def test_threads_do_not_disturb_one_another(name, image):
  corrupt = corruptions.Corruption(name, 1)
  wanted = [corrupt(image, i) for i in range(32)]
  with futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda i: corrupt(image, i), range(32)))
  np.testing.assert_array_equal(found, wanted)


def test_grey_stays_grey(image):
  corrupt = corruptions.Corruption('fog', 3)
  grey = image[..., :1]
  assert corrupt(grey, 0).shape == grey.shape
  three = np.repeat(grey, 3, -1)
  np.testing.assert_array_equal(corrupt(grey, 0), corrupt(three, 0)[..., :1])


def test_image_too_small():
  corrupt = corruptions.Corruption('fog', 3)
  with pytest.raises(
    ValueError, match=r'fog: image 7 is \(32, 31, 3\); it nee'
  ):
    corrupt(np.zeros((32, 31, 3), np.uint8), 7)


def test_unknown_name_or_severity():
  with pytest.raises(ValueError, match=r"'mist' is no corruption.*, fog,"):
    corruptions.Corruption('mist', 1)
  with pytest.raises(ValueError, match=r'fog: the severity is 6; it is 1 to 5'):
    corruptions.Corruption('fog', 6)


def test_library_not_installed(monkeypatch):
  monkeypatch.setitem(sys.modules, 'imagecorruptions', None)
  with pytest.raises(
    ModuleNotFoundError, match=r'`pip install imagecorruptions-imaug`'
  ):
    corruptions.Corruption('fog', 1)
