#!/usr/bin/env python3
"""Runs a test under each of compute-sanitizer's tools, side by side, and prints what they found as one JSON object.

    sanitize.py LOGS PROGRAM [ARGUMENT..]

LOGS is a folder for what each tool said. Fails where a tool found something, found no test to run, or did not end.
"""

import json
import os
import re
import subprocess
import sys
import time

# Seconds after which a tool has hung.
LIMIT = 240


def main():
    logs, command = sys.argv[1], sys.argv[2:]
    os.makedirs(logs, exist_ok=True)
    start, running = time.time(), {}
    for tool in ["memcheck", "racecheck", "initcheck", "synccheck"]:
        log = open(os.path.join(logs, f"{tool}.log"), "w+")
        call = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command]
        running[tool] = subprocess.Popen(call, stdout=log, stderr=subprocess.STDOUT), log
    found = {}
    for tool, (process, log) in running.items():
        try:
            code = process.wait(max(1, LIMIT - (time.time() - start)))
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
        log.seek(0)
        text = log.read()
        # "ERROR SUMMARY: 0 errors", or racecheck's "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)".
        summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
        tests = re.search(r"test result: ok\. (\d+) passed", text)
        found[tool] = {
            "findings": int(summary[1]) if summary else None,
            "tests": int(tests[1]) if tests else 0,
            "exit_code": code,
        }
    clean = all(f["findings"] == 0 and f["tests"] > 0 and f["exit_code"] == 0 for f in found.values())
    print(json.dumps({"clean": clean, **found}, indent=1))
    sys.exit(0 if clean else 1)


main()
