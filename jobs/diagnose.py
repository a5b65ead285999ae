"""unbake diagnose: why a selection is what it is, and when not to trust it; writes diagnostics.json.

diagnostics.json holds::

    format             1
    strategy           of the selection
    path               gain of each pick, and where f peaks
    returns            violations of diminishing returns along the path
    optimum            f of greedy over the exhaustive optimum, on sets of up to 16 documents
    sets               {strategy: redundancy and label balance} of the selection, random and topk
    corpus_shares      label shares of the corpus, or null
    control            f towards -Delta and towards a random direction, and how many picks those share
    projection         error of projected inner products against exact ones, or null where none were kept
    sure               share of documents that the fine-tuned model is 99% sure of: selected, corpus
    confidence         mean, share below one half, histogram {edges, counts} over the corpus
    trajectory         with --trajectory: gradients along a recorded training run and at synthetic checkpoints
    behind             strategy that metrics.json shows ahead of the selection's -> by how much
    warnings           [{text, try}]
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import numpy as np
import torch

from engine.batches import CPU_TOKENS
from engine.checkpoints import weights_hash
from engine.errors import UserError
from engine.evaluate.comparison import behind
from engine.evaluate.diagnostics import StoredProducts, diagnose_selection, projection_error, sure, warnings
from engine.evaluate.trajectory import trajectory as fidelity
from engine.losses import label_rows
from engine.rundir import DIAGNOSTICS, METRICS, SELECTION, STAGES, fingerprint
from engine.store import GradientStore
from engine.target import choose_target
from jobs.distances import true_set
from jobs.job import Job
from jobs.options import parse_spec, spec_parser
from jobs.select import check_selection, columns_of, rows_of

CODE = 2
"""Raised whenever the same inputs would give other numbers."""

TRUE_DOCUMENTS = 512
"""True documents whose gradient a trajectory is compared by, unless told otherwise."""


def main(arguments: list[str]) -> int:
    """Read the options, diagnose, print what was found."""
    spec, options = parse_spec(parser(), arguments)
    if spec is None:
        return 0
    job = Job(spec, quiet=options["quiet"], verbose=options["verbose"])
    with job.locked():
        found = diagnose(job, options["trajectory"], options["documents"])
    job.progress.out.print(_text(found), markup=False, soft_wrap=True)
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of `unbake diagnose`."""
    made = spec_parser("diagnose", "diagnose the selection of a run directory; writes diagnostics.json")
    group = made.add_argument_group("a recorded training run")
    group.add_argument(
        "--trajectory", metavar="DIR", help="folder of model folders, one a checkpoint, in order of name"
    )
    group.add_argument(
        "--documents",
        metavar="N",
        type=int,
        default=TRUE_DOCUMENTS,
        help=f"true documents (of evaluate.train) to take gradients of; default: {TRUE_DOCUMENTS}",
    )
    return made


def diagnose(job: Job, trajectory: str | None = None, documents: int = TRUE_DOCUMENTS) -> dict[str, Any]:
    """Diagnose `select.strategy`'s selection; see the module's docstring for what comes out.

    Raises:
        UserError: no selection yet, one made with other settings, or a trajectory without evaluate.train.
    """
    if trajectory is not None and not job.spec.evaluate.train:
        raise UserError("--trajectory needs the true documents: name them in evaluate.train.")
    job.run.stage_fingerprint("extract")
    extracted = job.run.stage_result("extract")
    check_selection(job)
    found: dict[str, Any] = {"format": 1, "strategy": job.spec.select.strategy}
    inputs = {"select": job.run.stage_fingerprint("select"), "code": CODE}
    _forget_another(job, inputs)
    found |= job.guarded("diagnose", inputs, lambda: _selection(job, extracted))
    found["confidence"] = _confidence(extracted)
    found["trajectory"] = None if trajectory is None else _trajectory(job, trajectory, documents)
    judged = job.run.read_json(METRICS) if job.run.exists(METRICS) else None
    found["behind"] = behind(judged, job.spec.select.strategy) if judged else {}
    compared = [row["strategy"] for row in judged["strategies"]] if judged else []
    found["warnings"] = warnings(found, job.spec.select.strategy, compared)
    job.run.write_json(DIAGNOSTICS, found)
    for warning in found["warnings"]:
        job.progress.log.write("diagnose", "warning", text=f"{warning['text']} Try {warning['try']}")
    return found


def _forget_another(job: Job, inputs: dict[str, Any]) -> None:
    """Remove the record of another selection's diagnosis: it is cheap to make anew, and nothing is made from it."""
    records = [f"{STAGES}/diagnose.json", f"{STAGES}/diagnose.inputs.json"]
    if job.run.exists(records[1]) and job.run.read_json(records[1]) != inputs:
        for record in records:
            job.run.remove(record)


def _selection(job: Job, extracted: dict[str, Any]) -> dict[str, Any]:
    """All that follows from store and selection alone."""
    store = GradientStore.open(job.run)
    settings = job.spec.select
    order = job.run.read_table(SELECTION, ["row"])["row"].to_numpy()
    counts = np.array(extracted["label_counts"], np.float64)
    shares = (counts / counts.sum()).tolist() if counts.size and counts.sum() else None
    with job.progress.stage("diagnose", int(order.size), "picks") as progress:
        rows, columns = rows_of(store, settings), columns_of(job, store, settings)
        found = diagnose_selection(rows, order, columns, settings, shares)
        exact = StoredProducts(store.column("alignment"), store.column("norm"))
        found["projection"] = projection_error(store, exact, store.attributes["delta_norm"])
        found["sure"] = sure(store.column("confidence"), store.valid, order)
        progress.update(int(order.size))
        return found | {"seconds": round(progress.seconds, 3)}


def _confidence(extracted: dict[str, Any]) -> dict[str, Any]:
    histogram = extracted["confidence_histogram"]
    counts, edges = np.array(histogram["counts"]), np.array(histogram["edges"])
    return {
        "mean": extracted["mean_confidence"],
        "below_half": float(counts[edges[1:] <= 0.5].sum() / max(1, counts.sum())),
        "histogram": histogram,
    }


def _trajectory(job: Job, folder: str, documents: int) -> dict[str, Any]:
    """Fidelity of the checkpoints in a folder, each a model folder, on true documents."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    recorded = [f"{folder}/{n}" for n in names if os.path.isfile(f"{folder}/{n}/config.json")]
    if not recorded:
        raise UserError(f"--trajectory: {folder} holds no model folders.")
    true = true_set(job)
    some = np.sort(np.random.default_rng(0).permutation(len(true.texts))[:documents])
    prompts = None if true.prompts is None else [true.prompts[i] for i in some]
    examples = job.encoder.encode([true.texts[i] for i in some], prompts)
    if examples.problems:
        row, why = min(examples.problems.items())
        raise UserError(f"evaluate.train: document {some[row]} cannot be used: {why}: mend or remove it.")
    if true.labels is not None:
        examples = examples.with_labels(np.asarray(job.encoder.label_ids, np.int32)[true.labels[some]])
    target = choose_target(job.spec, job.endpoints, job.encoder.label_ids)
    rows = label_rows(job.encoder)
    about = [job.model_hashes, [weights_hash(path) for path in recorded], true.identity, documents]
    about += [job.spec.gradients.layers, job.spec.task.model_dump(mode="json"), CODE]
    tokens = job.spec.gradients.tokens_per_batch or CPU_TOKENS

    def work() -> dict[str, Any]:
        with job.progress.stage("trajectory", len(recorded), "checkpoints") as progress:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            remote = job.spec.models.trust_remote_code
            found = fidelity(job.endpoints, recorded, target, examples, rows, tokens, device, remote)
            progress.update(len(recorded))
            return found | {"documents": len(some), "seconds": round(progress.seconds, 3)}

    return job.guarded(f"trajectory-{fingerprint(about)[:12]}", {"about": fingerprint(about)}, work)


def _text(found: dict[str, Any]) -> str:
    """The findings as a few lines for the terminal."""
    path, returns, optimum, control = (found[name] for name in ("path", "returns", "optimum", "control"))
    lines = [
        f"f = {path['objective']:.3f} after {len(path['gain']):,} picks, largest {path['peak_objective']:.3f} after "
        f"{path['peak_size']:,}; {path['lowering_picks']:,} picks lowered it",
        f"control: f = {control['negative']['peak_objective']:.3f} towards -Delta, "
        f"{control['random']['peak_objective']:.3f} towards a random direction",
    ]
    if returns["violations"] is not None:
        lines.append(
            f"diminishing returns violated in {returns['violations']:.0%} of {returns['checked']:,} checks"
        )
    if optimum["ratio_mean"] is not None:
        lines.append(
            f"greedy reaches {optimum['ratio_mean']:.1%} of the exhaustive optimum on {optimum['rows']} documents "
            f"(least {optimum['ratio_least']:.1%})"
        )
    for name, row in found["sets"].items():
        if row["nearest_cosine"] is not None:
            spread = f", label balance {row['balance']:.2f}" if "balance" in row else ""
            lines.append(
                f"{name}: mean cosine {row['mean_cosine']:.3f}, nearest {row['nearest_cosine']:.3f}{spread}"
            )
    if found["projection"]:
        lines.append(f"projection: cosines err by {found['projection']['target_error']:.4f}")
    confidence = found["confidence"]
    lines.append(f"confidence: mean {confidence['mean']:.2f}, below one half {confidence['below_half']:.0%}")
    for row in (found["trajectory"] or {}).get("recorded", []):
        if row["cosine"] is not None:
            lines.append(f"{row['checkpoint']}: gradient's cosine {row['cosine']:.3f}, way {row['way']:.2f}")
    for row in (found["trajectory"] or {}).get("synthetic", []):
        if row["cosine"] is not None:
            lines.append(f"synthetic {row['fraction']:g}: gradient's cosine {row['cosine']:.3f}")
    lines += [f"! {warning['text']} Try {warning['try']}" for warning in found["warnings"]]
    return "\n".join(lines)
