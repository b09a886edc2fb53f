#!/usr/bin/env python3
"""Speed of `tally serve` on a GPU: streams at once, each with a prompt of random tokens and an answer of fixed length.

    serve_speed.py TALLY MODEL [--streams 1,8,32,64] [--prompt 512] [--generate 128]

Starts the server on a free port of this machine, asks over HTTP, stops it; prints JSON. For each number of streams:
tokens a second from the first request to the last token, prompts included, and while all decode; the time to the first
token and between two tokens of a stream, in milliseconds, at the median and the 99th percentile. Beside it the bare
engine's generation at the same depth, and what the server costs at one stream.
"""

import argparse
import http.client
import json
import random
import subprocess
import sys
import threading
import time


def ask(port, prompt, count, seed, barrier, arrivals):
    """One request; the time of its start and of each token."""
    body = {"model": "m", "prompt": prompt, "max_tokens": count, "stream": True, "seed": seed, "temperature": 0.8,
            "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.connect()
    barrier.wait()
    times = [time.perf_counter()]
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        arrivals.append((response.status, response.read()[:300]))
        return
    for line in response:
        # The last event has no text, only why the answer ended.
        if line.startswith(b"data: {") and b'"text":""' not in line:
            times.append(time.perf_counter())
    arrivals.append(times)


def percentile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))]


def measure(port, streams, prompt, count, rng):
    barrier, arrivals = threading.Barrier(streams), []
    prompts = [[rng.randrange(100, 1900) for _ in range(prompt)] for _ in range(streams)]
    threads = [threading.Thread(target=ask, args=(port, prompts[i], count, i, barrier, arrivals)) for i in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bad = [a for a in arrivals if isinstance(a, tuple)]
    if bad or len(arrivals) != streams:
        sys.exit(f"{streams} streams: {len(arrivals)} answered, {len(bad)} refused: {bad[:1]}")
    tokens = sum(len(times) - 1 for times in arrivals)
    start, end = min(t[0] for t in arrivals), max(t[-1] for t in arrivals)
    all_decode = max(t[1] for t in arrivals), min(t[-1] for t in arrivals)
    decoded = sum(1 for times in arrivals for t in times[1:] if all_decode[0] < t <= all_decode[1])
    first = [(t[1] - t[0]) * 1e3 for t in arrivals]
    between = [(b - a) * 1e3 for t in arrivals for a, b in zip(t[1:], t[2:])]
    return {
        "streams": streams, "prompt_tokens": prompt * streams, "tokens": tokens, "seconds": end - start,
        "tokens_per_second": tokens / (end - start),
        "decode_tokens_per_second": decoded / (all_decode[1] - all_decode[0]) if all_decode[1] > all_decode[0] else None,
        "first_token_ms": {"p50": percentile(first, 0.5), "p99": percentile(first, 0.99)},
        "between_tokens_ms": {"p50": percentile(between, 0.5), "p99": percentile(between, 0.99)},
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("tally")
    parser.add_argument("model")
    parser.add_argument("--streams", default="1,8,32,64")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    context = options.prompt + options.generate + 64
    streams = [int(n) for n in options.streams.split(",")]
    bench = [options.tally, "bench", options.model, "--device", options.device, "--json", "--prompt", "0",
             "--generate", str(options.generate), "--depth", str(options.prompt)]
    bare = json.loads(subprocess.run(bench, check=True, stdout=subprocess.PIPE).stdout)
    bare = bare["rows"][0]["tokens_per_second"]["median"]
    server = subprocess.Popen([options.tally, "serve", options.model, "--device", options.device, "--port", "0", "--ctx",
                               str(context), "--cache", str(max(streams) + 1), "--running", str(max(streams))],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = []
        for line in server.stdout:
            said.append(line)
            if line.strip() == "ready":
                break
        else:
            sys.exit("the server did not start: " + "".join(said))
        port = int("".join(said).split("http://127.0.0.1:")[1].split()[0])
        rng = random.Random(1)
        measure(port, max(streams), 16, 8, rng)  # recordings for each number of rows are made the first time
        for n in streams:
            measure(port, n, 16, 8, rng)
        rows = [measure(port, n, options.prompt, options.generate, rng) for n in streams]
    finally:
        server.terminate()
        server.wait(60)
    one = next((row for row in rows if row["streams"] == 1), None)
    cost = None if one is None or one["decode_tokens_per_second"] is None else 1 - one["decode_tokens_per_second"] / bare
    print(json.dumps({"prompt": options.prompt, "generate": options.generate, "rows": rows,
                      "bare_engine_tokens_per_second": bare, "cost_of_the_server_at_one_stream": cost}, indent=1))


if __name__ == "__main__":
    main()
