"""Codecs: bits per parameter against the bound, and speed on one core.

    .venv/bin/python -m tests.bench.codecs [--size 10000000] [--repeats 3]

A tensor of normal numbers is made ternary at each share p, coded and decoded:

    bound      (log2 C(n, k) + k) / n: positions at random and equiprobable signs
    entropy    what "ternary" takes, all bytes of the message: header, counts, magnitude, code, checksum
    golomb     what "ternary-golomb" takes, likewise
    ratio      4 n bytes over the bytes of the message

Targets: entropy coding within 1 % of the bound; STC with entropy coding, and decoding, 10 million parameters a second each.
pFedNet's own measure stands beside them for one share, as a comparison of measures, not of codecs.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common.codecs import CODECS
from common.codecs.legacy import legacy_size
from common.codecs.positions import bound_bits
from common.codecs.ternary import compress, kept
from common.numerics.rng import generator
from tests.bench.environment import write

SIZE = 10_000_000
SHARES = (0.2, 0.1, 0.04, 0.01, 1 / 400)
LEGACY_SIZE = 300_000
RUNS = 50_000
MOST_OVERHEAD, LEAST_SPEED = 0.01, 10e6


def timed(work: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """Return what the work gives and the median of its seconds, after one run that warms up."""
    result, seconds = work(), []
    for _ in range(repeats):
        began = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - began)
    return result, statistics.median(seconds)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two sets of float32 tensors are the same to the bit."""
    return all(torch.equal(left[name].view(torch.int32), right[name].view(torch.int32)) for name in right)


def share(dense: Tensor, p: float, repeats: int) -> dict[str, Any]:
    """Measure one share."""
    n, k = dense.numel(), kept(dense.numel(), p)
    (ternary, _), stc_s = timed(lambda: compress(dense, p), repeats)
    tensors, row = {"w": ternary}, {"p": p, "k": k, "stc_s": stc_s}
    row["bound"] = bound_bits(n, k, signs=True) / n
    for label, name in (("entropy", "ternary"), ("golomb", "ternary-golomb")):
        codec = CODECS[name]
        data, encode_s = timed(lambda codec=codec: codec.encode(tensors), repeats)
        back, decode_s = timed(lambda codec=codec, data=data: codec.decode(data, tensors), repeats)
        if not same(back, tensors):
            raise SystemExit(f"'{name}' did not give back what it was given at p = {p:g}")
        row[label] = {
            "bytes": len(data), "bits": 8 * len(data) / n, "overhead": 8 * len(data) / n / row["bound"] - 1,
            "ratio": 4 * n / len(data), "encode_s": encode_s, "decode_s": decode_s,
            "encode_per_s": n / (stc_s + encode_s), "decode_per_s": n / decode_s,
        }  # fmt: skip
    return row


def others(dense: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Measure the codecs of whole tensors, of masks and of runs, with the values each is for."""
    n = dense.numel()
    lengths = torch.full((RUNS,), n // RUNS)
    lengths[-1] += n - int(lengths.sum())
    stairs = dense[:RUNS].repeat_interleave(lengths)
    given = {
        "bf16": dense, "float16": dense, "mask": dense > 1.0, "piecewise": stairs, "piecewise-bf16": stairs,
        "piecewise-float16": stairs, "piecewise-ternary": compress(stairs, 0.1)[0],
    }  # fmt: skip
    rows = []
    for name, tensor in given.items():
        tensors = {"w": tensor}
        data, encode_s = timed(lambda name=name, tensors=tensors: CODECS[name].encode(tensors), repeats)
        back, decode_s = timed(
            lambda name=name, data=data, tensors=tensors: CODECS[name].decode(data, tensors), repeats
        )
        if CODECS[name].lossless and not torch.equal(back["w"], tensor):
            raise SystemExit(f"'{name}' did not give back what it was given")
        rows.append(
            {
                "codec": name, "bytes": len(data), "bits": 8 * len(data) / n,
                "encode_per_s": n / encode_s, "decode_per_s": n / decode_s,
            }
        )  # fmt: skip
    return rows


def legacy(dense: Tensor) -> dict[str, float]:
    """Measure pFedNet's "size" of a ternary update at its own p = 0.2, and ours of the same."""
    ternary = compress(dense[:LEGACY_SIZE], 0.2)[0]
    size, ours = legacy_size({"w": ternary}), len(CODECS["ternary"].encode({"w": ternary}))
    return {
        "values": size.values, "text": size.text, "deflated": size.deflated, "ratio_to_text": size.ratio,
        "ratio_to_float32": size.ratio_of_float32, "ours": ours, "our_ratio_to_float32": 4 * size.values / ours,
    }  # fmt: skip


def run(size: int, repeats: int) -> dict[str, Any]:
    """Measure everything once."""
    dense = torch.randn(size, generator=generator("bench.codecs"))
    shares = [share(dense, p, repeats) for p in SHARES]
    return {
        "parameters": size, "repeats": repeats, "threads": torch.get_num_threads(), "shares": shares,
        "others": others(dense, repeats), "legacy": legacy(dense),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "within_target": all(
            row["entropy"]["overhead"] <= MOST_OVERHEAD
            and min(row["entropy"]["encode_per_s"], row["entropy"]["decode_per_s"]) >= LEAST_SPEED
            for row in shares
        ),
        "load_average": os.getloadavg(),
    }  # fmt: skip


def show(figures: dict[str, Any]) -> None:
    """Print the tables."""
    print("p        bound    entropy  over     golomb   over     ratio    stc+enc M/s  dec M/s")
    for row in figures["shares"]:
        ours, rice = row["entropy"], row["golomb"]
        print(
            f"{row['p']:<8g} {row['bound']:.5f}  {ours['bits']:.5f}  {ours['overhead']:6.3%}  {rice['bits']:.5f}  "
            f"{rice['overhead']:6.3%}  {ours['ratio']:7.1f}  {ours['encode_per_s'] / 1e6:7.1f}      "
            f"{ours['decode_per_s'] / 1e6:7.1f}"
        )
    for row in figures["others"]:
        print(
            f"{row['codec']:18} {row['bits']:9.5f} bits  {row['encode_per_s'] / 1e6:7.1f} M/s  {row['decode_per_s'] / 1e6:7.1f} M/s"
        )
    old = figures["legacy"]
    print(
        f"pFedNet's measure of a ternary update, p = 0.2: {old['ratio_to_text']:.1f} to text, "
        f"{old['ratio_to_float32']:.1f} to float32; ours {old['our_ratio_to_float32']:.1f} to float32"
    )


def main(argv: list[str]) -> None:
    """Measure and write build/bench/codecs.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=SIZE, help="parameters")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not arguments.inner:
        # BLAS and OpenMP read their number of threads when they are loaded
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        again = [sys.executable, "-m", "tests.bench.codecs", *argv, "--inner"]
        subprocess.run(again, env=os.environ | threads, check=True)
        return
    figures = run(arguments.size, arguments.repeats)
    show(figures)
    print(write("codecs" if arguments.size == SIZE else f"codecs-{arguments.size}", figures))


if __name__ == "__main__":
    main(sys.argv[1:])
