#!/usr/bin/env python3
"""Runs a test under each of compute-sanitizer's tools, and prints what they found as one JSON object.

    sanitize.py LOGS PROGRAM [ARGUMENT..]

LOGS is a folder for what each tool said. Fails where a tool found something, found no test to run, or did not end.
racecheck runs once for each family of kernels, all others left alone: it has gone down with a program that the other tools
run to its end, and then it is known at which kernels it did, and the other families have been looked at all the same. That
is no failure of the kernels, and no evidence of them either: `not_looked_at` names them, and the claim has to.
"""

import json
import os
import re
import subprocess
import sys
import time

# Seconds after which a tool has hung.
LIMIT = 240

# Beginnings of kernels' names; together with the rest, which belongs to none of them, these are all kernels.
FAMILIES = [
    "attend_one",
    "attend_split",
    "attend_stream",
    "attend_groups",
    "decode",
    "product_stream",
    "product_many",
]


def runs():
    """Name of each run, and compute-sanitizer's options for it."""
    for tool in ["memcheck", "initcheck", "synccheck"]:
        yield tool, ["--tool", tool]
    for family in FAMILIES:
        yield f"racecheck {family}", ["--tool", "racecheck", "--kernel-name", f"kns={family}"]
    rest = [option for family in FAMILIES for option in ("--kernel-name-exclude", f"kns={family}")]
    yield "racecheck rest", ["--tool", "racecheck", *rest]


def said(code, text):
    """What a run amounts to."""
    # "ERROR SUMMARY: 0 errors", or racecheck's "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)".
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    tests = re.search(r"test result: ok\. (\d+) passed", text)
    findings, passed = int(summary[1]) if summary else None, int(tests[1]) if tests else 0
    if code is None:
        outcome = "did not end"
    elif findings:
        outcome = "found something"
    elif findings == 0 and code == 0 and passed > 0:
        outcome = "clean"
    elif "process didn't terminate successfully" in text and "test result" not in text:
        # The program, which runs to its end without this tool, was killed: by a signal, whose number is the exit code.
        outcome = "crashed"
    else:
        outcome = "failed"
    return {"outcome": outcome, "findings": findings, "tests": passed, "exit_code": code}


def main():
    logs, command = sys.argv[1], sys.argv[2:]
    os.makedirs(logs, exist_ok=True)
    # Once by itself: it must run to its end, and what it compiles is kept for the others.
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=LIMIT)
    start, running = time.time(), {}
    for name, options in runs():
        log = open(os.path.join(logs, f"{name.replace(' ', '-')}.log"), "w+")
        call = ["compute-sanitizer", *options, "--error-exitcode", "9", *command]
        running[name] = subprocess.Popen(call, stdout=log, stderr=subprocess.STDOUT), log
    found = {}
    for name, (process, log) in running.items():
        try:
            code = process.wait(max(1, LIMIT - (time.time() - start)))
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
        log.seek(0)
        found[name] = said(code, log.read())
    down = [name for name, f in found.items() if f["outcome"] == "crashed" and name.split()[-1] in FAMILIES]
    passed = all(f["outcome"] == "clean" for name, f in found.items() if name not in down)
    print(json.dumps({"not_looked_at": down, "runs": found}, indent=1))
    sys.exit(0 if passed else 1)


main()
