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

# Qwen3's ways: tools in the system turn, thoughts only behind the last question, an empty think block where there are
# none, and a prompt for the answer that leaves it out unless enable_thinking is false.
THINKING = """\
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- if tools -%}{{- '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>\\n' -}}{%- endif -%}
{%- for m in messages -%}
{%- set content = m.content if m.content is string else '' -%}
{%- if m.role != 'assistant' -%}
{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' -}}
{%- else -%}
{%- set thoughts = m.reasoning_content if m.reasoning_content is string else '' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if loop.index0 > ns.last and (loop.last or thoughts) -%}
{{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- content -}}
{%- for call in m.tool_calls or [] -%}
{{- '\\n' if content or not loop.first else '' -}}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
{{- call.function.arguments | tojson -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""

# Writes calls by joining text, refuses an answer of a tool without a call before it, and drops what is said beside one.
JOINING = """\
{%- for m in messages -%}
{%- if m.role == 'assistant' and m.tool_calls is defined -%}
{{- '[CALLS]' -}}
{%- for c in m.tool_calls -%}{{- c.function.name + ' ' + c.function.arguments + ';' -}}{%- endfor -%}
{{- eos_token -}}
{%- elif m.role == 'assistant' -%}{{- m.content + eos_token -}}
{%- elif m.role == 'tool' -%}
{%- if messages[loop.index0 - 1].tool_calls is not defined -%}{{- raise_exception('no call') -}}{%- endif -%}
{{- '[RESULT]' + m.content + '[/RESULT]' -}}
{%- else -%}
{%- if tools and loop.first -%}{{- '[TOOLS]' + tools | tojson + '[/TOOLS]' -}}{%- endif -%}
{{- '[INST]' + m.content + '[/INST]' -}}
{%- endif -%}
{%- endfor -%}
"""

# Asks for the date.
DATED = "{{- 'Today is ' + strftime_now('%d %b %Y') + '.\\n' -}}" + WITHOUT_GENERATION
