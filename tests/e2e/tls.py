"""Drives a host over HTTP/2 within TLS with the stock OpenAI client: argv[1] is the data plane's URL, argv[2] whom to trust."""

import asyncio
import ssl
import sys

import httpx
import openai

PROMPT = {"model": "demo:f16", "prompt": "Rust is", "max_tokens": 16, "temperature": 0}
versions = set()


async def seen(response):
    versions.add(response.http_version)


async def streamed(client):
    stream = await client.completions.create(stream=True, **PROMPT)
    return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])


async def main():
    trusted = ssl.create_default_context(cafile=sys.argv[2])
    limits = httpx.Limits(max_connections=1)
    http = httpx.AsyncClient(http1=False, http2=True, verify=trusted, limits=limits, event_hooks={"response": [seen]})
    client = openai.AsyncOpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0, http_client=http)
    whole = (await client.completions.create(**PROMPT)).choices[0].text
    texts = await asyncio.gather(*(streamed(client) for _ in range(20)))
    assert whole and set(texts) == {whole}, (whole, texts)
    # One that goes away half-way takes nothing of the others with it.
    stream = await client.completions.create(stream=True, **PROMPT | {"max_tokens": 400, "extra_body": {"ignore_eos": True}})
    await stream.__anext__()
    await stream.close()
    assert await streamed(client) == whole
    assert versions == {"HTTP/2"}, versions


asyncio.run(main())
