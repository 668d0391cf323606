"""ImageNet-C's corruptions of images, out of `imagecorruptions-imaug`.

References:
  Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
  Corruptions and Perturbations", 2019.
"""

import dataclasses
import threading

import numpy as np

_SEEDED = ('glass_blur', 'impulse_noise')
_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Corruption:
  """A corruption that does the same to the same image, every time.

  The library draws from NumPy's global state, which is put back. Until then no
  other thread should draw from it, and threads corrupt one after another: where
  that is too slow, use processes.

  Attributes:
    name: 'gaussian_noise', 'shot_noise', 'impulse_noise', 'defocus_blur',
      'glass_blur', 'motion_blur', 'zoom_blur', 'snow', 'frost', 'fog',
      'brightness', 'contrast', 'elastic_transform', 'pixelate',
      'jpeg_compression'; and 'speckle_noise', 'gaussian_blur', 'spatter',
      'saturate', the benchmark's extra ones.
    severity: 1 to 5.

  Raises:
    ValueError: no such name or severity.
    ModuleNotFoundError: the library does not load.
  """

  name: str
  severity: int

  def __post_init__(self):
    names = _library().get_corruption_names('all')
    if self.name not in names:
      raise ValueError(
        f'{self.name!r} is no corruption; it is one of {", ".join(names)}.'
      )
    if self.severity not in range(1, 6):
      raise ValueError(
        f'{self.name}: the severity is {self.severity}; it is 1 to 5.'
      )

  def __call__(self, image, index):
    """Corrupts an image.

    Args:
      image: uint8 [H, W, 3] or [H, W, 1].
      index: seed of what is random in it.

    Returns:
      uint8 of the same shape.

    Raises:
      ValueError: a side has less than 32 pixels.
    """
    if min(image.shape[:2]) < 32:
      raise ValueError(
        f'{self.name}: image {index} is {image.shape}; it needs 32 pixels.'
      )
    # The others have no seed of their own.
    seed = {'seed': int(index)} if self.name in _SEEDED else {}
    with _LOCK:
      state = np.random.get_state()
      np.random.seed(index)
      try:
        corrupted = _library().corrupt(
          image, self.severity, corruption_name=self.name, **seed
        )
      finally:
        np.random.set_state(state)
    return corrupted[..., : image.shape[-1]]  # it makes three channels of one


def _library():
  """The library: half a gigabyte, and a second, for those who corrupt."""
  try:
    import imagecorruptions
  except ImportError as error:
    raise ModuleNotFoundError(
      f'Corruptions need `pip install imagecorruptions-imaug`, and its OpenCV '
      f"libGL (Debian's libgl1): {error}."
    ) from error
  return imagecorruptions
