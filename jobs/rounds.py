"""Selection in rounds: pick a part, retrain on all picks so far, and aim the next part at what is left of Delta.

The target of round r is the projection of ``theta_r - theta_f``, where theta_r is the base model trained on the
picks of the rounds before; round 0 is the ordinary selection of a part (the released code's `steps_per_grad` is
its cousin). The gradients stay those of the store: at theta_f they do not depend on where training has come.
"""

from __future__ import annotations

import numpy as np

import cluster.train
from cluster.session import session
from engine.checkpoints import Endpoints
from engine.rows import Rows
from engine.select import Columns, Selection, View, described
from engine.select import select as choose
from engine.spec import Select
from engine.store import GradientStore
from engine.target import choose_target
from jobs.job import Job, local_copy
from jobs.progress import Stage
from jobs.retrain import train_job
from jobs.select import documents_of

FOLDER = "rounds"
"""Where picks and models of the rounds lie until the selection is complete."""


def select_in_rounds(
    job: Job,
    store: GradientStore,
    rows: Rows,
    columns: Columns,
    settings: Select,
    stage: str,
    progress: Stage,
) -> Selection:
    """`settings.size` rows in `settings.rounds` parts of equal size, the first ones larger by one.

    A selection that was killed goes on from the last part that was complete. Models are trained by the retrain
    section with `select.seed`, and removed at the end.

    Args:
        store: the run's store. rows: the view of it that `settings` asks for.

    Returns:
        The rows of all rounds, described by the whole Delta: f may rise less than one round's would.
    """
    folder = job.run.sub(f"{FOLDER}/{stage}")
    order = np.zeros(0, np.int64)
    for number, part in enumerate(np.array_split(np.arange(settings.size), settings.rounds)):
        name = f"picks-{number}.parquet"
        if not folder.exists(name):
            target = rows if number == 0 else _towards(job, store, rows, folder.uri, number - 1)
            taken = np.zeros(store.n_rows, np.bool_) if columns.repeats is None else columns.repeats.copy()
            taken[order] = True
            left = Columns(columns.label, columns.loss, columns.confidence, taken)
            once = settings.model_copy(update={"size": len(part), "rounds": 1, "weights": "equal"})
            picked = choose(target, left, once).rows
            folder.write_table(name, documents_of(job, store, np.concatenate([order, picked])))
        order = folder.read_table(name, ["row"])["row"].to_numpy()
        if number < settings.rounds - 1:
            _train(job, folder.uri, number, settings.seed)
        progress.update(order.size)
    selection = described(rows, columns, settings, order)
    folder.remove("")
    return selection


def _train(job: Job, folder: str, number: int, seed: int) -> None:
    """The base model trained on all picks so far."""
    recipe = job.spec.retrain.model_copy(update={"early_stopping": False, "eval_steps": None})
    work = train_job(
        job,
        f"round-{number}",
        selection=f"{folder}/picks-{number}.parquet",
        validation=None,
        target=f"{folder}/model-{number}",
        folder=folder,
        retrain=recipe,
        seed=seed,
    )
    with session(job.spec.ray, job.verbose):
        cluster.train.train(work)


def _towards(job: Job, store: GradientStore, rows: Rows, folder: str, number: int) -> View:
    """The rows with the target of the next round: what is left between the model of a round and theta_f."""
    model = local_copy(job.run, f"{folder.removeprefix(job.run.uri + '/')}/model-{number}")
    target = choose_target(job.spec, job.endpoints, job.encoder.label_ids)
    left, _ = target.project(Endpoints(model, job.endpoints.finetuned, job.spec.models.trust_remote_code))
    return rows.towards(left) if isinstance(rows, View) else View(store, left)
