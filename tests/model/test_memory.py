"""Predicted bytes beside those that torch holds, counted without a GPU.

Fake tensors have a shape and a number format and no contents, so that a training step of whisper-small takes a second. Each
storage is counted from its first use until nothing refers to it any more: what autograd keeps, what a custom function keeps
beside autograd, and what is only in flight. Three things that CUDA does otherwise than a CPU are put in its way: layer
norms in float32 under autocast, dropout's mask of one byte, and (what a fake tensor hides) no causal mask as a tensor.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.models.whisper.modeling_whisper as modeling
from accelerate.utils import convert_outputs_to_fp32
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, WhisperConfig, WhisperForConditionalGeneration
from transformers.initialization import no_init_weights

from resonance.model import lora
from resonance.model.activations import kept_for_backward
from resonance.model.context import allow_any_audio_context
from resonance.model.job import TrainingJob, trained_tensors
from resonance.model.load import load_whisper
from resonance.model.memory import (
    CUBLAS_WORKSPACES,
    Moment,
    evaluation_moments,
    optimizer_bytes,
    predict,
    training_moments,
    weight_bytes,
)
from resonance.model.sizes import PUBLISHED, WhisperShape, shape_from_config
from resonance.train import alignment
from resonance.train.trainer import label_token_loss
from resonance.transcribe.decoding import decode, unwrap
from resonance.units import ALIGNED_SECONDS

TINY, SMALL = PUBLISHED["tiny"], PUBLISHED["small"]
SHALLOW = replace(TINY, encoder_layers=2, decoder_layers=2)
NARROW = WhisperShape(64, 2, 2, 1, 1, 256, 256, vocab_size=300, num_mel_bins=80)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ALL_LINEAR = ("all-linear",)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages alive now and at most, without those of `known` tensors."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: Any = WeakIdKeyDictionary()
        for tensor in known:
            self.seen[tensor.untyped_storage()] = True

    def __enter__(self) -> LiveBytes:
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Autograd adds the second gradient of a shared weight to the first in place, except while a mode like this looks on.
        if func is torch.ops.aten.add.Tensor and torch._C._current_graph_task_id() != -1 and is_weight_sized(*args):
            func = torch.ops.aten.add_.Tensor
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        if storage in self.seen:
            return
        self.seen[storage] = True
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, count: int) -> None:
        self.now -= count


def is_weight_sized(one: Any, other: Any) -> bool:
    return isinstance(other, torch.Tensor) and one.shape == other.shape and one.dim() == 2 and one.shape[0] > 50_000


@pytest.fixture(autouse=True)
def like_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    layer_norm, dropout = torch.nn.functional.layer_norm, torch.nn.functional.dropout

    def float32_norm(x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
        if torch.is_autocast_enabled("cpu"):  # type: ignore[call-arg]
            x, weight, bias = x.float(), weight.float(), bias.float()
        return layer_norm(x, shape, weight, bias, eps)

    def masking_dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        return torch.native_dropout(x, p, True)[0] if training and p > 0 else dropout(x, p, training, inplace)

    monkeypatch.setattr(torch.nn.functional, "layer_norm", float32_norm)
    monkeypatch.setattr(torch.nn.functional, "dropout", masking_dropout)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    monkeypatch.setattr(modeling, "create_causal_mask", lambda **_given: None)
    return FakeTensorMode(allow_non_fake_inputs=True)


def build(job: TrainingJob, device: str) -> Any:
    """The model of a job as `train.build` makes it, with random weights or none (device "meta")."""
    numbers = {field.name: getattr(job.shape, field.name) for field in fields(WhisperShape)}
    config = WhisperConfig(**numbers, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1)
    config._attn_implementation = "sdpa"
    dtype = DTYPES[job.precision] if job.finetuning == "lora" else torch.float32
    with torch.device(device), no_init_weights() if device == "meta" else contextlib.nullcontext():
        model: Any = WhisperForConditionalGeneration(config).to(dtype)
    model.tie_weights()
    model.config.use_cache = False
    allow_any_audio_context(model)
    if job.finetuning == "lora":
        targets = job.target_modules
        with torch.device(device):
            model = lora.add_lora(model, r=job.lora_r, alpha=32, dropout=job.lora_dropout, target_modules=targets)
    else:
        lora.set_trainable(model, job.finetuning)
    if job.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def without_contents(model: Any) -> Any:
    """`model` from the meta device, its parameters as fake tensors of a CPU: autocast does nothing on meta tensors."""
    made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                made.setdefault(parameter, torch.nn.Parameter(empty, requires_grad=parameter.requires_grad))
                module._parameters[name] = made[parameter]
    return model


def batch_of(job: TrainingJob) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    size = job.per_device_train_batch_size
    tokens = torch.zeros(size, job.label_tokens, dtype=torch.int64)
    features = torch.zeros(size, job.shape.num_mel_bins, 2 * job.positions)
    return {"input_features": features, "decoder_input_ids": tokens}, tokens.clone()


def autocast(job: TrainingJob, forward: Callable[..., Any]) -> Callable[..., Any]:
    if job.precision == "fp32":
        return forward
    wrapped: Callable[..., Any] = torch.autocast("cpu", dtype=DTYPES[job.precision])(forward)
    return wrapped


def loss_of(job: TrainingJob, model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """As Trainer computes it: accelerate turns what autocast gives to float32."""
    forward = autocast(job, model.forward)
    outputs = (forward if job.precision == "fp32" else convert_outputs_to_fp32(forward))(**inputs)
    return label_token_loss(outputs, labels, torch.ones(()), label_smoothing=0.1)  # takes no more than none


def kept_by_torch(job: TrainingJob, model: Any, *known: torch.Tensor) -> int:
    inputs, labels = batch_of(job)
    with LiveBytes(*model.parameters(), *inputs.values(), labels, *known) as live:
        graph = autocast(job, model.forward)(**inputs).logits.grad_fn
        now = live.now
    assert graph is not None
    return now


TRAININGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "all-linear": {"target_modules": ALL_LINEAR},
    "full": {"finetuning": "full"},
    "frozen": {"finetuning": "frozen_encoder"},
}
# batch, encoder positions, label tokens
BATCHES = {"lora": (4, 500, 60), "all-linear": (8, 150, 60), "full": (1, 1500, 448), "frozen": (4, 150, 448)}


def job_of(name: str, shape: WhisperShape = SHALLOW, **settings: Any) -> TrainingJob:
    batch, positions, tokens = BATCHES[name]
    sizes = {"per_device_train_batch_size": batch, "positions": positions, "label_tokens": tokens}
    return TrainingJob(shape, **{**sizes, **TRAININGS[name], **settings})


KEPT = [
    *(job_of(name, gradient_checkpointing=checkpoints) for name in TRAININGS for checkpoints in (False, True)),
    *(job_of(name, precision="fp32") for name in TRAININGS),
    job_of("lora", per_device_train_batch_size=8, positions=1500, label_tokens=8),
    job_of("lora", per_device_train_batch_size=1, positions=150, label_tokens=448),
    job_of("lora", precision="fp16"),
    job_of("lora", lora_dropout=0.0, lora_r=64),
    job_of("lora", precision="fp32", lora_dropout=0.0),
    job_of("lora", target_modules=(r".*decoder.*\.fc[12]",)),
    job_of("lora", target_modules=("encoder_attn.v_proj", "fc1")),
    job_of("lora", target_modules=("k_proj", "fc2"), precision="fp32"),
    job_of("full", positions=500, label_tokens=8),
    job_of("lora", TINY),
    job_of("full", TINY, positions=1500, label_tokens=448),
    job_of("lora", SMALL),
    job_of("frozen", SMALL),
]


def label_of(job: TrainingJob) -> str:
    what = "+".join(job.target_modules) if job.finetuning == "lora" else job.finetuning
    lengths = (job.per_device_train_batch_size, job.positions, job.label_tokens)
    checkpoints = "-checkpoints" * job.gradient_checkpointing
    return f"{job.shape.d_model}-{what}-{job.precision}-{'x'.join(map(str, lengths))}{checkpoints}"


@pytest.mark.parametrize("job", KEPT, ids=label_of)
def test_forward_keeps_what_is_predicted(job: TrainingJob, fake: FakeTensorMode) -> None:
    model = build(job, "meta")
    with fake:
        found = kept_by_torch(job, without_contents(model))
    assert kept_for_backward(job).total == pytest.approx(found, rel=0.01)


LONG, SHORT = {"per_device_train_batch_size": 8, "positions": 1500, "label_tokens": 8}, {"label_tokens": 8}
STEPS = [
    ("gradient of the loss", job_of("lora")),
    ("loss", job_of("lora", **LONG)),
    ("backward of the encoder", job_of("lora", **LONG, gradient_checkpointing=True)),
    ("backward of the encoder", job_of("all-linear", **LONG, gradient_checkpointing=True)),
    ("gradient of proj_out", job_of("full", **LONG)),
    ("gradient of the embedding", job_of("full", per_device_train_batch_size=1, positions=150, label_tokens=8)),
    ("backward of the encoder", job_of("full", **LONG, gradient_checkpointing=True)),
    (
        "backward of the first layer",
        job_of("full", replace(SHALLOW, encoder_layers=16), gradient_checkpointing=True, label_tokens=8),
    ),
    ("backward of the decoder", job_of("frozen", TINY, **LONG, precision="fp32")),
    (
        "forward of the encoder",
        job_of("frozen", **(LONG | {"per_device_train_batch_size": 16}), gradient_checkpointing=True),
    ),
    ("gradient of the loss", job_of("full", gradient_accumulation_steps=2)),
]


@pytest.mark.parametrize(("name", "job"), STEPS, ids=[f"{name}-{label_of(job)}" for name, job in STEPS])
def test_the_fullest_moment_of_a_step_is_predicted(name: str, job: TrainingJob, fake: FakeTensorMode) -> None:
    model = build(job, "meta")
    with fake:
        without_contents(model)
        inputs, labels = batch_of(job)
        with LiveBytes(*model.parameters(), *inputs.values(), labels) as live:
            for _micro_batch in range(job.gradient_accumulation_steps):
                loss_of(job, model, inputs, labels).backward()  # type: ignore[no-untyped-call]
    predicted = fullest_before_update(job)
    assert predicted.total == pytest.approx(live.peak, rel=0.05)
    assert predicted.name == name


def fullest_before_update(job: TrainingJob) -> Moment:
    trained = list(trained_tensors(job))
    moments = training_moments(job, trained, 4 * sum(tensor.elements for tensor in trained))
    return max((moment for moment in moments if moment.name != "update"), key=lambda moment: moment.total)


@pytest.mark.parametrize("name", ["lora", "all-linear", "full"])
def test_the_alignment_before_training_is_predicted(name: str, fake: FakeTensorMode) -> None:
    long = {"per_device_train_batch_size": 8, "positions": 750}
    job = job_of(name, **long, gradient_checkpointing=True, aligns=True)
    model = build(job, "meta").eval()
    with fake:
        encoder = unwrap(without_contents(model)).model.encoder
        target = torch.empty(8, 750, job.shape.d_model, dtype=torch.float16)
        batch = alignment._Batch(batch_of(job)[0]["input_features"].to(encoder.conv1.weight.dtype), target)
        with LiveBytes(*model.parameters(), batch.features, batch.target) as live:
            parts = alignment._differences(
                encoder, batch, 8, lambda: torch.autocast("cpu", dtype=DTYPES[job.precision])
            )
            next(parts).backward()
    trained = list(trained_tensors(job))
    gradients = 4 * sum(tensor.elements for tensor in trained)
    (predicted,) = (m for m in training_moments(job, trained, gradients) if m.name == "alignment")
    held = ALIGNED_SECONDS * (50 * 2 * job.shape.d_model + 100 * job.shape.num_mel_bins * job.residual)
    assert predicted.total - held == pytest.approx(live.peak, rel=0.05)


@pytest.mark.parametrize(
    ("name", "precision"),
    [("lora", "bf16"), ("lora", "fp32"), ("all-linear", "bf16"), ("full", "bf16"), ("frozen", "bf16")],
)
def test_weights_and_gradients_are_those_of_the_model(name: str, precision: str) -> None:
    job = job_of(name, SMALL, precision=precision)
    model = build(job, "meta")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base = [parameter for path, parameter in model.named_parameters() if "lora_" not in path]
    assert sum(tensor.elements for tensor in trained_tensors(job)) == sum(parameter.numel() for parameter in trained)
    assert all(parameter.dtype == torch.float32 for parameter in trained)
    assert weight_bytes(job) == sum(parameter.nbytes for parameter in base)


@pytest.mark.parametrize("name", ["lora", "frozen"])
@pytest.mark.parametrize(
    "optim", ["adamw_torch_fused", "adamw_torch", "adamw_bnb_8bit", "lion_8bit", "adafactor", "sgd"]
)
def test_optimizer_states_are_those_that_it_makes(name: str, optim: str, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()  # it remembers tensors of other tests by their ids
    job = job_of(name, NARROW, optim=optim, precision="fp32", target_modules=("fc1", "fc2"), lora_r=64)
    model = build(job, "cpu")
    arguments = Seq2SeqTrainingArguments(output_dir=str(tmp_path), optim=optim, use_cpu=True, report_to="none")
    optimizer = Seq2SeqTrainer(model=model, args=arguments).create_optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    states = [
        state
        for kept in optimizer.state.values()
        for key, state in kept.items()
        if isinstance(state, torch.Tensor) and state.dim() and not key.startswith("qmap")  # shared by all tensors
    ]
    assert optimizer_bytes(job, list(trained_tensors(job))) == sum(state.nbytes for state in states)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_base_is_held_and_kept_as_predicted(
    quantization: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = pytest.importorskip("bitsandbytes.autograd._functions")
    monkeypatch.setattr(functions.MatMul8bitFp, "apply", functions.MatMul8bitLt.apply)  # a CPU takes a path of its own
    shape = shape_from_config(json.loads((tiny_model / "config.json").read_text(encoding="utf-8")))
    job = TrainingJob(shape, quantization=quantization, per_device_train_batch_size=4, positions=150, label_tokens=20)
    base = load_whisper(str(tiny_model), device=torch.device("cpu"), dtype=torch.bfloat16, quantization=quantization)
    base.model.config.use_cache = False
    modules = list(job.target_modules)
    model = lora.add_lora(base.model, r=16, alpha=32, dropout=0.05, target_modules=modules, quantized=True).train()
    held: dict[int, torch.Tensor] = {}
    for path, parameter in model.named_parameters():
        scales = [getattr(parameter, "SCB", None), getattr(getattr(parameter, "quant_state", None), "absmax", None)]
        for tensor in [parameter, *scales] if "lora_" not in path else []:
            if tensor is not None:
                held[tensor.data_ptr()] = tensor
    assert weight_bytes(job) == sum(tensor.nbytes for tensor in held.values())

    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # on CUDA, see load_whisper
            module.compute_dtype = torch.bfloat16
    autocast(job, model.forward)(**batch_of(job)[0])  # moves the quantised weights to where they stay
    assert kept_for_backward(job).total == pytest.approx(kept_by_torch(job, model), rel=0.01)


@pytest.mark.parametrize(("name", "beams"), [("lora", 1), ("lora", 4), ("full", 4)])
def test_generation_takes_what_is_predicted(name: str, beams: int) -> None:
    job = job_of(
        name,
        replace(NARROW, decoder_layers=4),
        per_device_eval_batch_size=4,
        positions=400,
        label_tokens=4,
        generation_num_beams=beams,
        generation_tokens=32,
    )
    model = build(job, "cpu").eval()
    whisper = model.get_base_model() if name == "lora" else model
    whisper.generation_config.suppress_tokens = [0]  # the end of the text
    if name == "full":  # Trainer wraps the model that it is given; a LoRA model is inside of that one
        model.forward = autocast(job, model.forward)
    features = torch.randn(4, job.shape.num_mel_bins, 2 * job.positions)
    with torch.no_grad(), LiveBytes(*model.parameters(), features) as live:
        decode.__wrapped__(model, features, [[1, 2, 3, 4]] * 4, num_beams=beams, max_length=32)  # type: ignore[attr-defined]
    predicted = max(moment.total for moment in evaluation_moments(job))
    assert predicted == pytest.approx(live.peak, rel=0.1)


def test_the_loss_of_an_evaluation_takes_what_is_predicted(fake: FakeTensorMode) -> None:
    job = job_of("full", per_device_eval_batch_size=4, positions=150)
    job = replace(job, per_device_train_batch_size=4)
    model = build(job, "meta").eval()
    with fake, torch.no_grad():
        without_contents(model)
        inputs, labels = batch_of(job)
        with LiveBytes(*model.parameters(), *inputs.values(), labels) as live:
            loss_of(job, model, inputs, labels)
    assert max(moment.total for moment in evaluation_moments(job)) == pytest.approx(live.peak, rel=0.02)


def test_whisper_needs_no_causal_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    create = modeling.create_causal_mask
    monkeypatch.setattr(modeling, "create_causal_mask", lambda **given: made.append(create(**given)) or made[-1])
    job = job_of("lora", NARROW, precision="fp32", per_device_train_batch_size=1, positions=10, label_tokens=5)
    build(job, "cpu")(**batch_of(job)[0])
    assert made == [None]


def test_the_parts_make_up_the_peak() -> None:
    plan = predict(job_of("lora", SMALL))
    assert plan.peak == sum(plan.parts.values())
    assert plan.on_card > plan.peak > plan.weights + plan.adapters + plan.optimizer + plan.fullest.total
    assert plan.parts["working"] >= CUBLAS_WORKSPACES


def test_an_update_by_torchs_adamw_holds_a_third_number_a_weight() -> None:
    short = {"per_device_train_batch_size": 1, "positions": 50, "label_tokens": 4, "per_device_eval_batch_size": 0}
    fused, plain = (predict(job_of("full", SMALL, optim=o, **short)) for o in ("adamw_torch_fused", "adamw_torch"))
    assert plain.training.name == "update"
    assert plain.training.total == 2 * plain.training.gradients
    assert plain.peak > fused.peak


def test_several_processes_hold_buckets_and_zero_shards() -> None:
    job = job_of("full", SMALL, ranks=4)
    alone, together = predict(replace(job, ranks=1)), predict(job)
    assert together.buckets == together.training.gradients or together.buckets == 4 * sum(
        tensor.elements for tensor in trained_tensors(job)
    )
    assert together.peak == alone.peak + together.buckets
    stages = [predict(replace(job, zero_stage=stage)) for stage in (1, 2, 3)]
    assert [stage.optimizer for stage in stages] == [stages[0].optimizer] * 3
    assert stages[0].optimizer < alone.optimizer
    assert stages[2].weights < stages[1].weights == stages[0].weights


def test_predicting_needs_no_torch() -> None:
    program = "import resonance.model.memory, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
