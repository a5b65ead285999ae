"""Training: the plain loop against one written out by hand, each document once, frozen stays, best is kept."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from engine.encode import Encoder
from engine.errors import UserError
from engine.examples import load_examples
from engine.head import find_head
from engine.losses import document_losses, document_scores
from engine.models import load_model, load_tokenizer
from engine.padding import pad
from engine.plain_stepper import PlainStepper, train_plain
from engine.ragged import IGNORE, Ragged
from engine.recipe import epoch_order, learning_rate, passes_per_step, prepare, require_dtype, worker_share
from engine.spec import Retrain, Task

TASK = Task(labels=tiny.LABELS, max_tokens=32)
TEXTS = Task(kind="language_modelling", max_tokens=32)


def recipe(**changes: object) -> Retrain:
    return Retrain(**{"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "dtype": "float32", **changes})


def table(n: int = 37, seed: int = 0) -> pa.Table:
    texts, labels = zip(*tiny.sentences(n, seed), strict=True)
    return pa.table({"text": list(texts), "label": list(labels)})


@pytest.fixture(scope="module")
def encoder(tiny_base: str) -> Encoder:
    return Encoder(load_tokenizer(tiny_base), TASK, "last_token")


@pytest.fixture(scope="module")
def examples(encoder: Encoder) -> Ragged:
    return load_examples(table(), encoder)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ---- the loss


@pytest.mark.parametrize("restricted", [True, False])
def test_a_documents_loss_is_the_mean_over_its_targets_of_the_models_own_logits(
    tiny_base: str, encoder: Encoder, restricted: bool
) -> None:
    model = load_model(tiny_base, torch.float32)
    for enc in (encoder, Encoder(encoder.tokenizer, TEXTS, "all_tokens")):
        ids = encoder.label_ids if restricted and enc is encoder else None
        documents = load_examples(table(6), enc)
        together = document_losses(model, pad(documents, np.arange(6)), ids)
        for i in range(6):
            span = slice(documents.offsets[i], documents.offsets[i + 1])
            logits = model(torch.tensor(documents.tokens[span], dtype=torch.int64)[None]).logits[0]
            targets = torch.tensor(documents.targets[span], dtype=torch.int64)
            if ids is not None:
                mask = torch.full(logits.shape[1:], -torch.inf)
                mask[ids] = 0.0
                logits = logits + mask
            torch.testing.assert_close(together[i], cross_entropy(logits, targets, ignore_index=IGNORE))


def test_only_the_response_carries_loss(tiny_base: str, encoder: Encoder) -> None:
    texts = Encoder(encoder.tokenizer, TEXTS, "response")
    columns = {
        "text": ["", ""],
        "prompt": ["the goal ", "a border "],
        "response": ["coach of stadium", "army"],
    }
    documents = load_examples(pa.table(columns), texts)
    for i, response in enumerate(columns["response"]):
        span = slice(documents.offsets[i], documents.offsets[i + 1])
        carried = documents.targets[span][documents.targets[span] != IGNORE]
        assert encoder.tokenizer.decode(carried) == response


def test_documents_without_loss_are_left_out_and_bad_tables_are_refused(encoder: Encoder) -> None:
    texts = Encoder(encoder.tokenizer, TEXTS, "all_tokens")
    kept = load_examples(pa.table({"text": ["the goal of", "", "army in the"]}), texts)
    whole = load_examples(pa.table({"text": ["the goal of", "army in the"]}), texts)
    assert kept.tokens.tolist() == whole.tokens.tolist()
    assert kept.targets.tolist() == whole.targets.tolist()
    assert kept.offsets.tolist() == whole.offsets.tolist()
    for columns, message in [
        ({"label": [0]}, "no column text"),
        ({"text": ["goal"]}, "no column label"),
        ({"text": ["goal"], "label": [4]}, "labels outside 0..3"),
    ]:
        with pytest.raises(UserError, match=message):
            load_examples(pa.table(columns), encoder)
    with pytest.raises(UserError, match="nothing to train on"):
        load_examples(pa.table({"text": [""]}), texts)


# ---- the loop


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_the_loop_follows_one_written_out_by_hand(
    tiny_base: str, encoder: Encoder, examples: Ragged, optimizer: str
) -> None:
    momentum = 0.9 if optimizer == "sgd" else 0.0
    retrain = recipe(optimizer=optimizer, weight_decay=0.1, momentum=momentum, schedule="cosine")
    trained = load_model(tiny_base, torch.float32)
    curve = train_plain(trained, examples, retrain, 3, encoder.label_ids)["curve"]

    model = load_model(tiny_base, torch.float32).train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    if optimizer == "sgd":
        stepper: torch.optim.Optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    else:
        stepper = (torch.optim.AdamW if optimizer == "adamw" else torch.optim.Adam)(groups, lr=1.0)
    losses = []
    for epoch in range(2):
        order = epoch_order(len(examples), 3, epoch)
        for start in range(0, len(order), 8):
            documents = []
            for i in order[start : start + 8]:
                span = slice(examples.offsets[i], examples.offsets[i + 1])
                logits = model(torch.tensor(examples.tokens[span], dtype=torch.int64)[None]).logits[0, -1]
                label = encoder.label_ids.index(examples.targets[span][-1])
                documents.append(cross_entropy(logits[encoder.label_ids][None], torch.tensor([label])))
            loss = torch.stack(documents).mean()
            losses.append(loss.item())
            stepper.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in stepper.param_groups:
                group["lr"] = learning_rate(len(losses) - 1, 10, retrain)
            stepper.step()
    np.testing.assert_allclose([loss for _, loss in curve], losses, rtol=1e-4, atol=1e-5)
    for name, weight in weights(model).items():
        torch.testing.assert_close(weights(trained)[name], weight, rtol=1e-3, atol=1e-4)


@given(
    documents=st.integers(1, 40),
    batch=st.integers(1, 12),
    micro=st.one_of(st.none(), st.integers(1, 5)),
    world=st.integers(1, 5),
    seed=st.integers(0, 9),
)
@settings(max_examples=200, deadline=None)
def test_each_document_counts_once_an_epoch_whatever_the_number_of_workers(
    documents: int, batch: int, micro: int | None, world: int, seed: int
) -> None:
    lengths = np.random.default_rng(seed).integers(1, 9, documents)
    retrain = recipe(batch_size=batch, micro_batch_size=micro)
    passes = passes_per_step(documents, retrain, world)
    size = min(batch, documents)
    order = epoch_order(documents, seed, 0)
    seen: list[int] = []
    for start in range(0, documents, size):
        members = order[start : start + size]
        total = 0.0
        for rank in range(world):
            shares = list(worker_share(lengths, members, rank, world, passes))
            assert len(shares) == passes[0], "all workers make as many passes"
            for part, weight in shares:
                assert 1 <= len(part) <= passes[1]
                if weight:
                    seen.extend(part)
                    total += weight * len(part)
        assert total == pytest.approx(1.0), "the step's gradient is a mean over its documents"
    assert sorted(seen) == list(range(documents))
    assert passes[1] <= (micro or batch)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    orders = {(seed, epoch): tuple(epoch_order(20, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    assert orders[1, 2] == tuple(epoch_order(20, 1, 2))


def test_the_size_of_a_forward_pass_changes_nothing(
    tiny_base: str, encoder: Encoder, examples: Ragged
) -> None:
    """37 documents in steps of 8 leave a last step of 5: its weights are 1/5 in passes of any size."""
    curves = []
    for micro in (None, 1, 3):
        model = load_model(tiny_base, torch.float32)
        result = train_plain(model, examples, recipe(micro_batch_size=micro), 0, encoder.label_ids)
        curves.append([loss for _, loss in result["curve"]])
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)
    np.testing.assert_allclose(curves[2], curves[0], rtol=1e-4)


def test_the_learning_rate_rises_to_its_full_value_and_falls_to_the_end() -> None:
    for schedule in ("constant", "linear", "cosine"):
        retrain = recipe(schedule=schedule, warmup_share=0.1)
        rates = [learning_rate(step, 100, retrain) for step in range(100)]
        assert rates[:10] == pytest.approx([1e-2 * (i + 1) / 10 for i in range(10)])
        assert rates[10] == pytest.approx(1e-2)
        if schedule == "constant":
            assert set(rates[10:]) == {1e-2}
        else:
            assert all(a > b > 0 for a, b in itertools.pairwise(rates[10:]))
            assert rates[-1] < 2e-4
    assert learning_rate(0, 1, recipe(warmup_share=0.0)) == pytest.approx(1e-2)
    assert learning_rate(0, 1, recipe(warmup_share=1.0)) == pytest.approx(1e-2)


# ---- what trains and what does not


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_frozen_parts_stay_bit_equal_and_a_tie_is_kept(
    tmp_path_factory: pytest.TempPathFactory, examples: Ragged, encoder: Encoder, family: str, tied: bool
) -> None:
    path = tiny.save_model(tmp_path_factory.mktemp("m") / "base", family, tied)
    model = load_model(path, torch.float32)
    before = weights(model)
    train_plain(model, examples, recipe(freeze_below=1, weight_decay=0.1), 0, encoder.label_ids)
    after = weights(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    frozen = [n for n in before if ".0." in n or (("embed" in n or "wte" in n) and not tied) or "wpe" in n]
    assert not changed & set(frozen), "block 0 and the embeddings that feed it"
    assert changed == set(before) - set(frozen), "block 1, the last norm and the head"
    same = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert same == tied


def test_a_tied_embedding_above_frozen_blocks_trains_as_the_head_alone(
    tiny_base: str, encoder: Encoder, examples: Ragged
) -> None:
    """Its gradient is e h^T of METHOD section 3, nothing flows back through the frozen blocks."""
    model = prepare(load_model(tiny_base, torch.float32), recipe(freeze_below=2))
    batch = pad(examples, np.arange(5))
    document_losses(model, batch, encoder.label_ids).mean().backward()
    got = find_head(model).weight.grad
    states = model.base_model(batch.input_ids).last_hidden_state[batch.targets != IGNORE].detach()
    head = find_head(model).weight.detach().clone().requires_grad_()
    labels = torch.tensor([encoder.label_ids.index(t) for t in batch.targets[batch.targets != IGNORE]])
    cross_entropy((states @ head.T)[:, encoder.label_ids], labels).backward()
    assert got is not None
    torch.testing.assert_close(got, head.grad)


def test_freeze_head_leaves_the_head_and_a_tied_embedding(tiny_base: str, examples: Ragged) -> None:
    model = load_model(tiny_base, torch.float32)
    before = weights(model)
    train_plain(model, examples, recipe(freeze_head=True), 0)
    changed = {name for name in before if not torch.equal(before[name], weights(model)[name])}
    assert changed == set(before) - {"model.embed_tokens.weight"}


def test_freeze_body_trains_the_output_embedding_alone(tiny_base: str, examples: Ragged) -> None:
    model = load_model(tiny_base, torch.float32)
    before = weights(model)
    train_plain(model, examples, recipe(freeze_body=True), 0)
    changed = {name for name in before if not torch.equal(before[name], weights(model)[name])}
    assert changed == {"model.embed_tokens.weight"}
    with pytest.raises(UserError, match="leave nothing to train"):
        prepare(load_model(tiny_base, torch.float32), recipe(freeze_body=True, freeze_head=True))


def test_freezing_everything_or_more_than_there_is_is_refused(tiny_base: str) -> None:
    with pytest.raises(UserError, match="freeze_below is 3, and the model has 2 blocks"):
        prepare(load_model(tiny_base, torch.float32), recipe(freeze_below=3))
    with pytest.raises(UserError, match="float16 needs a GPU"):
        require_dtype(recipe(dtype="float16"), "cpu")


def test_dropout_is_off_unless_asked_for(tmp_path_factory: pytest.TempPathFactory, examples: Ragged) -> None:
    path = tiny.save_model(tmp_path_factory.mktemp("m") / "gpt2", "gpt2")
    batch = pad(examples, np.arange(8))
    still = document_losses(load_model(path, torch.float32), batch)
    off = document_losses(prepare(load_model(path, torch.float32), recipe()), batch)
    on = document_losses(prepare(load_model(path, torch.float32), recipe(dropout=True)), batch)
    torch.testing.assert_close(off, still)
    assert not torch.allclose(on, still)


def test_recomputed_activations_give_the_same_training(
    tiny_base: str, encoder: Encoder, examples: Ragged
) -> None:
    curves = []
    for again in (False, True):
        model = load_model(tiny_base, torch.float32)
        retrain = recipe(activation_checkpointing=again, epochs=1)
        curves.append(train_plain(model, examples, retrain, 0, encoder.label_ids)["curve"])
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)


def test_steps_too_small_for_bfloat16_add_up_in_float32_masters(
    tiny_base: str, encoder: Encoder, examples: Ragged
) -> None:
    """A step of 1e-4 on weights near 0.2 is below half of bfloat16's spacing there (5e-4)."""
    retrain = recipe(dtype="auto", learning_rate=1e-4, epochs=8, schedule="constant")
    model = load_model(tiny_base)
    before = {name: weight.float() for name, weight in weights(model).items()}
    train_plain(model, examples, retrain, 0, encoder.label_ids)
    exact = load_model(tiny_base, torch.float32)
    train_plain(exact, examples, recipe(**retrain.model_dump(exclude={"dtype"})), 0, encoder.label_ids)
    moved = exact_moved = torch.zeros(())
    for name, weight in weights(model).items():
        moved = moved + (weight.float() - before[name]).square().sum()
        exact_moved = exact_moved + (weights(exact)[name] - before[name]).square().sum()
    assert weights(model)["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert 0.7 < (moved / exact_moved).sqrt().item() < 1.3


def test_gradients_of_bfloat16_weights_add_up_in_float32_and_leave_nothing_behind(
    tiny_base: str, encoder: Encoder, examples: Ragged
) -> None:
    retrain = recipe(dtype="auto")
    stepper = PlainStepper(prepare(load_model(tiny_base), retrain), retrain, encoder.label_ids)
    halves = [pad(examples, np.arange(4)), pad(examples, np.arange(4, 8))]
    wanted = [torch.zeros(weight.shape) for weight in stepper.trained]
    for batch in halves:
        grads = torch.autograd.grad(stepper.scores(batch)[0].sum(), stepper.trained)
        for total, grad in zip(wanted, grads, strict=True):
            assert grad.dtype == torch.bfloat16
            total += grad.float()
        stepper.backward(stepper.scores(batch)[0].sum())
    for weight, master, total in zip(stepper.trained, stepper.masters, wanted, strict=True):
        assert weight.grad is None
        assert torch.equal(master.grad, total)
    stepper.close()
    stepper.scores(halves[0])[0].sum().backward()
    assert all(weight.grad is not None for weight in stepper.trained), "the model is as it was"


# ---- ends


def test_early_stopping_keeps_the_best_epoch(tiny_base: str, encoder: Encoder, examples: Ragged) -> None:
    """A large learning rate on few documents soon makes the validation documents worse."""
    held_out = load_examples(table(40, seed=9), encoder)
    few = load_examples(table(12), encoder)
    retrain = recipe(epochs=12, learning_rate=3e-2, schedule="constant", early_stopping=True, patience=3)
    model = load_model(tiny_base, torch.float32)
    result = train_plain(model, few, retrain, 0, encoder.label_ids, held_out)
    best = result["best"]
    assert len(result["validation"]) <= best + 4, "patience"
    batch = pad(held_out, np.arange(len(held_out)))
    with torch.no_grad():
        losses, hits = document_scores(model, batch, encoder.label_ids, hits=True)
    assert hits is not None
    kept = result["validation"][best]
    assert hits.mean().item() == pytest.approx(kept["accuracy"], abs=1e-6)
    assert losses.mean().item() == pytest.approx(kept["loss"], rel=1e-4)
    assert kept["accuracy"] == max(epoch["accuracy"] for epoch in result["validation"])


def test_judging_between_epochs_keeps_the_best_moment_and_its_patience_counts_judgements(
    tiny_base: str, encoder: Encoder, examples: Ragged
) -> None:
    """With wrong labels to judge by every step makes it worse: the first judgement is the best."""
    wrong = table(30, seed=9)
    shifted = pa.array([(label + 1) % 4 for label in wrong["label"].to_pylist()])
    held_out = load_examples(wrong.set_column(1, "label", shifted), encoder)
    changes = {"eval_steps": 2, "early_stopping": True, "patience": 2, "schedule": "constant"}
    retrain = recipe(epochs=9, learning_rate=3e-3, **changes)
    model = load_model(tiny_base, torch.float32)
    result = train_plain(model, examples, retrain, 0, encoder.label_ids, held_out)
    best, steps = result["best"], [judged["step"] for judged in result["validation"]]
    assert steps == list(range(2, 2 * len(steps) + 1, 2))
    assert len(steps) == best + 3 < 9 * 5 // 2, "it stopped after two judgements without a better"
    assert result["steps"] == steps[-1]
    with torch.no_grad():
        batch = pad(held_out, np.arange(len(held_out)))
        kept = document_losses(model, batch, encoder.label_ids).mean().item()
    assert kept == pytest.approx(result["validation"][best]["loss"], rel=1e-4)


def test_a_diverging_training_is_the_users_to_mend(
    tiny_base: str, encoder: Encoder, examples: Ragged
) -> None:
    model = load_model(tiny_base, torch.float32)
    retrain = recipe(learning_rate=1e30, optimizer="sgd", max_grad_norm=0.0, epochs=4)
    with pytest.raises(UserError, match="diverged"):
        train_plain(model, examples, retrain, 0, encoder.label_ids)


def test_training_learns_the_documents(tiny_base: str, encoder: Encoder, examples: Ragged) -> None:
    model = load_model(tiny_base, torch.float32)
    result = train_plain(model, examples, recipe(epochs=20), 0, encoder.label_ids)
    stepper = PlainStepper(model, recipe(), encoder.label_ids)
    _, hits = stepper.scores(pad(examples, np.arange(len(examples))), hits=True)
    assert hits is not None
    assert result["final_loss"] < 0.1
    assert hits.mean().item() > 0.95
