"""Prompt styles as Jinja chat templates for a processor of transformers."""

from __future__ import annotations

from mmphi.errors import ModelError
from mmphi.text.prompt import MARK, Prompt

# The images of a message come first, then its text on a separate line, as in training.
READ = (
    "{%- set part = namespace(images='', text='') -%}"
    "{%- if message['content'] is string -%}{%- set part.text = message['content'] -%}"
    "{%- else -%}{%- for item in message['content'] -%}"
    "{%- if item['type'] in ['image', 'image_url'] -%}{%- set part.images = part.images + 'MARK' -%}"
    "{%- elif item['type'] == 'text' -%}{%- set part.text = part.text + item['text'] -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
).replace("MARK", MARK)
LINES = (
    "{%- if BOS -%}{{- bos_token -}}{%- endif -%}"
    "{%- for message in messages -%}" + READ + "{%- if message['role'] == 'user' -%}{{- part.images -}}"
    "{%- if part.text -%}{%- if part.images or not loop.first -%}{{- '\\n' -}}{%- endif -%}{{- ASKED -}}{%- endif -%}"
    "{%- elif message['role'] == 'assistant' -%}{{- GAP + part.text + eos_token -}}"
    "{%- else -%}{{- raise_exception('this model was trained without messages of the role ' + message['role']) -}}"
    "{%- endif -%}{%- endfor -%}"
)
STYLES = {
    "plain": ("part.text + '\\n'", "''"),
    "phi": ("'Instruct: ' + part.text + '\\nOutput:'", "' '"),
}
# The tokenizer's own template expects plain texts, so lists of parts are joined first.
CHAT = (
    "{%- set joined = namespace(messages=[]) -%}"
    "{%- for message in messages -%}" + READ + "{%- set gap = '\\n' if part.images and part.text else '' -%}"
    "{%- set joined.messages = joined.messages + "
    "[{'role': message['role'], 'content': part.images + gap + part.text}] -%}{%- endfor -%}"
    "{%- set messages = joined.messages -%}"
)


def llava_template(prompt: Prompt) -> str:
    """Return a Jinja chat template with the output of a prompt, with ``<image>`` for each image.

    Args:
        prompt: Prompt of the model.

    Raises:
        ModelError: If the tokenizer has several templates.
    """
    if prompt.template is not None:
        if not isinstance(prompt.tokenizer.chat_template, str):
            raise ModelError("the tokenizer has several chat templates", "keep one of them")
        return CHAT + prompt.template.fixed
    question_style, gap = STYLES[prompt.style]
    bos = "true" if prompt.tokenizer.bos_token is not None else "false"
    return LINES.replace("BOS", bos).replace("ASKED", question_style).replace("GAP", gap)
