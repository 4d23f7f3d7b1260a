"""Train `resonance/nano` from nothing: python recipes/nano/build.py --minutes 75 --out FOLDER

Speech is synthesised while it trains. A stopped run goes on with --resume. What FOLDER/model holds at any time is a
complete checkpoint.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import torch  # noqa: E402
from recipes.nano import score  # noqa: E402
from recipes.nano.checkpoint import build_model, build_tokenizer, size_in_bytes, write_checkpoint  # noqa: E402
from recipes.nano.stream import SOUNDS, Batches  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from resonance.data.audio_context import AudioContext  # noqa: E402
from resonance.data.tokens import IGNORED_LABEL, LabelTokenizer  # noqa: E402
from resonance.model.context import allow_any_audio_context  # noqa: E402
from resonance.train.trainer import label_token_loss  # noqa: E402
from resonance.units import POSITIONS_PER_SECOND  # noqa: E402

WIDTH, ENCODER_LAYERS, DECODER_LAYERS = 160, 5, 2
LEARNING_RATE, WARM_UP_STEPS, WEIGHT_DECAY = 1.5e-3, 200, 0.01
BATCH_SECONDS = 40.0
TYPICAL_TOKENS = 60  # a batch with fewer label tokens counts for less, not as much as any other
HELP_UNTIL = 0.6  # share of the training after which only the text counts
PLACE_MARGIN = 0.15  # seconds around the place where a token is said
SAVE_SECONDS, LOG_STEPS, SCORE_STEPS = 180, 50, 500


def learning_rate(step: int, progress: float) -> float:
    """Warm-up by steps, then a cosine over the planned time to a hundredth."""
    falling = 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0)))
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * falling


def sound_loss(layer: torch.nn.Linear, hidden: torch.Tensor, sounds: torch.Tensor) -> torch.Tensor:
    """Which sound each encoder position hears; the synthesiser tells. hidden [batch, positions, width].

    From the text alone attention finds out where words are only late: after 18,000 clips nothing had
    happened, with CTC as the second loss neither. This one tells the encoder from the first batch. The layer is thrown away at the end.
    """
    return torch.nn.functional.cross_entropy(layer(hidden).flatten(0, 1), sounds.flatten(), ignore_index=IGNORED_LABEL)


class Gaze:
    """How much of each decoder layer's look at the audio goes to where the next token is said."""

    def __init__(self, model: Any) -> None:
        self.attentions = [layer.encoder_attn for layer in model.model.decoder.layers]
        self.seen: dict[tuple[int, str], torch.Tensor] = {}
        for index, attention in enumerate(self.attentions):
            for name in ("q_proj", "k_proj"):
                getattr(attention, name).register_forward_hook(functools.partial(self._keep, index, name))

    def _keep(self, index: int, name: str, _module: Any, _inputs: Any, output: torch.Tensor) -> None:
        self.seen[index, name] = output

    def loss(self, places: torch.Tensor) -> torch.Tensor:
        """Minus the logarithm of that share, heads averaged. places [batch, tokens, 2], seconds; NOWHERE counts nothing."""
        positions = self.seen[0, "k_proj"].shape[1]
        seconds = torch.arange(positions) / POSITIONS_PER_SECOND
        here = (seconds > places[..., :1] - PLACE_MARGIN) & (seconds < places[..., 1:] + PLACE_MARGIN)
        said = places[..., 0] >= 0
        total = torch.zeros(())
        for index, attention in enumerate(self.attentions):
            query, key = (
                self.seen[index, name].unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)
                for name in ("q_proj", "k_proj")
            )
            share = (query @ key.transpose(2, 3) * attention.scaling).softmax(-1).mean(1)  # [batch, tokens, positions]
            total = total - (share * here).sum(-1)[said].clamp(min=1e-4).log().sum()
        return total / max(int(said.sum()), 1) / len(self.attentions)


def attend_in_float32(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **named: Any
) -> Any:
    """torch's attention on a CPU takes three times as long in bfloat16 (2.13, AVX-512)."""
    with torch.autocast("cpu", enabled=False):
        return sdpa_attention_forward(module, query.float(), key.float(), value.float(), *rest, **named)


def train(folder: Path, minutes: float, resume: bool, threads: int, workers: int, seed: int, bf16: bool) -> None:
    torch.set_num_threads(threads)
    if bf16:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attend_in_float32
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, WIDTH, ENCODER_LAYERS, DECODER_LAYERS)
    allow_any_audio_context(model)
    model.train()
    labels = LabelTokenizer(tokenizer, True, None, learns_language=True)  # it is not always told the language
    words = labels.special("<|endoftext|>")
    ear = torch.nn.Linear(WIDTH, SOUNDS)
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *ear.parameters()], lr=0.0, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True
    )
    gaze = Gaze(model)
    step, all_clips, before = 0, 0, 0.0
    state_file = folder / "state.pt"
    if resume and state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        ear.load_state_dict(state["ear"])
        optimizer.load_state_dict(state["optimizer"])
        step, all_clips, before = state["step"], state["clips"], state["seconds"]
    folder.mkdir(parents=True, exist_ok=True)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {size_in_bytes(model) / 1e6:.1f} MB in float16, "
        f"{len(tokenizer)} tokens of which {words} text; step {step}, {before / 60:.1f} of {minutes:g} minutes done")  # fmt: skip

    progress = torch.zeros(1).share_memory_()
    stream = Batches(labels, progress, BATCH_SECONDS)
    began = saved = logged = time.monotonic()
    clips = losses = 0.0
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _frame: stopped.append(received))
    for batch in stream.made_by(workers, seed + step):
        seconds = before + time.monotonic() - began
        progress[0] = seconds / 60 / minutes
        if progress[0] >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, float(progress[0]))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = model.model.encoder(batch["input_features"])
            output = model(encoder_outputs=hidden, decoder_input_ids=batch["decoder_input_ids"], use_cache=False)
        tokens = max(int(batch["labels"].ne(IGNORED_LABEL).sum()), TYPICAL_TOKENS)
        loss = label_token_loss(output, batch["labels"], torch.tensor(tokens))
        weight = max(0.0, 1 - float(progress[0]) / HELP_UNTIL)
        heard = sound_loss(ear, hidden.last_hidden_state, batch["sounds"]) if weight > 0 else torch.zeros(())
        both = loss + weight * heard
        if weight > 0:
            both = both + weight * gaze.loss(batch["places"])
        both.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, losses = step + 1, losses + loss.item()
        clips, all_clips = clips + len(batch["labels"]), all_clips + len(batch["labels"])
        now = time.monotonic()
        if step % LOG_STEPS == 0:
            say(f"step {step}  {seconds / 60:.1f} min  loss {losses / LOG_STEPS:.3f}  sounds {heard.item():.2f}  "
                f"{clips / (now - logged):.1f} clips/s of {all_clips}  lr {optimizer.param_groups[0]['lr']:.1e}")  # fmt: skip
            clips, losses, logged = 0.0, 0.0, now
        if step % SCORE_STEPS == 0:
            report(model, labels)
        if now - saved > SAVE_SECONDS or stopped:
            save(folder, model, tokenizer, ear, optimizer, step, all_clips, seconds)
            saved = now
        if stopped:
            say("stopped; --resume goes on from here")
            return
    save(folder, model, tokenizer, ear, optimizer, step, all_clips, before + time.monotonic() - began)
    report(model, labels, clips=200)
    say(f"done: {folder / 'model'}")


def report(model: Any, labels: LabelTokenizer, clips: int = 60) -> None:
    parts = []
    for language in ("en", "zh"):
        spoken = list(score.held_out(language, "room and noise", clips))
        found = score.score(model, labels, spoken, AudioContext("auto", 0.6))
        parts.append(f"{language} CER {100 * found.cer:.1f} % exact {found.exact}/{found.clips}")
    say("held-out phrases by held-out voices: " + ", ".join(parts))


def save(
    folder: Path,
    model: Any,
    tokenizer: Any,
    ear: torch.nn.Linear,
    optimizer: torch.optim.Optimizer,
    step: int,
    clips: int,
    seconds: float,
) -> None:
    state = {
        "model": model.state_dict(),
        "ear": ear.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "clips": clips,
        "seconds": seconds,
    }
    partial = folder / "state.pt.partial"
    torch.save(state, partial)
    partial.replace(folder / "state.pt")
    write_checkpoint(folder / "model", model, tokenizer)


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=75, help="length of the whole training, stops not counted")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the state of the run")
    parser.add_argument("--resume", action="store_true", help="go on where the run in this folder stopped")
    parser.add_argument(
        "--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="of the training itself"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that synthesise speech")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=torch.cpu._is_avx512_bf16_supported(),
        help="multiply matrices in bfloat16; 1.8 times as fast where the processor can",
    )
    given = parser.parse_args()
    train(given.out, given.minutes, given.resume, given.threads, given.workers, given.seed, given.bf16)


if __name__ == "__main__":
    main()
