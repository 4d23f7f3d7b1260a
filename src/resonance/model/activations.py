"""What forward keeps for backward, in bytes: plain arithmetic over what torch's autograd saves in transformers' Whisper.

The idea of counting layer by layer is that of Korthikanti et al. 2022, "Reducing Activation Recomputation in Large
Transformer Models". Their formula knows neither autocast nor LoRA; ours is read off torch 2.13 and compared with what it
keeps in the tests. Letters: n tokens (batch x positions or batch x label tokens), d `d_model`, h bytes of a number in
matrix products, 2 under autocast, else 4.

- Layer norms are float32 under autocast: they keep their input in float32 (4nd, 8n for mean and spread) and hand on
  float32, of which every linear layer behind makes its own 16-bit copy.
- A linear layer keeps its input (hn x inputs) if its weight is trained, and the 16-bit copy of a float32 weight. A frozen
  16-bit one keeps nothing, because the gradient of its input needs only the weight.
- A LoRA layer keeps the dropped-out copy that its A matrix reads (hn x inputs), the mask (1 byte a number) and A's output.
- Attention keeps queries, keys, values, output (h each) and a float32 per token and head, whether CUDA takes its flash or
  its memory-efficient kernel. There is never a matrix of scores. Its output is transposed for out_proj, which then keeps a
  copy (after the memory-efficient kernel, in float32 and before Ampere, it needs none: counted here all the same).
- GELU keeps its input. Residual additions keep nothing, nor does Whisper's dropout, which is 0.
- bitsandbytes' int8 product keeps its whole input, float32 behind a norm; its nf4 product keeps none. Either gives back the
  type of its input, so that GELU works, and keeps, in float32: 8-bit training needs twice the activations of 16-bit.
- Nothing is kept in front of the first trained weight: no convolutions under LoRA, no encoder where it is frozen.
- A checkpointed layer keeps its input; its backward computes one layer's share again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from resonance.model.job import Side, TrainingJob
from resonance.units import FRAMES_PER_POSITION


class Kept(NamedTuple):
    """Bytes that forward keeps for backward, by part of the model. Backward frees the head first, the front last."""

    head: int  # the last layer norm and proj_out
    decoder: int
    encoder: int
    front: int  # the convolutions
    decoder_layer: int  # what checkpointing adds while it computes one layer again
    encoder_layer: int

    @property
    def total(self) -> int:
        return self.head + self.decoder + self.encoder + self.front


def kept_for_backward(job: TrainingJob) -> Kept:
    """What autograd holds when the logits are there, beside the parameters, the batch and the loss."""
    shape, d, h = job.shape, job.shape.d_model, job.computed
    heard = job.per_device_train_batch_size * job.positions
    said = job.per_device_train_batch_size * job.label_tokens
    encoder_output = 4 * heard * d  # a layer norm's: float32

    reaches_front = job.trains("encoder") or job.adapts("encoder.conv1") or job.adapts("encoder.conv2")
    front = _front(job) if reaches_front else 0
    first = _layer(job, "encoder", heard, heard, reaches_front, False)
    encoder_layer = _layer(job, "encoder", heard, heard, first.grad, False)
    heard_grad = encoder_layer.grad
    encoder = first.kept + encoder_layer.kept * (shape.encoder_layers - 1)
    if job.gradient_checkpointing and heard_grad:
        encoder = job.residual * heard * d * shape.encoder_layers
    encoder += _norm(heard, d) * heard_grad

    embeds = job.trains("decoder") or job.adapts("decoder.embed_tokens")
    first = _layer(job, "decoder", said, heard, embeds, heard_grad)
    decoder_layer = _layer(job, "decoder", said, heard, first.grad, heard_grad)
    decoder = first.kept + decoder_layer.kept * (shape.decoder_layers - 1) + encoder_output * decoder_layer.keeps_heard
    if job.gradient_checkpointing and decoder_layer.grad:
        decoder = job.residual * said * d * shape.decoder_layers + encoder_output

    head = _norm(said, d) * decoder_layer.grad + h * said * d * job.trains("decoder")
    if h == 2 and job.residual == 4:
        head += h * shape.embedding  # proj_out's float32 weight in 16 bits
    # A float32 checkpoint is the input that the first layer norm keeps; of a 16-bit one that norm makes a copy.
    shared = 4 * d if job.residual == 4 else 0
    again = decoder_layer.kept - shared * said, encoder_layer.kept - shared * heard
    return Kept(head, decoder, encoder, front, *again)


class _Layer(NamedTuple):
    kept: int
    grad: bool  # whether its output needs a gradient
    keeps_heard: bool  # whether it keeps the encoder's output itself, one tensor for all layers


def _layer(job: TrainingJob, side: Side, tokens: int, heard: int, grad: bool, heard_grad: bool) -> _Layer:
    """One layer over `tokens`, in the decoder attending to `heard` positions. grad: whether its input needs a gradient,
    heard_grad: whether the encoder's output does."""
    shape, d, h, inner = job.shape, job.shape.d_model, job.computed, job.inner
    heads = shape.encoder_attention_heads if side == "encoder" else shape.decoder_attention_heads
    ffn = shape.encoder_ffn_dim if side == "encoder" else shape.decoder_ffn_dim
    trained = job.trains(side)

    grad |= trained
    projections = _linears(job, side, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), tokens, 4, grad)
    kept = _norm(tokens, d) * grad + projections.kept + 4 * tokens * d * projections.keeps_input
    kept += _attention(job, tokens, tokens, heads) * projections.grad
    out = _linears(job, side, ("self_attn.out_proj",), tokens, h, projections.grad)
    kept += out.kept + h * tokens * d * out.keeps_input
    grad |= out.grad

    keeps_heard = False
    if side == "decoder":
        query = _linears(job, side, ("encoder_attn.q_proj",), tokens, 4, grad)
        both = _linears(job, side, ("encoder_attn.k_proj", "encoder_attn.v_proj"), heard, 4, heard_grad)
        kept += _norm(tokens, d) * grad + query.kept + 4 * tokens * d * query.keeps_input + both.kept
        keeps_heard = both.keeps_input
        kept += _attention(job, tokens, heard, heads) * (query.grad or both.grad)
        out = _linears(job, side, ("encoder_attn.out_proj",), tokens, h, query.grad or both.grad)
        kept += out.kept + h * tokens * d * out.keeps_input
        grad |= out.grad

    fc1 = _linears(job, side, ("fc1",), tokens, 4, grad)
    kept += _norm(tokens, d) * grad + fc1.kept + 4 * tokens * d * fc1.keeps_input
    fc2 = _linears(job, side, ("fc2",), tokens, inner, fc1.grad)
    kept += inner * tokens * ffn * fc1.grad + fc2.kept + inner * tokens * ffn * fc2.keeps_input
    grad |= fc2.grad
    if side == "encoder" and job.precision == "fp16" and job.residual == 2:
        kept += 2 * tokens * d * grad  # what transformers clamps to float16's range at the end of a layer
    return _Layer(kept, grad, keeps_heard)


class _Linears(NamedTuple):
    kept: int  # without the input itself
    grad: bool  # whether an output needs a gradient
    keeps_input: bool  # whether the input itself is kept: one tensor, however many keep it


def _linears(job: TrainingJob, side: Side, names: Sequence[str], tokens: int, size: int, grad: bool) -> _Linears:
    """Linear layers that share an input of `size` bytes a number. grad: whether it needs a gradient."""
    h, trained = job.computed, job.trains(side)
    every = job.shape.encoder_linears if side == "encoder" else job.shape.decoder_linears
    kept, keeps_input, out_grad = 0, job.quantization == "8bit" and grad, grad or trained
    for linear in (linear for linear in every if linear.name in names):
        numbers = tokens * linear.inputs
        if trained:
            keeps_input |= h == size
            kept += h * numbers * (h != size) + h * linear.weights * (h == 2 and grad)
        elif job.adapts(f"{side}.layers.0.{linear.name}"):
            out_grad = True
            dropped = job.lora_dropout > 0
            kept += h * tokens * job.lora_r + numbers * (grad and dropped)
            kept += h * numbers * (h == 2 or dropped)
            kept += h * job.lora_r * (linear.inputs + linear.outputs) * (h == 2)
            keeps_input |= h == 4 and not dropped
    return _Linears(kept, out_grad, keeps_input)


def _norm(tokens: int, d_model: int) -> int:
    return 4 * tokens * d_model + 8 * tokens


def _attention(job: TrainingJob, tokens: int, keys: int, heads: int) -> int:
    return 2 * job.computed * job.shape.d_model * (tokens + keys) + 4 * tokens * heads


def _front(job: TrainingJob) -> int:
    """The convolutions: the second keeps its input, the GELU behind each the same in front of it; in 16 bits there are
    copies of the features and the weights too."""
    shape, h, batch = job.shape, job.computed, job.per_device_train_batch_size
    frames = FRAMES_PER_POSITION * job.positions
    copies = batch * shape.num_mel_bins * frames + sum(shape.convolutions) if h == 2 else 0
    return h * (batch * shape.d_model * (2 * frames + job.positions) + copies)


def backward_working(job: TrainingJob, side: Side, tokens: int) -> int:
    """Bytes in flight at the widest point of a layer's backward, its feed-forward block.

    Beside the residual's gradient: those on both sides of GELU. Where fc2 is trained it has freed its input by then. LoRA
    on fc2 is wider at the end of the layer's forward, when backward is about to begin: its input in float32, and what
    dropout makes of it. bitsandbytes turns the weight back to floating point for the product.
    """
    shape, h, inner = job.shape, job.computed, job.inner
    ffn = shape.encoder_ffn_dim if side == "encoder" else shape.decoder_ffn_dim
    working = job.residual * shape.d_model + 2 * inner * ffn
    if job.trains(side):
        working = (job.residual + h * (h == 2)) * shape.d_model + inner * ffn
    elif h == 2 and job.adapts(f"{side}.layers.0.fc2"):
        working = max(working, 4 * h * shape.d_model + (inner + (8 if job.lora_dropout else 4)) * ffn)
    dequantized = 4 * shape.d_model * ffn if job.quantization != "none" else 0
    return tokens * working + dequantized


def forward_working(job: TrainingJob, tokens: int) -> int:
    """Bytes in flight in an encoder layer of which nothing is kept, at its widest point: the convolutions' output, which
    the encoder holds on to; the layer's input, the residual and the norm's output; both sides of GELU."""
    narrow = 2 * job.residual + 4 + job.computed
    return tokens * (narrow * job.shape.d_model + 2 * job.inner * job.shape.encoder_ffn_dim)
