"""What every study sets: each key once, with its neutral default."""

from ml_collections import ConfigDict, config_dict

# The keys of a source, with their types; `data.sources.open_source` says which
# of them a kind takes. `only` is an eval set's: see `data.folders.class_mask`.
SOURCE = {
  'kind': str,
  'name': str,
  'split': str,
  'path': str,
  'without': str,
  'margin': float,
  'root': str,
  'classes': str,
  'masks': str,
  'void': int,
  'sequences': tuple,
  'inverted': bool,
  'resize': int,
  'corruption': {'name': str, 'severity': int},
  'part': {'shares': tuple, 'take': int, 'seed': int},
  'limit': int,
  'only': str,
}


# What a run may be gone on with: it changes where and how fast, not what.
FREE = (
  'title',
  'output_dir',
  'data_dir',
  'cache_dir',
  'layout',
  'eval_batch_size',
  'num_workers',
  'num_seeds',
  'controls',
  'save_every',
  'keep',
  'log_every',
  'tensorboard',
  'profile',
)


def base():
  """A config in which every part of the recipe is switched off.

  The kinds of studies add keys of their own, such as `images.base`; a study
  fills in the empty ones. A key that is changed where it has no effect is
  refused: `checks.RULES` knows them, and those of a kind its module in
  `experiments/studies`.
  """
  return ConfigDict(
    {
      'task': 'classification',  # a key of study.KINDS
      'title': '',
      'output_dir': '',
      'data_dir': 'data',  # folder of the data sets
      'cache_dir': '~/.cache/optax_spd',  # compiled programs
      'layout': 'replicated',  # or fsdp, fsdp:N, pmap: parallel.layout
      'num_seeds': 1,
      # The model.
      'model': {
        'name': '',  # of a known one; '': as the checkpoint's files say
        'pretrained': '',  # a folder, a file, a hub id, or a package
        'dtype': 'float32',  # of activations: 'bfloat16'; params are float32
        'remat': False,  # recompute blocks in the backward pass
        'scan': False,  # compile one block, run it depth times
      },
      'first_block': 0,  # trained from here on; what is below is run once
      # The data. A source is a dict, as data.sources.open_source takes it.
      'train': {},
      'val': {},  # ID; chooses the step
      'eval_sets': ordered(),  # name: a source; ID is the first
      'means': ordered(),  # name: a tuple of eval sets to average in the table
      'metrics': ('accuracy',),  # the first chooses the step
      'num_workers': 0,  # processes that read; 0 for threads
      'repeats': 1,  # views of an example that follow one another; DeiT: 3
      'ema': 0.0,  # decay of the params' running average; DeiT: 0.99996
      # The budget.
      'num_steps': 0,  # this, or
      'num_epochs': 0.0,  # this, of the training set
      'batch_size': 32,  # of all devices together; so is the next one
      'eval_batch_size': 64,
      'accumulate': 1,  # parts of a batch whose gradients are averaged
      'eval_every': 25,  # steps; the best of them on ID validation is kept
      'learning_rate': 1e-4,  # the peak
      'decay': 'cosine',  # of the rate after it; or 'linear'
      'warmup': 0.1,  # share of the steps
      'warmup_learning_rate': 0.0,  # of the first step
      'min_learning_rate': 0.0,  # after the last step
      'clip_norm': 0.0,  # of the gradient; 0 for no clipping
      'methods': ordered(),  # name: a `method`
      # Tuning on ID validation, see `experiments.sweep`.
      'tuning_seeds': 0,  # of every setting; 0: the methods as they are
      'sweep': ordered(),  # method: {rate, weight_decay, spd, alpha: values}
      # Method with SPD: a tuple of others, brought as far from theta_0 as it.
      'controls': ordered(),
      # What experiments.main writes down on the way.
      'save_every': 1000,  # steps; and at every evaluation
      'keep': 2,  # of the last checkpoints, beside the best
      'log_every': 10,  # steps
      'tensorboard': False,  # too; the extra `tensorboard`
      'profile': 0,  # a step: it and the one after are traced
    }
  )


def ordered():
  """A ConfigDict that keeps its order, the table's; a copy of it does not."""
  return ConfigDict(sort_keys=False)


def first_stage(**changes):
  """What theta_0 learns before a study, see `studies.first_stage`: nothing.

  Args:
    **changes: of the keys below, and what a kind adds.
  """
  return ConfigDict(
    {
      'train': {},  # a source
      'val': {},  # a source; chooses the step
      'num_steps': 0,  # 0 for no first stage
      'batch_size': 32,
      'eval_every': 100,  # steps
      'learning_rate': 1e-4,  # the peak, of AdamW
      'weight_decay': 0.0,
      'seed': 0,  # of order and augmentation
      **changes,
    }
  )


def method(label, **changes):
  """A method: theta_0 itself, unless it has an optimizer or an average.

  Args:
    label: what the table calls it; lambda or alpha is added.
    **changes: of the keys below.
  """
  config = ConfigDict(
    {
      'label': label,
      'optimizer': '',  # a key of optimizers.OPTIMIZERS
      'rate': 1.0,  # its learning rates as a share of the study's
      'weight_decay': 0.0,  # the optimizer's own
      'spd': config_dict.placeholder(float),  # lambda; None: no SPD
      'condition': 'exact',  # a key of optimizers.CONDITIONS: SPD's
      # Of a layer to be drawn, where it is 'random': one for all, or one each.
      'fire': (0.5,),
      'anchor': 'start',  # that SPD pulls to; 'origin': zero for LoRA's factors
      'anchor_head': True,  # whether SPD pulls a head back to its start, too
      'train': 'all',  # a key of optimizers.TRAINED
      'layer_decay': 1.0,  # rate of a block as a share of the next one's
      'starts_from': '',  # another method, and anchors there; '' for theta_0
      'lora': 0,  # rank of LoRA; then it and a new head are all that is trained
      'lora_kind': 'lora',  # or a 'parallel' or 'series' adapter of that width
      'lora_alpha': 16.0,  # the product B A counts alpha / rank times
      'lora_dropout': 0.0,  # share of its input that it misses in training
      'lora_modules': r'.*\.attn\.(query|value)',  # regular expression
      'optional': False,  # whether compare runs it only where --methods has it
      'average_of': '',  # WiSE-FT: another method, averaged with theta_0
      'alpha': 0.5,  # its share in that average
    }
  )
  config.update(changes)
  return config


def methods():
  """The methods of the tables, one strength each, by name.

  Where theta_0 has a fitted head already, it is the linear probe, and AdamW is
  LP-FT (Kumar et al., 2022); else see `paper`. None of the strengths is tuned.
  Lion, whose steps are signs, gets a fifth of the study's rate: its authors
  advise a third to a tenth of AdamW's. What is optional is in no table unless
  it is asked for.
  """
  averages = {
    f'wise_ft_{round(100 * alpha)}': method(
      'WiSE-FT', average_of='adamw', alpha=alpha
    )
    for alpha in (0.25, 0.5, 0.75)
  }
  return {
    'adamw': method('AdamW', optimizer='adamw', weight_decay=0.1),
    'adam': method('Adam', optimizer='adam'),
    'l2sp': method('L2-SP', optimizer='l2sp', weight_decay=0.1),
    'l2sp_decoupled': method(
      'L2-SP, decoupled', optimizer='l2sp_decoupled', weight_decay=1.0
    ),
    'bitfit': method('BitFit', optimizer='adamw', train='biases'),
    'layer_decay': method(
      'AdamW, layer decay',
      optimizer='adamw',
      weight_decay=0.1,
      layer_decay=0.65,
    ),
    'spd_03': method('Adam-SPD', optimizer='adam', spd=0.3),
    'spd_1': method('Adam-SPD', optimizer='adam', spd=1.0),
    'adamw_spd': method(
      'AdamW + SPD', optimizer='adamw', weight_decay=0.1, spd=1.0
    ),
    'lion_spd': method('Lion-SPD', optimizer='lion', spd=1.0, rate=0.2),
    **averages,
    **_controls(),
  }


def _controls():
  """What asks whether SPD's condition, its optimizer or its projection matters.

  SPD without its condition holds every layer at the radius of its first step
  where lambda is 1, so it has less. SGD's steps are the gradient's, and need a
  rate a hundred times Adam's.
  """
  spd = {'optimizer': 'adam', 'spd': 1.0}
  sgd = {'optimizer': 'sgd', 'rate': 100.0}
  muon = {'optimizer': 'muon', 'weight_decay': 0.1}
  controls = {
    'spd_estimated': method(
      'Adam-SPD, estimated', condition='estimated', **spd
    ),
    'spd_always': method(
      'Adam-SPD, always', condition='always', **spd | {'spd': 0.3}
    ),
    'spd_random': method('Adam-SPD, at random', condition='random', **spd),
    'sgd': method('SGD', **sgd),
    'sgd_spd': method('SGD-SPD', spd=1.0, **sgd),
    'muon': method('Muon', **muon),
    'muon_spd': method('Muon-SPD', spd=1.0, **muon),
    'ftp': method('FTP', optimizer='ftp'),
    'digrap': method('DiGraP', optimizer='digrap'),
    'digrap_1': method('DiGraP, omega 1', optimizer='digrap_1'),
    'wise_spd_50': method('WiSE-FT of SPD', average_of='spd_1'),
  }
  for control in controls.values():
    control.optional = True
  return controls
