"""What a program does with OpenAI's client: openai_client.py BASE_URL SCENARIO; prints a JSON document for the test to judge."""

import json
import sys
import threading

import openai

base, scenario = sys.argv[1:3]
client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=600)
model = client.models.list().data[0].id
PROMPT = "The capital of France is"
CHAT = [{"role": "user", "content": "Count: one, two,"}]


def refused(call):
    try:
        call()
    except openai.APIStatusError as error:
        return {"status": error.status_code, "type": type(error).__name__, "message": error.message, "body": error.body}
    return None


def plain():
    """Whole answers."""
    one = client.completions.create(model=model, prompt=PROMPT, max_tokens=6, temperature=0)
    again = client.completions.create(model=model, prompt=PROMPT, max_tokens=6, temperature=0)
    chat = client.chat.completions.create(model=model, messages=CHAT, max_tokens=5, temperature=0)
    seeds = [
        client.completions.create(model=model, prompt="Once", max_tokens=5, temperature=1.5, seed=seed).choices[0].text for seed in (3, 3, 4)
    ]
    return {
        "model": model, "retrieved": client.models.retrieve(model).id, "one": one.to_dict(), "again": again.to_dict(), "chat": chat.to_dict(),
        "seeds": seeds,
    }


def stream():
    """Answers in pieces."""
    pieces = list(client.completions.create(model=model, prompt=PROMPT, max_tokens=6, temperature=0, stream=True,
                                            stream_options={"include_usage": True}))
    chat = list(client.chat.completions.create(model=model, messages=CHAT, max_tokens=5, temperature=0, stream=True))
    whole = client.chat.completions.create(model=model, messages=CHAT, max_tokens=5, temperature=0)
    return {
        "text": "".join(piece.choices[0].text for piece in pieces if piece.choices),
        "finish": [piece.choices[0].finish_reason for piece in pieces if piece.choices],
        "usage": [piece.usage.to_dict() for piece in pieces if piece.usage],
        "chat": "".join(piece.choices[0].delta.content or "" for piece in chat if piece.choices),
        "role": chat[0].choices[0].delta.role,
        "chat_usage": [piece.usage for piece in chat if piece.usage],
        "whole": whole.choices[0].message.content,
        "ids": len({piece.id for piece in chat}),
    }


def stop():
    """Stop words, whole and in pieces: ` Paris.\\n\\n...` ends before them."""
    whole = client.completions.create(model=model, prompt=PROMPT, max_tokens=6, temperature=0, stop=["\n\n", "never"])
    pieces = list(client.completions.create(model=model, prompt=PROMPT, max_tokens=6, temperature=0, stop=".", stream=True))
    return {
        "text": whole.choices[0].text, "finish": whole.choices[0].finish_reason,
        "streamed": "".join(piece.choices[0].text for piece in pieces), "streamed_finish": pieces[-1].choices[0].finish_reason,
    }


def errors():
    """What is refused, and how."""
    create, chat = client.completions.create, client.chat.completions.create
    return {
        "model": refused(lambda: create(model="other", prompt="x")),
        "n": refused(lambda: create(model=model, prompt="x", n=2)),
        "temperature": refused(lambda: create(model=model, prompt="x", temperature=9)),
        "long": refused(lambda: create(model=model, prompt="word " * 3000)),
        "empty": refused(lambda: chat(model=model, messages=[])),
        "image": refused(lambda: chat(model=model, messages=[
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}])),
        "typo": refused(lambda: create(model=model, prompt="x", extra_body={"temprature": 1})),
    }


def abort():
    """A reader that leaves in the middle."""
    pieces = client.completions.create(model=model, prompt="Once upon a time", max_tokens=400, temperature=0, stream=True)
    first = next(iter(pieces)).choices[0].text
    pieces.close()
    after = client.completions.create(model=model, prompt=PROMPT, max_tokens=2, temperature=0)
    return {"first": first, "after": after.choices[0].text}


def overload():
    """More at once than may wait; nobody who is refused is refused for another reason, and all others are answered."""
    results = []

    def ask():
        error = refused(lambda: results.append(client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0).choices[0].text))
        if error:
            results.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    after = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
    return {"results": results, "after": after.choices[0].text}


print(json.dumps({"plain": plain, "stream": stream, "stop": stop, "errors": errors, "abort": abort, "overload": overload}[scenario]()))
