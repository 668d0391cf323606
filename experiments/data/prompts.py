"""What a language model is shown of a question, and what it answers."""

_TASK = 'Below is an instruction that describes a task'
_INPUT = ', paired with an input that provides further context'
_WRITE = '. Write a response that appropriately completes the request.'
_INDENT = ' ' * 16


def _exact(example, training):
  """To the blank what LLM-Adapters trains on, and evaluates with.

  The two differ: a comment for a linter and blanks got into the first one.
  """
  head = _TASK + _INPUT * bool(example.context) + _WRITE
  if training:
    head += '  # noqa: E501'
  elif not example.context:
    head += ' '
  between = f'\n{_INDENT if training else ""}\n{_INDENT}'
  parts = [('Instruction', example.instruction)]
  if example.context:
    parts.append(('Input', example.context))
  texts = [f'### {name}:\n{_INDENT}{text}' for name, text in parts]
  texts.append(f'### Response:\n{_INDENT}')
  return f'{head}\n\n{_INDENT}{between.join(texts)}'


def _trimmed(example, training):
  """The same without the indentation, in training as in evaluation."""
  del training
  head = _TASK + _INPUT * bool(example.context) + _WRITE
  parts = [f'### Instruction:\n{example.instruction}']
  if example.context:
    parts.append(f'### Input:\n{example.context}')
  return '\n\n'.join([head, *parts, '### Response:\n'])


def _question(example, training):
  """The question alone: the options are scored and need not be listed."""
  del training
  context = f'{example.context}\n' if example.context else ''
  return f'{context}Question: {example.question}\nAnswer: '


def _sentiment(example, training):
  del training
  return f'Text: {example.question}\nSentiment: '


# (example, training) -> the prompt, which the answer follows.
TEMPLATES = {
  'exact': _exact,
  'trimmed': _trimmed,
  'question': _question,
  'sentiment': _sentiment,
}

# (example, option) -> what is to be answered if that option is right.
RESPONSES = {
  'output': lambda example, option: example.response(option),
  'option': lambda example, option: example.options[option],
}
