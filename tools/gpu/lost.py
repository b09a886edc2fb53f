#!/usr/bin/env python3
"""Lets a GPU fail in the middle of what it does, and looks at how `tally` ends. Prints one JSON object.

    lost.py TALLY [DEVICE]

A kernel of its own traps at a position in the middle of the text, which costs the process its context as an illegal
address or a memory error does: every later call of the driver fails. Each command must end within seconds, with exit code
1 and one line (and a hint) that names what happened.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

POSITION = 12
LIMIT = 60


def main():
    tally, device = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "cuda"
    kernels = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../crates/cuda/kernels")
    with open(os.path.join(kernels, "embed.cu")) as file:
        right = file.read()
    wait = "    wait_dependencies();\n"
    assert right.count(wait) == 1, "embed.cu waits once for the kernels ahead"
    trap = wait + f"    if (step.position[blockIdx.y] == {POSITION}) __trap();\n"
    found, passed = {}, True
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "embed.cu"), "w") as file:
            file.write(right.replace(wait, trap))
        on_device = ["--device", device, "--kernels", folder]
        long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
        cases = {
            "while generating": ["run", "--raw", "-p", "a b", "--max-tokens", "40", "--seed", "1", *on_device],
            "in a prompt": ["run", "--raw", "-p", long, "--max-tokens", "4", *on_device],
            "while comparing": ["parity", "-p", long, "--right", device, "--kernels", folder],
            "while bisecting": ["bisect", "-p", long, "--right", device, "--kernels", folder],
        }
        for name, arguments in cases.items():
            start = time.time()
            try:
                run = subprocess.run([tally, *arguments], capture_output=True, text=True, timeout=LIMIT)
                code, said = run.returncode, [line for line in run.stderr.splitlines() if line.strip()]
            except subprocess.TimeoutExpired:
                code, said = None, []
            errors = [line for line in said if line.startswith("error: ")]
            hints = [line for line in said if line.startswith(" hint: ")]
            right = code == 1 and len(errors) == 1 and len(hints) == 1 and said[-2:] == errors + hints
            passed = passed and right
            found[name] = {
                "exit_code": code,
                "error": errors[-1] if errors else None,
                "right": right,
                "seconds": round(time.time() - start, 2),
            }
    print(json.dumps({"passed": int(passed), **found}, indent=1))
    sys.exit(0 if passed else 1)


main()
