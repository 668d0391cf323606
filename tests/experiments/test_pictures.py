import numpy as np
import pytest

from experiments import pictures

RNG = np.random.default_rng(0)
NAMES = [f'class {i}' for i in range(60)]


def examples(**masks):
  image = RNG.integers(0, 256, (6, 8, 3)).astype(np.uint8)
  return {name: (image, *pair) for name, pair in masks.items()}


def test_side_by_side_and_the_legend_of_what_is_seen():
  truth = np.full((6, 8), 3)
  truth[0], truth[1] = -1, 59
  predicted = np.full((6, 8), 3)
  predicted[5] = 7
  shown = examples(ID=(truth, predicted), dusk=(truth, truth))
  figure = pictures.draw_masks(shown, NAMES, -1)
  lines = np.reshape(figure.axes, (2, 3))
  assert [line[0].get_ylabel() for line in lines] == ['ID', 'dusk']
  titles = [place.get_title() for place in lines[0]]
  assert titles == ['image', 'truth', 'predicted']
  image, left, right = (place.images[0].get_array() for place in lines[0])
  np.testing.assert_array_equal(image, shown['ID'][0])
  legend = figure.legends[0]
  texts = [text.get_text() for text in legend.get_texts()]
  assert texts == ['class 3', 'class 7', 'class 59', 'void']
  # A pixel has the colour of its class in the legend.
  colors = {
    text: np.round(np.multiply(patch.get_facecolor()[:3], 255))
    for text, patch in zip(texts, legend.get_patches(), strict=True)
  }
  assert (left[0] == 255).all()
  assert (left[0] == colors['void']).all()
  assert (left[1] == colors['class 59']).all()
  assert (left[2:] == colors['class 3']).all()
  assert (right[:5] == colors['class 3']).all()
  assert (right[5] == colors['class 7']).all()


@pytest.mark.parametrize('number', [2, 21, 60, 200])
def test_no_two_classes_look_the_same(number):
  colors = pictures._class_colors(number)
  assert len({tuple(color) for color in colors.tolist()}) == number + 1
  assert colors[-1].tolist() == [255, 255, 255]
  # PASCAL VOC's: an aeroplane is dark red, a bicycle green.
  assert colors[:2].tolist() == [[128, 0, 0], [0, 128, 0]]
