"""The head: the output embedding that logits come from, with what a model family does to them."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

import torch
import transformers

from engine.errors import UserError


@dataclass(frozen=True)
class Head:
    """The output embedding: logits = softcap(scale * (h W^T + bias)).

    weight: (vocab, hidden) parameter, name: its name in the state dict, prefix included; bias: (vocab,) or None.
    softcap: c of ``c tanh(z / c)``, or None.
    """

    name: str
    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None
    tied: bool

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor | slice | None = None) -> torch.Tensor:
        """Logits (n, rows or vocab) float32 of states (n, hidden), for the given vocabulary rows."""
        weight = self.weight if rows is None else self.weight[rows]
        z = torch.nn.functional.linear(hidden, weight).float()
        if self.bias is not None:
            z = z + (self.bias if rows is None else self.bias[rows]).float()
        return self.finish(z)

    def label_logits(self, hidden: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
        """Logits (n, labels) float32 of the label words alone, in float32 whatever the model's type.

        So few rows cost nothing, and in bfloat16 close labels would tie.
        """
        weight = self.weight[label_ids].float()
        bias = None if self.bias is None else self.bias[label_ids].float()
        return self.finish(torch.nn.functional.linear(hidden.float(), weight, bias))

    def finish(self, z: torch.Tensor) -> torch.Tensor:
        """Logits of the linear layer's output z, bias included: scale and soft-capping; same shape, float32."""
        z = z.float()
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def backward_logits(self, error: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """dL/dz, z = h W^T, from dL/dlogits: the chain rule through soft-capping and scale; same shape."""
        if self.softcap is not None:
            error = error * (1 - (logits / self.softcap) ** 2)
        return error if self.scale == 1.0 else error * self.scale

    def input_gradient(self, error: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
        """dL/dh (n, hidden) in the model's type, from dL/dz (n, rows) float32 of the given vocabulary rows."""
        weight = self.weight[rows]
        if not isinstance(rows, slice):  # label words: few, and exact as in `label_logits`
            return (error @ weight.float()).to(self.weight.dtype)
        return error.to(weight.dtype) @ weight


def find_head(model: transformers.PreTrainedModel) -> Head:
    """The output embedding of a model, with what its family does to logits.

    Raises:
        UserError: the model has no output embedding, or one that is not a plain linear layer.
    """
    module = model.get_output_embeddings()
    if not isinstance(module, torch.nn.Linear):
        raise UserError(
            f"the output layer of {type(model).__name__} is {type(module).__name__}, not a linear layer: "
            "choose other layers with gradients.layers."
        )
    config = model.config.get_text_config()
    name = next(n for n, m in model.named_modules() if m is module) + ".weight"
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )
    return Head(
        name=name,
        weight=module.weight,
        bias=module.bias,
        scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
        tied=bool(getattr(config, "tie_word_embeddings", False)),
    )


def hidden_states(
    model: transformers.PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """States that enter the head, (rows, length, hidden), of right-padded documents, or of packed ones.

    No attention mask is passed: attention is causal and padding lies after every real token. Position ids,
    (rows, length), that begin anew within a row keep the documents there apart.
    """
    positions = {} if position_ids is None else {"position_ids": position_ids}
    return model.base_model(input_ids=input_ids, use_cache=False, **positions).last_hidden_state


def compile_body(model: transformers.PreTrainedModel) -> None:
    """Have torch.compile fuse what `hidden_states` runs; documents and lengths stay free.

    Raises:
        UserError: on a CPU without a C++ compiler.
    """
    on_cpu = model.device.type == "cpu"
    if on_cpu and not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        raise UserError("gradients.compile needs a C++ compiler on a CPU: install g++, or leave it out.")
    model.base_model.compile(dynamic=True)


@torch.no_grad()
def check_head(model: transformers.PreTrainedModel, head: Head) -> None:
    """Refuse a model whose logits are not what `Head` computes from its last states (docs/method.md, step 3).

    Raises:
        UserError: names the architecture, when its own logits differ from ours on a probe.
    """
    vocab = head.weight.shape[0]
    probe = (torch.arange(12, device=head.weight.device) * 7919 % min(vocab, 30_000)).reshape(2, 6)
    theirs = model(input_ids=probe, use_cache=False).logits.float()
    ours = head.logits(hidden_states(model, probe).reshape(12, -1)).reshape(theirs.shape)
    finite = ours.isfinite() & theirs.isfinite()  # those that are not are quarantined document by document
    ours, theirs = ours[finite], theirs[finite]
    largest = float(theirs.abs().max()) if len(theirs) else 0.0
    if not torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2 * max(1.0, largest)):
        raise UserError(
            f"{type(model).__name__} does something to its logits that this version does not know; "
            "last-layer gradients would be wrong, so it is refused."
        )
