"""Chat templates of public models, as written here: what each renders is the model's own text.

Left out is what a conversation without declared tools, images and switches never reaches.
"""

# Qwen3: past thinking goes once the user speaks again; results of tools are the user's words.
QWEN3 = r"""
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' ~ messages[0].content ~ '<|im_end|>\n' }}
{%- endif %}
{%- set query = namespace(at=messages|length - 1, found=false) %}
{%- for m in messages|reverse %}
    {%- set said = m.content %}
    {%- set result = said.startswith('<tool_response>') and said.endswith('</tool_response>') %}
    {%- if m.role == 'user' and not result and not query.found %}
        {%- set query.found = true %}
        {%- set query.at = messages|length - loop.index %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' or m.role == 'system' and not loop.first %}
        {{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set said = m.content %}
        {%- set thought = '' %}
        {%- if m.reasoning_content is string %}
            {%- set thought = m.reasoning_content %}
        {%- elif '</think>' in said %}
            {%- set thought = said.split('</think>')[0].rstrip('\n') %}
            {%- set thought = thought.split('<think>')[-1].lstrip('\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > query.at and (loop.last or thought) %}
            {{- '<think>\n' ~ thought.strip('\n') ~ '\n</think>\n\n' ~ said.lstrip('\n') }}
        {%- else %}
            {{- said }}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {{- '\n' if said or not loop.first }}
            {{- '<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
            {{- call.function.arguments|tojson ~ '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' }}
        {{- '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' }}
    {%- endif %}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}
"""

# GLM-4.5: no turn is closed; what the model samples to stop is what opens the next message.
GLM45 = r"""[gMASK]<sop>
{%- set query = namespace(at=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- set query.at = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' or m.role == 'system' %}
        {{- '<|' ~ m.role ~ '|>\n' ~ m.content }}
    {%- elif m.role == 'assistant' %}
        {%- set said = m.content %}
        {%- set thought = '' %}
        {%- if m.reasoning_content is string %}
            {%- set thought = m.reasoning_content %}
        {%- elif '</think>' in said %}
            {%- set thought = said.split('</think>')[0].rstrip('\n') %}
            {%- set thought = thought.split('<think>')[-1].lstrip('\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|assistant|>\n<think>' }}
        {{- thought.strip() if loop.index0 > query.at }}
        {{- '</think>' }}
        {{- '\n' ~ said.strip() if said.strip() }}
        {%- for call in m.tool_calls or [] %}
            {{- '\n<tool_call>' ~ call.function.name ~ '\n' }}
            {%- for key, value in call.function.arguments.items() %}
                {{- '<arg_key>' ~ key ~ '</arg_key>\n<arg_value>' }}
                {{- (value if value is string else value|tojson) ~ '</arg_value>\n' }}
            {%- endfor %}
            {{- '</tool_call>' }}
        {%- endfor %}
    {%- elif m.role == 'tool' %}
        {{- '<|observation|>' if loop.first or loop.previtem.role != 'tool' }}
        {{- '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}
    {%- endif %}
{%- endfor %}
{{- '<|assistant|>' if add_generation_prompt }}
"""

# Llama 3.1: a system message in any case, texts trimmed, at most one call, which is the turn.
LLAMA31 = r"""
{{- bos_token }}
{%- set today = date_string if date_string is defined else strftime_now('%d %b %Y') %}
{%- set start = 1 if messages[0].role == 'system' else 0 %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' }}
{{- 'Today Date: ' ~ today ~ '\n\n' ~ (messages[0].content|trim if start else '') ~ '<|eot_id|>' }}
{%- for m in messages[start:] %}
    {%- if 'tool_calls' in m %}
        {%- if m.tool_calls|length != 1 %}
            {{- raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {{- '{"name": "' ~ call.name ~ '", "parameters": ' ~ call.arguments|tojson ~ '}' }}
        {{- '<|eot_id|>' }}
    {%- elif m.role in ['tool', 'ipython'] %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}
        {{- (m.content|tojson if m.content is iterable else m.content) ~ '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' }}
        {{- m.content|trim ~ '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt }}
"""

# Mistral Instruct: the answer follows the user's closing token, without a generation prompt.
MISTRAL = r"""
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' ~ m.content ~ '[/INST]' }}
    {%- elif m.role == 'assistant' %}
        {{- ' ' ~ m.content ~ eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}
"""

# Mistral Instruct v3: the system message moves on to the last thing that the user said.
MISTRAL_MOVING = r"""
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}
{{- bos_token }}
{%- for m in rest %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' ~ (system ~ '\n\n' if system and loop.last) ~ m.content ~ '[/INST]' }}
    {%- else %}
        {{- ' ' ~ m.content|trim ~ eos_token }}
    {%- endif %}
{%- endfor %}
"""
