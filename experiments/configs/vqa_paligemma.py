"""Questions about images: PaliGemma-3B on VQAv2, and nine sets that shift.

python -m experiments.main --config=experiments/configs/vqa_paligemma.py \
  --method=spd_05 --config.data_dir=DATA --config.model.pretrained=FOLDER

The SPD paper's study: LoRA of rank 8 on VQAv2's train2014, tested on its
val2014 (ID) and, as it was trained, on six sets that shift from it (near OOD)
and three of other tasks (far OOD). DATA has the folders vqav2, rephrasings,
vqa_cp, advqa, iv_vqa, cv_vqa, ok_vqa, textvqa and vizwiz, with the files of
their authors, the images of COCO in coco/train2014 and coco/val2014, those of
TextVQA in openimages/train_images, and those of VizWiz in vizwiz/val;
counterexamples.json of VQA-CE lies in vqav2. Validation is 10,240 questions of
val2014 held out by image; `outside` scores the questions of a set about other
images. The paper's group trains on val2014 too, and evaluates with another
prompt than it trains with; neither is done here.

By the TPU compiler, 256 examples a step fit v5e:4x4 with --config.layout=fsdp.
The argument untied is for the two rows that train the head, which PaliGemma
shares with its embeddings: the linear probe, and LP-FT.
"""

from experiments.configs import vqa
from experiments.configs.base import method

_LORA = {
  'lora': 8,
  'lora_alpha': 16.0,
  'lora_dropout': 0.05,
  'lora_modules': vqa.LORA_MODULES,
}
_NEAR = ('rephrasings', 'vqa_cp', 'vqa_ce', 'advqa', 'iv_vqa', 'cv_vqa')
_FAR = ('ok_vqa', 'textvqa', 'vizwiz')
_PATHS = {'vqa_ce': 'vqav2'}
_ROOTS = {'textvqa': 'openimages', 'vizwiz': 'vizwiz'}
_NAMES = {
  'rephrasings': 'VQA-Rephrasings',
  'vqa_cp': 'VQA-CP v2',
  'vqa_ce': 'VQA-CE',
  'advqa': 'AdVQA',
  'iv_vqa': 'IV-VQA',
  'cv_vqa': 'CV-VQA',
  'ok_vqa': 'OK-VQA',
  'textvqa': 'TextVQA',
  'vizwiz': 'VizWiz',
}


def get_config(arg=''):
  """PaliGemma's.

  Args:
    arg: '' for LoRA, 'untied' for what trains the head.
  """
  if arg not in ('', 'untied'):
    raise ValueError(f"vqa_paligemma: {arg!r} is not '' or 'untied'.")
  config = vqa.base()
  config.update(
    title='VQAv2, PaliGemma-3B',
    output_dir='runs/vqa_paligemma',
    train=_source('vqav2', split='train'),
    val=_source('vqav2', split='val'),
    eval_sets={
      'VQAv2': _source('vqav2', split='test'),
      **{_NAMES[name]: _source(name) for name in (*_NEAR, *_FAR)},
    },
    means={
      'near OOD': tuple(_NAMES[name] for name in _NEAR),
      'far OOD': tuple(_NAMES[name] for name in _FAR),
    },
    metrics=('accuracy', 'outside', 'yes/no', 'number', 'other'),
    layout='fsdp',
    num_workers=8,
    num_epochs=10,
    batch_size=256,  # 16, two of them accumulated, on 8 GPUs
    eval_batch_size=256,
    eval_every=1000,
    learning_rate=1e-3,
    # 1,000 of 17,340 steps, from a tenth of the rate.
    warmup=1000 / 17_340,
    warmup_learning_rate=1e-4,
    min_learning_rate=1e-4,
  )
  config.model.update(
    name='paligemma_3b',
    pretrained='google/paligemma-3b-pt-224',
    dtype='bfloat16',
    remat=True,
    scan=True,
  )
  if arg == 'untied':
    config.update(title=f'{config.title}, head untied', head='untied')
    config.output_dir += '_untied'
    config.methods.update(
      {
        'zero_shot': method('start'),
        # It has the factors that LP-FT trains on, at their start.
        'linear_probe': method(
          'linear probe', optimizer='adamw', train='head', **_LORA
        ),
        'lp_ft': method(
          'LP-FT',
          optimizer='adamw',
          weight_decay=1e-4,
          starts_from='linear_probe',
          **_LORA,
        ),
      }
    )
  else:
    config.methods.update(vqa.lora_methods(1e-4, (0.5, 1.0, 1.5, 2.0), **_LORA))
  return config


def _source(name, **keys):
  path, root = _PATHS.get(name, name), _ROOTS.get(name, 'coco')
  return {'kind': 'vqa', 'name': name, 'path': path, 'root': root, **keys}
