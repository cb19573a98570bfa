"""The model and data of replica_gpt.py: many byte-level GPTs in one buffer."""

from __future__ import annotations

import glob
import math
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F

DEV = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cuda.matmul.allow_tf32 = True
VOCAB = 128


def tokens(patterns: list[str], limit: int) -> torch.Tensor:
    """Bytes (clamped to 7 bits) of the files that match, in a fixed order."""
    files = sorted(f for p in patterns for f in glob.glob(p, recursive=True))
    files = [f for f in files if "site-packages" not in f and "/test" not in f][:1500]
    data = b"\n".join(Path(f).read_bytes() for f in files)[:limit]
    return (
        torch.frombuffer(bytearray(data), dtype=torch.uint8).long().clamp(max=VOCAB - 1)
    )


class Corpus:
    """Python's standard library ("pre") and C headers ("ft"), 90 % for training."""

    def __init__(self, limit: int) -> None:
        pre = tokens([sysconfig.get_paths()["stdlib"] + "/**/*.py"], limit)
        ft = tokens(["/usr/local/cuda*/**/include/**/*.h*"], limit)
        if len(ft) < 100_000:
            ft = tokens(["/usr/include/**/*.h"], limit)
        self.all = torch.cat([pre, ft]).to(DEV)
        self.span = {}
        for name, lo, n in (("pre", 0, len(pre)), ("ft", len(pre), len(ft))):
            cut = lo + int(0.9 * n)
            self.span[name, "train"], self.span[name, "val"] = (lo, cut), (cut, lo + n)

    def starts(
        self, task: str, part: str, n: int, length: int, gen: torch.Generator
    ) -> torch.Tensor:
        lo, hi = self.span[task, part]
        return lo + torch.randint(hi - lo - length - 1, (n,), generator=gen)

    def windows(
        self, starts: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        at = starts.to(DEV).unsqueeze(-1) + torch.arange(length + 1, device=DEV)
        x = self.all[at]
        return x[..., :-1], x[..., 1:]


# The forward pass takes plain tensors, so that each function compiles once.
def rms(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return (
        x
        * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype)
        * g.unsqueeze(1)
    )


def block(x, n1, qkv, o, n2, w1, w2, shape):
    """One transformer block; ``shape`` is (replicas, batch, time, heads)."""
    r, b, t, h = shape
    d = x.shape[-1]
    with torch.autocast(DEV, dtype=torch.bfloat16, enabled=DEV == "cuda"):
        q, k, v = (
            torch.bmm(rms(x, n1), qkv)
            .view(r * b, t, 3, h, d // h)
            .permute(2, 0, 3, 1, 4)
        )
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + torch.bmm(a.transpose(1, 2).reshape(r, b * t, d), o)
        return x + torch.bmm(F.gelu(torch.bmm(rms(x, n2), w1)), w2)


def head_loss(x, nf, head, target):
    with torch.autocast(DEV, dtype=torch.bfloat16, enabled=DEV == "cuda"):
        lg = torch.bmm(rms(x, nf), head)
    ce = F.cross_entropy(
        lg.float().reshape(-1, VOCAB), target.reshape(-1), reduction="none"
    )
    return ce.view(x.shape[0], -1).mean(1)


class Replicas:
    """Weights, gradients and forward pass of all replicas."""

    def __init__(self, slots: int, d: int, layers: int, heads: int, time_: int) -> None:
        self.R, self.d, self.L, self.H, self.T = slots, d, layers, heads, time_
        deep = math.sqrt(2 * layers)
        self.shapes = [("wte", (VOCAB, d), 0.02, 1), ("wpe", (time_, d), 0.02, 0)]
        for i in range(layers):
            self.shapes += [
                (f"n1{i}", (d,), None, 0),
                (f"qkv{i}", (d, 3 * d), d**-0.5, 1),
            ]
            self.shapes += [
                (f"o{i}", (d, d), d**-0.5 / deep, 1),
                (f"n2{i}", (d,), None, 0),
            ]
            self.shapes += [
                (f"w1{i}", (d, 4 * d), d**-0.5, 1),
                (f"w2{i}", (4 * d, d), (4 * d) ** -0.5 / deep, 1),
            ]
        self.shapes += [("nf", (d,), None, 0), ("head", (d, VOCAB), 0.02, 1)]
        sizes = [math.prod(s) for _, s, _, _ in self.shapes]
        n = sum(sizes)
        self.C = n // d
        self.P = torch.zeros(slots, self.C, d, device=DEV)
        self.G = torch.zeros_like(self.P)
        self.tensor_of_chunk = torch.repeat_interleave(
            torch.arange(len(sizes)), torch.tensor(sizes) // d
        ).to(DEV)
        self.decay = torch.tensor(
            [w for *_, w in self.shapes], dtype=torch.float32, device=DEV
        )[self.tensor_of_chunk].view(1, -1, 1)
        self.p, at = {}, 0
        for (name, shape, _, _), k in zip(self.shapes, sizes, strict=True):
            v = (
                self.P.view(slots, n)[:, at : at + k]
                .view(slots, *shape)
                .detach()
                .requires_grad_(True)
            )
            v.grad = self.G.view(slots, n)[:, at : at + k].view(slots, *shape)
            self.p[name], at = v, at + k
        self.block, self.head_loss = block, head_loss
        self.fresh: dict[int, torch.Tensor] = {}

    def init(self, seed: int) -> torch.Tensor:
        if seed not in self.fresh:
            parts = []
            for i, (_, shape, std, _) in enumerate(self.shapes):
                g = torch.Generator().manual_seed(seed * 1000 + i)
                k = math.prod(shape)
                parts.append(
                    torch.ones(k) if std is None else torch.randn(k, generator=g) * std
                )
            self.fresh[seed] = torch.cat(parts).view(self.C, self.d).to(DEV)
        return self.fresh[seed]

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        r, b, t = x.shape
        p = self.p
        h = torch.gather(p["wte"], 1, x.reshape(r, b * t, 1).expand(-1, -1, self.d))
        h = h + p["wpe"].unsqueeze(1).expand(r, b, t, self.d).reshape(r, b * t, self.d)
        for i in range(self.L):
            h = self.block(
                h,
                *(p[f"{k}{i}"] for k in ("n1", "qkv", "o", "n2", "w1", "w2")),
                (r, b, t, self.H),
            )
        return self.head_loss(h, p["nf"], p["head"], y)
