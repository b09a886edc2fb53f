"""The official clients against a server: `python3 clients.py http://127.0.0.1:PORT`. Run by clients.rs."""

import json
import sys

import anthropic
import openai

BASE = sys.argv[1]
KEY = "sesame"
PROMPT = "fn main() {\n"
PAINT = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["red", "green"]}, "size": {"type": "integer", "maximum": 99}},
    "required": ["colour", "size"],
    "additionalProperties": False,
}

ai = openai.OpenAI(base_url=BASE + "/v1", api_key=KEY, max_retries=0, timeout=60)
claude = anthropic.Anthropic(base_url=BASE, api_key=KEY, max_retries=0, timeout=60)
MODEL = ai.models.list().data[0].id


def raises(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


def chat():
    ask = dict(model=MODEL, messages=[{"role": "user", "content": PROMPT}], max_tokens=12, seed=5)
    whole = ai.chat.completions.create(**ask)
    text = whole.choices[0].message.content
    assert text and whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 12, whole
    with ai.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.completion_tokens == 12 and chunks[-1].usage.prompt_tokens_details.cached_tokens >= 0
    scored = ai.chat.completions.create(**ask, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(scored) == 12 and all(len(s.top_logprobs) == 3 and s.logprob <= 0 for s in scored)
    assert "".join(s.token for s in scored) == text
    stopped = ai.chat.completions.create(**ask | {"stop": [text[5:9]]}).choices[0]
    assert stopped.finish_reason == "stop" and text.startswith(stopped.message.content) and text[5:9] not in stopped.message.content
    several = ai.chat.completions.create(**ask, n=3)
    assert [c.index for c in several.choices] == [0, 1, 2] and several.choices[0].message.content == text
    biased = ai.chat.completions.create(**ask | {"max_tokens": 3, "temperature": 0, "logit_bias": {"65": 100}})
    assert len(set(biased.choices[0].message.content)) == 1, biased


def chat_tools():
    tools = [{"type": "function", "function": {"name": "paint", "description": "Paint.", "parameters": PAINT}}]
    ask = dict(model=MODEL, messages=[{"role": "user", "content": "paint"}], tools=tools, tool_choice="required", seed=1, max_tokens=200)
    ask["parallel_tool_calls"] = False
    message = ai.chat.completions.create(**ask).choices[0]
    call = message.message.tool_calls[0]
    assert message.finish_reason == "tool_calls" and message.message.content is None
    assert json.loads(call.function.arguments)["colour"] in ("red", "green")
    with ai.chat.completions.stream(**ask) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert (streamed.function.name, streamed.function.arguments) == ("paint", call.function.arguments)
    back = ask["messages"] + [message.message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    again = ai.chat.completions.create(model=MODEL, messages=back, max_tokens=4)
    assert again.choices[0].finish_reason in ("length", "stop")
    shaped = ai.chat.completions.create(
        model=MODEL, messages=ask["messages"], max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "paint", "strict": True, "schema": PAINT}},
    )
    assert set(json.loads(shaped.choices[0].message.content)) == {"colour", "size"}


def completions():
    ask = dict(model=MODEL, prompt=PROMPT, max_tokens=12, seed=2)
    whole = ai.completions.create(**ask)
    pieces = [c.choices[0].text for c in ai.completions.create(**ask, stream=True)]
    assert "".join(pieces) == whole.choices[0].text and len(pieces) > 4
    echoed = ai.completions.create(**ask, echo=True, logprobs=2).choices[0]
    assert echoed.text == PROMPT + whole.choices[0].text
    lp = echoed.logprobs
    assert "".join(lp.tokens) == echoed.text and lp.token_logprobs[0] is None and lp.token_logprobs[1] <= 0
    assert [echoed.text[at : at + len(t)] for at, t in zip(lp.text_offset, lp.tokens)] == lp.tokens
    scored = ai.completions.create(**ask | {"max_tokens": 0}, echo=True, logprobs=0).choices[0]
    assert scored.text == PROMPT and len(scored.logprobs.tokens) < len(lp.tokens)


def responses():
    ask = dict(model=MODEL, input=PROMPT, max_output_tokens=10, extra_body={"seed": 4})
    whole = ai.responses.create(**ask)
    assert whole.output_text and whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage.output_tokens == 10
    kinds, text = [], ""
    for event in ai.responses.create(**ask, stream=True):
        assert event.sequence_number == len(kinds)
        kinds.append(event.type)
        text += event.delta if event.type == "response.output_text.delta" else ""
    assert text == whole.output_text and kinds[0] == "response.created" and kinds[-1] == "response.incomplete", kinds
    tools = [{"type": "function", "name": "paint", "parameters": PAINT, "strict": True}]
    call = ai.responses.create(model=MODEL, input="paint", tools=tools, tool_choice="required", parallel_tool_calls=False)
    [item] = [item for item in call.output if item.type == "function_call"]
    assert item.name == "paint" and json.loads(item.arguments)["colour"] in ("red", "green")
    with ai.responses.stream(model=MODEL, input="paint", tools=tools, tool_choice={"type": "function", "name": "paint"}) as stream:
        final = stream.get_final_response()
    assert final.status == "completed" and final.output[0].name == "paint", final
    history = [{"role": "user", "content": "paint"}, item.model_dump(), {"type": "function_call_output", "call_id": item.call_id, "output": "done"}]
    assert ai.responses.create(model=MODEL, input=history, max_output_tokens=4).status in ("completed", "incomplete")


def messages():
    ask = dict(model=MODEL, messages=[{"role": "user", "content": PROMPT}], system="Be brief.", max_tokens=10, extra_body={"seed": 6})
    whole = claude.messages.create(**ask)
    assert whole.content[0].text and whole.stop_reason == "max_tokens" and whole.usage.output_tokens == 10, whole
    with claude.messages.stream(**ask) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text and final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 10
    count = claude.messages.count_tokens(model=MODEL, messages=ask["messages"], system="Be brief.").input_tokens
    total = whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    assert count == total, (count, total)
    stop = text[4:8]
    stopped = claude.messages.create(**ask, stop_sequences=[stop])
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == stop
    tools = [{"name": "paint", "description": "Paint.", "input_schema": PAINT}]
    ask = dict(model=MODEL, messages=[{"role": "user", "content": "paint"}], max_tokens=200, tools=tools, extra_body={"seed": 1})
    ask["tool_choice"] = {"type": "any", "disable_parallel_tool_use": True}
    called = claude.messages.create(**ask)
    [use] = [block for block in called.content if block.type == "tool_use"]
    assert called.stop_reason == "tool_use" and use.name == "paint" and use.input["colour"] in ("red", "green")
    with claude.messages.stream(**ask) as stream:
        final = stream.get_final_message()
    [streamed] = [block for block in final.content if block.type == "tool_use"]
    assert streamed.input == use.input and final.stop_reason == "tool_use"
    history = ask["messages"] + [
        {"role": "assistant", "content": [block.model_dump() for block in called.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "done"}]}]},
    ]
    assert claude.messages.create(**ask | {"messages": history, "tool_choice": {"type": "auto"}, "max_tokens": 4}).usage.output_tokens <= 4


def errors():
    bad = raises(openai.BadRequestError, lambda: ai.chat.completions.create(model=MODEL, messages=[]))
    assert bad.param == "messages" and bad.code == "invalid_value", bad.body
    raises(openai.AuthenticationError, lambda: openai.OpenAI(base_url=BASE + "/v1", api_key="no", max_retries=0).models.list())
    raises(openai.NotFoundError, lambda: ai.models.retrieve("other"))
    long = raises(openai.BadRequestError, lambda: ai.completions.create(model=MODEL, prompt="word " * 9000))
    assert long.code == "context_length_exceeded"
    bad = raises(anthropic.BadRequestError, lambda: claude.messages.create(model=MODEL, messages=[], max_tokens=4))
    assert bad.body["error"]["type"] == "invalid_request_error", bad.body
    other = anthropic.Anthropic(base_url=BASE, api_key="no", max_retries=0)
    raises(anthropic.AuthenticationError, lambda: other.messages.create(model=MODEL, messages=[{"role": "user", "content": "a"}], max_tokens=4))
    assert claude.models.list().data[0].id == MODEL


for check in (chat, chat_tools, completions, responses, messages, errors):
    check()
    print(check.__name__, "ok", flush=True)
print("openai", openai.__version__, "anthropic", anthropic.__version__)
print("all checks passed")
