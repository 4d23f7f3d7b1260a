"""Train `resonance/nano` from nothing: python recipes/nano/build.py --minutes 75 --out FOLDER

Speech is synthesised while it trains. A stopped run goes on with --resume. What FOLDER/model holds at any time is a
complete checkpoint.
"""

from __future__ import annotations

import argparse
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
from recipes.nano.stream import Batches  # noqa: E402

from resonance.data.batches import AudioContext  # noqa: E402
from resonance.data.tokens import IGNORED_LABEL, LabelTokenizer  # noqa: E402
from resonance.model.context import allow_any_audio_context  # noqa: E402
from resonance.train.trainer import label_token_loss  # noqa: E402

WIDTH, ENCODER_LAYERS, DECODER_LAYERS = 160, 5, 2
LEARNING_RATE, WARM_UP_STEPS, WEIGHT_DECAY = 1.5e-3, 300, 0.01
BATCH_SECONDS = 40.0
TYPICAL_TOKENS = 60  # a batch with fewer label tokens counts for less, not as much as any other
CTC_UNTIL = 0.5  # share of the training after which the second loss is gone
SAVE_SECONDS, LOG_STEPS, SCORE_STEPS = 180, 50, 500


def learning_rate(step: int, progress: float) -> float:
    """Warm-up by steps, then a cosine over the planned time to a hundredth."""
    falling = 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0)))
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * falling


class Ctc(torch.nn.Module):
    """A second reading of the encoder's output, without a decoder: every position names a token or nothing.

    Attention finds out where words are only after hundreds of steps; this loss tells the encoder from the first one.
    The layer is thrown away at the end.
    """

    def __init__(self, width: int, text_tokens: int) -> None:
        super().__init__()
        self.blank = text_tokens
        self.layer = torch.nn.Linear(width, text_tokens + 1)

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """hidden [batch, positions, width], labels [batch, tokens]. The loss per label token."""
        texts = [row[(row >= 0) & (row < self.blank)] for row in labels]
        lengths = torch.tensor([len(text) for text in texts])
        positions = torch.full((len(texts),), hidden.shape[1])
        log_probs = self.layer(hidden).log_softmax(-1).transpose(0, 1)
        total = torch.nn.functional.ctc_loss(
            log_probs, torch.cat(texts), positions, lengths, blank=self.blank, reduction="sum", zero_infinity=True
        )
        return total / max(int(lengths.sum()), 1)


def train(folder: Path, minutes: float, resume: bool, threads: int, workers: int, seed: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, WIDTH, ENCODER_LAYERS, DECODER_LAYERS)
    allow_any_audio_context(model)
    model.train()
    labels = LabelTokenizer(tokenizer, True, None)
    ctc = Ctc(WIDTH, labels.special("<|endoftext|>"))
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *ctc.parameters()], lr=0.0, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True
    )
    step, before = 0, 0.0
    state_file = folder / "state.pt"
    if resume and state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        ctc.load_state_dict(state["ctc"])
        optimizer.load_state_dict(state["optimizer"])
        step, before = state["step"], state["seconds"]
    folder.mkdir(parents=True, exist_ok=True)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {size_in_bytes(model) / 1e6:.1f} MB in float16, "
        f"{len(tokenizer)} tokens of which {ctc.blank} text; step {step}, {before / 60:.1f} of {minutes:g} minutes done")  # fmt: skip

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
        hidden = model.model.encoder(batch["input_features"])
        output = model(encoder_outputs=hidden, decoder_input_ids=batch["decoder_input_ids"])
        tokens = max(int(batch["labels"].ne(IGNORED_LABEL).sum()), TYPICAL_TOKENS)
        loss = label_token_loss(output, batch["labels"], torch.tensor(tokens))
        weight = 0.5 * max(0.0, 1 - float(progress[0]) / CTC_UNTIL)
        both = loss + weight * ctc(hidden.last_hidden_state, batch["labels"]) if weight > 0 else loss
        both.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, clips, losses = step + 1, clips + len(batch["labels"]), losses + loss.item()
        now = time.monotonic()
        if step % LOG_STEPS == 0:
            say(f"step {step}  {seconds / 60:.1f} min  loss {losses / LOG_STEPS:.3f}  ctc {(both - loss).item() / max(weight, 1e-9):.2f}  "
                f"{clips / (now - logged):.1f} clips/s  lr {optimizer.param_groups[0]['lr']:.1e}")  # fmt: skip
            clips, losses, logged = 0.0, 0.0, now
        if step % SCORE_STEPS == 0:
            report(model, labels)
        if now - saved > SAVE_SECONDS or stopped:
            save(folder, model, tokenizer, ctc, optimizer, step, seconds)
            saved = now
        if stopped:
            say("stopped; --resume goes on from here")
            return
    save(folder, model, tokenizer, ctc, optimizer, step, before + time.monotonic() - began)
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
    folder: Path, model: Any, tokenizer: Any, ctc: Ctc, optimizer: torch.optim.Optimizer, step: int, seconds: float
) -> None:
    state = {
        "model": model.state_dict(),
        "ctc": ctc.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
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
    given = parser.parse_args()
    train(given.out, given.minutes, given.resume, given.threads, given.workers, given.seed)


if __name__ == "__main__":
    main()
