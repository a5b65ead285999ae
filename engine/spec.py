"""RunSpec: the one typed, frozen, validated description of a run, YAML in and out.

Every field is reachable from the command line as a dotted override (``--select.size 500``). Fields are
grouped by the stage that reads them; a stage's fingerprint is made of the groups it reads and nothing else.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from engine.extend import OneOf, is_named
from engine.sections import Section, load_yaml_mapping, section_from_fields

Strategy = Annotated[
    str,
    OneOf(
        (
            "greedy",
            "greedy_batched",
            "greedy_balanced",
            "topk",
            "topk_balanced",
            "bottomk",
            "random",
            "random_balanced",
            "loss_min",
            "loss_max",
        )
    ),
]
DType = Literal["auto", "float32", "bfloat16", "float16"]
LoadIn = Literal["none", "8bit", "4bit"]
LossScope = Literal["last_token", "response", "all_tokens"]


class Models(Section):
    """The two endpoints. Each is a folder, a Hub name, a GGUF file, or (finetuned) a PEFT adapter on base."""

    base: str = Field(description="theta_0: local folder, Hub name or .gguf file")
    finetuned: str = Field(description="theta_f: the same, or a PEFT adapter folder")
    base_revision: str | None = Field(None, description="Hub revision of base")
    finetuned_revision: str | None = Field(None, description="Hub revision of finetuned")
    trust_remote_code: bool = Field(False, description="run Python code that a model repository ships")
    load_in: LoadIn = Field(
        "none", description="8bit, 4bit: gradients with weights packed by bitsandbytes (extra: quantization)"
    )


class Corpus(Section):
    """The seed corpus: files or a Hub data set, and which columns to read."""

    paths: list[str] = Field(default_factory=list, description="files, folders or globs, on any fsspec URI")
    hub: str | None = Field(None, description="Hub data set name or save_to_disk folder (extra: datasets)")
    hub_config: str | None = Field(None, description="configuration of the Hub data set")
    hub_split: str = Field("train", description="split of the Hub data set")
    hub_revision: str | None = Field(None, description="Hub revision of the data set")
    format: Annotated[str, OneOf(("auto", "parquet", "jsonl", "csv", "txt"))] = Field(
        "auto", description="file format"
    )
    text: str = Field("text", description="column with the document")
    id: str | None = Field(None, description="column with the document's id; default: a content hash")
    prompt: str | None = Field(None, description="column with a prompt that carries no loss")
    response: str | None = Field(None, description="column with the response that carries the loss")
    messages: str | None = Field(
        None, description="column with chats, lists of {role, content}; the assistant's turns carry the loss"
    )
    partition_rows: int = Field(
        4096, ge=1, description="documents in a partition: the unit of work and resuming"
    )
    max_documents: int | None = Field(None, ge=1, description="read only the first so many documents")
    max_chars: int = Field(1_000_000, ge=1, description="longer documents are cut to so many characters")
    max_quarantined: float = Field(0.05, ge=0, le=1, description="stop when a larger share is quarantined")

    @model_validator(mode="after")
    def _one_source(self) -> Corpus:
        if bool(self.paths) == bool(self.hub):
            raise ValueError("give either corpus.paths or corpus.hub, not both and not neither")
        if (self.prompt is None) != (self.response is None):
            raise ValueError("corpus.prompt and corpus.response must be given together")
        if self.messages is not None and self.prompt is not None:
            raise ValueError("give either corpus.messages or corpus.prompt and corpus.response")
        return self


class Task(Section):
    """What the fine-tuned model was trained to do, and how a document becomes a training example."""

    kind: Literal["classification", "language_modelling"] = Field("classification")
    labels: list[str] = Field(default_factory=list, description="label words; each one token after a space")
    display_names: list[str] | None = Field(None, description="names of the labels in tables and the report")
    template: str = Field("{text}\nTopic:", description="classification prompt; must contain {text}")
    max_tokens: int = Field(128, ge=2, description="tokens of text kept, before the template is applied")
    label_softmax: Literal["restricted", "full"] = Field(
        "restricted", description="softmax over the labels alone, or over the whole vocabulary"
    )
    loss_scope: LossScope | None = Field(
        None,
        description="tokens that carry loss; default: last_token (classification), response when the corpus "
        "has prompt/response columns or messages, else all_tokens",
    )

    @model_validator(mode="after")
    def _coherent(self) -> Task:
        if self.kind == "classification":
            if len(self.labels) < 2:
                raise ValueError("task.labels needs at least two label words for classification")
            if self.template.count("{text}") != 1:
                raise ValueError("task.template must contain {text} once")
            if self.template.rstrip(" ") != self.template:
                raise ValueError("task.template must not end in a space: the label words bring their own")
            if re.search(r"\\n(?![a-z])", self.template):
                raise ValueError(
                    "task.template has a backslash and an n, where a line break must be meant: YAML reads one in "
                    "double quotes, bash in $'...'"
                )
            if self.loss_scope not in (None, "last_token"):
                raise ValueError("task.loss_scope must be last_token for classification")
            if self.display_names is not None and len(self.display_names) != len(self.labels):
                raise ValueError("task.display_names must name every label of task.labels")
        elif self.labels:
            raise ValueError("task.labels is for classification; remove it for language_modelling")
        return self

    @property
    def names(self) -> list[str]:
        """Display names of the labels, in label order."""
        return self.display_names or self.labels


class Gradients(Section):
    """Which gradients are taken, at which checkpoints, and how they are projected (docs/method.md, steps 2 to 4)."""

    layers: str = Field(
        "last", description="last, all_linear (all but the head), or a regular expression over module names"
    )
    checkpoints: int | list[float] = Field(
        1, description="P, or a list of fractions of the way base -> finetuned"
    )
    projector: Annotated[str, OneOf(("auto", "exact", "rademacher", "tensorsketch", "factored"))] = Field(
        "auto",
        description="auto: exact where the gradient fits in dim, factored for 8 layers or more, else tensorsketch",
    )
    dim: int = Field(4096, ge=8, description="projected size d (exact ignores it)")
    seed: int = Field(0, ge=0, description="seed of the projector")
    dtype: DType = Field("auto", description="type of the forward pass; auto: bfloat16")
    tokens_per_batch: int | None = Field(
        None,
        ge=1,
        description="padded tokens in one forward pass; default: as many as memory takes, 4096 on a CPU",
    )

    compile: bool = Field(
        False,
        description="torch.compile the model (layers=last): slow to begin with, needs a C++ compiler on a CPU",
    )

    @field_validator("checkpoints")
    @classmethod
    def _fractions(cls, value: int | list[float]) -> int | list[float]:
        if isinstance(value, int):
            if value < 1:
                raise ValueError("must be at least 1")
        elif not value or any(not 0.0 <= f <= 1.0 for f in value) or len(set(value)) != len(value):
            raise ValueError("fractions must be distinct numbers between 0 and 1")
        return value

    @model_validator(mode="after")
    def _coherent(self) -> Gradients:
        if self.compile and self.layers != "last":
            raise ValueError("compile is for layers last: hooks see nothing inside a compiled model")
        return self

    @property
    def fractions(self) -> list[float]:
        """Interpolation fractions j/P in ascending order, length P."""
        if isinstance(self.checkpoints, int):
            return [j / self.checkpoints for j in range(1, self.checkpoints + 1)]
        return sorted(self.checkpoints)


class Placement(Section):
    """What a stage asks of the nodes that its workers run on; changes nothing of what it writes."""

    memory_mb: int | None = Field(
        None, ge=1, description="main memory kept for one worker, MB; default: none is counted"
    )
    accelerator_type: str | None = Field(
        None, min_length=1, description="kind of GPU, by Ray's name for it: A100, H100, L4, T4, ..."
    )
    node_labels: dict[str, str] = Field(
        default_factory=dict,
        description="labels of the nodes, as Ray selects them: {ray.io/market-type: spot}, {zone: '!a'}",
    )


class Extract(Placement):
    """Resources of the extraction stage. Nothing here changes a byte of its output but `threads`."""

    cpus_per_worker: float | None = Field(
        None, gt=0, description="CPUs of one gradient actor; default: its threads, less room for reading"
    )
    gpus_per_worker: float | None = Field(
        None, ge=0, description="default: 1 if the cluster has GPUs, else 0"
    )
    workers_min: int = Field(1, ge=1, description="gradient actors to start with")
    workers_max: int | None = Field(None, ge=1, description="gradient actors at most; default: what fits")
    threads: int | None = Field(
        None, ge=1, description="CPU threads of one gradient actor; default: all cores, or 1 beside a GPU"
    )
    max_attempts: int = Field(3, ge=1, description="times a partition is tried before the run stops")

    @field_validator("gpus_per_worker")
    @classmethod
    def _whole(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError("must be a whole number, or at most 1")
        return value


class Select(Placement):
    """How documents are chosen from the store (docs/method.md, step 5)."""

    strategy: Strategy = "greedy"
    size: int = Field(1000, ge=1, description="k, the number of documents to select")
    rows: Literal["raw", "unit"] = Field("raw", description="gradients as they are, or scaled to unit norm")
    batch_size: int = Field(64, ge=1, description="greedy_batched: picks between restarts of the running sum")
    seed: int = Field(0, ge=0, description="seed of the random strategies")
    stop: Literal["size", "at_peak"] = Field(
        "size", description="at_peak keeps the prefix with the largest f"
    )
    target: Literal["delta", "negative", "random"] = Field(
        "delta", description="what to align with; negative (-Delta) and random are negative controls"
    )
    min_confidence: float = Field(
        0.0, ge=0, le=1, description="leave out documents that the fine-tuned model is less sure of"
    )
    dedupe: Literal["none", "exact", "near"] = Field(
        "none", description="leave out documents that repeat an earlier one (near: extra dedupe)"
    )
    precondition: Literal["none", "second_moment"] = Field(
        "none", description="divide gradients by the root of their second moment, as Adam does (exact only)"
    )
    weights: Literal["equal", "nnls"] = Field(
        "equal", description="loss weights of the picks in retraining; nnls: fitted to Delta, none negative"
    )
    rounds: int = Field(
        1,
        ge=1,
        description="greedy and topk: select in so many rounds, each aimed at what training on the picks of those "
        "before has left of Delta",
    )
    index_memory_mb: int = Field(
        512, ge=1, description="greedy: most memory of the subspace index, all shards"
    )
    cache_memory_mb: int = Field(
        64, ge=1, description="greedy: most memory of the exact rows kept, per shard"
    )
    shards: int = Field(
        1, ge=1, description="greedy: shards of the index; more than one live in Ray actors, near their data"
    )
    cpus_per_shard: float = Field(1.0, gt=0, description="CPUs of one shard, where there are more than one")
    verify: int = Field(0, ge=0, description="greedy: random picks to re-check against a full scan")

    @model_validator(mode="after")
    def _coherent(self) -> Select:
        if self.rounds > 1 and (self.stop != "size" or self.target != "delta"):
            raise ValueError("rounds needs stop=size and target=delta")
        if self.rounds > self.size:
            raise ValueError("rounds may not be more than size")
        return self

    @property
    def rule(self) -> str:
        """The strategy, or `own` for one that is named as module:name."""
        return "own" if is_named(self.strategy) else self.strategy

    @property
    def certified(self) -> bool:
        """Whether each pick comes with a proof that no other row would have been better."""
        return self.rule.startswith("greedy") and not self.in_rounds

    @property
    def in_rounds(self) -> bool:
        """Whether the strategy looks at Delta, and so can be aimed anew."""
        return self.rounds > 1 and self.rule.startswith(("greedy", "topk"))


class Lora(Section):
    """Low-rank adapters trained in place of the weights (Hu et al., arXiv 2106.09685); needs unbake[adapters]."""

    rank: int = Field(0, ge=0, description="rank r of the adapters; 0: the weights themselves are trained")
    alpha: float = Field(16.0, gt=0, description="an adapter counts alpha / rank times")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of an adapter's input")
    target_modules: list[str] | None = Field(
        None, description="names of the adapted layers, as in PEFT; default: every linear layer but the head"
    )
    export: Literal["merged", "adapter"] = Field(
        "merged", description="merged: a whole model; adapter: a PEFT folder to load on the base model"
    )


class Retrain(Placement):
    """How theta_0 is trained on a selection (docs/method.md, step 6)."""

    strategies: list[Strategy] = Field(
        ["random", "topk", "greedy"], description="strategies to retrain and compare"
    )
    seeds: list[int] = Field(default_factory=lambda: [0], description="paired training seeds")
    epochs: int = Field(4, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_share: float = Field(0.05, ge=0, le=1, description="share of steps with rising learning rate")
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd alone")
    weight_decay: float = Field(0.0, ge=0, description="of matrices; biases and norms never decay")
    max_grad_norm: float = Field(1.0, ge=0, description="0 switches clipping off")
    batch_size: int = Field(16, ge=1, description="documents a step, over all workers")
    micro_batch_size: int | None = Field(
        None, ge=1, description="documents in one forward pass of a worker; default: its share of the step"
    )
    dtype: DType = Field("auto", description="auto: bfloat16 with float32 master weights")
    freeze_below: int = Field(
        0, ge=0, description="train only the blocks from this one up, the norm and the head"
    )
    cache_frozen: bool = Field(
        False,
        description="with freeze_below: compute once what the frozen blocks give for the documents, and keep it in "
        "memory; needs untied embeddings",
    )
    freeze_head: bool = Field(False, description="leave the output embedding as it is (and a tied input one)")
    freeze_body: bool = Field(False, description="train the output embedding alone, the paper's ablation")
    lora: Lora = Lora()
    dropout: bool = Field(
        False, description="the model's own dropout; off, any number of workers trains alike"
    )
    activation_checkpointing: bool = Field(False, description="recompute activations: less memory, more time")
    labels: Literal["hard", "soft"] = Field(
        "hard",
        description="targets: the selection's tokens, or the fine-tuned model's distribution over them",
    )
    soft_top_k: int = Field(
        32,
        ge=1,
        description="soft: likeliest tokens kept of a distribution over the vocabulary; the rest is one",
    )
    packing: bool = Field(
        False, description="several documents in a row of a forward pass, apart; less padding, the same loss"
    )
    early_stopping: bool = Field(False, description="keep the weights with the best validation result")
    patience: int | None = Field(
        None, ge=1, description="early stopping: stop after so many judgements without a better"
    )
    eval_steps: int | None = Field(
        None, ge=1, description="judge on the validation documents every so many steps; default: every epoch"
    )
    loggers: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(
        default_factory=list, description="further logs beside logs/<training>.jsonl (extras of these names)"
    )
    workers: int = Field(1, ge=1, description="workers of one training; with workers_max, the fewest")
    workers_max: int | None = Field(
        None, ge=1, description="elastic: as many workers as there is room for, up to so many"
    )
    parallel: int | None = Field(
        None, ge=1, description="trainings at a time at most; default: as many as the free resources hold"
    )
    gpus_per_worker: float | None = Field(
        None, ge=0, description="default: 1 if the cluster has GPUs, else 0"
    )
    cpus_per_worker: float | None = Field(
        None, gt=0, description="CPUs of a worker; default: 1 beside a GPU, else one for each of its threads"
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of a worker; default: its share of the node"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="DeepSpeed ZeRO stage; a single worker that offloads nothing needs no DeepSpeed"
    )
    offload_optimizer: bool = Field(
        False, description="ZeRO 1 to 3: keep the optimizer's state in main memory"
    )
    offload_parameters: bool = Field(False, description="ZeRO 3: keep the weights in main memory")
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="merged into the DeepSpeed configuration; may not contradict the spec",
    )
    checkpoint_steps: int | None = Field(
        None,
        ge=0,
        description="steps between checkpoints; default: one an epoch; 0: none, a lost job starts over",
    )
    keep_checkpoints: int = Field(2, ge=1, description="the last so many checkpoints are kept")
    max_failures: int = Field(3, ge=0, description="times that lost workers are replaced")

    @field_validator("strategies", "seeds")
    @classmethod
    def _distinct(cls, value: list[Any]) -> list[Any]:
        if not value or len(set(value)) != len(value):
            raise ValueError("must be a non-empty list without repetitions")
        return value

    @model_validator(mode="after")
    def _coherent(self) -> Retrain:
        if self.patience is not None and not self.early_stopping:
            raise ValueError("patience needs early_stopping")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError("momentum is for optimizer sgd")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage 3")
        if self.workers_max is not None and self.workers_max < self.workers:
            raise ValueError("workers_max must be at least workers")
        if self.elastic and self.optimizer == "sgd":
            raise ValueError(
                "workers_max needs optimizer adamw or adam: another number of workers resumes those"
            )
        if self.elastic and self.zero_stage == 0:
            raise ValueError("workers_max needs zero_stage 1, 2 or 3")
        if self.cache_frozen:
            self._cacheable()
        if self.lora.rank and (self.freeze_head or self.freeze_body):
            raise ValueError("lora freezes all but its adapters: remove freeze_head and freeze_body")
        if self.lora.rank and self.lora.dropout and not self.dropout:
            raise ValueError("lora.dropout needs retrain.dropout, which switches every dropout on")
        return self

    def _cacheable(self) -> None:
        """Refuse cache_frozen where there is nothing constant to keep, or no one process to keep it in."""
        if not self.freeze_below:
            raise ValueError(
                "cache_frozen needs freeze_below: without frozen blocks there is nothing to keep"
            )
        clashes = {
            "packing": self.packing,
            "dropout": self.dropout,
            "lora": bool(self.lora.rank),
            "freeze_body": self.freeze_body,
            "workers, offloading, float16 or deepspeed": self.needs_deepspeed,
        }
        found = [name for name, clash in clashes.items() if clash]
        if found:
            raise ValueError(f"cache_frozen is for one plain worker: it does not go with {found[0]}")

    @property
    def judges(self) -> bool:
        """Whether validation documents are judged during a training."""
        return self.early_stopping or self.eval_steps is not None

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change during a training."""
        return self.workers_max is not None and self.workers_max > self.workers

    @property
    def needs_deepspeed(self) -> bool:
        """Whether there is something to partition, offload or scale; else one worker of plain torch does."""
        return (
            self.workers > 1
            or self.elastic
            or self.offload_optimizer
            or self.offload_parameters
            or self.dtype == "float16"
            or bool(self.deepspeed)
        )


class Evaluate(Section):
    """The test set, and the true training set where it is known."""

    test: list[str] = Field(
        default_factory=list, description="files of held-out documents; empty: no evaluation"
    )
    text: str | None = Field(None, description="text column of the test set; default: corpus.text")
    label: str = Field("label", description="label column: index, label word or display name")
    validation_share: float = Field(0.3, ge=0, lt=1, description="share of the test files used for choices")
    max_documents: int | None = Field(None, ge=1, description="documents judged at most, validation and test")
    tokens_per_batch: int = Field(4096, ge=1)
    train: list[str] = Field(
        default_factory=list, description="files of the true training set, for distances (extra: distances)"
    )
    embedder: str = Field(
        "auto", description="sentence-transformers folder, or base; auto: MiniLM where installed, else base"
    )
    compared: int = Field(10_000, ge=2, description="documents of a set that distances compare at most")


class Ray(Section):
    """Where Ray is. With an address nothing is started and nothing is shut down."""

    address: str | None = Field(None, description="address of a cluster; default: a private local instance")
    num_cpus: int | None = Field(None, ge=1, description="CPUs of the local instance; default: all")
    num_gpus: int | None = Field(None, ge=0, description="GPUs of the local instance; default: all")
    object_store_mb: int = Field(512, ge=100, description="object store of the local instance, MB")


class RunSpec(Section):
    """One run: two models and a corpus in, the likely training data and a retrained model out."""

    run_dir: str = Field(
        "runs/run", min_length=1, description="where everything is written: a folder or an fsspec URI"
    )
    models: Models
    corpus: Corpus
    task: Task
    gradients: Gradients = Gradients()
    extract: Extract = Extract()
    select: Select = Select()
    retrain: Retrain = Retrain()
    evaluate: Evaluate = Evaluate()
    ray: Ray = Ray()

    @model_validator(mode="after")
    def _across_sections(self) -> RunSpec:
        answers = self.corpus.response or self.corpus.messages
        if self.loss_scope == "response" and answers is None:
            raise ValueError(
                "task.loss_scope=response needs corpus.messages, or corpus.prompt and corpus.response"
            )
        if self.task.kind == "classification" and answers is not None:
            name = "messages" if self.corpus.messages else "prompt and corpus.response"
            raise ValueError(f"corpus.{name} are for language_modelling; use corpus.text")
        if self.task.kind == "language_modelling":
            wanted = {self.select.strategy, *self.retrain.strategies}
            balanced = sorted(s for s in wanted if s.endswith("_balanced") and not is_named(s))
            if balanced:
                raise ValueError(f"{balanced[0]} balances labels, which language_modelling does not have")
        return self

    @property
    def loss_scope(self) -> LossScope:
        """The loss scope with its default resolved."""
        if self.task.loss_scope is not None:
            return self.task.loss_scope
        if self.task.kind == "classification":
            return "last_token"
        return "response" if self.corpus.response or self.corpus.messages else "all_tokens"

    def to_yaml(self) -> str:
        """The resolved spec; `from_yaml` of it is equal to self."""
        fields = self.model_dump(mode="json")
        text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
        # PyYAML writes some line separators in a way that it does not read back; escaped, it reads them all.
        return text if yaml.safe_load(text) == fields else yaml.safe_dump(fields, sort_keys=False)

    @classmethod
    def from_dict(cls, fields: dict[str, Any], where: str = "the spec") -> RunSpec:
        """Validate a nested dict; UserError names the first offending field in one sentence."""
        given = {name: value for name, value in fields.items() if value is not None}  # `evaluate:` is empty
        return section_from_fields(cls, given, where)

    @classmethod
    def from_yaml(cls, text: str, where: str = "the spec") -> RunSpec:
        """Parse and validate YAML; UserError for bad YAML or bad fields."""
        return cls.from_dict(load_yaml_mapping(text, where), where)
