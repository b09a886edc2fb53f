#!/usr/bin/env python3
"""Speed of `tally serve` on a GPU: streams at once, each with a prompt of random tokens and an answer of fixed length.

    serve_speed.py TALLY MODEL [--streams 1,8,32,64] [--prompt 512] [--generate 128] [--ask '{"repetition_penalty": 1.05}']
    serve_speed.py --at PORT [--streams ..]                  a server that runs already

Starts the server on a free port of this machine, asks over HTTP, stops it; prints JSON. For each number of streams:
tokens a second from the first request to the last token, prompts included, and while all decode; the time to the first
token and between two tokens of a stream, in milliseconds, at the median and the 99th percentile. Beside it the bare
engine's generation at the same depth, and what the server costs at one stream.

All streams are read by one thread that does nothing but note when bytes came: a thread for each would wait for the others
(and Python's lock), and its waiting would look like the server's.
"""

import argparse
import json
import random
import selectors
import socket
import subprocess
import sys
import time

PATIENCE = 300


class Stream:
    """One request: when it was sent, and when each token came."""

    def __init__(self, port, prompt, count, seed, more):
        body = {"model": "m", "prompt": prompt, "max_tokens": count, "stream": True, "seed": seed, "temperature": 0.8,
                "ignore_eos": True, "stream_options": {"include_usage": True}, **more}
        body = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n" \
               f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self.request, self.text, self.times, self.counted, self.all = head.encode() + body, b"", [], None, b""
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)

    def begin(self):
        self.times.append(time.perf_counter())
        self.socket.sendall(self.request)

    def take(self):
        """Reads what is there; false at the end."""
        data = self.socket.recv(1 << 16)
        now = time.perf_counter()
        self.text += data
        *events, self.text = self.text.split(b"\n\n")
        for event in events:
            if b'"usage":{' in event:
                self.counted = json.loads(event[event.index(b"data: ") + 6:])["usage"]["completion_tokens"]
            # The last event of text is empty, and says only why the answer ended.
            elif b'"text":"' in event and b'"text":""' not in event:
                self.times.append(now)
            elif b'"error"' in event:
                self.all = event
        self.all = self.all or (self.text[:300] if not data else b"")
        return bool(data)


def run(streams):
    """Reads all streams to their end."""
    selector = selectors.DefaultSelector()
    for stream in streams:
        selector.register(stream.socket, selectors.EVENT_READ, stream)
    for stream in streams:
        stream.begin()
    left = len(streams)
    while left:
        ready = selector.select(PATIENCE)
        if not ready:
            sys.exit(f"nothing came for {PATIENCE} seconds")
        for key, _ in ready:
            if not key.data.take():
                selector.unregister(key.fileobj)
                key.fileobj.close()
                left -= 1


def percentile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))]


def rate(times, start, end):
    """Tokens a second of one stream between two moments: over the time from the first to the last that fall between."""
    times = [t for t in times if start <= t <= end]
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0


def measure(port, streams, prompt, count, rng, more):
    prompts = [[rng.randrange(100, 1900) for _ in range(prompt)] for _ in range(streams)]
    asked = [Stream(port, prompts[i], count, i, more) for i in range(streams)]
    run(asked)
    # A token may end within a character, which comes with the next: some do.
    for one in asked:
        if one.counted != count or len(one.times) - 1 < count / 2:
            sys.exit(f"{streams} streams: {one.counted} of {count} tokens, {len(one.times) - 1} pieces: {one.all[:300]}")
    arrivals, tokens = [one.times for one in asked], count * streams
    start, end = min(t[0] for t in arrivals), max(t[-1] for t in arrivals)
    all_decode = max(t[1] for t in arrivals), min(t[-1] for t in arrivals)
    # Pieces to tokens, where some have two.
    decoded = sum(rate(t[1:], *all_decode) * count / (len(t) - 1) for t in arrivals)
    first = [(t[1] - t[0]) * 1e3 for t in arrivals]
    between = [(b - a) * 1e3 for t in arrivals for a, b in zip(t[1:], t[2:])]
    return {
        "streams": streams, "prompt_tokens": prompt * streams, "tokens": tokens, "seconds": end - start,
        "tokens_per_second": tokens / (end - start),
        "decode_tokens_per_second": decoded or None,
        "first_token_ms": {"p50": percentile(first, 0.5), "p99": percentile(first, 0.99)},
        "between_tokens_ms": {"p50": percentile(between, 0.5), "p99": percentile(between, 0.99)},
    }


def rows(port, options):
    streams, rng = [int(n) for n in options.streams.split(",")], random.Random(1)
    # A number of rows is launched stage by stage the first time, recorded the second and replayed from then on.
    for n in 3 * streams:
        measure(port, n, 16, 24, rng, options.ask)
    return [measure(port, n, options.prompt, options.generate, rng, options.ask) for n in streams]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("tally", nargs="?")
    parser.add_argument("model", nargs="?")
    parser.add_argument("--streams", default="1,8,32,64")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ask", type=json.loads, default={}, metavar="JSON", help="fields of every request besides")
    parser.add_argument("--at", type=int, metavar="PORT")
    options = parser.parse_args()
    if options.at:
        print(json.dumps(rows(options.at, options), indent=1))
        return
    if not options.model:
        parser.error("TALLY and MODEL, or --at PORT")
    context, most = options.prompt + options.generate + 64, max(int(n) for n in options.streams.split(","))
    bench = [options.tally, "bench", options.model, "--device", options.device, "--json", "--prompt", "0",
             "--generate", str(options.generate), "--depth", str(options.prompt)]
    bare = json.loads(subprocess.run(bench, check=True, stdout=subprocess.PIPE).stdout)
    bare = bare["rows"][0]["tokens_per_second"]["median"]
    server = subprocess.Popen([options.tally, "serve", options.model, "--device", options.device, "--port", "0", "--ctx",
                               str(context), "--cache", str(most + 1), "--running", str(most)],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = []
        for line in server.stdout:
            said.append(line)
            if line.strip() == "ready":
                break
        else:
            sys.exit("the server did not start: " + "".join(said))
        found = rows(int("".join(said).split("http://127.0.0.1:")[1].split()[0]), options)
    finally:
        server.terminate()
        server.wait(60)
    one = next((row for row in found if row["streams"] == 1), None)
    cost = None if one is None or one["decode_tokens_per_second"] is None else 1 - one["decode_tokens_per_second"] / bare
    print(json.dumps({"prompt": options.prompt, "generate": options.generate, **options.ask, "rows": found,
                      "bare_engine_tokens_per_second": bare, "cost_of_the_server_at_one_stream": cost}, indent=1))


if __name__ == "__main__":
    main()
