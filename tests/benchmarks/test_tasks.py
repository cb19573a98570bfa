"""Tasks are deterministic per seed, and seeds differ."""

from __future__ import annotations

import gzip
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.tasks import (
    controls,
    convnet,
    finetune_gpt,
    pretrain_gpt,
    smooth,
    tabular,
)
from benchmarks.tasks.base import (
    EpochOrder,
    Setting,
    TaskUnavailableError,
    batch_generator,
)
from benchmarks.tasks.gpt import SIZES
from benchmarks.tasks.lora import Adapted, add_adapters
from benchmarks.tasks.text import (
    Corpus,
    cpp_headers,
    held_out_windows,
    python_source,
    raw_bytes,
    write_snapshot,
)

CSV = "carat,cut,color,clarity,depth,table,price,x,y,z\n" + "\n".join(
    f"{0.2 + i / 100},{('Ideal', 'Good')[i % 2]},{'DEF'[i % 3]},SI{1 + i // 2 % 2},"
    f"{60 + i % 7},{55 + i % 5},{300 + 9 * i},{3 + i / 100},{3.1 + i / 90},{2 + i / 80}"
    for i in range(400)
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "diamonds.csv").write_text(CSV)
    return tmp_path


def no_pretraining(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("HYBRIDOPT_BENCH_CACHE", str(folder))
    monkeypatch.setitem(finetune_gpt._PRETRAIN_STEPS, "tiny", 2)


MAKERS = {
    "pretrain": pretrain_gpt.make,
    "finetune": finetune_gpt.make,
    "lora": finetune_gpt.make_lora,
    "convnet": convnet.make_digits,
    "tabular": tabular.make,
    "tiny_batch": controls.make_tiny_batch,
    "label_noise": controls.make_label_noise,
    "jump": controls.make_jump,
    "tiny_batch_digits": controls.make_tiny_batch_digits,
    "label_noise_digits": controls.make_label_noise_digits,
    "jump_digits": controls.make_jump_digits,
    "minimax": controls.make_minimax,
}


def losses(make, setting: Setting, steps: int = 3) -> list[float]:
    task = make(setting)
    optimizer = torch.optim.SGD(
        [p for p in task.model.parameters() if p.requires_grad], lr=0.01
    )
    found = [task.evaluate()]
    for step in range(steps):
        task.begin_step(step, steps)
        optimizer.zero_grad()
        loss = task.closure()
        loss.backward()
        task.advance()
        optimizer.step()
        found += [float(loss.detach()), task.evaluate()]
    return found


@pytest.mark.parametrize("name", MAKERS)
def test_task_is_deterministic_per_seed(name, data, tmp_path, monkeypatch):
    if name == "convnet" or name.endswith("digits"):
        pytest.importorskip("sklearn")
    no_pretraining(monkeypatch, tmp_path / "cache")
    setting = Setting(seed=3, data=data)
    torch.manual_seed(99)
    first = losses(MAKERS[name], setting)
    torch.manual_seed(1)
    second = losses(MAKERS[name], setting)
    other = losses(MAKERS[name], replace(setting, seed=4))
    assert first == second
    assert first[1:] != other[1:]


@pytest.mark.parametrize("name", MAKERS)
def test_task_keeps_the_users_random_numbers(name, data, tmp_path, monkeypatch):
    if name == "convnet" or name.endswith("digits"):
        pytest.importorskip("sklearn")
    no_pretraining(monkeypatch, tmp_path / "cache")
    MAKERS[name](Setting(data=data))
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    task = MAKERS[name](Setting(data=data))
    task.closure()
    task.evaluate()
    assert torch.equal(torch.rand(4), expected)


def test_closure_repeats_its_batch_until_the_task_advances():
    task = pretrain_gpt.make(Setting())
    assert torch.equal(task.batch(5), task.batch(5))
    first = task.closure().detach()
    assert torch.equal(task.closure().detach(), first)
    task.advance()
    assert not torch.equal(task.closure().detach(), first)


def test_all_seeds_are_judged_by_the_same_text():
    a, b = (pretrain_gpt.make(Setting(seed=s)) for s in (0, 1))
    b.model.load_state_dict(a.model.state_dict())
    assert a.evaluate() == b.evaluate()


def test_corpora_hold_back_whole_files():
    for corpus in (python_source(500_000), cpp_headers(500_000)):
        assert 300_000 < len(corpus.train) < 800_000
        assert 0.02 < len(corpus.held_out) / len(corpus.train) < 0.5
        windows = held_out_windows(corpus.held_out, 8, 65)
        assert windows.shape == (8, 65)
        assert torch.equal(windows, held_out_windows(corpus.held_out, 8, 65))


def test_snapshot_of_text_is_read_instead_of_this_machines(tmp_path):
    corpus = Corpus(
        torch.arange(200, dtype=torch.uint8), torch.arange(9, dtype=torch.uint8)
    )
    write_snapshot(tmp_path / "text", "python", corpus)
    kept = python_source(data=tmp_path)
    assert torch.equal(kept.train, corpus.train)
    assert torch.equal(kept.held_out, corpus.held_out)
    assert kept.digest == corpus.digest
    other = Corpus(corpus.train.flip(0), corpus.held_out)
    assert other.digest != corpus.digest
    assert len(cpp_headers(500_000, tmp_path).train) > 200


def test_water_table_replaces_the_package(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    rows = [f"{600 + i},{6 + i % 7 / 10},{1e6 + 3 * i},{i % 5}" for i in range(40)]
    (tmp_path / "water.csv").write_text("\n".join(["t,p,h,d", *rows]) + "\n")
    monkeypatch.setattr(smooth, "steam_table", lambda: pytest.fail("read the table"))
    task = smooth.make("water", 0, tmp_path)
    loss = task.closure()
    loss.backward()
    assert 0.0 < float(loss.detach()) < 10.0


def test_pretrained_weights_are_made_once(tmp_path, monkeypatch):
    no_pretraining(monkeypatch, tmp_path)
    made = finetune_gpt.pretrained("tiny", Setting())
    files = list(tmp_path.iterdir())
    assert [f.suffix for f in files] == [".pt"]
    cached = finetune_gpt.pretrained("tiny", Setting(seed=7))
    assert list(tmp_path.iterdir()) == files
    assert all(torch.equal(made[k], cached[k]) for k in made)


def test_adapters_start_as_the_frozen_model_and_train_alone(tmp_path, monkeypatch):
    no_pretraining(monkeypatch, tmp_path)
    plain, adapted = finetune_gpt.make(Setting()), finetune_gpt.make_lora(Setting())
    assert adapted.evaluate() == pytest.approx(plain.evaluate(), rel=1e-6)
    names = {n for n, p in adapted.model.named_parameters() if p.requires_grad}
    assert names
    assert all(n.endswith((".A", ".B")) for n in names)


def test_adapter_computes_its_formula():
    model = nn.Sequential(nn.Linear(3, 2))
    add_adapters(model, rank=1)
    layer = model[0]
    assert isinstance(layer, Adapted)
    with torch.no_grad():
        layer.B.fill_(0.5)
    x = torch.randn(4, 3)
    low_rank = (layer.B @ layer.A) @ x.T
    torch.testing.assert_close(layer(x), layer.linear(x) + 2.0 * low_rank.T)


def test_epochs_use_every_row_once_in_a_new_order():
    order = EpochOrder(12, 4, seed=0)
    first = torch.cat([order(i) for i in range(3)])
    second = torch.cat([order(i) for i in range(3, 6)])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(12))
    assert first.tolist() != second.tolist()
    # Random access gives the same batches as going through them.
    assert torch.equal(EpochOrder(12, 4, seed=0)(4), second[4:8])


def test_batch_generators_of_neighbours_differ():
    draws = {
        tuple(torch.randint(1000, (4,), generator=batch_generator(s, i)).tolist())
        for s in range(4)
        for i in range(4)
    }
    assert len(draws) == 16


@pytest.mark.parametrize("make", [controls.make_jump, controls.make_jump_digits])
def test_jump_renames_labels_half_way_through_the_schedule(make):
    if make is controls.make_jump_digits:
        pytest.importorskip("sklearn")
    task = make(Setting())
    task.begin_step(4, 10)
    before, judged, objective = task.batch(0)[1], task.evaluate(), task.objective()
    task.begin_step(5, 10)
    assert torch.equal(task.batch(0)[1], (before + 3) % 10)
    assert task.evaluate() != judged
    assert task.objective() != objective


def test_label_noise_spoils_training_only():
    task = controls.make_label_noise(Setting())
    clean = controls.make_tiny_batch(Setting())
    clean.model.load_state_dict(task.model.state_dict())
    assert task.evaluate() == clean.evaluate()
    wrong = []
    for i in range(40):
        x, y = controls.stream(32, batch_generator(0, i))
        noisy_x, noisy_y = task.batch(i)
        assert torch.equal(x, noisy_x)
        wrong.append((noisy_y != y).float().mean())
    assert 0.44 < float(torch.stack(wrong).mean()) < 0.64


def test_label_noise_on_digits_is_as_strong():
    pytest.importorskip("sklearn")
    task = controls.make_label_noise_digits(Setting())
    y = convnet.digits()[1]
    order = EpochOrder(1400, 32, 0)
    wrong = [(task.batch(i)[1] != y[order(i)]).float().mean() for i in range(20)]
    assert 0.4 < float(torch.stack(wrong).mean()) < 0.68


@pytest.mark.parametrize("make", [pretrain_gpt.make, controls.make_label_noise])
def test_objective_draws_batches_that_no_run_sees(make):
    task = make(Setting())

    def drawn(start: int) -> set[bytes]:
        batches = (task.batch(start + i) for i in range(16))
        return {raw_bytes(b[0] if isinstance(b, tuple) else b) for b in batches}

    assert not drawn(0) & drawn(task.OBJECTIVE_START)


def test_stream_never_repeats_and_has_something_to_learn():
    x, y = controls.stream(4000, batch_generator(0, 0))
    assert not torch.equal(x[:32], controls.stream(32, batch_generator(0, 1))[0])
    assert len(y.bincount(minlength=10)) == 10
    first, second = controls._teacher()
    loss = torch.nn.functional.cross_entropy(torch.tanh(x @ first) @ second, y)
    # The teacher itself is far better than guessing, and not perfect.
    assert 0.2 < float(loss) < 1.6


def test_minimax_reverses_the_second_players_gradient():
    task = controls.make_minimax(Setting())
    noise = torch.zeros(task.model.A.shape)
    task.model(noise).backward()
    x, y, a = task.model.x.detach(), task.model.y.detach(), task.model.A
    torch.testing.assert_close(task.model.x.grad, a @ y + 0.3 * x)
    torch.testing.assert_close(task.model.y.grad, -(a.T @ x) + 0.3 * y)


def test_tabular_without_data_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(TaskUnavailableError, match="pip download --no-deps plotnine"):
        tabular.make(Setting(data=tmp_path))


def fashion_arrays() -> dict[str, bytes]:
    """Gzip files of the original format, by name."""
    files = {}
    for part, count in (("train", 256), ("t10k", 16)):
        images = bytes(16) + bytes(range(256)) * (count * 784 // 256)
        labels = bytes(8) + bytes(i % 10 for i in range(count))
        for kind, raw in (("images-idx3", images), ("labels-idx1", labels)):
            files[f"{part}-{kind}-ubyte.gz"] = gzip.compress(raw)
    return files


def test_convnet_reads_fashion_mnist_files(tmp_path):
    for name, content in fashion_arrays().items():
        (tmp_path / name).write_bytes(content)
    task = convnet.make(Setting(data=tmp_path))
    x, y = task.batch(0)
    assert x.shape == (128, 1, 28, 28)
    assert int(y.max()) <= 9
    task.closure().backward()


def test_convnet_without_data_says_how_to_get_it(tmp_path):
    for data in (None, tmp_path):
        with pytest.raises(TaskUnavailableError, match="benchmarks fetch"):
            convnet.make(Setting(data=data))


def test_convnet_evaluation_leaves_batch_statistics_and_mode_alone():
    pytest.importorskip("sklearn")
    task = convnet.make_digits(Setting())
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    task.evaluate()
    assert task.model.training
    assert all(torch.equal(v, before[k]) for k, v in task.model.state_dict().items())


def test_sizes_hold_what_their_names_say():
    count = partial(sum, start=0)
    size = SIZES["5m"]
    with torch.device("meta"):
        from benchmarks.tasks.gpt import GPT

        small = count(p.numel() for p in GPT(size).parameters())
        large = count(p.numel() for p in GPT(SIZES["124m"]).parameters())
    assert 4.5e6 < small < 5.2e6
    # The byte vocabulary saves GPT-2's 38 million embedding weights.
    assert 8.4e7 < large < 8.7e7


@pytest.mark.parametrize("side", ["0", "58.9"])
def test_stones_with_impossible_sides_are_trained_on_but_not_judged_by(tmp_path, side):
    rows = CSV.splitlines()
    spoilt = [f"{row.rsplit(',', 1)[0]},{side}" for row in rows[1::2]]
    kept = [row for pair in zip(spoilt, rows[2::2], strict=True) for row in pair]
    path = tmp_path / "diamonds.csv"
    path.write_text("\n".join([rows[0], *kept]))
    x, y, possible = tabular.diamonds(path)
    assert len(x) == len(y) == 400
    assert int(possible.sum()) == 200
    task = tabular.make(Setting(data=tmp_path))
    held = torch.arange(400) % 5 == 0
    assert len(task.batch(0)[0]) == 320  # a batch is all that are trained on
    chosen = held & possible
    with torch.no_grad():
        said = task.model(x[chosen]).squeeze(1)
    assert task.evaluate() == pytest.approx(float((said - y[chosen]).square().mean()))
