"""DomainNet: 345 classes in six domains; CLIP ViT-B/16 and its text tower.

python -m experiments.compare --config=domainnet:clipart --config.data_dir=DIR

The argument is the domain to fine-tune on: clipart, infograph, painting,
quickdraw, real or sketch. The official test sets of all six are evaluated: its
own is ID, the rest OOD. A tenth of its training set, held out by seed 0,
chooses the step. DIR is the data_dir of tensorflow-datasets, with
domainnet/{clipart,...} prepared in it. `:clipart,files` reads the official list
files instead: DIR/domainnet/clipart_train.txt, clipart_test.txt, and the images
that they name under DIR/domainnet.

Every method starts from the zero-shot head of the text tower. Zero-shot
accuracies of CLIP ViT-B/16 to check a set-up with: real 82.46, clipart 65.57,
infograph 43.77, sketch 56.98, painting 66.69 (lipsum-ft's README); more prompts
than the ones in prompts/photo.txt are used there.

If the hub has no safetensors of the checkpoint on its main branch, name a
revision that has, --config.model.pretrained=openai/clip-vit-base-patch16@REF,
or a folder to which transformers saved it.

Hardware and time: not run here at full size, for want of the weights and the
images. Nine tenths of clipart's 33,525 images for 60 epochs are 28,287 steps of
64.

References:
  Peng et al., "Moment Matching for Multi-Source Domain Adaptation", 2019.
"""

from experiments.configs.images import paper

DOMAINS = ('clipart', 'infograph', 'painting', 'quickdraw', 'real', 'sketch')


def get_config(arg='clipart'):
  """DomainNet from one domain.

  Args:
    arg: one of `DOMAINS`, and ',files' after it for the official list files.
  """
  source, _, files = arg.partition(',')
  if source not in DOMAINS or files not in ('', 'files'):
    raise ValueError(
      f'domainnet:{arg} is unknown; it is one of {", ".join(DOMAINS)}, with '
      "',files' after it for list files."
    )

  def split(domain, name):
    if files:
      path = f'domainnet/{domain}_{name}.txt'
      return {'kind': 'list', 'path': path, 'classes': 'domainnet'}
    return {'kind': 'tfds', 'name': f'domainnet/{domain}', 'split': name}

  def part(take):
    held_out = {'shares': (0.9, 0.1), 'take': take, 'seed': 0}
    return {**split(source, 'train'), 'part': held_out}

  others = [domain for domain in DOMAINS if domain != source]
  config = paper()
  config.update(
    title=f'DomainNet from {source}, CLIP ViT-B/16',
    output_dir=f'runs/domainnet_{source}',
    num_classes=345,
    train=part(0),
    val=part(1),
    eval_sets={name: split(name, 'test') for name in (source, *others)},
    means={
      'OOD mean': tuple(others),
      'without quickdraw': tuple(n for n in others if n != 'quickdraw'),
    },
    num_epochs=60.0,
    warmup=5 / 60,  # DeiT default: 5 epochs
    eval_every=1000,
  )
  return config
