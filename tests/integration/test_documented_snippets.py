"""The code in docs/integrations.md runs as printed."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hybridopt import HybridConfig, HybridPredictOptimizer

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

DOCS = Path(__file__).parents[2] / "docs"
BATCHES = 24


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)


def containing(text: str) -> str:
    found = [s for s in snippets("integrations.md") if text in s]
    assert len(found) == 1, text
    return found[0]


def surroundings() -> dict:
    """The names that the page takes for granted."""
    torch.manual_seed(0)
    x = torch.randn(8 * BATCHES, 6)
    data = TensorDataset(x, x.sum(1, keepdim=True).sin())
    return {
        "torch": torch,
        "nn": nn,
        "F": F,
        "HybridPredictOptimizer": HybridPredictOptimizer,
        "HybridConfig": HybridConfig,
        "model": nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)),
        "loader": DataLoader(data, batch_size=8),
        "device": "cpu",
    }


@pytest.mark.parametrize(
    "text",
    ["CosineAnnealingLR", "next(batches)", "GradScaler"],
    ids=["closure", "classic", "scaler"],
)
def test_plain_loop_runs_as_printed(text):
    names = surroundings()
    before = [p.detach().clone() for p in names["model"].parameters()]
    exec(containing(text), names)
    counted = names["opt"].statistics()
    # A scaler begins with a few steps that overflow, and skips them.
    skipped = BATCHES - counted["steps"]
    assert 0 <= skipped <= (3 if text == "GradScaler" else 0)
    assert counted["real_steps"] > 0
    for old, new in zip(before, names["model"].parameters(), strict=True):
        assert not torch.equal(old, new)


def test_lightning_snippet_runs_as_printed(tmp_path):
    lightning = pytest.importorskip("lightning")
    names = surroundings()

    class MyModule(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = names["model"]

        def training_step(self, batch, batch_idx):
            return F.mse_loss(self.net(batch[0]), batch[1])

    names["MyModule"] = MyModule
    names["trainer"] = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    exec(containing("HybridLightningMixin"), names)
    assert names["trainer"].global_step == BATCHES
    assert isinstance(names["trainer"].optimizers[0], HybridPredictOptimizer)


def test_huggingface_snippet_runs_as_printed(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    names = surroundings()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = names["model"]

        def forward(self, x, y):
            return {"loss": F.mse_loss(self.net(x), y)}

    rows = [{"x": x, "y": y} for x, y in names["loader"].dataset]
    names |= {"transformers": transformers, "model": Net(), "data": rows}
    names["arguments"] = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=BATCHES,
        per_device_train_batch_size=8,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    exec(containing("HybridTrainerMixin"), names)
    assert names["trainer"].state.global_step == BATCHES


def test_accelerate_snippet_runs_as_printed():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    names = surroundings()
    names["accelerator"] = accelerate.Accelerator(cpu=True)
    try:
        exec(containing("accelerator.prepare"), names)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    assert names["opt"].statistics()["steps"] == BATCHES


def test_every_snippet_of_the_page_is_run():
    assert len(snippets("integrations.md")) == 6
