"""Job lists of replica_gpt.py: which settings are trained in which stage.

Stage "one" was run before windows 2 to 5 had their present meaning: in its results
``win=2`` used the t-value of per-step alignments and ``win=3`` the present lag times K.
Stage "three" (slow worth, drift with the chosen gain) has not been run.
"""

from __future__ import annotations

import itertools

DEFAULTS = dict(
    name="",
    tag="",
    task="pre",
    N=100,
    lr=1e-3,
    kind="lin",
    seed=0,
    wd=0.1,
    warm=0.1,
    prio=1,
    cost=0,
    on=0,
    a0=0.1,
    eta=0.25,
    rho=0.8,
    t0=1.0,
    amax=256.0,
    down=1.0,
    target=0,  # one-step gain
    bon=0,
    b0=0.25,
    beta_eta=0.05,
    brho=0.98,
    bt0=1.0,
    bmax=8.0,
    beta=0.97,  # continuous drift
    win=0,
    K=40,
    wa0=0.25,
    weta=0.4,
    wmax=8.0,
    wc0=0.0,  # drift in windows
    emode=0,
    eff=1.0,
    erho=0.9,
    Hmax=32,
    hdecay=0,
    wrho=0.0,  # step consumption
)
FT = (3e-5, 1e-4, 3e-4, 1e-3)
PRE = (1e-4, 3e-4, 1e-3)


def stage_jobs(stage: str, tiny: bool) -> list[dict]:
    jobs: list[dict] = []

    def add(name: str, prio: int, **kw: object) -> None:
        jobs.append(dict(name=name, prio=prio, **kw))

    add("pretrain", 0, N=1200, lr=3e-3 if tiny else 1e-3, kind="wsd")
    dict(one=stage_one, two=stage_two, three=stage_three)[stage](add)
    for j in jobs:
        j.setdefault("task", "pre")
        share = 1.0
        if j.get("emode"):
            share = 0.5 if j["task"] == "ft" else 0.9
        j["cost"] = int(j["N"] * share)
    return jobs


def stage_one(add) -> None:
    for lr in FT:
        for n in (25, 50, 100, 200, 400, 800, 1600):
            add("base", 0, task="ft", N=n, lr=lr)
    for lr in PRE:
        for n in (200, 400, 800, 1600):
            add("base", 0, N=n, lr=lr, kind="wsd")
    for t0, a0, eta, rho in itertools.product(
        (1.0, 2.0), (0.1, 1.0), (0.25, 0.5), (0.8, 0.9)
    ):
        g = dict(on=1, t0=t0, a0=a0, eta=eta, rho=rho)
        half = ((t0 == 2) + (a0 == 1) + (eta == 0.5) + (rho == 0.9)) % 2 == 0
        for lr in FT:
            add("gain", 1, task="ft", N=100, lr=lr, **g)
            if half:
                add("gain", 1, task="ft", N=400, lr=lr, **g)
        if half:
            for lr in PRE:
                add("gain", 1, N=800, lr=lr, kind="wsd", **g)
    for extra in (dict(down=2.0), dict(amax=16.0), dict(rho=0.95, eta=0.1)):
        for lr in FT:
            for n in (100, 400):
                add("gain", 3, task="ft", N=n, lr=lr, on=1, **extra)
        for lr in PRE:
            add("gain", 3, N=800, lr=lr, kind="wsd", on=1, **extra)
    cont = [
        dict(bon=1, beta=be, beta_eta=e)
        for be, e in ((0.97, 0.02), (0.97, 0.1), (0.985, 0.05))
    ]
    cont.append(dict(bon=1, bmax=2.0, b0=0.05))
    both = [dict(bon=1, on=1), dict(bon=1, on=1, t0=2.0, bt0=2.0, b0=0.1)]
    wins = [dict(win=1), dict(win=1, on=1), dict(win=2), dict(win=3), dict(win=1, K=20)]
    for seed in (0, 1):
        if seed:
            add("base", 2, N=800, lr=1e-3, kind="wsd", seed=seed)
            add("gain", 2, N=800, lr=1e-3, kind="wsd", seed=seed, on=1)
        for d in (*wins, *cont, *both):
            add("drift", 2, N=800, lr=1e-3, kind="wsd", seed=seed, **d)
        for d in (
            dict(beta=0.97),
            dict(beta=0.985),
            dict(on=1),
            dict(win=1),
            dict(win=1, on=1),
            dict(win=3),
            dict(bon=1),
            dict(bon=1, on=1),
        ):
            add("drift", 2, N=800, lr=1e-3, kind="const", seed=seed, **d)
    gains = (dict(on=1), dict(on=1, a0=1.0, eta=0.5))
    effs = (
        dict(emode=1, eff=0.25),
        dict(emode=1, eff=0.5),
        dict(emode=1, eff=1.0),
        dict(emode=2),
        dict(emode=3, eff=0.5),
        dict(emode=3, eff=1.0),
    )
    for g, e in itertools.product(gains, effs):
        for lr in FT:
            for n in (100, 400, 800):
                add("consume", 2, task="ft", N=n, lr=lr, **g, **e)
        if g is gains[0]:
            for lr in (3e-4, 1e-3):
                add("consume", 2, N=800, lr=lr, kind="wsd", **g, **e)


DEAD = dict(on=1)
GAINS = dict(
    dead1=DEAD,
    dead2=dict(on=1, t0=2.0, a0=1.0),
    dead2low=dict(on=1, t0=2.0),
    dead1cap=dict(on=1, amax=16.0),
    dead2cap=dict(on=1, t0=2.0, a0=1.0, amax=16.0),
    aim1low=dict(on=1, target=1),
    aim2low=dict(on=1, target=1, t0=2.0),
    aim1=dict(on=1, target=1, a0=1.0),
    aim2=dict(on=1, target=1, t0=2.0, a0=1.0),
    aim3=dict(on=1, target=1, t0=3.0, a0=1.0),
    aim2fast=dict(on=1, target=1, t0=2.0, a0=1.0, rho=0.6),
    aim2cap=dict(on=1, target=1, t0=2.0, a0=1.0, amax=16.0),
    aim2mid=dict(on=1, target=1, t0=2.0, a0=1.0, amax=64.0),
    aim1cap=dict(on=1, target=1, a0=1.0, amax=16.0),
)


def stage_two(add) -> None:
    for lr in FT:
        for n in (25, 50, 100, 200, 400, 800, 1600):
            add("base", 0, task="ft", N=n, lr=lr)
        for n in (100, 400, 800):
            add("base", 2, task="ft", N=n, lr=lr, seed=1)
    for lr in PRE:
        for n in (200, 400, 800, 1600):
            add("base", 0, N=n, lr=lr, kind="wsd")
    for tag, g in GAINS.items():
        for lr in FT:
            for n in (100, 400):
                add("gain", 1, task="ft", N=n, lr=lr, tag=tag, **g)
                if tag in ("dead2", "aim1", "aim2", "aim2cap"):
                    add("gain", 2, task="ft", N=n, lr=lr, tag=tag, seed=1, **g)
        if tag in ("dead2low", "dead2cap", "aim1low", "aim1", "aim2", "aim2mid"):
            for lr in PRE:
                add("gain", 1, N=800, lr=lr, kind="wsd", tag=tag, **g)
    for lr in PRE:
        add("base", 3, N=800, lr=lr, kind="cos")
        add("gain", 3, N=800, lr=lr, kind="cos", tag="aim2", **GAINS["aim2"])
    stage_two_drift(add)
    stage_two_consume(add)


def stage_two_drift(add) -> None:
    s = GAINS["aim2"]
    tuned = dict(
        w1=dict(win=1),
        w2=dict(win=2),
        w3=dict(win=3),
        w4=dict(win=4),
        w4k80=dict(win=4, K=80),
        w3k20=dict(win=3, K=20),
        w2fix=dict(win=2, weta=0.0, wa0=0.8),
        w3fix=dict(win=3, weta=0.0, wa0=0.8),
        none={},
        s=s,
        w2s=dict(win=2, **s),
        w3s=dict(win=3, **s),
        w4s=dict(win=4, **s),
    )
    for seed in (0, 1):
        for tag, d in tuned.items():
            if seed or tag not in ("none", "s"):
                add("drift", 1, N=800, lr=1e-3, kind="wsd", seed=seed, tag=tag, **d)
        for tag in ("none", "w2", "w3", "w2s"):
            add(
                "drift",
                2,
                N=800,
                lr=1e-3,
                kind="const",
                seed=seed,
                tag=tag,
                beta=0.97,
                **tuned[tag],
            )
    low = dict(
        w1=dict(win=1),
        w2=dict(win=2),
        w2k20=dict(win=2, K=20),
        w2fast=dict(win=2, weta=1.0, wmax=64.0),
        w3=dict(win=3),
        w4=dict(win=4),
        w3fast=dict(win=3, weta=1.0, wmax=64.0),
        w2s=tuned["w2s"],
        w3s=tuned["w3s"],
    )
    for lr in (1e-4, 3e-4):
        for tag, d in low.items():
            add("drift", 2, N=800, lr=lr, kind="wsd", tag=tag, **d)
    for lr in FT:
        for tag in ("w2", "w2s", "w3s"):
            add("drift", 2, task="ft", N=400, lr=lr, tag=tag, **tuned[tag])


def stage_two_consume(add) -> None:
    modes = dict(
        trap=dict(emode=2),
        gate=dict(emode=3),
        both=dict(emode=4),
        half=dict(emode=3, eff=0.5),
    )
    arms = {
        (g, e, 16, 0): 2
        for g in ("aim2", "aim2cap", "aim1cap", "dead1cap")
        for e in ("trap", "gate", "both")
    }
    arms |= {("aim2cap", "half", 16, 0): 2, ("aim2", "half", 16, 0): 3}
    arms |= {(g, e, 32, 1): 2 for g in ("aim2", "aim2cap") for e in ("trap", "both")}
    for (g, e, top, decay), prio in arms.items():
        kw = dict(
            tag=f"{g}/{e}/{top}{'d' if decay else ''}",
            Hmax=top,
            hdecay=decay,
            **GAINS[g],
            **modes[e],
        )
        for lr in FT:
            for n in (100, 400, 800):
                add("consume", prio if n < 800 else 3, task="ft", N=n, lr=lr, **kw)
        if g in ("aim2", "aim2cap") and e in ("trap", "both") and top == 16:
            for lr in PRE:
                add("consume", 3, N=800, lr=lr, kind="wsd", **kw)
        if top == 32:
            for n in (100, 400, 800):
                add("consume", 2, task="ft", N=n, lr=3e-5, **{**kw, "warm": 0.03})
    for n in (100, 400, 800):
        add("base", 0, task="ft", N=n, lr=3e-5, warm=0.03)


def stage_three(add) -> None:
    """Consumption with a slowly rising worth, and both movers together."""
    best = GAINS["dead1cap"]
    slow = dict(
        both=dict(emode=4),
        slow95=dict(emode=4, wrho=0.95),
        slow98=dict(emode=4, wrho=0.98),
        half95=dict(emode=4, eff=0.5, wrho=0.95),
        trap95=dict(emode=2, wrho=0.95),
    )
    for lr in FT:
        for n in (25, 50, 100, 200, 400, 800, 1600):
            add("base", 0, task="ft", N=n, lr=lr)
        for n in (100, 200, 400, 800):
            for tag, e in slow.items():
                add("consume", 1, task="ft", N=n, lr=lr, tag=tag, Hmax=16, **best, **e)
        for n in (100, 400):
            add("drift", 1, task="ft", N=n, lr=lr, tag="w2s", win=2, **best)
    for lr in PRE:
        add("base", 0, N=800, lr=lr, kind="wsd")
        for tag, d in dict(w2s=dict(win=2), w2k20s=dict(win=2, K=20)).items():
            add("drift", 1, N=800, lr=lr, kind="wsd", tag=tag, **best, **d)
