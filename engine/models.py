"""Models: resolve a source to a local safetensors folder, load it, and find the head its logits come from.

A source is a local folder, a Hub name, a GGUF file or a PEFT adapter on the base model. Whatever it is, it
becomes one folder of safetensors, so that every later stage maps tensors from disk and loads no pickle.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from engine.errors import UserError, first_line, install
from engine.placement import Place, check_placed, loading_options
from engine.spec import LoadIn


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


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a spec's dtype; auto is bfloat16, the type published models are trained in."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return torch.bfloat16 if name == "auto" else names[name]


def load_tokenizer(path: str, trust_remote_code: bool = False, template_of: str | None = None) -> Any:
    """The fast tokenizer of a model folder; UserError when there is none.

    Args:
        template_of: folder of a model whose chat template serves where `path` has none, as with a base model
            whose fine-tuned version alone was made for chats.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"no usable tokenizer in {path}: {first_line(error)}.") from None
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer in {path} has no fast version (tokenizer.json); convert it first.")
    if template_of is not None and not tokenizer.chat_template:
        names = ("tokenizer_config.json", "chat_template.jinja")
        if any(os.path.isfile(os.path.join(template_of, name)) for name in names):
            tokenizer.chat_template = load_tokenizer(template_of, trust_remote_code).chat_template
    return tokenizer


def load_config(path: str, trust_remote_code: bool = False) -> Any:
    """The configuration of a model folder; UserError when it is unreadable or of an unknown architecture."""
    try:
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError, StrictDataclassError) as error:
        raise UserError(f"cannot read the model configuration in {path}: {first_line(error)}.") from None


def load_model(
    path: str,
    dtype: torch.dtype = torch.bfloat16,
    device: Place = "cpu",
    trust_remote_code: bool = False,
    load_in: LoadIn = "none",
) -> transformers.PreTrainedModel:
    """A causal language model in evaluation mode, from a folder of safetensors.

    Args:
        device: a device, "auto" (spread over all devices of this process) or a device_map.
        load_in: weights of linear layers packed to 8 or 4 bits by bitsandbytes, the head apart.

    Raises:
        UserError: no config, no safetensors, a corrupt file, or an architecture transformers does not know.
    """
    require_safetensors(path)
    load_config(path, trust_remote_code)
    placed = loading_options(device, load_in, dtype)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            attn_implementation="sdpa",
            **placed,
        )
    except (OSError, ValueError, KeyError, SafetensorError, ImportError) as error:
        raise UserError(f"cannot load the model in {path}: {first_line(error)}.") from None
    if not placed:
        return model.to(device).eval()
    check_placed(model, device)
    return model.eval()


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


def require_safetensors(path: str) -> None:
    """UserError unless `path` is a model folder with config.json and safetensors weights."""
    if not os.path.isdir(path):
        raise UserError(f"model folder {path} does not exist.")
    names = os.listdir(path)
    if "config.json" not in names:
        raise UserError(f"{path} is not a model folder: it has no config.json.")
    if not any(name.endswith(".safetensors") for name in names):
        unsafe = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
        hint = f" ({unsafe[0]} is a pickle, which is not read: convert it to safetensors)" if unsafe else ""
        raise UserError(f"{path} has no .safetensors file{hint}.")
    for index in (name for name in names if name.endswith(".safetensors.index.json")):
        _check_index(path, index)


def _check_index(path: str, index: str) -> None:
    """UserError when the list of a model's files is unreadable, or names one outside its folder."""
    try:
        with open(os.path.join(path, index), encoding="utf-8") as file:
            listed = set(json.load(file)["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"cannot read {path}/{index}: it is not a list of weight files.") from None
    for name in listed:
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise UserError(f"{path}/{index} names the file {name!r}, which lies outside the folder.")


def resolve(
    source: str,
    target: str,
    base: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """A local folder of safetensors for a source; converted into `target` only when it must be.

    Args:
        source: folder, Hub name, .gguf file, or PEFT adapter (folder or Hub name).
        target: folder to write a converted model to (GGUF dequantised to float32, adapter merged); a
            finished conversion of the same files is used again.
        base: resolved folder of the base model, for an adapter.

    Raises:
        UserError: nothing there, no safetensors, or a broken file.
    """
    source = os.path.expanduser(source)
    if source.endswith(".gguf"):
        return _from_gguf(source, target)
    folder = os.path.abspath(source) if os.path.isdir(source) else _from_hub(source, revision)
    if os.path.isfile(f"{folder}/adapter_config.json"):
        return _merge_adapter(folder, target, base, trust_remote_code)
    require_safetensors(folder)
    packing = getattr(load_config(folder, trust_remote_code), "quantization_config", None)
    if packing and packing.get("quant_method") == "bitsandbytes":
        return _unpack(folder, target, trust_remote_code)
    return folder


CONVERTED = "converted.json"
"""Note in a converted model's folder: what it was made of."""


QUANTISED = "quantised.json"
"""Note in a dequantised model's folder: how it had been quantised."""


def _origin(files: list[str], base: str | None) -> str:
    """What a conversion depends on: names, sizes and modification times of its files, and the base's folder."""
    stats = [(os.path.abspath(file), os.stat(file)) for file in sorted(files)]
    return json.dumps({"files": [[file, s.st_size, s.st_mtime_ns] for file, s in stats], "base": base})


def _converted(target: str, origin: str) -> bool:
    """Whether `target` is the finished conversion of this very origin."""
    try:
        with open(os.path.join(target, CONVERTED), encoding="utf-8") as file:
            return file.read() == origin
    except FileNotFoundError:
        return False


def save(
    model: transformers.PreTrainedModel,
    tokenizer: Any,
    target: str,
    state: dict[str, torch.Tensor] | None = None,
    notes: dict[str, str] | None = None,
) -> None:
    """Write a model folder whole or not at all: built beside its place, then renamed.

    Args:
        state: weights to write instead of the model's own (ZeRO-3 holds them in pieces).
        notes: further text files, name -> contents.

    Raises:
        UserError: no space or no permission.
    """
    with written_whole(target, notes) as part:
        # transformers empties the mapping it is given, so it gets a copy
        model.save_pretrained(
            part, state_dict=None if state is None else dict(state), safe_serialization=True
        )
        tokenizer.save_pretrained(part)


@contextlib.contextmanager
def written_whole(target: str, notes: dict[str, str] | None = None) -> Iterator[str]:
    """A folder to write a model into that takes its place when the block ends, and leaves nothing otherwise.

    Args:
        notes: text files to add at the end, name -> contents.

    Raises:
        UserError: no space or no permission.
    """
    part = f"{target}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        os.makedirs(part)
        yield part
        for name, text in (notes or {}).items():
            with open(os.path.join(part, name), "w", encoding="utf-8") as file:
                file.write(text)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
    except (OSError, SafetensorError) as error:  # safetensors has its own type for a full disk
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"cannot write the model {target}: {first_line(error)}.") from None


def is_quantised(path: str) -> bool:
    """Whether the folder's weights are quantised, or once were, so that Delta is partly noise."""
    if os.path.isfile(os.path.join(path, QUANTISED)):
        return True
    return getattr(load_config(path), "quantization_config", None) is not None


def shards(path: str) -> dict[str, str]:
    """Tensor name -> safetensors file of a model folder."""
    found: dict[str, str] = {}
    for name in sorted(os.listdir(path)):
        if name.endswith(".safetensors") and not name.startswith("adapter_"):
            file = os.path.join(path, name)
            try:
                with safe_open(file, framework="pt") as tensors:
                    found.update(dict.fromkeys(tensors.keys(), file))
            except (SafetensorError, OSError) as error:
                raise UserError(f"cannot read {file}: {first_line(error)}.") from None
    return found


def _unpack(folder: str, target: str, trust_remote_code: bool) -> str:
    """A bitsandbytes folder, 8 or 4 bits, dequantised to float32 in `target`."""
    files = [os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".safetensors")]
    origin = _origin(files, None)
    if _converted(target, origin):
        return target
    model = load_model(folder, torch.float32, {"": "cpu"}, trust_remote_code)
    packing = model.config.quantization_config.to_dict()
    model = model.dequantize(dtype=torch.float32)
    _forget_quantisation(model)
    notes = {CONVERTED: origin, QUANTISED: json.dumps(packing, default=str)}
    save(model, load_tokenizer(folder, trust_remote_code), target, notes=notes)
    return target


def _from_gguf(source: str, target: str) -> str:
    if not os.path.isfile(source):
        raise UserError(f"GGUF file {source} does not exist.")
    origin = _origin([source], None)
    if _converted(target, origin):
        return target
    folder, name = os.path.split(os.path.abspath(source))
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32, **_dequantised()
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"cannot read the GGUF file {source}: {first_line(error)}.") from None
    _forget_quantisation(model)
    save(model, tokenizer, target, notes={CONVERTED: origin})
    return target


def _forget_quantisation(model: transformers.PreTrainedModel) -> None:
    """transformers counts a dequantised model as quantised and refuses to save it until told otherwise."""
    model.config.quantization_config = None
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


def _dequantised() -> dict[str, Any]:
    """Newer transformers keep GGUF weights packed where a kernel allows it; older ones know no other way."""
    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def _from_hub(name: str, revision: str | None) -> str:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model folder {os.path.abspath(name)} does not exist.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
    try:
        return str(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        raise UserError(
            f"{name} is no local folder and not to be had from the Hub ({first_line(error).removeprefix('Got: ')}): "
            "give a local folder, or mend the name or the network (unbake doctor)."
        ) from None


def _merge_adapter(adapter: str, target: str, base: str | None, trust_remote_code: bool) -> str:
    if base is None:
        raise UserError(
            f"{adapter} is a PEFT adapter: only models.finetuned may be one, on top of models.base."
        )
    try:
        from peft import PeftModel
    except ImportError:
        raise UserError(f"{adapter} is a PEFT adapter: {install('adapters')}.") from None
    files = [os.path.join(adapter, name) for name in os.listdir(adapter) if name.startswith("adapter_")]
    if not any(name.endswith(".safetensors") for name in files):
        raise UserError(f"the adapter {adapter} has no .safetensors file.")
    origin = _origin(files, base)
    if _converted(target, origin):
        return target
    # Merged in float32 so that Delta = B A is not rounded away before it is measured.
    model = load_model(base, torch.float32, trust_remote_code=trust_remote_code)
    try:
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    except (ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"the adapter {adapter} does not fit the base model: {first_line(error)}.") from None
    save(merged, load_tokenizer(base, trust_remote_code), target, notes={CONVERTED: origin})
    return target
