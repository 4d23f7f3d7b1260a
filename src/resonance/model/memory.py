"""How many bytes of a GPU's memory a training takes, from its settings alone: plain arithmetic, no torch.

What torch's allocator holds at its fullest is what stays from step to step (weights, adapters, optimiser states, DDP's
buckets) and what the fullest moment of a step or of an evaluation adds to it. `predict` adds up every moment that can be
the fullest and names the one that is. What forward keeps for backward is derived in `activations`.

The loss is a moment of its own, because it works in float32 over the whole vocabulary: logits and log-probabilities at the
end of forward, then log-probabilities, their gradient and the logits' gradient, 12 bytes a label token and word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from resonance.model.activations import backward_working, forward_working, kept_for_backward
from resonance.model.job import Tensor, TrainingJob, trained_tensors
from resonance.units import ALIGNED_SECONDS, FRAMES_PER_POSITION, FRAMES_PER_SECOND, MEBIBYTE, POSITIONS_PER_SECOND

# cuBLAS works in memory from torch's allocator: 8,519,680 bytes (":4096:2:16:8", aten CublasHandlePool.cpp; 32 MiB on
# Hopper). The thread that runs backward has a second piece.
CUBLAS_WORKSPACES = 2 * (2 * 4096 + 8 * 16) * 1024
# The driver's own memory for a process that has loaded torch's kernels. Reported, not measured by us: 300 to 500 MiB on
# cards from Turing to Hopper with kernels loaded when they are first used (the default since CUDA 12.2).
CUDA_CONTEXT = 450 * MEBIBYTE
# Reserved by the allocator and not usable: holes between tensors of batches with other lengths. An estimate.
FRAGMENTATION = 0.08

# Bytes of state a weight. Whatever is not listed here counts as Adam: two float32.
ADAM = 8
STATE_BYTES = {"sgd": 0, "adagrad": 4, "rmsprop": 4, "lion_32bit": 4, "paged_lion_32bit": 4}
# Number of 8-bit states a weight.
STATES_8BIT = {"adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1, "paged_lion_8bit": 1}
SMALLEST_8BIT = 4096  # elements; bitsandbytes keeps the states of smaller tensors in float32
BLOCK_8BIT = 256  # elements that share a float32 scale there
PAGED_FROM = 100_000  # elements; states of larger tensors lie in managed memory, which torch does not count
BLOCK_4BIT = 64  # nf4 weights that share a float32 scale
LARGEST_BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size and allgather_bucket_size


class Moment(NamedTuple):
    """What one moment of a step or of an evaluation adds to what stays, in bytes."""

    name: str
    gradients: int = 0
    activations: int = 0
    logits: int = 0
    working: int = 0

    @property
    def total(self) -> int:
        return self.gradients + self.activations + self.logits + self.working


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Predicted bytes on each GPU."""

    weights: int
    adapters: int
    optimizer: int
    buckets: int
    batch: int  # features and tokens on the device, and cuBLAS' workspaces
    training: Moment  # the fullest of a training step
    evaluation: Moment  # the fullest of an evaluation

    @property
    def fullest(self) -> Moment:
        return max(self.training, self.evaluation, key=lambda moment: moment.total)

    @property
    def parts(self) -> dict[str, int]:
        """The peak by part."""
        moment = self.fullest
        return {
            "weights": self.weights,
            "adapters": self.adapters,
            "optimizer": self.optimizer,
            "buckets": self.buckets,
            "gradients": moment.gradients,
            "activations": moment.activations,
            "logits": moment.logits,
            "working": moment.working + self.batch,
        }

    @property
    def peak(self) -> int:
        """What `torch.cuda.max_memory_allocated` counts."""
        return sum(self.parts.values())

    @property
    def on_card(self) -> int:
        """What nvidia-smi shows: with the allocator's holes and the CUDA context. A card has to have this much free."""
        return int(self.peak * (1 + FRAGMENTATION)) + CUDA_CONTEXT


def predict(job: TrainingJob) -> MemoryPlan:
    """The memory of `job` at its fullest, by part. Pure, and about a millisecond."""
    trained = list(trained_tensors(job))
    gradients = 4 * sum(tensor.elements for tensor in trained)
    adapters = gradients if job.finetuning == "lora" else 0
    weights, optimizer, buckets = weight_bytes(job), optimizer_bytes(job, trained), 0
    if job.zero_stage:
        weights, gradients, optimizer, buckets = _zero(job, weights, gradients // 4, optimizer)
    elif job.ranks > 1:
        buckets = gradients  # DDP copies gradients into buckets of its own (gradient_as_bucket_view is off)
    training = max(training_moments(job, trained, gradients), key=lambda moment: moment.total)
    evaluation = max(evaluation_moments(job), key=lambda moment: moment.total)
    return MemoryPlan(weights, adapters, optimizer, buckets, _batches(job) + CUBLAS_WORKSPACES, training, evaluation)


# --- what stays from step to step ---------------------------------------------------------------------------------


def weight_bytes(job: TrainingJob) -> int:
    """The base model's weights: in 16 bits under LoRA, else in float32, so that small updates are not rounded away.

    Quantised: bitsandbytes holds linear layers as int8 with a float32 scale a row, or as nf4 with a float32 scale for 64
    weights; PEFT's `prepare_model_for_kbit_training` turns all the rest to float32. `proj_out` is the embedding and is not
    quantised.
    """
    shape, linear = job.shape, job.shape.linear_weights
    if job.quantization == "8bit":
        return linear + 4 * shape.linear_outputs + 4 * (shape.parameters - linear)
    if job.quantization == "4bit":
        return linear // 2 + 4 * (linear // BLOCK_4BIT) + 4 * (shape.parameters - linear)
    return shape.parameters * (job.computed if job.finetuning == "lora" else 4)


def optimizer_bytes(job: TrainingJob, trained: Sequence[Tensor]) -> int:
    """States that the optimiser keeps beside the weights.

    Adam: two float32 a weight. bitsandbytes' 8-bit kinds: a byte each and a scale for 256, except for small tensors and
    embeddings (Trainer asks for 32 bits there). Adafactor: a row and a column of each matrix
    (of the convolutions a little more).
    """
    if job.optim == "adafactor":
        return 4 * sum(tensor.copies * (tensor.rows + tensor.columns * (tensor.columns > 1)) for tensor in trained)
    states = STATES_8BIT.get(job.optim)
    total = 0
    for tensor in trained:
        scales, each = 0, STATE_BYTES.get(job.optim, ADAM) if states is None else 4 * states
        if states and tensor.size >= SMALLEST_8BIT and not tensor.embedding:
            scales, each = 4 * states * -(-tensor.size // BLOCK_8BIT), states
        paged = job.optim.startswith("paged") and tensor.size >= PAGED_FROM
        total += tensor.copies * (scales + each * tensor.size * (not paged))
    return total


def _zero(job: TrainingJob, weights: int, trained: int, optimizer: int) -> tuple[int, int, int, int]:
    """Weights, gradients, optimiser and buckets of a rank under DeepSpeed's ZeRO. `trained`: elements, not bytes.

    Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 5: trained
    weights and gradients in the format of the computation, a float32 copy of the weights beside the optimiser's states.
    Stage 1 shards that copy and the states, 2 the gradients too, 3 the weights too.
    """
    h, ranks, stage = job.computed, job.ranks, job.zero_stage
    if job.finetuning != "lora":
        weights -= (4 - h) * trained
    gradients = h * trained // (ranks if stage >= 2 else 1)
    states = (optimizer + 4 * trained * (h == 2)) // ranks
    buckets = 2 * h * min(trained, LARGEST_BUCKET)  # one reduces gradients, one gathers weights
    return weights // (ranks if stage == 3 else 1), gradients, states, buckets


def _batches(job: TrainingJob) -> int:
    """Features in float32 and two rows of int64 tokens. Trainer moves the batches of all accumulation steps at once."""
    clips = job.per_device_train_batch_size * job.gradient_accumulation_steps + job.per_device_eval_batch_size
    features = 4 * job.shape.num_mel_bins * FRAMES_PER_POSITION * job.positions
    return clips * (features + 2 * 8 * job.label_tokens)


# --- the moments that can be the fullest --------------------------------------------------------------------------


def training_moments(job: TrainingJob, trained: Sequence[Tensor], gradients: int) -> Iterator[Moment]:
    """From the end of forward to the update. gradients: bytes of all of them together."""
    shape, d, h = job.shape, job.shape.d_model, job.computed
    kept = kept_for_backward(job)
    heard = job.per_device_train_batch_size * job.positions
    logits = job.per_device_train_batch_size * job.label_tokens * shape.vocab_size
    accumulates = job.gradient_accumulation_steps > 1
    before = gradients if accumulates else 0  # of the micro-batches before
    elements = max(sum(tensor.elements for tensor in trained), 1)
    of_decoder = gradients * sum(tensor.elements for tensor in trained if tensor.side == "decoder") // elements
    encoder_output = 4 * heard * d
    checkpoints = job.gradient_checkpointing

    if checkpoints:  # which does not keep the weights' 16-bit copies, but autocast does until forward ends
        working = _autocast_copies(job, trained) + encoder_output
        yield Moment("end of forward", before, kept.total, h * logits, working)
    yield Moment("loss", before, kept.total, 8 * logits, encoder_output)
    yield Moment("gradient of the loss", before, kept.total, 12 * logits)

    waiting = 0  # proj_out's gradient waits for that of the embedding, which it is added to
    if job.trains("decoder"):
        waiting = 4 * shape.embedding
        product = 2 * shape.embedding * (h == 2)
        yield Moment("gradient of proj_out", before + waiting, kept.total - kept.head, h * logits, product)
        done = max(before, of_decoder) + waiting
        yield Moment("gradient of the embedding", done, kept.encoder + kept.front, 0, waiting * accumulates)

    working = max(
        backward_working(job, "decoder", job.per_device_train_batch_size * job.label_tokens), 2 * h * heard * d
    )
    if checkpoints:
        working += kept.decoder_layer + encoder_output * (kept.encoder > 0)  # its gradient, from layer to layer
    yield Moment("backward of the decoder", before + waiting, kept.total - kept.head, 0, working)
    if kept.encoder:
        working = backward_working(job, "encoder", heard) + kept.encoder_layer * checkpoints
        layers = kept.encoder - encoder_output  # the last norm's input is free
        yield Moment("backward of the encoder", max(before, of_decoder), layers + kept.front, 0, working)
        one = layers // shape.encoder_layers
        most = max(before, gradients - (gradients - of_decoder) // shape.encoder_layers)
        yield Moment("backward of the first layer", most, one + kept.front, 0, working)
    else:
        yield Moment("forward of the encoder", before, 0, 0, forward_working(job, heard))
    largest = 4 * max((tensor.size for tensor in trained), default=0)
    yield Moment("end of backward", gradients, kept.front, 0, largest * accumulates)
    yield Moment("update", gradients, 0, 0, _update_working(job, gradients, largest))
    if job.aligns:
        yield _alignment(job)


def _alignment(job: TrainingJob) -> Moment:
    """Backward of the encoder alone, in evaluation mode: neither dropout nor checkpoints, which transformers uses only in
    training. Beside it its difference from the target in float32, and all features and float16 targets."""
    alone = replace(job, gradient_checkpointing=False, lora_dropout=0.0)
    kept, heard = kept_for_backward(alone), job.per_device_train_batch_size * job.positions
    d, frames = job.shape.d_model, FRAMES_PER_SECOND * job.shape.num_mel_bins * job.residual
    held = int(ALIGNED_SECONDS * (2 * POSITIONS_PER_SECOND * d + frames))
    working = max(backward_working(alone, "encoder", heard), 4 * 4 * heard * d)
    return Moment("alignment", 0, kept.encoder + kept.front, 0, working + held)


def _autocast_copies(job: TrainingJob, trained: Sequence[Tensor]) -> int:
    """16-bit copies of float32 weights that are trained: autocast makes one of each and holds it until forward ends."""
    if job.computed == 4 or job.finetuning == "lora":
        return 0
    return 2 * sum(tensor.elements for tensor in trained if tensor.columns > 1)


def _update_working(job: TrainingJob, gradients: int, largest: int) -> int:
    """torch's AdamW, unless fused, takes the roots of all second moments at once; Adafactor goes tensor by tensor and
    holds the squared gradient and the update of one."""
    if job.optim == "adamw_torch":
        return gradients
    return 2 * largest if job.optim == "adafactor" else 0


def evaluation_moments(job: TrainingJob) -> Iterator[Moment]:
    """The loss by teacher forcing under Trainer's autocast, then text by generation, whose encoder runs outside of it."""
    shape, d, h, plain = job.shape, job.shape.d_model, job.computed, job.residual
    batch, rows = job.per_device_eval_batch_size, job.per_device_eval_batch_size * job.generation_num_beams
    if not batch:
        yield Moment("no evaluation")
        return
    heard, logits = batch * job.positions, batch * job.label_tokens * shape.vocab_size
    copies = _autocast_copies(job, list(trained_tensors(job)))
    yield Moment("evaluation's forward", 0, 0, h * logits, copies + 4 * heard * d)
    yield Moment("evaluation's loss", 0, 0, 8 * logits, 4 * heard * d)

    features = (
        h * shape.num_mel_bins * FRAMES_PER_POSITION * heard if plain == 2 else 0
    )  # in 16 bits beside the batch's
    encoder = heard * (4 * plain * d + 2 * plain * shape.encoder_ffn_dim)
    if job.adapts("encoder.layers.0.fc1"):  # LoRA adds up in float32
        encoder = max(encoder, heard * ((4 * plain + 4) * d + (plain + 8) * shape.encoder_ffn_dim))
    yield Moment("evaluation's encoder", 0, 0, 0, max(encoder, forward_working(job, heard)) + features)

    cached = plain if job.finetuning == "lora" else h
    cross = 2 * shape.decoder_layers * rows * job.positions * d * cached
    own = 2 * shape.decoder_layers * rows * job.generation_tokens * d * cached
    states = heard * d * plain + (rows * job.positions * d * plain if job.generation_num_beams > 1 else 0)
    # Of beams the last layer's, before transformers puts it into its cache; without them it is where it stays, and so is the
    # cache of what will be written.
    beams = job.generation_num_beams > 1
    first = rows * job.positions * d * cached if beams else own
    if job.adapts("decoder.layers.0.encoder_attn.v_proj"):
        first += rows * job.positions * d * (12 if plain == 2 else 8)
    yield Moment("first token", 0, 0, 0, cross + states + first + copies)
    moved = rows * d * cached * job.positions if beams else 0
    yield Moment("last token", 0, 0, 8 * rows * shape.vocab_size, cross + own + states + max(copies, moved))
