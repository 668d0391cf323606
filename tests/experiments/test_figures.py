"""The figures, of studies large and small."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from experiments import evidence, figures, log, report
from tests.experiments import test_evidence

MEANS = test_evidence.MEANS


def is_drawn(path):
  with Image.open(path) as image:
    assert image.width == 960
    return len(image.getcolors(1 << 20)) > 50


def history(steps, end):
  ramp = np.linspace(0, end, steps)
  return {'loss': ramp, 'deviation': ramp, 'decayed': np.full(steps, 0.25)}


def several():
  rows = test_evidence.paired('probe', [0.0, 0.0, 0.0], history={})
  for name, end in (('adamw', 2.0), ('spd', 1.0)):
    rows += test_evidence.paired(
      name, [0.1, 0.3, 0.2], history=history(30, end)
    )
  return rows


def single():
  """One seed, one method, one set, one step."""
  (row,) = test_evidence.paired('spd', [0.0], history=history(1, 1.0))
  return [{**row, 'metrics': {k: row['metrics'][k] for k in ('val', 'ID')}}]


@pytest.mark.parametrize(
  ('rows', 'means'), [(several(), MEANS), (single(), {}), (several(), {})]
)
def test_methods_side_by_side(tmp_path, rows, means):
  path = tmp_path / 'figure.png'
  text = figures.plot_plane(rows, means, path, 'title')
  assert is_drawn(path)
  assert ('one seed' in text) == (len(rows) == 1)
  path.unlink()
  text = figures.plot_steps(rows, path, 'title')
  assert is_drawn(path)
  path.unlink()
  text = figures.plot_distance(rows, means, path, 'title')
  assert (text is None) == (len(rows) == 1)
  assert path.exists() == (text is not None)


def test_what_is_said_is_what_the_rows_say(tmp_path):
  path = tmp_path / 'figure.png'
  text = figures.plot_plane(several(), MEANS, path, 'title')
  # .5 + .01 + .2 of the first set; both are the mean over three seeds.
  assert (
    'OOD mean acc is that of adamw, 0.760, where its ID acc is 0.800' in text
  )
  assert '3 seeds' in text
  text = figures.plot_steps(several(), path, 'title')
  assert 'from 1.00 of spd to 2.00 of adamw' in text
  assert 'Right: the share of layers that SPD' in text
  for row in (rows := several()):
    row['history'].pop('decayed', None)
  text = figures.plot_steps(rows, path, 'title')
  assert text.startswith('How far')
  assert 'SPD' not in text


def test_steps_of_a_study_that_trains_nothing(tmp_path):
  rows = test_evidence.paired('probe', [0.0], history={})
  assert figures.plot_steps(rows, tmp_path / 'figure.png', 'title') is None
  assert not list(tmp_path.iterdir())


def test_a_sweep(tmp_path):
  path = tmp_path / 'figure.png'
  rows = evidence.sweep(test_evidence.study())
  assert 'mean over 2 seeds' in figures.plot_frontier(
    rows, MEANS, path, 'title'
  )
  assert is_drawn(path)
  path.unlink()
  assert 'every λ' in figures.plot_lambda(rows, MEANS, path, 'title')
  assert is_drawn(path)
  path.unlink()
  assert figures.plot_distance(rows, MEANS, path, 'title')
  assert is_drawn(path)
  path.unlink()
  without = [row for row in rows if row['family'] != 'spd']
  assert figures.plot_lambda(without, MEANS, path, 'title') is None
  one = rows[:1]
  assert figures.plot_frontier(one, {}, path, 'title')
  of_one_set = [
    {**row, 'metrics': {k: row['metrics'][k] for k in ('val', 'ID')}}
    for row in rows
  ]
  assert figures.plot_lambda(of_one_set, {}, path, 'title')
  path.unlink()
  assert figures.plot_frontier(of_one_set, {}, path, 'title') is None
  assert not path.exists()


def layers(steps, names, moves):
  """One layer moves, and is selected in every second step."""
  place = names.index(moves)
  deviation = np.zeros((steps, len(names)))
  selected = np.zeros(deviation.shape, bool)
  deviation[:, place] = np.arange(steps)
  selected[::2, place] = True
  return log.Layers(np.array(names), deviation, selected, selected)


NAMES = [
  'backbone/blocks/0/k',
  'backbone/blocks/1/k',
  'backbone/embed',
  'head/k',
]


@pytest.mark.parametrize('steps', [1, 3, 500])
def test_layers_by_depth(tmp_path, steps, monkeypatch):
  drawn, imshow = [], Axes.imshow

  def watched(axes, values, **kwargs):
    drawn.append(values)
    return imshow(axes, values, **kwargs)

  monkeypatch.setattr(Axes, 'imshow', watched)
  runs = [
    layers(steps, NAMES, 'head/k'),
    layers(steps, NAMES, 'backbone/embed'),
  ]
  text = figures.plot_layers(runs, tmp_path / 'figure.png', 'title')
  assert is_drawn(tmp_path / 'figure.png')
  deviation, selected = drawn
  assert deviation.shape == selected.shape == (4, min(steps, 120))
  # The input is the first line, the head the last; each moves in one of two.
  assert np.all(deviation[1:3] == 0)
  np.testing.assert_allclose(deviation[0], deviation[3])
  assert deviation[0, -1] == pytest.approx((steps - 1) / 2, rel=0.01)
  assert selected[0].mean() == pytest.approx(50 / 2, abs=25 / steps + 1)
  assert 'the share of 2 seeds' in text


def test_one_layer_of_one_run_that_stays_where_it_is(tmp_path):
  runs = [layers(1, ['head'], 'head')]
  text = figures.plot_layers(runs, tmp_path / 'figure.png', 'title')
  assert 'the share of one seed' in text


def test_the_layers_of_a_run_are_read_as_they_were_told(tmp_path):
  gathered = log.LayerLog()
  path = log.Layers.path(tmp_path, 'spd', 0)
  assert gathered.layers(['a']) is None
  gathered.add({})
  assert gathered.layers(['a']) is None
  counts = np.array([[0, 1], [1, 1], [1, 2]])
  for step, count in enumerate(counts):
    gathered.add(
      {
        'deviation': np.array([0.5, 1.0]) * step,
        'ratio': count,
        'decay': count,
        'selected_count': count,
        'decayed_count': 0 * count,
      }
    )
  gathered.layers(['a', 'b']).write(path)
  found = log.Layers.read(path)
  assert list(found.names) == ['a', 'b']
  np.testing.assert_array_equal(found.deviation, [[0, 0], [0.5, 1], [1, 2]])
  np.testing.assert_array_equal(found.selected, [[0, 1], [1, 0], [0, 1]])
  assert not found.decayed.any()
  assert [file.name for file in path.parent.iterdir()] == ['spd_0.npz']


def test_the_same_figure_stands_for_the_colour_blind():
  """A method has a marker of its own beside its colour."""
  styles = [tuple(figures._style(i).values()) for i in range(49)]
  assert len(set(styles)) == 49
  assert len({marker for _, marker in styles[:7]}) == 7
  assert report.scores(several(), MEANS)[1].title == 'OOD mean acc'
