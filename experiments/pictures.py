"""Pictures of examples: what a model made of them, beside the truth."""

import textwrap

import numpy as np

from experiments import figures


def draw_masks(examples, class_names, void):
  """Images, the classes of their pixels, and those predicted, side by side.

  Args:
    examples: `{title: (image uint8 [H, W, 3], truth [H, W], predicted)}`.
    class_names: of the legend, which has those that are to be seen.
    void: the class that counts for nothing; it is white.

  Returns:
    A figure.
  """
  from matplotlib.patches import Patch  # as in `figures.empty_figure`

  colors = _class_colors(len(class_names))
  seen = set()
  figure = figures.empty_figure(9.6, 2.4 * len(examples) + 1.2)
  axes = figure.subplots(len(examples), 3, squeeze=False)
  for line, (title, example) in zip(axes, examples.items(), strict=True):
    image, *classes = example
    line[0].imshow(image)
    for place, mask in zip(line[1:], classes, strict=True):
      seen |= set(np.unique(mask).tolist())
      place.imshow(colors[np.where(mask == void, -1, mask)])
    line[0].set_ylabel(title)
    for place in line:
      place.set(xticks=[], yticks=[])
  for place, title in zip(
    axes[0], ('image', 'truth', 'predicted'), strict=True
  ):
    place.set_title(title)
  patches = [
    Patch(facecolor=colors[i] / 255, edgecolor='#888888', label=class_names[i])
    for i in sorted(seen - {void})
  ]
  patches.append(Patch(facecolor='white', edgecolor='#888888', label='void'))
  figure.legend(handles=patches, loc='outside lower center', ncols=6)
  return figure


def draw_answers(examples, columns=4):
  """Images with question, answer and truth; wrong answers are red.

  Args:
    examples: (image uint8 [H, W, 3], `questions.Question`, the answer, its
      accuracy) of each.
    columns: of the figure.

  Returns:
    A figure.
  """
  lines = -(-len(examples) // columns)
  figure = figures.empty_figure(3.0 * columns, 3.4 * lines + 0.6)
  axes = list(figure.subplots(lines, columns, squeeze=False).flat)
  for place in axes:
    place.set_axis_off()
  for place, (image, question, said, score) in zip(
    axes, examples, strict=False
  ):
    place.imshow(image)
    asked = textwrap.fill(question.text, 34, max_lines=3)
    text = f'{asked}\nsaid: {said[:30]}\ntruth: {question.answer[:30]}'
    place.set_title(
      f'{text} ({score:.1f})',
      fontsize=8,
      color='#000000' if score >= 0.5 else '#D55E00',
      parse_math=False,
    )
  return figure


def _class_colors(number):
  """uint8 [number + 1, 3]: PASCAL VOC's colours but black, and white."""
  colors = np.full((number + 1, 3), 255, np.uint8)
  for i in range(number):
    # The bits of i + 1 in turn, each the highest of a channel that is free.
    colors[i] = [
      sum(((i + 1) >> 3 * k + c & 1) << 7 - k for k in range(8))
      for c in range(3)
    ]
  return colors
