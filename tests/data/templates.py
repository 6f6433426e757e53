"""Chat templates in the shapes of public ones, and conversations for them.

python -m tests.data.templates  # with transformers: what it makes of them, tests/data/golden

"""

# ruff: noqa: E501 - lines of templates

import json
import pathlib

import tokenizers

GOLDEN = pathlib.Path(__file__).parent / "golden" / "chats.json"
SPECIAL = [
  "<|end|>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>",
  "<|eot|>", "<|eom|>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "<turn>",
  "</turn>", "<|user|>", "<|assistant|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>",
  "<|call|>",
]  # fmt: skip
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
DATE = "2026-11-30"

# As Qwen2 has it: a system's words of its own where none are given.
CHATML = (
  "{% for message in messages %}"
  "{% if loop.first and messages[0]['role'] != 'system' %}"
  "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
  "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# As Llama 3.1 has it: the date, tools as JSON, one call a turn, in JSON written by hand.
HEADERS = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|head|>system<|/head|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|head|>' + message['role'] + '<|/head|>\\n\\n'+ message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("one call at a time") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|head|>assistant<|/head|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eom|>" }}
    {%- else %}
        {{- "<|head|>ipython<|/head|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|/head|>\\n\\n' }}
{%- endif %}
"""

# As Llama 2 has it: what the first user says is joined to the system's words, then trimmed.
JOINED = (
  "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
  "{% set messages = messages[1:] %}{% else %}{% set system = false %}{% endif %}"
  "{% for message in messages %}"
  "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('roles must alternate') }}{% endif %}"
  "{% if loop.first and system %}"
  "{% set content = '<<SYS>>\n' ~ system ~ '\n<</SYS>>\n\n' ~ message.content %}"
  "{% else %}{% set content = message.content %}{% endif %}"
  "{% if message.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
  "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

# As Mistral has it: tools before the last question, calls as a list of JSON with their ids.
CALLS = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool" %}
        {{- "[TOOL_RESULTS] {" + '"content": ' + message.content|string + ", " }}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
"""

# As Qwen3 has it: thoughts before the last question are dropped, tools answer as a user.
THOUGHT = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

# As Gemma has it: the assistant is called model, the system's words go before the first question.
MODEL = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {{ item['text'] | trim }}
        {%- endfor -%}
    {%- endif -%}
    {{ '</turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<turn>model
'}}
{%- endif -%}
"""

# As OLMoE has it: no token ends a question, the end of a text ends an answer.
PLAIN = (
  "{{ bos_token }}{% for message in messages %}\n"
  "{% if message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + '\n' }}\n"
  "{% elif message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + '\n' }}\n"
  "{% elif message['role'] == 'assistant' %}\n"
  "{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}\n"
  "{% endif %}\n"
  "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>\n' }}\n{% endif %}\n"
  "{% endfor %}"
)

# As DeepSeek-R1 has it: every thought is dropped, and the model is given the start of one.
DROPPED = (
  "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
  "{% set ns = namespace(system='') %}{%- for message in messages %}"
  "{%- if message['role'] == 'system' %}{% set ns.system = message['content'] %}{%- endif %}"
  "{%- endfor %}{{ bos_token }}{{ ns.system }}{%- for message in messages %}"
  "{%- if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}{%- endif %}"
  "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
  "{% set content = message['content'] %}"
  "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
  "{{ '<|assistant|>' + content + eos_token }}{%- endif %}{%- endfor -%}"
  "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
)

# As gpt-oss has it: macros, thoughts in a channel of their own, and only in the last answer.
CHANNELS = """{%- macro render_tools(tools) -%}
    {%- for tool in tools %}
        {{- "// " + tool.function.description + "\\ntype " + tool.function.name + " = (_: " }}
        {{- tool.function.parameters.properties.keys() | join(", ") ~ ") => any;\\n" }}
    {%- endfor %}
{%- endmacro -%}
{%- macro system() -%}
    {%- set model_identity = "You are a model." -%}
    {{- model_identity + "\\nCurrent date: " + strftime_now("%Y-%m-%d") }}
{%- endmacro -%}
{{- "<|start|>system<|message|>" }}
{{- system() }}
{{- "<|eot|>" }}
{%- if messages[0].role == "system" or messages[0].role == "developer" %}
    {%- set developer_message = messages[0].content %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set developer_message = "" %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if developer_message or tools %}
    {{- "<|start|>developer<|message|>" }}
    {%- if developer_message %}
        {{- "# Instructions\\n\\n" ~ developer_message ~ "\\n\\n" }}
    {%- endif %}
    {%- if tools -%}
        {{- render_tools(tools) }}
    {%- endif -%}
    {{- "<|eot|>" }}
{%- endif %}
{%- set last_tool_call = namespace(name=none) %}
{%- for message in loop_messages -%}
    {%- if message.role == 'assistant' -%}
        {%- if "tool_calls" in message %}
            {%- set tool_call = message.tool_calls[0].function %}
            {%- if message.thinking is defined %}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|eot|>" }}
            {%- endif %}
            {{- "<|start|>assistant to=" }}
            {{- "functions." + tool_call.name + "<|channel|>commentary json<|message|>" }}
            {{- tool_call.arguments|tojson }}
            {{- "<|call|>" }}
            {%- set last_tool_call.name = tool_call.name %}
        {%- elif loop.last and not add_generation_prompt %}
            {%- if "thinking" in message %}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|eot|>" }}
            {%- endif %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}
        {%- else %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|eot|>" }}
        {%- endif %}
    {%- elif message.role == 'tool' -%}
        {%- if last_tool_call.name is none %}
            {{- raise_exception("a tool answers that nobody called") }}
        {%- endif %}
        {{- "<|start|>functions." + last_tool_call.name }}
        {{- " to=assistant<|channel|>commentary<|message|>" + message.content|tojson + "<|eot|>" }}
    {%- elif message.role == 'user' -%}
        {{- "<|start|>user<|message|>" + message.content + "<|eot|>" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start|>assistant
{%- endif -%}"""

# As SmolLM3 and other templates for training have it: the assistant's own stands between tags.
TAGGED = """{%- macro said(message) -%}{{ message.content | trim }}{%- endmacro -%}
{%- for message in messages -%}
{%- if message.role == "assistant" -%}
{{ "<|im_start|>assistant\\n" }}
{%- generation -%}
{%- if message.reasoning_content is defined -%}
{{ "<think>\\n" ~ message.reasoning_content ~ "\\n</think>\\n" }}
{%- endif -%}
{%- if message.content is defined -%}{{ said(message) }}{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{{ "<tool_call>" ~ (call.function | tojson) ~ "</tool_call>" }}
{%- endfor -%}
{{ "<|im_end|>\\n" }}
{%- endgeneration -%}
{%- else -%}
{%- if loop.first and tools -%}{{ "<|im_start|>system\\n" ~ (tools | tojson) ~ "<|im_end|>\\n" }}{%- endif -%}
{{ "<|im_start|>" ~ message.role ~ (" " ~ message.name if message.name else "") ~ "\\n" ~ said(message) ~ "<|im_end|>\\n" }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\\n" }}{%- endif -%}
"""

# As Phi-3 has it, between tags: what is generated has no token that ends it inside.
NARROW = (
  "{% for message in messages %}{% if message.role == 'assistant' %}"
  "{{ '<|assistant|>' }}{% generation %} {{ message.content }}{% endgeneration %}{{ '<|end|>\n' }}"
  "{% else %}{{ '<|' ~ message.role ~ '|>\n' ~ message.content ~ '<|end|>\n' }}{% endif %}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)

TEMPLATES = {
  "chatml": CHATML, "headers": HEADERS, "joined": JOINED, "calls": CALLS, "thought": THOUGHT,
  "model": MODEL, "plain": PLAIN, "dropped": DROPPED, "channels": CHANNELS, "tagged": TAGGED,
  "narrow": NARROW,
}  # fmt: skip
TOOLS = [{
  "type": "function",
  "function": {
    "name": "get_weather",
    "description": "Says \"what\" the weather is,\nif any.",
    "parameters": {
      "type": "object",
      "properties": {"city": {"type": "string", "enum": ["M\u00fcnchen", "Rome"]}, "n": {}},
      "required": ["city"],
    },
  },
}]  # fmt: skip
CALL = {
  "id": "call_1", "type": "function",
  "function": {"name": "get_weather", "arguments": {"city": 'M\u00fcn"chen\n', "n": [1, 2.5, None]}},
}  # fmt: skip
TALKS = {
  "thoughts": {"messages": [
    {"role": "system", "content": "Be kind. "},
    {"role": "user", "content": "  What is 2 + 2?\n"},
    {"role": "assistant", "content": "<think>\n2 + 2\n</think>\n\n4,\nI think."},
    {"role": "user", "content": "\u2603 sure?\n\n"},
    {"role": "assistant", "content": "<think>\nWell.\n</think>\n\n  I think so. "},
  ]},
  "tools": {"tools": TOOLS, "messages": [
    {"role": "user", "content": "What is it in M\u00fcnchen?"},
    {"role": "assistant", "content": None, "reasoning_content": "Look it up.",
     "tool_calls": [CALL]},
    {"role": "tool", "content": "13.5 \"degrees\"", "tool_call_id": "call_1",
     "name": "get_weather"},
    {"role": "assistant", "content": "It is 13.5 degrees.", "reasoning_content": "I think so."},
  ]},
  "open": {"messages": [
    {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
    {"role": "user", "content": "What is it?"},
  ]},
}  # fmt: skip
TEXTS = ["[INST] What is it? [/INST] user assistant Be kind.", "I think so. Today: <<SYS>> a b"]


def merging(kind):
  """Returns a tokenizer whose pieces may cross from a template's words into a user's."""
  bare = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
  alphabet = []
  if kind == "bytes":
    bare.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  else:  # the start of a text alone has a space put before it
    bare.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
  )
  bare.train_from_iterator([text for text in TEXTS for _ in range(9)], trainer)
  return bare


def theirs(bare, template, talk, **options):
  """Returns what transformers makes of a talk; None where the template refuses it."""
  import jinja2
  import transformers

  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bare, **TOKENS)
  try:
    return tokenizer.apply_chat_template(
      talk["messages"], tools=talk.get("tools"), chat_template=template, **options
    )
  except (jinja2.TemplateError, TypeError):
    return None


def expected(bare, name, talk):
  """Returns ids and, where the template has {% generation %}, masks, as transformers has them."""
  template = TEMPLATES[name].replace('strftime_now("%d %b %Y")', '"30 Nov 2026"')
  template = template.replace('strftime_now("%Y-%m-%d")', '"2026-11-30"')
  ids = theirs(bare, template, talk, return_dict=False)
  if ids is None or "endgeneration" not in template:
    return {"ids": ids}
  found = theirs(bare, template, talk, return_dict=True, return_assistant_tokens_mask=True)
  return {"ids": ids, "mask": found["assistant_masks"]}


def main():
  """Writes the golden file."""
  made = {}
  for kind in ("bytes", "words"):
    bare = merging(kind)
    chats = {
      f"{name} {talk}": expected(bare, name, TALKS[talk]) for name in TEMPLATES for talk in TALKS
    }
    made[kind] = {"tokenizer": bare.to_str(), "chats": chats}
  GOLDEN.parent.mkdir(exist_ok=True)
  GOLDEN.write_text(json.dumps(made, separators=(",", ":")) + "\n")


if __name__ == "__main__":
  main()
