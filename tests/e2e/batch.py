"""Batches with the stock OpenAI client: argv[1] is the base URL of the data plane; argv[2] is `begin`, `end ID` or `whole`."""

import io
import json
import sys
import time

import openai

LINES = 60
client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)


def line(number):
    body = {"model": "demo:f16", "messages": [{"role": "user", "content": f"What is {number}?"}], "max_tokens": 12, "ignore_eos": True}
    return {"custom_id": f"q-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def begin(lines, window="24h"):
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=("in.jsonl", io.BytesIO(text)), purpose="batch")
    assert (file.bytes, file.purpose, file.filename) == (len(text), "batch", "in.jsonl"), file
    assert client.files.content(file.id).read() == text
    endpoint = lines[0]["url"]
    batch = client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window=window, metadata={"who": "e2e"})
    assert batch.status == "validating" and batch.metadata == {"who": "e2e"}, batch
    return batch


def wait(batch, until):
    for _ in range(3000):
        batch = client.batches.retrieve(batch.id)
        if until(batch):
            return batch
        time.sleep(0.02)
    raise AssertionError(f"not in a minute: {batch}")


def is_over(batch):
    return batch.status in ("completed", "failed", "expired", "cancelled")


def answers(file):
    return [json.loads(line) for line in client.files.content(file).text.splitlines()] if file else []


if sys.argv[2] == "begin":
    for _ in range(20):
        batch = begin([line(n) for n in range(LINES)])
        batch = wait(batch, lambda b: is_over(b) or b.request_counts and b.request_counts.completed >= 5)
        if batch.status != "completed":
            break  # Else this process was put aside until it was over.
    assert batch.status == "in_progress", batch
    print(batch.id)
elif sys.argv[2] == "end":
    batch = wait(client.batches.retrieve(sys.argv[3]), is_over)
    assert batch.status == "completed", batch
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (LINES, LINES, 0), batch
    found = answers(batch.output_file_id)
    assert sorted(a["custom_id"] for a in found) == sorted(f"q-{n}" for n in range(LINES)), found
    for answer in found:
        body = answer["response"]["body"]
        assert answer["response"]["status_code"] == 200 and body["usage"]["completion_tokens"] == 12, answer
    assert batch.id in [b.id for b in client.batches.list(limit=1)]
else:
    wrong = line(1)
    wrong["body"]["temperature"] = 9
    prompt = [{**wrong, "custom_id": "wrong"}, line(2)]
    batch = wait(begin(prompt), is_over)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 1, 1), batch
    (fault,) = answers(batch.error_file_id)
    assert fault["custom_id"] == "wrong" and fault["response"]["status_code"] == 400, fault
    assert fault["response"]["body"]["error"]["param"] == "temperature", fault

    batch = wait(begin([line(1), {**line(2), "method": "GET"}, line(1)]), is_over)
    assert batch.status == "failed" and [e.line for e in batch.errors.data] == [2, 3], batch

    long = [{**line(n), "body": {**line(n)["body"], "max_tokens": 400}} for n in range(40)]
    batch = wait(begin(long), lambda b: b.status == "in_progress")
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = wait(batch, is_over)
    assert batch.status == "cancelled" and batch.cancelled_at, batch
    told = answers(batch.error_file_id)
    assert len(told) + len(answers(batch.output_file_id)) == 40 and told[-1]["error"]["code"] == "batch_cancelled", told[-1:]

    for _ in range(20):
        batch = wait(begin(long, window="1s"), is_over)
        assert batch.status == "expired" and batch.expired_at >= batch.expires_at, batch
        if told := answers(batch.error_file_id):
            break  # Else its second was over before its lines were read.
    assert told[-1]["error"]["code"] == "batch_expired"

    files = [file.id for file in client.files.list(purpose="batch")]
    assert client.files.delete(files[0]).deleted and files[0] not in [file.id for file in client.files.list()]
    try:
        client.files.retrieve(files[0])
        raise AssertionError("a deleted file is there")
    except openai.NotFoundError as error:
        assert files[0] in str(error), error
    print("batches are served")
