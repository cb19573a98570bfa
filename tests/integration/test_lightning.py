"""Lightning's Trainer around the optimizer, with and without the mixin."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hybridopt import HybridPredictOptimizer
from hybridopt.errors import ConfigError
from tests.contract.loops import wrap
from tests.problems import assert_same_bits

lightning = pytest.importorskip("lightning")
from hybridopt.integrations.lightning import HybridLightningMixin  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Module(lightning.LightningModule):
    """A user's module; counts what the Trainer makes it do."""

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.enabled = enabled
        self.forwards = self.backwards = self.hooks = 0
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.forwards += 1
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def on_after_backward(self):
        self.hooks += 1

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def backward(self, loss, *args, **kwargs):
        self.backwards += 1
        super().backward(loss, *args, **kwargs)

    def configure_optimizers(self):
        base = torch.optim.AdamW(self.parameters(), lr=3e-3)
        self.optimizer = wrap(base, model=self, enabled=self.enabled)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.99)
        return {
            "optimizer": self.optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class Hybrid(HybridLightningMixin, Module):
    """What the documentation tells the user to write."""


def data(batches: int, same: bool) -> DataLoader:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(8 * batches, 6, generator=g)
    if same:
        x = x[:8].repeat(batches, 1)
    return DataLoader(TensorDataset(x, torch.sin(x.sum(1, keepdim=True))), batch_size=8)


def fit(module, tmp_path, batches=40, same=False, checkpoint=None, **settings):
    trainer = lightning.Trainer(
        max_epochs=-1 if "max_steps" in settings else 1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **settings,
    )
    trainer.fit(module, data(batches, same), ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_clip_val": 0.5},
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 2},
    ],
    ids=["plain", "clipping", "bf16", "accumulation"],
)
def test_predicted_steps_skip_forward_and_backward(settings, tmp_path):
    module = Hybrid()
    trainer = fit(module, tmp_path, **settings)
    counted = module.optimizer.statistics()
    micro = settings.get("accumulate_grad_batches", 1)
    assert counted["steps"] == trainer.global_step == 40 // micro
    assert counted["predicted_steps"] > 5
    assert counted["real_steps"] + counted["predicted_steps"] == counted["steps"]
    assert module.forwards == module.backwards == micro * counted["real_steps"]
    assert module.hooks == 40  # Lightning's own hooks fire on every step
    assert len(module.losses) == 40
    assert all(loss == loss for loss in module.losses)
    rate = module.optimizer.base.param_groups[0]["lr"]
    assert rate == pytest.approx(3e-3 * 0.99 ** (40 // micro))


def test_forward_can_be_kept_on_predicted_steps(tmp_path):
    module = Hybrid()
    module.forward_on_predicted_steps = True
    fit(module, tmp_path)
    assert module.forwards == 40
    assert module.backwards == module.optimizer.statistics()["real_steps"] < 40


def test_module_without_the_mixin_trains_on_real_steps_only(tmp_path):
    """Lightning insists on its closure; gradients that it made win."""
    plain, module = Module(enabled=False), Module()
    fit(plain, tmp_path)
    fit(module, tmp_path)
    assert module.backwards == 40
    assert module.optimizer.statistics()["predicted_steps"] == 0
    assert module.optimizer.statistics()["real_steps"] == 40


@pytest.mark.parametrize("micro", [1, 2])
def test_disabled_optimizer_equals_lightning_with_the_bare_base(micro, tmp_path):
    class Bare(Module):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=3e-3)

    class Off(Hybrid):
        def configure_optimizers(self):
            base = torch.optim.AdamW(self.parameters(), lr=3e-3)
            return HybridPredictOptimizer(base, enabled=False)

    bare, off, warm = Bare(), Off(), Hybrid()
    warm.configure_optimizers = lambda: wrap(
        torch.optim.AdamW(warm.parameters(), lr=3e-3), warmup_steps=1000
    )
    for module in (bare, off, warm):
        fit(module, tmp_path, accumulate_grad_batches=micro)
    expected = list(bare.parameters())
    assert_same_bits(expected, list(off.parameters()))
    assert_same_bits(expected, list(warm.parameters()))


@pytest.mark.parametrize("steps", [12, 14, 16])
def test_checkpoint_of_the_trainer_resumes_exactly(steps, tmp_path):
    path = tmp_path / "run.ckpt"
    # Lightning begins the epoch's data anew after a load, hence the same batch always.
    through, first, second = Hybrid(), Hybrid(), Hybrid()
    fit(through, tmp_path, same=True, max_steps=30)
    fit(first, tmp_path, same=True, max_steps=steps).save_checkpoint(path)
    fit(second, tmp_path, same=True, checkpoint=path, max_steps=30)
    assert_same_bits(list(through.parameters()), list(second.parameters()))
    assert (
        through.optimizer.statistics()["predicted_steps"]
        == second.optimizer.statistics()["predicted_steps"]
        > 5
    )


def test_batch_that_the_module_skips_moves_nothing(tmp_path):
    class Skips(Hybrid):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx < 5 else None

    module = Skips()
    seen = []

    def remember(outputs, batch, batch_idx):
        if batch_idx >= 4:
            seen.append([p.detach().clone() for p in module.parameters()])

    module.on_train_batch_end = remember
    module.configure_optimizers = lambda: wrap(
        torch.optim.AdamW(module.parameters(), lr=3e-3), warmup_steps=1000
    )
    fit(module, tmp_path, batches=8)
    for weights in seen[1:]:
        assert_same_bits(seen[0], weights)


def test_manual_optimization_asks_before_it_runs_backward(tmp_path):
    class Manual(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            opt = self.optimizers()
            loss = None
            if opt.optimizer.needs_backward:
                x, y = batch
                loss = nn.functional.mse_loss(self.net(x), y)
                opt.zero_grad()
                self.manual_backward(loss)
            opt.step()
            return loss

        def on_train_batch_end(self, outputs, batch, batch_idx):
            pass

    module = Manual()
    trainer = fit(module, tmp_path)
    counted = module.optimizer.statistics()
    assert counted["predicted_steps"] > 5
    assert module.backwards == counted["real_steps"]
    assert trainer.global_step == counted["steps"] == 40


def test_proxy_that_lightning_makes_shows_the_optimizers_state(tmp_path):
    from lightning.pytorch.core.optimizer import LightningOptimizer

    module = Hybrid()
    fit(module, tmp_path)
    proxy = LightningOptimizer(module.optimizer)
    assert isinstance(proxy, HybridPredictOptimizer)
    assert proxy.optimizer is module.optimizer
    state = copy.deepcopy(proxy.optimizer.state_dict())
    proxy.optimizer.load_state_dict(state)


def test_gradient_scaler_is_refused_with_a_way_out(tmp_path):
    module = Hybrid()
    plugin = lightning.pytorch.plugins.MixedPrecision(
        "16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu")
    )
    with pytest.raises(ConfigError, match="bf16-mixed"):
        fit(module, tmp_path, plugins=[plugin])
