#!/usr/bin/env python3
"""Load on a server of this machine, and whether anything changes under it.

    python3 tools/load/load.py target/release/tally [--clients 64] [--seconds 600]

Starts `tally serve` with the model that ships, at a free port of this machine. First asks every question of a fixed set alone
and keeps the answers. Then so many clients ask for so long, with prompts of a few tokens to some hundred; a third of them
hang up at a random moment. Held to: no status but 200 and, where the queue is full, 429 with Retry-After; every completed text
and every log-probability equal to the one given alone; memory flat after the first minute; and at the end all KV blocks back,
nothing running, and an exit code of 0. Prints one JSON object. Needs Python and nothing else; asks no other machine.
"""

import argparse
import collections
import http.client
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time

SOURCES = [
    "fn main() {\n",
    "impl Iterator for Counter {\n    type Item = u32;\n\n    fn next(&mut self) -> Option<u32> {\n",
    "/// Returns the number of elements in the vector.\npub fn len(&self) -> usize {\n",
    "use std::collections::HashMap;\n\nfn count(words: &[&str]) -> HashMap<String, usize> {\n",
    "What does `Vec::push` do?",
]
QUESTIONS = 60


def question(i):
    """The i-th question: lengths, seeds and ways of choosing are mixed."""
    text = SOURCES[i % 5] * (1 + (i % 11) * 3) + SOURCES[i // 5 % 5]
    body = {"messages": [{"role": "user", "content": text}], "seed": i * 7919, "max_tokens": 4 + i % 7 * 12, "logprobs": True}
    body |= [{"temperature": 0}, {"temperature": 1.0}, {"presence_penalty": 0.4}, {"repetition_penalty": 1.05}][i % 4]
    if i % 10 == 9:
        body["guided_regex"] = "[a-z]{4,12}(, [a-z]{4,12}){2}"
    return body


def essence(answer):
    choice = answer["choices"][0]
    return json.dumps([choice["message"], choice["finish_reason"], choice["logprobs"], answer["usage"]["completion_tokens"]])


class Server:
    def __init__(self, program, extra):
        self.process = subprocess.Popen([program, "serve", "--port", "0", "--device", "cpu", *extra], stderr=subprocess.PIPE, text=True)
        lines = iter(self.process.stderr.readline, "")
        self.port = int(next(int(m[1]) for line in lines if (m := re.search(r"http://127\.0\.0\.1:(\d+)", line))))
        assert any(line.strip() == "ready" for line in lines)
        threading.Thread(target=lambda: collections.deque(lines, maxlen=0), daemon=True).start()

    def connection(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)

    def ask(self, body):
        connection = self.connection()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        return response.status, response.headers, json.loads(text)

    def hang_up(self, body, rng):
        """Asks, and leaves: at once, while waiting, or after a few pieces of the answer."""
        connection = self.connection()
        connection.request("POST", "/v1/chat/completions", json.dumps(body | {"stream": True}), {"content-type": "application/json"})
        if rng.random() < 0.5:
            time.sleep(rng.random() * 0.5)
        else:
            response = connection.getresponse()
            for _ in range(rng.randrange(12)):
                if not response.readline():
                    break
        connection.close()

    def load(self):
        connection = self.connection()
        connection.request("GET", "/load")
        load = json.loads(connection.getresponse().read())
        connection.close()
        return load

    def memory(self):
        """Resident memory in MB."""
        with open(f"/proc/{self.process.pid}/status") as status:
            return int(next(line.split()[1] for line in status if line.startswith("VmRSS"))) / 1000


def client(server, number, until, want, result, lock):
    rng = random.Random(number)
    while time.monotonic() < until:
        i = rng.randrange(QUESTIONS)
        found, seconds, tokens = "hung up", 0.0, 0
        try:
            if rng.random() < 1 / 3:
                server.hang_up(question(i), rng)
            else:
                start = time.monotonic()
                status, headers, answer = server.ask(question(i))
                seconds = time.monotonic() - start
                if status == 200:
                    found = "equal" if essence(answer) == want[i] else "DIFFERENT"
                    tokens = answer["usage"]["completion_tokens"]
                elif status == 429 and headers["retry-after"]:
                    found = "refused"
                    time.sleep(min(1, int(headers["retry-after"])))
                else:
                    found = f"STATUS {status}: {answer}"
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        with lock:
            result["outcomes"][found] += 1
            result["tokens"] += tokens
            if seconds:
                result["seconds"].append(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("serve", nargs="*", help="more arguments for `tally serve`, after --")
    args = parser.parse_args()
    if args.seconds > 3600:
        parser.error("an hour is enough")
    server = Server(args.program, args.serve)
    want = []
    for i in range(QUESTIONS):
        status, _, answer = server.ask(question(i))
        assert status == 200, answer
        want.append(essence(answer))

    lock, result = threading.Lock(), {"outcomes": collections.Counter(), "tokens": 0, "seconds": []}
    start = time.monotonic()
    clients = [
        threading.Thread(target=client, args=(server, number, start + args.seconds, want, result, lock), daemon=True)
        for number in range(args.clients)
    ]
    for thread in clients:
        thread.start()
    memory = []
    while any(thread.is_alive() for thread in clients):
        time.sleep(min(5, args.seconds / 20))
        memory.append((round(time.monotonic() - start, 1), server.memory()))
    elapsed = time.monotonic() - start

    for _ in range(100):
        load = server.load()
        if load["running"] == load["waiting"] == 0 and load["kv_blocks_available"] == load["kv_blocks"]:
            break
        time.sleep(0.1)
    server.process.send_signal(signal.SIGTERM)
    code = server.process.wait(timeout=60)

    warm = [mb for at, mb in memory if at >= min(60, elapsed / 3)]
    seconds = sorted(result["seconds"]) or [0]
    outcomes = dict(result["outcomes"])
    checks = {
        "every completed answer equals the one given alone": outcomes.get("equal", 0) > 0 and "DIFFERENT" not in outcomes,
        "nothing but what is promised": set(outcomes) <= {"equal", "hung up", "refused"},
        "memory is flat": max(warm) <= min(warm) * 1.05 + 8,
        "all blocks came back": load["running"] == load["waiting"] == 0 and load["kv_blocks_available"] == load["kv_blocks"],
        "no fault": load["engine_failures"] == load["numeric_faults"] == 0,
        "exit code 0": code == 0,
    }
    report = {
        "clients": args.clients, "seconds": round(elapsed, 1), "outcomes": outcomes,
        "tokens_per_second_of_completed": round(result["tokens"] / elapsed, 1),
        "answer_seconds": {"p50": round(seconds[len(seconds) // 2], 2), "p99": round(seconds[len(seconds) * 99 // 100], 2)},
        "memory_mb": {"first": memory[0][1], "least_after_the_first_minute": min(warm), "most_after_it": max(warm), "last": memory[-1][1]},
        "load_at_the_end": load, "checks": checks, "passed": all(checks.values()),
    }
    print(json.dumps(report, indent=1))
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
