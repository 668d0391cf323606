"""Questions about images -> what a model of both takes."""

import dataclasses
from typing import Any

import grain
import numpy as np
from PIL import Image

from experiments.data import images


@dataclasses.dataclass(frozen=True)
class Encode(grain.transforms.Map):
  """An image to a size, question and answer to ids.

  {'image', 'question', 'answer'} -> {'image': uint8 [S, S, 3], 'ids': int32
  [T], 'prefix': int32, 'length': int32}. The image is scaled without its
  aspect, by antialiased bicubic, as transformers' processor does. The ids are
  the start, the prompt, the separator, which is tokenised apart, the answer and
  the end; an answer that is too long is cut.

  Attributes:
    tokenizer: with `encode`, `start` and `end`.
    prompt: text with {} for the question.
    separator: what follows it.
    image_size: S.
    text_length: T.
    answer_length: the most tokens of an answer, its end among them.
  """

  tokenizer: Any
  prompt: str
  separator: str
  image_size: int
  text_length: int
  answer_length: int

  def map(self, element):
    size = (self.image_size, self.image_size)
    image = images.to_pillow(element['image']).convert('RGB')
    image = image.resize(size, Image.Resampling.BICUBIC)
    prefix = self.prefix(element['question'])
    whole = [*prefix, *self.answer(element['answer'])]
    ids = np.zeros(self.text_length, np.int32)
    ids[: len(whole)] = whole
    return {
      'image': images.from_pillow(image),
      'ids': ids,
      'prefix': np.int32(len(prefix)),
      'length': np.int32(len(whole)),
    }

  def prefix(self, question):
    """Ids of a prompt."""
    start = [] if self.tokenizer.start is None else [self.tokenizer.start]
    encode = self.tokenizer.encode
    prompt = encode(self.prompt.format(question))
    return [*start, *prompt, *encode(self.separator)]

  def answer(self, text):
    """Ids of an answer and its end."""
    ids = [*self.tokenizer.encode(text), self.tokenizer.end]
    return ids[: self.answer_length]
