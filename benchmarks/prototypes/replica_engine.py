"""The rules of replica_gpt.py: AdamW, predicted moves, gains, step consumption."""

from __future__ import annotations

import math

import torch
from replica_jobs import DEFAULTS
from replica_model import DEV, Corpus, Replicas, block, head_loss

KINDS = {"const": 0, "lin": 1, "cos": 2, "wsd": 3}
STATS = ("w", "e", "ratio", "gain", "drift", "ev", "t", "eff", "H")


def observe(G, S, V):
    """Chunk sums of g.g, g.s and g.v for the new gradient and the last directions."""
    return (G * G).sum(-1), (G * S).sum(-1), (G * V).sum(-1)


def advance(P, G, M1, M2, S, V, decay, a, b, lr, wd, c1, c2, b1, b2, beta, clip):
    """AdamW step, lag and move in one pass; chunk sums with the new s and v."""
    g = G * clip
    M1.copy_(M1 * b1 + g * (1 - b1))
    M2.copy_(M2 * b2 + g * g * (1 - b2))
    S.copy_(-lr * ((M1 / c1) / ((M2 / c2).sqrt() + 1e-8) + wd * decay * P))
    V.copy_(beta * (V + S))
    P.copy_(P + S * (1 + a) + b * ((1 - beta) / beta) * V)
    return (G * S).sum(-1), (G * V).sum(-1), (S * S).sum(-1), (V * V).sum(-1)


class Significance:
    """Running mean of alignments over its standard error, per replica and tensor."""

    def __init__(self, slots: int, width: int) -> None:
        self.z = torch.zeros(slots, width, device=DEV)
        self.q = torch.zeros_like(self.z)
        self.n = torch.zeros(slots, 1, device=DEV)

    def update(
        self, c: torch.Tensor, rho: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        self.z = torch.where(seen, rho * self.z + (1 - rho) * c, self.z)
        self.q = torch.where(seen, rho * self.q + (1 - rho) * c * c, self.q)
        self.n = self.n + seen
        bc = (1 - rho**self.n).clamp(min=1e-6)
        m = self.z / bc
        sd = (self.q / bc - m * m).clamp(min=0).sqrt()
        self.mean, self.error = m, sd * ((1 - rho) / (1 + rho)).sqrt() + 0.01
        return m / self.error

    def reset(self, r: int) -> None:
        for v in (self.z, self.q, self.n):
            v[r] = 0


def log_step(
    t: torch.Tensor,
    t0: torch.Tensor,
    eta: torch.Tensor,
    down: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    """Change of a log gain: none while |t| < t0, or (target) shrinking below t0."""
    s = eta * torch.where(
        target > 0,
        ((t - t0) / 2).clamp(-1, 1),
        t.sign() * ((t.abs() - t0) / 2).clamp(0, 1),
    )
    return torch.where(s < 0, s * down, s)


class Engine:
    """Steps all replicas and refills slots."""

    def __init__(
        self, model: Replicas, corpus: Corpus, batch: int, compiled: bool
    ) -> None:
        self.m, self.data, self.B = model, corpus, batch
        R, nt = model.R, len(model.shapes)
        self.M1, self.M2, self.S, self.V = (torch.zeros_like(model.P) for _ in range(4))
        self.cfg = {
            k: torch.full((R, 1), float(v), device=DEV)
            for k, v in DEFAULTS.items()
            if isinstance(v, int | float)
        }
        self.cfg["kind"] = torch.zeros(R, 1, device=DEV)
        z = lambda *s: torch.zeros(*s, device=DEV)  # noqa: E731
        self.a, self.b, self.ss, self.vv, self.pend = (
            z(R, nt),
            z(R, nt),
            z(R, nt),
            z(R, nt),
            z(R, 1),
        )
        self.pos, self.real, self.worth = z(R, 1), z(R, 1), z(R, 1)
        self.sig_a, self.sig_b, self.sig_e, self.sig_r = (
            Significance(R, w) for w in (nt, nt, 1, 1)
        )
        self.acc = z(R, 3, len(STATS) + 1)
        self.job: list[dict | None] = [None] * R
        self.gen = [torch.Generator() for _ in range(R)]
        self.win: dict[int, dict] = {}
        self.base: torch.Tensor | None = None
        self.observe, self.advance = observe, advance
        if compiled:
            self.observe, self.advance = torch.compile(observe), torch.compile(advance)
            model.block, model.head_loss = (
                torch.compile(block),
                torch.compile(head_loss),
            )

    def fill(self, r: int, job: dict) -> None:
        job = {**DEFAULTS, **job}
        self.job[r] = job
        for k, col in self.cfg.items():
            col[r] = float(KINDS[job[k]] if k == "kind" else job[k])
        self.cfg["warm"][r] = min(100, int(job["N"] * job["warm"]))
        self.m.P[r] = self.base if job["task"] == "ft" else self.m.init(job["seed"])
        for v in (
            self.M1,
            self.M2,
            self.S,
            self.V,
            self.ss,
            self.vv,
            self.pend,
            self.pos,
            self.real,
            self.worth,
            self.acc,
        ):
            v[r] = 0
        self.a[r], self.b[r] = job["a0"], job["b0"]
        for s in (self.sig_a, self.sig_b, self.sig_e, self.sig_r):
            s.reset(r)
        self.gen[r].manual_seed(job["seed"] + 7)
        self.win.pop(r, None)
        if job["win"]:
            nt = len(self.m.shapes)
            zero = torch.zeros_like(self.m.P[r])
            self.win[r] = dict(
                D=zero.clone(),
                g=zero.clone(),
                d=None,
                n=0,
                a=torch.full((nt,), job["wa0"], device=DEV),
                c=torch.zeros(3, nt, device=DEV),
            )

    def tensor_sums(self, chunks: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(chunks.shape[0], len(self.m.shapes), device=DEV)
        return out.index_add_(1, self.m.tensor_of_chunk, chunks)

    def lr_factor(self) -> torch.Tensor:
        c, t = self.cfg, self.pos
        f = ((t - c["warm"]) / (c["N"] - c["warm"]).clamp(min=1)).clamp(0, 1)
        wsd = ((1 - f) / 0.3).clamp(max=1)
        k = c["kind"]
        fac = torch.where(
            k == 1,
            1 - f,
            torch.where(
                k == 2,
                0.5 * (1 + torch.cos(math.pi * f)),
                torch.where(k == 3, wsd, torch.ones_like(f)),
            ),
        )
        return torch.where(t < c["warm"], (t + 1) / c["warm"].clamp(min=1), fac)

    def step(self) -> torch.Tensor:
        """One real step of every replica, with its move; says which jobs have ended."""
        m, _c = self.m, self.cfg
        x, y = self.data.windows(
            torch.stack(
                [
                    self.data.starts((j or DEFAULTS)["task"], "train", self.B, m.T, g)
                    for j, g in zip(self.job, self.gen, strict=True)
                ]
            ),
            m.T,
        )
        m.G.zero_()
        m.loss(x, y).sum().backward()
        with torch.no_grad():
            return self._move()

    def _move(self) -> torch.Tensor:
        m, c = self.m, self.cfg
        gg, gs, gv = (self.tensor_sums(v) for v in self.observe(m.G, self.S, self.V))
        seen = self.real > 0
        moving = (self.pos >= c["warm"]) & (self.real >= 2)
        cs = -gs / ((gg * self.ss).sqrt() + 1e-20)
        cv = -gv / ((gg * self.vv).sqrt() + 1e-20)
        e = (
            -(self.a * gs).sum(1, keepdim=True)
            / (
                (self.a.square() * self.ss).sum(1, keepdim=True)
                * gg.sum(1, keepdim=True)
                + 1e-30
            ).sqrt()
        )
        te = self.sig_e.update(e, c["erho"], seen)
        # trapezoid: slope along the last move at its end over the slope at its start
        end = -(self.a * gs).sum(1, keepdim=True)
        ratio = (end / self.pend.clamp(min=1e-20)).clamp(-1, 1)
        self.sig_r.update((1 + ratio) / 2, c["erho"], seen & (self.pend > 0))
        ta, tb = (
            self.sig_a.update(cs, c["rho"], seen),
            self.sig_b.update(cv, c["brho"], seen),
        )
        self.a = torch.where(
            moving,
            (
                self.a * log_step(ta, c["t0"], c["eta"], c["down"], c["target"]).exp()
            ).clamp(min=0.02),
            self.a,
        ).minimum(c["amax"])
        self.b = torch.where(
            moving,
            (
                self.b
                * log_step(tb, c["bt0"], c["beta_eta"], c["down"], c["target"]).exp()
            ).clamp(min=0.02),
            self.b,
        ).minimum(c["bmax"])
        a = self.a * c["on"] * moving
        b = self.b * c["bon"] * moving
        t1 = self.real + 1
        beta = torch.minimum(t1 / (9 + t1), c["beta"])
        lr = c["lr"] * self.lr_factor()
        clip = (1 / (gg.sum(1, keepdim=True).sqrt() + 1e-6)).clamp(max=1)
        v3 = lambda q: q.unsqueeze(-1)  # noqa: E731
        col = m.tensor_of_chunk
        sums = self.advance(
            m.P,
            m.G,
            self.M1,
            self.M2,
            self.S,
            self.V,
            m.decay,
            v3(a[:, col]),
            v3(b[:, col]),
            v3(lr),
            v3(c["wd"]),
            v3(1 - 0.9**t1),
            v3(1 - 0.95**t1),
            0.9,
            0.95,
            v3(beta),
            v3(clip),
        )
        ngs, _, self.ss, self.vv = (self.tensor_sums(q) for q in sums)
        down = (-ngs).clamp(min=0)
        w = (a * down).sum(1, keepdim=True) / (down.sum(1, keepdim=True) + 1e-20)
        self.pend = (self.a * -ngs).sum(1, keepdim=True)
        eff = self.efficiency(te)
        self.worth = torch.where(
            moving, c["wrho"] * self.worth + (1 - c["wrho"]) * eff * w, self.worth
        )
        worth = torch.where(c["wrho"] > 0, torch.minimum(eff * w, self.worth), eff * w)
        left = c["N"] - self.pos - 1
        cap = torch.where(c["hdecay"] > 0, c["Hmax"] * self.lr_factor(), c["Hmax"])
        H = torch.minimum(worth.floor(), torch.minimum(cap.floor(), left)).clamp(min=0)
        stats = torch.cat(
            [
                w,
                e,
                (1 + ratio) / 2,
                self.a.log().mean(1, keepdim=True),
                self.b.clamp(min=1e-9).log().mean(1, keepdim=True),
                cv.mean(1, keepdim=True),
                te,
                eff,
                H,
                torch.ones_like(w),
            ],
            1,
        )
        third = (3 * self.pos / c["N"]).clamp(0, 2).long()
        self.acc.scatter_add_(
            1, third.unsqueeze(-1).expand(-1, 1, stats.shape[1]), stats.unsqueeze(1)
        )
        for r in self.win:
            self.window(r, clip, beta, cv)
        self.pos = self.pos + 1 + H
        self.real = self.real + 1
        return (self.pos >= c["N"]).view(-1)

    def efficiency(self, te: torch.Tensor) -> torch.Tensor:
        """Share of the worth to consume: 1 fixed, 2 trapezoid, 3 gate by t, 4 both."""
        c = self.cfg
        trap = (self.sig_r.mean - self.sig_r.error).clamp(0, 1)
        gate = (te / 2).clamp(0, 1)
        mode = c["emode"]
        out = torch.where(mode == 1, torch.ones_like(trap), torch.zeros_like(trap))
        for k, v in ((2, trap), (3, gate), (4, trap * gate)):
            out = torch.where(mode % 10 == k, v, out)
        return c["eff"] * out

    def window(
        self, r: int, clip: torch.Tensor, beta: torch.Tensor, cv: torch.Tensor
    ) -> None:
        """Drift moves every K real steps along d, the filtered move of the last K.

        win 1: EMA drift, alignment of the mean gradient (its buffer kept); 2: EMA
        drift, alignment from running dots alone; 3: triangle-weighted displacements,
        running dots; 4: as 3 in one buffer, which is measured in the first half of
        the window and filled in the second; 5: as 2, with the dots' t-value.
        """
        j, s, m, col = self.job[r], self.win[r], self.m, self.m.tensor_of_chunk
        K, half = j["K"], j["win"] == 4
        i = s["n"] % K
        s["n"] += 1
        sums = lambda q: self.tensor_sums(q.sum(-1).unsqueeze(0))[0]  # noqa: E731
        if j["win"] in (1, 2, 5):
            s["D"] += self.V[r] * ((1 - beta[r]) / beta[r])
        elif not half or i >= K // 2:
            n, k = (K // 2, i - K // 2) if half else (K, i)
            s["D"].add_(self.S[r], alpha=(1 - abs(2 * (k + 0.5) / n - 1)) * 2 * K / n)
        if s["d"] is not None and (not half or i < K // 2):
            g = m.G[r] * clip[r]
            if j["win"] == 1:
                s["g"] += g
            else:
                dot = -sums(g * s["d"])
                s["c"] += torch.stack([dot, sums(g * g), dot * dot])
        if half and i == K // 2 - 1 and s["d"] is not None:
            self.window_gain(r, sums)
        if i < K - 1:
            return
        if s["n"] > self.cfg["warm"][r].item() + K:
            if s["d"] is not None and not half:
                self.window_gain(r, sums)
            d = s["D"].clone()
            m.P[r] += s["a"][col].unsqueeze(-1) * d
            s["d"], s["dd"] = d, sums(d * d)
        s["D"].zero_(), s["g"].zero_(), s["c"].zero_()

    def window_gain(self, r: int, sums) -> None:
        j, s = self.job[r], self.win[r]
        if j["win"] == 1:
            cos = -sums(s["g"] * s["d"]) / (
                (sums(s["g"] ** 2) * s["dd"]).sqrt() + 1e-20
            )
        elif j["win"] == 5:
            n = j["K"]
            mean = s["c"][0] / n
            cos = (
                mean
                / (((s["c"][2] / n - mean**2).clamp(min=0) / n).sqrt() + 1e-20)
                / 10
            )
        else:
            cos = s["c"][0] / ((s["c"][1] * s["dd"]).sqrt() + 1e-20)
        s["a"] = (s["a"] * (j["weta"] * torch.tanh(5 * (cos - j["wc0"]))).exp()).clamp(
            0.02, j["wmax"]
        )

    def result(self, r: int) -> dict:
        n = self.acc[r, :, -1:].clamp(min=1)
        s = (self.acc[r] / n)[:, :-1].tolist()
        out = dict(
            job=self.job[r],
            real=int(self.real[r].item()),
            stats={k: [round(q[i], 4) for q in s] for i, k in enumerate(STATS)},
        )
        if r in self.win:
            out["wgain"] = round(self.win[r]["a"].log().mean().exp().item(), 3)
        return out

    @torch.no_grad()
    def evaluate(
        self, rows: list[torch.Tensor], tasks: list[str], batches: int = 16
    ) -> list[float]:
        out: list[float] = []
        for i in range(0, len(rows), self.m.R):
            part, tk = rows[i : i + self.m.R], tasks[i : i + self.m.R]
            tk = tk + [tk[-1]] * (self.m.R - len(tk))
            for r, p in enumerate(part):
                self.m.P[r] = p
            gens = {k: torch.Generator().manual_seed(1) for k in ("pre", "ft")}
            tot = torch.zeros(self.m.R, device=DEV)
            for _ in range(batches):
                at = {
                    k: self.data.starts(k, "val", self.B, self.m.T, g)
                    for k, g in gens.items()
                }
                tot += self.m.loss(
                    *self.data.windows(torch.stack([at[k] for k in tk]), self.m.T)
                ).detach()
            out += [round(v, 4) for v in (tot / batches).tolist()[: len(part)]]
        return out
