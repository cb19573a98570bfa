"""The Hugging Face Trainer, and accelerate's wrapper on its own."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from hybridopt import HybridConfig, HybridPredictOptimizer, Phase
from hybridopt.config import FixedHorizon, Prior, SecantConfig
from hybridopt.errors import ConfigError
from tests.contract.loops import build, components, drive, wrap
from tests.problems import assert_same_bits, regression

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
from hybridopt.integrations.huggingface import (  # noqa: E402
    HybridTrainerMixin,
    hybrid_optimizer,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

CONFIG = HybridConfig(
    warmup_steps=3,
    predictor=Prior(),
    bandit=FixedHorizon(),
    secant=SecantConfig(enabled=False),
)


class Net(nn.Module):
    """The least that the Trainer takes for a model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1)
        )
        self.forwards = 0

    def forward(self, x, y):
        self.forwards += 1
        return {"loss": nn.functional.mse_loss(self.net(x), y)}


class Rows(Dataset):
    def __init__(self, count: int) -> None:
        g = torch.Generator().manual_seed(1)
        self.x = torch.randn(count, 6, generator=g)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index]
        return {"x": x, "y": torch.sin(x.sum()).reshape(1)}


class HybridTrainer(HybridTrainerMixin, transformers.Trainer):
    """What the documentation tells the user to write."""


def steady(trainer: HybridTrainer) -> None:
    """Make predicted steps come on cue."""
    create = trainer.create_optimizer

    def on_cue(*args, **kwargs):
        optimizer = create(*args, **kwargs)
        if optimizer.run.config is not None and not hasattr(trainer, "steadied"):
            trainer.steadied = True
            trainer.optimizer = HybridPredictOptimizer(
                optimizer.base,
                CONFIG.replace(max_predict_steps=2),
                model=trainer.model,
                components=components(),
            )
        return trainer.optimizer

    trainer.create_optimizer = on_cue


def trainer_for(tmp_path, steps=40, rows=320, **settings):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        **{"save_strategy": "no", "logging_steps": 10, **settings},
    )
    trainer = HybridTrainer(
        Net(), arguments, train_dataset=Rows(rows), hybrid_config=CONFIG
    )
    steady(trainer)
    return trainer


@pytest.mark.parametrize("micro", [1, 2])
def test_predicted_steps_skip_forward_and_backward(micro, tmp_path):
    trainer = trainer_for(tmp_path, gradient_accumulation_steps=micro)
    trainer.train()
    hybrid = hybrid_optimizer(trainer.optimizer)
    counted = hybrid.statistics()
    assert counted["steps"] == trainer.state.global_step == 40
    assert counted["predicted_steps"] > 10
    assert trainer.model.forwards == micro * counted["real_steps"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert all(0 < loss < 10 for loss in losses)


def test_trainers_own_optimizer_is_wrapped_once_with_its_groups(tmp_path):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, weight_decay=0.1
    )
    trainer = HybridTrainer(Net(), arguments, train_dataset=Rows(8))
    first = trainer.create_optimizer()
    assert isinstance(first, HybridPredictOptimizer)
    assert [g["weight_decay"] for g in first.param_groups] == [0.1, 0.0]
    assert trainer.create_optimizer() is first
    assert not isinstance(first.base, HybridPredictOptimizer)
    assert first.run.model is trainer.model


@pytest.mark.parametrize("stop", [10, 11, 12])
def test_checkpoint_of_the_trainer_resumes_exactly(stop, tmp_path):
    """From three neighboring steps, so that one of them lies in mid-Predict."""
    through = trainer_for(tmp_path / "a", steps=24)
    through.train()
    first = trainer_for(
        tmp_path / "b", steps=24, save_strategy="steps", save_steps=stop
    )
    first.train()
    second = trainer_for(tmp_path / "c", steps=24)
    second.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{stop}"))
    assert_same_bits(
        [p.detach() for p in through.model.parameters()],
        [p.detach() for p in second.model.parameters()],
    )
    counted = hybrid_optimizer(second.optimizer).statistics()
    assert counted["steps"] == 24
    assert counted["predicted_steps"] > 5


def test_gradient_scaler_is_refused_with_a_way_out(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ConfigError, match="bf16=True"):
        trainer.create_optimizer()


# -- accelerate on its own -------------------------------------------------------------


@pytest.fixture
def accelerator():
    from accelerate.state import AcceleratorState, GradientState

    yield accelerate.Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_accelerate_takes_the_optimizer_and_a_scheduler(accelerator):
    problem = regression()
    opt = build(problem)
    reference = regression()
    twin = build(reference)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    other = torch.optim.lr_scheduler.ExponentialLR(twin, 0.9)
    model, prepared, scheduler = accelerator.prepare(problem.model, opt, scheduler)
    assert hybrid_optimizer(prepared) is opt
    assert hybrid_optimizer(torch.optim.SGD(model.parameters())) is None
    for i in range(20):
        if hybrid_optimizer(prepared).needs_backward:
            prepared.zero_grad()
            accelerator.backward(problem.loss(i))
        prepared.step()
        scheduler.step()
        if twin.needs_backward:
            twin.zero_grad()
            reference.loss(i).backward()
        twin.step()
        other.step()
    assert opt.statistics()["predicted_steps"] > 5
    assert_same_bits(reference.weights(), problem.weights())


def test_step_that_accelerate_patched_on_the_instance_does_not_spoil_copies():
    """Around each fp16 step it assigns ``optimizer.step`` and leaves it there."""
    problem = regression()
    opt = build(problem)
    opt.step = opt.step
    assert "step" in vars(opt)
    drive(problem, opt, Phase.PREDICT)
    clone = copy.deepcopy(opt)
    weights = problem.weights()
    clone.step()
    assert_same_bits(weights, problem.weights())
    assert "step" not in vars(clone)


def test_parameters_that_accelerate_swaps_for_fsdp_are_followed():
    problem = regression()
    opt = wrap(torch.optim.AdamW(problem.model.parameters(), lr=3e-3))
    for module in problem.model:
        for key, p in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(p.detach().clone()))
    for group in opt.param_groups:
        group["params"] = list(problem.model.parameters())
    drive(problem, opt, Phase.PREDICT)
    assert set(opt.state) == set(problem.model.parameters())
