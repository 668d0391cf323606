"""Writes image files."""

import numpy as np
from PIL import Image


def write_images(folder, names, color):
  """Noise of a class's colour, as JPEG files."""
  rng = np.random.default_rng(0)
  folder.mkdir(parents=True)
  for name in names:
    image = np.clip(rng.normal(color, 60, (40, 36, 3)), 0, 255)
    Image.fromarray(image.astype(np.uint8)).save(folder / name)
