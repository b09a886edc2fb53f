#!/usr/bin/env python3
"""Runs `tally bench` and llama.cpp's `llama-bench` on one file in turns and prints the ratios of their speeds.

The machine's own speed changes from minute to minute, more than the programs differ. So the two run right after each
other (A B, then B A, then A B ...), each pair gives one ratio, and the median of the ratios is the result: what slows
a whole pair down cancels. bench/README.md says how to build llama-bench and what is compared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the GGUF file that both run")
    parser.add_argument("--tally", type=Path, default=Path("target/release/tally"), metavar="PATH")
    parser.add_argument("--llama-bench", type=Path, required=True, metavar="PATH")
    parser.add_argument("--pairs", type=positive, default=5, metavar="N", help="pairs of runs (5)")
    parser.add_argument("--repeat", type=positive, default=1, metavar="N", help="repeats within a run (1)")
    parser.add_argument("--prompt", type=lengths, default=[512], metavar="N,..", help="prompt lengths (512); 0: none")
    parser.add_argument("--generate", type=lengths, default=[64], metavar="N,..", help="tokens to generate (64)")
    parser.add_argument("--depth", type=depths, default=[0], metavar="N,..", help="tokens in the cache before (0)")
    parser.add_argument("--threads", type=positive, default=os.cpu_count(), metavar="N", help="threads (all cores)")
    parser.add_argument("--activations", type=activations, default=["a16", "a8"], metavar="KIND,..",
                        help="Tally's activations, each against llama-bench (a16,a8)")
    parser.add_argument("--pause", type=float, default=0, metavar="SECONDS", help="wait between runs (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample here")
    return parser.parse_args()


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def depths(text):
    values = sorted({int(word) for word in text.split(",")})
    if values[0] < 0:
        raise argparse.ArgumentTypeError(f"{values[0]} is negative")
    return values


def lengths(text):
    return [value for value in depths(text) if value > 0]


def activations(text):
    kinds = text.split(",")
    if not set(kinds) <= {"a16", "a8"}:
        raise argparse.ArgumentTypeError(f"{text}: a16, a8 or both")
    return kinds


def joined(values):
    return ",".join(map(str, values or [0]))


def run(command):
    """Standard output of a command as JSON; the program ends with its error if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed with code {done.returncode}:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


def tally(options, kind):
    """Median tokens a second of each (test, tokens, depth), and the whole report."""
    report = run([options.tally, "bench", options.model, "--json", "--activations", kind,
                  "--prompt", joined(options.prompt), "--generate", joined(options.generate),
                  "--depth", joined(options.depth), "--repeat", options.repeat, "--threads", options.threads])
    speed = {(row["test"], row["tokens"], row["depth"]): row["tokens_per_second"]["median"] for row in report["rows"]}
    return speed, report


def llama(options):
    """The same of llama-bench, with its defaults: memory map, weights repacked at load, a cache of f16."""
    report = run([options.llama_bench, "-m", options.model, "-o", "json", "-t", options.threads,
                  "-p", joined(options.prompt), "-n", joined(options.generate), "-d", joined(options.depth),
                  "-r", options.repeat])
    speed = {}
    for row in report:
        test, tokens = ("prompt", row["n_prompt"]) if row["n_gen"] == 0 else ("generate", row["n_gen"])
        speed[test, tokens, row["n_depth"]] = statistics.median(row["samples_ts"])
    return speed, report


def pair(options, kind, number):
    """Runs both, llama.cpp first in every second pair; returns both results."""
    programs = {"tally": lambda: tally(options, kind), "llama.cpp": lambda: llama(options)}
    names = list(programs) if number % 2 == 0 else list(programs)[::-1]
    results = {}
    for name in names:
        print(f"pair {number + 1} of {options.pairs}, {kind}: {name} ...", file=sys.stderr)
        results[name] = programs[name]()
        time.sleep(options.pause)
    return results


def table(heading, rows):
    """A Markdown table; numbers to the right."""
    widths = [max(len(row[i]) for row in [heading, *rows]) for i in range(len(heading))]

    def line(cells):
        padded = [cell.rjust(width) for cell, width in zip(cells, widths)]
        return f"| {cells[0].ljust(widths[0])} | {' | '.join(padded[1:])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(heading), line(rule), *map(line, rows)])


def summarise(kind, pairs):
    """A row a test: medians, and median, minimum and maximum of the ratios of the pairs."""
    rows = []
    for key in pairs[0]["tally"][0]:
        if any(key not in result[name][0] for result in pairs for name in result):
            sys.exit(f"llama-bench did not report {key}: it has {sorted(pairs[0]['llama.cpp'][0])}")
        ours, theirs = ([result[name][0][key] for result in pairs] for name in ("tally", "llama.cpp"))
        ratios = [a / b for a, b in zip(ours, theirs)]
        median = statistics.median
        rows.append([f"{key[0]} {key[1]}", str(key[2]), kind, f"{median(ours):.2f}", f"{median(theirs):.2f}",
                     f"{median(ratios):.3f}", f"{min(ratios):.3f}..{max(ratios):.3f}"])
    return rows


def main():
    options = arguments()
    results = {kind: [] for kind in options.activations}
    for number in range(options.pairs):
        for kind in options.activations:
            results[kind].append(pair(options, kind, number))
    first = results[options.activations[0]][0]
    machine, build = first["tally"][1]["machine"], first["llama.cpp"][1][0]["build_commit"]
    print(f"{options.model.name} on {machine['processor']} ({machine['isa']}), {options.threads} threads; "
          f"llama.cpp {build}; {options.pairs} pairs of runs, tokens/s\n")
    rows = [row for kind, pairs in results.items() for row in summarise(kind, pairs)]
    print(table(["test", "depth", "tally", "tally tok/s", "llama.cpp tok/s", "ratio", "min..max"], rows))
    reports = [result["tally"][1] for pairs in results.values() for result in pairs]
    bandwidth = max(report["bandwidth"]["bytes_per_second"] for report in reports)
    print(f"\nMemory bandwidth, the best pass of all runs: {bandwidth / 1e9:.1f} GB/s; it allows at most")
    for row in first["tally"][1]["rows"]:
        if row["bandwidth"]:
            limit = bandwidth / row["bandwidth"]["bytes_per_token"]
            print(f"- generate {row['tokens']} at depth {row['depth']}: {limit:.1f} tokens/s")
    if options.json:
        samples = {kind: [{name: report for name, (_, report) in result.items()} for result in pairs]
                   for kind, pairs in results.items()}
        options.json.write_text(json.dumps(samples, indent=1) + "\n")


if __name__ == "__main__":
    main()
