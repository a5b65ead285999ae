"""What others' files may not do: run code, take memory by their word, or reach outside their folder."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from safetensors.torch import load_file, save_file

from engine.checkpoints import Endpoints
from engine.errors import UserError
from engine.model_files import require_safetensors
from engine.models import load_config, load_model, load_tokenizer
from engine.rundir import RunDir
from engine.select import open_features
from engine.sources import resolve
from engine.spec import RunSpec
from engine.store import GradientStore, StoreShape
from jobs.__main__ import main


class Bomb:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def header(**fields: Any) -> bytes:
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text


HEADERS: dict[str, bytes] = {
    "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header of 10^12 bytes": struct.pack("<Q", 10**12) + b"{}",
    "a header beyond the file": struct.pack("<Q", 10_000) + b"{}",
    "a tensor of 2^40 numbers in an empty file": header(
        w={"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
    ),
    "a shape whose product overflows": header(
        w={"dtype": "F32", "shape": [2**32, 2**32, 4], "data_offsets": [0, 16]}
    )
    + b"\0" * 16,
    "a negative place": header(w={"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}) + b"\0" * 16,
    "overlapping tensors": header(
        a={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        b={"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
    )
    + b"\0" * 24,
    "a size that does not fit its shape": header(w={"dtype": "F32", "shape": [9], "data_offsets": [0, 16]})
    + b"\0" * 16,
    "a header that is no JSON": struct.pack("<Q", 4) + b"\xff{}}" + b"\0" * 8,
    "nothing": b"",
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_lying_safetensors_header_is_one_sentence_and_takes_no_memory(
    case: str, tiny_base: str, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_base, tmp_path / "model"))
    (model / "model.safetensors").write_bytes(HEADERS[case])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (lambda: Endpoints(tiny_base, str(model)), lambda: load_model(str(model))):
        with pytest.raises(UserError) as caught:
            read()
        assert "\n" not in str(caught.value)
        assert str(model) in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10, "kilobytes"


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/passwd", "a/../../b.safetensors", "..", 7]
)
def test_a_list_of_weights_that_leads_outside_the_folder_is_refused(
    name: Any, tiny_base: str, tmp_path: Path
) -> None:
    shutil.copytree(tiny_base, tmp_path / "other")
    model = Path(shutil.copytree(tiny_base, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_file(weights, model / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside the folder"):
        require_safetensors(str(model))
    with pytest.raises(UserError, match="outside the folder"):
        resolve(str(model), str(tmp_path / "converted"))


def test_pickled_weights_are_never_read(tiny_base: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_base, tmp_path / "model"))
    bomb = pickle.dumps(Bomb(tmp_path / "went-off"))
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        (model / name).write_bytes(bomb)
    load_model(str(model))  # beside sound weights they are left alone
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pickle"):
        load_model(str(model))
    assert not (tmp_path / "went-off").exists()


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "our_own"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def test_a_models_own_python_runs_only_where_the_spec_names_it(
    tiny_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    model = Path(shutil.copytree(tiny_base, tmp_path / "model"))
    ran = tmp_path / "ran"
    (model / "own.py").write_text(CODE.format(marker=str(ran)))
    parts = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    for file, more in (
        ("config.json", {"auto_map": parts, "model_type": "our_own"}),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"},
        ),
    ):
        (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | more))
    for read in (load_config, load_model):
        with pytest.raises(UserError) as caught:
            read(str(model))
        assert "\n" not in str(caught.value)
    with contextlib.suppress(UserError):  # one of no class that is known may be read as its file says
        load_tokenizer(str(model))
    assert not ran.exists()
    load_config(str(model), trust_remote_code=True)
    assert ran.exists()
    named = {"base": str(model), "finetuned": str(model), "trust_remote_code": True}
    fields = {
        "run_dir": "r",
        "models": named,
        "corpus": {"paths": ["c"]},
        "task": {"kind": "language_modelling"},
    }
    assert not RunSpec.from_dict(
        {**fields, "models": {**named, "trust_remote_code": False}}
    ).models.trust_remote_code
    assert "trust_remote_code: true" in RunSpec.from_dict(fields).to_yaml()  # which the report shows


def test_features_that_hold_pickles_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.ones(4))
    bomb = Bomb(tmp_path / "went-off")
    np.save(tmp_path / "x.npy", np.array([[bomb] * 4] * 8), allow_pickle=True)
    array = zarr.create_array(
        tmp_path / "y.zarr", shape=(8, 4), chunks=(8, 4), dtype="float32", zarr_format=2, compressors=None
    )
    array[:] = 1
    described = json.loads((tmp_path / "y.zarr/.zarray").read_text())
    (tmp_path / "y.zarr/.zarray").write_text(json.dumps({**described, "filters": [{"id": "pickle"}]}))
    (tmp_path / "y.zarr/0.0").write_bytes(pickle.dumps(bomb))
    for name in ("x.npy", "y.zarr"):
        with pytest.raises(UserError) as caught:
            open_features(str(tmp_path / name), str(tmp_path / "t.npy")).read(0, 8)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "went-off").exists()


def test_a_run_directory_that_names_files_outside_itself_reaches_none_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """verify --repair removes what records name: never anything beside the run."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("precious")
    run = RunDir(str(tmp_path / "run"))
    GradientStore.create(run, StoreShape(1, 4, 8, 4), np.ones(8), {"fingerprint": "f"})
    run.write_bytes("spec.yaml", b"")
    run.write_json("stages/extract.inputs.json", {})
    for name in ("../mine/file", "../mine", str(mine / "file"), "models/../../mine/file"):
        run.write_json("stages/extract.json", {"fingerprint": "x", "result": {}, "outputs": {name: "0"}})
        assert main(["verify", str(tmp_path / "run"), "--repair"]) == 2
        assert "lies outside" in capsys.readouterr().err
        assert (mine / "file").read_text() == "precious"
        for call in (run.read_bytes, run.remove, run.exists, run.make, run.digest):
            with pytest.raises(UserError, match="lies outside"):
                call(name)


def test_a_store_of_the_format_that_knows_pickles_is_not_opened(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    GradientStore.create(run, StoreShape(1, 4, 8, 4), np.ones(8), {"fingerprint": "f"})
    shutil.rmtree(tmp_path / "gradients.zarr")
    zarr.create_group(tmp_path / "gradients.zarr", zarr_format=2)
    (tmp_path / "gradients.zarr/zarr.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        GradientStore.open(run)


CHECKPOINT = """
    import pickle, sys, tempfile
    from pathlib import Path
    import torch
    import torch.distributed as dist
    from cluster.deepspeed_stepper import DeepSpeedStepper
    from engine.spec import Retrain
    dist.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
    folder = Path(sys.argv[2])
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (folder / "went-off",))
    for stage, dtype in ((1, "float32"), (2, "auto"), (3, "auto"), (0, "float32")):
        retrain = Retrain(zero_stage=stage, dtype=dtype, batch_size=4)
        stepper = DeepSpeedStepper(sys.argv[1], retrain, None, (1, 4), torch.device("cpu"), 0)
        stepper.save(str(folder / str(stage)))
        stepper.load(str(folder / str(stage)))
        for file in (folder / str(stage)).rglob("*model_states.pt"):
            sound = torch.load(file, weights_only=True)
            file.write_bytes(b"")
            torch.save({**sound, "more": Bomb()}, file)
        try:
            stepper.load(str(folder / str(stage)))
        except pickle.UnpicklingError:
            print("refused", flush=True)
        stepper.close()
"""


@pytest.mark.slow
def test_a_deepspeed_checkpoint_is_read_as_weights_alone(tiny_base: str, tmp_path: Path) -> None:
    """What DeepSpeed writes it reads again; a class that is not known to be harmless is refused."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHECKPOINT), tiny_base, str(tmp_path)],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused") == 4, done.stdout + done.stderr
    assert not (tmp_path / "went-off").exists()


@pytest.mark.parametrize("field", ["run_dir", "corpus.paths", "models.base", "models.finetuned"])
def test_an_address_with_a_password_is_refused_and_not_repeated(
    field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The spec is written into the run and shown in the report."""
    spec = f"run_dir: {tmp_path / 'run'}\nmodels: {{base: a, finetuned: b}}\ncorpus: {{paths: [c.jsonl]}}\n"
    (tmp_path / "run.yaml").write_text(spec + "task: {labels: [a, b], template: '{text} topic:'}\n")
    secret = "s3://AKIAKEY:hunter2@bucket/folder"
    value = f"[{secret}]" if field == "corpus.paths" else secret
    assert main(["extract", "--config", str(tmp_path / "run.yaml"), f"--{field}", value]) == 2
    err = capsys.readouterr().err
    assert f"{field}: an address with a password in it" in err
    assert err.count("\n") == 1
    assert "hunter2" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


PRIVATE = """
    import json, os, subprocess, sys
    import psutil, ray
    from cluster.session import session
    from engine.spec import Ray
    with session(Ray(num_cpus=1, object_store_mb=100)):
        @ray.remote
        class Worker:
            def there(self):
                return os.getpid()
        worker = Worker.remote()
        ray.get(worker.there.remote())
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        sockets = {p.name(): [c.laddr.ip for c in p.net_connections("tcp") if c.status == "LISTEN"] for p in processes}
        code = "import sys; from cluster.session import session; from engine.spec import Ray; "
        code += "session(Ray(address=sys.argv[1])).__enter__()"
        address = ray.get_runtime_context().gcs_address
        environment = {**os.environ, "RAY_AUTH_TOKEN": "not-the-token-of-this-instance-at-all"}
        command = [sys.executable, "-c", code, address]
        stranger = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        print(json.dumps([sockets, stranger.stderr]))
"""


def test_a_private_ray_listens_on_this_machine_alone_and_wants_its_token() -> None:
    """No socket of any of its processes is bound to another interface; a client with another token is refused."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PRIVATE)],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sockets, said = json.loads(done.stdout.splitlines()[-1])
    assert {"gcs_server", "raylet"} < sockets.keys()
    assert not any("dashboard" in name.lower() for name in sockets if name != "ray::DashboardAgent")
    bound = [ip for ips in sockets.values() for ip in ips]
    assert len(bound) >= 5
    assert set(bound) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, sockets
    assert "cannot connect to Ray" in said
