"""Trains many small GPTs at once, one per slot, to compare rules for predicted moves.

Every slot ("replica") has its own job: task, seed, learning rate, schedule, length and
rule. A slot whose job has ended takes the next, so that settings of any length share
the GPU. Weights live in one (replicas, chunks, width) buffer; each chunk belongs to one
tensor, so per-tensor dot products are sums over chunks. Symbols and outcome:
docs/research-notes.md, "Default rule". Runs on its own files and torch alone.

Usage: python replica_gpt.py one|two|three [--slots 24] [--limit 170] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from replica_engine import Engine
from replica_jobs import DEFAULTS, stage_jobs
from replica_model import DEV, Corpus, Replicas


def main() -> None:
    ap = argparse.ArgumentParser()
    ap.add_argument("stage")
    ap.add_argument("--slots", type=int, default=24)
    ap.add_argument("--limit", type=float, default=170, help="seconds for training")
    ap.add_argument("--out", default="result.json")
    ap.add_argument("--tiny", action="store_true", help="a smoke test on a CPU")
    ap.add_argument("--eager", action="store_true")
    o = ap.parse_args()
    begin = time.time()
    jobs = stage_jobs(o.stage, o.tiny)
    model = Replicas(o.slots, *((48, 2, 4, 48) if o.tiny else (256, 6, 8, 256)))
    eng = Engine(
        model,
        Corpus(1_500_000 if o.tiny else 12_000_000),
        8 if o.tiny else 16,
        DEV == "cuda" and not o.eager,
    )
    print(
        f"jobs {len(jobs)} replica-steps {sum(j['cost'] for j in jobs)} "
        f"setup {time.time() - begin:.1f}s",
        flush=True,
    )
    jobs.sort(key=lambda j: (-(j["name"] == "pretrain"), -j["cost"]))
    done, rows, lags, idle = [], [], [], set(range(o.slots))
    steps, t60, _trimmed = 0, 0.0, False
    while True:
        for r in sorted(idle):
            k = next(
                (
                    i
                    for i, j in enumerate(jobs)
                    if j["task"] == "pre" or eng.base is not None
                ),
                None,
            )
            if k is not None:
                eng.fill(r, jobs.pop(k))
                idle.discard(r)
        if len(idle) == o.slots:
            break
        ended = eng.step().tolist()
        steps += 1
        if steps == 20:
            t60 = time.time()
            print(f"first 20 steps at {t60 - begin:.1f}s", flush=True)
        if steps == 60:
            ms = (time.time() - t60) / 40
            room = (o.limit - (time.time() - begin)) / ms * o.slots * 0.93 - sum(
                j["N"] for j in eng.job if j
            )
            print(f"{ms * 1e3:.1f} ms/step, room {room:.0f} replica-steps", flush=True)
            keep = []
            for j in sorted(jobs, key=lambda j: j["prio"]):
                room -= j["cost"]
                if room > 0:
                    keep.append(j)
            print(
                f"dropped {len(jobs) - len(keep)} of {len(jobs)} waiting jobs",
                flush=True,
            )
            jobs = sorted(keep, key=lambda j: -j["cost"])
        if time.time() - begin > o.limit:
            print(
                f"limit reached, {o.slots - len(idle)} running and "
                f"{len(jobs)} waiting jobs lost",
                flush=True,
            )
            break
        for r, e in enumerate(ended):
            if e and r not in idle:
                done.append(eng.result(r))
                rows.append(model.P[r].clone())
                lags.append(model.P[r] - eng.V[r])
                if eng.job[r]["name"] == "pretrain":
                    eng.base = model.P[r].clone()
                eng.job[r] = None
                idle.add(r)
    print(f"training done: {steps} steps at {time.time() - begin:.1f}s", flush=True)
    tasks = [d["job"]["task"] for d in done]
    for d, plain, ema in zip(
        done, eng.evaluate(rows, tasks), eng.evaluate(lags, tasks), strict=True
    ):
        d["loss"], d["ema_loss"] = plain, ema
        d["job"] = {
            k: v
            for k, v in d["job"].items()
            if v != DEFAULTS.get(k) or k in ("task", "N", "lr", "kind", "seed")
        }
    meta = dict(
        stage=o.stage,
        device=torch.cuda.get_device_name() if DEV == "cuda" else "cpu",
        torch=torch.__version__,
        steps=steps,
        slots=o.slots,
        parameters=model.C * model.d,
        seconds=round(time.time() - begin, 1),
    )
    Path(o.out).write_text(json.dumps(dict(meta=meta, runs=done)))
    print(f"evaluated at {time.time() - begin:.1f}s; {len(done)} runs", flush=True)


if __name__ == "__main__":
    main()
