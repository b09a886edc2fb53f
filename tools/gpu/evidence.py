#!/usr/bin/env python3
"""Runs a command on a machine with a GPU and writes what it proved as JSON (evidence/README.md).

    evidence.py OUT.json --what TEXT --tally BINARY [OPTION..] -- COMMAND..

Output passes through; exits with 0 if the evidence is of something that passed. Figures are the command's standard output
where that is JSON, and the counts of its "test result" lines otherwise.

    --model FILE           whose hash the evidence names
    --keep KEY,..          of the figures, only these: a report of a whole model is large
    --at-most KEY=NUMBER   fails if that figure is larger, or is not there
    --without-gpu          of a command that needs none: no GPU and no kernels are named, so no change of a kernel makes it stale
    --expect-code N,..     exit codes that are right [default: 0], of a command that is to find something
"""

import argparse
import datetime
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time


def run(command):
    """Exit code and standard output of `command`, which is shown as it comes unless it is JSON."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if not lines[0].startswith("{"):
            print(line, end="", flush=True)
    return process.wait(), "".join(lines)


def figures(output):
    try:
        return json.loads(output)
    except ValueError:
        pass
    found = re.findall(r"test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored", output)
    sums = [sum(map(int, column)) for column in zip(*found)] or [0, 0, 0]
    failed = re.findall(r"^test (\S+) \.\.\. FAILED$", output, re.MULTILINE)
    # How much of each side's logits are numbers, which a test says before it judges.
    said = re.findall(r"^(?:test \S+ \.\.\. )?(\S+: total \d+, finite .*)$", output, re.MULTILINE)
    result = {"passed": sums[0], "failed": sums[1], "ignored": sums[2], "failures": failed}
    return result | ({"logits": said} if said else {})


def hash_file(path):
    """SHA-256 of a file, kept beside it: 18 GB take ten seconds, and a session looks at the same file many times."""
    kept = path + ".sha256"
    if os.path.exists(kept) and os.path.getmtime(kept) > os.path.getmtime(path):
        with open(kept) as file:
            return file.read().strip()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(16 << 20):
            digest.update(block)
    with open(kept, "w") as file:
        file.write(digest.hexdigest())
    return digest.hexdigest()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--what", required=True)
    parser.add_argument("--tally", required=True)
    parser.add_argument("--model")
    parser.add_argument("--keep", type=lambda text: text.split(","))
    parser.add_argument("--at-most", type=lambda text: text.split("="))
    parser.add_argument("--without-gpu", action="store_true")
    parser.add_argument("--expect-code", default=[0], type=lambda text: [int(code) for code in text.split(",")])
    split = sys.argv.index("--")
    args, command = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    # Fails where there is no GPU, no driver or no compiler: then there is nothing to be evidence of.
    none = {"gpus": ["none"], "driver": "none", "nvrtc": "none", "kernel_hash": "none"}
    device = none if args.without_gpu else json.loads(subprocess.run([args.tally, "prewarm", "--json"], check=True, capture_output=True).stdout)
    start = time.time()
    code, output = run(command)
    result = figures(output)
    # A run of no test proves nothing.
    passed = code in args.expect_code and result.get("passed") != 0
    if args.at_most:
        name, limit = args.at_most
        passed = passed and isinstance(result.get(name), (int, float)) and result[name] <= float(limit)
    if args.keep:
        result = {key: value for key, value in result.items() if key in args.keep}
    record = {
        "what": args.what,
        "outcome": "passed" if passed else "failed",
        "exit_code": code,
        "command": shlex.join([os.path.basename(command[0]), *command[1:]]),
        "gpu": device["gpus"][0],
        "driver": device["driver"],
        "nvrtc": device["nvrtc"],
        # Of the kernels that are built in; where faulty ones ran in their place, the command says so.
        "kernel_hash": device["kernel_hash"],
        "model_hash": hash_file(args.model) if args.model else None,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "seconds": round(time.time() - start, 3),
        "figures": result,
    }
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    with open(args.out, "w") as file:
        json.dump(record, file, indent=1)
        file.write("\n")
    if not passed:
        print(f"evidence of a failure: {args.what} (exit code {code})", file=sys.stderr)
    sys.exit(0 if passed else code or 1)


main()
