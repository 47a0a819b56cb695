"""Chat templates of the kinds that hub models have. Written for these tests; QWEN_STYLE does what Qwen3's does."""

from lmoe.pretrain.bpe import CHAT_TEMPLATE

WITHOUT_GENERATION = CHAT_TEMPLATE.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")

# Strips contents, drops the thoughts of earlier turns, writes a <think> block into the last one.
QWEN_STYLE = """\
{%- set ns = namespace(last_user=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role != 'assistant' -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- else -%}
{%- set ns.thought = '' -%}{%- set ns.answer = m.content -%}
{%- if '</think>' in m.content -%}
{%- set ns.thought = m.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
{%- set ns.answer = m.content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if loop.index0 > ns.last_user and (loop.last or ns.thought) -%}
{{- '<think>\\n' + ns.thought.strip('\\n') + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- ns.answer.strip() + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
"""

# Contents between spaces, the eos token behind a space, no token that opens a turn.
LLAMA2_STYLE = """\
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '[INST] ' + m.content.strip() + ' [/INST]' -}}
{%- elif m.role == 'assistant' -%}{{- ' ' + m.content.strip() + ' ' + eos_token -}}
{%- else -%}{{- raise_exception('only user and assistant roles are supported') -}}{%- endif -%}
{%- endfor -%}
"""
